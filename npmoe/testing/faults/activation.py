"""Mistakes in activations and their backward passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault

_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0


def _halves(z: HostArray) -> tuple[HostArray, HostArray]:
    half = z.shape[1] // 2
    return z[:, :half], z[:, half:]


def _join(g: HostArray, u: HostArray) -> HostArray:
    return np.concatenate([g, u], axis=1)


def _sigmoid(x: HostArray) -> HostArray:
    y = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, y) / (1 + y))


def _silu_slope(x: HostArray, alpha: float = 1.0) -> HostArray:
    s = _sigmoid(alpha * x)
    return np.asarray(s + alpha * x * s * (1 - s))


def _swiglu(g: HostArray, u: HostArray) -> HostArray:
    return np.asarray(g * _sigmoid(g) * u)


def _swiglu_backward(grad: HostArray, g: HostArray, u: HostArray) -> tuple[HostArray, HostArray]:
    return grad * u * _silu_slope(g), grad * g * _sigmoid(g)


def _oai(
    gate_up: HostArray,
    *,
    alpha: float = _OAI_ALPHA,
    shift: float = 1.0,
    lowest_gate: float = -math.inf,
    limit: float = _OAI_LIMIT,
    lowest_up: float = -_OAI_LIMIT,
) -> HostArray:
    g, u = _halves(gate_up)
    g = np.clip(g, lowest_gate, limit)
    return np.asarray(g * _sigmoid(alpha * g) * (np.clip(u, lowest_up, limit) + shift))


def swaps_the_halves(gate_up: HostArray) -> HostArray:
    """Take the first half for the up projection."""
    g, u = _halves(gate_up)
    return _swiglu(u, g)


def interleaves_the_halves(gate_up: HostArray) -> HostArray:
    """Take even columns for the gate and odd ones for the up projection."""
    return _swiglu(gate_up[:, ::2], gate_up[:, 1::2])


def forgets_the_limit(gate_up: HostArray) -> HostArray:
    """Cut nothing off."""
    return _oai(gate_up, limit=math.inf, lowest_up=-math.inf)


def forgets_the_shift(gate_up: HostArray) -> HostArray:
    """Multiply by u instead of u + 1."""
    return _oai(gate_up, shift=0.0)


def forgets_alpha(gate_up: HostArray) -> HostArray:
    """Use sigmoid(x)."""
    return _oai(gate_up, alpha=1.0)


def cuts_the_gate_on_both_sides(gate_up: HostArray) -> HostArray:
    """Clip the gate as if it were the up half."""
    return _oai(gate_up, lowest_gate=-_OAI_LIMIT)


def cuts_the_up_half_above_only(gate_up: HostArray) -> HostArray:
    """Clip the up half as if it were the gate."""
    return _oai(gate_up, lowest_up=-math.inf)


def cuts_before_the_curve(gate_up: HostArray) -> HostArray:
    """Compute silu(min(g, 7)) where min(silu(g), 7) is meant."""
    g, u = _halves(gate_up)
    return _swiglu(np.minimum(g, 7), np.clip(u, -7, 7))


def takes_tanh_for_erf(gate_up: HostArray) -> HostArray:
    """Use the tanh form of GELU."""
    g, u = _halves(gate_up)
    g = np.clip(g, -1e4, 1e4)
    return np.asarray(0.5 * g * (1 + np.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u)


def overflows_in_the_sigmoid(gate_up: HostArray) -> HostArray:
    """Compute exp(x) / (1 + exp(x)), infinity by infinity for large x."""
    g, u = _halves(gate_up)
    with np.errstate(over="ignore", invalid="ignore"):
        power = np.exp(g)
        return np.asarray(g * (power / (1 + power)) * u)


def spreads_nan(gate_up: HostArray) -> HostArray:
    """Scale rows by their largest number, as for quantisation, and back."""
    g, u = _halves(gate_up)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.exp2(np.ceil(np.log2(np.abs(g).max(axis=1, keepdims=True, initial=1.0))))
        return _swiglu(g / scale * scale, u)


def computes_in_bfloat16(gate_up: HostArray) -> HostArray:
    """Keep eight bits of the inputs."""
    bits = np.ascontiguousarray(gate_up, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return _swiglu(*_halves(bits.view(np.float32).astype(gate_up.dtype)))


def writes_into_its_input(gate_up: HostArray) -> HostArray:
    """Keep the result in the first half."""
    g, u = _halves(gate_up)
    act = _swiglu(g, u)
    if gate_up.flags.writeable:
        gate_up[:, : g.shape[1]] = act
    return act


def leaks_below_zero(gate_up: HostArray) -> HostArray:
    """Use a leaky ReLU."""
    g, u = _halves(gate_up)
    return np.asarray(np.where(g > 0, g, g * g.dtype.type(0.01)) * u)


def swaps_the_gradients(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Store the up half's gradient first."""
    grad_g, grad_u = _swiglu_backward(grad_act, *_halves(gate_up))
    return _join(grad_u, grad_g)


