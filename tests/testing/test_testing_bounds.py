"""The bounds are valid, tight enough to mean something, and the comparison can fail."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_runs import run_layer, run_naive

from npmoe.activations import bind_activation
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive.activations import gelu_slope, silu_slope
from npmoe.testing import activation_bounds, score_bounds, soft_bounds
from npmoe.testing.balls import Ball, Model, softmax
from npmoe.testing.bounds import assert_within, dot_bound, gamma, unit_roundoff
from npmoe.testing.problems import MoEProblem, make_problem


def test_gamma_is_highams() -> None:
    u = Fraction(1, 2**24)
    for n in (0, 1, 7, 4096):
        assert gamma(n, "float32") == pytest.approx(float(n * u / (1 - n * u)), rel=1e-15)
    assert unit_roundoff("float64") == 2.0**-53
    with pytest.raises(
        RangeError, match=r"^gamma: n must be at least 0 .* got n = 2048 for float16"
    ):
        gamma(2**11, "float16")
    with pytest.raises(RangeError, match="got n = -1"):
        gamma(-1, "float32")


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(-20, 20))
def test_dot_bound_holds_in_any_order(seed: int, n: int, exponent: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal(n) * 2.0**exponent).astype(np.float32)
    w = rng.standard_normal(n).astype(np.float32)
    exact = sum(
        (Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, w, strict=True)), start=0
    )
    bound = dot_bound(np.abs(x).astype(float) @ np.abs(w).astype(float), n, "float32")
    forward = backward = np.float32(0)
    for i in range(n):
        forward = np.float32(forward + x[i] * w[i])
        backward = np.float32(backward + x[n - 1 - i] * w[n - 1 - i])
    for found in (forward, backward, x @ w, (x * w).sum()):
        assert abs(Fraction(float(found)) - exact) <= Fraction(float(bound))


def test_assert_within_accepts_the_bound_itself() -> None:
    assert_within(np.array([1.0, 2.5]), np.array([1.0, 2.0]), np.array([0.0, 0.5]), "x")
    assert_within(np.zeros((0, 3)), np.zeros((0, 3)), 0.0, "x")


@pytest.mark.parametrize(
    ("actual", "reference", "bound"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([1.0, math.nan], [1.0, 2.0], 1e300),
        ([1.0, 2.0], [1.0, math.nan], 1e300),
        ([1.0, math.nan], [1.0, math.nan], 1e300),
        ([1.0, math.inf], [1.0, 2.0], 1e300),
        ([1.0, 2.0], [1.0, 2.0], math.nan),
        ([1.0, 2.0], [1.0, 9.0], math.inf),
        ([1.0, 2.0], [1.0, 2.0], [0.0, -1.0]),
    ],
)
def test_assert_within_rejects(actual: list, reference: list, bound: object) -> None:
    limit = np.array(bound) if isinstance(bound, list) else bound
    with pytest.raises(
        AssertionError, match=r"^y: \d of 2 elements are out of bound; worst at \(\d"
    ):
        assert_within(np.array(actual), np.array(reference), limit, "y")


def test_assert_within_names_the_worst_element() -> None:
    reference = np.zeros((2, 2), np.float32)
    actual = np.array([[0.1, 0.5], [3.0, 0.0]], np.float32)
    with pytest.raises(AssertionError) as error:
        assert_within(actual, reference, 0.25, "grad_x")
    assert str(error.value) == (
        "grad_x: 2 of 4 elements are out of bound; worst at (1, 0): got np.float32(3.0), "
        "reference np.float32(0.0), error 3.000e+00, bound 2.500e-01."
    )


def test_assert_within_does_not_broadcast() -> None:
    with pytest.raises(
        AssertionError, match=r"^y: shapes must agree, got \(1,\), reference \(2,\)"
    ):
        assert_within(np.zeros(1), np.zeros(2), 1.0, "y")
    with pytest.raises(AssertionError, match=r"bound \(1,\)\.$"):
        assert_within(np.zeros(2), np.zeros(2), np.ones(1), "y")


def test_slopes_are_the_largest_ones() -> None:
    z = np.linspace(-6.0, 6.0, 24001)
    for slope, largest, curve in (
        (silu_slope, activation_bounds.SILU_SLOPE, activation_bounds.SILU_CURVE),
        (gelu_slope, activation_bounds.GELU_SLOPE, activation_bounds.GELU_CURVE),
    ):
        values = np.array([slope(v) for v in z])
        steps = np.abs(np.diff(values)) / np.diff(z)
        assert 0.9999 * largest < np.abs(values).max() <= largest
        assert 0.9999 * curve < steps.max() <= curve * (1.0 + 1e-9)


MODEL = Model.of(np.float32)
CAP = np.float32(0.7)
OPERATIONS = {
    "add": (lambda a, b: a + b, lambda a, b: a + b),
    "subtract": (lambda a, b: a - b, lambda a, b: a - b),
    "multiply": (lambda a, b: a * b, lambda a, b: a * b),
    "divide": (lambda a, b: a / b, lambda a, b: a / b),
    "matmul": (lambda a, b: a.matmul(b.T, 4), lambda a, b: a @ b.T),
    "sum": (lambda a, b: a.sum(axis=1), lambda a, b: a.sum(axis=1)),
    "square root": (lambda a, b: (a * a).sqrt(), lambda a, b: np.sqrt(a * a)),
    "maximum": (lambda a, b: a.maximum(0.3), lambda a, b: np.maximum(a, np.float32(0.3))),
    "cast": (lambda a, b: (a / b).cast(MODEL), lambda a, b: a / b),
    "softmax": (lambda a, b: softmax(a), None),
    "sigmoid": (lambda a, b: score_bounds.score(a, "sigmoid"), lambda a, b: sigmoid(a)),
    "sigmoid slope": (
        lambda a, b: score_bounds.score_slope(a, "sigmoid"),
        lambda a, b: sigmoid(a) * (1 - sigmoid(a)),
    ),
    "sqrtsoftplus": (
        lambda a, b: score_bounds.score(a, "sqrtsoftplus"),
        lambda a, b: np.sqrt(np.log1p(np.exp(a))),
    ),
    "sqrtsoftplus slope": (
        lambda a, b: score_bounds.score_slope(a, "sqrtsoftplus"),
        lambda a, b: sigmoid(a) / np.sqrt(np.log1p(np.exp(a))) / 2,
    ),
    "soft-cap": (lambda a, b: score_bounds.softcap(a, 0.7), lambda a, b: np.tanh(a / CAP) * CAP),
    "soft-cap slope": (
        lambda a, b: score_bounds.softcap_slope(score_bounds.softcap(a, 0.7), 0.7),
        lambda a, b: 1 - np.tanh(a / CAP) ** 2,
    ),
    "unit vector": (
        lambda a, b: soft_bounds.unit(a),
        lambda a, b: a / (np.linalg.norm(a, axis=1, keepdims=True) + np.float32(1e-6)),
    ),
    "silu": (lambda a, b: activation_bounds._silu(a), lambda a, b: a / (1 + np.exp(-a))),
    "relu": (lambda a, b: activation_bounds.activation(a, "relu"), lambda a, b: np.maximum(a, 0)),
}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax32(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-22, -2))
def test_balls_hold_what_float32_makes_of_their_members(
    operation: str, seed: int, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    on_balls, on_arrays = OPERATIONS[operation]
    balls, members = [], []
    for _ in range(2):
        member = rng.standard_normal((3, 4)).astype(np.float32)
        radius = rng.random((3, 4)) * 2.0**exponent
        # The member lies on the rim, where a radius that is too small shows.
        mid = member.astype(np.float64) + radius * rng.choice([-1.0, 1.0], (3, 4))
        balls.append(Ball(mid, np.abs(mid - member), MODEL))
        members.append(member)
    ball = on_balls(*balls)
    found = softmax32(members[0]) if on_arrays is None else on_arrays(*members)
    assert found.dtype == np.float32
    inside = np.abs(found - ball.mid) <= ball.rad
    assert inside.all(), f"{found} {ball}"


def test_division_by_a_ball_around_zero_knows_nothing() -> None:
    one, wide = Ball(np.ones(1), np.zeros(1), MODEL), Ball(np.ones(1), np.ones(1), MODEL)
    assert (one / wide).rad[0] == math.inf
    zero = Ball.exact(np.zeros(1), MODEL)
    assert (zero / zero).rad[0] == 0.0


CONFIGS = {
    "swiglu": {},
    "renorm": {"renormalize": True, "router_bias": True},
    "topk_score": {"router_order": "topk_score", "expert_bias": True},
    "gelu": {"activation": "gelu", "expert_bias": True, "router_bias": True},
    "after": {
        "activation": "relu",
        "renormalize": True,
        "capacity_factor": "1",
        "renormalize_drop": "after",
    },
    "sigmoid": {"score_fn": "sigmoid", "renormalize": True, "renorm_eps": 1e-20, "num_groups": 2},
    "sqrtsoftplus": {"score_fn": "sqrtsoftplus", "selection_bias": True, "renormalize": True},
    "euclidean": {"renormalize": True, "renorm_p": 2, "activation": "swiglu_clamp_pre"},
    "maximum": {"renormalize": True, "renorm_eps": 0.25, "renorm_eps_mode": "max"},
    "random": {
        "second_expert_policy": "random",
        "renormalize": True,
        "router_noise_std": 0.5,
        "router_jitter": 0.25,
        "expert_dropout": 0.25,
    },
    "softcap": {"logit_softcap": 2.0, "second_expert_policy": "sampling", "activation": "relu2"},
    "input": {
        "weight_position": "input",
        "router_order": "topk_score",
        "score_fn": "sigmoid",
        "top_k": 1,
        "expert_bias": True,
        "activation": "swiglu_oai",
    },
    "mid": {"weight_position": "mid", "expert_bias": True, "activation": "gelu_tanh"},
    "shared": {
        "shared_intermediate_size": 8,
        "shared_gated": True,
        "shared_combine": "average",
        "output_bias": True,
        "activation": "swiglu_clamp_post",
    },
    "identity": {"num_identity_experts": 4, "activation": "geglu"},
    "dense": {"routing": "dense", "score_fn": "sigmoid", "activation": "geglu_tanh"},
    "experts choose": {"routing": "expert_choice", "capacity_factor": "1.5", "activation": "reglu"},
    "soft": {"routing": "soft", "expert_capacity": 2, "num_experts": 4, "activation": "silu"},
}
FIRST = ("swiglu", "renorm", "topk_score", "gelu", "after")


def typical(name: str, dtype: str, seed: int = 1) -> MoEProblem:
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_experts": 8}
    cfg = MoEConfig(**(sizes | CONFIGS[name]))
    return make_problem(cfg, num_tokens=12, seed=seed, dtype=dtype, auxiliary=True, generator=True)


def pairs_of(problem: MoEProblem) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Return name, reference and bound of everything that is bounded."""
    results, bounds = run_naive(problem)
    names = ["output", "probs"] + ["topk_weights"] * (problem.cfg.routing != "soft")
    pairs = [(n, getattr(results, n), getattr(bounds, n)) for n in names]
    pairs.append(("logits", results.logits, bounds.router_logits))
    for name, reference in results.grads.items():
        bound = getattr(bounds.grads, name)
        assert (bound is None) == (reference is None)
        if bound is not None:
            pairs.append((name, reference, bound))
    return pairs


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bounds_are_below_one_percent_of_what_they_bound(name: str, dtype: str) -> None:
    for what, reference, bound in pairs_of(typical(name, dtype)):
        assert bound.shape == reference.shape
        part = 0.01 if dtype == "float32" else 1e-10
        assert bound.max() < part * np.abs(reference).max(), what
        # Half of the elements must also be tested to 1 % of themselves.
        tested = reference != 0.0
        assert np.median(bound[tested] / np.abs(reference[tested])) < 0.01, what


