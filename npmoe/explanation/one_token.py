"""explain: run the layer and say what it did with one token."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from npmoe._checks import require
from npmoe._layer_checks import check_inputs, flat_mask
from npmoe._typing import Array, HostArray
from npmoe.backends import Backend, get_backend
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.explanation import steps
from npmoe.explanation.choices import route_choices, slot_choices
from npmoe.explanation.result import Explanation, Status
from npmoe.layer import moe_forward
from npmoe.params import MoEParams


def explain(
    token: int | tuple[int, int],
    hidden_states: Array,
    params: MoEParams,
    cfg: MoEConfig,
    *,
    token_mask: Array | None = None,
    topk_ids: Array | None = None,
    rng: np.random.Generator | None = None,
    backend: str | Backend | None = None,
    block_size: int = 64,
) -> Explanation:
    """Explain what the layer does with one token, from logits to rows.

    Parameters
    ----------
    token : int or (int, int)
        Flat index, or sequence and place in it.
    hidden_states, params, cfg, token_mask, topk_ids, backend
        As for `moe_forward`: the whole batch, since other tokens decide about drops.
    rng : numpy Generator, optional
        As for `moe_forward`; equal generators draw equal numbers.
    block_size : int
        Rows of a block, for the places in the list of blocks.

    Returns
    -------
    Explanation
        ``print(explain(...))`` shows it.

    Raises
    ------
    RangeError
        If `token` or `block_size` is out of range.
    ShapeError, DTypeError, BackendUnavailableError
        As `moe_forward`.

    Notes
    -----
    Routing and plan are those of a forward pass with the same arguments. Where nan_policy is
    "raise" and a row is not finite, that pass runs with "drop", and the text says so.

    **Cost**: one forward pass, one more product with the router, and O(T*(N + K)).
    """
    name = "explain"
    run = get_backend(backend)
    shape = check_inputs(name, hidden_states, params, cfg)
    mask = flat_mask(name, token_mask, shape)
    t = _flat_token(token, shape)
    require(
        isinstance(block_size, int) and block_size >= 1,
        f"{name}: block_size must be an integer of at least 1, got {block_size!r}.",
    )
    draws = None if rng is None else steps.RecordedDraws(rng)
    lenient = dataclasses.replace(cfg, nan_policy="drop") if cfg.nan_policy == "raise" else cfg
    _, saved = moe_forward(hidden_states, params, lenient, run, draws, token_mask, topk_ids)
    call = steps.Call.of(saved, params, draws, replayed=topk_ids is not None)
    routing = call.routing
    host_mask = None if mask is None else run.asnumpy(mask)
    status, verdict = _status(t, call, host_mask, cfg)
    soft = cfg.routing == "soft"
    linear, biased = (None, None) if soft else steps.linear_logits(call, mask)
    clean = routing.router_logits if routing.clean_logits is None else routing.clean_logits
    noise = call.draw("standard_normal") if cfg.router_noise_std else None
    chosen_by_router = cfg.routing == "token_choice" and not call.replayed and status != "masked"
    picked = steps.selection(call) if chosen_by_router else steps.Selection()
    ranks, thresholds = (
        steps.expert_choice_ranks(call, t)
        if cfg.routing == "expert_choice" and status == "valid"
        else (None, None)
    )
    limits = None if soft else steps.capacities(call)
    bias = params.selection_bias
    return Explanation(
        token=t,
        batch=t // shape[-2],
        position=t % shape[-2],
        num_tokens=math.prod(shape[:-1]),
        cfg=cfg,
        status=status,
        verdict=verdict,
        linear=_row(linear, t),
        biased=_row(biased, t),
        clean=_row(clean if cfg.logit_softcap is not None else None, t),
        noise=None if noise is None else routing.router_logits[t] - clean[t],
        router_logits=routing.router_logits[t],
        probs=routing.probs[t],
        selection_bias=None if bias is None or picked.key is None else run.asnumpy(bias),
        key=_row(picked.key, t),
        limited_key=_row(picked.limited_key, t),
        group_scores=_row(picked.group_scores, t),
        kept_groups=None if picked.kept_groups is None else tuple(picked.kept_groups[t].tolist()),
        gumbel=_row(call.draw("gumbel") if chosen_by_router else None, t),
        ranks=ranks,
        thresholds=thresholds,
        dispatch=None
        if saved.soft is None
        else run.asnumpy(saved.soft.assignments.dispatch).reshape(routing.probs.shape)[t],
        capacity=None
        if limits is None
        else limits[t // max(1, math.prod(shape[:-1]) // len(limits))],
        choices=slot_choices(call, t, block_size)
        if soft
        else route_choices(call, t, picked, limits, block_size),
        replayed=call.replayed,
        block_size=block_size,
    )


def _flat_token(token: int | tuple[int, int], shape: tuple[int, ...]) -> int:
    """Return the flat index, or raise."""
    length, num_tokens = shape[-2], math.prod(shape[:-1])
    where = f"T is bound by hidden_states {shape}."
    if isinstance(token, tuple):
        batches = math.prod(shape[:-2])
        if len(token) != 2 or not all(_is_index(i) for i in token):
            raise RangeError(
                f"explain: token must be an index or (batch, position), got {token!r}. {where}"
            )
        batch, position = token
        if not (0 <= batch < batches and 0 <= position < length):
            raise RangeError(
                f"explain: token must lie in (0..{batches - 1}, 0..{length - 1}), got {token}. "
                f"It is (batch, position) in hidden_states {shape}."
            )
        return int(batch * length + position)
    if not _is_index(token) or not 0 <= token < num_tokens:
        raise RangeError(
            f"explain: token must be an integer in 0..{num_tokens - 1}, got {token!r}. {where}"
        )
    return int(token)


def _is_index(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _status(t: int, call: steps.Call, mask: HostArray | None, cfg: MoEConfig) -> tuple[Status, str]:
    """Return what kind of token it is, in a word and in words."""
    wanted = np.ones(call.valid.shape, bool) if mask is None else mask
    usable = np.isfinite(call.routing.router_logits.max(axis=1)) & (call.valid | ~wanted)
    broken = np.flatnonzero(wanted & ~usable)
    if not wanted[t]:
        return "masked", "masked by token_mask: not routed, not counted, output 0"
    largest = float(call.routing.router_logits[t].max())
    if t in broken:
        what = {
            "raise": "nan_policy 'raise' stops the layer here",
            "drop": "nan_policy 'drop' treats it as masked: not routed, output 0",
            "clamp": "nan_policy 'clamp' puts 0 in place of its logits, and weights of 0",
        }[cfg.nan_policy]
        # Soft routing keeps no logits of such a token.
        which = "" if math.isfinite(largest) else f" (the largest is {largest})"
        return "not finite", f"its router logits are not finite{which}: {what}"
    if broken.size and cfg.nan_policy == "raise":
        return "valid", (
            f"valid, but token {broken[0]} has no finite largest logit and nan_policy 'raise' "
            "stops the layer there; explained as if it were dropped"
        )
    return "valid", "valid"


def _row(values: HostArray | None, t: int) -> HostArray | None:
    return None if values is None else values[t]
