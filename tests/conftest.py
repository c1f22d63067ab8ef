"""Rules for all tests: floating-point errors raise, and Hypothesis repeats itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=False)
settings.register_profile("random", deadline=None)  # pytest --hypothesis-profile=random
settings.load_profile("repeatable")


class _RaiseInvalid:
    """Raise for every invalid operation but ``matmul``'s: receives `numpy.errstate`'s messages.

    The flag after a matmul is the BLAS's and says nothing about the product: OpenBLAS's AVX-512
    ``sgemv_t`` for five columns (0.3.31) adds unused lanes of its stack, and a signalling NaN
    left there by an earlier call sets the flag beside a right result. That a product is right
    is what the tests compare.
    """

    def write(self, message: str) -> None:
        if "invalid value encountered in matmul" not in message:
            raise FloatingPointError(message.strip())


@pytest.fixture(autouse=True)
def floating_point_errors_raise() -> Iterator[None]:
    with np.errstate(divide="raise", over="raise", invalid="log", call=_RaiseInvalid()):
        yield
