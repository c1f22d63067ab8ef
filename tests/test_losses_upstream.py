"""Losses against the systems they are named after.

Literal numbers: transformers 5.23.0 with torch 2.13.0 on a CPU, in float64. Upstream casts to
float32 inside; the functions' source was run with ``torch.float32`` and ``.float()`` replaced by
``torch.float64`` and ``.double()``. Other systems: their formula as a plain loop, by name of
repository and function.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from npmoe import MoEConfig, RangeError
from npmoe.losses import BALANCE_CONVENTIONS, convert_coeff, load_balancing_loss, z_loss
from npmoe.losses.conventions import BalanceName
from npmoe.routing import Routing, route

U = 2.0**-53
LOGITS = np.array(
    [
        [1.0, 0.25, -0.5, 0.0],
        [0.5, 1.5, -1.0, 0.75],
        [-0.25, 0.0, 1.25, 2.0],
        [0.125, 1.0, 0.875, -0.75],
        [2.0, -1.5, 0.5, 0.625],
        [0.0, 0.3125, -0.0625, -1.125],
    ]
)
MASK = np.array([True, True, False, True, False, True])


def routing_of(top_k: int = 2, score_fn: str = "softmax", **arguments: Any) -> Routing:
    cfg = MoEConfig(
        hidden_size=1, intermediate_size=1, num_experts=4, top_k=top_k, score_fn=score_fn
    )
    return route(LOGITS, cfg, sequence_length=3, **arguments)


# huggingface/transformers: models/mixtral/modeling_mixtral.py, load_balancing_loss_func with
# num_experts=4, top_k=2; attention_mask None, then MASK as (2, 3).
HF = (
    2.048743256433908,
    [
        [-0.00650447326370112, 0.022364055266753613, -0.01346672001368756, -0.0023928619893649554],
        [-0.010153344933997012, 0.03020054451056792, -0.007010046616920966, -0.01303715295964988],
        [0.0013449283078210397, 0.010504719331119784, -0.024609972142387554, 0.01276032450344671],
        [
            -0.0008898242475911295,
            0.04279269385291338,
            -0.041531935672312476,
            -0.0003709339330097473,
        ],
        [0.009449681457115116, 0.0025130399111158996, -0.014351975008331587, 0.002389253640100594],
        [-0.0036023663807131763, 0.03690344718622773, -0.03213156367168731, -0.001169517133827301],
    ],
)
HF_MASKED = (
    2.427437383484885,
    [
        [-0.020770507734335596, 0.10465318582161025, -0.03166912238564919, -0.052213555701625405],
        [-0.03597674293429573, 0.16230596237684072, -0.01870268696799922, -0.10762653247454579],
        [0.0, 0.0, 0.0, 0.0],
        [-0.01607995432769624, 0.16359891548911687, -0.1232496634609683, -0.02426929770045241],
        [0.0, 0.0, 0.0, 0.0],
        [-0.027868449370340487, 0.15013118808921705, -0.09086175606121566, -0.031400982657660996],
    ],
)
# models/switch_transformers/modeling_switch_transformers.py, load_balancing_loss_func, with
# router_probs (2, 3, 4) and the top 1 or 2 of them: a copy of Flaxformer's.
GROUPED = {
    1: (
        1.1740023246539548,
        [
            [0.01164632617182238, 0.0055013349458811955, -0.02143210508149392, 0.00428444396379036],
            [
                0.0018159356883494908,
                0.004936224983290689,
                -0.009083868250551259,
                0.0023317075789110954,
            ],
            [0.003769971548238991, 0.004840739288128501, -0.0443792049966466, 0.035768494160279114],
            [
                0.0008522526526672171,
                0.0918989903455665,
                -0.07749213657090469,
                -0.015259106427329031,
            ],
            [
                0.04366709477030971,
                0.005774000517591004,
                -0.023177522041102794,
                -0.026263573246797903,
            ],
            [
                -0.0017323459489704102,
                0.08128676029649937,
                -0.059122295686985314,
                -0.020432118660543667,
            ],
        ],
    ),
    2: (
        2.1654734738142314,
        [
            [
                -0.04385681838421971,
                0.030156607645105794,
                -0.009785778909671545,
                0.023485989648785507,
            ],
            [
                -0.032572613927973795,
                0.027058850539634232,
                -0.00726793256220177,
                0.012781695950541365,
            ],
            [
                -0.009061144762848163,
                0.005920854220725409,
                -0.040609233448407604,
                0.043749523990530365,
            ],
            [0.01599779804106442, 0.038376722478584674, -0.0454290167320598, -0.008945503787589255],
            [
                0.04662517850311549,
                0.0014079583923926207,
                -0.022517484344069374,
                -0.025515652551438697,
            ],
            [
                0.021307263097917375,
                0.029123575624805793,
                -0.03747858598622339,
                -0.01295225273649979,
            ],
        ],
    ),
}
# The same file, router_z_loss_func, with router_logits (2, 3, 4).
Z = (
    4.192289827546515,
    [
        [0.2785634517162819, 0.13158405740685816, 0.06215590759295338, 0.10247776694817384],
        [0.13737532645572478, 0.3734248535832258, 0.030652578592508705, 0.17639341079492654],
        [0.052056746174449255, 0.06684218519805521, 0.23330215036739213, 0.4939006562035418],
        [0.10706051341649797, 0.25682482059427003, 0.2266471086812877, 0.04462946185061939],
        [0.5332670906939208, 0.016103270804188618, 0.11898797134842179, 0.13483103566702398],
        [0.11838022479922972, 0.16180658274027032, 0.11120792955519217, 0.03843243206750604],
    ],
)


def assert_golden(found: tuple[float, np.ndarray], golden: tuple[float, Any]) -> None:
    # Some 20 roundings on each side; no term of a gradient here exceeds 1.
    assert found[0] == pytest.approx(golden[0], rel=40 * U)
    np.testing.assert_allclose(found[1], golden[1], rtol=0, atol=40 * U)


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_hf_mixtral(score_fn: str) -> None:
    # Upstream sees logits only, whatever the model's router makes of them.
    assert_golden(load_balancing_loss(routing_of(score_fn=score_fn), convention="hf"), HF)
    masked = routing_of(score_fn=score_fn, token_mask=MASK)
    assert_golden(load_balancing_loss(masked, convention="hf"), HF_MASKED)


@pytest.mark.parametrize("top_k", [1, 2])
def test_hf_switch_and_flaxformer(top_k: int) -> None:
    routing = routing_of(top_k)
    found = load_balancing_loss(routing, convention="flaxformer", scope="sequence")
    assert_golden(found, GROUPED[top_k])
    if top_k == 1:
        found = load_balancing_loss(routing, convention="switch", scope="sequence")
        assert_golden(found, GROUPED[1])


@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_hf_z_loss(score_fn: str) -> None:
    assert_golden(z_loss(routing_of(score_fn=score_fn)), Z)


# Plain loops.


def softmax(row: Any) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def normalized(row: Any, score_fn: str) -> list[float]:
    if score_fn == "softmax":
        return softmax(row)
    function = {
        "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
        "sqrtsoftplus": lambda x: math.sqrt(math.log(1 + math.exp(x))),
    }[score_fn]
    s = [function(x) for x in row]
    return [x / sum(s) for x in s]


def top(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda e: -row[e])[:k]


def column(rows: list[list[float]], e: int) -> list[float]:
    return [row[e] for row in rows]


def megatron(rows: list[list[float]], k: int) -> float:
    """NVIDIA/Megatron-LM: switch_load_balancing_loss_func, compute_routing_scores_for_aux_loss."""
    total, experts = len(rows), len(rows[0])
    inner = 0.0
    for e in range(experts):
        tokens_per_expert = sum(e in top(row, k) for row in rows)
        inner += sum(column(rows, e)) * tokens_per_expert
    return inner * experts / (k * total * total)


def megablocks(layers: list[list[list[float]]], k: int) -> float:
    """databricks/megablocks: layers/moe.py, batched_load_balancing_loss."""
    tokens, experts = len(layers[0]), len(layers[0][0])
    scores = [sum(column(rows, e)) / tokens for rows in layers for e in range(experts)]
    counts = [sum(e in top(row, k) for row in rows) for rows in layers for e in range(experts)]
    scale = experts / (len(layers) * tokens * k)
    return scale * sum(n * p for n, p in zip(counts, scores, strict=True))


def deepspeed_topk(rows: list[list[float]], k: int) -> float:
    """deepspeedai/DeepSpeed: moe/sharded_moe.py, topkgating."""
    total, experts = len(rows), len(rows[0])
    product = [
        sum(column(rows, e)) / total * sum(e in top(row, k) for row in rows) / total
        for e in range(experts)
    ]
    return sum(product) / experts * experts * experts / k


def gshard(rows: list[list[float]], k: int) -> float:
    """deepspeedai/DeepSpeed: top2gating; google-research/vmoe: _gshard_auxiliary_loss."""
    total, experts = len(rows), len(rows[0])
    product = [
        sum(column(rows, e)) / total * sum(top(row, 1) == [e] for row in rows) / total
        for e in range(experts)
    ]
    return sum(product) / experts * experts**2


def tutel(rows: list[list[float]], k: int) -> float:
    """microsoft/tutel: impls/losses.py, gshard_loss."""
    total, experts = len(rows), len(rows[0])
    hot = experts / total
    return (
        sum(
            sum(column(rows, e)) * sum(hot for row in rows if top(row, 1) == [e])
            for e in range(experts)
        )
        / total
    )


def deepseek(rows: list[list[float]], k: int) -> float:
    """DeepSeek-V3 Technical Report, eq. 17-20, per sequence of three tokens."""
    value = 0.0
    for sequence in (rows[:3], rows[3:]):
        for e in range(len(rows[0])):
            f = len(rows[0]) / (k * 3) * sum(e in top(row, k) for row in sequence)
            value += f * sum(column(sequence, e)) / 3
    return value / 2


def sonic(rows: list[list[float]], k: int) -> float:
    """Dao-AILab/sonic-moe: moe.py, MoE._compute_switch_loss."""
    experts = len(rows[0])
    acc_probs = [sum(column(rows, e)) for e in range(experts)]
    frequency = [sum(e in top(row, k) for row in rows) for e in range(experts)]
    return experts * sum(
        p / sum(acc_probs) * n / sum(frequency) for p, n in zip(acc_probs, frequency, strict=True)
    )


def switch(rows: list[list[float]], k: int) -> float:
    """Fedus et al. 2021, eq. 4-6 (k = 1)."""
    f = [sum(top(row, 1)[0] == e for row in rows) / len(rows) for e in range(len(rows[0]))]
    mean = [sum(column(rows, e)) / len(rows) for e in range(len(rows[0]))]
    return len(rows[0]) * sum(a * b for a, b in zip(f, mean, strict=True))


PUBLISHED: list[tuple[BalanceName, Any, tuple[int, ...]]] = [
    ("megatron", megatron, (1, 2, 3)),
    ("megablocks", lambda rows, k: megablocks([rows], k), (1, 2, 3)),
    ("deepspeed_topk", deepspeed_topk, (1, 2, 3)),
    ("gshard", gshard, (1, 2)),
    ("gshard", tutel, (1, 2)),
    ("deepseek_v3", deepseek, (1, 2, 3)),
    ("sonic", sonic, (1, 2, 3)),
    ("switch", switch, (1,)),
]


@pytest.mark.parametrize(("name", "formula", "top_ks"), PUBLISHED)
@pytest.mark.parametrize("score_fn", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_published_formula(
    name: BalanceName, formula: Any, top_ks: tuple[int, ...], score_fn: str
) -> None:
    rows = [normalized(row, score_fn) for row in LOGITS.tolist()]
    for k in top_ks:
        value, _ = load_balancing_loss(routing_of(k, score_fn), convention=name)
        assert value == pytest.approx(formula(rows, k), rel=64 * U)


def test_every_convention_is_compared() -> None:
    compared = {name for name, _, _ in PUBLISHED} | {"hf", "flaxformer"}
    assert set(BALANCE_CONVENTIONS) - compared == {"unscaled", "prob_entropy"}


def test_the_two_of_our_own() -> None:
    routing = routing_of(2)
    value, grad = load_balancing_loss(routing, convention="unscaled")
    want, want_grad = load_balancing_loss(routing, convention="switch")
    assert 4 * value == pytest.approx(want, rel=4 * U)
    np.testing.assert_allclose(4 * grad, want_grad, rtol=16 * U, atol=4 * U)
    mean = [math.fsum(column([softmax(r) for r in LOGITS], e)) / 6 for e in range(4)]
    value, _ = load_balancing_loss(routing, convention="prob_entropy")
    assert value == pytest.approx(4 * sum(p * math.log(p) for p in mean), rel=32 * U)


# Coefficients.

SUMMED = ["switch", "flaxformer", "megablocks", "deepspeed_topk", "unscaled"]  # all pre_drop


def model_value(name: BalanceName, coefficient: float, layers: list[Routing]) -> float:
    """Return the loss of a whole model as the named system takes it."""
    values = [load_balancing_loss(r, convention=name, coefficient=coefficient)[0] for r in layers]
    return sum(values) / (len(layers) if name == "megablocks" else 1)


@pytest.mark.parametrize("source", SUMMED)
@pytest.mark.parametrize("target", SUMMED)
def test_converted_coefficients_give_the_same_loss(source: Any, target: Any) -> None:
    layers = [routing_of(2), routing_of(2, token_mask=MASK), routing_of(2, "sigmoid")]
    converted = convert_coeff(0.01, source, target, num_experts=4, top_k=2, num_layers=3)
    want = model_value(source, 0.01, layers)
    assert model_value(target, converted, layers) == pytest.approx(want, rel=32 * U)


def test_megablocks_divides_by_its_layers() -> None:
    rows = [softmax(row) for row in LOGITS]
    layers = [rows, rows[::-1], [row[::-1] for row in rows]]
    whole = megablocks(layers, 2)
    assert whole == pytest.approx(sum(megablocks([r], 2) for r in layers) / 3, rel=32 * U)
    assert convert_coeff(
        0.3, "megablocks", "switch", num_experts=4, top_k=2, num_layers=3
    ) == pytest.approx(0.1, rel=4 * U)


def test_converted_coefficients_of_golden_uniform_values() -> None:
    sizes = {"num_experts": 8, "top_k": 2}
    assert convert_coeff(0.5, "switch", "deepspeed_topk", **sizes) == 0.5
    assert convert_coeff(0.5, "switch", "unscaled", **sizes) == 4.0
    with pytest.warns(UserWarning, match="differ in counts"):
        assert convert_coeff(0.5, "hf", "megablocks", **sizes) == 1.0
    with pytest.warns(UserWarning, match="differ in layers"):
        assert convert_coeff(0.5, "hf", "megatron", **sizes, num_layers=4) == 0.25
    with pytest.warns(UserWarning, match="deepseek_v3") as caught:
        assert convert_coeff(0.5, "deepseek_v3", "gshard", **sizes) == 0.5
    assert str(caught[0].message) == (
        "convert_coeff: 'deepseek_v3' and 'gshard' differ in counts ('unbiased_topk' and "
        "'top1'), scope ('sequence' and 'batch'); the coefficient is exact for uniform routing "
        "only."
    )
    assert caught[0].filename == __file__
    # With one choice, first choices are all choices: warnings are errors here.
    assert convert_coeff(0.5, "gshard", "switch", num_experts=8, top_k=1) == 0.5
    assert convert_coeff(0.5, "hf", "megatron", num_experts=8, top_k=2) == 1.0
    assert convert_coeff(0.5, "prob_entropy", "prob_entropy", **sizes) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "gpt"}, "source must be one of 'switch', "),
        ({"target": "gpt"}, "target must be one of 'switch', "),
        ({"coefficient": math.nan}, "coefficient must be finite, got nan."),
        ({"num_experts": 0}, "num_experts must be at least 1, got 0."),
        ({"top_k": 0}, "top_k must lie in 1..8, got 0. E is bound by num_experts."),
        ({"top_k": 9}, "top_k must lie in 1..8, got 9. E is bound by num_experts."),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0."),
        (
            {"target": "prob_entropy"},
            "target must be proportional to source, got 'prob_entropy' for 'switch'. "
            "'prob_entropy' is no multiple of counts times probabilities. "
            "Tune its coefficient anew.",
        ),
        ({"source": "prob_entropy"}, "target must be proportional to source, got 'hf' for "),
    ],
)
def test_messages_about_coefficients(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "coefficient": 1.0,
        "source": "switch",
        "target": "hf",
        "num_experts": 8,
        "top_k": 2,
        **changes,
    }
    with pytest.raises(RangeError) as caught:
        convert_coeff(**arguments)
    assert str(caught.value).startswith("convert_coeff: " + message)
