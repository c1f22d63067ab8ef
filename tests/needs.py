"""Which optional packages these tests need, and whether their absence is a failure."""

from __future__ import annotations

import importlib
import os

import pytest


def need_numba() -> None:
    """Skip the module without Numba; fail if NPMOE_REQUIRE names it."""
    if "numba" in os.environ.get("NPMOE_REQUIRE", "").replace(",", " ").split():
        importlib.import_module("numba")
    for name in ("numba", "ml_dtypes"):
        pytest.importorskip(name, reason=f"needs the extra npmoe[numba]: {name}")
