"""The composed layer against the definition, on everything the strategies can draw."""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_runs import (
    BACKENDS,
    assert_close,
    assert_exact_zeros,
    assert_same_bits,
    assert_same_numbers,
    check_decisions,
    naive_forward,
    numbers_for,
    run_layer,
    run_naive,
)

from npmoe.testing.problems import MoEProblem
from npmoe.testing.strategies import moe_configs, moe_problems


def check_against_naive(problem: MoEProblem, backend: str) -> None:
    """Check decisions, then everything else with the definition told these decisions."""
    before = [a.tobytes() for a in arrays_of(problem)]
    actual = run_layer(problem, backend)
    assert [a.tobytes() for a in arrays_of(problem)] == before, "an input changed"
    assert_same_bits(run_layer(problem, backend), actual)

    router_dtype = problem.cfg.router_dtype or problem.dtype
    for name, array in actual.arrays().items():
        if array is not None and array.dtype.kind == "f":
            routers = ("topk_weights", "probs", "logits", "clean_logits")
            assert array.dtype == (router_dtype if name in routers else problem.dtype), name
    assert_exact_zeros(problem, actual)

    if problem.cfg.routing == "soft":
        expected, bounds = run_naive(problem)
    else:
        expected, bounds = run_naive(problem, actual.decisions)
        check_decisions(problem, actual, bounds)
    if problem.exact:
        assert_same_numbers(actual, run_naive(problem)[0])
    assert_close(problem, actual, expected, bounds)


def arrays_of(problem: MoEProblem) -> list[np.ndarray]:
    trees = (problem.params, problem)
    found = [getattr(t, f.name) for t in trees for f in dataclasses.fields(t)]
    return [a for a in found if isinstance(a, np.ndarray)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=100, deadline=None)
@given(problem=moe_problems())
def test_layer_is_the_definition(backend: str, problem: MoEProblem) -> None:
    check_against_naive(problem, backend)


