"""Mean negative log likelihood of targets under a softmax."""

from __future__ import annotations

import numpy as np

from npmoe._checks import check_integer_ids
from npmoe._typing import HostArray
from npmoe.errors import DTypeError, ShapeError
from npmoe.nn._inputs import Inputs, check_ids


def cross_entropy(
    logits: HostArray, targets: HostArray, mask: HostArray | None = None
) -> tuple[float, HostArray]:
    """Return the mean over positions of log(sum_v exp(logits[t, v])) - logits[t, targets[t]].

    Parameters
    ----------
    logits : (T, V) float array
    targets : (T,) integer array
        In [0, V) wherever the mask is True; not read elsewhere.
    mask : (T,) bool array, optional
        Which positions count; all by default.

    Returns
    -------
    loss : float
        In nats; 0 if no position counts.
    log_sum_exp : (T,) float64 array
        New. float64 for any dtype of logits: its rounding would be relative to the logits.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        Naming the first target out of range.

    Notes
    -----
    **Accuracy**: exponentials of logits minus their maximum, in the dtype of logits; all sums
    in float64. Stable for logits of any finite size.
    """
    counted, picked = _check("cross_entropy", logits, targets, mask)
    largest = logits.max(axis=1, keepdims=True)
    exps = np.exp(logits - largest)
    log_sum_exp = np.log(exps.sum(axis=1, dtype=np.float64))
    log_sum_exp += largest[:, 0]
    losses = log_sum_exp - logits.reshape(-1).take(picked)
    if mask is not None:
        losses = losses[mask]
    loss = float(losses.sum()) / counted if counted else 0.0
    return loss, log_sum_exp


def cross_entropy_backward(
    grad_loss: float,
    logits: HostArray,
    targets: HostArray,
    log_sum_exp: HostArray,
    mask: HostArray | None = None,
) -> HostArray:
    """Return grad_loss / count * (softmax(logits) - onehot(targets)) where the mask is True.

    Parameters
    ----------
    grad_loss : float
    logits, targets, mask
        As given to `cross_entropy`.
    log_sum_exp : (T,) float64 array
        As returned by it.

    Returns
    -------
    (T, V) float array
        New, with the dtype of logits; exact zeros in masked rows.

    Raises
    ------
    ShapeError, DTypeError, RangeError
    """
    counted, picked = _check("cross_entropy_backward", logits, targets, mask, log_sum_exp)
    grad_logits = np.empty(logits.shape, logits.dtype)
    np.subtract(logits, log_sum_exp[:, None], out=grad_logits, casting="same_kind")
    np.exp(grad_logits, out=grad_logits)
    grad_logits.reshape(-1)[picked] -= 1
    grad_logits *= float(grad_loss) / max(counted, 1)
    if mask is not None:
        grad_logits[~mask] = 0
    return grad_logits


def _check(
    function: str,
    logits: HostArray,
    targets: HostArray,
    mask: HostArray | None,
    log_sum_exp: HostArray | None = None,
) -> tuple[int, HostArray]:
    """Check all arrays; return how many positions count and the targets' places in logits."""
    Inputs(function).check("logits", logits, "T", "V")
    num_tokens, num_classes = logits.shape
    check_integer_ids(function, "targets", targets)
    for name, array in (("targets", targets), ("mask", mask), ("log_sum_exp", log_sum_exp)):
        if array is not None and array.shape != (num_tokens,):
            raise ShapeError(
                f"{function}: {name} must have shape (T,) = ({num_tokens},), got {array.shape}. "
                f"T is bound by logits {logits.shape}."
            )
    if mask is not None:
        if mask.dtype != bool:
            raise DTypeError(f"{function}: mask must have dtype bool, got {mask.dtype}.")
        targets = np.where(mask, targets, 0)
    check_ids(function, "targets", targets, num_classes)
    counted = num_tokens if mask is None else int(np.count_nonzero(mask))
    return counted, np.arange(num_tokens) * num_classes + targets
