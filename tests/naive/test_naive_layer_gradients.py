"""The gradients of naive.moe_backward against central differences: each option, and drawn ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive import NaiveForward, expert_capacity, moe_backward, moe_forward

STEP = 2.0**-11
SMALL = {"hidden_size": 3, "intermediate_size": 2, "num_experts": 3, "top_k": 2}
AFTER = {"renormalize": True, "renormalize_drop": "after"}
TWO_GROUPS = {"num_experts": 4, "num_groups": 2}

CASES: list[dict] = [
    {},
    {"activation": "gelu", "expert_bias": True, "router_bias": True},
    {"activation": "relu", "expert_bias": True, "router_order": "topk_score"},
    {"renormalize": True, "router_bias": True},
    {"renormalize": True, "expert_capacity": 2, "expert_bias": True},
    {"expert_capacity": 2, **AFTER},
    {"renormalize": True, "expert_capacity": 2, "routed_scaling_factor": 2.5},
    {"expert_capacity": 2, "routed_scaling_factor": 2.5, **AFTER},
    {"router_order": "topk_score", "routed_scaling_factor": 0.3},
    {"expert_capacity": 2, "drop_policy": "probability", "router_order": "topk_score"},
    {"capacity_factor": "0.8", "drop_policy": "probability", "activation": "gelu"},
    {"num_experts": 1, "top_k": 1},
    {"top_k": 3, "hidden_size": 2, "intermediate_size": 3},
    {"score_fn": "sigmoid"},
    {"score_fn": "sigmoid", "router_order": "topk_score", "top_k": 1},
    {"score_fn": "sqrtsoftplus", "renormalize": True, "renorm_eps": 1e-20},
    {"score_fn": "sigmoid", "renormalize": True, "renorm_eps": 0.25},
    {"score_fn": "sigmoid", "renormalize": True, "renorm_eps": 9.0, "renorm_eps_mode": "max"},
    {"score_fn": "sigmoid", "renormalize": True, "renorm_eps": 0.01, "renorm_eps_mode": "max"},
    {"renormalize": True, "renorm_p": 2, "routed_scaling_factor": 2.5},
    {"renorm_p": 2, "renorm_eps": 0.25, "expert_capacity": 2, **AFTER},
    {"renormalize": True, "renorm_single": False, "top_k": 1},
    {"logit_softcap": 1.5, "router_bias": True},
    {"selection_bias": True, "score_fn": "sigmoid", "renormalize": True},
    {"selection_bias": True, "selection_bias_on": "logits"},
    {"selection_bias": True, "selection_bias_on": "logits", "router_order": "topk_score"},
    {**TWO_GROUPS, "selection_bias": True, "score_fn": "sigmoid"},
    {**TWO_GROUPS, "group_fill": "zero", "group_score": "max"},
    {**TWO_GROUPS, "topk_group": 2, "group_score": "topk_div", "router_order": "topk_score"},
    {"second_expert_policy": "sampling"},
    {"second_expert_policy": "random"},
    {"second_expert_policy": "random", "renormalize": True, "routed_scaling_factor": 2.5},
    {"second_expert_policy": "random", "router_order": "topk_score"},
    {"second_expert_policy": "random", "expert_capacity": 2, **AFTER},
    {"router_noise_std": 0.5, "logit_softcap": 1.5},
    {"router_jitter": 0.5, "router_bias": True},
    {"num_identity_experts": 2, "expert_bias": True},
    {"num_identity_experts": 2, "weight_position": "input", "router_bias": True},
    {"num_identity_experts": 1, "expert_capacity": 1, **AFTER},
    {"weight_position": "mid", "expert_bias": True},
    {"weight_position": "input", "expert_bias": True},
    {"weight_position": "input", "score_fn": "sigmoid", "router_order": "topk_score", "top_k": 1},
    {"activation": "swiglu_oai", "activation_alpha": 1.2, "expert_bias": True},
    {"expert_dropout": 0.5, "expert_bias": True},
    {"expert_dropout": 0.5, "weight_position": "input"},
    {"output_bias": True},
    {"shared_intermediate_size": 4},
    {"shared_intermediate_size": 4, "shared_gated": True, "output_bias": True},
    {"shared_intermediate_size": 4, "shared_combine": "average", "output_bias": True},
    {"shared_intermediate_size": 4, "shared_activation": "gelu", "shared_gated": True},
    {"shared_intermediate_size": 4, "activation": "gelu", "shared_activation": "swiglu_oai"},
    {"capacity_factor": "0.5", "capacity_scope": "sequence"},
    {"capacity_factor": "0.8", "capacity_scope": "sequence", "capacity_rounding": "tutel"},
    {"expert_capacity": 2, "drop_policy": "k_major", **AFTER},
    {"expert_capacity": 2, "drop_policy": "batch_priority", "slot_order": "token"},
    {"expert_capacity": 2, "drop_policy": "random", "renormalize": True},
    {"routing": "expert_choice", "expert_capacity": 2},
    {"routing": "expert_choice", "capacity_factor": "1", "capacity_scope": "sequence"},
    {"routing": "expert_choice", "expert_capacity": 3, "renormalize": True, "renorm_p": 2},
    {"routing": "expert_choice", "expert_capacity": 3, "score_fn": "sigmoid"},
    {"routing": "dense"},
    {"routing": "dense", "score_fn": "sqrtsoftplus", "renormalize": True},
    {"routing": "dense", "num_identity_experts": 1},
    {"routing": "hash", "renormalize": True},
    {"routing": "hash", "router_order": "topk_score", "expert_capacity": 2},
    {"routing": "soft", "expert_capacity": 2},
    {"routing": "soft", "expert_capacity": 1, "expert_bias": True, "expert_dropout": 0.5},
    {"routing": "soft", "expert_capacity": 1, "shared_intermediate_size": 2, "output_bias": True},
]


class Point:
    """A layer at a random point, as a function of one array at a time."""

    def __init__(self, cfg: MoEConfig, seed: int, draw, *, replay: bool, sequence_length: int):
        rng = np.random.default_rng(seed)
        T, H, N = 2 * sequence_length, cfg.hidden_size, cfg.router_size
        self.cfg, self.params = cfg, draw.params(cfg, seed + 1)
        self.x, self.grad_output = rng.standard_normal((2, T, H))
        if cfg.routing == "soft":
            # Normalised vectors turn quickly near 0, faster than the differences can follow.
            weight = self.params.router_weight
            self.x = self.x + 0.5 * np.sign(self.x)
            self.params = dataclasses.replace(
                self.params, router_weight=weight + 0.5 * np.sign(weight)
            )
        self.grad_logits = rng.standard_normal((T, N))
        self.mask = rng.random(T) < 0.8
        ids = None
        if replay:
            ids = np.array([rng.permutation(N)[: min(3, N)] for _ in range(T)])
            ids[rng.random(ids.shape) < 0.2] = -1
        columns = cfg.top_k if ids is None else ids.shape[1]
        if cfg.routing in ("dense", "expert_choice"):
            columns = N
        draws = draw.numbers(cfg, T, columns, seed + 2, num_sequences=2)
        self.options = {
            "token_mask": self.mask,
            "topk_ids": ids,
            "sequence_length": sequence_length,
            "draws": draws,
        }
        self.forward = self.run(self.x, self.params)

    def run(self, x: np.ndarray, params: object) -> NaiveForward:
        return moe_forward(x, params, self.cfg, **self.options)

    def grads(self, *, dense: bool = False) -> dict[str, np.ndarray | None]:
        found = moe_backward(
            self.grad_output,
            self.x,
            self.params,
            self.cfg,
            grad_router_logits=self.grad_logits,
            dense=dense,
            **self.options,
        )
        return {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything a gradient is taken by; selection_bias has none."""
        fields = {n: getattr(self.params, n) for n in self.params.__dataclass_fields__}
        fields["hidden_states"] = self.x
        return {n: a for n, a in fields.items() if a is not None and n != "selection_bias"}

    def same_decisions(self, forward: NaiveForward) -> bool:
        pairs = ((getattr(forward, n), getattr(self.forward, n)) for n in ("topk_ids", "kept"))
        return all(a.shape == b.shape and (a == b).all() for a, b in pairs)

    def value_of(
        self, name: str, demand: Callable[[bool], object]
    ) -> Callable[[np.ndarray], float]:
        """Return the scalar whose gradient is taken; `demand` that no decision changes."""

        def value(array: np.ndarray) -> float:
            if name == "hidden_states":
                forward = self.run(array, self.params)
            else:
                forward = self.run(self.x, dataclasses.replace(self.params, **{name: array}))
            # Decisions are constants of the gradient: the point must not lie on a border.
            demand(self.same_decisions(forward))
            outputs = (forward.output * self.grad_output).sum()
            return float(outputs + (forward.logits * self.grad_logits).sum())

        return value


