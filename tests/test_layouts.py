"""Layouts of expert weights: exact round trips, and one forward by every layout's own rules."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.layouts import LAYOUTS, ExpertArrays, from_layout, to_layout
from npmoe.params import MoEParams

PLAIN_TOO = ["halves", "transposed", "split", "per_expert", "flat"]
SHAPES = {  # of gated experts with E, H, I = 2, 3, 4
    "halves": {"gate_up_proj": (2, 8, 3), "down_proj": (2, 3, 4), "gate_up_bias": (2, 8)},
    "halves_swapped": {"gate_up_proj": (2, 8, 3), "down_proj": (2, 3, 4), "gate_up_bias": (2, 8)},
    "interleaved": {"gate_up_proj": (2, 8, 3), "down_proj": (2, 3, 4), "gate_up_bias": (2, 8)},
    "interleaved_blocks": {
        "gate_up_proj": (2, 8, 3),
        "down_proj": (2, 3, 4),
        "gate_up_bias": (2, 8),
    },
    "transposed": {"gate_up_proj": (2, 3, 8), "down_proj": (2, 4, 3), "gate_up_bias": (2, 8)},
    "transposed_interleaved": {
        "gate_up_proj": (2, 3, 8),
        "down_proj": (2, 4, 3),
        "gate_up_bias": (2, 8),
    },
    "split": {
        "gate_proj": (2, 4, 3),
        "up_proj": (2, 4, 3),
        "down_proj": (2, 3, 4),
        "gate_bias": (2, 4),
        "up_bias": (2, 4),
    },
    "flat": {
        "gate_proj": (8, 3),
        "up_proj": (8, 3),
        "down_proj": (8, 3),
        "gate_bias": (8,),
        "up_bias": (8,),
    },
}


def draw(
    E: int = 2, H: int = 3, I: int = 4, gated: bool = True, bias: bool = True, seed: int = 0
) -> MoEParams:
    """Return parameters whose numbers are all different: no wrong place looks right."""
    wide = 2 * I if gated else I
    numbers = np.random.default_rng(seed).permutation(E * (wide * H + H * I + wide + H)) / 64.0
    cuts = np.cumsum([E * wide * H, E * H * I, E * wide])
    w1, w2, b1, b2 = np.split(numbers, cuts)
    return MoEParams(
        router_weight=np.zeros((E, H)),
        gate_up_proj=w1.reshape(E, wide, H),
        down_proj=w2.reshape(E, H, I),
        gate_up_bias=b1.reshape(E, wide) if bias else None,
        down_bias=b2.reshape(E, H) if bias else None,
    )


def blocks(layout: str, I: int) -> int | None:
    """Return a block size that is neither 1 nor I where there is one."""
    if layout != "interleaved_blocks":
        return None
    return next((b for b in range(2, I) if I % b == 0), 1)


def assert_canonical(found: ExpertArrays, params: MoEParams) -> None:
    for field in fields(found):
        value, want = getattr(found, field.name), getattr(params, field.name, None)
        assert (value is None) == (want is None), field.name
        if want is not None:
            assert value.dtype == want.dtype
            assert value.flags.c_contiguous
            np.testing.assert_array_equal(value, want)
            assert not np.shares_memory(value, want)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(
    E=st.integers(1, 3),
    H=st.integers(1, 5),
    I=st.integers(1, 6),
    bias=st.booleans(),
    gated=st.booleans(),
    dtype=st.sampled_from(["f4", "f8", "i4", "f2"]),
    seed=st.integers(0, 99),
)
def test_round_trip(
    layout: str, E: int, H: int, I: int, bias: bool, gated: bool, dtype: str, seed: int
) -> None:
    gated = gated or layout not in PLAIN_TOO
    drawn = draw(E, H, I, gated, bias, seed)
    params = MoEParams(
        **{
            f.name: None if getattr(drawn, f.name) is None else getattr(drawn, f.name).astype(dtype)
            for f in fields(drawn)
        }
    )
    block = blocks(layout, I)
    there = to_layout(params, layout, block_size=block)
    count = E if layout == "flat" else None
    back = from_layout(there, layout, num_experts=count, block_size=block)
    assert_canonical(back, params)
    again = to_layout(back, layout, block_size=block)
    for field in fields(there):
        one, other = getattr(there, field.name), getattr(again, field.name)
        assert (one is None) == (other is None)
        if one is not None:
            np.testing.assert_array_equal(np.array(one), np.array(other))
            for array in one if layout == "per_expert" else [one]:
                assert array.flags.c_contiguous
                assert array.dtype == dtype
                for source in (params.gate_up_proj, params.down_proj):
                    assert not np.shares_memory(array, source)


@pytest.mark.parametrize("layout", SHAPES)
def test_shapes(layout: str) -> None:
    there = to_layout(draw(), layout, block_size=blocks(layout, 4))
    want: dict[str, Any] = {"down_bias": (2, 3), **SHAPES[layout]}
    for field in fields(there):
        value = getattr(there, field.name)
        assert (None if value is None else value.shape) == want.get(field.name), field.name


def test_per_expert_shapes() -> None:
    there = to_layout(draw(), "per_expert")
    assert there.gate_up_proj is there.gate_up_bias is None
    for name, shape in [
        *(("gate_proj", (4, 3)), ("up_proj", (4, 3)), ("down_proj", (3, 4))),
        *(("gate_bias", (4,)), ("up_bias", (4,)), ("down_bias", (3,))),
    ]:
        assert [a.shape for a in getattr(there, name)] == [shape, shape]


def test_rows_by_hand() -> None:
    gate, up = [10.0, 11.0, 12.0, 13.0], [20.0, 21.0, 22.0, 23.0]
    own = ExpertArrays(
        gate_up_proj=np.array([gate + up]).reshape(1, 8, 1),
        down_proj=np.zeros((1, 1, 4)),
        gate_up_bias=-np.array([gate + up]),
    )
    for layout, block, rows in [
        ("halves", None, gate + up),
        ("halves_swapped", None, up + gate),
        ("interleaved", None, [10, 20, 11, 21, 12, 22, 13, 23]),
        ("interleaved_blocks", 2, [10, 11, 20, 21, 12, 13, 22, 23]),
        ("transposed_interleaved", None, [10, 20, 11, 21, 12, 22, 13, 23]),
        ("transposed", None, gate + up),
    ]:
        there = to_layout(own, layout, block_size=block)
        assert there.gate_up_proj.ravel().tolist() == rows, layout
        assert (-there.gate_up_bias).ravel().tolist() == rows, layout
    split = to_layout(own, "split")
    assert split.gate_proj.ravel().tolist() == gate
    assert split.up_proj.ravel().tolist() == up
    assert (-split.gate_bias).ravel().tolist() == gate
    assert (-split.up_bias).ravel().tolist() == up


def test_blocks_of_32_by_default() -> None:
    params = draw(1, 2, 64)
    there = to_layout(params, "interleaved_blocks")
    w = params.gate_up_proj[0]
    want = np.concatenate([w[:32], w[64:96], w[32:64], w[96:]])
    np.testing.assert_array_equal(there.gate_up_proj[0], want)
    assert_canonical(from_layout(there, "interleaved_blocks"), params)


def unit(layout: str, a: ExpertArrays, e: int, i: int, I: int, B: int) -> tuple[Any, ...]:
    """Return unit i of expert e as a program with this layout reads it.

    Its gate row, up row, down column, and the biases of the first two.
    """
    if layout == "split":
        own = a.gate_proj[e, i], a.up_proj[e, i], a.down_proj[e, :, i]
        return *own, a.gate_bias[e, i], a.up_bias[e, i]
    if layout == "per_expert":
        own = a.gate_proj[e][i], a.up_proj[e][i], a.down_proj[e][:, i]
        return *own, a.gate_bias[e][i], a.up_bias[e][i]
    if layout == "flat":
        r = e * I + i
        return a.gate_proj[r], a.up_proj[r], a.down_proj[r], a.gate_bias[r], a.up_bias[r]
    g, u = {
        "halves": (i, I + i),
        "halves_swapped": (I + i, i),
        "interleaved": (2 * i, 2 * i + 1),
        "interleaved_blocks": (i // B * 2 * B + i % B, i // B * 2 * B + B + i % B),
        "transposed": (i, I + i),
        "transposed_interleaved": (2 * i, 2 * i + 1),
    }[layout]
    w, down = a.gate_up_proj[e], a.down_proj[e]
    if layout.startswith("transposed"):
        w, down = w.T, down.T
    return w[g], w[u], down[:, i], a.gate_up_bias[e, g], a.gate_up_bias[e, u]


def by_own_rules(layout: str, a: ExpertArrays, e: int, x: np.ndarray, I: int) -> list[float]:
    """Run expert e on one token, number by number."""
    out = [0.0] * len(x)
    for i in range(I):
        gate, up, down, gate_bias, up_bias = unit(layout, a, e, i, I, blocks(layout, I) or 1)
        g = sum(w * v for w, v in zip(gate, x, strict=True)) + gate_bias
        u = sum(w * v for w, v in zip(up, x, strict=True)) + up_bias
        out = [y + d * g / (1.0 + math.exp(-g)) * u for y, d in zip(out, down, strict=True)]
    return [y + b for y, b in zip(out, a.down_bias[e], strict=True)]


TWINS = [
    ("halves", "halves_swapped", "interleaved", "interleaved_blocks"),
    ("transposed", "transposed_interleaved"),
]


@pytest.mark.parametrize(("H", "I"), [(3, 4), (4, 4), (8, 4)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_experts_stay_the_same_functions(layout: str, H: int, I: int) -> None:
    """Also square ones, where no shape tells a transposition: the numbers are asymmetric."""
    params = draw(2, H, I)
    there = to_layout(params, layout, block_size=blocks(layout, I))
    x = np.random.default_rng(1).integers(1, 5, H) / 64.0
    for e in range(2):
        z = [
            sum(w * v for w, v in zip(params.gate_up_proj[e, r], x, strict=True))
            + params.gate_up_bias[e, r]
            for r in range(2 * I)
        ]
        want = [0.0] * H
        for i in range(I):
            silu = z[i] / (1.0 + math.exp(-z[i]))
            want = [
                y + d * silu * z[I + i]
                for y, d in zip(want, params.down_proj[e, :, i], strict=True)
            ]
        want = [y + b for y, b in zip(want, params.down_bias[e], strict=True)]
        np.testing.assert_allclose(by_own_rules(layout, there, e, x, I), want, rtol=1e-14)
        # Read by other rules that fit the shapes, they are other functions.
        for other in {o for group in TWINS if layout in group for o in group} - {layout}:
            read = by_own_rules(other, there, e, x, I)
            assert np.abs(np.array(read) / want - 1.0).max() > 1e-3


def test_plain_experts() -> None:
    params = draw(gated=False)
    for layout in PLAIN_TOO:
        there = to_layout(params, layout)
        assert there.gate_proj is None
        assert there.gate_bias is None
    assert to_layout(params, "split").up_proj.tolist() == params.gate_up_proj.tolist()
    flat = to_layout(params, "flat")
    assert flat.up_proj.shape == flat.down_proj.shape == (8, 3)
    for layout in sorted(set(LAYOUTS) - set(PLAIN_TOO)):
        with pytest.raises(RangeError) as caught:
            to_layout(params, layout)
        assert str(caught.value) == (
            "to_layout: layout must be one for experts without a gate half, "
            f"got {layout!r}. Those are: 'halves', 'transposed', 'split', 'per_expert', 'flat'."
        )
        assert LAYOUTS[layout].gated_only


def test_one_bias_moves_alone() -> None:
    params = draw()
    own = ExpertArrays(gate_up_proj=params.gate_up_proj, down_proj=params.down_proj)
    assert to_layout(own, "flat").down_bias is None
    lone = ExpertArrays(
        gate_up_proj=params.gate_up_proj, down_proj=params.down_proj, down_bias=params.down_bias
    )
    there = to_layout(lone, "flat")
    assert there.gate_bias is None
    assert there.down_bias.tolist() == params.down_bias.tolist()


def raises(error: type[Exception], call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def test_messages_about_options() -> None:
    params = draw()
    known = ", ".join(map(repr, LAYOUTS))
    for call, value in ((to_layout, params), (from_layout, to_layout(params, "halves"))):
        assert raises(RangeError, call, value, "halfs") == (
            f"{call.__name__}: layout must be one of {known}, got 'halfs'."
        )
        assert raises(RangeError, call, value, "halves", block_size=4) == (
            f"{call.__name__}: block_size must be None for layout 'halves', got 4. "
            "It belongs to 'interleaved_blocks'."
        )
    halves = to_layout(params, "halves")
    for block in (32, 3, 0):
        given = None if block == 32 else block
        for call, value in ((to_layout, params), (from_layout, halves)):
            assert raises(RangeError, call, value, "interleaved_blocks", block_size=given) == (
                f"{call.__name__}: block_size must be at least 1 and divide I = 4, got {block}."
            )
    flat = to_layout(params, "flat")
    for count in (None, 0, 3):
        assert raises(RangeError, from_layout, flat, "flat", num_experts=count) == (
            "from_layout: num_experts must be given for layout 'flat' and divide the 8 rows of "
            f"arrays.down_proj, got {count}."
        )


def test_messages_about_shapes() -> None:
    params = draw()
    turned = to_layout(params, "transposed")
    assert raises(ShapeError, from_layout, turned, "halves") == (
        "from_layout: arrays.gate_up_proj must have shape (E, I, H) = (2, 3, 4), got (2, 3, 8). "
        "E, I, H are bound by arrays.down_proj (2, 4, 3). They fit a layout with transposition."
    )
    assert raises(ShapeError, from_layout, to_layout(params, "halves"), "transposed") == (
        "from_layout: arrays.gate_up_proj must have shape (E, H, I) = (2, 4, 3), got (2, 8, 3). "
        "E, H, I are bound by arrays.down_proj (2, 3, 4). They fit a layout without transposition."
    )
    one = ExpertArrays(gate_up_proj=params.gate_up_proj.swapaxes(1, 2), down_proj=params.down_proj)
    assert raises(ShapeError, to_layout, one, "split") == (
        "to_layout: params.gate_up_proj must have shape (E, 2*I, H) = (2, 8, 3), got (2, 3, 8). "
        "E, I, H are bound by params.down_proj (2, 3, 4). It looks transposed."
    )
    split = to_layout(params, "split")
    assert raises(
        ShapeError,
        from_layout,
        ExpertArrays(
            gate_proj=split.gate_proj,
            up_proj=split.up_proj,
            down_proj=split.down_proj.swapaxes(1, 2),
        ),
        "split",
    ).endswith("It looks transposed.")
    flat = to_layout(params, "flat")
    assert raises(
        ShapeError,
        from_layout,
        ExpertArrays(gate_proj=flat.gate_proj[1:], up_proj=flat.up_proj, down_proj=flat.down_proj),
        "flat",
        num_experts=2,
    ) == (
        "from_layout: arrays.gate_proj must have shape (E*I, H) = (8, 3), got (7, 3). E is bound "
        "by num_experts. I is bound by num_experts and arrays.down_proj (8, 3). "
        "H is bound by arrays.down_proj (8, 3)."
    )
    plain = to_layout(draw(gated=False), "halves")
    assert "must have shape (E, 2*I, H) = (2, 8, 3), got (2, 4, 3)" in raises(
        ShapeError, from_layout, plain, "interleaved"
    )
    assert "down_proj must have shape (E, H, I) = (3, H, I), got (2, 3, 4). E is bound by " in (
        raises(ShapeError, from_layout, to_layout(params, "halves"), "halves", num_experts=3)
    )
    wrong_bias = ExpertArrays(
        gate_up_proj=params.gate_up_proj,
        down_proj=params.down_proj,
        gate_up_bias=np.zeros((2, 4)),
    )
    assert "params.gate_up_bias must have shape (E, 2*I) = (2, 8)" in raises(
        ShapeError, to_layout, wrong_bias, "split"
    )
    flat_1d = ExpertArrays(gate_up_proj=np.zeros(3), down_proj=np.zeros(3))
    assert "params.down_proj must have shape (E, H, I)" in raises(
        ShapeError, to_layout, flat_1d, "split"
    )


def test_messages_about_fields() -> None:
    params = draw()
    halves, split = to_layout(params, "halves"), to_layout(params, "split")
    two = "Layout 'split' has gate and up in arrays of their own."
    assert raises(ShapeError, from_layout, halves, "split") == (
        f"from_layout: arrays.gate_up_proj must be None, got an array. {two}"
    )
    assert raises(ShapeError, from_layout, split, "interleaved") == (
        "from_layout: arrays.gate_up_proj must be an array, got None. "
        "Layout 'interleaved' has gate and up in one array."
    )
    lone = ExpertArrays(
        gate_proj=split.gate_proj,
        up_proj=split.up_proj,
        down_proj=split.down_proj,
        up_bias=split.up_bias,
    )
    assert raises(ShapeError, from_layout, lone, "split") == (
        f"from_layout: arrays.gate_bias must be an array, got None. {two}"
    )
    plain = ExpertArrays(
        up_proj=split.up_proj, down_proj=split.down_proj, gate_bias=split.gate_bias
    )
    assert raises(ShapeError, from_layout, plain, "split") == (
        f"from_layout: arrays.gate_bias must be None, got an array. {two}"
    )


def test_messages_about_lists_and_dtypes() -> None:
    params = draw()
    split, lists = to_layout(params, "split"), to_layout(params, "per_expert")
    mixed = ExpertArrays(
        gate_proj=split.gate_proj.astype("f4"), up_proj=split.up_proj, down_proj=split.down_proj
    )
    assert raises(DTypeError, from_layout, mixed, "split") == (
        "from_layout: arrays.gate_proj must have dtype float64, got float32. The dtype is bound "
        "by arrays.up_proj. Convert one of them with astype."
    )

    def with_up(*up: np.ndarray) -> ExpertArrays:
        return ExpertArrays(gate_proj=lists.gate_proj, up_proj=up, down_proj=lists.down_proj)

    a, b = lists.up_proj
    assert raises(ShapeError, from_layout, with_up(a, b.T), "per_expert") == (
        "from_layout: arrays.up_proj[1] must have shape (4, 3), got (3, 4). "
        "It is bound by arrays.up_proj[0]."
    )
    assert raises(DTypeError, from_layout, with_up(a, b.astype("f4")), "per_expert") == (
        "from_layout: arrays.up_proj[1] must have dtype float64, got float32. The dtype is bound "
        "by arrays.up_proj[0]. Convert one of them with astype."
    )
    assert raises(ShapeError, from_layout, with_up(), "per_expert") == (
        "from_layout: arrays.up_proj must have one array for each expert, got none."
    )
    assert "arrays.up_proj must have shape (E, I, H) = (2, 4, 3), got (1, 4, 3)" in raises(
        ShapeError, from_layout, with_up(a), "per_expert"
    )
