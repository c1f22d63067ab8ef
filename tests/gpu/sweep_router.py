"""Cases of `accel/kernels/router.cu`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from device_sweep import Case, exactly, judge, put

from accel.device.emulated import EmulatedDevice
from accel.device.router import route_rows
from npmoe.config import MoEConfig
from npmoe.testing.balls import Ball
from npmoe.testing.router_bounds import chosen_scores
from npmoe.testing.score_bounds import normalize, score

NAN, INF = np.nan, np.inf
VANISHED = 2000.0  # exp of its negative is 0 in every dtype


@dataclass(frozen=True)
class Route:
    """One launch. Logits are multiples of a quarter, so that keys are equal or far apart."""

    tokens: int
    experts: int
    top_k: int
    options: tuple[tuple[str, Any], ...] = ()
    real: str = "float32"
    spread: int = 12  # logits lie in -spread .. spread quarters
    bias: bool = False
    mask: bool = False
    broken: tuple[float, ...] = ()  # a row for each: it holds that once
    in_turn: bool = False  # row t in column t
    never: int = 0  # this many logits of every row are -inf
    nan_bias: bool = False
    spared: bool = False  # but not of expert 0
    lower: float = (
        0.0  # all logits are lower by this; by `VANISHED`, scores other than softmax's are 0
    )
    forbidden: bool = False  # expert 0 is never, and the bias forbids all others
    seed: int = 0

    @property
    def cfg(self) -> MoEConfig:
        return MoEConfig(
            hidden_size=4, intermediate_size=4, num_experts=self.experts, top_k=self.top_k,
            selection_bias=self.bias, **dict(self.options),
        )  # fmt: skip

    def _draw(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        rng = np.random.default_rng([self.seed, self.tokens, self.experts, self.top_k])
        shape = self.tokens, self.experts
        logits = rng.integers(-self.spread, self.spread + 1, shape) / 4.0
        logits -= self.lower
        for row in logits:
            row[rng.permutation(self.experts)[: self.never]] = -INF
        for t, value in enumerate(self.broken):
            if value == -INF:
                logits[t] = value
            else:
                logits[t, t if self.in_turn else rng.integers(self.experts)] = value
        # The bias keeps keys apart too: of scores, it must outweigh them.
        bias = rng.integers(-3, 4, self.experts) * 2.0
        if self.nan_bias:
            bias[int(self.spared) :] = NAN
        if self.forbidden:
            logits[:, 0], bias[1:] = -INF, -INF
        mask = rng.random(self.tokens) < 0.6
        return (
            logits.astype(self.real),
            bias.astype(self.real) if self.bias else None,
            mask if self.mask else None,
        )

    def run(self, device: EmulatedDevice) -> None:
        """Route, and compare ids exactly, probs and weights within their bounds."""
        cfg, (logits, bias, mask) = self.cfg, self._draw()
        flag = device.zeros(2, np.int32)
        got = route_rows(device, put(logits), cfg, put(bias), put(mask), flag[1:])
        with np.errstate(invalid="ignore"):
            top = logits.max(1)
        usable = np.isfinite(top)
        shown = np.ones(self.tokens, bool) if mask is None else mask
        good, lost = usable & shown, ~usable & shown
        ids = np.full((self.tokens, self.top_k), -1)
        if cfg.nan_policy == "clamp":
            ids[lost] = np.arange(self.top_k)
        clean = exactly(np.where(good[:, None], logits, 0.0), self.real)
        probs = score(clean, cfg.score_fn)
        by_logits = cfg.router_order == "topk_score" or cfg.selection_bias_on == "logits"
        vanished = self.lower >= VANISHED
        key = clean.mid if by_logits or (bias is None and not vanished) else probs.mid
        if bias is not None and not self.nan_bias:
            key = key + bias
        # Equal logits have equal scores on both sides; the sort is stable.
        order = np.argsort(-key, axis=1, kind="stable")[:, : self.top_k]
        if not self.nan_bias:
            ids[good] = order[good]
        elif self.spared:
            ids[good, 0] = 0
        raw = chosen_scores(clean, probs, ids * good[:, None] - ~good[:, None], cfg)
        weights = raw  # where all are 0, they stay
        if not vanished:
            weights = normalize(raw, np.ones(raw.mid.shape, bool), cfg).weights
        weights = weights * Ball.drawn(np.full((1, 1), cfg.routed_scaling_factor), raw.model)
        assert np.array_equal(got["topk_ids"]._host, ids), str(self)
        judge(got["probs"], probs.where(good[:, None]), f"{self} probs")
        judge(got["topk_weights"], weights.where(good[:, None] & (ids >= 0)), f"{self} weights")
        noted = (cfg.nan_policy == "raise" and lost.any()) or (self.nan_bias and good.any())
        assert flag._host.tolist() == [0, int(noted)], (str(self), "flag")
        seen = got["token_mask"]
        if cfg.nan_policy == "drop":
            assert np.array_equal(seen._host, good), (str(self), "token_mask")

    def __str__(self) -> str:
        options = " ".join(f"{k}={v}" for k, v in self.options)
        return f"route T{self.tokens} E{self.experts} K{self.top_k} {self.real} {options}"

    @property
    def case(self) -> Case:
        return Case(str(self), self.run)


def _of(**options: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(options.items())


def sharp_routes(real: str = "float32") -> Iterator[Case]:
    """Yield a few cases that together reach every line."""
    broken = (NAN, INF, -INF)
    top, sig = {"router_order": "topk_score"}, {"score_fn": "sigmoid"}
    root = {"score_fn": "sqrtsoftplus"}
    raises, clamps = {"nan_policy": "raise"}, {"nan_policy": "clamp"}
    sums, on_logits = {"renormalize": True}, {"selection_bias_on": "logits"}
    for one in (
        Route(5, 7, 2),
        Route(9, 33, 5, _of(**sums)),
        Route(6, 70, 3, _of(nan_policy="drop", **sig), mask=True, broken=broken),
        Route(7, 32, 4, _of(**clamps), broken=broken, mask=True, seed=1),
        Route(4, 40, 35, _of(**clamps), broken=broken),
        Route(6, 9, 2, _of(**raises), broken=broken),
        Route(8, 5, 2, _of(**raises), broken=(NAN,) * 5),
        Route(5, 10, 4, _of(renorm_eps=1e-6, routed_scaling_factor=2.5, **sums, **sig), bias=True),
        Route(5, 10, 4, _of(renorm_eps=0.75, renorm_eps_mode="max", **sums, **sig)),
        Route(5, 10, 3, _of(**top)),
        Route(5, 10, 3, _of(routed_scaling_factor=0.5, **top), never=8),
        Route(4, 12, 3, _of(**top, **sig)),
        Route(4, 12, 3, _of(**root), spread=400, seed=2),
        Route(4, 12, 3, _of(**top, **sig), spread=400, seed=2),
        Route(4, 12, 3, _of(**sums, **root), spread=9),
        Route(4, 12, 3, spread=400, seed=2),
        Route(4, 12, 1, spread=3600, seed=2),
        Route(4, 60, 1, spread=1500, seed=2),
        Route(4, 12, 3, _of(**sums, **top, **sig), spread=3000),
        Route(4, 12, 3, _of(**sums, **root), spread=6400, seed=3),
        Route(4, 99, 3, _of(**root), spread=3000, seed=3),
        Route(4, 99, 3, _of(**root), spread=6000, seed=3),
        Route(4, 6, 2, _of(renorm_single=True, **sums), never=5),
        Route(5, 8, 2, _of(**on_logits), bias=True),
        Route(5, 8, 2, _of(**sig), bias=True, nan_bias=True),
        Route(4, 8, 1, _of(renorm_single=False, **sums)),
        Route(4, 8, 8, _of(**sums), spread=1),
        Route(1, 1, 1),
        Route(2, 131, 3, spread=2),
        Route(3, 70, 2, _of(**top, **on_logits), bias=True, nan_bias=True),
        Route(3, 70, 2, _of(**top, **on_logits), bias=True),
        Route(3, 70, 4, _of(**sig, **on_logits), bias=True),
        Route(3, 70, 4, _of(**sig), bias=True),
        Route(3, 70, 4, _of(**top)),
        Route(3, 5, 1, _of(**top, **on_logits), bias=True, forbidden=True),
        Route(2, 300, 3, _of(**root)),
        Route(4, 66, 2, spread=0),
        Route(3, 64, 33, _of(**top)),
        Route(5, 5, 3, _of(**top), lower=50.0),
        Route(3, 64, 60, _of(**top), spread=1500),
        # Every column alone decides, and every expert is chosen at last.
        Route(70, 70, 1, _of(nan_policy="drop"), broken=(NAN,) * 70, in_turn=True),
        Route(70, 70, 1, _of(nan_policy="drop"), broken=(INF,) * 70, in_turn=True),
        Route(2, 70, 70, bias=True, spread=4),
        Route(2, 70, 70, _of(**sig), bias=True, spread=4),
        Route(2, 70, 70, _of(**sig, **on_logits), bias=True, spread=4),
        Route(2, 70, 70, _of(**top, **on_logits), bias=True, spread=4),
        Route(2, 70, 70, _of(**top), spread=4),
        # Nothing is left to divide by.
        Route(3, 5, 2, _of(**sums, **sig), lower=VANISHED),
    ):
        yield Route(**(vars(one) | {"real": real})).case


def all_routes(real: str = "float32") -> Iterator[Case]:
    """Yield the sharp ones, and experts around every multiple of a warp."""
    yield from sharp_routes(real)
    # Beyond logits of 10 sigmoids of float32 meet, and order is no longer that of logits.
    for k in range(64):
        fn = ("softmax", "sigmoid", "sqrtsoftplus")[k % 3]
        yield Route(
            1 + k % 9, k + 1 + 32 * (k % 4), 1 + k % min(k + 1, 9), _of(score_fn=fn,
            nan_policy=("raise", "clamp", "drop")[k % 3 - 1], renormalize=k % 2 == 0 and k % 9 > 0),
            real, (12, 40, 1)[k // 3 % 3], mask=k % 4 == 0,
            broken=(NAN, -INF, INF)[: min(k % 4, 1 + k % 9)], seed=k,
        ).case  # fmt: skip
    yield Route(2, 1024, 8, real=real).case
