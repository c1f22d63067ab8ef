"""Every computed number of the convention tables against the system it is named after.

"Run": the upstream function, taken out of its file, was run in float64 (``torch.float32`` and
``.float()`` replaced by ``torch.float64`` and ``.double()``) with torch 2.13.0 on a CPU, from

- transformers 5.23.0;
- NVIDIA/Megatron-LM at d98e8a64ddf3, megatron/core/transformer/moe/moe_utils.py;
- deepspeedai/DeepSpeed at edaa72212672, deepspeed/moe/sharded_moe.py;
- microsoft/tutel at 82af7aad9fc3; databricks/megablocks at 78eea65fda01, layers/moe.py;
- google-research/vmoe at 942a78bc81d2, vmoe/moe.py;
- facebookresearch/fairseq at 26d62ae8fbf3, fairseq/modules/moe/top2gate.py;

without decorators, with stubs of one rank for distributed groups, and fairseq's logging histogram
of integers cast to floats. Capacities ran in each system's own precision. "Formula": the
published formula in plain Python, evaluated independently; the system itself was not run.
"""

from __future__ import annotations

import numpy as np
import pytest

from npmoe import MoEConfig, RangeError, expert_capacity
from npmoe import conventions as c
from npmoe.conventions import example

U = 2.0**-53

