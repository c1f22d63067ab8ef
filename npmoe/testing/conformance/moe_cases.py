"""Cases of the whole layer: presets, draws that no rounding decides, truth, smaller cases."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.model_presets import PRESETS, preset
from npmoe.params import MoEParams, param_axes
from npmoe.testing.conformance.case import Case, Expected
from npmoe.testing.conformance.layer_cases import (
    LayerTruth,
    finite_truth,
    is_settled,
    layer_truth,
    plain_problem,
)
from npmoe.testing.problems import MoEProblem

PARAMS = ("router_weight", "gate_up_proj", "down_proj")
PER_TOKEN = ("grad_output", "hidden_states")
# Where the published design has no other number of experts per token.
TOP_K = {"switch": 1, "switch_transformers": 1, "gshard": 2}
_DRAWS = 60  # tries to draw a case in which nothing depends on rounding

Change = Callable[[np.random.Generator, dict[str, Any]], None]


def moe_config(name: str, H: int, I: int, E: int, K: int) -> MoEConfig:
    """Return the preset's config, with nothing random."""
    sizes: dict[str, Any] = {"hidden_size": H, "intermediate_size": I, "num_experts": E}
    if K == 1 and PRESETS[name].fields.get("drop_policy") == "k_major":
        sizes["drop_policy"] = "position"  # the same, and its only name with one choice
    return preset(name, **sizes, top_k=K).for_evaluation()


def moe_presets() -> tuple[str, ...]:
    """Return the presets whose only parameters are the router and the two projections."""
    return tuple(
        sorted(
            name
            for name in PRESETS
            if tuple(param_axes(preset(name))) == PARAMS and preset(name).routing != "soft"
        )
    )


def make_moe(
    rng: np.random.Generator,
    name: str,
    size: tuple[int, int, int, int, int],
    dtype: str,
    *,
    backward: bool,
    change: Change | None = None,
    tied: bool = False,
) -> Case:
    """Return a case (T, E, K, H, I) whose choices no rounding can change, or only exact ties."""
    T, E, K, H, I = size
    K = TOP_K.get(name, min(E, K))
    E = max(E, K)
    for _ in range(_DRAWS):
        wide = moe_config(name, H, I, E, K).gate_up_size
        arguments: dict[str, Any] = {"grad_output": _normal(rng, T, H)} if backward else {}
        arguments |= {
            "hidden_states": _normal(rng, T, H),
            "router_weight": _normal(rng, E, H) * (1.5 / np.sqrt(H)),
            "gate_up_proj": _normal(rng, E, wide, H) * (1.5 / np.sqrt(H)),
            "down_proj": _normal(rng, E, H, I) * (1.5 / np.sqrt(I)),
        }
        if change is not None:
            change(rng, arguments)
        arguments = {n: a.astype(dtype) for n, a in arguments.items()}
        case = _describe(arguments | {"top_k": K}, {"preset": name, "tied": tied})
        if tied or _usable(case):
            return case
    raise RangeError(f"check_moe: no case of {case.note} could be drawn without near ties.")


def _normal(rng: np.random.Generator, *shape: int) -> HostArray:
    return np.asarray(rng.standard_normal(shape))


def _describe(arguments: dict[str, Any], options: dict[str, Any]) -> Case:
    T, H = arguments["hidden_states"].shape
    E, _, I = arguments["down_proj"].shape
    note = f"{options['preset']} T={T} E={E} K={arguments['top_k']} H={H} I={I}"
    return Case(arguments=arguments, note=note, options=options)


def _usable(case: Case) -> bool:
    truth = moe_truth(case)
    problem_ok = is_settled(_problem(case), truth)
    return problem_ok and finite_truth(truth)


def _problem(case: Case) -> MoEProblem:
    given = {n: np.asarray(a) for n, a in case.arguments.items()}
    E, H, I = given["down_proj"].shape
    x = given["hidden_states"]
    return plain_problem(
        moe_config(case.options["preset"], H, I, E, int(case.arguments["top_k"])),
        x,
        given.get("grad_output", np.ones_like(x)),
        MoEParams(**{n: given[n] for n in PARAMS}),
    )


@functools.lru_cache(maxsize=32)
def moe_truth(case: Case) -> LayerTruth:
    """Return what the definition makes of a case."""
    return layer_truth(_problem(case))


def expected_moe(case: Case) -> tuple[Expected, ...]:
    """Return the output, or the four gradients, of `npmoe.naive` with their bounds."""
    truth, dtype = moe_truth(case), str(case.arguments["hidden_states"].dtype)
    if "grad_output" not in case.arguments:
        return (Expected(value=truth.forward.output, bound=truth.bounds.output, dtype=dtype),)
    return tuple(
        Expected(value=getattr(truth.grads, n), bound=getattr(truth.bounds.grads, n), dtype=dtype)
        for n in ("hidden_states", *PARAMS)
    )