# Structures that need several conditions at once, and are rare among all that is legal.
DROPS = {"expert_capacity": 2, "num_experts": 4, "top_k": 3}
PAIRS = {"num_experts": 4, "top_k": 2, "num_identity_experts": 0}
SECOND = PAIRS | {"routing": "token_choice", "num_groups": 1, "selection_bias": False}
GROUPS = {"num_experts": 8, "num_identity_experts": 0, "num_groups": 4, "topk_group": 2, "top_k": 4}
RANDOM = {"generator": True, "num_tokens": 6}
CHOSEN = {"replay": "none"}
RARE = {
    "partial drops, normalised after": moe_problems(
        moe_configs(renormalize_drop="after", **DROPS), num_tokens=7
    ),
    "partial drops, normalised before": moe_problems(
        moe_configs(renormalize=True, renormalize_drop="before", **DROPS), num_tokens=7
    ),
    "drops by weight": moe_problems(
        moe_configs(drop_policy="probability", expert_capacity=2, **PAIRS), num_tokens=7
    ),
    "drops by weight, normalised after": moe_problems(
        moe_configs(
            drop_policy="probability", renormalize_drop="after", expert_capacity=2, **PAIRS
        ),
        num_tokens=7,
    ),
    "drops by first weight, slots by token": moe_problems(
        moe_configs(drop_policy="batch_priority", slot_order="token", **DROPS), num_tokens=8
    ),
    "drops at random per sequence": moe_problems(
        moe_configs(drop_policy="random", capacity_scope="sequence", **DROPS),
        num_tokens=10,
        num_sequences=2,
    ),
    "drops beside identity experts": moe_problems(
        moe_configs(num_identity_experts=3, renormalize_drop="after", **DROPS), num_tokens=7
    ),
    "drops of a softmax over the chosen": moe_problems(
        moe_configs(router_order="topk_score", expert_capacity=2, num_experts=3, top_k=2),
        num_tokens=7,
    ),
    "capacity for valid tokens": moe_problems(
        moe_configs(capacity_factor="1/2", min_capacity=0, capacity_multiple=1), mask="some"
    ),
    "a second expert kept at random": moe_problems(
        moe_configs(
            second_expert_policy="random", renormalize=True, renormalize_drop="before", **SECOND
        ),
        load="spread",
        mask="none",
        **RANDOM,
        **CHOSEN,
    ),
    "a second expert kept at random, then dropped": moe_problems(
        moe_configs(
            second_expert_policy="random", renormalize_drop="after", expert_capacity=2, **SECOND
        ),
        **RANDOM,
        **CHOSEN,
    ),
    "a second expert drawn": moe_problems(
        moe_configs(second_expert_policy="sampling", **SECOND), **RANDOM, **CHOSEN
    ),
    "noise, jitter and soft-cap": moe_problems(
        moe_configs(router_noise_std=0.5, router_jitter=0.25, logit_softcap=0.5), **RANDOM
    ),
    "a router of another dtype": moe_problems(
        moe_configs(router_dtype="float32", router_bias=True), dtypes=("float64",), num_tokens=6
    ),
    "a wider router": moe_problems(
        moe_configs(router_dtype="float64", router_bias=True), dtypes=("float32",), num_tokens=6
    ),
    "groups by their best two": moe_problems(
        moe_configs(group_score="top2_sum", group_fill="zero", selection_bias=True, **GROUPS),
        num_tokens=5,
        **CHOSEN,
    ),
    "groups by K over groups": moe_problems(
        moe_configs(
            group_score="topk_div", score_fn="sigmoid", **(GROUPS | {"num_experts": 12, "top_k": 6})
        ),
        num_tokens=5,
        **CHOSEN,
    ),
    "the Euclidean norm": moe_problems(
        moe_configs(renorm_p=2, routing="token_choice", **PAIRS), num_tokens=6
    ),
    "eps instead of the norm": moe_problems(
        moe_configs(
            renormalize=True, renorm_eps=0.25, renorm_eps_mode="max", num_experts=11, top_k=2
        ),
        num_tokens=6,
    ),
    "weights on the input, dropout": moe_problems(
        moe_configs(
            weight_position="input", expert_dropout=0.5, expert_bias=True, num_experts=4, top_k=2
        ),
        **RANDOM,
    ),
    "weights inside, dropout": moe_problems(
        moe_configs(weight_position="mid", expert_dropout=0.5, expert_bias=True, **PAIRS), **RANDOM
    ),
    "a gated shared expert": moe_problems(
        moe_configs(shared_intermediate_size=3, shared_gated=True, shared_combine="average"),
        num_tokens=6,
    ),
    "experts choose in sequences": moe_problems(
        moe_configs(routing="expert_choice", capacity_scope="sequence"),
        num_tokens=9,
        num_sequences=3,
        mask="some",
        **CHOSEN,
    ),
    "soft routing in sequences": moe_problems(
        moe_configs(routing="soft"), num_tokens=8, num_sequences=2, mask="some"
    ),
    "hashes": moe_problems(moe_configs(routing="hash"), num_tokens=6),
    "probabilities that underflow": moe_problems(
        moe_configs(num_experts=8, top_k=3, score_fn="softmax", renormalize=False),
        num_tokens=5,
        values=("integer",),
        logit_exponent=10,
    ),
    "many experts and choices": moe_problems(moe_configs(num_experts=20, top_k=9), num_tokens=2),
}


