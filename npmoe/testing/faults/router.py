"""Mistakes in routers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.faults.fault import Fault

Routed = tuple[HostArray, HostArray]


def _usable(x: HostArray) -> HostArray:
    return np.where(np.isfinite(x.max(axis=1))[:, None], x, x.dtype.type(0))


def _softmax(x: HostArray) -> HostArray:
    y = np.exp(x - x.max(axis=1, keepdims=True))
    return np.asarray(y / y.sum(axis=1, keepdims=True))


def _sigmoid(x: HostArray) -> HostArray:
    y = np.exp(-np.abs(x))
    return np.asarray(np.where(x >= 0, 1, y) / (1 + y))


def _top(key: HostArray, top_k: int) -> HostArray:
    return np.argsort(-key, axis=1, kind="stable")[:, :top_k]


def _take(p: HostArray, ids: HostArray) -> HostArray:
    return np.take_along_axis(p, ids, axis=1)


def _share(w: HostArray) -> HostArray:
    return np.asarray(w / w.sum(axis=1, keepdims=True))


def _mixtral(x: HostArray, top_k: int) -> Routed:
    x = _usable(x)
    ids = _top(x, top_k)
    return _share(_take(_softmax(x), ids)), ids


def forgets_to_renormalise(x: HostArray, top_k: int) -> Routed:
    """Return probabilities as they are."""
    x = _usable(x)
    ids = _top(x, top_k)
    return _take(_softmax(x), ids), ids


def routes_in_bfloat16(x: HostArray, top_k: int) -> Routed:
    """Round logits to eight bits first."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return _mixtral(bits.view(np.float32).astype(x.dtype), top_k)


def scores_in_half_precision(x: HostArray, top_k: int) -> Routed:
    """Round the probabilities, not the choice."""
    weights, ids = _mixtral(x, top_k)
    return weights.astype(np.float16).astype(x.dtype), ids


def gives_ties_to_the_last(x: HostArray, top_k: int) -> Routed:
    """Sort rising and turn around."""
    x = _usable(x)
    ids = np.argsort(x, axis=1, kind="stable")[:, ::-1][:, :top_k]
    return _share(_take(_softmax(x), ids)), ids


def leaves_the_order_open(x: HostArray, top_k: int) -> Routed:
    """Partition without sorting."""
    x = _usable(x)
    ids = np.sort(_top(x, top_k), axis=1)
    return _share(_take(_softmax(x), ids)), ids


def sorts_the_weights_alone(x: HostArray, top_k: int) -> Routed:
    """Return sorted weights beside ids in the order of ids."""
    weights, ids = _mixtral(x, top_k)
    return weights, np.sort(ids, axis=1)


def repeats_experts_for_nan(x: HostArray, top_k: int) -> Routed:
    """Compare with the maximum so far, which no NaN exceeds, so that expert 0 stays."""
    weights, ids = _mixtral(x, top_k)
    broken = ~np.isfinite(x.max(axis=1))
    return weights, np.where(broken[:, None], 0, ids)


def returns_one_past_the_end_for_nan(x: HostArray, top_k: int) -> Routed:
    """Let a search that finds nothing return its end."""
    weights, ids = _mixtral(x, top_k)
    broken = ~np.isfinite(x.max(axis=1))
    ids = ids.copy()
    ids[broken, 0] = x.shape[1]
    return weights, ids


def passes_nan_to_the_weights(x: HostArray, top_k: int) -> Routed:
    """Divide NaN by NaN."""
    weights, ids = _mixtral(x, top_k)
    return np.where(np.isfinite(x.max(axis=1))[:, None], weights, np.nan).astype(x.dtype), ids


def clears_the_batch_for_nan(x: HostArray, top_k: int) -> Routed:
    """Call nan_to_num on everything if anything is broken, which clips the others."""
    if not np.isfinite(x).all():
        x = np.clip(np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0), -1.0, 1.0)
    return _mixtral(x, top_k)


def exponentiates_as_is(x: HostArray, top_k: int) -> Routed:
    """Take exp of logits without their maximum off."""
    x = _usable(x)
    ids = _top(x, top_k)
    with np.errstate(over="ignore", invalid="ignore"):
        return _share(_take(np.exp(x), ids)), ids


