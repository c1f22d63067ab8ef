"""A device that is not there: NumPy arithmetic behind arrays that refuse the host.

It is the test of the plumbing. Its arrays do not convert to NumPy silently and do not mix with
NumPy arrays; inside ``with verbs_only():`` they compute only while a verb of the backend runs. So
a hidden copy to the host, a NumPy function called on a device array, or arithmetic of the layer
outside a verb is an error on any machine. It is also the smallest backend to copy: an array type,
two transfers, and the inherited verbs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np

from npmoe._typing import HostArray
from npmoe.backends import Availability, ReferenceBackend
from npmoe.errors import DTypeError

_refuse: contextvars.ContextVar[bool] = contextvars.ContextVar("loopback_refuse", default=False)

# Every verb of the reference is a static method.
VERBS = tuple(
    name for name, value in vars(ReferenceBackend).items() if isinstance(value, staticmethod)
)


class LoopbackArray:
    """An array on the pretended device; only its shape and dtype may be looked at freely."""

    __slots__ = ("_host",)
    __hash__ = None  # type: ignore[assignment]  # like every array with an elementwise ==

    def __init__(self, host: HostArray) -> None:
        self._host = host

    @property
    def shape(self) -> tuple[int, ...]:
        """Axis lengths."""
        return self._host.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""
        return self._host.dtype

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self._host.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._host.size

    def reshape(self, *shape: Any) -> LoopbackArray:
        """Return the array with other axis lengths; allowed anywhere, since it computes nothing."""
        return LoopbackArray(self._host.reshape(*shape))

    def __array_namespace__(self) -> Any:
        return _NAMESPACE

    def __array__(self, *_: Any, **__: Any) -> HostArray:
        raise DTypeError(
            "loopback: an array must not be converted silently, got a NumPy call on a device "
            "array. Use backend.asnumpy(x)."
        )

    __array_ufunc__ = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # __array_interface__ and the like would convert silently
            raise AttributeError(name)
        attribute = getattr(self._host, name)
        if callable(attribute):
            return functools.partial(_on_device, attribute)
        return _wrap(attribute)

    def __getitem__(self, key: Any) -> LoopbackArray:
        return LoopbackArray(np.asarray(_on_device(self._host.__getitem__, key, raw=True)))

    def __setitem__(self, key: Any, value: Any) -> None:
        _on_device(self._host.__setitem__, key, value)

    # Scalars leave the device one at a time, as on a real one.
    def __bool__(self) -> bool:
        return bool(self._host)

    def __int__(self) -> int:
        return int(self._host)

    __index__ = __int__

    def __float__(self) -> float:
        return float(self._host)

    def __len__(self) -> int:
        return len(self._host)


def _unwrap(value: Any) -> Any:
    if isinstance(value, LoopbackArray):
        return value._host
    if isinstance(value, np.ndarray) and value.ndim > 0:
        raise DTypeError(
            f"loopback: operands must be on the device, got a NumPy array of shape {value.shape}. "
            "Move it with backend.asarray(x)."
        )
    if isinstance(value, tuple):
        return tuple(_unwrap(v) for v in value)
    return value


def _wrap(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return LoopbackArray(np.asarray(value))
    if isinstance(value, tuple):
        return tuple(_wrap(v) for v in value)
    return value


def _on_device(function: Callable[..., Any], *args: Any, raw: bool = False, **kwargs: Any) -> Any:
    """Call a NumPy function on the wrapped arrays."""
    if _refuse.get():
        name = getattr(function, "__name__", "operator")
        raise DTypeError(
            f"loopback: arithmetic must happen inside a verb of the backend, got {name}. "
            "Make it a verb, or move the array with backend.asnumpy(x)."
        )
    result = function(*(_unwrap(a) for a in args), **{key: _unwrap(v) for key, v in kwargs.items()})
    return result if raw else _wrap(result)


def _operator(name: str) -> Callable[..., Any]:
    def method(self: LoopbackArray, *others: Any) -> Any:
        result = _on_device(getattr(self._host, name), *others)
        return self if name.startswith("__i") and name not in ("__invert__",) else result

    method.__name__ = name
    return method


for _name in (
    *(f"__{p}{n}__" for n in ("add", "sub", "mul", "truediv", "matmul", "pow", "and", "or", "mod",
                              "floordiv") for p in ("", "r", "i")),
    *(f"__{n}__" for n in ("neg", "invert", "lt", "le", "gt", "ge", "eq", "ne")),
):  # fmt: skip
    setattr(LoopbackArray, _name, _operator(_name))


class _Namespace:
    """NumPy's functions for device arrays."""

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(np, name)
        if isinstance(attribute, type) or not callable(attribute):
            return attribute  # dtypes and constants
        return functools.partial(_on_device, attribute)

    @staticmethod
    def asarray(x: Any) -> LoopbackArray:
        """Move an array to the device; an explicit copy."""
        return x if isinstance(x, LoopbackArray) else LoopbackArray(np.array(x))


_NAMESPACE = _Namespace()


class LoopbackBackend(ReferenceBackend):
    """The NumPy verbs on arrays that refuse silent conversion."""

    name: ClassVar[str] = "loopback"
    host_arrays: ClassVar[bool] = False

    @classmethod
    def availability(cls) -> Availability:
        """Say that it runs everywhere."""
        return Availability(True)

    def asarray(self, x: Any) -> LoopbackArray:
        """Copy x to the device."""
        return _NAMESPACE.asarray(x)

    def asnumpy(self, x: LoopbackArray) -> HostArray:
        """Copy x to the host."""
        return np.array(x._host)


@contextlib.contextmanager
def verbs_only() -> Iterator[None]:
    """Refuse, inside the ``with`` block, arithmetic that is not part of a verb."""
    token = _refuse.set(True)
    try:
        yield
    finally:
        _refuse.reset(token)


def _verb(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        token = _refuse.set(False)
        try:
            return function(*args, **kwargs)
        finally:
            _refuse.reset(token)

    return run


for _name in VERBS:
    setattr(LoopbackBackend, _name, staticmethod(_verb(getattr(ReferenceBackend, _name))))
