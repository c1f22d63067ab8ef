"""What a routing convention chooses and weighs, in balls, and the verdicts that rest on it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.conventions import routing_convention
from npmoe.testing import score_bounds
from npmoe.testing.balls import Ball, Model
from npmoe.testing.conformance.case import Call, Case, Expected, Finding, compare
from npmoe.testing.router_bounds import chosen_scores

_config = functools.cache(routing_convention)


@dataclass(frozen=True, slots=True)
class RouterRule:
    """One convention: what experts are chosen by, and their weights, in balls."""

    convention: str

    def config(self, case: Case) -> MoEConfig:
        """Return the config for the case's E and K."""
        x, top_k = case.arguments["router_logits"], case.arguments["top_k"]
        return _config(self.convention, x.shape[1], top_k)

    def logits(self, case: Case) -> Ball:
        """Return the logits, 0 in broken rows."""
        x = case.arguments["router_logits"]
        return Ball.exact(np.where(usable_rows(x)[:, None], x, 0.0), Model.of(x.dtype))

    def key(self, case: Case) -> Ball:
        """Return what experts are chosen by (T, E)."""
        cfg, logits = self.config(case), self.logits(case)
        return (
            logits if cfg.router_order == "topk_score" else score_bounds.score(logits, cfg.score_fn)
        )

    def weights(self, case: Case, ids: HostArray) -> Ball:
        """Return the weights (T, K) of any distinct ids."""
        cfg, logits = self.config(case), self.logits(case)
        by_all = cfg.router_order == "score_topk"
        probs = score_bounds.score(logits, cfg.score_fn) if by_all else logits  # not looked at
        raw = chosen_scores(logits, probs, ids, cfg)
        weights = score_bounds.normalize(raw, np.ones(ids.shape, bool), cfg).weights
        return weights * Ball.drawn(cfg.routed_scaling_factor, weights.model)

    def expected(self, case: Case) -> tuple[Expected, Expected]:
        """Return weights and ids, by falling logit and the lower id among equals."""
        x, top_k = case.arguments["router_logits"], case.arguments["top_k"]
        ids = np.argsort(-self.logits(case).mid, axis=1, kind="stable")[:, :top_k]
        weights = self.weights(case, ids)
        free = np.broadcast_to(~usable_rows(x)[:, None], ids.shape)
        return (
            Expected(value=weights.mid, bound=weights.rad, free=free, dtype=str(x.dtype)),
            Expected(value=ids, free=free),
        )

    # Judges.

    def judge_call(self, call: Call, case: Case) -> None:
        """Raise for what is wrong before any number is looked at."""
        call(case)

    def judge_ids(self, call: Call, case: Case) -> None:
        """Raise unless the experts are distinct, in range, and none better was left out."""
        self.check_choice(case, call(case)[1])

    def judge_all(self, call: Call, case: Case) -> None:
        """Raise unless the choice is lawful and the chosen have their weights."""
        weights, ids = call(case)
        self.check_choice(case, ids)
        self.check_weights(case, weights, ids)

    def judge_sum(self, call: Call, case: Case) -> None:
        """Raise unless the weights of a token have the right sum."""
        got, want = call(case)[0], self.expected(case)[0]
        total = want.value.sum(axis=1)
        bound = np.asarray(want.bound).sum(axis=1)
        for t, (have, right) in enumerate(
            zip(got.astype(np.float64).sum(axis=1), total, strict=True)
        ):
            if not abs(have - right) <= bound[t]:
                raise Finding(
                    f"the weights of token {t} must have the sum {right:.7g} within "
                    f"{bound[t]:.2g}, got {have:.7g}."
                )

    def judge_order(self, call: Call, case: Case) -> None:
        """Raise unless experts are listed by falling key."""
        ids = call(case)[1]
        self.check_choice(case, ids)
        key = self.key(case)
        mid, rad = (np.take_along_axis(a, ids, axis=1) for a in (key.mid, key.rad))
        rises = mid[:, :-1] + rad[:, :-1] < mid[:, 1:] - rad[:, 1:]
        for t in np.flatnonzero(rises.any(axis=1) & usable_rows(case.arguments["router_logits"])):
            raise Finding(f"ids of token {t} must stand by falling weight, got {ids[t]}.")

    def judge_ties(self, call: Call, case: Case) -> None:
        """Raise unless equal logits are chosen, and listed, from the lowest id on."""
        ids, x = call(case)[1], case.arguments["router_logits"]
        self.check_choice(case, ids)
        for t in np.flatnonzero(usable_rows(x)):
            for value in np.unique(x[t][np.isfinite(x[t])]):
                equal = np.flatnonzero(x[t] == value)
                listed = [int(e) for e in ids[t] if e in equal]
                if listed != equal[: len(listed)].tolist():
                    raise Finding(
                        f"of experts {equal} with equal logits token {t} must choose from the "
                        f"lowest id on, got {listed}."
                    )

    def judge_broken_ids(self, call: Call, case: Case) -> None:
        """Raise unless rows that are not finite have distinct experts in range."""
        _check_range(call(case)[1], case)

    def judge_broken_weights(self, call: Call, case: Case) -> None:
        """Raise unless rows that are not finite have finite weights."""
        weights, x = call(case)[0], case.arguments["router_logits"]
        for t in np.flatnonzero(~usable_rows(x)):
            if not np.isfinite(weights[t]).all():
                raise Finding(f"weights of token {t} must be finite, got {weights[t]}, for {x[t]}.")

    def judge_neighbours(self, call: Call, case: Case) -> None:
        """Raise unless rows keep their bits when another becomes NaN or infinite."""
        x = case.arguments["router_logits"]
        keep = usable_rows(x)
        clean = case.replace(router_logits=np.where(keep[:, None], x, x.dtype.type(0)))
        for index, (got, want) in enumerate(zip(call(case), call(clean), strict=True)):
            for t in np.flatnonzero(keep):
                if got[t].tobytes() != want[t].tobytes():
                    raise Finding(
                        f"output {index} of token {t} must not depend on the broken token, "
                        f"got {got[t]} for {want[t]}."
                    )

    # What judges share.

    def check_choice(self, case: Case, ids: HostArray) -> None:
        """Raise unless every chosen key may be as large as every other one, up to rounding."""
        _check_range(ids, case)
        x, key = case.arguments["router_logits"], self.key(case)
        chosen = np.zeros(x.shape, bool)
        np.put_along_axis(chosen, ids.astype(np.int64), True, axis=1)
        worst = np.where(chosen, key.mid + key.rad, np.inf)
        best = np.where(chosen, -np.inf, key.mid - key.rad)
        wrong = (worst.min(axis=1) < best.max(axis=1)) & usable_rows(x)
        for t in np.flatnonzero(wrong):
            taken, left = int(worst[t].argmin()), int(best[t].argmax())
            raise Finding(
                f"token {t} must choose the largest logits, got expert {taken} with {x[t, taken]} "
                f"instead of expert {left} with {x[t, left]}."
            )

    def check_weights(self, case: Case, weights: HostArray, ids: HostArray) -> None:
        """Raise unless the weights are those of the ids beside them."""
        x, want = case.arguments["router_logits"], self.weights(case, ids)
        free = np.broadcast_to(~usable_rows(x)[:, None], ids.shape)
        truth = Expected(value=want.mid, bound=want.rad, free=free)
        compare((weights, ids), (truth, Expected(value=ids)))


def usable_rows(x: HostArray) -> HostArray:
    """Return which rows have a finite largest logit (T,); a single -inf means "never"."""
    rows: HostArray = np.isfinite(x.max(axis=1))
    return rows


def _check_range(ids: HostArray, case: Case) -> None:
    experts = case.arguments["router_logits"].shape[1]
    for t, row in enumerate(ids):
        if row.min() < 0 or row.max() >= experts:
            raise Finding(f"ids of token {t} must lie in 0..{experts - 1}, got {row}.")
        if len(set(row.tolist())) < len(row):
            raise Finding(f"ids of token {t} must be distinct, got {row}.")
