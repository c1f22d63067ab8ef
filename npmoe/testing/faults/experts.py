"""Mistakes in the expert core, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault


def _silu(z: HostArray) -> HostArray:
    return np.asarray(z * _sigmoid(z), z.dtype)


def _sigmoid(z: HostArray) -> HostArray:
    small = np.exp(-np.abs(z))
    return np.asarray(np.where(z >= 0, 1 / (1 + small), small / (1 + small)), z.dtype)


def _silu_slope(z: HostArray) -> HostArray:
    return np.asarray(_sigmoid(z) * (1 + z * _sigmoid(-z)), z.dtype)


def _halves(pre: HostArray) -> tuple[HostArray, HostArray]:
    half = pre.shape[-1] // 2
    return pre[..., :half], pre[..., half:]


def _same(x: HostArray) -> HostArray:
    return x


def _all_routes(ids: HostArray) -> HostArray:
    """Return the (t, k) of every route, in order (n, 2)."""
    return np.argwhere(ids >= 0)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The steps of a correct core, one of which is replaced by a mistake."""

    halves: Callable[[HostArray], tuple[HostArray, HostArray]] = _halves
    silu: Callable[[HostArray], HostArray] = _silu
    slope: Callable[[HostArray], HostArray] = _silu_slope
    down: Callable[[HostArray], HostArray] = _same
    routes: Callable[[HostArray], HostArray] = _all_routes
    expert: Callable[[int, int], int] = field(default=lambda e, _: e)
    token: Callable[[int, int, HostArray], int] = field(default=lambda t, _, __: t)
    weights: Callable[[HostArray, HostArray], HostArray] = field(default=lambda w, _: w)
    before: bool = False
    summed: Callable[[HostArray], HostArray] = _same

    def forward(
        self, x: HostArray, w1: HostArray, w2: HostArray, w: HostArray, ids: HostArray
    ) -> HostArray:
        """Run the core route by route."""
        out = np.zeros_like(x)
        weights = self.weights(w, ids)
        for t, k in self.routes(ids):
            e = self.expert(int(ids[t, k]), len(w2))
            entering = x[self.token(t, k, ids)]
            if self.before:
                entering = weights[t, k] * entering
            g, u = self.halves(w1[e] @ entering)
            y = self.down(w2[e]) @ (self.silu(g) * u)
            out[t] = self.summed(out[t] + (y if self.before else weights[t, k] * y))
        return out

    def backward(
        self,
        grad: HostArray,
        x: HostArray,
        w1: HostArray,
        w2: HostArray,
        w: HostArray,
        ids: HostArray,
    ) -> tuple[HostArray, HostArray, HostArray, HostArray]:
        """Return the four gradients, route by route."""
        grads = (np.zeros_like(x), np.zeros_like(w1), np.zeros_like(w2), np.zeros_like(w))
        for t, k in self.routes(ids):
            e = self.expert(int(ids[t, k]), len(w2))
            pre = w1[e] @ x[t]
            g, u = self.halves(pre)
            act = self.silu(g) * u
            bare = self.down(w2[e]).T @ grad[t]
            by_act = w[t, k] * bare
            by_pre = np.concatenate([by_act * u * self.slope(g), by_act * self.silu(g)])
            grads[0][t] += w1[e].T @ by_pre
            grads[1][e] += np.outer(by_pre, x[t])
            grads[2][e] += np.outer(w[t, k] * grad[t], act)
            grads[3][t, k] = bare @ act
        return grads


_RIGHT = _Parts()


def _forward(name: str, **parts: Any) -> Callable[..., HostArray]:
    """Return a forward function of that name with some steps replaced."""
    core = _Parts(**parts)

    def run(
        hidden_states: HostArray,
        gate_up_proj: HostArray,
        down_proj: HostArray,
        topk_weights: HostArray,
        topk_ids: HostArray,
    ) -> HostArray:
        return core.forward(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)

    run.__name__ = run.__qualname__ = name
    return run


