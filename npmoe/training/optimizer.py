"""AdamW over one flat parameter vector, in cache-sized chunks, with clipping by global norm."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from npmoe._checks import Axes, check_float, check_same_dtype, require
from npmoe._typing import HostArray
from npmoe.errors import RangeError
from npmoe.tree import named_arrays

# 128K float32: the six arrays of a chunk fit a 4 MiB cache.
CHUNK_SIZE = 1 << 17
# Moments of a parameter without gradient decay into denormals, where x86 is ten times slower.
FLUSH_EVERY = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWConfig:
    """Say how AdamW moves the parameters; the learning rate is an argument of each step.

    Parameters
    ----------
    beta1, beta2 : float
        Decay rates of the first and second moment, in [0, 1).
    eps : float
        Added to the root of the second moment; positive.
    weight_decay : float
        Decoupled decay of matrices, not negative. Biases, norms and embeddings do not decay.
    grad_clip : float or None
        Largest global gradient norm; None turns clipping off.
    router_lr_factor : float
        Multiplies the learning rate of router weights and biases; not negative.
    frozen : tuple of str
        Patterns of `fnmatch` ("*.router_weight", "blocks.0.*"): parameters whose path matches one
        stay as they are, and their gradients do not count in the global norm.

    Raises
    ------
    RangeError
        If a value is outside its range.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    router_lr_factor: float = 1.0
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        require(
            isinstance(self.frozen, tuple | list) and all(isinstance(p, str) for p in self.frozen),
            f"AdamWConfig: frozen must be a tuple of patterns, got {self.frozen!r}.",
        )
        object.__setattr__(self, "frozen", tuple(self.frozen))  # a list in JSON
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"AdamWConfig: {name} must be in [0, 1), got {value!r}.")
        for name in ("eps", "grad_clip"):
            value = getattr(self, name)
            require(
                value is None or (0 < value < math.inf),
                f"AdamWConfig: {name} must be positive and finite, got {value!r}."
                + (" None turns clipping off." if name == "grad_clip" else ""),
            )
        for name in ("weight_decay", "router_lr_factor"):
            value = getattr(self, name)
            require(
                0 <= value < math.inf,
                f"AdamWConfig: {name} must be finite and not negative, got {value!r}.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterGroup:
    """A slice ``start:stop`` of the flat vector that shares one set of options."""

    name: str
    start: int
    stop: int
    lr_factor: float
    weight_decay: float
    frozen: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWState:
    """What a resumed run needs: both moments (N,) and the number of steps made."""

    m: HostArray
    v: HostArray
    t: int


def make_groups(params: Any, config: AdamWConfig) -> tuple[ParameterGroup, ...]:
    """Return one group for each leaf of a parameter tree, in the order of `flatten`.

    Routers (leaves ending in router_weight or router_bias) get ``config.router_lr_factor``.
    Weight decay goes to matrices only: leaves with at least two axes whose name does not end in
    "bias" (an expert bias is (E, I)) and has no "embedding" in its path. A row of an embedding is
    touched by its own token alone; decaying it at every step would shrink rare tokens to nothing.
    A selection bias is frozen: it has no gradient, and balancing moves it.

    Parameters
    ----------
    params : tree of arrays
        As in `npmoe.tree`.
    config : AdamWConfig
        Weight decay, router factor and what is frozen.

    Returns
    -------
    tuple of ParameterGroup
        Adjacent, from 0 to the number of parameters. AdamW merges neighbours with equal options.

    Raises
    ------
    RangeError
        If a pattern in ``config.frozen`` matches no parameter.
    """
    leaves = list(named_arrays(params))
    for pattern in config.frozen:
        require(
            any(fnmatchcase(name, pattern) for name, _ in leaves),
            f"make_groups: frozen must match parameters, got {pattern!r}, which matches none. "
            f"The first of {len(leaves)} is {leaves[0][0]!r}.",
        )
    groups = []
    start = 0
    for name, leaf in leaves:
        is_router = name.endswith(("router_weight", "router_bias"))
        decays = leaf.ndim >= 2 and not name.endswith("bias") and "embedding" not in name
        groups.append(
            ParameterGroup(
                name=name,
                start=start,
                stop=start + leaf.size,
                lr_factor=config.router_lr_factor if is_router else 1.0,
                weight_decay=config.weight_decay if decays else 0.0,
                frozen=name.endswith("selection_bias")
                or any(fnmatchcase(name, pattern) for pattern in config.frozen),
            )
        )
        start += leaf.size
    return tuple(groups)


class AdamW:
    """Update a flat parameter vector in place.

    ``m = beta1 m + (1 - beta1) g``, ``v = beta2 v + (1 - beta2) g**2``,
    ``p = (1 - lr decay) p - lr m_hat / (sqrt(v_hat) + eps)`` with ``m_hat = m / (1 - beta1**t)``,
    ``v_hat = v / (1 - beta2**t)``, and g the gradient times ``min(1, grad_clip / norm)``.

    Parameters
    ----------
    flat_params : (N,) float array
        Updated in place; not copied.
    groups : tuple of ParameterGroup
        Adjacent slices that cover the vector, from `make_groups`.
    config : AdamWConfig
        Betas, eps and clipping.

    Raises
    ------
    RangeError
        If the groups do not cover the vector, or eps vanishes in its dtype.

    Notes
    -----
    Cost: 13 elementwise operations; reads 4 N and writes 3 N numbers. Memory 2 N, and
    scratch of three chunks.
    Accuracy: the norm is summed in float64; the update runs in the dtype of the parameters.
    Denormal moments become zero every 16th step, which moves no parameter by more than
    1e-37 learning rates / eps.
    Order: chunk boundaries and the order of the partial sums are fixed: bitwise reproducible.

    References
    ----------
    Loshchilov & Hutter, "Decoupled weight decay regularization", ICLR 2019, algorithm 2.
    """

    def __init__(
        self,
        flat_params: HostArray,
        groups: tuple[ParameterGroup, ...],
        config: AdamWConfig,
    ) -> None:
        check_float("AdamW", "flat_params", flat_params)
        Axes("AdamW").check("flat_params", flat_params, "N")
        _check_cover(groups, flat_params.size)
        tiny = float(np.finfo(flat_params.dtype).tiny)
        least = tiny / math.sqrt(1 - config.beta2)
        require(
            config.eps >= least,
            f"AdamW: eps must be at least {least:.2g} for {flat_params.dtype}, got {config.eps}. "
            "A smaller one would vanish and divide 0 by 0.",
        )
        self.params = flat_params
        self.groups = groups
        self.config = config
        self.m = np.zeros_like(flat_params)
        self.v = np.zeros_like(flat_params)
        self.t = 0
        self._chunks = _chunks(_merge(groups))
        size = max((chunk.stop - chunk.start for chunk in self._chunks), default=0)
        self._scratch = np.empty((2, size), flat_params.dtype)
        self._wide = np.empty(size, np.float64)

    def step(self, flat_grads: HostArray, learning_rate: float) -> float:
        """Update the parameters and both moments once; return the norm before clipping.

        Parameters
        ----------
        flat_grads : (N,) float array
            The gradient, of the parameters' dtype; unchanged.
        learning_rate : float
            Before the groups' factors.

        Returns
        -------
        float
            The global norm of the gradient.

        Raises
        ------
        RangeError
            If the norm is not finite, or its square does not fit the dtype; nothing is changed.
        """
        axes = Axes("AdamW.step")
        axes.bind(f"flat_params {self.params.shape}", N=self.params.size)
        axes.check("flat_grads", flat_grads, "N")
        check_same_dtype(
            "AdamW.step", "flat_grads", flat_grads, self.params.dtype, "the flat_params of AdamW"
        )
        require(
            0 <= learning_rate < math.inf,
            "AdamW.step: learning_rate must be finite and not negative, "
            f"got {float(learning_rate)!r}.",
        )
        norm = self._norm(flat_grads)
        self._check_norm(flat_grads, norm)
        clip = self.config.grad_clip
        scale = clip / norm if clip is not None and norm > clip else 1.0
        self.t += 1
        self._update(flat_grads, float(learning_rate), scale)
        return norm

    def state(self) -> AdamWState:
        """Return the moments (views, not copies: save them before the next step) and t."""
        return AdamWState(m=self.m, v=self.v, t=self.t)

    def load_state(self, state: AdamWState) -> None:
        """Copy a saved state into this optimizer.

        Raises
        ------
        ShapeError, DTypeError, RangeError
            If it belongs to another model; nothing is changed.
        """
        axes = Axes("AdamW.load_state")
        axes.bind(f"flat_params {self.params.shape}", N=self.params.size)
        for name, array in (("m", state.m), ("v", state.v)):
            axes.check(name, array, "N")
            check_same_dtype(
                "AdamW.load_state", name, array, self.params.dtype, "the flat_params of AdamW"
            )
        require(state.t >= 0, f"AdamW.load_state: t must not be negative, got {state.t}.")
        self.m[...] = state.m
        self.v[...] = state.v
        self.t = int(state.t)

    def _norm(self, grads: HostArray) -> float:
        total = 0.0
        # A plain sum: infinities of both signs and NaN must pass through.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for chunk in self._chunks:
                wide = self._wide[: chunk.stop - chunk.start]
                wide[...] = grads[chunk.start : chunk.stop]
                np.multiply(wide, wide, out=wide)
                total += float(np.add.reduce(wide))
        return math.sqrt(total)

    def _check_norm(self, grads: HostArray, norm: float) -> None:
        limit = math.sqrt(float(np.finfo(grads.dtype).max))
        if norm <= limit:
            return
        at = f"at step {self.t + 1}. Nothing was updated. Lower the learning rate, or look there."
        trained = [group for group in self.groups if not group.frozen]
        for group in trained:
            if not np.isfinite(grads[group.start : group.stop]).all():
                raise RangeError(
                    f"AdamW.step: the gradient norm must be finite, got {norm}. "
                    f"First non-finite parameter: {group.name} {at}"
                )
        largest = max(
            (g for g in trained if g.stop > g.start),
            key=lambda g: float(np.abs(grads[g.start : g.stop]).max()),
        )
        raise RangeError(
            f"AdamW.step: the gradient norm must be at most {limit:.2g}, so that its square fits "
            f"{grads.dtype}, got {norm:.2g}. Largest gradient: {largest.name} {at}"
        )

    def _update(self, grads: HostArray, learning_rate: float, scale: float) -> None:
        config = self.config
        root2 = math.sqrt(1 - config.beta2**self.t)
        to_m = scale * (1 - config.beta1)
        to_root_v = scale * math.sqrt(1 - config.beta2)
        eps = config.eps * root2
        flush = self.t % FLUSH_EVERY == 0

        # Overflow was checked in the norm.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for chunk in self._chunks:
                part = slice(chunk.start, chunk.stop)
                p, g, m, v = self.params[part], grads[part], self.m[part], self.v[part]
                a, b = self._scratch[:, : chunk.stop - chunk.start]
                np.multiply(g, to_m, out=a)
                np.multiply(m, config.beta1, out=m)
                np.add(m, a, out=m)
                np.multiply(g, to_root_v, out=b)
                np.multiply(b, b, out=b)
                np.multiply(v, config.beta2, out=v)
                np.add(v, b, out=v)
                if flush:
                    _flush_denormals(m, a)
                    _flush_denormals(v, a)
                np.sqrt(v, out=b)
                np.add(b, eps, out=b)
                np.divide(m, b, out=b)
                rate = learning_rate * chunk.lr_factor
                np.multiply(b, rate * root2 / (1 - config.beta1**self.t), out=b)
                if chunk.weight_decay:
                    np.multiply(p, 1 - rate * chunk.weight_decay, out=p)
                np.subtract(p, b, out=p)


def _flush_denormals(x: HostArray, scratch: HostArray) -> None:
    np.abs(x, out=scratch)
    np.copyto(x, 0, where=scratch < np.finfo(x.dtype).tiny)


def _check_cover(groups: tuple[ParameterGroup, ...], size: int) -> None:
    end = 0
    for group in groups:
        require(
            group.start == end and group.stop >= end,
            f"AdamW: groups must be adjacent, got {group.name} = {group.start}:{group.stop} "
            f"after {end}. Make them with make_groups.",
        )
        end = group.stop
    require(
        end == size,
        f"AdamW: groups must cover flat_params ({size},), got an end at {end}. "
        "Make them with make_groups from the same tree.",
    )


def _merge(groups: tuple[ParameterGroup, ...]) -> list[ParameterGroup]:
    """Join neighbours with equal options, so that small leaves do not cost a chunk each."""
    merged: list[ParameterGroup] = []
    for group in groups:
        last = merged[-1] if merged else None
        if last is not None and _options(last) == _options(group):
            merged[-1] = replace(last, stop=group.stop)
        else:
            merged.append(group)
    return merged


def _options(group: ParameterGroup) -> tuple[float, float, bool]:
    return group.lr_factor, group.weight_decay, group.frozen


def _chunks(groups: list[ParameterGroup]) -> list[ParameterGroup]:
    return [
        replace(group, start=start, stop=min(start + CHUNK_SIZE, group.stop))
        for group in groups
        if not group.frozen
        for start in range(group.start, group.stop, CHUNK_SIZE)
    ]
