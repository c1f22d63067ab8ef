"""Walk a tree of frozen dataclasses and tuples whose leaves are arrays or None.

Parameters, gradients and optimizer moments are such trees: one type for each, no dicts.
A leaf's name is its path, for example ``blocks.0.attention.qkv_proj``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from npmoe._checks import check_same_dtype
from npmoe._typing import HostArray

T = TypeVar("T")


def named_arrays(tree: Any, prefix: str = "") -> Iterator[tuple[str, HostArray]]:
    """Yield (path, array) for every leaf that is not None, in the order of the fields."""
    for name, child in _children(tree):
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, np.ndarray):
            yield path, child
        elif child is not None:
            yield from named_arrays(child, path)


def map_arrays(function: Callable[[str, HostArray], HostArray], tree: T, prefix: str = "") -> T:
    """Return a tree of the same types with every array replaced by ``function(path, array)``."""
    new: dict[str, Any] = {}
    for name, child in _children(tree):
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, np.ndarray):
            value: Any = function(path, child)
            # Arithmetic on an array of shape () gives a scalar.
            new[name] = np.asarray(value) if isinstance(value, np.generic) else value
        else:
            new[name] = None if child is None else map_arrays(function, child, path)
    if isinstance(tree, tuple):
        return type(tree)(new.values())
    return dataclasses.replace(tree, **new)  # type: ignore[type-var]


def flatten(tree: T) -> tuple[HostArray, T]:
    """Copy all leaves into one flat vector; return it and the tree of views into it.

    The leaves must share one dtype, or DTypeError is raised: the tree of views could not have
    theirs. Updating the vector in place updates the tree.
    """
    leaves = dict(named_arrays(tree))
    first = next(iter(leaves))
    for name, leaf in leaves.items():
        check_same_dtype("flatten", name, leaf, leaves[first].dtype, first)
    flat = np.concatenate([leaf.reshape(-1) for leaf in leaves.values()])
    return flat, unflatten(flat, tree)


def unflatten(flat: HostArray, like: T) -> T:
    """Return a tree shaped as `like` whose leaves are consecutive views into `flat`."""
    offset = 0

    def view(_: str, leaf: HostArray) -> HostArray:
        nonlocal offset
        part = flat[offset : offset + leaf.size].reshape(leaf.shape)
        offset += leaf.size
        return part

    return map_arrays(view, like)


def num_elements(tree: Any) -> int:
    """Return how many numbers the tree holds."""
    return sum(leaf.size for _, leaf in named_arrays(tree))


def _children(tree: Any) -> list[tuple[str, Any]]:
    if isinstance(tree, tuple):
        return [(str(i), child) for i, child in enumerate(tree)]
    return [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
