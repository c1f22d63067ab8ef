"""Every message of the layer, character by character."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import npmoe
from npmoe import DTypeError, MoEConfig, MoEParams, RangeError, ShapeError

CFG = MoEConfig(
    hidden_size=4,
    intermediate_size=6,
    num_experts=3,
    top_k=2,
    router_bias=True,
    expert_bias=True,
)
PARAMS = npmoe.init_params(CFG, dtype="float64")


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


# Messages of the forward pass.


def forward_message(
    error: type[Exception], x: Any, params: MoEParams = PARAMS, **arguments: Any
) -> str:
    with pytest.raises(error) as caught:
        npmoe.moe_forward(x, params, CFG, **arguments)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(4,), (5, 3), (2, 5, 3), (4, 5), ()])
def test_shape_of_hidden_states(shape: tuple[int, ...]) -> None:
    assert forward_message(ShapeError, np.ones(shape)) == (
        "moe_forward: hidden_states must have shape (..., H) = (..., 4) with at least two axes, "
        f"got {shape}. H is bound by cfg."
    )


@pytest.mark.parametrize("dtype", ["int64", "float16", "complex128", "bool"])
def test_dtype_of_hidden_states(dtype: str) -> None:
    assert forward_message(DTypeError, np.ones((5, 4), dtype)) == (
        f"moe_forward: hidden_states must have dtype float32 or float64, got {dtype}. "
        "Convert it with hidden_states.astype('float32')."
    )
    assert forward_message(DTypeError, [[1.0] * 4]) == (
        "moe_forward: hidden_states must be an array, got list. "
        "Convert it with numpy.asarray or the backend's asarray."
    )


SPELLED = {
    "router_weight": "(E, H) = (3, 4)",
    "gate_up_proj": "(E, 2*I, H) = (3, 12, 4)",
    "down_proj": "(E, H, I) = (3, 4, 6)",
    "router_bias": "(E,) = (3,)",
    "gate_up_bias": "(E, 2*I) = (3, 12)",
    "down_bias": "(E, H) = (3, 4)",
}


def bound(name: str) -> str:
    letters = [c for c in "EHI" if c in SPELLED[name].split("=")[0]]
    order = sorted(letters, key=SPELLED[name].index)
    return f"{', '.join(order)} {'is' if len(order) == 1 else 'are'} bound by cfg."


@pytest.mark.parametrize("name", SPELLED)
def test_shape_of_parameters(name: str) -> None:
    right = getattr(PARAMS, name)
    for wrong, hint in (
        (np.ones((*right.shape, 1)), ""),
        (np.ones((right.shape[0] + 1, *right.shape[1:])), ""),
        (right.swapaxes(-1, -2) if right.ndim > 1 else np.ones(7), " It looks transposed."),
    ):
        broken = dataclasses.replace(PARAMS, **{name: wrong})
        end = hint if right.ndim > 1 else ""
        assert forward_message(ShapeError, normal(5, 4), broken) == (
            f"moe_forward: params.{name} must have shape {SPELLED[name]}, got {wrong.shape}. "
            f"{bound(name)}{end}"
        )


@pytest.mark.parametrize("name", SPELLED)
def test_dtype_of_parameters(name: str) -> None:
    value = getattr(PARAMS, name)
    mixed = dataclasses.replace(PARAMS, **{name: value.astype("float32")})
    assert forward_message(DTypeError, normal(5, 4), mixed) == (
        f"moe_forward: params.{name} must have dtype float64, got float32. "
        "The dtype is bound by hidden_states. Convert one of them with astype."
    )
    whole = dataclasses.replace(PARAMS, **{name: value.astype("int32")})
    assert forward_message(DTypeError, normal(5, 4), whole) == (
        f"moe_forward: params.{name} must have dtype float32 or float64, got int32. "
        f"Convert it with params.{name}.astype('float32')."
    )


@pytest.mark.parametrize("name", ["router_bias", "gate_up_bias", "down_bias"])
def test_missing_and_surplus_bias(name: str) -> None:
    option = "router_bias" if name == "router_bias" else "expert_bias"
    missing = dataclasses.replace(PARAMS, **{name: None})
    assert forward_message(ShapeError, normal(5, 4), missing) == (
        f"moe_forward: params.{name} must be an array, got None. cfg.{option} is True."
    )
    cfg = dataclasses.replace(CFG, router_bias=False, expert_bias=False)
    plain = npmoe.init_params(cfg, dtype="float64")
    surplus = dataclasses.replace(plain, **{name: getattr(PARAMS, name)})
    with pytest.raises(ShapeError) as caught:
        npmoe.moe_forward(normal(5, 4), surplus, cfg)
    assert str(caught.value) == (
        f"moe_forward: params.{name} must be None, got an array. cfg.{option} is False."
    )


def test_missing_weight() -> None:
    broken = dataclasses.replace(PARAMS, down_proj=None)
    assert forward_message(ShapeError, normal(5, 4), broken) == (
        "moe_forward: params.down_proj must be an array, got None. Every config has it."
    )


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (np.ones((5, 2), int), "int64 (5, 2)"),
        (np.ones((5, 2, 1), bool), "bool (5, 2, 1)"),
        (np.ones(10, bool), "bool (10,)"),
        (np.ones((2, 5), bool), "bool (2, 5)"),
        ([True], "list ()"),
    ],
)
def test_token_mask_messages(mask: Any, got: str) -> None:
    assert forward_message(ShapeError, normal(5, 2, 4), token_mask=mask) == (
        f"moe_forward: token_mask must be a bool array of shape (5, 2), got {got}. "
        "True means valid."
    )


@pytest.mark.parametrize("shape", [(5,), (4, 2), (5, 1, 2), (5, 0), ()])
def test_shape_of_replayed_ids(shape: tuple[int, ...]) -> None:
    ids = np.zeros(shape, int)
    assert forward_message(ShapeError, normal(5, 4), topk_ids=ids) == (
        f"moe_forward: topk_ids must have shape (..., K) = (5, 2), got {shape}. "
        "The leading axes are bound by hidden_states (5, 4)."
    )


def test_values_of_replayed_ids() -> None:
    x = normal(2, 4)
    for ids, low, high in (([[0, 3], [0, 1]], 0, 3), ([[0, -2], [1, 2]], -2, 2)):
        assert forward_message(RangeError, x, topk_ids=np.array(ids)) == (
            f"moe_forward: topk_ids must lie in -1..2, got {low}..{high}. "
            "E is bound by cfg; -1 means no expert."
        )
    assert forward_message(RangeError, x, topk_ids=np.array([[0, 1], [2, 2]])) == (
        "moe_forward: topk_ids must be distinct within a token, got [2, 2]."
    )
    assert forward_message(RangeError, x, topk_ids=np.array([[0, 1, 0], [0, 1, 2]])) == (
        "moe_forward: topk_ids must be distinct within a token, got [0, 1, 0]."
    )
    assert forward_message(DTypeError, x, topk_ids=np.ones((2, 2))) == (
        "moe_forward: topk_ids must be an integer array, got float64."
    )
    npmoe.moe_forward(x, PARAMS, CFG, topk_ids=np.array([[-1, -1], [2, -1]]))


def test_non_finite_logits() -> None:
    x = normal(5, 4)
    x[3, 1] = np.nan
    assert forward_message(RangeError, x).startswith(
        "moe_forward: router_logits must have a finite largest value in every row, "
        "got nan in token 3. "
    )


# Messages of the backward pass.


@pytest.fixture(scope="module")
def saved() -> npmoe.SavedTensors:
    kept = npmoe.moe_forward(normal(5, 2, 4), PARAMS, CFG)[1]
    assert kept is not None
    return kept


def backward_message(error: type[Exception], *arguments: Any, **keywords: Any) -> str:
    with pytest.raises(error) as caught:
        npmoe.moe_backward(*arguments, **keywords)
    return str(caught.value)


def test_backward_gradient_of_the_output(saved: npmoe.SavedTensors) -> None:
    for shape in ((10, 4), (5, 2), (5, 2, 4, 1)):
        assert backward_message(ShapeError, np.ones(shape), saved, PARAMS) == (
            f"moe_backward: grad_output must have shape (5, 2, 4), got {shape}. "
            "It is bound by the output of the forward pass."
        )
    assert backward_message(DTypeError, np.ones((5, 2, 4), "f4"), saved, PARAMS) == (
        "moe_backward: grad_output must have dtype float64, got float32. "
        "The dtype is bound by hidden_states. Convert one of them with astype."
    )
    assert backward_message(DTypeError, np.ones((5, 2, 4), int), saved, PARAMS) == (
        "moe_backward: grad_output must have dtype float32 or float64, got int64. "
        "Convert it with grad_output.astype('float32')."
    )


def test_backward_gradient_of_the_logits(saved: npmoe.SavedTensors) -> None:
    grad = np.ones((5, 2, 4))
    assert backward_message(ShapeError, grad, saved, PARAMS, np.ones((3, 10))) == (
        "moe_backward: grad_router_logits must have shape (T, E) = (10, 3), got (3, 10). "
        "T, E are bound by the forward pass. It looks transposed."
    )
    assert backward_message(DTypeError, grad, saved, PARAMS, np.ones((10, 3), "f4")) == (
        "moe_backward: grad_router_logits must have dtype float64, got float32. "
        "The dtype is bound by hidden_states. Convert one of them with astype."
    )
    assert backward_message(DTypeError, grad, saved, PARAMS, np.ones((10, 3), int)) == (
        "moe_backward: grad_router_logits must have dtype float32 or float64, got int64. "
        "Convert it with grad_router_logits.astype('float32')."
    )


def test_backward_out_and_params(saved: npmoe.SavedTensors) -> None:
    grad = np.ones((5, 2, 4))
    assert backward_message(RangeError, grad, saved, PARAMS, accumulate=True) == (
        "moe_backward: accumulate must come with out, got out=None. Nothing to add to."
    )
    broken = dataclasses.replace(PARAMS, down_proj=np.ones((3, 6, 4)))
    end = (
        "must have shape (E, H, I) = (3, 4, 6), got (3, 6, 4). E, H, I are bound by cfg. "
        "It looks transposed."
    )
    assert backward_message(ShapeError, grad, saved, PARAMS, out=broken) == (
        f"moe_backward: out.down_proj {end}"
    )
    assert backward_message(ShapeError, grad, saved, broken) == (
        f"moe_backward: params.down_proj {end}"
    )


def test_backward_without_saved_tensors() -> None:
    _, nothing = npmoe.moe_forward(normal(5, 4), PARAMS, CFG, save=False)
    assert nothing is None
    assert backward_message(RangeError, normal(5, 4), nothing, PARAMS) == (
        "moe_backward: saved must come from a forward pass with save=True, got None."
    )


def test_read_only_out() -> None:
    cfg = npmoe.MoEConfig(hidden_size=2, intermediate_size=3, num_experts=2, top_k=1)
    params = npmoe.init_params(cfg)
    out, saved = npmoe.moe_forward(np.ones((2, 2), np.float32), params, cfg)
    given = npmoe.init_params(cfg)
    given.down_proj.flags.writeable = False
    with pytest.raises(npmoe.RangeError) as caught:
        npmoe.moe_backward(out, saved, params, out=given)
    assert str(caught.value) == (
        "moe_backward: out.down_proj must be writable, got a read-only array. Give a copy."
    )
