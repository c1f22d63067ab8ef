import math

import numpy as np
import pytest

from npmoe.errors import DTypeError, RangeError, ShapeError
from npmoe.finite_differences import gradcheck
from npmoe.nn import cross_entropy, cross_entropy_backward
from npmoe.testing.bounds import assert_within, gamma

RNG = np.random.default_rng(0)
MASK = np.array([True, False, True, True, False, True])


def drawn(dtype="float64", scale=1.0):
    logits = (scale * RNG.standard_normal((6, 5))).astype(dtype)
    return logits, RNG.integers(0, 5, 6)


def by_definition(logits, targets, mask):
    """Return loss, log-sum-exps and gradient with exact sums of float64 terms."""
    logs, losses, grads = [], [], np.zeros(logits.shape)
    for t, row in enumerate(logits.astype("f8").tolist()):
        top = max(row)
        total = math.fsum(math.exp(v - top) for v in row)
        logs.append(top + math.log(total))
        if mask is None or mask[t]:
            losses.append(logs[t] - row[targets[t]])
            grads[t] = [math.exp(v - top) / total - (targets[t] == i) for i, v in enumerate(row)]
    return math.fsum(losses) / max(len(losses), 1), np.array(logs), grads / max(len(losses), 1)


@pytest.mark.parametrize("mask", [None, MASK])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_equals_the_definition(dtype, scale, mask):
    logits, targets = drawn(dtype, scale)
    loss, logs = cross_entropy(logits, targets, mask)
    grad = cross_entropy_backward(2.0, logits, targets, logs, mask)
    want_loss, want_logs, want_grad = by_definition(logits, targets, mask)
    assert isinstance(loss, float)
    assert logs.dtype == np.float64
    assert grad.dtype == dtype
    # exp errs by 4 ulp, and a difference d of logits by u d, which exp makes relative. In the
    # backward the difference has the error of the logarithm, too.
    spread = float(np.ptp(logits.astype("f8"), axis=1).max())
    largest = float(np.abs(logits).max())
    relative = gamma(12, dtype) + np.minimum(spread, 100.0) * gamma(1, dtype)
    log_bound = relative + gamma(8, "f8") * (largest + 1)
    assert_within(logs, want_logs, log_bound, "log_sum_exp")
    assert_within(np.float64(loss), np.float64(want_loss), 2 * log_bound, "loss")
    bound = (2 * relative + log_bound) * 2 / (6 if mask is None else 4)
    assert_within(grad, 2 * want_grad, bound, "grad_logits")
    assert bound < 0.01 * np.abs(want_grad).max()


@pytest.mark.parametrize("mask", [None, MASK])
def test_gradients(mask):
    logits, targets = drawn()

    def f_backward(grad_loss, logits):
        logs = cross_entropy(logits, targets, mask)[1]
        return cross_entropy_backward(grad_loss, logits, targets, logs, mask)

    report = gradcheck(lambda x: cross_entropy(x, targets, mask)[0], f_backward, [logits])
    assert report.elementwise["args[0]"] < 1e-8


def test_equal_logits_cost_the_logarithm_of_the_classes():
    logits = np.full((3, 7), 5.0)
    loss, logs = cross_entropy(logits, np.array([0, 3, 6]))
    assert_within(np.float64(loss), np.float64(math.log(7)), gamma(8, "f8") * 12, "loss")
    grad = cross_entropy_backward(1.0, logits, np.array([0, 3, 6]), logs)
    assert_within(grad[1, 3], np.float64((1 / 7 - 1) / 3), gamma(20, "f8") * 4, "grad")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_logits_of_ten_thousand_are_exact(dtype):
    logits = np.array([[1e4, -1e4], [1e4, -1e4], [-1e4, -1e4 - 1000]], dtype)
    targets = np.array([0, 1, 0])
    loss, logs = cross_entropy(logits, targets)
    assert loss == 2e4 / 3
    grad = cross_entropy_backward(3.0, logits, targets, logs)
    assert grad.tolist() == [[0, 0], [1, -1], [0, 0]]


def test_masked_rows_are_not_read():
    logits, targets = drawn()
    want_loss, want_logs = cross_entropy(logits[MASK], targets[MASK])
    want_grad = cross_entropy_backward(1.0, logits[MASK], targets[MASK], want_logs)
    logits[~MASK] = np.nan
    targets[~MASK] = -100
    loss, logs = cross_entropy(logits, targets, MASK)
    grad = cross_entropy_backward(1.0, logits, targets, logs, MASK)
    assert loss == want_loss
    assert (grad[MASK] == want_grad).all()
    assert (grad[~MASK] == 0).all()


@pytest.mark.parametrize("rows", [6, 0])
def test_nothing_to_count(rows):
    logits, targets = drawn("float32")
    logits, targets, mask = logits[:rows], targets[:rows], np.zeros(rows, bool)
    loss, logs = cross_entropy(logits, targets, mask)
    assert loss == 0.0
    grad = cross_entropy_backward(1.0, logits, targets, logs, mask)
    assert grad.shape == logits.shape
    assert grad.dtype == np.float32
    assert (grad == 0).all()


def test_float32_losses_are_summed_in_float64():
    """2**25 in float32 steps of 4 would lose the small losses."""
    logits = np.array([[0.0, 2.0**25]] + [[0.0, 0.0]] * 64, "f4")
    loss, _ = cross_entropy(logits, np.zeros(65, int))
    want = (2.0**25 + 64 * math.log(2)) / 65
    assert_within(np.float64(loss), np.float64(want), gamma(70, "f8") * want, "loss")


def test_inputs_are_left_alone():
    logits, targets = drawn()
    logs = cross_entropy(logits, targets, MASK)[1]
    for array in (logits, targets, logs):
        array.flags.writeable = False
    cross_entropy(logits, targets, MASK)
    cross_entropy_backward(1.0, logits, targets, logs, MASK)


def test_bad_inputs():
    logits, targets = drawn()
    bad = targets.copy()
    bad[3] = 5
    with pytest.raises(
        RangeError, match=r"^cross_entropy: targets must lie in \[0, 5\), got 5 at \(3,\)\.$"
    ):
        cross_entropy(logits, bad)
    with pytest.raises(RangeError, match=r"^cross_entropy_backward: targets must lie in"):
        cross_entropy_backward(1.0, logits, bad, np.zeros(6))
    with pytest.raises(
        ShapeError,
        match=r"^cross_entropy: targets must have shape \(T,\) = \(6,\), got \(5,\)\. "
        r"T is bound by logits \(6, 5\)\.$",
    ):
        cross_entropy(logits, targets[1:])
    with pytest.raises(ShapeError, match=r"^cross_entropy: mask must have shape \(T,\) = \(6,\)"):
        cross_entropy(logits, targets, MASK[1:])
    with pytest.raises(ShapeError, match=r"^cross_entropy_backward: log_sum_exp must have shape"):
        cross_entropy_backward(1.0, logits, targets, np.zeros((6, 1)))
    with pytest.raises(ShapeError, match=r"^cross_entropy: logits must have shape \(T, V\)"):
        cross_entropy(logits[None], targets)
    with pytest.raises(
        DTypeError, match=r"^cross_entropy: mask must have dtype bool, got int64\.$"
    ):
        cross_entropy(logits, targets, MASK.astype(int))
    with pytest.raises(DTypeError, match=r"^cross_entropy: targets must be an integer array"):
        cross_entropy(logits, targets.astype(float))
