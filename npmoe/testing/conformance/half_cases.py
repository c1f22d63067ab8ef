"""Expert weights in half precision: how they are drawn, and cases that show how they are read.

In the cases of an expert core each gate is 64, where silu(g) == g and silu'(g) == 1 exactly, and
each token has an expert of its own, so that selecting matrices leave sums of one term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.testing.conformance.case import Case, Effort
from npmoe.testing.conformance.draw import draw_values

_GATE = 64.0
_SMALL = 2.0**-8  # so that 1e38 stays finite on its way
# What must be among the drawn: float16's subnormals and largest, bfloat16 beyond float16.
_NUMBERS = {
    "float16": (2.0**-24, 1023 * 2.0**-24, 2.0**-14, 65504.0, 1 + 2.0**-10),
    "bfloat16": (1e38, 3.3895e38, 2.0**-90, 1e-20, 1 + 2.0**-7),
}
# Exponents of patterns: all finite float16; bfloat16 whose products do not underflow.
_PATTERNS = {"float16": (10, 0, 31), "bfloat16": (7, 127 - 90, 255)}
# float16's subnormals and its upper end; bfloat16 outside float16's range.
_SCALES = {"float16": (0, -17, 12), "bfloat16": (0, -40, 40)}
# Builds the case of a verb or an expert core: (verb, arrays, exact).
Build = Callable[[str, dict[str, HostArray], bool], Case]


def scale_of(half: str | None, index: int) -> int:
    """Return a power of two for expert weights, of three in turn; 0 for float weights."""
    return 0 if half is None else _SCALES[half][index % 3]


def round_weights(values: HostArray, half: str | None, scale: int = 0) -> HostArray:
    """Return expert weights times 2**scale in half precision; the same array if half is None."""
    return values if half is None else np.ldexp(values, scale).astype(half)


def halve(given: dict[str, Any], half: str | None, index: int) -> dict[str, Any]:
    """Return the arrays of an expert core with weights in half precision, of several sizes.

    What they are multiplied by has the reciprocal size, so that activations are as before.
    """
    if half is None:
        return given
    scale = scale_of(half, index)
    matrices = {n: round_weights(given[n], half, scale) for n in ("gate_up_proj", "down_proj")}
    rows = {n: np.ldexp(given[n], -scale) for n in ("grad_output", "hidden_states")}
    return given | rows | matrices


def draw_patterns(rng: np.random.Generator, shape: tuple[int, ...], half: str) -> HostArray:
    """Return finite numbers of all sizes that half precision has, the outermost among them."""
    mantissa, least, beyond = _PATTERNS[half]
    bits = rng.integers(least << mantissa, beyond << mantissa, shape)
    # A quarter with the least exponent, which is that of float16's subnormals.
    source = rng.integers(4, size=shape)
    bits = np.where(source == 0, (least << mantissa) + bits % (1 << mantissa), bits)
    drawn = bits.astype(np.uint16).view(half)
    drawn = np.where(source > 2, rng.choice(_NUMBERS[half], shape).astype(half), drawn)
    return np.where(rng.random(shape) < 0.5, -drawn, drawn)


def exact_reads(
    rng: np.random.Generator, effort: Effort, verbs: tuple[str, ...], build: Build
) -> Iterator[Case]:
    """Yield weights of every size that come out one by one, times a power of two."""

    def weights(*shape: int) -> HostArray:
        return draw_patterns(rng, shape, str(effort.half))

    for i, tokens in enumerate(_growing(effort)):
        inner = 1 + int(rng.integers(1 + 2 * tokens))
        hidden = inner + 1 + int(rng.integers(3))
        for verb in verbs:
            if verb == "grouped_gemm":
                rows = {f"rows{n}": _one_hot(rng, tokens, w) for n, w in enumerate((hidden, inner))}
                yield build(verb, _gemm(rows, weights(tokens, inner, hidden)), True)
                continue
            given = _selecting(rng, tokens, hidden, inner, effort)
            given["hidden_states"][:, 1:] = _SMALL * _one_hot(rng, tokens, inner, hidden - 1)
            given["grad_output"] = _SMALL * _one_hot(rng, tokens, hidden)
            if i % 2 == 0:
                given["gate_up_proj"][:, inner:, 1:] = weights(tokens, inner, hidden - 1)
            else:
                given["down_proj"] = weights(tokens, hidden, inner)
            yield build(verb, given, True)


def selections(
    rng: np.random.Generator, effort: Effort, verbs: tuple[str, ...], build: Build
) -> Iterator[Case]:
    """Yield weights that select: what comes out are the bits of the activations."""
    for tokens in _growing(effort):
        inner = 1 + int(rng.integers(1 + 2 * tokens))
        hidden = inner + 1 + int(rng.integers(3))
        for verb in verbs:
            if verb == "grouped_gemm":
                rows = {
                    f"rows{n}": draw_values(rng, (tokens, w), "normal", effort.dtype)
                    for n, w in enumerate((hidden, inner))
                }
                signs = _signs(rng, (tokens, inner, hidden)) * np.eye(inner, hidden)
                yield build(verb, _gemm(rows, signs.astype(effort.half)), True)
            else:
                given = _selecting(rng, tokens, hidden, inner, effort)
                # The gradient of a gate is a product, which rounds.
                yield build(verb, given, False)


def long_sums(
    rng: np.random.Generator, effort: Effort, verbs: tuple[str, ...], build: Build
) -> Iterator[Case]:
    """Yield sums of integers that reach beyond 2**11: exact in float32, and in no half precision.

    All partial sums are multiples of what divides 2**24 of it.
    """
    inner, hidden = 9, 129
    for tokens in _growing(effort):
        for verb in verbs:
            if verb == "grouped_gemm":
                rows = {
                    f"rows{n}": rng.integers(1, 32, (tokens, hidden)).astype(effort.dtype)
                    for n in (0, 1)
                }
                ones = rng.integers(1, 3, (tokens, hidden, hidden))
                yield build(verb, _gemm(rows, ones.astype(effort.half)), True)
                continue
            given = _selecting(rng, tokens, hidden, inner, effort)
            given["hidden_states"][:, 1:] = rng.integers(0, 32, (tokens, hidden - 1))
            given["grad_output"][:] = rng.integers(-1, 2, (tokens, hidden))
            given["topk_weights"][:] = 1.0
            given["gate_up_proj"][:, inner:, 1:] = rng.integers(1, 3, (tokens, inner, hidden - 1))
            given["down_proj"][:] = 0.0
            given["down_proj"][:, :4] = rng.integers(0, 2, (tokens, 4, inner))
            yield build(verb, given, True)


def _growing(effort: Effort) -> Iterator[int]:
    """Yield numbers of tokens, and so of experts."""
    yield from (1 + i // 2 for i in range(4 if effort.quick else 8))


def _gemm(rows: dict[str, HostArray], weight: HostArray) -> dict[str, HostArray]:
    """Return the arrays of a grouped product: a row for each expert, no bias to add."""
    bias = np.zeros(weight.shape[:2], rows["rows0"].dtype)
    ids = np.arange(len(weight), dtype=np.int32)[:, None]
    return rows | {"weight": weight, "bias": bias, "topk_ids": ids}


def _selecting(
    rng: np.random.Generator, tokens: int, hidden: int, inner: int, effort: Effort
) -> dict[str, HostArray]:
    """Return an expert core whose up half reads x[1:], and whose output is what it read."""
    gate_up = np.zeros((tokens, 2 * inner, hidden))
    gate_up[:, :inner, 0] = _GATE
    gate_up[:, inner:, 1:] = _signs(rng, (tokens, inner, hidden - 1)) * np.eye(inner, hidden - 1)
    down = _signs(rng, (tokens, hidden, inner)) * np.eye(hidden, inner)
    x = draw_values(rng, (tokens, hidden), "normal", effort.dtype)
    x[:, 0] = 1.0
    return {
        "grad_output": draw_values(rng, (tokens, hidden), "normal", effort.dtype),
        "hidden_states": x,
        "gate_up_proj": gate_up.astype(effort.half),
        "down_proj": down.astype(effort.half),
        "topk_weights": rng.choice([0.5, 1.0, 2.0], (tokens, 1)).astype(effort.dtype),
        "topk_ids": rng.permutation(tokens).astype(np.int32)[:, None],
    }


def _signs(rng: np.random.Generator, shape: tuple[int, ...]) -> HostArray:
    return rng.choice([-1.0, 1.0], shape)


def _one_hot(rng: np.random.Generator, rows: int, width: int, room: int | None = None) -> HostArray:
    """Return rows with one entry of 1 or -1 among the first `width`."""
    found = np.zeros((rows, width if room is None else room), np.float32)
    found[np.arange(rows), rng.integers(width, size=rows)] = _signs(rng, (rows,))
    return found
