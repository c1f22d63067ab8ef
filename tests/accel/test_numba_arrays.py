"""Arrays as callers have them: any layout, any alignment, and nothing written but results."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from needs import need_numba

need_numba()

from numba_problems import LAYOUTS, Experts, draw_experts, foreign, plan_of, spread_plan

import npmoe
from npmoe import MoEConfig, MoEGrads, MoEParams
from npmoe.dispatch import DispatchPlan

layouts = pytest.mark.parametrize("layout", LAYOUTS)
DTYPES = ("float32", "float64")
PLAN = ("pair_ids", "token_ids", "row_ids", "expert_offsets")


def with_plan(plan: DispatchPlan, change: Callable[[Any], Any]) -> DispatchPlan:
    return dataclasses.replace(plan, **{n: change(getattr(plan, n)) for n in PLAN})


def verb_calls(dtype: str, stored: Any) -> dict[str, tuple[Any, ...]]:
    """Return arguments of every verb: arrays, a plan or a config."""
    plan = spread_plan(30, 4, 2)
    case = draw_experts(plan, 21, 18, activation="swiglu", integers=False).astype(dtype, stored)
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(dtype)

    R, w1, cfg = plan.num_rows, case.params.gate_up_proj, case.cfg
    return {
        "linear": (draw(30, 21), draw(5, 21), draw(5)),
        "linear_backward": (draw(30, 5), draw(30, 21), draw(5, 21), draw(5)),
        "gather_rows": (case.x, plan),
        "combine_rows": (draw(R, 21), plan, {"topk_weights": case.topk_weights}),
        "scale_rows": (draw(R, 21), plan, case.topk_weights),
        "row_dot": (draw(R, 21), draw(R, 21), plan),
        "grouped_gemm": (draw(R, 21), w1, plan, {"bias": draw(4, 36)}),
        "grouped_gemm transposed": (draw(R, 36), w1, plan, {"transposed": True}),
        "grouped_gemm_wgrad": (draw(R, 21), draw(R, 36), plan),
        "segment_sum": (draw(R, 21), plan),
        "activation": (draw(R, 36), cfg),
        "activation_backward": (draw(R, 18), draw(R, 36), cfg),
        "experts_forward": (
            case.x, case.params, plan, case.topk_weights, cfg,
            {"dropout": abs(draw(R, 18))},
        ),
        "experts_backward": (
            case.grad_output, case.x, draw(R, 36), case.params, plan, case.topk_weights, cfg,
            {"dropout": abs(draw(R, 18))},
        ),
    }  # fmt: skip


VERBS = list(verb_calls("float32", "float32"))


def split(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (args[:-1], args[-1]) if isinstance(args[-1], dict) else (args, {})


def call(verb: str, args: tuple[Any, ...]) -> list[np.ndarray]:
    plain, options = split(args)
    backend = npmoe.get_backend("numba")
    return list(arrays_of(getattr(backend, verb.partition(" ")[0])(*plain, **options)))


def arrays_of(result: Any) -> Iterator[np.ndarray]:
    if isinstance(result, np.ndarray):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from arrays_of(part)
    elif dataclasses.is_dataclass(result):
        yield from arrays_of([getattr(result, f.name) for f in dataclasses.fields(result)])
    elif isinstance(result, dict):
        yield from arrays_of(list(result.values()))


def changed_one_by_one(
    args: tuple[Any, ...], change: Callable[[Any], Any]
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the arguments with one array changed, also inside parameters and the plan."""
    for i, arg in enumerate(args):
        for name, changed in changes(arg, change):
            yield f"{i}.{name}", (*args[:i], changed, *args[i + 1 :])


def changes(arg: Any, change: Callable[[Any], Any]) -> Iterator[tuple[str, Any]]:
    if isinstance(arg, np.ndarray):
        yield "", change(arg)
    elif isinstance(arg, DispatchPlan):
        for name in PLAN:
            yield name, dataclasses.replace(arg, **{name: change(getattr(arg, name))})
    elif isinstance(arg, MoEParams):
        for name in ("gate_up_proj", "down_proj"):
            yield name, dataclasses.replace(arg, **{name: change(getattr(arg, name))})
    elif isinstance(arg, dict):
        for name, value in arg.items():
            if isinstance(value, np.ndarray):
                yield name, arg | {name: change(value)}


def bytes_of(arrays: list[np.ndarray]) -> list[bytes]:
    return [a.tobytes() for a in arrays]


