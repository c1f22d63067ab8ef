"""What the tests of compiled kernels need, and whether its absence is a failure."""

from __future__ import annotations

import os

import pytest

from accel.cupy_raw.nvrtc import nvrtc_version
from npmoe.errors import NpmoeError
from npmoe.testing.ptx import find_compiler

# Tables of lines and figures are of this compiler; another one may emit other PTX.
TABLES_OF = "13.0"


def need_emulation() -> None:
    """Skip the module without NVRTC or a C++ compiler; fail if NPMOE_REQUIRE names it."""
    try:
        nvrtc_version()
        find_compiler()
    except NpmoeError as error:
        if is_required():
            raise
        pytest.skip(f"needs the extra npmoe[emulate] and a C++ compiler: {error}",
                    allow_module_level=True)  # fmt: skip


def is_required() -> bool:
    """Say whether NPMOE_REQUIRE names the extra."""
    return "emulate" in os.environ.get("NPMOE_REQUIRE", "").replace(",", " ").split()


def need_tables() -> None:
    """Skip a test that compares with a committed table of another NVRTC."""
    if nvrtc_version() != TABLES_OF:
        pytest.skip(f"the table is of NVRTC {TABLES_OF}, this is {nvrtc_version()}")
