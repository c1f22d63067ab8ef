"""A backend as one function, so that the kit can call it and a script can repeat the call."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from npmoe._typing import Array, HostArray
from npmoe.backends import Backend, FusedExperts, ReferenceBackend, get_backend
from npmoe.config import MoEConfig
from npmoe.errors import BackendUnavailableError
from npmoe.experts import compose_backward, compose_forward
from npmoe.layer import moe_backward, moe_forward
from npmoe.layer_gradcheck import gradcheck_layers
from npmoe.params import MoEGrads, MoEParams
from npmoe.saved import SavedTensors
from npmoe.testing.conformance.backend_cases import (
    run_route,
    run_soft_route,
)
from npmoe.testing.conformance.recipes import (
    GRADS,
    make_recipe,
    problem_of,
)
from npmoe.testing.conformance.targets import load_target
from npmoe.testing.conformance.verb_truths import Arrays, plan_of
from npmoe.testing.conformance.verbs import VERBS
from npmoe.testing.problems import MoEProblem
from npmoe.tree import map_arrays

_FUSED = ("experts_forward", "experts_backward")


class _Composed:
    """A backend without its fused pair."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        if name in _FUSED:
            raise AttributeError(name)
        return getattr(self._backend, name)


class BackendProbe:
    """``probe(verb, recipe, *arrays)``: NumPy arrays in and out, the backend's between.

    A verb of the contract takes the JSON of a MoEConfig and arrays; a run of the layer takes the
    JSON of the keywords of `npmoe.testing.problems.make_problem`.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __call__(self, verb: str, recipe: str, *arrays: HostArray) -> tuple[HostArray, ...]:
        """Run one verb, or the layer."""
        if verb in LAYER_RUNS:
            return LAYER_RUNS[verb](self, recipe)
        cfg = MoEConfig.from_dict(json.loads(recipe))
        moved = tuple(self.backend.asarray(a) for a in arrays)
        outputs = _runs()[verb](self.backend, cfg, *moved)
        found = tuple(self.host(o) for o in outputs)
        for i, (before, now) in enumerate(zip(arrays, moved, strict=True)):
            if self.host(now).tobytes() != np.asarray(before).tobytes():
                raise AssertionError(f"{verb} wrote to its argument {i}")
        return found

    def host(self, array: Array) -> HostArray:
        """Return an array of the backend on the host."""
        return np.array(self.backend.asnumpy(array))

    def forward(
        self, problem: MoEProblem, run: Any = None, *, save: bool = True
    ) -> tuple[Array, SavedTensors | None, MoEParams]:
        """Run the layer forward on the backend."""
        run = self.backend if run is None else run
        params = map_arrays(lambda _, a: run.asarray(a), problem.params)
        move = self._move
        output, saved = moe_forward(
            move(problem.fold(problem.hidden_states)),
            params,
            problem.cfg,
            backend=run,
            rng=problem.generator(),
            token_mask=move(problem.fold(problem.token_mask)),
            topk_ids=move(problem.fold(problem.topk_ids)),
            save=save,
        )
        return output, saved, params

    def gradients(self, problem: MoEProblem, run: Any = None, **into: Any) -> MoEGrads:
        """Run the layer forward and backward on the backend."""
        _, saved, params = self.forward(problem, run)
        return moe_backward(
            self._move(problem.fold(problem.grad_output)),
            saved,
            params,
            grad_router_logits=self._move(problem.grad_router_logits),
            **into,
        )

    def _move(self, array: HostArray | None) -> Array:
        return None if array is None else self.backend.asarray(array)


def probe(name: str, cls: str | None = None) -> BackendProbe:
    """Return the probe of a backend by its name, or of a class of the module `name`."""
    return BackendProbe(get_backend(name) if cls is None else load_target(f"{name}:{cls}")())


@functools.cache
def _runs() -> dict[str, Callable[..., Arrays]]:
    """Return how to run every verb."""
    runs: dict[str, Callable[..., Arrays]] = {name: verb.run for name, verb in VERBS.items()}
    return runs | {
        "route": run_route,
        "renormalize_kept": run_route,
        "soft_route": run_soft_route,
        "experts-composed": functools.partial(_run_experts, fused=False),
        "experts-fused": functools.partial(_run_experts, fused=True),
    }


def _run_experts(
    b: Any,
    cfg: MoEConfig,
    grad: Array,
    x: Array,
    w1: Array,
    w2: Array,
    weights: Array,
    ids: Array,
    *,
    fused: bool,
) -> Arrays:
    params = MoEParams(router_weight=w1, gate_up_proj=w1, down_proj=w2)
    plan = plan_of(b, cfg, ids)
    if fused:
        forward, backward = b.experts_forward, b.experts_backward
    else:
        forward = functools.partial(compose_forward, b)
        backward = functools.partial(compose_backward, b)
    output, gate_up = forward(x, params, plan, weights, cfg)
    grads = backward(grad, x, gate_up, params, plan, weights, cfg)
    return (
        output,
        grads.hidden_states,
        grads.gate_up_proj,
        grads.down_proj,
        grads.topk_weights,
    )


def _run_forward(
    self: BackendProbe, recipe: str, *, composed: bool = False, save: bool = True
) -> tuple[HostArray, ...]:
    problem = problem_of(recipe)
    run = _Composed(self.backend) if composed else self.backend
    with _unchanged(problem):
        output, saved, _ = self.forward(problem, run, save=save)
    rows = self.host(output).reshape(problem.hidden_states.shape)
    if not save:
        if saved is not None:
            raise AssertionError("save=False must return None for the saved tensors")
        return (rows,)
    if problem.cfg.routing == "soft" or saved is None:
        return (rows,)
    return rows, self.host(saved.routing.topk_ids)


def _run_backward(
    self: BackendProbe, recipe: str, *, composed: bool = False
) -> tuple[HostArray, ...]:
    problem = problem_of(recipe)
    run = _Composed(self.backend) if composed else self.backend
    with _unchanged(problem):
        grads = self.gradients(problem, run)
    return _listed(self, problem, grads, grads)


def _run_into(self: BackendProbe, recipe: str, *, accumulate: bool) -> tuple[HostArray, ...]:
    """Return what stands in the caller's arrays after the call."""
    problem = problem_of(recipe)

    def fill(name: str, array: HostArray) -> Array:
        start = np.full_like(array, np.nan, problem.dtype)
        if accumulate:
            start = previous_gradient(name, array.shape, problem.dtype)
        return self.backend.asarray(start)

    out = map_arrays(fill, problem.params)
    grads = self.gradients(problem, out=out, accumulate=accumulate)
    return _listed(self, problem, out, grads)


