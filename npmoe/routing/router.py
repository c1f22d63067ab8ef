"""From router logits to the experts and weights of every token, and back."""

from __future__ import annotations

import numpy as np

from npmoe._typing import Array, array_namespace
from npmoe.capacity import stretch_capacities
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan
from npmoe.errors import RangeError
from npmoe.routing.result import Routing
from npmoe.routing.scoring import score, score_slope, screen_rows
from npmoe.routing.selection import (
    choose_tokens,
    need_generator,
    sample_second,
    selection_key,
    stable_topk,
)
from npmoe.routing.weights import (
    chosen_logits,
    kept_routes,
    normalize_weights,
    normalize_weights_backward,
    raw_weights,
    scatter_add,
)


def route(
    router_logits: Array,
    cfg: MoEConfig,
    *,
    selection_bias: Array | None = None,
    token_mask: Array | None = None,
    topk_ids: Array | None = None,
    rng: np.random.Generator | None = None,
    sequence_length: int | None = None,
) -> Routing:
    """Choose experts and weights for every token.

    Parameters
    ----------
    router_logits : (T, N) float array
        After router bias and soft-cap; N counts identity experts.
    cfg : MoEConfig
        Its routing fields; any routing but "soft".
    selection_bias : (N,) float array, optional
        Added to the selection key.
    token_mask : (T,) bool array, optional
        True = valid. Masked rows may hold anything.
    topk_ids : (T, K) int array, optional
        Replayed choices; weights come from the current logits. "hash" needs them.
    rng : numpy Generator, optional
        Source of the router noise (T, N), then of the second expert: Gumbel noise (T, N) or
        uniform numbers (T,). None means no noise.
    sequence_length : int, optional
        Tokens per sequence; T if omitted.

    Returns
    -------
    Routing
        New arrays; `router_logits` is the input itself when no noise was added.

    Raises
    ------
    RangeError
        Under nan_policy "raise", if a valid row has no finite largest logit; if ids or a
        generator are missing.

    Notes
    -----
    **Order**: ties go to the lowest expert id. A single -inf logit is legal and means "never";
    a row is non-finite when its largest logit is NaN or infinite.

    References
    ----------
    "score_topk" without renormalisation: Fedus et al. 2021; with: Mixtral in transformers;
    "topk_score": Shazeer et al. 2017, eq. 3-5, and gpt-oss; sigmoid: DeepSeek-V3; sqrtsoftplus:
    DeepSeek-V4. "clamp": vLLM ``topk_softmax``.
    """
    xp = array_namespace(router_logits)
    num_tokens = router_logits.shape[0]
    sequence_length = num_tokens if sequence_length is None else sequence_length
    clean_logits = None
    if cfg.router_noise_std and rng is not None:
        clean_logits = router_logits
        noise = rng.standard_normal(router_logits.shape) * cfg.router_noise_std
        router_logits = router_logits + xp.asarray(noise.astype(str(router_logits.dtype)))
    logits, valid = screen_rows(router_logits, cfg.nan_policy, token_mask)
    probs = score(logits, cfg.score_fn)
    if valid is not None:
        probs = xp.where(valid[:, None], probs, xp.zeros_like(probs))
    keep = valid if cfg.nan_policy != "clamp" else token_mask
    if topk_ids is not None:
        ids = topk_ids
    elif cfg.routing == "hash":
        raise RangeError(
            "moe_forward: topk_ids must be given with routing='hash', got None. Look them up in "
            "the table of token ids."
        )
    elif cfg.routing == "dense":
        ids = xp.broadcast_to(xp.arange(probs.shape[1]), probs.shape)
    elif cfg.routing == "expert_choice":
        everyone = xp.ones((num_tokens,), dtype=bool)
        usable = everyone if keep is None else keep
        capacities = stretch_capacities(usable, sequence_length, cfg)
        ids = choose_tokens(probs, usable, capacities)
    else:
        ids = _choose(logits, probs, cfg, selection_bias, rng)
        if valid is not None and cfg.nan_policy == "clamp":
            # Nothing about a broken row chooses, not even a bias: vLLM's ids 0..K-1.
            ids = xp.where(valid[:, None], ids, xp.arange(cfg.top_k))
    ids = ids.astype(xp.int32)
    if keep is not None:
        ids = xp.where(keep[:, None], ids, -1)
    weights = raw_weights(logits, probs, ids, cfg)
    if valid is not None:
        weights = xp.where(valid[:, None], weights, xp.zeros_like(weights))
    normalized = weights
    if _normalizes(ids, cfg) and cfg.renormalize_drop == "before":
        normalized = normalize_weights(weights, cfg)
    summed_ids = None
    if cfg.second_expert_policy == "random" and topk_ids is None:
        draws = need_generator(rng, "second_expert_policy", "random").random(num_tokens)
        refused = 2.0 * normalized[:, 1] <= xp.asarray(draws.astype(str(weights.dtype)))
        summed_ids, ids = ids, ids.copy()
        ids[:, 1] = xp.where(refused, -1, ids[:, 1])
        normalized = xp.where(ids >= 0, normalized, xp.zeros_like(normalized))
    if cfg.renormalize_drop == "before":
        normalized = normalized * cfg.routed_scaling_factor
    return Routing(
        topk_ids=ids,
        topk_weights=normalized,
        probs=probs,
        router_logits=router_logits,
        token_mask=keep,
        sequence_length=sequence_length,
        score_fn=cfg.score_fn,
        clean_logits=clean_logits,
        summed_ids=summed_ids,
    )


