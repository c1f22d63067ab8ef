"""The structs and the one function that Python shares with the runtime (runtime/runtime.cpp)."""

from __future__ import annotations

import ctypes as C
from pathlib import Path

__all__ = ["SPACE_NUMBERS", "CFinding", "CLaunch", "CRegion", "CTraffic", "Library"]

SPACE_NUMBERS = {"global": 1, "shared": 2, "local": 3, "const": 4, "param": 5}


class CLaunch(C.Structure):
    """``ptx::Launch``."""

    _fields_ = (
        ("grid", C.c_uint32 * 3),
        ("block", C.c_uint32 * 3),
        ("dynamic_shared", C.c_uint32),
        ("schedule", C.c_uint32),
        ("seed", C.c_uint64),
        ("limit", C.c_uint64),
        ("variant", C.c_uint32),
        ("traffic", C.c_uint32),
        ("counts", C.c_void_p),
    )


class CRegion(C.Structure):
    """``ptx::RegionSpec``."""

    _fields_ = (
        ("base", C.c_uint64),
        ("size", C.c_uint64),
        ("data", C.c_void_p),
        ("space", C.c_uint32),
        ("number", C.c_uint32),
        ("read_only", C.c_uint32),
        ("uninitialized", C.c_uint32),
    )


class CWho(C.Structure):
    """``ptx::Who``."""

    _fields_ = (("block", C.c_uint32 * 3), ("thread", C.c_uint32 * 3))


class CGroup(C.Structure):
    """``ptx::Group``."""

    _fields_ = (
        ("state", C.c_uint32),
        ("site", C.c_uint32),
        ("key", C.c_uint32),
        ("count", C.c_uint32),
        ("first", C.c_uint32 * 3),
    )


class CFinding(C.Structure):
    """``ptx::Finding``."""

    _fields_ = (
        *(
            (name, C.c_uint32)
            for name in ("kind", "site", "other_site", "access", "other_access", "space")
        ),
        *(
            (name, C.c_uint32)
            for name in ("buffer", "size", "register_", "same_value", "groups", "has_other")
        ),
        ("who", CWho),
        ("other", CWho),
        ("offset", C.c_int64),
        ("extent", C.c_uint64),
        ("address", C.c_uint64),
        ("group", CGroup * 8),
        ("note", C.c_char * 160),
    )


class CTraffic(C.Structure):
    """``ptx::LineTraffic``."""

    _fields_ = (
        ("site", C.c_uint32),
        ("space", C.c_uint32),
        *((name, C.c_uint64) for name in ("requests", "transactions", "ideal", "worst", "bytes")),
    )


class CKernel(C.Structure):
    """``ptx::Kernel``."""

    _fields_ = (("name", C.c_char_p), ("run", C.c_void_p), ("register_bytes", C.c_uint32))


class Library:
    """The runtime together with the kernels of one translation unit.

    Parameters
    ----------
    runtime, kernels : Path
        Shared libraries; the kernels find the runtime's functions because it is loaded globally.
    """

    def __init__(self, runtime: Path, kernels: Path) -> None:
        self.launch = C.CDLL(str(runtime), mode=C.RTLD_GLOBAL).ptx_launch
        self.launch.restype = C.c_int
        self.launch.argtypes = (
            C.POINTER(CKernel), C.POINTER(CLaunch), C.POINTER(CRegion), C.c_uint32, C.c_void_p,
            C.c_uint64, C.POINTER(CFinding), C.POINTER(C.c_uint64), C.POINTER(CTraffic), C.c_uint32,
        )  # fmt: skip
        self._opened = C.CDLL(str(kernels))  # stays open as long as the table is used

    def kernel(self, number: int) -> CKernel:
        """Give the entry of the table that the translation unit defines."""
        table = (CKernel * (number + 1)).in_dll(self._opened, "ptx_kernels")
        return table[number]
