"""Central differences, independent of anything in the package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.naive import Draws
from npmoe.params import MoEParams

STEP = 2.0**-11


def central_differences(f: Callable[[np.ndarray], float], x: np.ndarray) -> np.ndarray:
    """Return the gradient of f at x by Richardson's extrapolation of central differences.

    The truncation error is f'''''(x) h^4 / 7.5 = 8e-15 f''''' and the rounding error n u |f| / h
    = n * 3e-13 |f| for f computed with n roundings, so 1e-10 suits values of order 1.
    """
    gradient = np.zeros(x.shape)
    for i in np.ndindex(x.shape):
        quotients = []
        for h in (STEP, 2.0 * STEP):
            ahead, behind = x.copy(), x.copy()
            ahead[i] += h
            behind[i] -= h
            quotients.append((f(ahead) - f(behind)) / (2.0 * h))
        gradient[i] = (4.0 * quotients[0] - quotients[1]) / 3.0
    return gradient


@pytest.fixture
def assert_gradient() -> Callable[[Callable[[np.ndarray], float], np.ndarray, np.ndarray], None]:
    def check(f: Callable[[np.ndarray], float], x: np.ndarray, gradient: np.ndarray) -> None:
        expected = central_differences(f, x)
        error = np.abs(gradient - expected)
        scale = max(1.0, abs(f(x)), float(np.abs(expected).max(initial=0.0)))
        assert (error <= 1e-10 * scale).all(), f"{gradient} against {expected}"

    return check


def draw_params(cfg: MoEConfig, seed: int) -> MoEParams:
    """Draw every parameter that the config has, normal in float64."""
    rng = np.random.default_rng(seed)
    E, H, I, S = (
        cfg.num_experts,
        cfg.hidden_size,
        cfg.intermediate_size,
        cfg.shared_intermediate_size,
    )
    wide, N = cfg.gate_up_size, cfg.router_size

    def normal(present: bool, *shape: int) -> np.ndarray | None:
        return np.asarray(rng.standard_normal(shape)) if present else None

    return MoEParams(
        router_weight=rng.standard_normal((N, H)),
        gate_up_proj=rng.standard_normal((E, wide, H)),
        down_proj=rng.standard_normal((E, H, I)),
        router_bias=normal(cfg.router_bias, N),
        selection_bias=normal(cfg.selection_bias, N),
        gate_up_bias=normal(cfg.expert_bias, E, wide),
        down_bias=normal(cfg.expert_bias, E, H),
        shared_gate_up_proj=normal(S > 0, cfg.shared_gate_up_size, H),
        shared_down_proj=normal(S > 0, H, S),
        shared_gate_weight=normal(cfg.shared_gated, 1, H),
        output_bias=normal(cfg.output_bias, H),
        soft_scale=normal(cfg.routing == "soft"),
    )


def draw_numbers(
    cfg: MoEConfig, num_tokens: int, top_k: int, seed: int, num_sequences: int = 1
) -> Draws:
    """Draw everything random that the config has; `top_k` columns of routes."""
    rng = np.random.default_rng(seed)
    routes = (num_tokens, top_k)
    rows = (num_sequences, cfg.router_size) if cfg.routing == "soft" else routes
    eps, logits = cfg.router_jitter, (num_tokens, cfg.router_size)
    policy = cfg.second_expert_policy
    return Draws(
        jitter=rng.uniform(1 - eps, 1 + eps, (num_tokens, cfg.hidden_size)) if eps else None,
        noise=cfg.router_noise_std * rng.standard_normal(logits) if cfg.router_noise_std else None,
        gumbel=rng.gumbel(size=logits) if policy == "sampling" else None,
        second=rng.random(num_tokens) if policy == "random" else None,
        drop=rng.random(routes) if cfg.drop_policy == "random" else None,
        dropout=rng.random((*rows, cfg.intermediate_size)) >= cfg.expert_dropout
        if cfg.expert_dropout
        else None,
    )


class Draw:
    """The two functions above, in one fixture."""

    params = staticmethod(draw_params)
    numbers = staticmethod(draw_numbers)


@pytest.fixture(scope="session")
def draw() -> type[Draw]:
    return Draw