def subtracts_one_maximum_for_all(x: HostArray, top_k: int) -> Routed:
    """Shift every token by the largest logit of the batch."""
    x = _usable(x)
    ids = _top(x, top_k)
    with np.errstate(invalid="ignore"):
        return _share(_take(np.exp(x - (x.max() if x.size else 0)), ids)), ids


def normalises_over_tokens(x: HostArray, top_k: int) -> Routed:
    """Take the softmax over axis 0."""
    x = _usable(x)
    probs = _softmax(x.T).T if len(x) else x
    ids = _top(x, top_k)
    return _share(_take(probs, ids)), ids


def masks_the_chosen_in_place(x: HostArray, top_k: int) -> Routed:
    """Find one expert after the other and strike it out in the caller's logits."""
    result = _mixtral(x.copy(), top_k)
    if x.flags.writeable:
        np.put_along_axis(x, result[1][:, :1], -np.inf, axis=1)
    return result


def strikes_out_with_zero(x: HostArray, top_k: int) -> Routed:
    """Set a chosen logit to 0, which beats all negative ones."""
    x = _usable(x)
    rest, ids = x.copy(), np.zeros((len(x), top_k), np.int64)
    for k in range(top_k):
        ids[:, k] = rest.argmax(axis=1)
        np.put_along_axis(rest, ids[:, k : k + 1], 0, axis=1)
    return _share(_take(_softmax(x), ids)), ids


def counts_experts_in_a_byte(x: HostArray, top_k: int) -> Routed:
    """Return ids in eight bits."""
    weights, ids = _mixtral(x, top_k)
    return weights, ids.astype(np.uint8).astype(np.int32)


def packs_ids_with_weights(x: HostArray, top_k: int) -> Routed:
    """Return ids as floats."""
    weights, ids = _mixtral(x, top_k)
    return weights, ids.astype(x.dtype)


def chooses_at_most_eight(x: HostArray, top_k: int) -> Routed:
    """Fill places beyond the eighth with the eighth."""
    weights, ids = _mixtral(x, top_k)
    return weights, ids[:, np.minimum(np.arange(top_k), 7)]


def divides_small_sums(x: HostArray, top_k: int) -> Routed:
    """Divide sigmoids by their sum without eps."""
    x = _usable(x)
    s = _sigmoid(x)
    ids = _top(x, top_k)
    w = _take(s, ids)
    with np.errstate(invalid="ignore"):
        return (_share(w) if top_k > 1 else w), ids


def adds_another_eps(x: HostArray, top_k: int) -> Routed:
    """Add 1e-9 to the sum."""
    x = _usable(x)
    ids = _top(x, top_k)
    w = _take(_sigmoid(x), ids)
    return (w / (w.sum(axis=1, keepdims=True) + x.dtype.type(1e-9)) if top_k > 1 else w), ids


def normalises_a_single_sigmoid(x: HostArray, top_k: int) -> Routed:
    """Divide the only weight by itself."""
    x = _usable(x)
    ids = _top(x, top_k)
    w = _take(_sigmoid(x), ids)
    return w / (w.sum(axis=1, keepdims=True) + x.dtype.type(1e-20)), ids


def leaves_sigmoids_alone(x: HostArray, top_k: int) -> Routed:
    """Never normalise."""
    x = _usable(x)
    ids = _top(x, top_k)
    return _take(_sigmoid(x), ids), ids


def multiplies_by_a_mask(x: HostArray, top_k: int) -> Routed:
    """Choose by the softmax, but take the softmax of the chosen of a masked copy with zeros."""
    x = _usable(x)
    ids = _top(x, top_k)
    inside = np.zeros(x.shape, bool)
    np.put_along_axis(inside, ids, True, axis=1)
    return _take(_softmax(np.where(inside, x, 0)), ids), ids


def _fault(
    name: str,
    check: str,
    seen: str,
    subject: Callable[[HostArray, int], Routed],
    convention: str = "softmax_topk_renorm",
) -> Fault:
    return Fault(
        name=f"router-{name}",
        kind="router",
        check=check,
        seen=seen,
        subject=subject,
        options=(("convention", convention),),
    )


