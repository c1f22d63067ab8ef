"""The default run: sizes, heads, and how many steps fit into a budget."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from npmoe.errors import RangeError
from npmoe.models import init_language_params
from npmoe.training import (
    Trainer,
    language_recipe,
    recipe,
    steps_for_seconds,
    with_options,
    with_steps,
)

TEXT = "the quick brown fox jumps over the lazy dog. " * 60


def tiny(**options):
    sizes = {"hidden_size": 32, "num_layers": 1, "context_length": 16, "batch_size": 4}
    return language_recipe(TEXT, "test", **{**sizes, "num_experts": 4, **options})


def test_the_default_run():
    config = language_recipe(TEXT, "test")
    assert (config.model.moe.num_experts, config.model.moe.top_k) == (8, 2)
    assert config.model.num_heads == config.model.hidden_size // 32
    assert config.characters == "".join(sorted(set(TEXT)))
    assert config.schedule.warmup_steps == round(config.steps * 0.05)
    dense = language_recipe(TEXT, "test", dense=True)
    assert dense.model == config.model.dense_variant()
    assert dense.schedule == config.schedule


@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(2, 1), (32, 1), (64, 2), (100, 2), (128, 4), (34, 1), (96, 3)]
)
def test_every_even_size_has_heads_of_even_size(hidden_size, heads):
    model = tiny(hidden_size=hidden_size).model
    assert model.num_heads == heads
    init_language_params(model)


def test_an_odd_size_is_refused_before_anything_is_made():
    with pytest.raises(RangeError, match=r"hidden_size must be a multiple of 2 .*, got 33"):
        tiny(hidden_size=33)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_batch_size_can_be_cut(batch_size):
    config = tiny(batch_size=batch_size)
    assert config.micro_batches == (1 if batch_size % 2 else 2)


def test_another_length_keeps_the_share_of_the_warm_up():
    config = with_steps(tiny(), 1000)
    assert (config.steps, config.schedule.warmup_steps) == (1000, 50)
    assert with_steps(tiny(), 1).schedule.warmup_steps == 1


class Clock:
    """Time that only training steps take."""

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def perf_counter(self):
        return self.now


@pytest.mark.parametrize("step", [0.001, 0.1, 3.0])
@pytest.mark.parametrize("seconds", [0.5, 5.0, 60.0])
def test_the_budget_holds_training_and_evaluation(monkeypatch, step, seconds):
    clock = Clock(step)
    real = recipe.Trainer.step

    def timed(self):
        clock.now += clock.step
        return real(self)

    monkeypatch.setattr(recipe, "time", clock)
    monkeypatch.setattr(recipe.Trainer, "step", timed)
    config = tiny()
    steps = steps_for_seconds(config, TEXT, seconds)
    spent = clock.now
    assert spent == pytest.approx(5 * step)
    # What train will do: its steps, and evaluations that cost a third of training per character.
    characters = len(TEXT) // 10
    evaluations = 2 + steps // config.eval_every
    cost = step * (steps + evaluations * 0.33 * characters / config.tokens_per_step)
    assert steps >= 1
    assert steps == 1 or spent + cost <= seconds
    if steps > 100:
        assert spent + cost >= 0.8 * seconds


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_must_be_a_time(seconds):
    with pytest.raises(RangeError, match=f"seconds must be positive and finite, got {seconds}"):
        steps_for_seconds(tiny(), TEXT, seconds)


def test_options_of_the_router():
    config = tiny(steps=101)
    assert with_options(config) == config
    noisy = with_options(config, router_noise=0.5)
    assert (noisy.schedule.router_noise_std, noisy.schedule.router_noise_steps) == (0.5, 50)
    longer = with_steps(noisy, 1000).schedule
    assert (longer.router_noise_std, longer.router_noise_steps, longer.warmup_steps) == (
        0.5,
        500,
        50,
    )
    assert with_options(config, router_lr_factor=0.1).optimizer.router_lr_factor == 0.1
    assert with_options(config, balance="none").model == replace(
        config.model, load_balancing_coefficient=0.0, z_loss_coefficient=0.0
    )
    biased = with_options(config, balance="bias")
    assert biased.model.moe == replace(config.model.moe, selection_bias=True)
    assert biased.model.load_balancing_coefficient == biased.model.z_loss_coefficient == 0
    assert biased.selection_bias_rate == recipe.SELECTION_BIAS_RATE


@pytest.mark.parametrize("freeze", ["experts", "router"])
def test_what_is_frozen(freeze):
    config = with_options(tiny(), freeze=freeze)
    ids = np.zeros(200, np.int32)
    run = Trainer(config, ids)
    run.close()
    frozen = {g.name.rpartition(".")[2] for g in run.optimizer.groups if g.frozen}
    assert frozen == {"experts": {"gate_up_proj", "down_proj"}, "router": {"router_weight"}}[freeze]


@pytest.mark.parametrize(
    "option",
    [{"balance": "bias"}, {"router_noise": 0.1}, {"router_lr_factor": 0.0}, {"freeze": "router"}],
)
def test_a_dense_model_has_no_router(option):
    config = tiny(dense=True)
    assert with_options(config) is config
    with pytest.raises(RangeError, match=r"^train: balance, router_noise, .* a dense model, got"):
        with_options(config, **option)
