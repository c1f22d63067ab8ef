"""Sampling, and generation within and beyond the context."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.models import (
    LanguageConfig,
    generate,
    init_language_params,
    language_forward,
    sample_token,
)

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3]))


class Draw:
    """A generator whose next number is known."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def chosen(value, **options):
    return sample_token(LOGITS, Draw(value), **options)


def test_the_unit_interval_is_shared_out_from_the_likeliest_down():
    # Likeliest first: ids 1, 3, 2, 0 own [0, .4), [.4, .7), [.7, .9), [.9, 1).
    draws = [0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, np.nextafter(1.0, 0.0)]
    assert [chosen(u) for u in draws] == [1, 1, 3, 3, 2, 2, 0, 0]


def test_top_k_renormalises_over_the_k_likeliest():
    # 0.4 and 0.3 of 0.7.
    assert [chosen(u, top_k=2) for u in (0.0, 0.57, 0.572, 0.999)] == [1, 1, 3, 3]
    assert [chosen(u, top_k=9) for u in (0.0, 0.999)] == [1, 0]
    assert all(chosen(u, top_k=1) == 1 for u in (0.0, 0.5, 0.999))


def test_top_p_keeps_the_fewest_that_reach_it():
    last = np.nextafter(1.0, 0.0)
    kept = {0.01: 1, 0.39: 1, 0.41: 2, 0.69: 2, 0.71: 3, 0.89: 3, 0.91: 4, 1.0: 4}
    order = [1, 3, 2, 0]
    for top_p, count in kept.items():
        assert chosen(last, top_p=top_p) == order[count - 1], top_p
    # Of the two likeliest, 0.4 / 0.7 is enough for 0.5.
    assert chosen(last, top_k=2, top_p=0.5) == 1


def test_temperature_zero_and_almost_zero_take_the_largest_the_lowest_id_among_equals():
    assert chosen(0.999, temperature=0) == 1
    ties = np.array([1.0, 2.0, 2.0])
    assert sample_token(ties, Draw(0.0), temperature=0) == 1
    for temperature in (1e-3, 1e-310, 5e-324):
        assert sample_token(LOGITS.astype("float32"), Draw(0.999), temperature=temperature) == 1


def test_temperature_divides_the_logits():
    # Squared and normalised: .16, .09, .04, .01 of .30.
    assert [chosen(u, temperature=0.5) for u in (0.53, 0.54, 0.83, 0.84)] == [1, 3, 3, 2]
    assert chosen(0.26, temperature=1e9) == 3


def test_large_logits_do_not_overflow():
    assert sample_token(np.array([1e300, -1e300]), Draw(0.999)) == 0
    assert sample_token(np.array([-np.inf, 0.0]), Draw(0.999)) == 1


def test_frequencies():
    rng = np.random.default_rng(0)
    count = 20_000
    found = np.bincount([sample_token(LOGITS, rng) for _ in range(count)], minlength=4)
    probs = np.exp(LOGITS)
    # Five standard deviations of a binomial.
    assert (np.abs(found - count * probs) <= 5 * np.sqrt(count * probs * (1 - probs))).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature must be finite and not negative, got -0.1"),
        ({"temperature": math.nan}, "temperature must be finite and not negative, got nan"),
        ({"temperature": math.inf}, "temperature must be finite"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\], got 1.5"),
        ({"top_p": math.nan}, "top_p must lie"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(RangeError, match=f"^generate: {words}"):
        chosen(0.0, **options)
    with pytest.raises(RangeError, match=f"^generate: {words}"):
        generate(np.array([1]), 3, PARAMS, CFG, **options)


CFG = LanguageConfig(
    vocab_size=7,
    context_length=8,
    hidden_size=8,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    moe=MoEConfig(hidden_size=8, intermediate_size=6, num_experts=4, top_k=2, renormalize=True),
)
PARAMS = init_language_params(CFG, 1, "float64")


def test_wrong_prompts():
    with pytest.raises(
        RangeError, match=r"^generate: prompt must hold at least one token, got none\."
    ):
        generate(np.array([], int), 3, PARAMS, CFG)
    with pytest.raises(RangeError, match=r"^generate: num_tokens must not be negative, got -1\."):
        generate(np.array([1]), -1, PARAMS, CFG)


def likeliest(history):
    return int(language_forward(np.array([history]), PARAMS, CFG)[0][0, -1].argmax())


@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_generation_runs_on_beyond_the_context(length):
    """Spelled out without a cache: a full context goes on from its last half."""
    prompt = np.random.default_rng(length).integers(0, 7, length)
    found = list(generate(prompt, 30, PARAMS, CFG, temperature=0))
    history = prompt.tolist()
    window = history[-8:]
    want = []
    for number in range(30):
        if number and len(window) == 8:
            window = [*history[-4:-1]]
        if number:
            window = [*window, history[-1]]
        want.append(likeliest(window))
        history.append(want[-1])
    assert found == want


def test_a_seed_gives_one_text_and_no_tokens_give_none():
    def text(seed, **options):
        return list(generate(np.array([1, 2]), 40, PARAMS, CFG, seed=seed, **options))

    assert text(3) == text(3)
    assert text(3) != text(4)
    assert text(0, top_k=1) == text(5, temperature=0)
    assert text(0, top_p=1e-9) == text(5, temperature=0)
    assert len(text(0)) == 40
    assert min(text(0)) >= 0
    assert max(text(0)) < 7
    assert list(generate(np.array([1]), 0, PARAMS, CFG)) == []


def test_generation_uses_the_capacity_of_the_evaluation():
    """No route is refused when the evaluation is roomy, however tight training was."""

    def texts(**capacity):
        cfg = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, **capacity))
        prompts = np.random.default_rng(0).integers(0, 7, (8, 8))
        return [list(generate(prompt, 4, PARAMS, cfg)) for prompt in prompts]

    free = texts()
    assert texts(capacity_factor="0.25", eval_capacity_factor="4") == free
    assert texts(capacity_factor="0.25") != free


def test_the_reference_backend_writes_the_same():
    texts = [
        list(generate(np.array([1]), 20, PARAMS, CFG, temperature=0, backend=backend))
        for backend in ("numpy", "reference")
    ]
    assert texts[0] == texts[1]
