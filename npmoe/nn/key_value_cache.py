"""Preallocated keys and values for incremental decoding."""

from __future__ import annotations

import numpy as np

from npmoe._typing import HostArray
from npmoe.errors import RangeError
from npmoe.nn._inputs import Inputs


class KeyValueCache:
    """Keys and values of the positions so far, for decoding a few tokens at a time.

    Parameters
    ----------
    batch_size, num_kv_heads, head_dim : int
        B, Hkv and D.
    capacity : int
        The most positions it can hold; allocated at once.
    dtype : {"float32", "float64"}
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: str = "float32",
    ) -> None:
        shape = (batch_size, num_kv_heads, capacity, head_dim)
        self._keys = np.empty(shape, dtype)
        self._values = np.empty(shape, dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """The most positions it can hold."""
        return self._keys.shape[2]

    def append(self, k: HostArray, v: HostArray) -> tuple[HostArray, HostArray]:
        """Store k, v (B, Hkv, L, D); return views of all positions (B, Hkv, S, D).

        Raises
        ------
        ShapeError, DTypeError
        RangeError
            If they do not fit; nothing is stored then.
        """
        inputs = Inputs("KeyValueCache.append")
        inputs.check("the cache", self._keys, "B", "Hkv", "C", "D")
        inputs.check("k", k, "B", "Hkv", "L", "D")
        inputs.check("v", v, "B", "Hkv", "L", "D")
        stop = self.length + k.shape[2]
        if stop > self.capacity:
            raise RangeError(
                f"KeyValueCache.append: k must have at most {self.capacity - self.length} "
                f"positions, got {k.shape[2]}. {self.length} of {self.capacity} are taken. "
                "Make the cache with a larger capacity."
            )
        self._keys[:, :, self.length : stop] = k
        self._values[:, :, self.length : stop] = v
        self.length = stop
        return self._keys[:, :, :stop], self._values[:, :, :stop]