@pytest.mark.parametrize("name", CONFIGS)
def test_an_error_of_three_bounds_is_found(name: str) -> None:
    for what, reference, bound in pairs_of(typical(name, "float32")):
        assert_within(reference, reference, bound, what)
        worst = np.unravel_index(int(bound.argmax()), bound.shape)
        wrong = reference.copy()
        wrong[worst] += 3.0 * bound[worst]
        with pytest.raises(AssertionError, match=f"^{what}: 1 of"):
            assert_within(wrong, reference, bound, what)


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(FIRST), seed=st.integers(0, 2**32 - 1))
def test_a_dense_float32_layer_is_within_the_bound(name: str, seed: int) -> None:
    """Weights before the second product, all experts for all tokens: no code of npmoe.layer."""
    problem = typical(name, "float32", seed)
    forward, bounds = run_naive(problem)
    x, p, cfg = problem.hidden_states, problem.params, problem.cfg
    z = np.einsum("th,enh->ten", x, p.gate_up_proj)
    if p.gate_up_bias is not None:
        z = z + p.gate_up_bias
    act = bind_activation(*cfg.activation_call()).forward(z)
    dense = np.zeros((len(x), cfg.num_experts), np.float32)
    t, k = np.nonzero(forward.kept)
    dense[t, forward.topk_ids[t, k]] = forward.topk_weights[t, k]
    output = np.einsum("tei,ehi->th", act * dense[:, :, None], p.down_proj)
    if p.down_bias is not None:
        output = output + dense @ p.down_bias
    assert output.dtype == np.float32
    assert_within(output, forward.output, bounds.output, "dense output")


def test_exact_problems_have_no_error_at_all() -> None:
    cfg = MoEConfig(
        hidden_size=5, intermediate_size=8, num_experts=4, activation="relu", expert_bias=True
    )
    problem = make_problem(
        cfg, num_tokens=9, seed=2, dtype="float32", values="exact", replay="full", auxiliary=True
    )
    actual = run_layer(problem, "numpy")
    expected, bounds = run_naive(problem)
    assert_within(actual.output, expected.output, bounds.output, "output")
    assert_within(actual.output, expected.output, 0.0, "output")
