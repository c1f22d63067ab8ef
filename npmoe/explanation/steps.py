"""The steps of `npmoe.explain`: host copies of one call, and what the router made of a token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import Array, HostArray
from npmoe.backends import Backend
from npmoe.capacity import stretch_capacities
from npmoe.config import MoEConfig
from npmoe.dispatch import DispatchPlan, plan_dispatch
from npmoe.params import MoEParams
from npmoe.routing import Routing, group_scores, normalize_weights, stable_topk
from npmoe.routing.selection import selection_key
from npmoe.routing.weights import kept_routes, raw_weights
from npmoe.saved import SavedTensors


class RecordedDraws(np.random.Generator):
    """A generator that gives what another one gives, and remembers it by method."""

    def __init__(self, source: np.random.Generator) -> None:
        super().__init__(source.bit_generator)
        self._source = source
        self.drawn: dict[str, list[HostArray]] = {}

    def _remember(self, method: str, *args: Any, **kwargs: Any) -> Any:
        value = getattr(self._source, method)(*args, **kwargs)
        self.drawn.setdefault(method, []).append(value)
        return value

    def uniform(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's, for the jitter."""
        return self._remember("uniform", *args, **kwargs)

    def standard_normal(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's, for the noise."""
        return self._remember("standard_normal", *args, **kwargs)

    def gumbel(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's, for a second expert that is drawn."""
        return self._remember("gumbel", *args, **kwargs)

    def random(self, *args: Any, **kwargs: Any) -> Any:
        """Return the source's, for a second expert that may be refused, and for a random drop."""
        return self._remember("random", *args, **kwargs)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Call:
    """One call of the layer, on the host."""

    cfg: MoEConfig
    params: MoEParams
    saved: SavedTensors
    routing: Routing
    plan: DispatchPlan
    draws: RecordedDraws | None
    replayed: bool

    @classmethod
    def of(
        cls, saved: SavedTensors, params: MoEParams, draws: RecordedDraws | None, *, replayed: bool
    ) -> Call:
        """Copy routing, plan and the router's parameters to the host."""
        run = saved.backend
        return cls(
            cfg=saved.cfg,
            params=params,
            saved=saved,
            routing=_on_host(saved.routing, run),
            plan=_on_host(saved.plan, run),
            draws=draws,
            replayed=replayed,
        )

    def draw(self, method: str, number: int = 0) -> HostArray | None:
        """Return what was drawn by a method, or None."""
        drawn = [] if self.draws is None else self.draws.drawn.get(method, [])
        return drawn[number] if number < len(drawn) else None

    @property
    def valid(self) -> HostArray:
        """Tokens that take part (T,)."""
        mask = self.routing.token_mask
        return np.ones(self.routing.probs.shape[0], bool) if mask is None else mask


def linear_logits(call: Call, token_mask: Array | None) -> tuple[HostArray, HostArray | None]:
    """Return W h, and W h + bias if there is a bias, as the layer computes them (T, N)."""
    run, cfg, saved, params = call.saved.backend, call.cfg, call.saved, call.params
    x = (
        saved.hidden_states
        if token_mask is None
        else run.mask_rows(saved.hidden_states, token_mask)
    )
    weight, bias = params.router_weight, params.router_bias
    if cfg.router_dtype is not None:
        x, weight = run.cast(x, cfg.router_dtype), run.cast(weight, cfg.router_dtype)
        bias = None if bias is None else run.cast(bias, cfg.router_dtype)
    if saved.jitter is not None:
        x = run.multiply(x, saved.jitter)
    with_bias = None if bias is None else run.asnumpy(run.linear(x, weight, bias))
    return run.asnumpy(run.linear(x, weight, None)), with_bias


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selection:
    """By what experts were chosen, (T, N) and (T, G); None where the router did not choose."""

    key: HostArray | None = None
    limited_key: HostArray | None = None
    group_scores: HostArray | None = None
    kept_groups: HostArray | None = None


def selection(call: Call) -> Selection:
    """Return the selection keys, before and after the limit to groups, of all tokens."""
    cfg, routing = call.cfg, call.routing
    usable = np.isfinite(routing.router_logits.max(axis=1)) & call.valid
    logits = np.where(usable[:, None], routing.router_logits, 0.0)
    bias = call.params.selection_bias
    bias = None if bias is None else call.saved.backend.asnumpy(bias)
    free = dataclasses.replace(
        cfg, num_groups=1, topk_group=1, group_score="top2_sum", group_fill="-inf"
    )
    key = selection_key(logits, routing.probs, free, bias)
    if cfg.num_groups == 1:
        return Selection(key=key, limited_key=key)
    scores = group_scores(key, cfg)
    return Selection(
        key=key,
        limited_key=selection_key(logits, routing.probs, cfg, bias),
        group_scores=scores,
        kept_groups=np.sort(stable_topk(scores, cfg.topk_group), axis=1),
    )


def weight_stages(call: Call) -> tuple[HostArray, HostArray, HostArray | None]:
    """Return ids before any refusal, raw weights, and normalised weights or None; all (T, K)."""
    cfg, routing = call.cfg, call.routing
    ids = routing.topk_ids if routing.summed_ids is None else routing.summed_ids
    usable = np.isfinite(routing.router_logits.max(axis=1))
    logits = np.where(usable[:, None], routing.router_logits, 0.0)
    raw = raw_weights(logits, routing.probs, ids, cfg)
    raw = np.where(usable[:, None], raw, 0.0)
    if not cfg.normalizes:
        return ids, raw, None
    if cfg.renormalize_drop == "before":
        return ids, raw, normalize_weights(raw, cfg)
    kept = kept_routes(routing, call.plan)
    return ids, raw, normalize_weights(np.where(kept, raw, 0.0), cfg)


def capacities(call: Call) -> list[int] | None:
    """Return the rows per expert of every stretch of tokens that competes; None if dropless."""
    if not call.cfg.has_capacity:
        return None
    return stretch_capacities(call.valid, call.routing.sequence_length, call.cfg)


def places_in_line(call: Call, stretches: int) -> HostArray:
    """Return the place of every route (T, K) in its expert's queue, as if nothing were dropped."""
    cfg, routing = call.cfg, call.routing
    num_tokens, top_k = routing.topk_ids.shape
    policy, weights = cfg.drop_policy, routing.topk_weights
    if cfg.renormalize_drop == "after":
        weights = weight_stages(call)[1]  # what stood at the drop
    if policy == "random":
        number = 1 if cfg.second_expert_policy == "random" and not call.replayed else 0
        draws = call.draw("random", number)
        if draws is not None:
            # The lowest draw asks first, as the largest weight does.
            policy, weights = "probability", -draws.reshape(num_tokens, top_k)
    plan = plan_dispatch(
        routing.topk_ids,
        num_experts=cfg.num_experts,
        num_identity_experts=cfg.num_identity_experts,
        capacity=[num_tokens * top_k] * stretches,
        drop_policy=policy,
        topk_weights=weights,
    )
    return np.asarray(plan.slot_ids)


def expert_choice_ranks(call: Call, t: int) -> tuple[HostArray, HostArray]:
    """Return token t's rank in every expert's list, and the lowest score each expert took (N,)."""
    limits = capacities(call) or [0]
    stretch = call.routing.probs.shape[0] // len(limits)
    first = t // stretch * stretch
    tokens = first + np.flatnonzero(call.valid[first : first + stretch])
    probs = call.routing.probs[tokens]  # (valid tokens, N)
    order = np.argsort(-probs, axis=0, kind="stable")
    place = int(np.flatnonzero(tokens == t)[0])
    ranks = (order == place).argmax(axis=0)
    took = min(limits[t // stretch], len(tokens))
    if took == 0:
        return ranks, np.full(probs.shape[1], np.nan)
    return ranks, np.take_along_axis(probs, order[took - 1 : took], axis=0)[0]


def _on_host(values: Any, run: Backend) -> Any:
    """Return a copy of a dataclass whose arrays are NumPy's."""
    arrays: dict[str, Array] = {
        f.name: run.asnumpy(value)
        for f in dataclasses.fields(values)
        if hasattr(value := getattr(values, f.name), "shape")
    }
    return dataclasses.replace(values, **arrays)