def previous_gradient(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> HostArray:
    """Return what a gradient is added to."""
    rng = np.random.default_rng(len(name))
    return np.asarray(rng.standard_normal(shape), dtype)


def _listed(
    self: BackendProbe, problem: MoEProblem, params: Any, grads: MoEGrads
) -> tuple[HostArray, ...]:
    """Return the gradients that exist, that of the input first taken from `grads`."""
    found = []
    for name in GRADS:
        value = getattr(grads if name == "hidden_states" else params, name)
        if name == "selection_bias" or value is None:
            continue
        array = self.host(value)
        found.append(
            array.reshape(problem.hidden_states.shape) if name == "hidden_states" else array
        )
    return tuple(found)


def _run_residence(self: BackendProbe, recipe: str) -> tuple[HostArray, ...]:
    """Raise unless everything the layer returns is the backend's, without a trip to the host."""
    problem, b = problem_of(recipe), self.backend
    kind = type(b.asarray(np.zeros(2, problem.dtype)))
    if b.host_arrays != (kind is np.ndarray):
        raise AssertionError(f"host_arrays is {b.host_arrays}, but arrays are {kind.__name__}")
    with _no_transfers(b, kind):
        output, saved, _ = self.forward(problem)
        grads = self.gradients(problem)
    if saved is None:
        raise AssertionError("save=True must return the saved tensors")
    named = {f"grad {n}": getattr(grads, n) for n in GRADS} | {
        "output": output,
        "gate_up": saved.gate_up,
        "topk_ids": saved.routing.topk_ids,
        "expert_offsets": saved.plan.expert_offsets,
    }
    for name, value in named.items():
        if value is not None and type(value) is not kind:
            raise AssertionError(f"{name} must be {kind.__name__}, got {type(value).__name__}")
    return (np.zeros(()),)


@contextlib.contextmanager
def _no_transfers(backend: Any, kind: type) -> Iterator[None]:
    """Refuse asnumpy and, where Python lets us, silent conversion of the backend's arrays."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an array went to the host during the layer")

    with contextlib.ExitStack() as stack:
        if not backend.host_arrays:
            stack.enter_context(mock.patch.object(backend, "asnumpy", refuse))
            if hasattr(kind, "__array__"):
                with contextlib.suppress(TypeError):  # types written in C cannot be patched
                    stack.enter_context(mock.patch.object(kind, "__array__", refuse))
        yield


def _run_accelerates(self: BackendProbe, recipe: str) -> tuple[HostArray, ...]:
    """Raise unless every verb in `accelerates` is the backend's own, and is called."""
    del recipe
    b, called = self.backend, set()
    for name in sorted(b.accelerates):
        own = getattr(type(b), name, None)
        if own is None or own is getattr(ReferenceBackend, name, None):
            raise AssertionError(f"accelerates names {name}, which is not its own")

    def counted(name: str) -> Any:
        inner = getattr(b, name)

        def run(*args: Any, **kwargs: Any) -> Any:
            called.add(name)
            return inner(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        for name in b.accelerates:
            stack.enter_context(mock.patch.object(b, name, counted(name)))
        for cfg in gradcheck_layers().values():
            problem = problem_of(make_recipe(cfg, num_tokens=4, generator=True, mask="some"))
            self.gradients(problem)
            self.gradients(problem, _Composed(b))
    if set(b.accelerates) != called:
        missing = ", ".join(sorted(set(b.accelerates) - called))
        raise AssertionError(f"accelerates names {missing}, which the layer never called")
    return (np.zeros(()),)


@contextlib.contextmanager
def _unchanged(problem: MoEProblem) -> Iterator[None]:
    """Raise if an input of the layer was written to."""
    arrays = {
        n: getattr(tree, n)
        for tree in (problem, problem.params)
        for n in type(tree).__dataclass_fields__
        if isinstance(getattr(tree, n), np.ndarray)
    }
    before = {n: a.tobytes() for n, a in arrays.items()}
    yield
    for name, array in arrays.items():
        if array.tobytes() != before[name]:
            raise AssertionError(f"{name} must come back unchanged, it was written to")


LAYER_RUNS: dict[str, Callable[[BackendProbe, str], tuple[HostArray, ...]]] = {
    "forward": _run_forward,
    "forward-unsaved": functools.partial(_run_forward, save=False),
    "forward-composed": functools.partial(_run_forward, composed=True),
    "backward": _run_backward,
    "backward-composed": functools.partial(_run_backward, composed=True),
    "backward-out": functools.partial(_run_into, accumulate=False),
    "backward-accumulate": functools.partial(_run_into, accumulate=True),
    "residence": _run_residence,
    "accelerates": _run_accelerates,
}


def is_fused(backend: Any) -> bool:
    """Return whether the layer calls the backend's fused pair."""
    return isinstance(backend, FusedExperts)


def resolve(backend: Any) -> tuple[Backend, tuple[str, ...]]:
    """Return the backend of a name, class or instance, and the arguments of `probe` for it."""
    if isinstance(backend, str):
        return get_backend(backend), (backend,)
    instance = backend() if isinstance(backend, type) else backend
    if not isinstance(instance, Backend):
        missing = [n for n in dir(Backend) if not n.startswith("_") and not hasattr(instance, n)]
        raise BackendUnavailableError(
            f"check_backend: backend must be a name or have every verb, got "
            f"{type(instance).__name__} without {', '.join(missing)}."
        )
    cls = type(instance)
    return instance, (cls.__module__, cls.__qualname__)
