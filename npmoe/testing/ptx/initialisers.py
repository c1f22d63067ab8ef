"""Initialisers of variables, to bytes."""

from __future__ import annotations

import struct

from npmoe.testing.ptx.errors import PtxSyntaxError
from npmoe.testing.ptx.scalar_types import size_of

__all__ = ["float_bits", "pack_initialiser"]


def float_bits(text: str, bits: int) -> int:
    """Give the bits of a floating-point constant: ``0f3F800000``, ``0d...``, or a decimal."""
    kind = text.lstrip("+-")[:2].lower()
    if kind in {"0f", "0d"}:
        negative = text.startswith("-")
        raw = int(text.lstrip("+-")[2:], 16)
        value = struct.unpack("<f", raw.to_bytes(4, "little"))[0] if kind == "0f" else None
        if value is None:
            value = struct.unpack("<d", raw.to_bytes(8, "little"))[0]
        if (kind == "0f") == (bits == 32) and not negative:
            return raw
        value = -value if negative else value
    else:
        value = float(text)
    return int.from_bytes(struct.pack("<f" if bits == 32 else "<d", value), "little")


def pack_initialiser(text: str, kind: str, line: int) -> bytes:
    """Give the bytes of ``{1, 2, {3, 4}}`` or of a single constant, of PTX type `kind`."""
    out = bytearray()
    size = size_of(kind)
    for word in text.replace("{", " ").replace("}", " ").replace(",", " ").split():
        try:
            if kind in {"f32", "f64"}:
                value = float_bits(word, size * 8)
            else:
                value = int(word.rstrip("U"), 0)
        except ValueError:
            raise PtxSyntaxError(
                f"parse: the initialiser '{word}' at PTX line {line} must be a number; "
                "addresses of other variables are not supported."
            ) from None
        out += (value % (1 << (8 * size))).to_bytes(size, "little")
    return bytes(out)
