"""Problems are what their arguments say, and the strategies reach every structure."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from layer_runs import naive_forward, run_naive

from npmoe import naive
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.testing.draws import draw_numbers
from npmoe.testing.problems import MoEProblem, is_exact, make_problem
from npmoe.testing.strategies import _CANDIDATES, moe_configs, moe_problems, topk_ids_arrays

CFG = MoEConfig(hidden_size=5, intermediate_size=3, num_experts=4, router_bias=True)


def arrays_of(problem: MoEProblem) -> dict[str, np.ndarray]:
    trees = (problem.params, problem)
    found = {f.name: getattr(t, f.name) for t in trees for f in dataclasses.fields(t)}
    return {n: a for n, a in found.items() if isinstance(a, np.ndarray)}


def test_importing_the_kit_does_not_import_hypothesis() -> None:
    code = (
        "import sys, npmoe.testing, npmoe.testing.layer_bounds, npmoe.testing.problems;"
        "assert 'hypothesis' not in sys.modules;"
        "import npmoe.testing.strategies;"
        "assert 'hypothesis' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=60, deadline=None)
@given(moe_problems())
def test_the_repr_makes_the_problem_again(problem: MoEProblem) -> None:
    again = eval(repr(problem), {"make_problem": make_problem, "MoEConfig": MoEConfig})
    assert again.cfg == problem.cfg
    assert repr(again) == repr(problem)
    one, other = arrays_of(problem), arrays_of(again)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes()
        assert array.strides == other[name].strides
        assert array.flags.writeable == other[name].flags.writeable
        assert array.dtype == other[name].dtype


def test_the_seed_makes_the_values() -> None:
    one, other = (make_problem(CFG, num_tokens=3, seed=s) for s in (0, 1))
    for name, array in arrays_of(one).items():
        assert (array != arrays_of(other)[name]).any()


@pytest.mark.parametrize("layout", ["contiguous", "read_only", "strided", "reversed", "fortran"])
def test_layouts_hold_the_same_values(layout: str) -> None:
    kwargs = {"num_tokens": 6, "mask": "some", "replay": "holes", "auxiliary": True}
    plain = arrays_of(make_problem(CFG, **kwargs))
    other = arrays_of(make_problem(CFG, layout=layout, **kwargs))
    assert len(plain) == 9
    for name, array in other.items():
        np.testing.assert_array_equal(array, plain[name])
        assert array.flags.writeable == (layout != "read_only")
        assert array.flags.c_contiguous == (
            layout in ("contiguous", "read_only") or (layout == "fortran" and array.ndim == 1)
        )


def test_scales_are_what_the_exponents_say() -> None:
    cfg = dataclasses.replace(CFG, hidden_size=64, expert_bias=True)
    problem = make_problem(
        cfg,
        num_tokens=200,
        hidden_exponent=10,
        logit_exponent=-3,
        gate_up_exponent=2,
        grad_exponent=-9,
    )
    logits = problem.hidden_states @ problem.params.router_weight.T
    gate_up = problem.hidden_states @ problem.params.gate_up_proj[0].T
    cases = ((problem.hidden_states, 10), (logits, -3), (gate_up, 2), (problem.grad_output, -9))
    for array, exponent in cases:
        assert 0.8 < array.std() * 2.0**-exponent < 1.25


def test_load_patterns() -> None:
    cfg = MoEConfig(hidden_size=5, intermediate_size=3, num_experts=4)
    one = make_problem(cfg, num_tokens=9, load="one_expert", values="integer")
    first = naive.moe_forward(one.hidden_states, one.params, cfg).topk_ids[:, 0]
    assert len(set(first.tolist())) < len(first)
    far = make_problem(cfg, num_tokens=9, values="integer", logit_exponent=10)
    probs = naive.moe_forward(far.hidden_states, far.params, cfg).probs
    assert set(probs.ravel().tolist()) <= {0.0, 1.0, 1 / 2, 1 / 3, 1 / 4}
    tied = make_problem(cfg, num_tokens=9, load="tied", seed=3)
    assert (naive.moe_forward(tied.hidden_states, tied.params, cfg).topk_ids == [0, 1]).all()


def test_masked_rows_hold_nan() -> None:
    problem = make_problem(CFG, num_tokens=9, mask="some", auxiliary=True)
    masked = ~problem.token_mask
    assert masked.any()
    assert not masked.all()
    for array in (problem.hidden_states, problem.grad_output, problem.grad_router_logits):
        assert (np.isnan(array) == masked[:, None]).all()


def test_exact_values_are_refused_where_they_are_not() -> None:
    with pytest.raises(
        RangeError, match=r"^make_problem: cfg must have exact results .* got make_"
    ):
        make_problem(MoEConfig(), num_tokens=3, values="exact")
    with pytest.raises(
        RangeError, match=r"^make_problem: exponents must be 0 with values='integer'"
    ):
        make_problem(CFG, num_tokens=3, values="integer", grad_exponent=1)
    with pytest.raises(RangeError, match="only logit_exponent may be positive"):
        make_problem(CFG, num_tokens=3, values="integer", logit_exponent=-1)


@settings(max_examples=60, deadline=None)
@given(moe_problems(values=("exact",)))
def test_exact_results_fit_float32_with_bits_to_spare(problem: MoEProblem) -> None:
    assert is_exact(problem.cfg, len(problem.hidden_states))
    results, _ = run_naive(problem)
    for name, array in results.arrays().items():
        # Of the router, only the weights and what follows from them are exact.
        if array is not None and name != "probs":
            scaled = array * 2.0**8
            assert (scaled == np.rint(scaled)).all(), name
            assert (np.abs(scaled) < 2.0**24).all(), name


@settings(max_examples=150, deadline=None)
@given(moe_configs())
def test_configs_are_legal_and_survive_json(cfg: MoEConfig) -> None:
    assert MoEConfig.from_json(cfg.to_json()) == cfg


def test_every_value_is_drawn_somewhere() -> None:
    """A value that the config always refused would be left out of all tests, and unseen."""
    seen: dict[str, set] = {name: set() for name in _CANDIDATES}

    @settings(max_examples=600, derandomize=True, database=None, deadline=None)
    @given(moe_configs())
    def draw(cfg: MoEConfig) -> None:
        for name, values in seen.items():
            values.add(getattr(cfg, name))

    draw()
    factors = ("capacity_factor", "eval_capacity_factor")
    for name, candidates in _CANDIDATES.items():
        wanted = {Fraction(c) if name in factors and c is not None else c for c in candidates}
        assert wanted <= seen[name], name


@settings(max_examples=30, deadline=None)
@given(st.data())
@pytest.mark.parametrize(
    "fixed",
    [
        {"renormalize_drop": "after"},
        {"drop_policy": "probability"},
        {"expert_capacity": 2},
        {"capacity_factor": Fraction(3, 2), "capacity_rounding": "floor"},
        {"min_capacity": 4, "capacity_factor": "1"},
        {"num_experts": 1},
        {"top_k": 4},
        {"top_k": 3, "num_experts": 3, "renormalize": True},
        {"router_order": "topk_score"},
        {"capacity_factor": None, "expert_capacity": None},
    ],
    ids=str,
)
def test_fixed_fields_stay(fixed: dict, data: st.DataObject) -> None:
    cfg = data.draw(moe_configs(**fixed))
    for name, value in fixed.items():
        found = getattr(cfg, name)
        assert found == (Fraction(value) if isinstance(found, Fraction) else value)


@settings(max_examples=50, deadline=None)
@given(topk_ids_arrays())
def test_drawn_ids_are_distinct_within_a_token(ids: np.ndarray) -> None:
    assert ids.dtype == np.int32
    for row in ids.tolist():
        chosen = [e for e in row if e >= 0]
        assert len(set(chosen)) == len(chosen)
        assert min(row) >= -1


def forward_of(p: MoEProblem) -> naive.NaiveForward:
    return naive_forward(p, draw_numbers(p))


def has_drops(p: MoEProblem) -> bool:
    forward = forward_of(p)
    return bool(((forward.topk_ids >= 0) & ~forward.kept).any() and forward.kept.any())


def has_ties(p: MoEProblem) -> bool:
    rows = [r for r in np.sort(forward_of(p).probs, axis=1) if r.any()]
    return any((np.diff(r) == 0).any() for r in rows)


def used_experts(p: MoEProblem) -> tuple[int, int]:
    """Return how many experts share how many routes."""
    forward = forward_of(p)
    used = forward.topk_ids[forward.kept].tolist()
    return len(set(used)), len(used)


REACHABLE: dict[str, Callable[[MoEProblem], bool]] = {
    "no tokens": lambda p: len(p.hidden_states) == 0,
    "one token": lambda p: len(p.hidden_states) == 1,
    "more experts than tokens": lambda p: 0 < len(p.hidden_states) < p.cfg.num_experts,
    "one expert": lambda p: p.cfg.num_experts == 1,
    "all experts": lambda p: p.cfg.top_k == p.cfg.num_experts > 8,
    "replay with holes": lambda p: p.topk_ids is not None and (p.topk_ids < 0).any(),
    "nothing valid": lambda p: p.token_mask is not None and not p.token_mask.any(),
    "strided": lambda p: p.hidden_states.size > 1 and not p.hidden_states.data.contiguous,
    "read only": lambda p: not p.hidden_states.flags.writeable,
    "exact": lambda p: p.exact and p.cfg.top_k == 2 and len(p.hidden_states) > 3,
    "huge": lambda p: np.abs(p.hidden_states).max(initial=0.0) > 2.0**6,
    "probability after": lambda p: (
        (p.cfg.drop_policy, p.cfg.renormalize_drop) == ("probability", "after")
    ),
    "drops": has_drops,
    "ties": has_ties,
    "an empty expert": lambda p: 0 < used_experts(p)[0] < p.cfg.num_experts,
    "one expert has everything": lambda p: (
        p.cfg.num_experts > 1 and used_experts(p)[0] == 1 and used_experts(p)[1] > 2
    ),
    "capacity zero": lambda p: p.cfg.expert_capacity == 0,
    "sequences of several tokens": lambda p: p.num_sequences > 1 and p.sequence_length > 1,
    "soft routing, masked": lambda p: p.cfg.routing == "soft" and not p.valid.all(),
    "experts choose": lambda p: p.cfg.routing == "expert_choice" and len(p.hidden_states) > 3,
    "identity experts": lambda p: (forward_of(p).topk_ids >= p.cfg.num_experts).any(),
    "nothing random": lambda p: p.generator_seed is None and p.cfg.expert_dropout > 0,
    "exact dropout": lambda p: (
        p.exact and p.cfg.expert_dropout > 0 and p.generator_seed is not None
    ),
    "replay of more than K": lambda p: p.topk_ids is not None and p.topk_ids.shape[1] > p.cfg.top_k,
}


@pytest.mark.parametrize("structure", REACHABLE)
def test_defaults_reach(structure: str) -> None:
    find(
        moe_problems(),
        REACHABLE[structure],
        settings=settings(
            max_examples=3000,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
        random=random.Random(0),
    )
