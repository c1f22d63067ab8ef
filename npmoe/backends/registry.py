"""Backends by name: a literal table for ours, an entry-point group for everybody else's."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from npmoe._version import __version__
from npmoe.backends.protocol import Availability, Backend
from npmoe.errors import BackendUnavailableError, NpmoeError, RangeError

ENTRY_POINT_GROUP = "npmoe.backends"
ENVIRONMENT_VARIABLE = "NPMOE_BACKEND"

# A literal table, so that these names work from a bare clone.
_FIRST_PARTY = {
    "reference": "npmoe.backends.reference:ReferenceBackend",
    "numpy": "npmoe.backends.numpy_backend:NumpyBackend",
    "numba": "accel.numba_cpu:NumbaBackend",
    "cupy": "accel.cupy_raw:CupyBackend",
    "numba_cuda": "accel.numba_cuda:NumbaCudaBackend",
    "loopback": "accel.loopback:LoopbackBackend",
}

_current: ContextVar[Backend | None] = ContextVar("npmoe_backend", default=None)
_instances: dict[str, Backend] = {}


def get_backend(backend: str | Backend | None = None, **options: Any) -> Backend:
    """Return a backend.

    Parameters
    ----------
    backend : str, Backend or None
        A name, an instance (returned as it is), or None: the innermost `use_backend`, then the
        environment variable NPMOE_BACKEND, then "numpy".
    **options
        Keywords of the backend's constructor; a new instance is made if there are any.

    Returns
    -------
    Backend
        The same instance for the same name without options.

    Raises
    ------
    RangeError
        For an unknown name, or options with an instance.
    BackendUnavailableError
        If it cannot run here; there is no fallback.

    Examples
    --------
    >>> get_backend("numpy").name
    'numpy'
    """
    if backend is None:
        backend = _current.get() or os.environ.get(ENVIRONMENT_VARIABLE) or "numpy"
    if not isinstance(backend, str):
        if options:
            raise RangeError(
                f"get_backend: options must be empty with an instance, got {sorted(options)}. "
                "Give them to its constructor."
            )
        return backend
    if not options and backend in _instances:
        return _instances[backend]
    try:
        cls = _load(backend)
        availability = cls.availability()
    except BackendUnavailableError:
        raise
    except ImportError as error:  # a backend's own requirement, in its own words
        availability = Availability(False, str(error))
    if not availability.ok:
        usable = ", ".join(n for n, a in available_backends().items() if a.ok)
        raise BackendUnavailableError(
            f"get_backend: backend {backend!r} cannot run here: {availability.reason}. "
            f"Usable now: {usable}."
        )
    instance: Backend = cls(**options)
    if not options:
        _instances[backend] = instance
    return instance


def backend_options(name: str) -> tuple[str, ...]:
    """Return the keywords of a backend's constructor."""
    return tuple(inspect.signature(_load(name)).parameters)


def get_emulated_backend(name: str, **options: Any) -> Backend:
    """Return a GPU backend whose compiled kernels are executed on the CPU, under all checkers.

    Parameters
    ----------
    name : str
        A backend with an ``emulated`` class of its own: "cupy".
    **options
        ``schedule``, and the backend's own keywords.

    Returns
    -------
    Backend
        A new instance; ``emulator`` holds its launches, findings and coverage.

    Raises
    ------
    RangeError
        For an unknown name, or a backend that runs on the CPU anyway.
    BackendUnavailableError
        Without NVRTC or a C++ compiler.
    """
    cls = _load(name)
    if not hasattr(cls, "emulated"):
        raise RangeError(
            f"get_emulated_backend: name must be that of a GPU backend, got {name!r}. It runs "
            "here as it is."
        )
    emulated = cls.emulated()
    availability = emulated.availability()
    if not availability.ok:
        raise BackendUnavailableError(
            f"get_emulated_backend: {name!r} cannot be emulated here: {availability.reason}"
        )
    instance: Backend = emulated(**options)
    return instance


@contextlib.contextmanager
def use_backend(backend: str | Backend, **options: Any) -> Iterator[Backend]:
    """Make `backend` the default inside a ``with`` block, for this thread or task.

    Parameters
    ----------
    backend, **options
        As for `get_backend`, which also says what is raised.

    Yields
    ------
    Backend
    """
    instance = get_backend(backend, **options)
    token = _current.set(instance)
    try:
        yield instance
    finally:
        _current.reset(token)


def available_backends() -> dict[str, Availability]:
    """Return every known name with whether it can run here, in alphabetical order."""
    return {name: _availability(name) for name in sorted(_targets())}


def _availability(name: str) -> Availability:
    try:
        availability: Availability = _load(name).availability()
    except (ImportError, NpmoeError) as error:
        return Availability(False, str(error))
    return availability


def _targets() -> dict[str, str]:
    """Return name -> "module:Class" of ours and of installed third parties."""
    from importlib.metadata import entry_points  # noqa: PLC0415  # slow to import

    targets = dict(_FIRST_PARTY)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if targets.get(point.name, point.value) != point.value:
            raise RangeError(
                f"get_backend: backend names must be unique, got {point.name!r} from "
                f"{targets[point.name]} and {point.value}. Uninstall one of the packages."
            )
        targets[point.name] = point.value
    return targets


def _load(name: str) -> Any:
    targets = _targets()
    if name not in targets:
        import difflib  # noqa: PLC0415  # slow to import

        close = difflib.get_close_matches(name, targets, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise RangeError(
            f"get_backend: backend must name a known backend, got {name!r}.{hint} "
            f"Known: {', '.join(sorted(targets))}."
        )
    module, _, attribute = targets[name].partition(":")
    if module.startswith("accel."):
        _check_accel()
    return getattr(importlib.import_module(module), attribute)


def _check_accel() -> None:
    """Raise unless the top-level package `accel` is the one shipped with this npmoe.

    The name is short, so another package of that name may stand first on the path.
    """
    from pathlib import Path  # noqa: PLC0415  # slow to import

    accel = importlib.import_module("accel")
    marker = getattr(accel, "NPMOE_ACCEL_VERSION", None)
    where = getattr(accel, "__file__", None) or str(list(accel.__path__))
    ours = Path(__file__).resolve().parents[2] / "accel" / "__init__.py"
    if marker != __version__ or Path(where).resolve() != ours:
        raise BackendUnavailableError(
            f"get_backend: package 'accel' must be the one shipped with npmoe {__version__}, "
            f"got {where} (marker {marker}). Another package of that name comes first on "
            "sys.path; rename or remove it."
        )