def _choose(
    logits: Array,
    probs: Array,
    cfg: MoEConfig,
    selection_bias: Array | None,
    rng: np.random.Generator | None,
) -> Array:
    """Return the K choices of every token, by selection key descending."""
    if cfg.selection_bias and selection_bias is None:
        raise RangeError(
            "route: selection_bias must be given with cfg.selection_bias=True, got None."
        )
    key = selection_key(logits, probs, cfg, selection_bias)
    ids = stable_topk(key, cfg.top_k)
    if cfg.second_expert_policy == "sampling":
        generator = need_generator(rng, "second_expert_policy", "sampling")
        ids[:, 1] = sample_second(logits, ids[:, 0], generator)
    return ids


def _normalizes(ids: Array, cfg: MoEConfig) -> bool:
    """Return whether weights of choices (T, K) are normalised: K counts, which a replay may set."""
    return cfg.renormalize and (cfg.renorm_single or ids.shape[1] > 1)


def route_backward(
    grad_topk_weights: Array, routing: Routing, cfg: MoEConfig, plan: DispatchPlan | None = None
) -> Array:
    """Return the gradient of the router logits.

    With scores v of the chosen and w = scale * v / D: the normalisation's gradient first, eq.
    (12) of `npmoe.layer`, then the score function's, eq. (13). Choices and drops are constants.

    Parameters
    ----------
    grad_topk_weights : (T, K) float array
        Gradient of `routing.topk_weights`.
    routing : Routing
        As returned by the forward pass.
    cfg : MoEConfig
        The same as in the forward pass.
    plan : DispatchPlan, optional
        Needed with renormalize_drop="after": says which routes were summed.

    Returns
    -------
    (T, N) float array
        New; exactly zero in rows of masked tokens.
    """
    xp = array_namespace(grad_topk_weights)
    probs, logits = routing.probs, routing.router_logits
    ids = routing.topk_ids if routing.summed_ids is None else routing.summed_ids
    if cfg.nan_policy == "clamp":
        ids = xp.where(xp.isfinite(logits.max(axis=1, keepdims=True)), ids, -1)
    raw = raw_weights(logits, probs, ids, cfg)
    grad = grad_topk_weights * cfg.routed_scaling_factor
    grad = xp.where(routing.topk_ids >= 0, grad, xp.zeros_like(grad))
    if _normalizes(ids, cfg):
        if cfg.renormalize_drop == "before":
            grad = normalize_weights_backward(grad, raw, cfg)
        elif plan is None:
            raise RangeError(
                "route_backward: plan must be given with renormalize_drop='after', got None. "
                "Only the kept routes were normalised."
            )
        else:
            kept, zeros = kept_routes(routing, plan), xp.zeros_like(grad)
            grad = xp.where(kept, grad, zeros)
            grad = normalize_weights_backward(grad, xp.where(kept, raw, zeros), cfg)
            grad = xp.where(kept, grad, zeros)
    if cfg.score_fn != "softmax":
        slope = score_slope(chosen_logits(logits, ids), raw, cfg.score_fn)
        grad = xp.where(ids >= 0, grad * slope, xp.zeros_like(grad))
        return scatter_add(xp.zeros_like(probs), ids, grad)
    weighted = grad * raw
    inner = weighted.sum(axis=1, keepdims=True)
    if cfg.router_order == "topk_score":
        return scatter_add(xp.zeros_like(probs), ids, weighted - raw * inner)
    return scatter_add(probs * -inner, ids, weighted)
