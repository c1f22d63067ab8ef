"""The random numbers of one call of the layer, as arrays: what its generator gives, in order."""

from __future__ import annotations

from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive import Draws
from npmoe.testing.problems import MoEProblem


def needs_generator(cfg: MoEConfig) -> bool:
    """Return whether the layer refuses to run without a generator."""
    return cfg.second_expert_policy != "all" or cfg.drop_policy == "random"


def draw_numbers(problem: MoEProblem, row_ids: HostArray | None = None) -> Draws:
    """Return what the layer draws: jitter, noise, second expert, drop, dropout, in this order.

    Parameters
    ----------
    problem : MoEProblem
        With a generator_seed; nothing is random without one.
    row_ids : (T, K) int array, optional
        The row of every kept route, or -1: dropout is drawn row by row, hence after all
        decisions. None leaves it out; soft routing needs none.

    Returns
    -------
    Draws
        Float64 arrays, new; not rounded to the layer's dtype.
    """
    cfg, rng = problem.cfg, problem.generator()
    if rng is None:
        return Draws()
    T, N = len(problem.hidden_states), cfg.router_size
    replayed = problem.topk_ids is not None
    drawn: dict[str, Any] = {}
    if cfg.router_jitter:
        low, high = 1.0 - cfg.router_jitter, 1.0 + cfg.router_jitter
        drawn["jitter"] = rng.uniform(low, high, (T, cfg.hidden_size))
    if cfg.router_noise_std:
        drawn["noise"] = rng.standard_normal((T, N)) * cfg.router_noise_std
    if cfg.second_expert_policy == "sampling" and not replayed:
        drawn["gumbel"] = rng.gumbel(size=(T, N))
    if cfg.second_expert_policy == "random" and not replayed:
        drawn["second"] = rng.random(T)
    if cfg.drop_policy == "random":
        top_k = cfg.top_k if problem.topk_ids is None else problem.topk_ids.shape[1]
        drawn["drop"] = rng.random(T * top_k).reshape(T, top_k)
    if cfg.expert_dropout and cfg.routing == "soft":
        # Rows lie by expert; inside it by sequence and slot.
        shape = (cfg.num_experts, problem.num_sequences, N // cfg.num_experts)
        kept = rng.random((int(np.prod(shape)), cfg.intermediate_size)) >= cfg.expert_dropout
        by_sequence = kept.reshape(*shape, -1).swapaxes(0, 1)
        drawn["dropout"] = by_sequence.reshape(problem.num_sequences, N, -1)
    elif cfg.expert_dropout and row_ids is not None:
        kept = rng.random((int((row_ids >= 0).sum()), cfg.intermediate_size)) >= cfg.expert_dropout
        spread = np.ones((*row_ids.shape, cfg.intermediate_size), bool)
        spread[row_ids >= 0] = kept[row_ids[row_ids >= 0]]
        drawn["dropout"] = spread
    return Draws(**drawn)


def rows_of(topk_ids: HostArray, kept: HostArray, num_experts: int) -> HostArray:
    """Return the canonical row of every kept route (T, K): by expert, then by route; else -1."""
    routes = np.flatnonzero(kept & (topk_ids < num_experts))
    order = routes[np.argsort(topk_ids.ravel()[routes], kind="stable")]
    row_ids = np.full(kept.size, -1)
    row_ids[order] = np.arange(len(order))
    return row_ids.reshape(kept.shape)