# (ids, weights); the order inside a token is upstream's, which leaves it open.
ROUTING = {
    # Run: transformers Qwen2MoeTopKRouter, norm_topk_prob=False.
    "softmax_topk": (
        [[0, 1], [4, 7], [3, 5], [6, 4]],
        [
            [0.37900012535975186, 0.22987519606562107],
            [0.3899914107972137, 0.23654174767309466],
            [0.34161790079285337, 0.2660522886486837],
            [0.4887166718066049, 0.179788816115381],
        ],
    ),
    # Run: transformers MixtralTopKRouter.
    "softmax_topk_renorm": (
        [[0, 1], [4, 7], [3, 5], [6, 4]],
        [
            [0.6224593312018546, 0.37754066879814546],
            [0.6224593312018545, 0.3775406687981454],
            [0.5621765008857981, 0.4378234991142019],
            [0.7310585786300049, 0.26894142136999516],
        ],
    ),
    # Run: transformers GptOssTopKRouter.
    "topk_softmax": (
        [[0, 1], [4, 7], [3, 5], [6, 4]],
        [
            [0.6224593312018546, 0.37754066879814546],
            [0.6224593312018546, 0.37754066879814546],
            [0.5621765008857981, 0.4378234991142019],
            [0.7310585786300049, 0.26894142136999516],
        ],
    ),
    # Run: transformers DeepseekV3TopkRouter, n_group=4, topk_group=2, scale 2.5.
    "sigmoid_bias_renorm": (
        [[7, 1], [2, 4], [3, 5], [6, 2]],
        [
            [1.1801675296044463, 1.319832470395554],
            [1.1553549125109472, 1.3446450874890525],
            [1.270808164772797, 1.229191835227203],
            [1.493826994880524, 1.006173005119476],
        ],
    ),
    # Run: Megatron topk_routing_with_score_function, score_function="sigmoid".
    "sigmoid_topk": (
        [[0, 1], [4, 7], [3, 5], [6, 4]],
        [
            [0.5186127121680035, 0.4813872878319966],
            [0.5149998955428672, 0.48500010445713276],
            [0.5083232659091188, 0.4916767340908812],
            [0.5305926240741117, 0.46940737592588827],
        ],
    ),
    # Run: transformers DeepseekV4TopKRouter, scale 1.5.
    "sqrtsoftplus_bias": (
        [[7, 1], [7, 2], [3, 5], [6, 2]],
        [
            [0.7015154546926577, 0.7984845453073424],
            [0.7950339332424073, 0.7049660667575925],
            [0.7701435478964743, 0.7298564521035256],
            [0.9290326850581381, 0.5709673149418619],
        ],
    ),
    # Run: transformers Llama4Router with top_k=2.
    "llama4": (
        [[0, 1], [4, 7], [3, 5], [6, 4]],
        [
            [0.8807970779778823, 0.8175744761936437],
            [0.9046505351008906, 0.8519528019683106],
            [0.8807970779778823, 0.8519528019683106],
            [0.9241418199787566, 0.8175744761936437],
        ],
    ),
    # Run: transformers DeepseekV4HashRouter, tid2eid = example.TABLE, scale 1.5.
    "hash": (
        [[5, 2], [0, 7], [3, 1], [6, 4]],
        [
            [0.8274103713423935, 0.6725896286576065],
            [0.5638924767083829, 0.936107523291617],
            [0.8399705605183985, 0.6600294394816016],
            [0.827701395655325, 0.672298604344675],
        ],
    ),
    # Formula: google-research/vmoe NoisyTopExpertsPerItemRouter, noise example.NOISE / E.
    "noisy_topk": (
        [[0, 1], [4, 7], [3, 4], [6, 4]],
        [
            [0.3319980749406829, 0.24289498040680205],
            [0.27138888974837677, 0.27138888974837677],
            [0.30483918615059125, 0.20951270439666678],
            [0.41863702783710494, 0.19775012968915748],
        ],
    ),
    # Run: fairseq top2gating, second_expert_policy="random", normalised before dropping, with
    # example.UNIFORM for torch.rand_like.
    "gshard_top2": (
        [[0, 1], [4, 7], [3, -1], [6, 4]],
        [
            [0.6224593312018546, 0.37754066879814546],
            [0.6224593312018545, 0.3775406687981454],
            [0.5621765008857981, 0.0],
            [0.7310585786300049, 0.26894142136999516],
        ],
    ),
    # Formula: Zhou et al. 2022, eq. 1-3, C = T K / E = 1.
    "expert_choice": (
        [[0, 1, -1], [2, 4, 7], [3, 5, -1], [6, -1, -1]],
        [
            [0.3790001253597519, 0.22987519606562107, 0.0],
            [0.14346982226574137, 0.3899914107972137, 0.23654174767309466],
            [0.34161790079285337, 0.26605228864868374, 0.0],
            [0.48871667180660483, 0.0, 0.0],
        ],
    ),
    # Formula: Puigcerver et al. 2023, Algorithms 1-2, slots' vectors = unit vectors, scale 1.
    "soft_moe": (
        [list(range(8))] * 4,
        [
            [
                *(0.19914252192941861, 0.1682734946253367, 0.07248936088721131),
                *(0.12014871676439584, 0.11044472861865452, 0.08578721308588934),
                *(0.10152449737409878, 0.14218946671499497),
            ],
            [
                *(0.10187720117016662, 0.12543409557576674, 0.14409248605821223),
                *(0.08868522528931683, 0.19014845354890098, 0.11703149069540525),
                *(0.06720472530839658, 0.16552632235383483),
            ],
            [
                *(0.06494253587100414, 0.13713103618567937, 0.10169348992517908),
                *(0.1849176490962579, 0.12725507350724727, 0.17160016932030647),
                *(0.09436968388479666, 0.118090362209529),
            ],
            [
                *(0.14613741783541695, 0.08191551893178951, 0.11762190620879663),
                *(0.10941171060421243, 0.15710349065295892, 0.07619768579034095),
                *(0.20983767030208608, 0.10177459967439854),
            ],
        ],
    ),
    # Run: Megatron sinkhorn and torch.topk; weights torch.softmax, as sinkhorn_load_balancing.
    "sinkhorn": (
        [[0, 1], [4, 2], [5, 3], [6, 4]],
        [
            [0.37900012535975186, 0.22987519606562107],
            [0.3899914107972137, 0.1434698222657414],
            [0.2660522886486837, 0.34161790079285337],
            [0.4887166718066049, 0.179788816115381],
        ],
    ),
    # Run: Megatron qb_dual_update twice from beta = 0 (it chooses by the beta of the step before,
    # npmoe by the new one), then topk_routing_with_score_function with these indices.
    "quantile_balance": (
        [[0, 1], [4, 2], [3, 5], [6, 0]],
        [
            [0.6224593312018546, 0.37754066879814546],
            [0.7310585786300049, 0.26894142136999516],
            [0.5621765008857981, 0.4378234991142019],
            [0.7772998611746911, 0.2227001388253088],
        ],
    ),
}

