"""Expert weights in half precision: storage that is read as the float32 numbers it holds."""

from __future__ import annotations

import dataclasses
import sys
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import npmoe
from npmoe import BackendUnavailableError, DTypeError, MoEConfig, MoEParams, ops
from npmoe._half import is_float, is_half, named_dtype
from npmoe.fused_shared import fuse_shared_experts, unfuse_shared_experts
from npmoe.layer_gradcheck import gradcheck_layers
from npmoe.layouts import LAYOUTS, from_layout, to_layout
from npmoe.models import LanguageConfig, init_language_params, language_forward
from npmoe.testing.draws import needs_generator
from npmoe.testing.problems import make_problem
from npmoe.training.optimizer import AdamW, AdamWConfig, make_groups
from npmoe.tree import flatten, map_arrays, num_elements

HALF = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
MATRICES = ("gate_up_proj", "down_proj")
CFG = MoEConfig(hidden_size=4, intermediate_size=3, num_experts=5, top_k=2, expert_bias=True)
PARAMS = npmoe.init_params(CFG)
X = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
halves = pytest.mark.parametrize("half", HALF, ids=str)


def with_matrices(params: MoEParams, dtype: Any) -> MoEParams:
    return dataclasses.replace(params, **{n: getattr(params, n).astype(dtype) for n in MATRICES})


