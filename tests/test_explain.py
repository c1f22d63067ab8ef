"""explain says what the layer did: the same numbers, bit for bit, and the right reasons."""

from __future__ import annotations

import json

import numpy as np
import pytest
from explain_cases import CASES, T, generator, problem

import npmoe
from npmoe import explain


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("masked", [False, True])
def test_every_number_is_the_layers(name: str, dtype: str, masked: bool) -> None:
    x, params, cfg = problem(dtype=dtype, **CASES[name])
    mask = None
    if masked:
        mask = np.ones((2, T // 2), bool)
        mask[0, 1] = mask[1, 4] = False
    _, saved = npmoe.moe_forward(x, params, cfg, rng=generator(), token_mask=mask)
    routing, plan = saved.routing, saved.plan
    blocks = np.cumsum([0, *-(-plan.tokens_per_expert // 4)])
    seen = set()
    for t in range(T):
        e = explain(t, x, params, cfg, rng=generator(), token_mask=mask, block_size=4)
        assert (e.token, e.batch, e.position) == (t, t // 6, t % 6)
        assert e.router_logits.tobytes() == routing.router_logits[t].tobytes()
        assert e.probs.tobytes() == routing.probs[t].tobytes()
        if mask is not None and not mask.reshape(-1)[t]:
            assert (e.status, e.choices) == ("masked", ())
            assert "masked by token_mask" in e.text()
            continue
        assert (e.status, e.verdict) == ("valid", "valid")
        routed = [c for c in e.choices if c.outcome != "refused"]
        chosen = np.flatnonzero(routing.topk_ids[t] >= 0)
        assert [c.k for c in routed] == chosen.tolist()
        for c in routed:
            assert c.expert == routing.topk_ids[t, c.k]
            assert c.weight == float(routing.topk_weights[t, c.k])
            row = int(plan.row_ids[t, c.k])
            assert c.row == (None if row < 0 else row)
            if row >= 0:
                assert c.outcome == "kept"
                place = row - int(plan.expert_offsets[c.expert])
                assert (c.block, c.block_row) == (blocks[c.expert] + place // 4, place % 4)
                slot = None if plan.slot_ids is None else int(plan.slot_ids[t, c.k])
                assert c.slot == slot
            else:
                assert c.outcome == ("identity" if c.expert >= cfg.num_experts else "dropped")
                assert (c.block, c.block_row, c.slot) == (None, None, None)
            if c.normalized is not None:
                scaled = routing.topk_weights.dtype.type(c.normalized) * cfg.routed_scaling_factor
                assert c.weight == float(scaled)
        if e.limited_key is not None:
            by_key = np.argsort(-e.limited_key, kind="stable")[: cfg.top_k]
            found = [c.expert for c in e.choices]
            if cfg.second_expert_policy == "sampling":
                drawn = e.router_logits + e.gumbel
                drawn[by_key[0]] = -np.inf
                by_key = np.array([by_key[0], drawn.argmax()])
            assert found == by_key.tolist()
            assert all(c.key == float(e.limited_key[c.expert]) for c in e.choices)
        if e.kept_groups is not None:
            group = np.arange(cfg.router_size) // (cfg.router_size // cfg.num_groups)
            inside = np.isin(group, e.kept_groups)
            fill = -np.inf if cfg.group_fill == "-inf" else 0.0
            assert e.limited_key.tolist() == np.where(inside, e.key, fill).tolist()
            assert len(e.group_scores) == cfg.num_groups
        seen |= {c.outcome for c in e.choices}
        assert max(map(len, e.text().splitlines())) <= 105
        json.dumps(e.to_dict(), allow_nan=False)
    expected = {
        **{key: {"kept", "dropped"} for key in ("capacity", "after", "priority", "sampling")},
        "gshard": {"kept", "refused", "dropped"},
        "identity": {"kept", "identity"},
    }.get(name, {"kept"})
    assert seen == expected


@pytest.mark.parametrize("name", ["gpt_oss", "dense", "gshard"])
def test_the_steps_before_the_logits_lead_to_them(name: str) -> None:
    x, params, cfg = problem(**CASES[name])
    e = explain((1, 2), x, params, cfg, rng=generator())
    before = e.linear if e.biased is None else e.biased
    if name == "gpt_oss":
        assert (e.biased - e.linear) == pytest.approx(params.router_bias, rel=1e-12)
        capped = cfg.logit_softcap * np.tanh(before / cfg.logit_softcap)
        assert e.clean == pytest.approx(capped, rel=1e-15)
        assert e.clean + e.noise == pytest.approx(e.router_logits, rel=1e-15)
        assert np.abs(e.noise).max() > 0.1
        for column in ("W h", "+ bias", "soft-cap", "noise", "logit"):
            assert column in e.text()
    else:
        assert before.tobytes() == e.router_logits.tobytes()
        assert "W h" not in e.text()


def test_a_dropped_choice_says_its_place_in_line() -> None:
    """Against counting by hand, for every policy; every place is given to one route."""
    sizes = {"num_experts": 3, "top_k": 2, "expert_capacity": 2}
    for policy in ("position", "k_major", "batch_priority", "probability", "random"):
        for scope in ("batch", "sequence"):
            x, params, cfg = problem(**sizes, drop_policy=policy, capacity_scope=scope)
            _, saved = npmoe.moe_forward(x, params, cfg, rng=generator())
            ids, weights = saved.routing.topk_ids, saved.routing.topk_weights
            draws = generator().random(2 * T).reshape(T, 2)
            keys = {
                "position": lambda t, k: t,
                "k_major": lambda t, k: (k, t),
                "batch_priority": lambda t, k, w=weights: (k, -w[t, 0], t),
                "probability": lambda t, k, w=weights: (-w[t, k], t),
                "random": lambda t, k, u=draws: u[t, k],
            }
            length = T if scope == "batch" else T // 2
            for t in range(T):
                e = explain(t, x, params, cfg, rng=generator())
                for c in e.choices:
                    rivals = [
                        keys[policy](s, k)
                        for s in range(T)
                        for k in range(2)
                        if ids[s, k] == c.expert and s // length == t // length
                    ]
                    place = sum(key < keys[policy](t, c.k) for key in rivals) + 1
                    ending = {1: "st", 2: "nd", 3: "rd"}.get(place if place < 10 else 0, "th")
                    word = "kept" if place <= 2 else "dropped"
                    assert c.reason == f"{word}: {place}{ending} in line", (policy, scope)


def test_places_in_line_go_by_the_weights_at_the_drop() -> None:
    """Not by what they became when the kept ones were normalised."""
    fields = {"num_experts": 3, "top_k": 2, "expert_capacity": 3, "drop_policy": "probability"}
    x, params, cfg = problem(**fields, renormalize=True, renormalize_drop="after")
    _, saved = npmoe.moe_forward(x, params, cfg)
    ids, probs = saved.routing.topk_ids, saved.routing.probs
    for t in range(T):
        for c in explain(t, x, params, cfg).choices:
            takers = np.flatnonzero((ids == c.expert).any(axis=1))
            place = int((probs[takers, c.expert] > probs[t, c.expert]).sum()) + 1
            assert int(c.reason.split(": ")[1][:-10]) == place


def test_two_kinds_of_draws_are_told_apart() -> None:
    fields = CASES["gshard"] | {"drop_policy": "random", "capacity_factor": "1/2"}
    x, params, cfg = problem(**fields)
    rng = generator()
    seconds, order = rng.random(T), rng.random(2 * T).reshape(T, 2)
    _, saved = npmoe.moe_forward(x, params, cfg, rng=generator())
    ids = saved.routing.topk_ids
    for t in range(T):
        for c in explain(t, x, params, cfg, rng=generator()).choices:
            if c.outcome == "refused":
                assert c.reason.endswith(f"<= {seconds[t]:.4f}")
            else:
                place = int((order[ids == c.expert] < order[t, c.k]).sum()) + 1
                assert int(c.reason.split(": ")[1][:-10]) == place


def test_sequences_have_capacities_of_their_own() -> None:
    x, params, cfg = problem(num_experts=2, capacity_factor="1", capacity_scope="sequence")
    mask = np.ones((2, 6), bool)
    mask[0, :2] = False
    first, second = (explain((b, 5), x, params, cfg, token_mask=mask) for b in (0, 1))
    assert (first.token, first.capacity) == (5, 4)
    assert (second.token, second.capacity) == (11, 6)
    assert "6 rows per expert and sequence" in second.text()


def test_a_refused_second_expert_shows_the_draw() -> None:
    x, params, cfg = problem(**CASES["gshard"])
    draws = generator().random(T)
    refused = 0
    for t in range(T):
        e = explain(t, x, params, cfg, rng=generator())
        first, second = e.choices
        if second.outcome == "refused":
            refused += 1
            twice = 2 * second.normalized
            assert twice <= draws[t]
            assert second.reason == f"refused: 2 * {second.normalized:.4f} <= {draws[t]:.4f}"
            assert (second.weight, second.row) == (0.0, None)
            assert "exceeds a draw of U(0, 1)" in e.text()
        else:
            assert 2 * second.normalized > draws[t]
        assert first.normalized + second.normalized == pytest.approx(1.0, rel=1e-15)
    assert refused


def test_the_generator_advances_as_in_the_layer() -> None:
    x, params, cfg = problem(**CASES["sampling"])
    one, two = generator(), generator()
    npmoe.moe_forward(x, params, cfg, rng=one)
    explain(0, x, params, cfg, rng=two)
    assert one.random() == two.random()


@pytest.mark.parametrize("name", ["expert_choice", "expert_choice per sequence"])
def test_expert_choice_ranks(name: str) -> None:
    x, params, cfg = problem(**CASES[name])
    mask = np.ones((2, T // 2), bool)
    mask[1, 0] = False
    _, saved = npmoe.moe_forward(x, params, cfg, token_mask=mask)
    probs = saved.routing.probs
    whole = cfg.capacity_scope == "batch"
    for t in np.flatnonzero(mask.reshape(-1)).tolist():
        e = explain(t, x, params, cfg, token_mask=mask)
        rivals = [
            s for s in range(T) if mask.reshape(-1)[s] and (whole or s // (T // 2) == t // (T // 2))
        ]
        took = [c.expert for c in e.choices]
        for expert in range(4):
            column = probs[rivals, expert]
            assert e.ranks[expert] == (column > probs[t, expert]).sum()
            assert e.thresholds[expert] == np.sort(column)[::-1][e.capacity - 1]
            assert (e.ranks[expert] < e.capacity) == (expert in took)
        assert e.capacity == (-(-len(rivals) * 2 // 4) if whole else 2)
        assert "its last" in e.text()


def test_a_token_that_no_expert_took() -> None:
    x, params, cfg = problem(num_experts=2, routing="expert_choice", expert_capacity=1)
    texts = [explain(t, x, params, cfg).text() for t in range(T)]
    assert sum("no expert took this token: the routed output is 0" in t for t in texts) >= T - 2


@pytest.mark.parametrize("masked", [False, True])
def test_soft_routing(masked: bool) -> None:
    x, params, cfg = problem(num_experts=3, top_k=1, routing="soft", expert_capacity=2)
    mask = np.ones((2, 6), bool)
    mask[1, 3] = not masked
    _, saved = npmoe.moe_forward(x, params, cfg, token_mask=mask)
    soft = saved.soft.assignments
    for t in range(T):
        e = explain(t, x, params, cfg, token_mask=mask, block_size=1)
        b, position = divmod(t, 6)
        assert e.dispatch.tolist() == soft.dispatch[b, position].tolist()
        if masked and (b, position) == (1, 3):
            assert e.status == "masked"
            continue
        assert [c.weight for c in e.choices] == soft.combine[b, position].tolist()
        for s, c in enumerate(e.choices):
            assert (c.k, c.expert, c.slot) == (s, s // 2, s % 2)
            row = int(saved.plan.row_ids[b * 6 + s, 0])
            assert (c.row, c.block, c.block_row) == (row, row, 0)
        assert "3 experts with 2 slots each" in e.text()


def test_replayed_and_hash_routing() -> None:
    for routing in ("token_choice", "hash"):
        x, params, cfg = problem(num_experts=5, routing=routing, renormalize=True)
        ids = np.tile(np.array([[3, 1], [0, -1]], np.int32), (T // 2, 1)).reshape(2, 6, 2)
        e = explain(1, x, params, cfg, topk_ids=ids)
        assert [(c.expert, c.outcome, c.key) for c in e.choices] == [
            (0, "kept", None),
            (-1, "none", None),
        ]
        assert e.choices[0].weight == 1.0
        assert e.choices[1].reason == "none: the given id is -1"
        assert e.replayed
        assert "given by topk_ids" in e.text()
