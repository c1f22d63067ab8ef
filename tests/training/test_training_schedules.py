from __future__ import annotations

import math

import pytest

from npmoe.errors import RangeError
from npmoe.training import ScheduleConfig, learning_rate, router_noise


def test_the_corners_are_exact():
    config = ScheduleConfig(steps=100, learning_rate=3e-3, warmup_steps=10, final_factor=0.1)
    assert learning_rate(0, config) == 3e-3 * 0.1
    assert learning_rate(4, config) == 3e-3 * 0.5
    assert learning_rate(9, config) == 3e-3
    assert learning_rate(99, config) == 3e-3 * 0.1
    # half of the way from step 9 to step 99 the cosine is at the middle
    assert math.isclose(learning_rate(54, config), 3e-3 * 0.55, rel_tol=4e-16)
    # a third of the way: cos(pi/3) = 1/2
    assert math.isclose(learning_rate(39, config), 3e-3 * (0.1 + 0.9 * 0.75), rel_tol=4e-16)


def test_the_rate_rises_and_then_falls():
    config = ScheduleConfig(steps=50, learning_rate=1.0, warmup_steps=5, final_factor=0.0)
    rates = [learning_rate(step, config) for step in range(50)]
    assert rates[:5] == sorted(set(rates[:5]))
    assert rates[4:] == sorted(set(rates[4:]), reverse=True)
    assert rates[4] == max(rates) == 1.0
    assert rates[-1] == 0.0


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    [(1, 0, [2.0]), (1, 1, [2.0]), (2, 2, [1.0, 2.0]), (2, 0, [2.0, 1.0]), (2, 1, [2.0, 1.0])],
)
def test_very_short_runs(steps, warmup, expected):
    config = ScheduleConfig(steps=steps, learning_rate=2.0, warmup_steps=warmup, final_factor=0.5)
    assert [learning_rate(step, config) for step in range(steps)] == expected


def test_the_noise_reaches_exactly_zero():
    config = ScheduleConfig(steps=10, learning_rate=1.0, router_noise_std=0.5, router_noise_steps=4)
    assert [router_noise(s, config) for s in range(6)] == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    silent = ScheduleConfig(steps=10, learning_rate=1.0)
    assert router_noise(0, silent) == 0.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0."),
        ({"warmup_steps": 11}, "warmup_steps must be in 0..steps = 10, got 11."),
        ({"warmup_steps": -1}, "warmup_steps must be in 0..steps = 10, got -1."),
        ({"final_factor": 1.5}, "final_factor must be in [0, 1], got 1.5."),
        ({"learning_rate": math.nan}, "learning_rate must be finite and not negative, got nan."),
        ({"router_noise_std": -1.0}, "router_noise_std must be finite and not negative, got -1.0."),
        (
            {"router_noise_steps": -1},
            "router_noise_steps must be finite and not negative, got -1.",
        ),
        (
            {"router_noise_std": 0.1},
            "router_noise_std and router_noise_steps must both be 0 or both be positive, "
            "got 0.1 and 0.",
        ),
        (
            {"router_noise_steps": 5},
            "router_noise_std and router_noise_steps must both be 0 or both be positive, "
            "got 0.0 and 5.",
        ),
    ],
)
def test_config_messages(values, message):
    with pytest.raises(RangeError) as error:
        ScheduleConfig(**{"steps": 10, "learning_rate": 1.0, **values})
    assert str(error.value) == f"ScheduleConfig: {message}"


def test_step_messages():
    config = ScheduleConfig(steps=10, learning_rate=1.0)
    for step in (-1, 10):
        with pytest.raises(RangeError) as error:
            learning_rate(step, config)
        assert str(error.value) == (
            f"learning_rate: step must be in 0..9, got {step}. The run has 10 steps."
        )
    with pytest.raises(RangeError) as error:
        router_noise(-1, config)
    assert str(error.value) == "router_noise: step must not be negative, got -1."