def reduce_moe(case: Case) -> Iterator[Case]:
    """Yield fewer tokens, experts and choices, then narrower; none that rounding could decide."""
    for candidate in _smaller(case):
        if case.options["tied"] or _usable(candidate):
            yield candidate


def _smaller(case: Case) -> Iterator[Case]:
    given, options = case.arguments, dict(case.options)
    T, (E, H, I), K = len(given["hidden_states"]), given["down_proj"].shape, given["top_k"]

    def change(**arguments: Any) -> Case:
        return _describe(given | arguments, options)

    for size in dict.fromkeys((T // 2, T // 4, 1)):
        for start in range(0, T, size) if size > 0 else ():
            keep = np.ones(T, bool)
            keep[start : start + size] = False
            yield change(**{n: given[n][keep] for n in PER_TOKEN if n in given})
    for size in dict.fromkeys((E // 2, E // 4, 1)):
        for start in range(0, E, size) if size > 0 else ():
            if E - len(range(start, min(E, start + size))) >= K:
                gone = np.arange(start, min(E, start + size))
                yield change(**{n: np.delete(given[n], gone, axis=0) for n in PARAMS})
    if K > 1 and options["preset"] not in TOP_K:
        yield change(top_k=K - 1)
    if H > 1:
        cut = {n: given[n][..., : H // 2] for n in (*PER_TOKEN, *PARAMS[:2]) if n in given}
        yield change(**cut, down_proj=given["down_proj"][:, : H // 2])
    if I > 1:
        kept = np.arange(I // 2)
        rows = np.r_[kept, I + kept] if given["gate_up_proj"].shape[1] == 2 * I else kept
        yield change(
            gate_up_proj=given["gate_up_proj"][:, rows], down_proj=given["down_proj"][..., kept]
        )


def steep_router(rng: np.random.Generator, arguments: dict[str, Any]) -> None:
    """Make logits of several hundred, whose exponentials over- and underflow."""
    router, hidden = arguments["router_weight"], arguments["hidden_states"]
    E, size = len(router), 1024.0
    # From large hidden states, so that the router's rounding is small in their gradient.
    hidden[:, 0] = rng.choice([-size, size], len(hidden))
    arguments["gate_up_proj"][:, :, 0] /= size
    router *= 0.02
    # The best ones close together, at the far end from 0 for both signs.
    levels = 500.0 * np.where(np.arange(E) % 2, 1.0, -1.0) + 0.75 * np.arange(E)
    router[:, 0] = rng.permutation(levels) / size


def near_ties(rng: np.random.Generator, arguments: dict[str, Any]) -> None:
    """Make the logits of a token differ in their tenth bit, the higher ids' being larger."""
    router, hidden = arguments["router_weight"], arguments["hidden_states"]
    hidden[...] = np.abs(hidden) + 0.25
    router[...] = (1.0 + 0.5 * rng.random(router.shape[1])) * (
        1.0 + 2.0**-10 * (1.0 + np.arange(len(router)))[:, None]
    )


def one_expert(rng: np.random.Generator, arguments: dict[str, Any]) -> None:
    """Make one expert every token's first choice."""
    router, hidden = arguments["router_weight"], arguments["hidden_states"]
    hidden[:, 0] = 1.0
    router[:, 0] = 0.0
    router[int(rng.integers(len(router))), 0] = 6.0


def poison_unused(name: str) -> Change:
    """Fill the experts that nobody chooses with NaN."""

    def change(rng: np.random.Generator, arguments: dict[str, Any]) -> None:
        del rng
        E = len(arguments["down_proj"])
        K = TOP_K.get(name, 1)
        case = _describe(arguments | {"top_k": K}, {"preset": name, "tied": False})
        used = moe_truth(case).forward
        unused = np.setdiff1d(np.arange(E), used.topk_ids[used.kept])
        for n in PARAMS[1:]:
            arguments[n][unused] = np.nan

    return change


def tie(rng: np.random.Generator, arguments: dict[str, Any]) -> None:
    """Make integer logits of which several are the largest: their ties are exact."""
    router, hidden = arguments["router_weight"], arguments["hidden_states"]
    router[...] = rng.integers(-1, 2, router.shape)
    hidden[...] = rng.integers(1, 3, hidden.shape)
    # At least one tie for the first place, beyond the first K experts.
    top = rng.permutation(len(router))[: max(2, len(router) - 1)]
    router[top] = 2.0
