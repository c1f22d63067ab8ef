"""What the backend needs beside NumPy, said in words when it is not there."""

from __future__ import annotations

import re
from importlib import metadata

# The first release with the array types, intrinsics and LLVM that the kernels are written for.
OLDEST_NUMBA = (0, 60)


def require_numba() -> None:
    """Raise ImportError with the extra to install unless a usable Numba is installed."""
    try:
        version = metadata.version("numba")
    except metadata.PackageNotFoundError:
        raise ImportError("numba is not installed; pip install 'npmoe[numba]'") from None
    found = re.match(r"(\d+)\.(\d+)", version) or re.match(r"(\d+)()", version)
    numbers = (0, 0) if found is None else (int(found[1]), int(found[2] or 0))
    if numbers < OLDEST_NUMBA:
        oldest = ".".join(map(str, OLDEST_NUMBA))
        raise ImportError(
            f"numba {version} is older than {oldest}; pip install --upgrade 'npmoe[numba]'"
        )