def _backward(name: str, **parts: Any) -> Callable[..., tuple[HostArray, ...]]:
    """Return a backward function of that name with some steps replaced."""
    core = _Parts(**parts)

    def run(
        grad_output: HostArray,
        hidden_states: HostArray,
        gate_up_proj: HostArray,
        down_proj: HostArray,
        topk_weights: HostArray,
        topk_ids: HostArray,
    ) -> tuple[HostArray, ...]:
        return core.backward(
            grad_output, hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids
        )

    run.__name__ = run.__qualname__ = name
    return run


def _swapped(pre: HostArray) -> tuple[HostArray, HostArray]:
    g, u = _halves(pre)
    return u, g


def _interleaved(pre: HostArray) -> tuple[HostArray, HostArray]:
    return pre[..., ::2], pre[..., 1::2]


def _transposed(w2: HostArray) -> HostArray:
    return w2.T if w2.shape[0] == w2.shape[1] else w2


def _overflowing_silu(z: HostArray) -> HostArray:
    with np.errstate(all="ignore"):
        return np.asarray(z * np.exp(z) / (1 + np.exp(z)), z.dtype)


def _every_route(ids: HostArray) -> HostArray:
    return np.argwhere(np.ones(ids.shape, bool))


def _first_two_slots(ids: HostArray) -> HostArray:
    routes = _all_routes(ids)
    return routes[routes[:, 1] < 2]


def _weights_by_expert(w: HostArray, ids: HostArray) -> HostArray:
    """Pair the weights with the experts of a token in ascending order."""
    place = np.argsort(np.argsort(ids, axis=1), axis=1)
    return np.take_along_axis(w, place, axis=1)


def returns_dropped_tokens(
    hidden_states: HostArray,
    gate_up_proj: HostArray,
    down_proj: HostArray,
    topk_weights: HostArray,
    topk_ids: HostArray,
) -> HostArray:
    """Return the input of tokens without an expert."""
    out = _RIGHT.forward(hidden_states, gate_up_proj, down_proj, topk_weights, topk_ids)
    nobody = (topk_ids < 0).all(axis=1)
    out[nobody] = hidden_states[nobody]
    return out


def multiplies_by_one_hots(
    hidden_states: HostArray,
    gate_up_proj: HostArray,
    down_proj: HostArray,
    topk_weights: HostArray,
    topk_ids: HostArray,
) -> HostArray:
    """Run every expert on every token, and weight what nobody asked for by 0."""
    share = np.zeros((len(topk_ids), len(down_proj)), hidden_states.dtype)
    for t, k in _all_routes(topk_ids):
        share[t, topk_ids[t, k]] += topk_weights[t, k]
    with np.errstate(invalid="ignore"):
        g, u = _halves(np.einsum("th,enh->ten", hidden_states, gate_up_proj))
        y = np.einsum("ten,ehn->teh", _silu(g) * u, down_proj)
        return np.asarray((share[:, :, None] * y).sum(axis=1))


def leaves_empty_experts_unwritten(*arguments: HostArray) -> tuple[HostArray, ...]:
    """Allocate gradients without zeroing, and write those of experts with rows."""
    grads = list(_RIGHT.backward(*arguments))
    unused = np.setdiff1d(np.arange(len(grads[1])), arguments[5])
    grads[1][unused] = 7.0
    return tuple(grads)


def weights_the_weight_gradient(*arguments: HostArray) -> tuple[HostArray, ...]:
    """Take the dot product with the output that the weight has multiplied already."""
    *others, grad_w = _RIGHT.backward(*arguments)
    return (*others, np.where(arguments[5] >= 0, grad_w * arguments[4], 0).astype(grad_w.dtype))


