# ruff: noqa: E402  # imports follow importorskip
"""Where upstream surprises, and what npmoe does instead: both sides are pinned.

A test here that fails after an update of transformers means that upstream changed its mind.
"""

from __future__ import annotations

import pytest

WHY = "parity with transformers needs the extra npmoe[parity]"
pytest.importorskip("torch", reason=WHY)
pytest.importorskip("transformers", reason=WHY)

import numpy as np
import torch
from families import FAMILIES, upstream
from parity_compare import FLOAT64_BOUND, by_id, check_close
from parity_upstream import Built, Draw, default_float64, fill_randomly, run_case

import npmoe


def made(build, seed: int = 0, family: str = "quirks") -> tuple[torch.nn.Module, torch.Tensor]:
    """Return a float64 block with random parameters and an input for it."""
    draw = Draw.of(family, seed)
    draw.E, draw.K, draw.B, draw.S = 5, 2, 2, 6
    with default_float64():
        built = build(draw)
    if not isinstance(built, Built):
        built = Built(built, dict)
    built.block.double()
    fill_randomly(draw, built)
    return built.block, torch.from_numpy(draw.array((draw.B, draw.S, draw.H), 1.0))


def jittered(model: str, prefix: str, block: str):
    def build(d: Draw) -> torch.nn.Module:
        m, c = upstream(
            model, f"{prefix}Config", hidden_size=d.H, intermediate_size=d.I,
            num_local_experts=d.E, num_experts_per_tok=d.K, router_jitter_noise=0.1,
        )  # fmt: skip
        return getattr(m, block)(c)

    return build


def jittered_dbrx(d: Draw) -> torch.nn.Module:
    _, ffn = upstream(
        "dbrx", "DbrxFFNConfig", hidden_size=d.H, ffn_hidden_size=d.I, moe_num_experts=d.E,
        moe_top_k=d.K, moe_jitter_eps=0.1, ffn_act_fn={"name": "silu"},
    )  # fmt: skip
    m, c = upstream("dbrx", "DbrxConfig", ffn_config=ffn)
    return m.DbrxFFN(c)


JITTERED = {
    "mixtral": jittered("mixtral", "Mixtral", "MixtralSparseMoeBlock"),
    "minimax": jittered("minimax", "MiniMax", "MiniMaxSparseMoeBlock"),
    "minimax_m2": jittered("minimax_m2", "MiniMaxM2", "MiniMaxM2SparseMoeBlock"),
    "dbrx": jittered_dbrx,
}


@pytest.mark.parametrize("name", JITTERED)
def test_jitter_writes_into_the_callers_tensor_upstream(name: str) -> None:
    block, hidden = made(JITTERED[name])
    before = hidden.clone()
    with torch.no_grad():
        block.eval()(hidden)
        assert torch.equal(hidden, before)
        block.train()(hidden)
    assert not torch.equal(hidden, before)


def test_jitter_reaches_the_router_alone_and_no_input_here() -> None:
    cfg = npmoe.MoEConfig(
        hidden_size=6, intermediate_size=5, num_experts=4, top_k=4, router_jitter=0.1
    )
    params = npmoe.init_params(cfg, rng=0, dtype="float64")
    hidden = np.random.default_rng(1).standard_normal((7, 6))
    before = hidden.copy()
    jittery, saved = npmoe.moe_forward(hidden, params, cfg, rng=np.random.default_rng(2))
    assert np.array_equal(hidden, before)
    plain, _ = npmoe.moe_forward(hidden, params, cfg)
    assert not np.array_equal(jittery, plain)
    # with the weights of the jittered router, the experts must have seen the clean input
    logits = saved.routing.router_logits
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    expected = sum(weights[:, e : e + 1] * one_expert(params, e, hidden) for e in range(4))
    check_close("output", jittery, expected, 1e-14)


def one_expert(params: npmoe.MoEParams, expert: int, x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x @ params.gate_up_proj[expert].T, 2, axis=1)
    return (gate / (1 + np.exp(-gate)) * up) @ params.down_proj[expert].T


