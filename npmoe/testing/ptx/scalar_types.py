"""PTX scalar types and the C++ types that stand for them."""

from __future__ import annotations

__all__ = ["float_type", "is_float", "is_signed", "register_type", "size_of", "value_type"]

_REGISTER = {1: "u8", 2: "u16", 4: "u32", 8: "u64", 16: "u128"}
# Types that name two values in one register, or a format with its own layout.
_PACKED = {"f16x2": 4, "bf16x2": 4, "bf16": 2, "tf32": 4, "pred": 1, "u16x2": 4, "s16x2": 4}


def size_of(name: str) -> int:
    """Bytes of a value of type `name` (without the dot)."""
    return _PACKED[name] if name in _PACKED else int(name[1:]) // 8


def register_type(name: str) -> str:
    """Give the C++ type that holds a register declared with `name`."""
    return _REGISTER[size_of(name)]


def is_signed(name: str) -> bool:
    """Whether the type is a signed integer."""
    return name[0] == "s"


def is_float(name: str) -> bool:
    """Whether the type is f32 or f64, which C++ has."""
    return name in {"f32", "f64"}


def float_type(name: str) -> bool:
    """Whether the type is any floating-point type."""
    return name[0] == "f" or name.startswith(("bf16", "tf32"))


def value_type(name: str) -> str:
    """Give the C++ type to compute with: u32, s16, f32, ...; the half types are their bits."""
    if is_float(name):
        return name
    return f"s{size_of(name) * 8}" if is_signed(name) else f"u{size_of(name) * 8}"
