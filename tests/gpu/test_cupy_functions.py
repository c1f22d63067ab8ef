"""What the reference's lines call on device arrays exists in CuPy, with the same keywords.

CuPy imports without a driver, but none of its arrays can be made: names and signatures are what
can be known of them here.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

from accel import loopback
from npmoe._typing import array_namespace
from npmoe.testing import check_backend

cupy = pytest.importorskip("cupy", reason="needs the extra npmoe[cuda13]: cupy")


def signature_of(thing: Any) -> str:
    """Return the signature; compiled methods have it in the first line of their docstring."""
    try:
        found = str(inspect.signature(thing))
    except (TypeError, ValueError):
        found = ""
    return found or (thing.__doc__ or "").strip().split("\n")[0]


def test_every_function_and_keyword_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    called: set[tuple[bool, str, tuple[str, ...]]] = set()
    run = loopback._on_device

    def note(function: Any, *args: Any, raw: bool = False, **keywords: Any) -> Any:
        is_method = isinstance(getattr(function, "__self__", None), np.ndarray)
        called.add((is_method, function.__name__, tuple(sorted(keywords))))
        return run(function, *args, raw=raw, **keywords)

    monkeypatch.setattr(loopback, "_on_device", note)
    assert check_backend("loopback", quick=True).passed
    assert {(False, "where", ()), (True, "argmax", ("axis",))} <= called
    missing = []
    for is_method, name, keywords in sorted(called):
        there = getattr(cupy.ndarray if is_method else cupy, name, None)
        if there is None:
            missing.append(name)
        else:
            told = signature_of(there)
            missing += [f"{name}({k}=)" for k in keywords if k not in told and "**" not in told]
    assert not missing


def test_arrays_without_a_namespace_of_their_own_have_their_module() -> None:
    class Theirs:
        pass

    Theirs.__module__ = "cupy._core.core"
    assert array_namespace(Theirs()) is cupy