def test_switch_casts_its_classifier_in_place_and_jitters_a_float32_input_in_place() -> None:
    case = FAMILIES["switch_transformers"].build
    block, hidden = made(case)
    assert block.router.classifier.weight.dtype is torch.float64
    block.eval()(hidden)
    assert block.router.classifier.weight.dtype is torch.float32
    single = hidden.float()
    before = single.clone()
    with torch.no_grad():
        block.float().train()(single)
    assert not torch.equal(single, before)


def test_grouped_mm_refuses_float64_and_batched_mm_agrees_with_eager() -> None:
    block, hidden = made(FAMILIES["mixtral"].build)
    eager = block(hidden).detach()
    block.experts.config._experts_implementation = "batched_mm"
    batched = block(hidden).detach()
    assert (batched - eager).abs().max() <= 1e-14 * eager.abs().max()
    block.experts.config._experts_implementation = "grouped_mm"
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        block(hidden)


def unread_v2(d: Draw, value: bool) -> torch.nn.Module:
    m, c = upstream(
        "deepseek_v2", "DeepseekV2Config", hidden_size=d.H, moe_intermediate_size=d.I,
        n_routed_experts=d.E, num_experts_per_tok=d.K, norm_topk_prob=value,
    )  # fmt: skip
    return m.DeepseekV2Moe(c)


def unread_v4(d: Draw, value: bool) -> torch.nn.Module:
    m, c = upstream(
        "deepseek_v4", "DeepseekV4Config", hidden_size=d.H, moe_intermediate_size=d.I,
        n_routed_experts=d.E, num_experts_per_tok=d.K, mlp_layer_types=["moe"],
        norm_topk_prob=value,
    )  # fmt: skip
    return m.DeepseekV4SparseMoeBlock(c, 0)


def unread_laguna(d: Draw, value: bool) -> torch.nn.Module:
    m, c = upstream(
        "laguna", "LagunaConfig", hidden_size=d.H, moe_intermediate_size=d.I, num_experts=d.E,
        num_experts_per_tok=d.K, moe_apply_router_weight_on_input=value,
    )  # fmt: skip
    return m.LagunaSparseMoeBlock(c)


@pytest.mark.parametrize("build", [unread_v2, unread_v4, unread_laguna])
def test_upstream_never_reads_this_flag(build) -> None:
    """norm_topk_prob of deepseek_v2 and _v4; moe_apply_router_weight_on_input of laguna."""
    outputs = []
    for value in (False, True):
        block, hidden = made(lambda d, value=value: build(d, value))
        outputs.append(block.eval()(hidden).detach())
    assert torch.equal(*outputs)


def longcat(top_k: int, bias: bool):
    def build(d: Draw) -> torch.nn.Module:
        m, c = upstream(
            "longcat_flash", "LongcatFlashConfig", hidden_size=d.H, expert_ffn_hidden_size=d.I,
            n_routed_experts=d.E, moe_topk=top_k, zero_expert_num=2,
        )  # fmt: skip
        c.router_bias = bias
        return m.LongcatFlashMoE(c)

    return build


def test_longcat_makes_a_router_bias_that_does_nothing() -> None:
    block, hidden = made(longcat(2, bias=True))
    before = block(hidden).detach()
    with torch.no_grad():
        block.router.classifier.bias += torch.arange(7.0)
    assert torch.equal(block(hidden), before)


def test_longcat_fails_with_one_expert_per_token() -> None:
    block, hidden = made(longcat(1, bias=False))
    with pytest.raises(ValueError, match="not enough values to unpack"):
        block(hidden)


def test_longcat_stores_weights_for_experts_that_have_none() -> None:
    block, hidden = made(longcat(2, bias=False))
    assert block.experts.gate_up_proj.shape[0] == 5 + 2
    block(hidden).sum().backward()
    assert not block.experts.gate_up_proj.grad[5:].any()