def drops_the_second_term(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Take sigmoid(x) for the slope of x sigmoid(x)."""
    g, u = _halves(gate_up)
    return _join(grad_act * u * _sigmoid(g), grad_act * g * _sigmoid(g))


def _oai_backward(
    grad_act: HostArray,
    gate_up: HostArray,
    inside_g: Callable[[HostArray], HostArray],
    inside_u: Callable[[HostArray], HostArray],
    shift: float = 1.0,
) -> HostArray:
    g, u = _halves(gate_up)
    low, factor = np.minimum(g, _OAI_LIMIT), np.clip(u, -_OAI_LIMIT, _OAI_LIMIT) + shift
    grad_g = grad_act * factor * _silu_slope(low, _OAI_ALPHA) * inside_g(g)
    return _join(grad_g, grad_act * low * _sigmoid(_OAI_ALPHA * low) * inside_u(u))


def excludes_the_limit(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Mask with < where <= is meant."""
    return _oai_backward(
        grad_act, gate_up, lambda g: g < _OAI_LIMIT, lambda u: np.abs(u) < _OAI_LIMIT
    )


def passes_gradients_through_the_limit(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Treat clipping as the identity."""
    return _oai_backward(grad_act, gate_up, np.ones_like, np.ones_like)


def masks_the_gate_on_both_sides(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Give gates below minus the limit no gradient."""
    return _oai_backward(
        grad_act,
        gate_up,
        lambda g: np.abs(g) <= _OAI_LIMIT,
        lambda u: np.abs(u) <= _OAI_LIMIT,
    )


def forgets_the_shift_in_the_gradient(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Multiply the gate's gradient by u instead of u + 1."""
    return _oai_backward(
        grad_act,
        gate_up,
        lambda g: g <= _OAI_LIMIT,
        lambda u: np.abs(u) <= _OAI_LIMIT,
        shift=0.0,
    )


def gives_zero_a_slope(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Take the slope of max(x, 0) at 0 for 1."""
    g, u = _halves(gate_up)
    return _join(grad_act * u * (g >= 0), grad_act * np.maximum(g, 0))


def multiplies_infinity_by_zero(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Use exp(-x) / (1 + exp(-x))**2 for the slope of the sigmoid."""
    g, u = _halves(gate_up)
    with np.errstate(over="ignore", invalid="ignore"):
        power = np.exp(-g)
        slope = _sigmoid(g) + g * power / (1 + power) ** 2
        return _join(grad_act * u * slope, grad_act * g * _sigmoid(g))


def divides_the_output_again(grad_act: HostArray, gate_up: HostArray) -> HostArray:
    """Recover the gradient from a normalised one."""
    with np.errstate(invalid="ignore"):
        size = np.abs(grad_act).max(axis=1, keepdims=True, initial=0.0)
        g, u = _halves(gate_up)
        return np.asarray(_join(*_swiglu_backward(grad_act / size, g, u)) * size)


def _fault(name: str, check: str, seen: str, subject: Callable[..., Any], activation: str) -> Fault:
    return Fault(
        name=f"activation-{name}",
        kind="activation",
        check=check,
        seen=seen,
        subject=subject,
        options=(("activation", activation),),
    )


def _backward_fault(
    name: str, check: str, seen: str, subject: Callable[..., Any], activation: str
) -> Fault:
    return Fault(
        name=f"activation-backward-{name}",
        kind="activation_backward",
        check=check,
        seen=seen,
        subject=subject,
        options=(("activation", activation),),
    )


FAULTS = (
    _fault("halves-swapped", "gate-is-the-first-half", "ATOM#885", swaps_the_halves, "swiglu"),
    _fault(
        "halves-interleaved",
        "halves-are-contiguous",
        "Megatron-LM#7576, ScatterMoE's order",
        interleaves_the_halves,
        "swiglu",
    ),
    _fault(
        "limit-missing",
        "both-halves-are-limited",
        "tokenspeed#1630",
        forgets_the_limit,
        "swiglu_oai",
    ),
    _fault(
        "up-limited-above-only",
        "both-halves-are-limited",
        "the gate's limit taken for both",
        cuts_the_up_half_above_only,
        "swiglu_oai",
    ),
    _fault(
        "gate-limited-below",
        "gate-is-limited-from-above-only",
        "the up half's limits taken for both",
        cuts_the_gate_on_both_sides,
        "swiglu_oai",
    ),
    _fault(
        "limit-before-silu",
        "limit-comes-after-the-curve",
        "DeepSeek-V4 limits before, Step-3.7 after",
        cuts_before_the_curve,
        "swiglu_clamp_post",
    ),
    _fault(
        "shift-missing",
        "up-is-shifted-by-one",
        "gpt-oss in kernels made for SwiGLU",
        forgets_the_shift,
        "swiglu_oai",
    ),
    _fault(
        "alpha-of-one",
        "sigmoid-is-scaled-by-alpha",
        "gpt-oss in kernels made for SwiGLU",
        forgets_alpha,
        "swiglu_oai",
    ),
    _fault("tanh-for-erf", "erf-not-tanh", "GELU of two libraries", takes_tanh_for_erf, "geglu"),
    _fault("leaky", "curve-is-relu", "a default slope below 0", leaks_below_zero, "reglu"),
    _fault(
        "sigmoid-overflows",
        "large-inputs-stay-finite",
        "exp(x) / (1 + exp(x))",
        overflows_in_the_sigmoid,
        "swiglu",
    ),
    _fault(
        "nan-spreads",
        "nan-stays-in-its-place",
        "row scales of quantised activations",
        spreads_nan,
        "swiglu",
    ),
    _fault(
        "in-bfloat16", "within-rounding", "inputs cast by a kernel", computes_in_bfloat16, "swiglu"
    ),
    _fault(
        "written-in-place",
        "input-is-not-written",
        "in-place kernels, whose backward then reads the result",
        writes_into_its_input,
        "swiglu",
    ),
    _backward_fault(
        "halves-swapped", "gate-is-the-first-half", "ATOM#885", swaps_the_gradients, "swiglu"
    ),
    _backward_fault(
        "second-term-missing",
        "curve-is-x-sigmoid-x",
        "sigmoid taken for the slope of SiLU",
        drops_the_second_term,
        "swiglu",
    ),
    _backward_fault(
        "limit-excluded",
        "limit-itself-has-a-gradient",
        "torch.clamp passes gradients at its bounds",
        excludes_the_limit,
        "swiglu_oai",
    ),
    _backward_fault(
        "limit-ignored",
        "no-gradient-beyond-the-limit",
        "straight-through clipping",
        passes_gradients_through_the_limit,
        "swiglu_oai",
    ),
    _backward_fault(
        "gate-masked-below",
        "gate-is-limited-from-above-only",
        "one mask for both halves",
        masks_the_gate_on_both_sides,
        "swiglu_oai",
    ),
    _backward_fault(
        "shift-missing",
        "up-is-shifted-by-one",
        "gpt-oss in kernels made for SwiGLU",
        forgets_the_shift_in_the_gradient,
        "swiglu_oai",
    ),
    _backward_fault(
        "slope-at-zero", "zero-is-flat", "x >= 0 for x > 0", gives_zero_a_slope, "reglu"
    ),
    _backward_fault(
        "slope-overflows",
        "large-inputs-stay-finite",
        "exp(-x) / (1 + exp(-x))**2",
        multiplies_infinity_by_zero,
        "swiglu",
    ),
    _backward_fault(
        "zero-by-zero",
        "zero-gradient-gives-zero",
        "scales of quantised gradients",
        divides_the_output_again,
        "swiglu",
    ),
)
