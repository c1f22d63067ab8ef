"""What explain writes: its text, rows that are not finite, and its messages."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from explain_cases import CASES, T, generator, problem

import npmoe
from accel import loopback
from npmoe import DTypeError, MoEConfig, RangeError, ShapeError, explain
from npmoe.explanation import Explanation
from npmoe.tree import map_arrays


def test_experts_are_listed_by_key_those_of_other_groups_last() -> None:
    x, params, cfg = problem(**CASES["deepseek"])
    e = explain(4, x, params, cfg)
    lines = e.text().splitlines()
    start = lines.index("experts, the chosen first, then by key") + 2
    listed = [int(line.split()[0]) for line in lines[start : start + 12]]
    inside = [i for i in np.argsort(-e.key, kind="stable") if i // 3 in e.kept_groups]
    outside = [i for i in np.argsort(-e.key, kind="stable") if i // 3 not in e.kept_groups]
    assert listed == inside + outside
    for line, expert in zip(lines[start:], listed, strict=False):
        assert line.endswith("is out") == (expert in outside)
        assert ("<- choice" in line) == (expert in listed[:4])


@pytest.mark.parametrize("policy", ["raise", "drop", "clamp"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_rows_that_are_not_finite(policy: str, value: float) -> None:
    x, params, cfg = problem(num_experts=4, nan_policy=policy, capacity_factor="1")
    x[0, 2, 0] = value
    with np.errstate(invalid="ignore"):
        e = explain(2, x, params, cfg)
        other = explain(3, x, params, cfg)
    assert e.status == "not finite"
    assert {
        "raise": "nan_policy 'raise' stops the layer here",
        "drop": "nan_policy 'drop' treats it as masked",
        "clamp": "nan_policy 'clamp' puts 0 in place of its logits",
    }[policy] in e.text()
    if policy == "clamp":
        assert [(c.expert, c.weight) for c in e.choices] == [(0, 0.0), (1, 0.0)]
    else:
        assert e.choices == ()
        assert "logits that are not finite: expert 0: " in e.text()
    largest = "inf" if np.isinf(e.router_logits.max()) else "nan"
    assert f"its router logits are not finite (the largest is {largest}): " in e.text()
    if policy == "clamp":
        by_logit = dataclasses.replace(cfg, router_order="topk_score")
        with np.errstate(invalid="ignore"):
            clamped = explain(2, x, params, by_logit)
        assert [(c.raw, c.weight) for c in clamped.choices] == [(0.0, 0.0), (0.0, 0.0)]
    assert other.status == "valid"
    assert ("token 2 has no finite largest logit" in other.text()) == (policy == "raise")
    assert len(other.choices) == 2
    json.dumps(e.to_dict(), allow_nan=False)


@pytest.mark.parametrize("policy", ["raise", "drop"])
def test_a_token_of_soft_routing_that_is_not_finite(policy: str) -> None:
    fields = {"num_experts": 2, "top_k": 1, "routing": "soft", "expert_capacity": 1}
    x, params, cfg = problem(**fields, nan_policy=policy)
    x[1, 0, 3] = np.nan
    e = explain((1, 0), x, params, cfg)
    assert (e.status, e.choices) == ("not finite", ())
    assert e.verdict.startswith(f"its router logits are not finite: nan_policy '{policy}' ")


def test_a_long_list_is_cut() -> None:
    x, params, cfg = problem(num_experts=40, top_k=3)
    e = explain(0, x, params, cfg)
    assert "... and 24 more experts" in e.text()
    assert "... and 34 more experts" in e.text(max_experts=6)
    assert "more" not in e.text(max_experts=40)
    assert str(e) == e.text()


def test_the_text_of_a_small_case() -> None:
    """Word for word, on numbers that are exact."""
    cfg = MoEConfig(
        hidden_size=2, intermediate_size=1, num_experts=2, top_k=1, score_fn="sigmoid",
        expert_capacity=1,
    )  # fmt: skip
    params = npmoe.init_params(cfg, 0, "float64")
    params.router_weight[...] = np.eye(2)
    x = np.array([[0.0, -8.0], [0.0, -8.0]])
    assert explain(1, x, params, cfg).text() == "\n".join(
        [
            "token 1 of 2 (sequence 0, position 1)",
            "top 1 of 2 experts by sigmoid(logit)",
            "capacity: 1 row per expert, first tokens first",
            "",
            "experts, the chosen first, then by key",
            "  expert     logit     score",
            "       0    0.0000    0.5000  <- choice 0",
            "       1   -8.0000  3.35e-04",
            "",
            "choices (blocks of 64 rows)",
            "  choice expert     weight    row  block:row  outcome",
            "       0      0     0.5000      -          -  dropped: 2nd in line",
            "  weights sum to 0.5000, of which 0.5000 is dropped",
        ]
    )


@pytest.mark.parametrize("name", CASES)
def test_other_backends_and_arrays_on_a_device(name: str) -> None:
    x, params, cfg = problem(**CASES[name])
    mask = np.ones((2, T // 2), bool)
    mask[0, 0] = False
    here = explain(5, x, params, cfg, rng=generator(), token_mask=mask)
    assert isinstance(here, Explanation)
    arguments = {"rng": generator(), "token_mask": mask, "backend": "reference"}
    assert explain(5, x, params, cfg, **arguments).to_dict() == here.to_dict()
    device = npmoe.get_backend("loopback")
    there = map_arrays(lambda _, value: device.asarray(value), params)
    arguments = {"rng": generator(), "token_mask": device.asarray(mask), "backend": device}
    with loopback.verbs_only():
        found = explain(5, device.asarray(x), there, cfg, **arguments)
    assert found.to_dict() == here.to_dict()


def test_soft_routing_on_a_device() -> None:
    x, params, cfg = problem(num_experts=3, top_k=1, routing="soft", expert_capacity=2)
    device = npmoe.get_backend("loopback")
    there = map_arrays(lambda _, value: device.asarray(value), params)
    found = explain(5, device.asarray(x), there, cfg, backend=device)
    assert found.to_dict() == explain(5, x, params, cfg).to_dict()


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (12, "token must be an integer in 0..11, got 12. T is bound by hidden_states (2, 6, 8)."),
        (-1, "token must be an integer in 0..11, got -1. T is bound by hidden_states (2, 6, 8)."),
        (1.0, "token must be an integer in 0..11, got 1.0."),
        (True, "token must be an integer in 0..11, got True."),
        ((0, 6), "token must lie in (0..1, 0..5), got (0, 6). It is (batch, position) in hidden"),
        ((2, 0), "token must lie in (0..1, 0..5), got (2, 0)."),
        ((1,), "token must be an index or (batch, position), got (1,)."),
        ((0, "a"), "token must be an index or (batch, position), got (0, 'a')."),
    ],
)
def test_messages_about_tokens(token, message: str) -> None:
    x, params, cfg = problem(num_experts=4)
    with pytest.raises(RangeError) as caught:
        explain(token, x, params, cfg)
    assert str(caught.value).startswith(f"explain: {message}")


def test_other_messages() -> None:
    x, params, cfg = problem(num_experts=4)
    with pytest.raises(RangeError, match=r"^explain: block_size must be an integer of at least 1,"):
        explain(0, x, params, cfg, block_size=0)
    with pytest.raises(ShapeError, match=r"^explain: hidden_states must have shape"):
        explain(0, x[..., :3], params, cfg)
    with pytest.raises(ShapeError, match=r"^explain: token_mask must be a bool array"):
        explain(0, x, params, cfg, token_mask=np.ones(3, bool))
    with pytest.raises(DTypeError, match=r"^explain: hidden_states"):
        explain(0, x.astype(int), params, cfg)


def test_inputs_are_not_changed() -> None:
    x, params, cfg = problem(**CASES["gpt_oss"])
    before = x.tobytes(), params.router_weight.tobytes()
    e = explain(np.int64(3), x, params, cfg, rng=generator())
    assert (x.tobytes(), params.router_weight.tobytes()) == before
    assert e.token == 3
