"""Each option of the layer in naive.moe_forward, worked by hand on one hidden number."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.naive import Draws, moe_backward, moe_forward
from npmoe.params import MoEParams

LN3 = math.log(3.0)


def one(**fields: object) -> MoEConfig:
    sizes = {"hidden_size": 1, "intermediate_size": 1, "num_experts": 2, "top_k": 1}
    return MoEConfig(**(sizes | {"activation": "relu"} | fields))


def given(**arrays: object) -> MoEParams:
    """Expert 0 is 5 relu(2 h), expert 1 is 7 relu(-h); at h = 1 the logits are ln 3 and 0."""
    fields = {
        "router_weight": [[LN3], [0.0]],
        "gate_up_proj": [[[2.0]], [[-1.0]]],
        "down_proj": [[[5.0]], [[7.0]]],
    } | arrays
    return MoEParams(**{n: np.array(a, dtype=np.float64) for n, a in fields.items()})


ONE = np.array([[1.0]])


def output(cfg: MoEConfig, params: MoEParams, h: float = 1.0, **options: object) -> float:
    return float(moe_forward(np.array([[h]]), params, cfg, **options).output[0, 0])


def test_weight_positions() -> None:
    params = given(gate_up_bias=[[1.0], [0.0]], down_bias=[[-4.0], [0.0]])
    # Expert 0: 5 relu(2 + 1) - 4 = 11, weight 3/4. On the input: 5 relu(2 * .75 + 1) - 4 = 8.5.
    expected = {"output": 0.75 * 11, "mid": 0.75 * 11, "input": 8.5}
    for position, value in expected.items():
        cfg = one(weight_position=position, expert_bias=True)
        assert output(cfg, params) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize("dense", [False, True])
def test_a_route_of_weight_zero_is_still_a_route(dense: bool) -> None:
    # The expert runs on 0 h and gives 5 relu(1) - 4, and its bias has a gradient.
    params = given(gate_up_bias=[[1.0], [0.0]], down_bias=[[-4.0], [0.0]])
    params = dataclasses.replace(params, router_weight=np.array([[-2000.0], [0.0]]))
    cfg, ids = one(weight_position="input", expert_bias=True, expert_capacity=1), np.array([[0]])
    assert output(cfg, params, topk_ids=ids, dense=dense) == 1.0
    grads = moe_backward(ONE, ONE, params, cfg, topk_ids=ids, dense=dense)
    assert grads.down_bias.tolist() == [[1.0], [0.0]]
    assert grads.gate_up_bias.tolist() == [[5.0], [0.0]]


def test_llama4_weights_the_input_by_a_sigmoid_of_the_best_logit() -> None:
    cfg = one(score_fn="sigmoid", router_order="topk_score", weight_position="input", top_k=2)
    # sigmoid(ln 3) = 3/4 and sigmoid(0) = 1/2, each inside its own expert.
    assert output(cfg, given()) == pytest.approx(5 * 2 * 0.75, rel=1e-15)
    assert output(cfg, given(gate_up_proj=[[[2.0]], [[1.0]]])) == pytest.approx(
        7.5 + 3.5, rel=1e-15
    )


def test_the_selection_bias_chooses() -> None:
    params = given(selection_bias=[0.0, 0.75], gate_up_proj=[[[2.0]], [[1.0]]])
    forward = moe_forward(ONE, params, one(selection_bias=True))
    assert forward.topk_ids.tolist() == [[1]]
    # Expert 1 gives 7 relu(1), with its own probability of 1/4.
    assert forward.output[0, 0] == pytest.approx(7 / 4, rel=1e-15)


@pytest.mark.parametrize("position", ["output", "mid", "input"])
def test_identity_experts_return_the_weighted_token(position: str) -> None:
    params = given(router_weight=[[0.0], [0.0], [LN3], [0.0]])
    cfg = one(num_identity_experts=2, weight_position=position)
    forward = moe_forward(np.array([[2.0]]), params, cfg)
    assert forward.topk_ids.tolist() == [[2]]
    # At h = 2 the logits are 0, 0, ln 9, 0.
    assert forward.output[0, 0] == pytest.approx(2.0 * 9 / 12, rel=1e-15)


def test_shared_experts() -> None:
    shared = {"shared_gate_up_proj": [[3.0]], "shared_down_proj": [[2.0]]}
    routed, plain = 0.75 * 10, 6.0
    fields = {"shared_intermediate_size": 1}
    assert output(one(**fields), given(**shared)) == pytest.approx(routed + plain, rel=1e-15)
    average = one(shared_combine="average", **fields)
    assert output(average, given(**shared)) == pytest.approx((routed + plain) / 2, rel=1e-15)
    gated = given(shared_gate_weight=[[-LN3]], **shared)  # sigmoid is 1/4
    found = output(one(shared_gated=True, **fields), gated)
    assert found == pytest.approx(routed + plain / 4, rel=1e-15)
    own = one(shared_activation="relu2", **fields)
    assert output(own, given(**shared)) == pytest.approx(routed + 2 * 9, rel=1e-15)
    # -3 is cut by relu in both.
    negative = one(shared_activation="silu", **fields)
    assert output(negative, given(**shared), h=-1.0) == pytest.approx(
        7 * 0.75 - 6 / (1 + math.exp(3.0)), rel=1e-14
    )


def test_output_bias_comes_last_and_never_to_masked_tokens() -> None:
    shared = {"shared_gate_up_proj": [[3.0]], "shared_down_proj": [[2.0]]}
    params = given(output_bias=[100.0], **shared)
    fields = {"shared_intermediate_size": 1, "output_bias": True, "shared_combine": "average"}
    x, mask = np.array([[1.0], [math.nan]]), np.array([True, False])
    forward = moe_forward(x, params, one(**fields), token_mask=mask)
    np.testing.assert_allclose(forward.output, [[(7.5 + 6) / 2 + 100], [0.0]], rtol=1e-15)
    # A token without any kept route still has both.
    none = moe_forward(ONE, params, one(expert_capacity=0, **fields))
    assert none.output[0, 0] == 6 / 2 + 100
    dropped = moe_forward(x, params, one(nan_policy="drop", **fields))
    assert dropped.output.tobytes() == forward.output.tobytes()


def test_soft_cap_before_the_score_function() -> None:
    forward = moe_forward(ONE * 1000.0, given(), one(logit_softcap=2.0))
    np.testing.assert_allclose(forward.logits, [[2.0, 0.0]], rtol=1e-15)
    forward = moe_forward(ONE, given(), one(logit_softcap=LN3))
    np.testing.assert_allclose(forward.logits, [[LN3 * math.tanh(1.0), 0.0]], rtol=1e-15)
    # A cap makes infinite logits finite.
    params = given(router_weight=[[1e308], [0.0]], gate_up_proj=[[[0.0]], [[0.0]]])
    with np.errstate(over="ignore"):
        forward = moe_forward(ONE * 1e308, params, one(logit_softcap=2.0))
    assert forward.logits.tolist() == [[2.0, 0.0]]


def test_noise_comes_after_the_cap_and_the_bias() -> None:
    params = given(router_bias=[0.0, 1000.0])
    cfg = one(logit_softcap=2.0, router_noise_std=1.0, router_bias=True)
    forward = moe_forward(ONE, params, cfg, draws=Draws(noise=np.array([[0.25, -5.0]])))
    capped = 2.0 * math.tanh(LN3 / 2.0)
    np.testing.assert_allclose(forward.clean_logits, [[capped, 2.0]], rtol=1e-15)
    np.testing.assert_allclose(forward.logits, [[capped + 0.25, -3.0]], rtol=1e-15)
    assert forward.topk_ids.tolist() == [[0]]
    without = moe_forward(ONE, params, cfg)
    assert without.logits.tobytes() == without.clean_logits.tobytes()


def test_jitter_reaches_the_router_alone() -> None:
    cfg, draws = one(router_jitter=0.5), Draws(jitter=np.array([[1.5]]))
    forward = moe_forward(ONE, given(), cfg, draws=draws)
    assert forward.logits.tolist() == [[LN3 * 1.5, 0.0]]
    weight = 3**1.5 / (3**1.5 + 1)
    assert forward.output[0, 0] == pytest.approx(weight * 10, rel=1e-15)
    grads = moe_backward(ONE, ONE, given(), cfg, draws=draws)
    slope = weight * (1 - weight) * 10
    np.testing.assert_allclose(grads.router_weight, [[1.5 * slope], [-1.5 * slope]], rtol=1e-14)
    np.testing.assert_allclose(grads.hidden_states, [[weight * 10 + slope * LN3 * 1.5]], rtol=1e-14)


def test_dropout_is_inverted_and_spares_the_shared_expert() -> None:
    params = given(
        gate_up_proj=[[[2.0], [3.0]], [[0.0], [0.0]]],
        down_proj=[[[5.0, 1.0]], [[0.0, 0.0]]],
        shared_gate_up_proj=[[1.0]],
        shared_down_proj=[[1.0]],
    )
    cfg = one(intermediate_size=2, expert_dropout=0.75, shared_intermediate_size=1)
    keep = np.array([[[True, False]]])
    assert output(cfg, params, draws=Draws(dropout=keep)) == pytest.approx(0.75 * 40 + 1, rel=1e-15)
    assert output(cfg, params) == pytest.approx(0.75 * 13 + 1, rel=1e-15)


def test_the_lone_survivor_weighs_one_only_if_normalised_after_the_drop() -> None:
    # Both tokens want expert 0 first; the second token keeps its second choice alone.
    fields = {"top_k": 2, "expert_capacity": 1, "renormalize": True, "drop_policy": "k_major"}
    params = given(
        router_weight=[[LN3], [0.0], [-50.0]],
        gate_up_proj=np.ones((3, 1, 1)),
        down_proj=np.ones((3, 1, 1)),
    )
    x = np.array([[1.0], [1.0]])
    ids = np.array([[0, 2], [0, 1]])
    for drop, weight in (("before", 1 / 4), ("after", 1.0)):
        cfg = one(num_experts=3, renormalize_drop=drop, **fields)
        forward = moe_forward(x, params, cfg, topk_ids=ids)
        assert forward.kept.tolist() == [[True, True], [False, True]]
        np.testing.assert_allclose(forward.topk_weights[1], [0.0, weight], rtol=1e-15)
        assert forward.output[1, 0] == pytest.approx(weight, rel=1e-15)
    plain = one(num_experts=3, **(fields | {"renormalize": False}))
    weights = moe_forward(x, params, plain, topk_ids=ids).topk_weights
    assert weights[1, 1] == pytest.approx(1 / (4 + math.exp(-50.0)), rel=1e-15)


def test_capacity_by_sequence() -> None:
    cfg = one(capacity_factor="1", capacity_scope="sequence")
    forward = moe_forward(np.ones((4, 1)), given(), cfg, sequence_length=2)
    assert forward.kept[:, 0].tolist() == [True, False, True, False]
    assert not forward.output[[1, 3]].any()


def test_the_router_dtype_changes_nothing_here() -> None:
    plain = moe_forward(ONE / 3.0, given(), one())
    assert plain.output == moe_forward(ONE / 3.0, given(), one(router_dtype="float32")).output


@pytest.mark.parametrize("cap", [None, 2.0])
def test_clamped_rows_take_no_part_in_the_router_gradient(cap: float | None) -> None:
    cfg = one(nan_policy="clamp", logit_softcap=cap, router_bias=True, num_experts=2)
    params = given(router_bias=[0.0, math.nan])
    found = moe_forward(ONE, params, cfg)
    assert found.topk_ids.tolist() == [[0]]
    assert not found.output.any()
    grads = moe_backward(ONE, ONE, params, cfg, grad_router_logits=np.ones((1, 2)))
    assert not grads.router_weight.any()
    assert not grads.router_bias.any()
    assert not grads.hidden_states.any()


def test_numbers_that_must_be_drawn_are_demanded() -> None:
    cfg = one(expert_capacity=1, drop_policy="random")
    with pytest.raises(RangeError, match=r"^keep_routes: draws\.drop must be given"):
        moe_forward(ONE, given(), cfg)
    assert moe_forward(ONE, given(), cfg, draws=Draws(drop=np.zeros((1, 1)))).kept.all()
