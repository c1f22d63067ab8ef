"""Compile a kernel with NVRTC, which needs neither a device nor a driver."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from npmoe.errors import BackendUnavailableError, NpmoeError

from ..device.code_cache import keep_code
from ..device.kernel import Kernel
from ..device.source import compiler_options, read_source


class KernelCompileError(NpmoeError):
    """A kernel that the CUDA compiler refuses."""


@lru_cache(maxsize=1)
def _bindings() -> tuple[Any, str]:
    """Return the bindings of NVRTC, and its version."""
    try:
        from cuda.bindings import nvrtc  # noqa: PLC0415  # an extra

        _, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as cause:
        raise BackendUnavailableError(
            f"compile_kernel: NVRTC must be installed to compile kernels, got: {cause}. "
            "Install the extra: pip install 'npmoe[emulate]'."
        ) from cause
    return nvrtc, f"{major}.{minor}"


def nvrtc_version() -> str:
    """Return the version of NVRTC, or raise if it is not there."""
    return _bindings()[1]


def compile_kernel(kernel: Kernel, arch: str = "sm_80", target: str = "ptx") -> bytes:
    """Return a variant of a kernel as PTX or as a cubin.

    Parameters
    ----------
    kernel : Kernel
    arch : str
        "sm_80" and later.
    target : {"ptx", "cubin"}

    Returns
    -------
    bytes

    Raises
    ------
    BackendUnavailableError
        Without NVRTC.
    KernelCompileError

    Notes
    -----
    **Cost** about 0.3 s, once: kept on disk by content, in the folder of `npmoe.testing.ptx`.
    """
    nvrtc, version = _bindings()
    source = read_source(kernel.file)
    options = [f"-arch={arch}", "-lineinfo", *compiler_options(kernel)]
    return keep_code(
        [source, *options, version], target,
        lambda: _compile(nvrtc, kernel, source, options, target),
    )  # fmt: skip


def _compile(nvrtc: Any, kernel: Kernel, source: str, options: list[str], target: str) -> bytes:
    """Run NVRTC."""

    def call(name: str, *args: Any) -> Any:
        error, *values = getattr(nvrtc, name)(*args)
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise KernelCompileError(f"compile_kernel: {name} failed with {error.name}.")
        return values[0] if values else None

    def read(what: str, program: Any) -> bytes:
        data: bytes = b" " * call(f"nvrtcGet{what}Size", program)
        call(f"nvrtcGet{what}", program, data)
        return data

    program = call("nvrtcCreateProgram", source.encode(), f"{kernel.file}.cu".encode(), 0, [], [])
    try:
        call("nvrtcCompileProgram", program, len(options), [o.encode() for o in options])
    except KernelCompileError as error:
        log = read("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
        raise KernelCompileError(
            f"compile_kernel: {kernel} must compile with {' '.join(options)}, got:\n{log}"
        ) from error
    code = read("PTX" if target == "ptx" else "CUBIN", program)
    call("nvrtcDestroyProgram", program)
    return code.rstrip(b"\0") if target == "ptx" else code


def emulated_ptx(kernel: Kernel) -> tuple[str, str]:
    """Return PTX and entry for an `EmulatedDevice`."""
    return compile_kernel(kernel).decode(), kernel.entry
