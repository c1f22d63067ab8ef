"""Balancing by a selection bias."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from trainer_runs import IDS, assert_same_bits, copied, made, make_config

from npmoe.errors import RangeError, UnsupportedError
from npmoe.models import init_language_params
from npmoe.training import (
    Trainer,
    evaluate,
)
from npmoe.training.loop import single_threaded_blas


def test_a_perfectly_balanced_load_counts_as_zero():
    ids = np.zeros(17, np.int32)
    config = make_config()
    found = evaluate(init_language_params(config.model), config.model, ids)
    balanced = dataclasses.replace(found, served=np.full((2, 10, 4), 3))
    assert balanced.load_imbalance == 0.0
    # One input character only: two of four experts take everything.
    skewed = np.zeros((1, 10, 4), int)
    skewed[0, 0, :2] = 16
    assert dataclasses.replace(found, served=skewed).load_imbalance == 1.0


# --- config


def biased(rate=0.01, **options):
    """Return a config balanced by a selection bias alone."""
    config = make_config(plain=True, **options)
    moe = dataclasses.replace(config.model.moe, selection_bias=True)
    model = dataclasses.replace(config.model, moe=moe)
    return dataclasses.replace(config, model=model, selection_bias_rate=rate)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_selection_bias_moves_against_the_load_of_every_step(workers):
    """Spelled out: a rate up for experts below the mean, down above, by all parts of the step."""
    config = biased(micro_batches=4)
    want = np.zeros((2, 4), np.float32)
    with single_threaded_blas():
        run = Trainer(config, IDS, workers=workers)
        for _ in range(6):
            report = run.step()
            for layer, counts in enumerate(report.tokens_per_expert):
                assert counts.sum() == 8 * 8 * 2
                for expert, count in enumerate(counts):
                    want[layer, expert] += np.float32(0.01 * np.sign(counts.mean() - count))
            found = [block.feed_forward.selection_bias for block in run.params.blocks]
            assert np.array_equal(np.array(found), want)
            range_now = np.array([(b.min(), b.max()) for b in want], np.float64)
            assert np.array_equal(report.selection_bias_range, range_now)
        moments = run.optimizer.state()
        run.close()
    assert np.abs(want).max() > 0.01
    names = [name for name in run.state() if name.endswith("selection_bias")]
    assert len(names) == 2
    groups = [g for g in run.optimizer.groups if g.name.endswith("selection_bias")]
    assert [g.frozen for g in groups] == [True, True]
    assert not any(moments.m[g.start : g.stop].any() for g in groups)


def test_the_selection_bias_is_part_of_the_state():
    config = biased(rate=0.05)
    run, _ = made(config, 4)
    state = copied(run)
    with single_threaded_blas():
        after = [run.step() for _ in range(3)]
        other = Trainer(config, IDS, workers=2)
        other.load_state(state, 4)
        again = [other.step() for _ in range(3)]
        other.close()
    assert repr(after) == repr(again)
    assert_same_bits(run.state(), other.state())


def test_a_selection_bias_balances():
    """Two experts that begin with almost every choice lose them, and keep them without."""
    loads = []
    for rate in (0.01, 1e-9):
        with single_threaded_blas():
            run = Trainer(biased(rate=rate), IDS)
            for block in run.params.blocks:
                block.feed_forward.selection_bias[:2] = 0.25
            imbalances = [run.step().load_imbalance for _ in range(40)]
            run.close()
        loads.append(np.mean(imbalances[-8:]))
    assert loads[0] < 0.5
    assert loads[1] > 0.8


def test_a_selection_bias_and_its_rate_come_together():
    config = biased()
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RangeError) as caught:
            dataclasses.replace(config, selection_bias_rate=wrong)
        assert str(caught.value) == (
            "TrainConfig: selection_bias_rate must be positive with model.moe.selection_bias=True "
            f"and 0 without, got {wrong} with True. The bias moves by it after every step."
        )
    for dense in (False, True):
        with pytest.raises(RangeError, match=r"selection_bias_rate must be .* 0\.1 with False"):
            make_config(dense=dense, selection_bias_rate=0.1)


def test_identity_experts_are_not_balanced_by_a_bias():
    config = biased()
    moe = dataclasses.replace(config.model.moe, num_identity_experts=1)
    with pytest.raises(UnsupportedError) as caught:
        dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    assert str(caught.value) == (
        "TrainConfig: model.moe.num_identity_experts must be 0 with selection_bias=True, got 1. "
        "Balancing counts the experts that compute."
    )