def check_gradients(point: Point, demand: Callable[[bool], object], *, directions: int) -> None:
    """Compare the derivative along random directions of each array with central differences."""
    grads = point.grads()
    assert set(point.arrays()) == {n for n, g in grads.items() if g is not None}
    rng = np.random.default_rng(0)
    for name, array in point.arrays().items():
        assert grads[name].shape == array.shape
        value = point.value_of(name, demand)
        scale = max(1.0, abs(value(array)), float(np.abs(grads[name]).max(initial=0.0)))
        for _ in range(directions):
            along = rng.standard_normal(array.shape)
            along /= np.sqrt((along**2).sum())
            quotients = []
            for h in (STEP, 2.0 * STEP):
                quotients.append((value(array + h * along) - value(array - h * along)) / (2 * h))
            expected = (4.0 * quotients[0] - quotients[1]) / 3.0
            found = float((grads[name] * along).sum())
            # The truncation error is 8e-15 times the fifth derivative, which reaches 1e5.
            assert abs(found - expected) <= 1e-9 * scale, (name, found, expected)


def demand(holds: bool) -> None:
    assert holds, "on a border, choose another seed"


@pytest.mark.parametrize("fields", CASES, ids=str)
def test_gradients(fields: dict, draw) -> None:
    cfg = MoEConfig(**(SMALL | fields))
    point = Point(cfg, 7, draw, replay=cfg.routing == "hash", sequence_length=2)
    if cfg.has_capacity and cfg.routing in ("token_choice", "hash"):
        assert not point.forward.kept[point.mask].all()
    check_gradients(point, demand, directions=2)


