"""Schedules: pure functions of the step number, so that resuming needs no state."""

from __future__ import annotations

import math
from dataclasses import dataclass

from npmoe._checks import require


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Say how the learning rate and the router noise change over a run.

    Parameters
    ----------
    steps : int
        Length of the run.
    learning_rate : float
        The peak, reached at the last warm-up step.
    warmup_steps : int
        Steps of the linear warm-up, at most `steps`.
    final_factor : float
        The last step's learning rate as a fraction of the peak, in [0, 1].
    router_noise_std : float
        Standard deviation of the router noise at step 0.
    router_noise_steps : int
        The first step without noise.

    Raises
    ------
    RangeError
        If a value is outside its range, or noise has no steps to fade in.
    """

    steps: int
    learning_rate: float
    warmup_steps: int = 0
    final_factor: float = 0.1
    router_noise_std: float = 0.0
    router_noise_steps: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.steps >= 1, f"ScheduleConfig: steps must be at least 1, got {self.steps}.")
        require(
            0 <= self.warmup_steps <= self.steps,
            f"ScheduleConfig: warmup_steps must be in 0..steps = {self.steps}, "
            f"got {self.warmup_steps}.",
        )
        require(
            0 <= self.final_factor <= 1,
            f"ScheduleConfig: final_factor must be in [0, 1], got {self.final_factor!r}.",
        )
        for name in ("learning_rate", "router_noise_std", "router_noise_steps"):
            value = getattr(self, name)
            require(
                0 <= value < math.inf,
                f"ScheduleConfig: {name} must be finite and not negative, got {value!r}.",
            )
        require(
            (self.router_noise_std > 0) == (self.router_noise_steps > 0),
            "ScheduleConfig: router_noise_std and router_noise_steps must both be 0 or both be "
            f"positive, got {self.router_noise_std!r} and {self.router_noise_steps}.",
        )


def learning_rate(step: int, config: ScheduleConfig) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to the final factor.

    ``peak (step + 1) / warmup_steps`` up to the last warm-up step, which has exactly the peak;
    then ``peak (f + (1 - f) (1 + cos(pi x)) / 2)``, f = final_factor, where x runs from 0 at the
    last warm-up step (step 0 without warm-up) to 1 at the last step, which has exactly peak * f.

    Parameters
    ----------
    step : int
        From 0 to ``config.steps - 1``.
    config : ScheduleConfig
        The schedule.

    Returns
    -------
    float
        The learning rate.

    Raises
    ------
    RangeError
        If the step lies outside the run.

    References
    ----------
    Loshchilov & Hutter, "SGDR", ICLR 2017, eq. (5), one period.
    """
    require(
        0 <= step < config.steps,
        f"learning_rate: step must be in 0..{config.steps - 1}, got {step}. "
        f"The run has {config.steps} steps.",
    )
    if step + 1 < config.warmup_steps:
        return config.learning_rate * ((step + 1) / config.warmup_steps)
    peak_step = max(config.warmup_steps - 1, 0)
    if step == peak_step:
        return config.learning_rate
    x = (step - peak_step) / (config.steps - 1 - peak_step)
    f = config.final_factor
    return config.learning_rate * (f + (1 - f) * (0.5 * (1 + math.cos(math.pi * x))))


def router_noise(step: int, config: ScheduleConfig) -> float:
    """Return the standard deviation of the router noise: a line that reaches exactly 0.

    ``std (1 - step / router_noise_steps)``, and 0 from step ``router_noise_steps`` on.

    Parameters
    ----------
    step : int
        Not negative.
    config : ScheduleConfig
        The schedule.

    Returns
    -------
    float
        The standard deviation.

    Raises
    ------
    RangeError
        If the step is negative.
    """
    require(step >= 0, f"router_noise: step must not be negative, got {step}.")
    if step >= config.router_noise_steps:
        return 0.0
    return config.router_noise_std * (1 - step / config.router_noise_steps)
