"""Sampling from the language model, one token at a time with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from npmoe import nn
from npmoe._typing import HostArray
from npmoe.backends import Backend
from npmoe.errors import RangeError
from npmoe.models.config import LanguageConfig
from npmoe.models.language import LanguageParams, language_forward


def sample_token(
    logits: HostArray,
    rng: np.random.Generator,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> int:
    """Draw one token id.

    Parameters
    ----------
    logits : (V,) float array
    rng : numpy Generator
    temperature : float
        0 takes the largest logit (the lowest id among equals); otherwise logits are divided by it.
    top_k : int, optional
        Keep the k most likely tokens.
    top_p : float, optional
        Of those, keep the fewest that together have at least this probability.

    Returns
    -------
    int

    Raises
    ------
    RangeError
        If an option is out of range.

    References
    ----------
    Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (top-p).
    """
    _check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return int(logits.argmax())
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # -inf, a probability of 0, is what a tiny temperature means
        wide = (wide - wide.max()) / temperature
    order = np.argsort(-wide, kind="stable")[:top_k]
    probs = np.exp(wide[order])
    probs /= probs.sum()
    if top_p is not None:
        keep = int(np.searchsorted(np.cumsum(probs), top_p)) + 1
        order, probs = order[:keep], probs[:keep]
        probs /= probs.sum()
    return int(order[np.searchsorted(np.cumsum(probs)[:-1], rng.random(), side="right")])


def generate(
    prompt: HostArray,
    num_tokens: int,
    params: LanguageParams,
    cfg: LanguageConfig,
    *,
    seed: int = 0,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    backend: str | Backend | None = None,
) -> Iterator[int]:
    """Yield the ids that continue a prompt.

    Parameters
    ----------
    prompt : (L,) int array
        At least one id; only the last `context_length` are used.
    num_tokens : int
        How many ids to yield.
    params, cfg
        The model.
    seed : int
        Same seed, same text.
    temperature, top_k, top_p
        As for `sample_token`.
    backend : str, Backend or None
        Runs the MoE sublayers, with the evaluation's capacity.

    Yields
    ------
    int

    Raises
    ------
    RangeError
        If the prompt is empty or an option is out of range.

    Notes
    -----
    **Cost**: one position per token. When the context is full, the model is run again over its
    last half, from which generation goes on.
    """
    if len(prompt) == 0:
        raise RangeError("generate: prompt must hold at least one token, got none.")
    if num_tokens < 0:
        raise RangeError(f"generate: num_tokens must not be negative, got {num_tokens}.")
    _check_sampling(temperature, top_k, top_p)
    return _generate(prompt, num_tokens, params, cfg, seed, temperature, top_k, top_p, backend)


def _generate(
    prompt: HostArray,
    num_tokens: int,
    params: LanguageParams,
    cfg: LanguageConfig,
    seed: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    backend: str | Backend | None,
) -> Iterator[int]:
    rng = np.random.default_rng(seed)
    history = [int(i) for i in prompt]
    pending = history[-cfg.context_length :]
    caches = _new_caches(params, cfg)
    moe = None if cfg.moe is None else cfg.moe.for_evaluation()
    for _ in range(num_tokens):
        if caches[0].length + len(pending) > cfg.context_length:
            caches = _new_caches(params, cfg)
            pending = history[-max(1, cfg.context_length // 2) :]
        ids = np.asarray([pending], dtype=np.int64)
        logits, _ = language_forward(ids, params, cfg, moe=moe, backend=backend, caches=caches)
        token = sample_token(logits[0, -1], rng, temperature=temperature, top_k=top_k, top_p=top_p)
        history.append(token)
        pending = [token]
        yield token


def _new_caches(params: LanguageParams, cfg: LanguageConfig) -> tuple[nn.KeyValueCache, ...]:
    """Return empty caches for one sequence."""
    return tuple(
        nn.KeyValueCache(
            batch_size=1,
            num_kv_heads=cfg.num_kv_heads,
            capacity=cfg.context_length,
            head_dim=cfg.hidden_size // cfg.num_heads,
            dtype=str(params.embedding.dtype),
        )
        for _ in params.blocks
    )


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (0 <= temperature < float("inf")):
        raise RangeError(
            f"generate: temperature must be finite and not negative, got {temperature}."
        )
    if top_k is not None and top_k < 1:
        raise RangeError(f"generate: top_k must be at least 1, got {top_k}.")
    if top_p is not None and not (0 < top_p <= 1):
        raise RangeError(f"generate: top_p must lie in (0, 1], got {top_p}.")
