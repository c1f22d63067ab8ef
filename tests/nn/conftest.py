"""The functions of `npmoe.nn` that backends have kernels for, from everybody who has them."""

from __future__ import annotations

from typing import Any

import pytest
from needs import need_numba

import npmoe
from npmoe import nn


@pytest.fixture(params=["npmoe.nn", "numba"])
def verbs(request: pytest.FixtureRequest) -> nn.ModelVerbs:
    """`npmoe.nn` itself, and the `nn` of each backend with one."""
    if request.param == "npmoe.nn":
        return nn
    need_numba()
    backend: Any = npmoe.get_backend(request.param)
    return backend.nn
