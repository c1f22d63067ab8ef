"""Models take attention and norms from the backend, and compute what the reference does."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

import npmoe
from npmoe import MoEConfig, nn
from npmoe.models import (
    LanguageConfig,
    VisionConfig,
    generate,
    init_language_params,
    init_vision_params,
    language_forward,
    language_loss,
    vision_loss,
)
from npmoe.models.gradcheck import gradcheck_model, gradcheck_models
from npmoe.testing.bounds import assert_within, gamma
from npmoe.tree import map_arrays, named_arrays

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "dense_intermediate_size": 20,
    "moe": MoEConfig(hidden_size=16, intermediate_size=8, num_experts=5, top_k=2),
}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 13, "context_length": 40}
IMAGES: dict[str, Any] = {
    **SIZES, "image_size": 12, "channels": 2, "num_classes": 5, "patch_size": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "language": LanguageConfig(**TEXT),
    "language, post-norm": LanguageConfig(**TEXT, norm_position="post", moe_every=2),
    "language, layer norm": LanguageConfig(**TEXT, norm="layer"),
    "vision": VisionConfig(**IMAGES),
    "vision, post-norm": VisionConfig(**IMAGES, norm_position="post"),
}
# Roundings on the longest way through the blocks and back: about 100 in a block each way, each
# passed on with slopes of a few units by norms and products.
BOUND = gamma(2 * 3 * 100 * 64, "float64")


def drawn(cfg: Any) -> tuple[Any, Callable[..., Any]]:
    """Return parameters off their special points, and the loss of a batch by backend."""
    rng = np.random.default_rng(0)
    vision = isinstance(cfg, VisionConfig)
    init: Any = init_vision_params if vision else init_language_params
    params = map_arrays(
        lambda _, a: a + 0.1 * rng.standard_normal(a.shape), init(cfg, 0, "float64")
    )
    if vision:
        images = rng.standard_normal((2, cfg.image_size, cfg.image_size, cfg.channels))
        labels = rng.integers(0, cfg.num_classes, 2)
        return params, lambda backend: vision_loss(images, labels, params, cfg, backend=backend)
    ids = rng.integers(0, cfg.vocab_size, (2, cfg.context_length + 1))
    return params, lambda backend: language_loss(
        ids[:, :-1], ids[:, 1:], params, cfg, backend=backend
    )


class Counted:
    """The verbs of a backend, and how often each was called."""

    def __init__(self, verbs: Any) -> None:
        self.calls: Counter[str] = Counter()
        self._verbs = verbs

    def __getattr__(self, name: str) -> Any:
        self.calls[name] += 1
        return getattr(self._verbs, name)


def counting_backend() -> tuple[Any, Counter[str]]:
    backend: Any = npmoe.get_backend("numba", num_threads=2)
    backend.nn = Counted(backend.nn)
    return backend, backend.nn.calls


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_reference(name: str) -> None:
    _, loss = drawn(CONFIGS[name])
    got, want = loss("numba"), loss("reference")
    assert abs(got.total - want.total) <= BOUND * abs(want.total)
    expected = dict(named_arrays(want.grads))
    for path, grad in named_arrays(got.grads):
        assert_within(grad, expected[path], BOUND * np.abs(expected[path]).max(), path)
        assert np.abs(expected[path]).max() > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_models_call_the_verbs_of_the_backend(name: str) -> None:
    cfg = CONFIGS[name]
    _, loss = drawn(cfg)
    backend, calls = counting_backend()
    loss(backend)
    kind = "full" if isinstance(cfg, VisionConfig) else "causal"
    want = {f"{kind}_attention": 3, f"{kind}_attention_backward": 3}
    if cfg.norm == "rms":
        norms = 6 if cfg.norm_position == "post" else 7  # pre-norm has one behind the blocks
        want |= {"rms_norm": norms, "rms_norm_backward": norms}
    assert calls == want
    want_loss = loss("numba").total
    assert loss(backend).total == want_loss


def test_a_backend_without_verbs_uses_those_of_npmoe(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()

    def counted(*args: Any, function: Any = nn.causal_attention) -> Any:
        calls["causal_attention"] += 1
        return function(*args)

    monkeypatch.setattr(nn, "causal_attention", counted)
    _, loss = drawn(CONFIGS["language"])
    loss("numba")
    assert not calls
    loss("reference")
    assert calls == {"causal_attention": 3}


@pytest.mark.parametrize("name", [n for n in CONFIGS if n.startswith("language")])
def test_generation_with_a_cache(name: str) -> None:
    """Of the same text, past the end of the context; one position per call once it has begun."""
    cfg = CONFIGS[name]
    params, _ = drawn(cfg)
    prompt = np.arange(5) % cfg.vocab_size
    backend, calls = counting_backend()
    texts = [
        list(generate(prompt, 50, params, cfg, temperature=0, backend=b))
        for b in (backend, "reference")
    ]
    assert texts[0] == texts[1]
    assert calls["causal_attention"] == 3 * 50
    norms = 7 if cfg.norm_position == "pre" else 6
    assert calls["rms_norm"] == (50 * norms if cfg.norm == "rms" else 0)


@pytest.mark.parametrize("pieces", [[1] * 40, [29, 1, 1, 9], [5, 35]])
def test_pieces_with_a_cache_equal_the_whole(pieces: list[int]) -> None:
    cfg = CONFIGS["language"]
    params, _ = drawn(cfg)
    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, (2, 40))
    whole, _ = language_forward(ids, params, cfg, backend="reference")
    caches = tuple(nn.KeyValueCache(2, 2, 4, 40, "float64") for _ in range(3))
    found = [
        language_forward(piece, params, cfg, caches=caches, backend="numba")[0]
        for piece in np.split(ids, np.cumsum(pieces)[:-1], axis=1)
    ]
    got = np.concatenate(found, axis=1)
    assert_within(got, whole, BOUND * np.abs(whole).max(), "pieces")


@pytest.mark.parametrize("name", gradcheck_models())
def test_gradients_of_small_models(name: str) -> None:
    errors = gradcheck_model(gradcheck_models()[name], directions=1, backend="numba")
    assert max(errors.values()) <= 1e-7
