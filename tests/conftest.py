"""Rules for all tests: floating-point errors raise, and Hypothesis repeats itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=False)
settings.register_profile("random", deadline=None)  # pytest --hypothesis-profile=random
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def floating_point_errors_raise() -> Iterator[None]:
    with np.errstate(divide="raise", over="raise", invalid="raise"):
        yield
