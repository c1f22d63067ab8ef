"""Trees of arrays: paths, mapping, and one flat vector behind all leaves."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from npmoe import MoEConfig, init_params
from npmoe.tree import flatten, map_arrays, named_arrays, num_elements, unflatten


@dataclasses.dataclass(frozen=True)
class Block:
    weight: np.ndarray
    bias: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Model:
    head: np.ndarray
    blocks: tuple[Block, ...]
    norm: Any = None


def model() -> Model:
    blocks = (
        Block(np.arange(6.0).reshape(2, 3), np.array([7.0])),
        Block(np.full((1, 2), 8.0), None),
    )
    return Model(np.array([9.0, 10.0]), blocks)


PATHS = ["head", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight"]


def test_paths_in_the_order_of_fields() -> None:
    assert [n for n, _ in named_arrays(model())] == PATHS
    assert [n for n, _ in named_arrays(model(), "model")] == [f"model.{n}" for n in PATHS]
    assert num_elements(model()) == 11


def test_map_keeps_types_and_none() -> None:
    seen: list[str] = []

    def double(path: str, array: np.ndarray) -> np.ndarray:
        seen.append(path)
        return 2 * array

    tree = model()
    got = map_arrays(double, tree)
    assert seen == PATHS
    assert type(got) is Model
    assert type(got.blocks) is tuple
    assert got.blocks[1].bias is None
    assert got.norm is None
    for (_, a), (_, b) in zip(named_arrays(got), named_arrays(tree), strict=True):
        np.testing.assert_array_equal(a, 2 * b)
    prefixed: list[str] = []
    map_arrays(lambda n, a: prefixed.append(n) or a, tree, "m")  # type: ignore[func-returns-value]
    assert prefixed == [f"m.{n}" for n in PATHS]


def test_flat_vector_is_behind_the_tree() -> None:
    tree = model()
    flat, views = flatten(tree)
    assert flat.tolist() == [9, 10, 0, 1, 2, 3, 4, 5, 7, 8, 8]
    for (path, a), (_, b) in zip(named_arrays(views), named_arrays(tree), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=path)
    flat += 1
    assert views.blocks[0].weight.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert tree.blocks[0].weight[0, 0] == 0.0
    views.head[0] = -1.0
    assert flat[0] == -1.0
    again = unflatten(flat, tree)
    for (_, a), (_, b) in zip(named_arrays(again), named_arrays(views), strict=True):
        assert a.shape == b.shape
        assert np.shares_memory(a, flat)
        np.testing.assert_array_equal(a, b)


def test_layer_parameters_are_a_tree() -> None:
    cfg = MoEConfig(hidden_size=4, intermediate_size=3, num_experts=2)
    params = init_params(cfg)
    assert [n for n, _ in named_arrays(params)] == ["router_weight", "gate_up_proj", "down_proj"]
    assert num_elements(params) == 2 * 4 + 2 * 6 * 4 + 2 * 4 * 3
