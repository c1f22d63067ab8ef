"""The same bits: for any number of threads, in every run, and (an option) in any batch."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from needs import need_numba

need_numba()

from numba_problems import Experts, bits, draw_experts, plan_of, run_experts, spread_plan

import npmoe
from accel.numba_cpu.launch import SKINNY_ROWS
from npmoe import MoEConfig

THREADS = (1, 2, 3, 5)
GRADS = list(npmoe.MoEGrads.__dataclass_fields__)


def cases() -> dict[str, Experts]:
    made = {
        "skinny": (spread_plan(9, 16, 2), 200, 150),
        "mixed": (plan_of([0, 1, SKINNY_ROWS, SKINNY_ROWS + 1, 300, 7, 90]), 150, 75),
        "wide": (spread_plan(700, 3, 2), 96, 130),
        "many groups": (spread_plan(900, 64, 4), 48, 40),
    }
    return {
        name: draw_experts(plan, H, I, activation="swiglu", integers=False, bias=name == "mixed")
        for name, (plan, H, I) in made.items()
    }


CASES = cases()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_threads(name: str, dtype: str) -> None:
    case = CASES[name].astype(dtype)
    found = []
    for threads in THREADS:
        backend = npmoe.get_backend("numba", num_threads=threads)
        found += [bits(run_experts(backend, case)) for _ in range(2)]
        team = backend._engines[np.dtype(dtype)].team
        assert len(team._jobs) == threads - 1, "threads were not used"
    assert all(f == found[0] for f in found[1:])


@pytest.mark.parametrize("position", ["mid", "input"])
def test_any_number_of_threads_and_weight_position(position: str) -> None:
    case = draw_experts(
        spread_plan(300, 8, 2), 96, 80, integers=False, bias=True, position=position, dropout=True
    ).astype("float32")
    found = [
        bits(run_experts(npmoe.get_backend("numba", num_threads=n), case)) for n in (*THREADS, 2)
    ]
    assert all(f == found[0] for f in found[1:])


@pytest.mark.parametrize("tokens", [3, 40, 1500])
def test_the_layer_with_its_router(tokens: int) -> None:
    cfg = MoEConfig(
        hidden_size=72, intermediate_size=50, num_experts=12, top_k=3, router_bias=True,
        shared_intermediate_size=64,
    )  # fmt: skip
    params = npmoe.init_params(cfg)
    rng = np.random.default_rng(0)
    x, grad = (rng.standard_normal((tokens, 72)).astype(np.float32) for _ in range(2))
    found = []
    for threads in (*THREADS, 1):
        backend = npmoe.get_backend("numba", num_threads=threads)
        output, saved = npmoe.moe_forward(x, params, cfg, backend)
        grads = npmoe.moe_backward(grad, saved, params)
        arrays = {n: getattr(grads, n) for n in GRADS if getattr(grads, n) is not None}
        found.append(bits({"output": output} | arrays))
    assert all(f == found[0] for f in found[1:])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_earlier_calls_leave_nothing_behind(dtype: str) -> None:
    """Scratch memory has been used by larger and smaller problems, in another order."""
    alone = {n: bits(run_experts(npmoe.get_backend("numba", num_threads=2), c.astype(dtype)))
             for n, c in CASES.items()}  # fmt: skip
    for order in (list(CASES), list(CASES)[::-1]):
        backend = npmoe.get_backend("numba", num_threads=2)
        for name in order:
            assert bits(run_experts(backend, CASES[name].astype(dtype))) == alone[name], name


def poison(backend: Any) -> None:
    for engine in backend._engines.values():
        for scratch in (*engine.team._scratch.values(), *engine._kept):
            scratch[...] = np.nan


@pytest.mark.parametrize("stored", ["float32", "float64", "float16"])
def test_scratch_is_written_before_it_is_read(stored: str) -> None:
    dtype = "float64" if stored == "float64" else "float32"
    backend = npmoe.get_backend("numba", num_threads=2)
    for case in CASES.values():
        made = case.astype(dtype, stored)
        first = bits(run_experts(backend, made))
        poison(backend)
        assert bits(run_experts(backend, made)) == first


# In any batch.

CFG = MoEConfig(hidden_size=67, intermediate_size=45, num_experts=5, top_k=2)


def layer_runs(backend: Any, cfg: MoEConfig, x: np.ndarray, grad: np.ndarray, params: Any) -> Any:
    """Return what belongs to each token: output, hidden gradient, router logits and weights."""
    output, saved = npmoe.moe_forward(x, params, cfg, backend)
    grads = npmoe.moe_backward(grad, saved, params)
    routing = saved.routing
    return output, grads.hidden_states, routing.router_logits, routing.topk_weights


def differing_tokens(backend: Any, cfg: MoEConfig, dtype: str, half: str | None = None) -> int:
    """Count (token, batch) pairs whose bits are not those of the token alone."""
    params = npmoe.init_params(cfg, dtype=dtype)
    if half is not None:
        matrices = {n: getattr(params, n).astype(half) for n in ("gate_up_proj", "down_proj")}
        params = npmoe.MoEParams(
            **{n: matrices.get(n, getattr(params, n)) for n in type(params).__dataclass_fields__}
        )
    rng = np.random.default_rng(3)
    x, grad = (rng.standard_normal((150, cfg.hidden_size)).astype(dtype) for _ in range(2))
    watched = range(8)
    alone = [layer_runs(backend, cfg, x[t : t + 1], grad[t : t + 1], params) for t in watched]
    batches = [np.arange(150), np.arange(8), np.arange(20), np.arange(150)[::-1]]
    batches += [rng.permutation(150)[:n] for n in (2, 17, 64, 65, 149)]
    count = 0
    for batch in batches:
        found = layer_runs(backend, cfg, x[batch], grad[batch], params)
        for t in watched:
            for at in np.flatnonzero(batch == t):
                one = [a[at].tobytes() for a in found]
                count += one != [a[0].tobytes() for a in alone[t]]
    return count


@pytest.mark.parametrize(("dtype", "half"), [("float32", None), ("float64", None),
                                             ("float32", "float16")])  # fmt: skip
def test_batch_invariance(dtype: str, half: str | None) -> None:
    for threads in (1, 3):
        backend = npmoe.get_backend("numba", batch_invariant=True, num_threads=threads)
        assert differing_tokens(backend, CFG, dtype, half) == 0


@pytest.mark.parametrize("activation", ["geglu", "geglu_tanh", "swiglu_oai", "gelu"])
@pytest.mark.parametrize("position", ["mid", "input"])
def test_batch_invariance_of_other_layers(position: str, activation: str) -> None:
    cfg = MoEConfig(
        hidden_size=67, intermediate_size=45, num_experts=5, top_k=2, activation=activation,
        weight_position=position, expert_bias=True, router_bias=True, score_fn="sigmoid",
        shared_intermediate_size=21, output_bias=True,
    )  # fmt: skip
    backend = npmoe.get_backend("numba", batch_invariant=True)
    assert differing_tokens(backend, cfg, "float32") == 0


def test_batch_invariance_is_not_the_default() -> None:
    """Or the tests above could not fail."""
    assert differing_tokens(npmoe.get_backend("numba"), CFG, "float32") > 0
