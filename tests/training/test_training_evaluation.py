"""Validation: every character once, whatever the workers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from trainer_runs import IDS, made, make_config

from npmoe.models import init_language_params, language_forward
from npmoe.stats import max_violation
from npmoe.testing.bounds import gamma
from npmoe.training import (
    Trainer,
    evaluate,
)
from npmoe.training.loop import single_threaded_blas


@pytest.mark.parametrize("length", [9, 16, 17, 33, 90])
@pytest.mark.parametrize("dense", [False, True])
def test_evaluation_predicts_every_character_but_the_first_once(dense, length):
    config = make_config(dense=dense)
    cfg, ids = config.model, IDS[:length]
    params = init_language_params(cfg, 0, "float64")
    found = evaluate(params, cfg, ids, batch_size=3)
    losses, served = [], np.zeros((cfg.num_moe_layers, 10, 0 if dense else 4), int)
    for start in range(0, length - 1, 8):
        window = ids[start : min(start + 8, length - 1)]
        logits, saved = language_forward(window[None], params, cfg)
        for i, row in enumerate(logits[0]):
            losses.append(np.log(np.exp(row).sum()) - row[ids[start + i + 1]])
        for layer, block in enumerate(saved.blocks):
            if block.moe is not None:
                for v, experts in zip(window, block.moe.routing.topk_ids, strict=True):
                    served[layer, v, experts] += 1
    assert len(losses) == length - 1
    assert abs(found.loss - np.mean(losses)) <= gamma(2000, "float64") * max(losses)
    assert found.served.tolist() == served.tolist()
    assert found.dropped == 0
    counts = served.sum(axis=1)
    assert found.tokens_per_expert.tolist() == counts.tolist()
    want = np.mean([max_violation(c) for c in counts]) if len(counts) else 0.0
    assert found.load_imbalance == want


def test_evaluation_is_the_same_with_workers_and_ignores_noise_and_dropout():
    config = make_config()
    run, _ = made(config, 2, workers=2)
    one = evaluate(run.params, config.model, IDS[:200])
    noisy = dataclasses.replace(
        config.model, dropout=0.5, moe=dataclasses.replace(config.model.moe, router_noise_std=9.0)
    )
    with single_threaded_blas():
        run = Trainer(dataclasses.replace(config, model=noisy), IDS, workers=2)
        run.load_state(made(config, 2)[0].state(), 2)
        two = run.evaluate(IDS[:200])
        run.close()
    assert one.loss == two.loss
    assert np.array_equal(one.served, two.served)


def test_evaluation_has_its_own_capacity():
    config = make_config(capacity="0.5")
    params = init_language_params(config.model)
    tight = evaluate(params, config.model, IDS[:90])
    assert 0 < tight.drop_rate < 1
    assert tight.drop_rate == tight.dropped / (89 * 2 * 2)
    moe = dataclasses.replace(config.model.moe, eval_capacity_factor="4")
    roomy = evaluate(params, dataclasses.replace(config.model, moe=moe), IDS[:90])
    assert roomy.drop_rate == 0.0
    assert roomy.loss != tight.loss
