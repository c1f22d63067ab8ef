"""The layer as a case: arrays and a config in, outputs of the definition with bounds out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe import naive
from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive import Draws
from npmoe.params import MoEGrads, MoEParams
from npmoe.testing.balls import Ball
from npmoe.testing.draws import draw_numbers, rows_of
from npmoe.testing.layer_bounds import LayerBounds, layer_bounds
from npmoe.testing.problems import MoEProblem

# How much farther apart than their radii numbers must be that decide something.
_APART = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTruth:
    """What `npmoe.naive` makes of a problem, and how far a program may be from it."""

    forward: naive.NaiveForward
    grads: naive.NaiveGrads
    bounds: LayerBounds
    draws: Draws


def plain_problem(
    cfg: MoEConfig, hidden_states: HostArray, grad_output: HostArray, params: MoEParams
) -> MoEProblem:
    """Return the problem of these arrays: no mask, no replay, nothing random."""
    return MoEProblem(
        cfg=cfg,
        params=params,
        hidden_states=hidden_states,
        grad_output=grad_output,
        token_mask=None,
        topk_ids=None,
        grad_router_logits=None,
        num_sequences=1,
        generator_seed=None,
        exact=False,
        exact_choice=False,
        call="",
    )


def layer_truth(problem: MoEProblem, operands: str | None = None) -> LayerTruth:
    """Run the definition forward and backward, and the bounds."""
    call: dict[str, Any] = {
        "token_mask": problem.token_mask,
        "topk_ids": problem.topk_ids,
        "sequence_length": problem.sequence_length if len(problem.hidden_states) else 1,
    }
    x, cfg = problem.hidden_states, problem.cfg
    draws = draw_numbers(problem)
    forward = naive.moe_forward(x, problem.params, cfg, draws=draws, **call)
    if cfg.expert_dropout and cfg.routing != "soft" and problem.generator_seed is not None:
        # Dropout is drawn row by row, after all decisions.
        rows = rows_of(forward.topk_ids, forward.kept, cfg.num_experts)
        draws = draw_numbers(problem, rows)
        forward = naive.moe_forward(x, problem.params, cfg, draws=draws, **call)
    grads = naive.moe_backward(
        problem.grad_output,
        x,
        problem.params,
        cfg,
        draws=draws,
        grad_router_logits=problem.grad_router_logits,
        **call,
    )
    bounds = layer_bounds(problem, forward, draws, operands=operands)
    return LayerTruth(forward=forward, grads=grads, bounds=bounds, draws=draws)


def is_settled(problem: MoEProblem, truth: LayerTruth) -> bool:
    """Return whether no rounding can change a choice, a drop or a refusal.

    Everything that decides is farther apart than its error bounds, so that all correct programs
    decide alike. Exactly equal numbers count as undecided.
    """
    cfg, router = problem.cfg, truth.bounds.router
    valid = np.flatnonzero(problem.valid)
    if router is None or not len(valid):
        return True
    if problem.topk_ids is None and not _choice_settled(problem, truth, valid):
        return False
    if cfg.has_capacity and cfg.drop_policy == "probability":
        taken = truth.forward.topk_ids >= 0
        chosen = Ball(router.drop_weights.mid[taken], router.drop_weights.rad[taken], _model(truth))
        return _apart(chosen)
    if cfg.has_capacity and cfg.drop_policy == "batch_priority":
        return _apart(router.drop_weights[valid, 0])
    return True


def _choice_settled(problem: MoEProblem, truth: LayerTruth, valid: HostArray) -> bool:
    cfg, router, draws = problem.cfg, truth.bounds.router, truth.draws
    if router is None or cfg.routing == "dense":
        return True
    if cfg.routing == "expert_choice":
        most = naive.expert_capacity(len(valid), cfg) or 0
        whole = cfg.capacity_scope == "batch" or problem.num_sequences == 1
        columns = [router.probs[valid, e] for e in range(cfg.num_experts)]
        return all(_ends_apart(c, most) if whole else _apart(c) for c in columns)
    on_logits = cfg.router_order == "topk_score" or cfg.selection_bias_on == "logits"
    key = router.logits if on_logits else router.probs
    if problem.params.selection_bias is not None:
        key = key + Ball.drawn(problem.params.selection_bias, key.model)
    if draws.gumbel is not None:
        noisy = router.logits + Ball.drawn(draws.gumbel, key.model)
        if not all(_apart(noisy[t]) for t in valid):
            return False
    if draws.second is not None:
        distance = np.abs(2.0 * router.second_weights.mid[:, 1] - draws.second)
        if bool((distance <= 2.0 * _APART * router.second_weights.rad[:, 1] + 1e-6)[valid].any()):
            return False
    return all(_row_settled(key[t], cfg) for t in valid)


def _row_settled(key: Ball, cfg: MoEConfig) -> bool:
    """Return whether the best K + 1 of one token, and its groups, are apart."""
    if cfg.num_groups > 1:
        size = len(key.mid) // cfg.num_groups
        counted = {"max": 1, "top2_sum": 2, "topk_div": cfg.top_k // cfg.topk_group}
        many = min(size, counted[cfg.group_score])
        members = np.sort(key.mid.reshape(cfg.num_groups, size), axis=1)[:, -many:]
        rad = np.full(cfg.num_groups, 2.0 * many * key.rad.max(initial=0.0))
        # With groups, everything within a row is apart, also from a fill of 0.
        filled = Ball(np.append(key.mid, 0.0), np.append(key.rad, 0.0), key.model)
        return _apart(Ball(members.sum(axis=1), rad, key.model)) and _apart(filled)
    best = np.argsort(-key.mid, kind="stable")[: cfg.top_k + 1]
    return _apart(key[best])


def _apart(values: Ball) -> bool:
    order = np.argsort(values.mid)
    gaps = np.diff(values.mid[order])
    return bool((gaps > _APART * values.rad.max(initial=0.0)).all())


def _ends_apart(values: Ball, count: int) -> bool:
    """Return whether the `count` largest are apart from the rest."""
    if not 0 < count < len(values.mid):
        return True
    order = np.argsort(-values.mid)[count - 1 : count + 1]
    return _apart(Ball(values.mid[order], np.full(2, values.rad.max()), values.model))


def _model(truth: LayerTruth) -> Any:
    router = truth.bounds.router
    return None if router is None else router.logits.model


def finite_truth(truth: LayerTruth) -> bool:
    """Return whether everything is finite, that is, nothing poisoned is used."""
    arrays = [truth.forward.output]
    arrays += [getattr(truth.grads, n) for n in MoEGrads.__dataclass_fields__]
    return all(a is None or bool(np.isfinite(a).all()) for a in arrays)