BALANCE = {
    # Formula: Fedus et al. 2021, eq. 4-6, every choice counted and divided by k.
    "switch": 0.8472199377483844,
    "gshard": 1.0362160044029611,  # Run: Tutel gshard_loss.
    "hf": 2.229401524276338,  # Run: transformers mixtral load_balancing_loss_func.
    # Run: transformers switch_transformers load_balancing_loss_func, Flaxformer's in torch.
    "flaxformer": 1.6944398754967687,
    # Run: Megatron compute_routing_scores_for_aux_loss, switch_load_balancing_loss_func.
    "megatron": 1.114700762138169,
    "megablocks": 0.8472199377483843,  # Run: MegaBlocks batched_load_balancing_loss, one layer.
    "deepspeed_topk": 0.8472199377483844,  # Formula: DeepSpeed topkgating.
    "deepseek_v3": 1.522572124118358,  # Formula: DeepSeek-V3 Technical Report, eq. 17-20.
    "sonic": 0.927417517273865,  # Formula: sonic-moe MoE._compute_switch_loss.
    "unscaled": 0.10590249221854806,  # Formula: as "switch", without E.
    "prob_entropy": -16.360791283076303,  # Formula: E sum P ln P.
    "importance": 0.0667619179493654,  # Formula: vmoe _importance_auxiliary_loss.
    # Formula: Tutel importance_loss without its 1e-10 in the denominator (with it, run:
    # 0.07629933476875499).
    "importance, bessel": 0.07629933479927474,
    "load": 0.2950812326509308,  # Formula: vmoe _load_auxiliary_loss.
    "z": 9.7002607493025,  # Run: Megatron z_loss_func; transformers router_z_loss_func agrees.
}

# By c.CAPACITY_EXAMPLES.
CAPACITY = {
    "switch": (55, 54, 74, 3),  # Formula: Fedus et al. 2021, eq. 3, in fractions.
    "megatron": (56, 54, 74, 3),  # Run: get_capacity(T * k, E, cf).
    "deepspeed": (55, 55, 74, 8),  # Run: _capacity(gates, cf * k, 8), factor a float32 tensor.
    "megablocks": (55, 54, 73, 2),  # Run: ParallelMLP.expert_capacity.
    "tutel": (55, 56, 72, 2),  # Run: extract_critical.
    "v_moe": (56, 56, 76, 4),  # Run: compute_capacity(T, E, cf * k, "ceil", 4).
    "v_moe_round": (56, 56, 76, 4),  # Run: compute_capacity(T, E, cf * k, "round", 4).
    # Formula: fairseq top2gating, capacity = 2 * ceil(T / E); for 4 tokens also run: 2.
    "gshard": (100, 24, 34, 4),
    "fairseq_eval": (100, 23, 250, 4),  # Formula: fairseq top2gating, ceil(0.25 * T).
}