FAULTS = (
    _fault(
        "not-renormalised",
        "normalised-as-the-convention-says",
        "TensorRT-LLM#2752, flashinfer#2431",
        forgets_to_renormalise,
    ),
    _fault(
        "renormalised-too-much",
        "normalised-as-the-convention-says",
        "Fast-LLM#83: norm_topk",
        _mixtral,
        "softmax_topk",
    ),
    _fault(
        "sigmoid-not-normalised",
        "normalised-as-the-convention-says",
        "torchtitan#1418",
        leaves_sigmoids_alone,
        "sigmoid_topk",
    ),
    _fault(
        "zeros-for-a-mask",
        "normalised-as-the-convention-says",
        "transformers#45440 and vllm#13474, with a softmax behind the mask",
        multiplies_by_a_mask,
        "topk_softmax",
    ),
    _fault(
        "in-bfloat16",
        "close-logits-are-told-apart",
        "routers left in the model's dtype",
        routes_in_bfloat16,
    ),
    _fault(
        "weights-in-half",
        "within-rounding",
        "scores cast before they are used",
        scores_in_half_precision,
    ),
    _fault(
        "ties-to-the-last",
        "ties-take-the-lowest-id",
        "numpy.argsort and torch.topk, unstable by default",
        gives_ties_to_the_last,
    ),
    _fault("unordered", "ids-by-falling-weight", "Megatron-LM#5601", leaves_the_order_open),
    _fault(
        "weights-in-another-order",
        "weights-follow-their-ids",
        "transformers#40609: weights beside the wrong experts",
        sorts_the_weights_alone,
    ),
    _fault(
        "nan-repeats-an-expert",
        "broken-rows-have-distinct-ids",
        "vLLM topk_softmax regression test",
        repeats_experts_for_nan,
    ),
    _fault(
        "nan-leaves-the-range",
        "broken-rows-have-distinct-ids",
        "sglang#30079",
        returns_one_past_the_end_for_nan,
    ),
    _fault(
        "nan-in-weights",
        "broken-rows-have-finite-weights",
        "ik_llama.cpp#572",
        passes_nan_to_the_weights,
    ),
    _fault(
        "nan-changes-the-batch",
        "broken-rows-leave-others-alone",
        "nan_to_num over the batch",
        clears_the_batch_for_nan,
    ),
    _fault(
        "exp-overflows",
        "huge-logits-do-not-overflow",
        "softmax without its maximum",
        exponentiates_as_is,
    ),
    _fault(
        "one-maximum-for-all",
        "tokens-do-not-see-each-other",
        "softmax shifted by the maximum of a tile",
        subtracts_one_maximum_for_all,
    ),
    _fault(
        "softmax-over-tokens",
        "tokens-do-not-see-each-other",
        "transformers#40609: router scores transposed",
        normalises_over_tokens,
    ),
    _fault(
        "writes-to-logits",
        "logits-are-not-written",
        "DeepSpeed top2gating; transformers#33969",
        masks_the_chosen_in_place,
    ),
    _fault(
        "strikes-out-with-zero",
        "experts-are-chosen-once",
        "transformers#45440: 0 where -inf is meant",
        strikes_out_with_zero,
    ),
    _fault(
        "expert-id-in-a-byte",
        "more-experts-than-a-block",
        "vllm#21079: limits on the number of experts",
        counts_experts_in_a_byte,
    ),
    _fault(
        "ids-are-floats",
        "weights-and-ids-have-their-dtypes",
        "kernels that pack both into one buffer",
        packs_ids_with_weights,
    ),
    _fault(
        "eight-choices-at-most", "many-choices", "fixed arrays in kernels", chooses_at_most_eight
    ),
    _fault(
        "zero-by-zero",
        "underflow-is-zero-not-nan",
        "ik_llama.cpp#572; vLLM has no eps",
        divides_small_sums,
        "sigmoid_topk",
    ),
    _fault(
        "another-eps",
        "eps-of-the-convention",
        "1e-20, 6.1e-5 and none are all in use",
        adds_another_eps,
        "sigmoid_topk",
    ),
    _fault(
        "single-sigmoid-normalised",
        "a-single-choice",
        "Megatron-LM leaves it",
        normalises_a_single_sigmoid,
        "sigmoid_topk",
    ),
)