SMOOTH = ("swiglu", "gelu", "silu", "geglu_tanh", "gelu_tanh")
# Each field is tried after those that give it a meaning, and left out where it has none.
OPTIONS: dict[str, list] = {
    "num_identity_experts": [0, 0, 1],
    "num_groups": [1, 2, 3],
    "topk_group": [1, 2],
    "group_score": ["top2_sum", "max", "topk_div"],
    "group_fill": ["-inf", "zero"],
    "score_fn": ["softmax", "sigmoid", "sqrtsoftplus"],
    "router_order": ["score_topk", "topk_score"],
    "renormalize": [False, True],
    "renorm_eps": [0.0, 1e-6, 50.0],
    "renorm_eps_mode": ["add", "max"],
    "renorm_p": [1, 2],
    "renorm_single": [True, False],
    "routed_scaling_factor": [1.0, 2.5],
    "logit_softcap": [None, 2.0],
    "selection_bias": [False, True],
    "selection_bias_on": ["scores", "logits"],
    "second_expert_policy": ["all", "sampling", "random"],
    "router_noise_std": [0.0, 0.5],
    "router_jitter": [0.0, 0.25],
    "router_bias": [False, True],
    "weight_position": ["output", "mid", "input"],
    "activation": list(SMOOTH),
    "expert_bias": [False, True],
    "expert_dropout": [0.0, 0.25],
    "output_bias": [False, True],
    "shared_intermediate_size": [0, 2],
    "shared_gated": [False, True],
    "shared_activation": [None, *SMOOTH],
    "shared_combine": ["sum", "average"],
    "expert_capacity": [None, None, 1, 2],
    "capacity_factor": [None, "0.5", "1.25"],
    "capacity_rounding": ["ceil", "floor", "round", "tutel", "megatron_f64", "deepspeed_f32"],
    "capacity_count_top_k": [True, False],
    "min_capacity": [0, 2],
    "capacity_multiple": [1, 2],
    "capacity_scope": ["batch", "sequence"],
    "drop_policy": ["position", "k_major", "batch_priority", "probability", "random"],
    "slot_order": ["priority", "token"],
    "renormalize_drop": ["before", "after"],
}


