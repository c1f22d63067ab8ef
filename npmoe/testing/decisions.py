"""Whether a layer's choices and drops follow the rules, as far as rounding can tell.

Choices are discontinuous: two correct programs may decide differently where two numbers agree up
to rounding. A decision is lawful if some members of the balls would lead to it; everything else
is then compared with a definition that is told the layer's decisions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.naive import Draws
from npmoe.naive.capacity import assign_slots, expert_capacity, sequences
from npmoe.naive.selection import keeps_second
from npmoe.testing.balls import Ball
from npmoe.testing.problems import MoEProblem
from npmoe.testing.router_bounds import RouterBalls


@dataclass(frozen=True, slots=True, kw_only=True)
class Decisions:
    """What a layer decided, on the host."""

    topk_ids: HostArray  # (T, K)
    summed_ids: HostArray  # (T, K), with second experts that were refused at random
    kept: HostArray  # (T, K) bool
    slot_ids: HostArray | None  # (T, K); None if dropless


def assert_lawful(
    problem: MoEProblem, decisions: Decisions, balls: RouterBalls, draws: Draws
) -> None:
    """Raise AssertionError unless ids, refused second experts, drops and slots are lawful.

    Parameters
    ----------
    problem : MoEProblem
        Any routing but "soft", which decides nothing.
    decisions : Decisions
    balls : RouterBalls
        Of a forward pass with these decisions.
    draws : Draws
    """
    _check_ids(problem, decisions, balls, draws)
    _check_second(problem, decisions, balls, draws)
    _check_drop(problem, decisions, balls, draws)


def _check_ids(problem: MoEProblem, decisions: Decisions, balls: RouterBalls, draws: Draws) -> None:
    cfg, ids = problem.cfg, decisions.summed_ids
    assert (ids[~problem.valid] == -1).all(), "a masked token has an expert"
    if problem.topk_ids is not None:
        expected = problem.topk_ids[problem.valid]
        assert (ids[problem.valid] == expected).all(), "replayed ids changed"
    elif cfg.routing == "dense":
        assert (ids[problem.valid] == np.arange(cfg.router_size)).all(), "dense ids"
    elif cfg.routing == "expert_choice":
        _check_chosen_tokens(problem, ids, balls.probs)
    else:
        key = _selection_key(problem, balls)
        for t in np.flatnonzero(problem.valid):
            noisy = None
            if draws.gumbel is not None:
                noisy = balls.logits[t] + Ball.drawn(draws.gumbel[t], balls.logits.model)
            chosen = [int(e) for e in ids[t]]
            assert _is_lawful_choice(chosen, key[t], noisy, cfg), f"token {t} chose {chosen}"


def _selection_key(problem: MoEProblem, balls: RouterBalls) -> Ball:
    """Return what tokens choose by (T, N), before groups are left out."""
    cfg = problem.cfg
    on_logits = cfg.router_order == "topk_score" or cfg.selection_bias_on == "logits"
    key = balls.logits if on_logits else balls.probs
    bias = problem.params.selection_bias
    return key if bias is None else key + Ball.drawn(bias, key.model)


def _is_lawful_choice(ids: list[int], key: Ball, noisy: Ball | None, cfg: MoEConfig) -> bool:
    """Return whether one token, whose key is (N,), may choose these ids in this order."""
    if len(ids) != cfg.top_k or len(set(ids)) != len(ids) or min(ids) < 0:
        return False
    if noisy is not None:
        first, second = ids
        others = [e for e in range(len(noisy.mid)) if e != first]
        leads = all(_may_precede(key, first, e) for e in others)
        return leads and all(_may_precede(noisy, second, e) for e in others if e != second)
    return any(_falls(ids, limited) for limited in _limited_keys(key, cfg))


def _limited_keys(key: Ball, cfg: MoEConfig) -> list[Ball]:
    """Return the key with other groups filled, for every lawful set of best groups."""
    if cfg.num_groups == 1:
        return [key]
    size = len(key.mid) // cfg.num_groups
    group_of = np.arange(len(key.mid)) // size
    counted = {"max": 1, "top2_sum": 2, "topk_div": cfg.top_k // cfg.topk_group}[cfg.group_score]
    counted = min(counted, size)
    # The n-th largest of a group lies between the n-th largest of lower and of upper ends.
    ends = [
        np.sort((key.mid + sign * key.rad).reshape(cfg.num_groups, size), axis=1)[:, -counted:]
        for sign in (-1.0, 1.0)
    ]
    members = Ball((ends[0] + ends[1]) / 2.0, (ends[1] - ends[0]) / 2.0, key.model)
    # Halves and differences of the ends are rounded in float64, which the model's u includes.
    score = members if counted == 1 else members.sum(axis=1)[:, None]
    score = Ball(score.mid[:, 0], score.rad[:, 0], key.model)
    fill = 0.0 if cfg.group_fill == "zero" else -np.inf
    limited = []
    for best in itertools.combinations(range(cfg.num_groups), cfg.topk_group):
        rest = [g for g in range(cfg.num_groups) if g not in best]
        if all(_may_precede(score, g, other) for g in best for other in rest):
            inside = np.isin(group_of, best)
            limited.append(
                Ball(np.where(inside, key.mid, fill), np.where(inside, key.rad, 0.0), key.model)
            )
    return limited


def _falls(ids: list[int], key: Ball) -> bool:
    """Return whether the ids may be the largest entries, falling."""
    rest = [e for e in range(len(key.mid)) if e not in ids]
    return all(
        _may_precede(key, e, worse) for k, e in enumerate(ids) for worse in [*ids[k + 1 :], *rest]
    )


def _may_precede(key: Ball, first: Any, second: Any) -> bool:
    """Return whether key[first] may be the larger; of equal exact numbers the lower place is."""
    above = key.mid[first] + key.rad[first]
    below = key.mid[second] - key.rad[second]
    if key.rad[first] == 0.0 == key.rad[second] and above == below:
        return bool(first < second)
    return bool(above >= below)


def _check_chosen_tokens(problem: MoEProblem, ids: HostArray, probs: Ball) -> None:
    """Check topk_ids where the experts choose their most probable tokens."""
    cfg = problem.cfg
    counts = (ids >= 0).sum(axis=1)
    assert ids.shape[1] == max(1, counts.max(initial=0)), "topk_ids has too many columns"
    for row, count in zip(ids, counts, strict=True):
        assert (row[count:] == -1).all()
        assert (np.diff(row[:count]) > 0).all(), "ids ascend"
    for tokens in sequences(len(ids), problem.sequence_length, cfg):
        usable = [t for t in tokens if problem.valid[t]]
        capacity = expert_capacity(len(usable), cfg)
        assert capacity is not None
        for e in range(cfg.num_experts):
            chosen = [t for t in usable if e in ids[t]]
            assert len(chosen) == min(capacity, len(usable)), f"expert {e} takes C tokens"
            column = probs[:, e]
            for t in chosen:
                for other in usable:
                    lawful = other in chosen or _may_precede(column, t, other)
                    assert lawful, f"expert {e} took token {t} and not {other}"


def _check_second(
    problem: MoEProblem, decisions: Decisions, balls: RouterBalls, draws: Draws
) -> None:
    """Check which second experts were refused at random."""
    refused = decisions.summed_ids != decisions.topk_ids
    assert (decisions.topk_ids[refused] == -1).all()
    if draws.second is None:
        assert not refused.any(), "an expert was refused"
        return
    assert not refused[:, 0].any(), "a first expert was refused"
    weight = balls.second_weights[:, 1]
    uniform = Ball.drawn(draws.second, weight.model)
    for t in np.flatnonzero(problem.valid):
        highest, lowest = weight.mid[t] + weight.rad[t], max(0.0, weight.mid[t] - weight.rad[t])
        u = uniform.mid[t] + uniform.rad[t] * (-1.0 if not refused[t, 1] else 1.0)
        lawful = keeps_second(highest, u) if not refused[t, 1] else not keeps_second(lowest, u)
        assert lawful, (
            f"the second expert of token {t} was {'refused' if refused[t, 1] else 'kept'}"
        )


def _check_drop(
    problem: MoEProblem, decisions: Decisions, balls: RouterBalls, draws: Draws
) -> None:
    """Check how many routes every expert kept, which ones, and their slots."""
    cfg, ids, kept = problem.cfg, decisions.topk_ids, decisions.kept
    if not cfg.has_capacity:
        assert (kept == (ids >= 0)).all(), "a route was dropped"
        return
    slots = decisions.slot_ids
    assert slots is not None
    assert (kept == ((slots >= 0) | (ids >= cfg.num_experts))).all(), "kept routes have a slot"
    by_weight = cfg.drop_policy in ("probability", "batch_priority")
    for tokens in sequences(len(ids), problem.sequence_length, cfg):
        part = slice(tokens.start, tokens.stop)
        capacity = expert_capacity(int(problem.valid[part].sum()), cfg)
        if by_weight:
            _check_slots(ids[part], slots[part], balls.drop_weights[part], capacity, cfg)
            continue
        drawn = None if draws.drop is None else draws.drop[part]
        expected = assign_slots(ids[part], balls.drop_weights.mid[part], capacity, cfg, drawn)
        assert (slots[part] == expected).all(), "slots"


def _check_slots(
    ids: HostArray, slots: HostArray, weights: Ball, capacity: int | None, cfg: MoEConfig
) -> None:
    """Check the slots of routes that ask in the order of their weights, or their tokens'."""
    assert capacity is not None

    def may_precede(one: tuple[int, int], other: tuple[int, int]) -> bool:
        if cfg.drop_policy == "probability":
            return _may_precede(weights, one, other)
        if one[1] != other[1]:
            return one[1] < other[1]
        return _may_precede(weights, (one[0], 0), (other[0], 0))

    for e in range(cfg.num_experts):
        wanting = [(int(t), int(k)) for t, k in np.argwhere(ids == e)]
        staying = sorted((r for r in wanting if slots[r] >= 0), key=lambda r: slots[r])
        dropped = [r for r in wanting if slots[r] < 0]
        assert [slots[r] for r in staying] == list(range(min(capacity, len(wanting)))), "slots"
        for i, route in enumerate(staying):
            later = [] if cfg.slot_order == "token" else staying[i + 1 :]
            for other in [*later, *dropped]:
                assert may_precede(route, other), f"expert {e} preferred {route} to {other}"
        if cfg.slot_order == "token":
            assert staying == sorted(staying), "slots by token"
