"""Numbers with error radii: what any correct program may compute instead of the exact value.

A `Ball` holds a float64 middle m and a radius r. The claim is: a program that rounds as `Model`
says, in any order of summation, gets a value within r of m. Each operation adds what it passes
on from its operands and what it rounds itself::

    x.w      |x| r_w + r_x (|w| + r_w)  +  gamma_n (|x| + r_x).(|w| + r_w)
    f(z)     L r_z  +  c u g(|z| + r_z)         f has slopes up to L and is computed to c u g

The middles are rounded too, and so is the float64 reference that a test compares with. Radii
are sums of products of non-negative powers of u without a constant term, so r(u1) + r(u2) <=
r(u1 + u2): one radius for the sum of the unit roundoffs covers program, middle and reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npmoe._typing import HostArray
from npmoe.testing.bounds import unit_roundoff

# NumPy's vectorised exp and tanh may err by 4 ulp, that is 8 u; a chain of them and a few more.
ELEMENTARY = 16.0
# What operands of tensor cores may be rounded to: unit roundoff, and the error of one underflow.
OPERANDS = {
    "tf32": (2.0**-11, 2.0**-126),
    "bfloat16": (2.0**-8, 2.0**-126),
    "float16": (2.0**-11, 2.0**-24),
}


@dataclass(frozen=True, slots=True)
class Model:
    """Unit roundoff, and the largest absolute error of one underflow (flush to zero allowed)."""

    u: float
    tiny: float

    @classmethod
    def of(cls, dtype: npt.DTypeLike) -> Model:
        """Return the model of programs in `dtype`, of the middle and of a float64 reference."""
        wide = unit_roundoff(np.float64)
        return cls(unit_roundoff(dtype) + 3.0 * wide, 4.0 * float(np.finfo(dtype).tiny))

    @classmethod
    def of_operands(cls, name: str) -> Model:
        """Return the rounding of a product's operands: one of OPERANDS."""
        return cls(*OPERANDS[name])

    def gamma(self, n: int) -> float:
        """Return gamma_n for this u; infinite where it says nothing."""
        return n * self.u / (1.0 - n * self.u) if n * self.u < 1.0 else math.inf

    def rounding(self, size: HostArray, n: int) -> HostArray:
        """Return the error of n roundings of numbers up to `size`; zero and infinity are exact."""
        rounded = (size > 0.0) & (size < np.inf)
        return np.where(rounded, self.gamma(n) * size + n * self.tiny, 0.0)