@st.composite
def legal_configs(draw: st.DrawFn) -> MoEConfig:
    fields = {
        "hidden_size": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 3)),
        "num_experts": draw(st.sampled_from([1, 2, 3, 4, 6])),
    }
    fields["top_k"] = draw(st.integers(1, min(3, fields["num_experts"])))
    fields["routing"] = draw(
        st.sampled_from(["token_choice"] * 4 + ["expert_choice", "soft", "dense", "hash"])
    )
    if fields["routing"] in ("expert_choice", "soft"):
        fields["expert_capacity"] = draw(st.integers(1, 2))
    cfg = MoEConfig(**fields)
    for name, values in OPTIONS.items():
        value = draw(st.sampled_from(values))
        if name in fields:
            continue
        try:
            cfg = MoEConfig(**fields, **{name: value})
        except RangeError:
            continue
        fields[name] = value
    return cfg


points = {
    "cfg": legal_configs(),
    "seed": st.integers(0, 2**32 - 1),
    "replay": st.booleans(),
    "sequence_length": st.integers(1, 3),
}


def point_of(draw, cfg: MoEConfig, seed: int, *, replay: bool, sequence_length: int) -> Point:
    chooses = cfg.routing in ("token_choice", "hash")
    replay = (replay and chooses) or cfg.routing == "hash"
    return Point(cfg, seed, draw, replay=replay, sequence_length=sequence_length)


@settings(max_examples=80, deadline=None)
@given(**points)
def test_directional_gradients(draw, cfg, seed, replay, sequence_length) -> None:
    point = point_of(draw, cfg, seed, replay=replay, sequence_length=sequence_length)
    check_gradients(point, assume, directions=1)


@settings(max_examples=100, deadline=None)
@given(**points)
def test_dense_form_is_the_loop(draw, cfg, seed, replay, sequence_length) -> None:
    assume(cfg.routing != "soft")
    point = point_of(draw, cfg, seed, replay=replay, sequence_length=sequence_length)
    dense = moe_forward(point.x, point.params, cfg, dense=True, **point.options)
    # Sums of at most 6 * 6 products of normal numbers, in another order.
    np.testing.assert_allclose(dense.output, point.forward.output, rtol=1e-11, atol=1e-11)
    loop = point.grads()
    for name, grad in point.grads(dense=True).items():
        if grad is not None:
            np.testing.assert_allclose(grad, loop[name], rtol=1e-11, atol=1e-10)


@settings(max_examples=100, deadline=None)
@given(**points)
def test_what_every_forward_pass_promises(draw, cfg, seed, replay, sequence_length) -> None:
    point = point_of(draw, cfg, seed, replay=replay, sequence_length=sequence_length)
    forward, mask, E = point.forward, point.mask, cfg.num_experts
    assert not forward.output[~mask].any()
    assert not forward.probs[~mask].any()
    assert (forward.topk_ids[~mask] == -1).all()
    assert not forward.topk_weights[~forward.kept].any()
    assert not (forward.kept & (forward.topk_ids < 0)).any()
    assert (forward.kept[forward.topk_ids >= E]).all()
    for row in forward.topk_ids:
        chosen = row[row >= 0].tolist()
        assert len(set(chosen)) == len(chosen)
    length = sequence_length if cfg.capacity_scope == "sequence" else len(mask)
    for start in range(0, len(mask), length):
        part = slice(start, start + length)
        capacity = expert_capacity(int(mask[part].sum()), cfg)
        for e in range(E):
            here = forward.kept[part] & (forward.topk_ids[part] == e)
            assert capacity is None or here.sum() <= capacity
            if forward.slot_ids is not None:
                slots = forward.slot_ids[part][here]
                assert sorted(slots) == list(range(len(slots)))
                wanted = (forward.topk_ids[part] == e).sum()
                assert len(slots) == min(wanted, capacity)
                if cfg.slot_order == "token":
                    assert (np.diff(slots) > 0).all()
    if forward.slot_ids is not None:
        assert (forward.slot_ids[~forward.kept] == -1).all()