def message(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(DTypeError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# What they mean.


@halves
@pytest.mark.parametrize("backend", ["numpy", "reference", "loopback"])
@pytest.mark.parametrize("name", gradcheck_layers())
def test_results_have_the_bits_of_converted_weights(name: str, backend: str, half: Any) -> None:
    cfg = gradcheck_layers()[name]
    problem = make_problem(
        cfg, num_tokens=6, dtype="float32", mask="some", generator=needs_generator(cfg)
    )
    run = npmoe.get_backend(backend)

    def move(array: Any) -> Any:
        return None if array is None else run.asarray(array)

    def results(params: MoEParams) -> list[np.ndarray]:
        moved = map_arrays(lambda _, a: move(a), params)
        output, saved = npmoe.moe_forward(
            move(problem.hidden_states),
            moved,
            cfg,
            run,
            problem.generator(),
            move(problem.token_mask),
            move(problem.topk_ids),
        )
        grads = npmoe.moe_backward(move(problem.grad_output), saved, moved)
        values = [output, *(getattr(grads, n) for n in type(grads).__dataclass_fields__)]
        return [run.asnumpy(v) for v in values if v is not None]

    stored = with_matrices(problem.params, half)
    for got, want in zip(results(stored), results(with_matrices(stored, np.float32)), strict=True):
        assert got.dtype == np.float32
        assert got.tobytes() == want.tobytes()


@halves
def test_every_half_number_is_read_exactly(half: Any) -> None:
    bits = np.arange(2**16, dtype=np.uint16).view(half)
    wide = np.array([float(b) for b in bits], np.float32)
    got = ops.expert_matrix(bits.reshape(1, 2**8, 2**8), 0)
    np.testing.assert_array_equal(got.ravel(), wide)
    assert ops.expert_matrix(wide[None, None], 0).base is not None


@halves
def test_wide_gradients_may_be_accumulated_in_place(half: Any) -> None:
    stored = with_matrices(PARAMS, half)
    _, saved = npmoe.moe_forward(X, stored, CFG)
    first = npmoe.moe_backward(X, saved, stored)
    again = npmoe.moe_backward(X, saved, stored, out=first.params())
    assert again.down_proj is first.down_proj
    kept = first.down_proj.copy()
    npmoe.moe_backward(X, saved, stored, out=first.params(), accumulate=True)
    np.testing.assert_array_equal(first.down_proj, 2 * kept)


@halves
@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_one_expert_at_a_time_is_converted(backend: str, half: Any) -> None:
    cfg = MoEConfig(hidden_size=96, intermediate_size=96, num_experts=32, top_k=2)
    stored = with_matrices(npmoe.init_params(cfg), half)
    x = np.random.default_rng(0).standard_normal((16, 96)).astype(np.float32)
    one = 4 * 3 * 96 * 96
    _, saved = npmoe.moe_forward(x, stored, cfg, backend)
    out = npmoe.moe_backward(x, saved, stored).params()

    def forward() -> None:
        npmoe.moe_forward(x, stored, cfg, backend, save=False)

    def backward() -> None:
        npmoe.moe_backward(x, saved, stored, out=out)

    for call in (forward, backward):
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The next expert is made before the last is let go; the rest is 32 rows.
        assert peak < 4 * one


@halves
def test_an_expert_of_many_blocks_is_converted_once(
    half: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, converted = ops.expert_matrix, []

    def count(weight: Any, e: int) -> Any:
        converted.append(e)
        return inner(weight, e)

    monkeypatch.setattr(ops, "expert_matrix", count)
    cfg = MoEConfig(hidden_size=4, intermediate_size=3, num_experts=2, top_k=2)
    stored = with_matrices(npmoe.init_params(cfg), half)
    x = np.ones((1500, 4), np.float32)
    _, saved = npmoe.moe_forward(x, stored, cfg, "numpy")
    assert converted == [0, 0, 1, 1]
    npmoe.moe_backward(x, saved, stored)
    assert converted == [0, 0, 1, 1] * 2


@halves
def test_the_language_model_runs_on_them(half: Any) -> None:
    moe = MoEConfig(hidden_size=8, intermediate_size=6, num_experts=4, top_k=2)
    cfg = LanguageConfig(vocab_size=7, hidden_size=8, num_layers=1, num_heads=4, moe=moe)
    params = init_language_params(cfg)

    def logits(dtype: Any) -> np.ndarray:
        stored = map_arrays(
            lambda n, a: a.astype(half).astype(dtype) if n.endswith(MATRICES) else a, params
        )
        return language_forward(np.arange(5)[None], stored, cfg)[0]

    assert logits(half).dtype == np.float32
    assert logits(half).tobytes() == logits(np.float32).tobytes()


# What is refused.


@halves
def test_wide_hidden_states_are_refused(half: Any) -> None:
    for name in MATRICES:
        wide = npmoe.init_params(CFG, dtype="float64")
        mixed = dataclasses.replace(wide, **{name: getattr(wide, name).astype(half)})
        assert message(npmoe.moe_forward, X.astype(np.float64), mixed, CFG) == (
            f"moe_forward: params.{name} must have dtype float64, got {half}. The dtype is bound "
            "by hidden_states; expert weights in half precision need float32 there. Convert one "
            "of them with astype."
        )


@halves
def test_both_matrices_have_one_dtype(half: Any) -> None:
    other = next(h for h in HALF if h != half)
    for first, second in ((half, np.float32), (np.float32, half), (half, other)):
        mixed = dataclasses.replace(
            PARAMS,
            gate_up_proj=PARAMS.gate_up_proj.astype(first),
            down_proj=PARAMS.down_proj.astype(second),
        )
        assert message(npmoe.moe_forward, X, mixed, CFG) == (
            f"moe_forward: params.down_proj must have dtype {np.dtype(first)}, got "
            f"{np.dtype(second)}. The dtype is bound by params.gate_up_proj. Convert one of them "
            "with astype."
        )


@halves
def test_nothing_else_may_be_half(half: Any) -> None:
    stored = with_matrices(PARAMS, half)
    for name in ("router_weight", "gate_up_bias", "down_bias"):
        more = dataclasses.replace(stored, **{name: getattr(PARAMS, name).astype(half)})
        assert message(npmoe.moe_forward, X, more, CFG) == (
            f"moe_forward: params.{name} must have dtype float32 or float64, got {half}. Convert "
            f"it with params.{name}.astype('float32')."
        )
    assert message(npmoe.moe_forward, X.astype(half), stored, CFG) == (
        f"moe_forward: hidden_states must have dtype float32 or float64, got {half}. Convert it "
        "with hidden_states.astype('float32')."
    )


@halves
def test_gradients_are_not_stored_in_half(half: Any) -> None:
    stored = with_matrices(PARAMS, half)
    _, saved = npmoe.moe_forward(X, stored, CFG)
    assert message(npmoe.moe_backward, X, saved, stored, out=stored) == (
        f"moe_backward: out.gate_up_proj must have dtype float32, got {half}. Gradients of expert "
        "weights have the dtype of hidden_states. Allocate it with that dtype."
    )


def test_init_params_draws_no_half_numbers() -> None:
    assert message(npmoe.init_params, CFG, dtype="float16") == (
        "init_params: dtype must be 'float32' or 'float64', got 'float16'."
    )


# What parameters pass through.


@halves
def test_the_optimizer_refuses_half_numbers(half: Any) -> None:
    stored = with_matrices(PARAMS, half)
    assert message(flatten, stored) == (
        f"flatten: gate_up_proj must have dtype float32, got {half}. The dtype is bound by "
        "router_weight. Convert one of them with astype."
    )
    groups = make_groups(stored, AdamWConfig())
    assert groups[-1].stop == num_elements(stored) == num_elements(PARAMS)
    assert message(AdamW, np.zeros(groups[-1].stop, half), groups, AdamWConfig()) == (
        f"AdamW: flat_params must have dtype float32 or float64, got {half}. Convert it with "
        "flat_params.astype('float32')."
    )


@halves
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_the_bits(layout: str, half: Any) -> None:
    cfg = MoEConfig(hidden_size=4, intermediate_size=32, num_experts=3, top_k=2)
    stored = with_matrices(npmoe.init_params(cfg), half)
    back = from_layout(to_layout(stored, layout), layout, num_experts=3)
    for name in MATRICES:
        got, want = getattr(back, name), getattr(stored, name)
        assert got.dtype == half
        assert got.tobytes() == want.tobytes()


@halves
def test_a_shared_expert_is_fused_in_the_dtype_of_the_others(half: Any) -> None:
    cfg = dataclasses.replace(CFG, shared_intermediate_size=6)
    stored = with_matrices(npmoe.init_params(cfg), half)
    ids, weights = np.zeros((2, 1), np.int32), np.ones((2, 1), np.float32)
    assert message(fuse_shared_experts, stored, ids, weights) == (
        "fuse_shared_experts: params.shared_gate_up_proj must have dtype "
        f"{half}, got float32. The dtype is bound by params.gate_up_proj. Convert one of them "
        "with astype."
    )
    shared = {
        n: getattr(stored, n).astype(half) for n in ("shared_gate_up_proj", "shared_down_proj")
    }
    whole = dataclasses.replace(stored, **shared)
    fused = fuse_shared_experts(whole, ids, weights)
    assert fused.params.gate_up_proj.dtype == fused.params.down_proj.dtype == half
    back = unfuse_shared_experts(fused, 2).params
    for name in (*MATRICES, *shared):
        assert getattr(back, name).tobytes() == getattr(whole, name).tobytes()


# The names of the dtypes.


def test_half_dtypes_are_known_by_name() -> None:
    assert [is_half(d) for d in (*HALF, np.dtype("float32"), np.dtype("V2"), None)] == [
        *(True, True, False, False, False)
    ]
    assert [is_float(np.dtype(d)) for d in (*HALF, "float64", "int16", "V2")] == [
        *(True, True, True, False, False)
    ]
    assert named_dtype("f", "bfloat16", "test") == HALF[1]
    assert named_dtype("f", "float16", "test") == HALF[0]


def test_bfloat16_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(BackendUnavailableError) as caught:
        named_dtype("check_backend", "bfloat16", "test")
    assert str(caught.value) == (
        "check_backend: bfloat16 needs the package ml_dtypes, which is not installed. Install it "
        "with: pip install 'npmoe[test]'."
    )
