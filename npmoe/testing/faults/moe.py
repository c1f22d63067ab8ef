"""Mistakes in the whole layer: router, experts and combine, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.experts import _RIGHT
from npmoe.testing.faults.fault import Fault


def _softmax(x: HostArray) -> HostArray:
    powers = np.exp(x - x.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), x.dtype)


def _stable_topk(probs: HostArray, top_k: int) -> HostArray:
    return np.argsort(-probs, axis=1, kind="stable")[:, :top_k].astype(np.int32)


def _logits(x: HostArray, router_weight: HostArray) -> HostArray:
    return np.asarray(x @ router_weight.T)


def _divide(chosen: HostArray) -> HostArray:
    return np.asarray(chosen / chosen.sum(axis=1, keepdims=True))


def _keep(chosen: HostArray) -> HostArray:
    return chosen


def _given(top_k: int) -> int:
    return top_k


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """The steps of a correct layer, one of which is replaced by a mistake."""

    logits: Callable[[HostArray, HostArray], HostArray] = _logits
    softmax: Callable[[HostArray], HostArray] = _softmax
    topk: Callable[[HostArray, int], HostArray] = _stable_topk
    norm: Callable[[HostArray], HostArray] = _divide
    top_k: Callable[[int], int] = _given

    def route(
        self, x: HostArray, router_weight: HostArray, top_k: int
    ) -> tuple[HostArray, HostArray, HostArray]:
        """Return probs (T, E), ids and weights (T, K)."""
        probs = self.softmax(self.logits(x, router_weight))
        ids = self.topk(probs, min(self.top_k(top_k), len(router_weight)))
        return probs, ids, self.norm(np.take_along_axis(probs, ids, axis=1))

    def forward(
        self, x: HostArray, router_weight: HostArray, w1: HostArray, w2: HostArray, top_k: int
    ) -> HostArray:
        """Run the layer."""
        _, ids, weights = self.route(x, router_weight, top_k)
        return _RIGHT.forward(x, w1, w2, weights, ids)


@dataclass(frozen=True, kw_only=True)
class _Backward:
    """The gradients of the layer, with what may be left out."""

    normalized: bool = True
    through_norm: bool = True
    through_others: bool = True
    to_router: bool = True
    to_hidden: bool = True
    detached_output: bool = False
    empty: float = 0.0

    def run(
        self,
        grad: HostArray,
        x: HostArray,
        router_weight: HostArray,
        w1: HostArray,
        w2: HostArray,
        top_k: int,
    ) -> tuple[HostArray, HostArray, HostArray, HostArray]:
        """Return the four gradients."""
        norm = _divide if self.normalized else _keep
        probs, ids, weights = _Layer(norm=norm).route(x, router_weight, top_k)
        grad_x, grad_w1, grad_w2, by_weight = _RIGHT.backward(grad, x, w1, w2, weights, ids)
        if self.detached_output:
            by_weight = by_weight * weights
        if self.normalized:
            mean = (by_weight * weights).sum(axis=1, keepdims=True) if self.through_norm else 0.0
            total = np.take_along_axis(probs, ids, axis=1).sum(axis=1, keepdims=True)
            by_weight = (by_weight - mean) / total
        by_probs = np.zeros_like(probs)
        np.put_along_axis(by_probs, ids, by_weight.astype(probs.dtype), axis=1)
        inner = (by_probs * probs).sum(axis=1, keepdims=True)
        by_logits = probs * (by_probs - inner)
        if not self.through_others:
            by_logits = np.where(by_probs != 0, by_logits, 0)
        if self.to_hidden:
            grad_x = grad_x + by_logits @ router_weight
        grad_router = by_logits.T @ x if self.to_router else np.zeros_like(router_weight)
        unused = np.setdiff1d(np.arange(len(w1)), ids)
        grad_w1[unused], grad_w2[unused] = self.empty, self.empty
        return grad_x.astype(x.dtype), grad_router.astype(x.dtype), grad_w1, grad_w2


def _forward(name: str, **parts: Any) -> Callable[..., HostArray]:
    """Return a layer of that name with some steps replaced."""
    layer = _Layer(**parts)

    def run(
        hidden_states: HostArray,
        router_weight: HostArray,
        gate_up_proj: HostArray,
        down_proj: HostArray,
        top_k: int,
    ) -> HostArray:
        return layer.forward(hidden_states, router_weight, gate_up_proj, down_proj, top_k)

    run.__name__ = run.__qualname__ = name
    return run


def _backward(name: str, **parts: Any) -> Callable[..., tuple[HostArray, ...]]:
    """Return a backward of that name with some parts left out."""
    layer = _Backward(**parts)

    def run(
        grad_output: HostArray,
        hidden_states: HostArray,
        router_weight: HostArray,
        gate_up_proj: HostArray,
        down_proj: HostArray,
        top_k: int,
    ) -> tuple[HostArray, ...]:
        return layer.run(grad_output, hidden_states, router_weight, gate_up_proj, down_proj, top_k)

    run.__name__ = run.__qualname__ = name
    return run


def _overflowing_softmax(x: HostArray) -> HostArray:
    with np.errstate(all="ignore"):
        powers = np.exp(x)
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), x.dtype)


def _square_logits(x: HostArray, router_weight: HostArray) -> HostArray:
    square = router_weight.shape[0] == router_weight.shape[1]
    return np.asarray(x @ (router_weight if square else router_weight.T))


def _bfloat16_logits(x: HostArray, router_weight: HostArray) -> HostArray:
    logits = np.asarray(x @ router_weight.T)
    bits = logits.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(logits.dtype)


def _last_of_ties(probs: HostArray, top_k: int) -> HostArray:
    reverse = np.argsort(-probs[:, ::-1], axis=1, kind="stable")[:, :top_k]
    return np.asarray(probs.shape[1] - 1 - reverse, np.int32)


def _ids_by_number(probs: HostArray, top_k: int) -> HostArray:
    return np.tile(np.arange(top_k, dtype=np.int32), (len(probs), 1))


forgets_to_renormalize = _forward("forgets_to_renormalize", norm=_keep)
renormalizes_anyway = _forward("renormalizes_anyway", norm=_divide)
overflows_in_softmax = _forward("overflows_in_softmax", softmax=_overflowing_softmax)
transposes_square_router = _forward("transposes_square_router", logits=_square_logits)
ignores_top_k = _forward("ignores_top_k", top_k=lambda _: 2)
breaks_ties_upwards = _forward("breaks_ties_upwards", topk=_last_of_ties)
routes_in_bfloat16 = _forward("routes_in_bfloat16", logits=_bfloat16_logits)
chooses_the_first_experts = _forward("chooses_the_first_experts", topk=_ids_by_number)
detaches_the_norm = _backward("detaches_the_norm", through_norm=False)
forgets_the_router = _backward("forgets_the_router", to_router=False)
forgets_the_router_path = _backward("forgets_the_router_path", to_hidden=False)
forgets_unchosen_experts = _backward(
    "forgets_unchosen_experts", normalized=False, through_others=False
)
leaves_empty_experts_unwritten = _backward("leaves_empty_experts_unwritten", empty=7.0)
weights_the_router_gradient = _backward("weights_the_router_gradient", detached_output=True)


def weights_the_input(
    hidden_states: HostArray,
    router_weight: HostArray,
    gate_up_proj: HostArray,
    down_proj: HostArray,
    top_k: int,
) -> HostArray:
    """Multiply what enters the experts by the weights, as Llama 4 does."""
    _, ids, weights = _Layer().route(hidden_states, router_weight, top_k)
    out = np.zeros_like(hidden_states)
    ones = np.ones((1, 1), hidden_states.dtype)
    for (t, k), e in np.ndenumerate(ids):
        row = weights[t, k] * hidden_states[t : t + 1]
        out[t] += _RIGHT.forward(row, gate_up_proj, down_proj, ones, np.array([[e]]))[0]
    return out


def never_drops(
    hidden_states: HostArray,
    router_weight: HostArray,
    gate_up_proj: HostArray,
    down_proj: HostArray,
    top_k: int,
) -> HostArray:
    """Run a switch layer without its capacity."""
    probs, ids, weights = _Layer(norm=_keep).route(hidden_states, router_weight, top_k)
    del probs
    out = np.zeros_like(hidden_states)
    for (t, k), e in np.ndenumerate(ids):
        act = np.maximum(gate_up_proj[e] @ hidden_states[t], 0)
        out[t] += weights[t, k] * (down_proj[e] @ act)
    return out


def _fault(
    name: str, check: str, seen: str, subject: Any, *, kind: str = "moe", preset: str = "mixtral"
) -> Fault:
    return Fault(
        name=f"{kind.replace('_', '-')}-{name}",
        kind=kind,
        check=check,
        seen=seen,
        subject=subject,
        options=() if preset == "mixtral" else (("preset", preset),),
    )


_BACKWARD = "moe_backward"
FAULTS = (
    _fault(
        "no-renormalisation",
        "weights-sum-to-one",
        "TensorRT-LLM#2752, flashinfer#2431",
        forgets_to_renormalize,
    ),
    _fault(
        "renormalises-anyway",
        "weights-are-not-normalised",
        "Fast-LLM#83: norm_topk toggle",
        renormalizes_anyway,
        preset="olmoe",
    ),
    _fault(
        "softmax-overflows",
        "large-logits-stay-finite",
        "softmax without the maximum",
        overflows_in_softmax,
    ),
    _fault(
        "transposes-square-router",
        "router-is-not-transposed",
        "transformers#33463, for the router",
        transposes_square_router,
    ),
    _fault("ignores-top-k", "top-k-is-an-argument", "MegaBlocks dmoe_test.py", ignores_top_k),
    _fault(
        "ties-go-upwards",
        "ties-go-to-the-lowest-expert",
        "np.argsort's default, torch.topk: unstable",
        breaks_ties_upwards,
    ),
    _fault(
        "router-in-bfloat16",
        "near-ties-are-told-apart",
        "a router below float32",
        routes_in_bfloat16,
    ),
    _fault(
        "chooses-by-number",
        "largest-logits-win",
        "MegaBlocks uniform-assignment debug mode left on",
        chooses_the_first_experts,
    ),
    _fault("weights-the-input", "weights-multiply-the-output", "vllm#16744", weights_the_input),
    _fault(
        "capacity-never-enforced",
        "capacity-is-enforced",
        "transformers#48293, DeepSpeed#1658",
        never_drops,
        preset="switch",
    ),
    _fault(
        "detached-norm",
        "router-gradient-goes-through-the-norm",
        "gradient stopped at the sum of the chosen",
        detaches_the_norm,
        kind=_BACKWARD,
    ),
    _fault(
        "router-not-trained",
        "router-gradient-exists",
        "transformers#45621",
        forgets_the_router,
        kind=_BACKWARD,
    ),
    _fault(
        "hidden-without-router",
        "hidden-gradient-includes-the-router",
        "torchtitan#1237: router gradients missing",
        forgets_the_router_path,
        kind=_BACKWARD,
    ),
    _fault(
        "unchosen-without-gradient",
        "unchosen-experts-move-the-router",
        "softmax Jacobian restricted to the chosen",
        forgets_unchosen_experts,
        kind=_BACKWARD,
        preset="olmoe",
    ),
    _fault(
        "empty-experts-unwritten",
        "empty-experts-have-zero-gradient",
        "pytorch#172439, MSLK#158",
        leaves_empty_experts_unwritten,
        kind=_BACKWARD,
    ),
    _fault(
        "router-gradient-weighted",
        "router-gradient-exists",
        "weights' gradient from the scaled output",
        weights_the_router_gradient,
        kind=_BACKWARD,
    ),
)