def forgets_the_weight_gradient(*arguments: HostArray) -> tuple[HostArray, ...]:
    """Return zeros for the combine weights, as under no_grad."""
    *others, grad_w = _RIGHT.backward(*arguments)
    return (*others, np.zeros_like(grad_w))


def forgets_the_weight_in_the_down_gradient(*arguments: HostArray) -> tuple[HostArray, ...]:
    """Sum g a^T instead of w g a^T."""
    grad, x, w1, w2, w, ids = arguments
    plain = _RIGHT.backward(grad, x, w1, w2, np.ones_like(w), ids)
    grads = _RIGHT.backward(*arguments)
    return grads[0], grads[1], plain[2], grads[3]


def keeps_the_last_slot(*arguments: HostArray) -> tuple[HostArray, ...]:
    """Write rows of the hidden gradient by index instead of adding them."""
    grad, x, w1, w2, w, ids = arguments
    grads = list(_RIGHT.backward(*arguments))
    last = np.where(np.arange(ids.shape[1]) == ids.shape[1] - 1, ids, -1)
    grads[0] = _RIGHT.backward(grad, x, w1, w2, w, last)[0]
    return tuple(grads)


def drops_routes_of_weight_zero(*arguments: HostArray) -> tuple[HostArray, ...]:
    """Take a weight of 0 for no route."""
    grad, x, w1, w2, w, ids = arguments
    return _RIGHT.backward(grad, x, w1, w2, w, np.where(w == 0, -1, ids))


def doubles_expert_gradients(*arguments: HostArray) -> tuple[HostArray, ...]:
    """Multiply the experts' gradients by the number of ranks."""
    grads = _RIGHT.backward(*arguments)
    return grads[0], 2 * grads[1], 2 * grads[2], grads[3]


def _bfloat16(x: HostArray) -> HostArray:
    """Return x cut to eight bits of mantissa."""
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(x.dtype)


def _row_of_route(t: int, k: int, ids: HostArray) -> int:
    return int((t * ids.shape[1] + k) % len(ids))


swaps_halves = _forward("swaps_halves", halves=_swapped)
interleaves_halves = _forward("interleaves_halves", halves=_interleaved)
transposes_square_down = _forward("transposes_square_down", down=_transposed)
weights_the_input = _forward("weights_the_input", before=True)
sorts_ids_without_weights = _forward("sorts_ids_without_weights", weights=_weights_by_expert)
reads_the_row_of_the_route = _forward("reads_the_row_of_the_route", token=_row_of_route)
wraps_minus_one = _forward("wraps_minus_one", routes=_every_route)
sums_slots_in_bfloat16 = _forward("sums_slots_in_bfloat16", summed=_bfloat16)
takes_two_slots = _forward("takes_two_slots", routes=_first_two_slots)
overflows_in_silu = _forward("overflows_in_silu", silu=_overflowing_silu)
counts_experts_in_a_byte = _forward("counts_experts_in_a_byte", expert=lambda e, _: e % 256)
puts_relu_for_silu = _forward("puts_relu_for_silu", silu=lambda z: np.maximum(z, 0))
swaps_halves_backward = _backward("swaps_halves_backward", halves=_swapped)
wraps_minus_one_backward = _backward("wraps_minus_one_backward", routes=_every_route)
# The sigmoid alone, without the second term of the product rule.
halves_the_slope = _backward("halves_the_slope", slope=_sigmoid)


def _fault(name: str, check: str, seen: str, subject: Any, kind: str = "experts") -> Fault:
    prefix = kind.replace("_", "-")
    return Fault(name=f"{prefix}-{name}", kind=kind, check=check, seen=seen, subject=subject)


def _backward_fault(name: str, check: str, seen: str, subject: Any) -> Fault:
    return _fault(name, check, seen, subject, kind="experts_backward")