def by_id(ids: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order every token's choices by id."""
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


@pytest.mark.parametrize("row", c.routing_table(), ids=lambda row: row.name)
def test_routing(row: c.RoutingRow) -> None:
    ids, weights = by_id(*map(np.array, ROUTING[row.name]))
    found_ids, found = by_id(row.topk_ids, row.topk_weights)
    assert found_ids.tolist() == ids.tolist()
    # Some ten roundings each in the exponentials, their sum and a quotient, on both sides.
    np.testing.assert_allclose(found, weights, rtol=32 * U, atol=0)


def test_every_routing_row_has_its_own_golden_and_its_own_outcome() -> None:
    assert list(c.ROUTING_CONVENTIONS) == list(ROUTING)
    assert len(ROUTING) == 14
    outcomes = {(str(i), str(np.round(w, 9))) for i, w in ROUTING.values()}
    # Only #2 and #3 agree, in exact arithmetic.
    assert len(outcomes) == 13


@pytest.mark.parametrize("row", c.balance_table(), ids=lambda row: row.name)
def test_balance(row: c.BalanceRow) -> None:
    assert row.value == pytest.approx(BALANCE[row.name], rel=64 * U)


def test_balance_of_the_uniform_value() -> None:
    """Where routing is uniform by construction, the stated values come out."""
    rows = {row.name: row for row in c.balance_table()}
    assert list(rows) == list(BALANCE)
    stated = {name: row.uniform_value for name, row in rows.items()}
    ones = {"switch", "gshard", "megatron", "megablocks", "deepspeed_topk", "deepseek_v3", "sonic"}
    assert {name for name, value in stated.items() if value == 1.0} == ones
    assert stated["hf"] == stated["flaxformer"] == 2.0
    assert stated["unscaled"] == 0.125
    assert stated["z"] == pytest.approx(np.log(8) ** 2, rel=8 * U)
    assert stated["prob_entropy"] == pytest.approx(-8 * np.log(8), rel=8 * U)


@pytest.mark.parametrize("row", c.capacity_table(), ids=lambda row: row.name)
def test_capacity(row: c.CapacityRow) -> None:
    assert row.rows_per_expert == CAPACITY[row.name]


def test_the_capacity_table_is_whole_and_its_float_note_is_true() -> None:
    assert list(c.CAPACITY_CONVENTIONS) == list(CAPACITY)
    cfg = c.capacity_convention("megablocks", 60, 4, "1.2")
    assert expert_capacity(275, cfg) == 22
    assert int(1.2 * (4 * 275 / 60)) == 21  # formula: ParallelMLP.expert_capacity
    assert "21, not 22" in c.CAPACITY_CONVENTIONS["megablocks"].note


@pytest.mark.parametrize("name", c.ROUTING_CONVENTIONS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_conventions_give_configs(name: str, top_k: int) -> None:
    if name == "gshard_top2" and top_k == 1:
        with pytest.raises(RangeError) as caught:
            c.routing_convention(name, 8, top_k)
        assert str(caught.value) == (
            "routing_convention: top_k must be 2 with name='gshard_top2', got 1."
        )
        return
    cfg = c.routing_convention(name, 8, top_k, hidden_size=6)
    assert (cfg.num_experts, cfg.top_k, cfg.hidden_size) == (8, top_k, 6)


def test_fields_that_depend_on_sizes() -> None:
    assert not c.routing_convention("sigmoid_topk", 8, 1).renormalize
    assert c.routing_convention("sigmoid_topk", 8, 2).renormalize
    assert c.routing_convention("sinkhorn", 8, 1).score_fn == "sigmoid"
    assert c.routing_convention("noisy_topk", 16, 2).router_noise_std == 1 / 16
    assert c.routing_convention("softmax_topk", 8, 2) == MoEConfig(num_experts=8, top_k=2)
    grouped = c.routing_convention("sigmoid_bias_renorm", 16, 4, num_groups=4, topk_group=2)
    assert (grouped.num_groups, grouped.routed_scaling_factor) == (4, 1.0)
    assert expert_capacity(9, c.capacity_convention("gshard", 8, 1, "3")) == 4
    assert expert_capacity(9, c.capacity_convention("fairseq_eval", 8, 1, "3")) == 3


@pytest.mark.parametrize("function", [c.routing_convention, c.capacity_convention])
def test_unknown_names(function) -> None:
    with pytest.raises(RangeError) as caught:
        function("mixtrall", 8, 2, **({"capacity_factor": 1} if "cap" in function.__name__ else {}))
    text = str(caught.value)
    assert text.startswith(f"{function.__name__}: name must be one of '")
    assert text.endswith("got 'mixtrall'.")


def test_texts_fit_a_terminal_and_name_every_row() -> None:
    for text, names in (
        (c.routing_text(), ROUTING),
        (c.balance_text(), BALANCE),
        (c.capacity_text(), CAPACITY),
    ):
        lines = text.splitlines()
        assert max(map(len, lines)) <= 100, max(lines, key=len)
        assert all(any(name in line for line in lines) for name in names)
    assert "0.622 0.378" in c.routing_text()


def test_the_draws_do_not_depend_on_numpy() -> None:
    draws = example.FixedDraws()
    assert draws.standard_normal((4, 8)).tolist() == example.NOISE.tolist()
    assert draws.random(4).tolist() == example.UNIFORM.tolist()
    draws.random(4)[:] = 0.0
    assert example.UNIFORM.max() == 0.9
