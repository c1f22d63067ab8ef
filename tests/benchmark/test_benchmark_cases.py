"""Cases, what they cost, and the arrays they are made of."""

from __future__ import annotations

import numpy as np
import pytest
from bench_fakes import settings

import npmoe
from npmoe import moe_forward
from npmoe.benchmark import CASES, parse_case
from npmoe.benchmark.cases import Case, Load, count_cost
from npmoe.benchmark.inputs import make_inputs
from npmoe.errors import RangeError


def test_the_named_cases():
    assert {name: case.sizes for name, case in CASES.items()} == {
        "decode1_mixtral": (1, 1024, 3584, 8, 2),
        "decode16_mixtral": (16, 1024, 3584, 8, 2),
        "prefill_mixtral": (1024, 1024, 3584, 8, 2),
        "train_small": (4096, 512, 1024, 8, 2),
        "decode1_olmoe": (1, 2048, 1024, 64, 8),
        "decode32_olmoe": (32, 2048, 1024, 64, 8),
        "prefill_olmoe": (512, 2048, 1024, 64, 8),
        "switch_many": (2048, 256, 1024, 512, 1),
    }
    assert all(case.name == name for name, case in CASES.items())


def test_sizes_of_the_users():
    case = parse_case("5, 6,7,8,3")
    assert (case.num_tokens, case.hidden_size, case.intermediate_size) == (5, 6, 7)
    assert (case.num_experts, case.top_k) == (8, 3)
    assert case.name == "T5-H6-I7-E8-K3"
    assert case.num_weights == 3 * 8 * 6 * 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("decode2", "case must be a known name or T,H,I,E,K, got 'decode2'. Did you mean 'decode"),
        ("", "case must be a known name or T,H,I,E,K, got ''. Known: decode1_mixtral, "),
        ("1,2,3", "must hold five positive whole numbers T,H,I,E,K, got '1,2,3'."),
        ("1,2,3,4,x", "must hold five positive whole numbers T,H,I,E,K, got '1,2,3,4,x'."),
        ("1,2,3,4,-1", "must hold five positive whole numbers T,H,I,E,K, got '1,2,3,4,-1'."),
        ("1,0,3,4,1", "must hold five positive whole numbers T,H,I,E,K, got 'T1-H0-I3-E4-K1'."),
        ("1,2,3,4,5", "must have K at most E = 4, got K = 5 in 'T1-H2-I3-E4-K5'. The order is"),
    ],
)
def test_mistakes_in_a_case(text, message):
    with pytest.raises(RangeError) as raised:
        parse_case(text)
    assert str(raised.value).startswith("bench: case must ")
    assert message in str(raised.value)


def test_costs_by_hand():
    case = Case(name="c", num_tokens=5, hidden_size=4, intermediate_size=3, num_experts=7, top_k=2)
    load = Load(num_rows=10, used_experts=6, largest=4)
    forward = count_cost(case, load, "forward", itemsize=4, weight_itemsize=4)
    assert forward.flops == 2 * 10 * 3 * 4 * 3
    assert forward.weight_bytes == 6 * 3 * 4 * 3 * 4
    assert forward.extra_bytes == 4 * (4 * 10 + 4 * 5 + 4 * (3 * 3 + 4))
    assert forward.intensity == forward.flops / forward.weight_bytes
    step = count_cost(case, load, "forward+backward", itemsize=4, weight_itemsize=4)
    assert step.flops == 3 * forward.flops
    assert step.weight_bytes == 3 * forward.weight_bytes
    assert step.extra_bytes == 4 * (2 * 3 * 10 + 4 * 10 + 2 * 4 * 5 + 4 * (3 * 3 + 4))


def test_half_weights_are_read_in_two_bytes_and_their_gradients_written_in_four():
    load = Load(num_rows=10, used_experts=1, largest=10)
    chosen = settings(weights="float16")
    case = chosen.cases[0]
    weights = 3 * case.hidden_size * case.intermediate_size
    assert chosen.cost(case, load, "forward").weight_bytes == 2 * weights
    assert chosen.cost(case, load, "forward+backward").weight_bytes == (2 + 2 + 4) * weights
    whole = settings().cost(case, load, "forward")
    assert chosen.cost(case, load, "forward").extra_bytes == whole.extra_bytes


def test_the_floor_is_the_slower_of_the_two_limits():
    case, load = parse_case("1,2,3,1,1"), Load(num_rows=1, used_experts=1, largest=1)
    cost = count_cost(case, load, "forward", itemsize=4, weight_itemsize=4)
    assert (cost.flops, cost.weight_bytes) == (36, 72)
    assert cost.floor(36.0, 720.0) == 1.0
    assert cost.floor(360.0, 72.0) == 1.0


def test_the_load_is_that_of_the_plan():
    plan = npmoe.dispatch.plan_dispatch(np.array([[2, 0], [2, 1], [0, 2]]), num_experts=5)
    assert Load.of(plan) == Load(num_rows=6, used_experts=3, largest=3)
    nothing = npmoe.dispatch.plan_dispatch(np.zeros((0, 2), np.int32), num_experts=3)
    assert Load.of(nothing) == Load(num_rows=0, used_experts=0, largest=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inputs_have_their_dtype_and_are_always_the_same(dtype):
    case = parse_case("9,6,5,4,2")
    first, second = make_inputs(case, dtype), make_inputs(case, dtype)
    assert first.hidden_states.tobytes() == second.hidden_states.tobytes()
    assert first.grad_output.tobytes() == second.grad_output.tobytes()
    assert first.params is second.params
    arrays = (first.hidden_states, first.grad_output, first.params.gate_up_proj)
    assert {str(a.dtype) for a in arrays} == {dtype}
    assert first.params.gate_up_proj.shape == (4, 10, 6)
    assert first.params.down_proj.shape == (4, 6, 5)
    assert first.cfg.renormalize


def test_half_weights_are_those_of_float32_rounded():
    case = parse_case("3,6,5,4,2")
    whole, half = make_inputs(case, "float32"), make_inputs(case, "float32", "float16")
    assert half.params.gate_up_proj.dtype == np.float16
    assert half.params.router_weight.dtype == np.float32
    rounded = whole.params.down_proj.astype(np.float16)
    assert half.params.down_proj.tobytes() == rounded.tobytes()
    assert half.hidden_states.tobytes() == whole.hidden_states.tobytes()


def test_rounding_cannot_change_the_choice_of_experts(monkeypatch):
    """With the check turned off some token of this case is as close as it forbids."""
    case = parse_case("4000,256,1,64,8")

    def closest():
        inputs = make_inputs(case, "float32")
        logits = inputs.hidden_states.astype(float) @ inputs.params.router_weight.T.astype(float)
        ordered = np.sort(logits, axis=1)
        return (ordered[:, -8] - ordered[:, -9]).min()

    safe = closest()
    monkeypatch.setattr("npmoe.benchmark.inputs._unclear", lambda *_: np.empty(0, np.int64))
    assert closest() < 5e-5 < safe


def test_all_experts_chosen_leave_no_choice():
    inputs = make_inputs(parse_case("5,4,3,2,2"), "float32")
    _, saved = moe_forward(inputs.hidden_states, inputs.params, inputs.cfg)
    assert Load.of(saved.plan) == Load(num_rows=10, used_experts=2, largest=5)