@dataclass(frozen=True, slots=True)
class Ball:
    """Middle `mid` and radius `rad`, float64 arrays of one shape."""

    mid: HostArray
    rad: HostArray
    model: Model

    @classmethod
    def exact(cls, value: HostArray, model: Model) -> Ball:
        """Return a ball around given data, which both sides read without error."""
        mid = np.asarray(value, dtype=np.float64)
        return cls(mid, np.zeros(mid.shape), model)

    @classmethod
    def drawn(cls, value: HostArray | float, model: Model) -> Ball:
        """Return a ball around float64 numbers that the program rounds to its dtype once."""
        return cls.exact(np.asarray(value), model).cast(model)

    @property
    def size(self) -> HostArray:
        """Return the largest absolute value inside."""
        return np.asarray(np.abs(self.mid) + self.rad)

    @property
    def T(self) -> Ball:
        """Return the transpose."""
        return Ball(self.mid.T, self.rad.T, self.model)

    def __getitem__(self, index: Any) -> Ball:
        return Ball(self.mid[index], self.rad[index], self.model)

    def rounded(self, mid: HostArray, rad: HostArray, n: int = 2) -> Ball:
        """Return a new ball with the error of n more roundings (2: reciprocals are allowed)."""
        return Ball(mid, rad + self.model.rounding(np.abs(mid) + rad, n), self.model)

    def cast(self, model: Model) -> Ball:
        """Return the ball after a conversion to the dtype of `model`."""
        return Ball(self.mid, self.rad + model.rounding(self.size, 1), model)

    def __add__(self, other: Ball) -> Ball:
        return self.rounded(self.mid + other.mid, self.rad + other.rad)

    def __sub__(self, other: Ball) -> Ball:
        return self.rounded(self.mid - other.mid, self.rad + other.rad)

    def __mul__(self, other: Ball) -> Ball:
        passed = np.abs(self.mid) * other.rad + self.rad * other.size
        return self.rounded(self.mid * other.mid, passed)

    def __truediv__(self, other: Ball) -> Ball:
        """Divide; where the divisor is exactly 0 the quotient is 0, as for an empty sum."""
        zero = other.size == 0.0
        safe = np.where(zero, 1.0, other.mid)
        least = np.where(zero, 1.0, np.maximum(np.abs(other.mid) - other.rad, 0.0))
        mid = np.where(zero, 0.0, self.mid / safe)
        with np.errstate(divide="ignore", invalid="ignore"):
            passed = (self.rad + np.abs(mid) * other.rad) / least
        passed = np.where(zero, 0.0, np.where(least > 0.0, passed, np.inf))
        return self.rounded(mid, passed)

    def where(self, condition: HostArray) -> Ball:
        """Return the ball where `condition` holds, and exact zeros elsewhere."""
        return Ball(np.where(condition, self.mid, 0), np.where(condition, self.rad, 0), self.model)

    def sum(self, axis: int, *, keepdims: bool = False) -> Ball:
        """Sum along an axis, in any order."""
        mid, rad = self.mid.sum(axis, keepdims=keepdims), self.rad.sum(axis, keepdims=keepdims)
        size = self.size.sum(axis, keepdims=keepdims)
        return Ball(mid, rad + self.model.rounding(size, self.mid.shape[axis]), self.model)

    def matmul(self, other: Ball, n: int) -> Ball:
        """Return the matrix product; n is the number of roundings on each term's way."""
        rad = np.abs(self.mid) @ other.rad + self.rad @ other.size
        rad = rad + self.model.rounding(self.size @ other.size, n)
        return Ball(self.mid @ other.mid, rad, self.model)

    def sqrt(self) -> Ball:
        """Return the square root; the part of the ball below 0 counts as 0."""
        root, lowest = np.sqrt(self.mid), np.sqrt(np.maximum(self.mid - self.rad, 0.0))
        safe = np.where(self.rad > 0.0, root + lowest, 1.0)
        # m - (m - r) = (sqrt(m) - lowest)(sqrt(m) + lowest); above m the root grows more slowly.
        inside = self.rad / np.where(safe > 0.0, safe, 1.0)
        rad = np.where(self.rad <= self.mid, inside, np.sqrt(self.mid + self.rad))
        return self.rounded(root, rad)

    def maximum(self, bound: float) -> Ball:
        """Return the larger of the ball and a number, which the program may have rounded."""
        near = self.mid - self.rad <= bound * (1.0 + self.model.u)
        rad = self.rad + np.where(near, self.model.u * bound, 0.0)
        return Ball(np.maximum(self.mid, bound), rad, self.model)

    def apply(
        self,
        function: Callable[[HostArray], HostArray],
        slope: float,
        rounding: Callable[[HostArray], HostArray],
    ) -> Ball:
        """Apply a function of slopes up to `slope`, computed to ELEMENTARY * u * rounding(size)."""
        error = ELEMENTARY * self.model.u * rounding(self.size) + self.model.tiny
        return Ball(function(self.mid), slope * self.rad + error, self.model)

    def apply_positive(
        self, function: Callable[[HostArray], HostArray], slope: float, n: int
    ) -> Ball:
        """Apply a positive function whose logarithm has slopes up to `slope`.

        It is computed to a relative error of n * ELEMENTARY * u. Where it is 0 in float64, it is
        0 in every program.
        """
        mid = function(self.mid)
        with np.errstate(over="ignore"):
            relative = np.expm1(slope * self.rad + n * ELEMENTARY * self.model.u)
        return Ball(mid, np.where(mid > 0.0, mid * relative + self.model.tiny, 0.0), self.model)


def each(function: Callable[[float], float]) -> Callable[[HostArray], HostArray]:
    """Return `function` applied to every element of an array."""
    return lambda values: np.array([function(v) for v in values.flat]).reshape(values.shape)


def softmax(logits: Ball) -> Ball:
    """Return the softmax over the last axis; a logit of -inf is exact, and its share 0.

    With errors d in the logits, each share lies within a factor exp(+-2d). The subtraction of the
    maximum m rounds by u (m - x), which exp turns into a relative error; then come exp itself, the
    sum of E positive terms, and the division.
    """
    model = logits.model
    top = logits.mid.max(axis=-1, keepdims=True, initial=-np.inf)
    depth = np.where(np.isneginf(logits.mid), 0.0, np.where(np.isfinite(top), top, 0) - logits.mid)
    powers = np.where(np.isneginf(logits.mid), 0.0, np.exp(-depth))
    total = powers.sum(axis=-1, keepdims=True)
    mid = powers / np.where(total > 0.0, total, 1.0)
    shift = 2.0 * logits.rad.max(axis=-1, keepdims=True, initial=0.0)
    depths = depth + 2.0 * (mid * depth).sum(axis=-1, keepdims=True)
    rounding = model.u * (depths + shift) + 2.0 * ELEMENTARY * model.u
    with np.errstate(over="ignore"):
        relative = np.expm1(shift + rounding + model.gamma(logits.mid.shape[-1] + 2))
    relative = np.where(powers > 0.0, relative, 0.0)  # which may be infinite elsewhere
    rad = np.where(powers > 0.0, mid * relative + model.tiny, 0.0)
    return Ball(mid, rad, model)