@layouts
@pytest.mark.parametrize("verb", VERBS)
def test_verbs_take_any_layout(verb: str, layout: str) -> None:
    """With the bits of the contiguous call, and no array written to."""
    for dtype, stored in (("float32", "float32"), ("float64", "float64"),
                          ("float32", ml_dtypes.bfloat16)):  # fmt: skip
        args = verb_calls(dtype, stored)[verb]
        want = bytes_of(call(verb, args))
        for name, changed in changed_one_by_one(args, LAYOUTS[layout]):
            before = bytes_of(list(arrays_of(changed)))
            assert bytes_of(call(verb, changed)) == want, (name, dtype)
            assert bytes_of(list(arrays_of(changed))) == before, name


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_take_foreign_byte_order_or_say_so(verb: str) -> None:
    args = verb_calls("float32", "float32")[verb]
    want = bytes_of(call(verb, args))
    for name, changed in changed_one_by_one(args, foreign):
        said = ""
        try:
            got = call(verb, changed)
        except npmoe.NpmoeError as error:
            said = str(error)
        if said:
            assert ">f4" in said or ">i4" in said, name
        else:
            assert bytes_of([a.astype(a.dtype.newbyteorder("=")) for a in got]) == want, name


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_refuse_other_dtypes_by_name(verb: str) -> None:
    args = verb_calls("float32", "float32")[verb]
    for dtype in ("float16", "longdouble", "int32", "complex64"):
        changed = tuple(
            a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype == np.float32 else a
            for a in args
        )
        with pytest.raises(npmoe.UnsupportedError, match="float32"):
            call(verb, changed)


# The layer.

CFG = MoEConfig(
    hidden_size=21, intermediate_size=18, num_experts=5, top_k=2, expert_bias=True,
    router_bias=True, shared_intermediate_size=7, output_bias=True,
)  # fmt: skip


def layer(x: Any, params: MoEParams, grad: Any, **options: Any) -> dict[str, Any]:
    output, saved = npmoe.moe_forward(x, params, CFG, "numba", **options)
    grads = npmoe.moe_backward(grad, saved, params)
    return {"output": output} | {
        n: getattr(grads, n) for n in MoEGrads.__dataclass_fields__ if getattr(grads, n) is not None
    }