def phimoe(d: Draw) -> torch.nn.Module:
    m, c = upstream(
        "phimoe", "PhimoeConfig", hidden_size=d.H, intermediate_size=d.I, num_local_experts=d.E,
        num_experts_per_tok=d.K, router_jitter_noise=0.0, input_jitter_noise=0.0,
    )  # fmt: skip
    return m.PhimoeTopKRouter(c)


def test_phimoe_without_jitter_gives_every_choice_the_weight_one() -> None:
    router, hidden = made(phimoe)
    flat = hidden.reshape(-1, hidden.shape[-1])
    for mode in (router.train(), router.eval()):
        _, weights, _ = mode(flat)
        assert (weights - 1).abs().max() <= 1e-15


def nllb(
    d: Draw,
    *,
    before: bool = False,
    by_batch: bool = False,
    capacity: float = 0.25,
    policy: str = "all",
):
    m, c = upstream(
        "nllb_moe", "NllbMoeConfig", d_model=d.H, num_experts=d.E, second_expert_policy=policy,
        normalize_router_prob_before_dropping=before, batch_prioritized_routing=by_batch,
        moe_eval_capacity_token_fraction=capacity,
    )  # fmt: skip
    return m, c  # the configuration cannot say float64: set it on the router


def nllb_routing(seed: int, **options) -> tuple[npmoe.MoEConfig, dict, np.ndarray, np.ndarray]:
    """Run upstream's top-2 router; return npmoe's case, its weights (T, E) and first choices."""
    found = {}

    def build(d: Draw) -> torch.nn.Module:
        m, c = nllb(d, **options)
        found["sizes"] = {"hidden_size": d.H, "intermediate_size": d.I, "num_experts": d.E}
        made_router = m.NllbMoeTop2Router(c)
        made_router.dtype = torch.float64
        return made_router

    router, hidden = made(build, seed, "nllb_moe")
    flat = hidden.reshape(-1, hidden.shape[-1])
    first, weights, _ = router.eval()(flat)
    cfg = npmoe.MoEConfig(
        **found["sizes"],
        top_k=2,
        renormalize=True,
        renorm_eps=float(np.finfo(np.float64).eps),
        renorm_eps_mode="max",
        renormalize_drop="before" if options.get("before") else "after",
        expert_capacity=int(np.ceil(options["capacity"] * len(flat))),
        drop_policy="batch_priority" if options.get("by_batch") else "k_major",
        activation="relu",
    )
    params = npmoe.init_params(cfg, rng=seed, dtype="float64")
    router_weight = router.classifier.weight.detach().numpy()
    fields = {
        "router_weight": router_weight,
        "gate_up_proj": params.gate_up_proj,
        "down_proj": params.down_proj,
    }
    return cfg, {**fields, "hidden": flat.numpy()}, weights.detach().numpy(), first.numpy()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("before", "by_batch"), [(False, False), (True, False), (False, True)])
def test_the_router_of_nllb_with_its_capacity_is_expressible(
    seed: int, before: bool, by_batch: bool
) -> None:
    cfg, case, weights, _ = nllb_routing(seed, before=before, by_batch=by_batch, capacity=0.25)
    hidden = case.pop("hidden")
    _, saved = npmoe.moe_forward(hidden, npmoe.MoEParams(**case), cfg)
    ours = np.zeros_like(weights)
    kept = saved.plan.row_ids >= 0
    tokens, slots = np.nonzero(kept)
    ours[tokens, saved.routing.topk_ids[kept]] = saved.routing.topk_weights[tokens, slots]
    assert np.array_equal(ours > 0, weights > 0)
    check_close("weights", ours, weights, FLOAT64_BOUND)
    assert not kept.all(), "nothing was dropped"