@pytest.mark.parametrize("backend", ["reference", "numpy"])
@pytest.mark.parametrize("structure", RARE)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_rare_structures_are_the_definition(
    structure: str, backend: str, data: st.DataObject
) -> None:
    check_against_naive(data.draw(RARE[structure]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(problem=moe_problems(moe_configs(nan_policy="drop"), values=("normal",), mask="some"))
def test_dropping_non_finite_rows_is_masking_them(backend: str, problem: MoEProblem) -> None:
    masked = run_layer(problem, backend)
    everything = np.ones(len(masked.output), bool)
    dropped = run_layer(dataclasses.replace(problem, token_mask=everything), backend)
    none = run_layer(dataclasses.replace(problem, token_mask=None), backend)
    # What the router made of the dropped rows is kept to be looked at.
    seen = {"logits": masked.logits, "clean_logits": masked.clean_logits}
    for other in (dropped, none):
        assert_same_bits(other._replace(**seen), masked)


CLAMPED = {
    "routing": "token_choice",
    "nan_policy": "clamp",
    "logit_softcap": None,
    "router_bias": False,
    "router_dtype": None,
    "router_noise_std": 0.0,
    "router_jitter": 0.0,
    "second_expert_policy": "all",
    "num_identity_experts": 0,
    "shared_intermediate_size": 0,
    "output_bias": False,
    "drop_policy": "position",
    "weight_position": "output",
}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    problem=moe_problems(
        moe_configs(**CLAMPED), values=("normal",), mask="none", auxiliary=False, replay="none"
    )
)
def test_clamped_rows_go_to_the_first_experts_with_weight_zero(
    backend: str, problem: MoEProblem
) -> None:
    # Finite inputs whose logits overflow in either dtype.
    hidden = problem.hidden_states.copy()
    router = problem.params.router_weight.copy()
    big = float(np.finfo(problem.dtype).max) / 4.0
    broken = np.arange(len(hidden)) % 3 == 0
    hidden[broken, 0] = big
    hidden[~broken, 0] = 0.0
    router[:, 0] = 8.0
    w1 = problem.params.gate_up_proj.copy()
    w1[:, :, 0] = 0.0
    params = dataclasses.replace(problem.params, router_weight=router, gate_up_proj=w1)
    problem = dataclasses.replace(problem, params=params, hidden_states=hidden)
    with np.errstate(over="ignore"):
        actual = run_layer(problem, backend)
        if problem.dtype == np.float64:
            expected = naive_forward(problem, numbers_for(problem, None))
            assert not expected.output[broken].any()
            assert (actual.kept == expected.kept).all()
    assert (actual.topk_ids[broken] == np.arange(problem.cfg.top_k)).all()
    assert not actual.topk_weights[broken].any()
    assert not actual.probs[broken].any()
    assert not actual.output[broken].any()
    assert np.isfinite(actual.output).all()
    assert not actual.grads["hidden_states"][broken].any()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(problem=moe_problems(values=("exact",)))
def test_exact_problems_are_compared_bit_for_bit(backend: str, problem: MoEProblem) -> None:
    assert problem.exact
    assert_same_numbers(run_layer(problem, backend), run_naive(problem)[0])


@settings(max_examples=40, deadline=None)
@given(problem=moe_problems(layout="contiguous"))
def test_a_device_changes_no_bit(problem: MoEProblem) -> None:
    assert_same_bits(run_layer(problem, "loopback"), run_layer(problem, "reference"))


@settings(max_examples=30, deadline=None)
@given(problem=moe_problems(), block_rows=st.integers(1, 4))
def test_blocks_of_rows_change_nothing_but_rounding(problem: MoEProblem, block_rows: int) -> None:
    # The default of 512 rows is never reached here.
    with mock.patch("npmoe.backends.numpy_backend._BLOCK_ROWS", block_rows):
        check_against_naive(problem, "numpy")


@settings(max_examples=20, deadline=None)
@given(problem=moe_problems(num_tokens=12, num_sequences=4))
def test_leading_axes_are_flattened_and_restored(problem: MoEProblem) -> None:
    def fold(_: MoEProblem, array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else array.reshape(2, 2, 3, *array.shape[1:])

    one = run_layer(problem, "numpy")
    with mock.patch.object(MoEProblem, "fold", fold):
        assert_same_bits(run_layer(problem, "numpy"), one)
    if problem.cfg.routing != "soft" and problem.cfg.capacity_scope == "batch":
        assert_same_bits(run_layer(dataclasses.replace(problem, num_sequences=1), "numpy"), one)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    problem=moe_problems(
        moe_configs(
            router_bias=True,
            logit_softcap=None,
            selection_bias=False,
            num_groups=1,
            num_identity_experts=0,
        ),
        values=("normal",),
        load="spread",
    )
)
def test_experts_closed_by_a_bias_of_minus_infinity(backend: str, problem: MoEProblem) -> None:
    bias = problem.params.router_bias.copy()
    bias[1::2] = -np.inf
    params = dataclasses.replace(problem.params, router_bias=bias)
    problem = dataclasses.replace(problem, params=params)
    actual = run_layer(problem, backend)
    expected, bounds = run_naive(problem, actual.decisions)
    assert not actual.probs[:, 1::2].any()
    assert not actual.topk_weights[(actual.topk_ids >= 0) & (actual.topk_ids % 2 == 1)].any()
    # Infinite logits have no difference.
    infinite = np.isneginf(expected.logits)
    assert (np.isneginf(actual.logits) == infinite)[problem.valid].all()
    for name in ("logits", "clean_logits"):
        actual, expected = (
            r._replace(**{name: np.where(infinite, 0.0, getattr(r, name))})
            for r in (actual, expected)
        )
    assert_close(problem, actual, expected, bounds)