def layer_arguments(dtype: str, stored: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    params = npmoe.init_params(CFG, dtype=dtype)
    matrices = {n: getattr(params, n).astype(stored) for n in ("gate_up_proj", "down_proj")}
    return {
        "hidden_states": rng.standard_normal((40, 21)).astype(dtype),
        "grad_output": rng.standard_normal((40, 21)).astype(dtype),
        "topk_ids": rng.permuted(np.tile(np.arange(5, dtype=np.int32), (40, 1)), axis=1)[:, :2],
        "token_mask": rng.random(40) < 0.8,
        **{
            f"params.{n}": matrices.get(n, getattr(params, n))
            for n in MoEParams.__dataclass_fields__
            if getattr(params, n) is not None
        },
    }


def run_layer(given: dict[str, Any]) -> dict[str, Any]:
    """Run it; without the gradient that NumPy sums, in an order that follows the layout."""
    params = {n.removeprefix("params."): a for n, a in given.items() if n.startswith("params.")}
    empty = {n: None for n in MoEParams.__dataclass_fields__ if n not in params}
    found = layer(
        given["hidden_states"], MoEParams(**params, **empty), given["grad_output"],
        topk_ids=given["topk_ids"], token_mask=given["token_mask"],
    )  # fmt: skip
    del found["output_bias"]
    return found


@layouts
@pytest.mark.parametrize("stored", [*DTYPES, "float16"])
def test_the_layer_takes_any_layout(stored: str, layout: str) -> None:
    given = layer_arguments("float64" if stored == "float64" else "float32", stored)
    want = bytes_of(list(run_layer(given).values()))
    for name, array in given.items():
        changed = given | {name: LAYOUTS[layout](array)}
        before = bytes_of(list(changed.values()))
        assert bytes_of(list(run_layer(changed).values())) == want, name
        assert bytes_of(list(changed.values())) == before, name
    every = {name: LAYOUTS[layout](array) for name, array in given.items()}
    assert bytes_of(list(run_layer(every).values())) == want


def test_the_layer_names_arrays_of_foreign_byte_order() -> None:
    given = layer_arguments("float32", "float32")
    want = bytes_of(list(run_layer(given).values()))
    for name, array in given.items():
        changed = given | {name: foreign(array)}
        if array.dtype == np.float32:
            with pytest.raises(npmoe.DTypeError, match=f"{name} must have dtype .*got >f4"):
                run_layer(changed)
        else:
            assert bytes_of(list(run_layer(changed).values())) == want, name


@pytest.mark.parametrize("dtype", ["float16", "longdouble", "int64", "complex128", "bfloat16"])
def test_the_layer_names_hidden_states_of_another_dtype(dtype: str) -> None:
    given = layer_arguments("float32", "float32")
    given["hidden_states"] = given["hidden_states"].astype(dtype)
    with pytest.raises(npmoe.DTypeError, match="hidden_states must have dtype float32 or float64"):
        run_layer(given)


# Gradients into the caller's arrays.


def out_arrays(case: Experts) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    names = ("router_weight", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")
    shapes = {n: getattr(case.params, n).shape for n in names}
    return {n: rng.integers(-9, 9, s).astype(case.x.dtype) for n, s in shapes.items()}


OUT_LAYOUTS = [n for n in LAYOUTS if "read_only" not in n]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", OUT_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_out_arrays_of_any_layout(dtype: str, layout: str, accumulate: bool) -> None:
    case = draw_experts(plan_of([0, 3, 40]), 16, 32, bias=True).astype(dtype)
    cfg = dataclasses.replace(case.cfg, top_k=1)
    ids = np.repeat(np.arange(3, dtype=np.int32), [0, 3, 40])[:, None]
    _, saved = npmoe.moe_forward(case.x, case.params, cfg, "numba", topk_ids=ids)
    fresh = npmoe.moe_backward(case.grad_output, saved, case.params)
    given = out_arrays(case)
    for name in given:
        arrays = {n: LAYOUTS[layout](a) if n == name else a.copy() for n, a in given.items()}
        start = {n: a.copy() for n, a in arrays.items()}
        grads = npmoe.moe_backward(
            case.grad_output, saved, case.params, out=MoEParams(**arrays), accumulate=accumulate
        )
        for n, array in arrays.items():
            assert getattr(grads, n) is array
            want = getattr(fresh, n)
            if n == "router_weight" or not accumulate:
                want = start[n] + want if accumulate else want
                np.testing.assert_array_equal(array, want, err_msg=n)
            else:
                # Sums may be taken in another order.
                np.testing.assert_allclose(array, start[n] + want, rtol=1e-4, atol=1e-4)
            if n != "router_weight":
                assert accumulate or not array[0].any()
                assert not accumulate or (array[0] == start[n][0]).all()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj", "gate_up_bias", "down_bias"])
@pytest.mark.parametrize("layout", ["read_only", "misaligned_read_only"])
def test_read_only_out_arrays_are_refused_by_name(layout: str, name: str) -> None:
    case = draw_experts(plan_of([0, 3, 40]), 16, 32, bias=True).astype("float32")
    ids = np.repeat(np.arange(3, dtype=np.int32), [0, 3, 40])[:, None]
    _, saved = npmoe.moe_forward(case.x, case.params, case.cfg, "numba", topk_ids=ids)
    given = out_arrays(case)
    given[name] = LAYOUTS[layout](given[name])
    before = given[name].copy()
    with pytest.raises((npmoe.NpmoeError, ValueError), match=rf"{name}.*(writ|read-only)"):
        npmoe.moe_backward(case.grad_output, saved, case.params, out=MoEParams(**given))
    np.testing.assert_array_equal(given[name], before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", range(0, 65, 4))
def test_out_arrays_at_any_address_keep_their_neighbours(offset: int, dtype: str) -> None:
    """Writes past the caches need whole lines: addresses and widths beside them do not get any."""
    for hidden in (16, 17, 32):
        case = draw_experts(plan_of([0, 5, 30]), hidden, 32, bias=True).astype(dtype)
        fresh = npmoe.get_backend("numba")
        plain = run_backward(fresh, case, None)
        rooms, arrays = {}, {}
        for name in ("router_weight", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            shape = getattr(case.params, name).shape
            size = int(np.prod(shape))
            room = np.full(size + 96, -777.0, dtype)
            skip = -room.ctypes.data % 64 // room.itemsize + offset * 4 // room.itemsize
            rooms[name] = room, slice(skip, skip + size)
            arrays[name] = room[skip : skip + size].reshape(shape)
        grads = run_backward(fresh, case, MoEParams(**arrays))
        for name in ("gate_up_proj", "down_proj", "gate_up_bias", "down_bias"):
            room, inside = rooms[name]
            assert getattr(grads, name) is arrays[name]
            np.testing.assert_array_equal(arrays[name], getattr(plain, name))
            assert (room[: inside.start] == -777.0).all()
            assert (room[inside.stop :] == -777.0).all()


def run_backward(backend: Any, case: Experts, out: MoEParams | None) -> Any:
    args = (case.params, case.plan, case.topk_weights, case.cfg)
    _, gate_up = backend.experts_forward(case.x, *args)
    return backend.experts_backward(case.grad_output, case.x, gate_up, *args, out=out)