def test_the_second_weight_of_nllb_is_not_normalised_with_the_random_policy() -> None:
    """Upstream overwrites it; here both weights are divided, before the second may be dropped."""

    def build(d: Draw) -> torch.nn.Module:
        m, c = nllb(d, before=True, capacity=1.0, policy="random")
        router = m.NllbMoeTop2Router(c)
        router.dtype = torch.float64
        return router

    router, hidden = made(build)
    flat = hidden.reshape(-1, hidden.shape[-1])
    _, weights, logits = router.eval()(flat)
    best = torch.softmax(logits, -1).topk(2).values
    found = weights.topk(2).values
    kept = found[:, 1] > 0
    assert kept.any()
    assert torch.allclose(found[kept, 1], best[kept, 1], rtol=1e-14)
    assert torch.allclose(found[:, 0], best[:, 0] / best.sum(-1), rtol=1e-14)


def test_the_batch_priority_of_nllb_ranks_by_weights_before_their_normalisation() -> None:
    """Upstream ranks tokens by p1, here by the weight as it stands at the drop: p1 / (p1 + p2)."""
    differ = 0
    for seed in range(12):
        cfg, case, weights, _ = nllb_routing(seed, before=True, by_batch=True, capacity=0.25)
        hidden = case.pop("hidden")
        _, saved = npmoe.moe_forward(hidden, npmoe.MoEParams(**case), cfg)
        ours = np.zeros(weights.shape, dtype=bool)
        kept = saved.plan.row_ids >= 0
        ours[np.nonzero(kept)[0], saved.routing.topk_ids[kept]] = True
        differ += not np.array_equal(ours, weights > 0)
    assert differ > 0


def test_the_block_of_nllb_does_not_follow_its_router() -> None:
    """It takes the 0s and 1s of the first-choice mask for expert ids: experts 0 and 1 alone run."""

    def build(d: Draw) -> torch.nn.Module:
        m, c = nllb(d, before=True, capacity=1.0)
        made_block = m.NllbMoeSparseMLP(c, d.I)
        made_block.router.dtype = torch.float64
        return made_block

    block, hidden = made(build)
    block.eval()
    flat = hidden.reshape(-1, hidden.shape[-1])
    first, weights, _ = block.router(flat)
    on_first = (weights * first).sum(-1, keepdim=True)
    on_second = (weights * (1 - first)).sum(-1, keepdim=True)
    expert = [block.experts[f"expert_{e}"] for e in range(5)]
    upstream_output = on_second * expert[0](flat) + on_first * expert[1](flat)
    upstream_output = upstream_output * (1 - block.experts.moe_token_dropout)
    routed_output = sum(weights[:, e : e + 1] * expert[e](flat) for e in range(5))
    routed_output = routed_output * (1 - block.experts.moe_token_dropout)
    got = block(hidden).reshape(flat.shape).detach()
    scale = got.abs().max()
    assert (got - upstream_output).abs().max() <= 1e-13 * scale
    assert (got - routed_output).abs().max() > 1e-2 * scale


def test_the_routed_experts_of_aria_ignore_hidden_act() -> None:
    kinds = set()
    for seed in range(12):
        case = run_case("aria", seed, FAMILIES["aria"].build, raised=True)
        assert "activation" not in case["overrides"]
        kinds.add(case["overrides"].get("shared_activation"))
    assert kinds == {None, "geglu", "geglu_tanh", "reglu"}


def test_the_talker_of_qwen3_omni_lacks_a_field_that_its_block_reads() -> None:
    m, c = upstream("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextConfig")
    with pytest.raises(AttributeError, match="shared_expert_intermediate_size"):
        m.Qwen3OmniMoeTalkerTextSparseMoeBlock(c)


def test_rows_are_compared_by_expert_since_upstream_sorts_them_otherwise() -> None:
    """deepseek_v3 asks torch.topk for unsorted results; ours descend by the biased score."""
    ids, weights = by_id(np.array([[2, 0]]), np.array([[0.3, 0.7]]))
    assert ids.tolist() == [[0, 2]]
    assert weights.tolist() == [[0.7, 0.3]]
