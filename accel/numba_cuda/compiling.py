"""Kernels of this room by name, and their PTX without a device or a driver."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from npmoe.errors import BackendUnavailableError
from npmoe.testing import ptx

from ..device.code_cache import keep_code
from ..device.kernel import InOut, Kernel, Out

_FOLDER = Path(__file__).parent
_PACKAGES = ("numba", "numba-cuda")


def require_numba_cuda() -> tuple[str, ...]:
    """Return the versions of Numba and its CUDA target, or raise; imports neither."""
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(metadata.version(package))
        except metadata.PackageNotFoundError:
            raise BackendUnavailableError(
                f"the package {package} is not installed. "
                "Install it with: pip install 'npmoe[cuda13]' (or [cuda12])"
            ) from None
    return tuple(versions)


@lru_cache(maxsize=512)
def find_function(kernel: Kernel) -> Callable[..., None]:
    """Return the Python function of a variant; its annotations are its signature.

    A kernel without options is a function of its module; one with options is made by the function
    of that name, of which the options are keywords.
    """
    found = getattr(importlib.import_module(f".{kernel.file}", __package__), kernel.entry)
    function: Callable[..., None] = found(**dict(kernel.options)) if kernel.options else found
    return function


def launch_bounds(function: Any) -> Any:
    """Return what `words.bounds` says of a kernel."""
    return function.launch_bounds


def parameter_types(kernel: Kernel) -> list[Any]:
    """Return the types of the arguments, as Numba names them."""
    return list(find_function(kernel).__annotations__.values())


def fit_array(array: Any, wanted: Any) -> Any:
    """Return an array as a parameter takes it: flat where one axis is wanted, halves as bits."""
    if wanted.ndim == 1 and len(array.shape) != 1:
        array = array.reshape(-1)
    name = np.dtype(array.dtype).name
    return array.view(np.uint16) if name in ("float16", "bfloat16") else array


def absent(wanted: Any) -> tuple[tuple[int, ...], Any]:
    """Return shape and dtype of the empty array that stands for None."""
    from numba.cuda.np.numpy_support import as_dtype  # noqa: PLC0415  # an extra

    return (0,) * wanted.ndim, as_dtype(wanted.dtype)


def unwrap(arg: Any) -> Any:
    """Return the array of an `Out` or `InOut`, and others as they are."""
    return arg.array if isinstance(arg, Out | InOut) else arg


def spell(kernel: Kernel, args: list[Any]) -> list[Any]:
    """Return the words that Numba passes: of an array eight or more, of a scalar itself."""
    words: list[Any] = []
    for arg, wanted in zip(args, parameter_types(kernel), strict=True):
        if not hasattr(wanted, "ndim"):
            words.append(arg)
        elif arg is None:
            words += ptx.numba_array(ptx.ReadOnly(np.empty(*absent(wanted))))
        elif isinstance(arg, ptx.ReadOnly | ptx.Uninitialized):
            words += ptx.numba_array(replace(arg, array=fit_array(arg.array, wanted)))
        else:
            words += ptx.numba_array(fit_array(arg, wanted))
    return words


@lru_cache(maxsize=1)
def _sources() -> str:
    """Return all that a kernel's code may depend on: this room, and the constants it shares."""
    shared = (
        _FOLDER.parent / f"{name}.py"
        for name in ("curve", "device/plans", "device/products", "device/rows")
    )
    return "\0".join(p.read_text("utf-8") for p in (*sorted(_FOLDER.glob("*.py")), *shared))


def compile_kernel(kernel: Kernel, arch: str = "sm_80") -> str:
    """Return the PTX of a variant, its entry named like the kernel.

    Parameters
    ----------
    kernel : Kernel
    arch : str
        "sm_80" and later.

    Returns
    -------
    str

    Raises
    ------
    BackendUnavailableError
        Without Numba, numba-cuda or NVVM.

    Notes
    -----
    **Cost** about a second, once: kept on disk by content, in the folder of `npmoe.testing.ptx`.
    """
    versions = require_numba_cuda()
    key = [str(kernel), arch, *versions, _sources()]
    return keep_code(key, "ptx", lambda: _compile(kernel, arch).encode()).decode()


def numba_cuda() -> Any:
    """Return the package numba.cuda."""
    return importlib.import_module("numba.cuda")


def _compile(kernel: Kernel, arch: str) -> str:
    cuda, function = numba_cuda(), find_function(kernel)
    number = int(arch.removeprefix("sm_"))
    cc = (number // 10, number % 10)
    try:
        with _pretended_device(cc):
            text, _ = cuda.compile_ptx(
                function,
                cuda.types.void(*parameter_types(kernel)),
                cc=cc,
                lineinfo=True,
                launch_bounds=launch_bounds(function),
            )
    except cuda.cudadrv.error.NvvmSupportError as cause:
        raise BackendUnavailableError(
            f"compile_kernel: NVVM must be installed to compile kernels, got: {cause}. "
            "Install the extra: pip install 'npmoe[emulate]'."
        ) from cause
    (mangled,) = re.findall(r"\.entry (\w+)\(", text)
    return str(text.replace(mangled, kernel.entry))


@contextlib.contextmanager
def _pretended_device(cc: tuple[int, int]) -> Iterator[None]:
    """Answer Numba, which asks for the device when it meets a device function, not for a cc."""
    dispatcher = numba_cuda().dispatcher
    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=cc)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


def emulated_ptx(kernel: Kernel) -> tuple[str, str]:
    """Return PTX and entry for an `EmulatedDevice`."""
    return compile_kernel(kernel), kernel.entry
