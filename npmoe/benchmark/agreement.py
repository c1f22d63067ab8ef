"""Whether an implementation computes the same layer as the NumPy backend, on the case itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from npmoe._typing import HostArray
from npmoe.benchmark.cases import Case, Load
from npmoe.benchmark.result import Agreement
from npmoe.params import MoEGrads
from npmoe.testing.balls import OPERANDS
from npmoe.testing.bounds import unit_roundoff

_PROBES = 4
_CONFIDENCE = 2.0
# Sums of a step depend on one another: logits, two products, their two gradients.
_DEPTH = {"forward": 2.0, "forward+backward": 4.0}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fingerprint:
    """Results reduced to rows that are compared one by one: (name, (n, m) array)."""

    rows: dict[str, HostArray]


def fingerprint_output(output: HostArray) -> Fingerprint:
    """Keep the output, a row for every token."""
    return Fingerprint(rows={"output": np.array(output)})


def fingerprint_gradients(grads: MoEGrads) -> Fingerprint:
    """Keep the small gradients, and four random projections of every expert's matrices.

    With random signs u and v, ``u^T D v`` has the Frobenius norm of D as its root mean square, so
    that projections of a difference tell its size without a second copy of all weights.
    """
    return Fingerprint(
        rows={
            "gradient of hidden_states": np.array(grads.hidden_states),
            "gradient of router_weight": np.array(grads.router_weight),
            "gradient of gate_up_proj": _project(grads.gate_up_proj),
            "gradient of down_proj": _project(grads.down_proj),
        }
    )


def _project(weights: HostArray) -> HostArray:
    """(E, M, N) -> (E, probes)."""
    E, M, N = weights.shape
    rng = np.random.default_rng(2)
    left, right = (rng.integers(0, 2, (n, _PROBES)).astype(weights.dtype) * 2 - 1 for n in (M, N))
    products = (weights.reshape(E * M, N) @ right).reshape(E, M, _PROBES)
    return np.asarray(np.einsum("emp,mp->ep", products, left))


def agreement_bound(
    case: Case, load: Load, direction: str, rounding: str, operands: str | None = None
) -> float:
    """Return the relative difference allowed between two correct implementations.

    Twice (for both of them) u*sqrt(n) times the number of products that follow one another, where
    n is the longest sum; and a factor of 2, since rounding errors of random signs stay below
    u*sqrt(n) only in the mean. Norms of rows have no tails that would need more. `operands` that
    are rounded before they enter a product add 2u of theirs, twice for the same reason, per
    product: errors of the terms grow as their sum does, not with n.

    References
    ----------
    Higham and Mary 2019, "A New Approach to Probabilistic Rounding Error Analysis".
    """
    n = max(case.hidden_size, case.intermediate_size, load.largest)
    sums = 2 * math.sqrt(n) * unit_roundoff(rounding)
    entering = 0.0 if operands is None else 2 * OPERANDS[operands][0]
    return _CONFIDENCE * _DEPTH[direction] * (sums + entering)


def compare(found: Fingerprint, expected: Fingerprint, bound: float) -> Agreement:
    """Return the worst row: the norm of its difference, relative to its norm.

    Rows smaller than the root mean square of all rows are held to that.
    """
    worst, where = -1.0, ""
    for name, want in expected.rows.items():
        got = found.rows[name]
        if got.shape != want.shape:
            return Agreement(difference=math.inf, bound=bound, where=f"shape of {name}")
        wide = want.astype(np.float64)
        norms = np.linalg.norm(wide, axis=1)
        least = math.sqrt(float(np.mean(norms**2))) or 1.0
        errors = np.linalg.norm(got.astype(np.float64) - wide, axis=1) / np.maximum(norms, least)
        error = float(np.max(np.where(np.isnan(errors), math.inf, errors)))
        if error > worst:
            worst, where = error, name
    return Agreement(difference=worst, bound=bound, where=where)
