"""Small runs for the tests of the trainer."""

from __future__ import annotations

import numpy as np

from npmoe.config import MoEConfig
from npmoe.models import LanguageConfig
from npmoe.training import (
    AdamWConfig,
    CharVocabulary,
    ScheduleConfig,
    TrainConfig,
    Trainer,
)
from npmoe.training.config import text_sha256
from npmoe.training.loop import single_threaded_blas

TEXT = "".join(np.random.default_rng(0).choice(list("abcdefg .\n"), 900))
IDS = CharVocabulary.from_text(TEXT).encode(TEXT)


def make_config(*, dense=False, plain=False, capacity=None, **options):
    """Return a tiny config; `plain` leaves out what differs between micro-batches."""
    moe = MoEConfig(
        hidden_size=16,
        intermediate_size=12,
        num_experts=4,
        top_k=2,
        renormalize=True,
        capacity_factor=capacity,
    )
    model = LanguageConfig(
        vocab_size=10,
        context_length=8,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        moe=moe,
        dropout=0.0 if plain else 0.1,
        load_balancing_coefficient=0.0 if plain else 0.01,
        z_loss_coefficient=0.0 if plain else 0.001,
    )
    noisy = not (dense or plain)
    return TrainConfig(
        model=model.dense_variant() if dense else model,
        optimizer=options.pop("optimizer", AdamWConfig()),
        schedule=ScheduleConfig(
            steps=40,
            learning_rate=1e-2,
            warmup_steps=4,
            router_noise_std=0.3 if noisy else 0.0,
            router_noise_steps=20 if noisy else 0,
        ),
        characters="".join(sorted(set(TEXT))),
        text_source="test",
        text_sha256=text_sha256(TEXT),
        **{"batch_size": 8, **options},
    )


def made(config, steps, *, workers=1, backend=None):
    with single_threaded_blas():
        run = Trainer(config, IDS, workers=workers, backend=backend)
        reports = [run.step() for _ in range(steps)]
        run.close()
    return run, reports


def copied(run):
    return {name: array.copy() for name, array in run.state().items()}


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert one[name].tobytes() == two[name].tobytes(), name