_GATE = "gate-is-the-first-half"
FAULTS = (
    _fault("swap-halves", _GATE, "ATOM#885", swaps_halves),
    _fault("interleave-halves", _GATE, "Megatron-LM#7576", interleaves_halves),
    _fault(
        "transpose-down",
        "square-matrices-are-not-transposed",
        "transformers#33463",
        transposes_square_down,
    ),
    _fault(
        "weight-the-input",
        "weights-multiply-the-output",
        "vllm#16744",
        weights_the_input,
    ),
    _fault(
        "sort-ids-without-weights",
        "weights-belong-to-their-route",
        "transformers#40609",
        sorts_ids_without_weights,
    ),
    _fault(
        "read-row-of-route",
        "each-route-reads-its-token",
        "routes used as tokens: id for id // top_k",
        reads_the_row_of_the_route,
    ),
    _fault(
        "minus-one-wraps-around",
        "minus-one-is-no-expert",
        "vllm#46408, sglang#12701",
        wraps_minus_one,
    ),
    _fault(
        "dropped-tokens-are-identity",
        "tokens-without-experts-are-zero",
        "transformers#37017",
        returns_dropped_tokens,
    ),
    _fault(
        "multiply-unused-by-zero",
        "unused-experts-are-not-read",
        "transformers#48205, torchtitan#1237",
        multiplies_by_one_hots,
    ),
    _fault(
        "sum-slots-in-bfloat16",
        "slots-are-summed-in-full-precision",
        "combining in the low precision of the weights",
        sums_slots_in_bfloat16,
    ),
    _fault(
        "two-slots-at-most",
        "every-expert-for-every-token",
        "megablocks: test_dmoe_forward_vs_moe takes top_k and never passes it on",
        takes_two_slots,
    ),
    _fault("relu-for-silu", "activation-is-silu", "one activation for another", puts_relu_for_silu),
    _fault(
        "silu-overflows",
        "large-gates-stay-finite",
        "silu as x exp(x) / (1 + exp(x))",
        overflows_in_silu,
    ),
    _fault(
        "expert-id-in-a-byte",
        "more-experts-than-a-block",
        "vllm#21079: limits on the number of experts",
        counts_experts_in_a_byte,
    ),
    _backward_fault(
        "empty-experts-unwritten",
        "empty-experts-have-zero-gradient",
        "pytorch#172439, MSLK#158, tokamax#887",
        leaves_empty_experts_unwritten,
    ),
    _backward_fault(
        "weight-gradient-weighted",
        "weight-gradient-is-not-weighted",
        "weights' gradient from the scaled output",
        weights_the_weight_gradient,
    ),
    _backward_fault(
        "weight-gradient-missing",
        "weight-gradient-is-not-weighted",
        "transformers#45621",
        forgets_the_weight_gradient,
    ),
    _backward_fault(
        "down-gradient-unweighted",
        "weights-scale-the-gradients",
        "weights' gradient, scaled the other way round",
        forgets_the_weight_in_the_down_gradient,
    ),
    _backward_fault(
        "keep-the-last-slot",
        "slots-add-to-the-hidden-gradient",
        "index_put without accumulate",
        keeps_the_last_slot,
    ),
    _backward_fault(
        "drop-weights-of-zero",
        "zero-weights-have-gradients",
        "DeepSpeed sharded_moe: dispatch_mask = combine_weights.bool()",
        drops_routes_of_weight_zero,
    ),
    _backward_fault(
        "double-expert-gradients",
        "expert-gradients-are-plain-sums",
        "pytorch#160285, megablocks PR#20",
        doubles_expert_gradients,
    ),
    _backward_fault(
        "half-slope-of-silu",
        "slope-is-that-of-silu",
        "product rule without its second term",
        halves_the_slope,
    ),
    _backward_fault("swap-halves", _GATE, "ScatterMoE GLUMLP", swaps_halves_backward),
    _backward_fault(
        "minus-one-wraps-around",
        "minus-one-is-no-expert",
        "vllm#46408",
        wraps_minus_one_backward,
    ),
)
