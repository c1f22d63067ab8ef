"""The kinds of subjects by name, and which kind a function looks like."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from npmoe.errors import RangeError
from npmoe.testing.conformance.report import Report

# kind -> (module, arguments of its subjects)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "align": ("align", ("topk_ids", "block_size", "num_experts", "expert_map")),
    "block_gemm": (
        "block_gemm",
        (
            *("a", "w", "sorted_token_ids", "expert_ids", "num_tokens_post_padded"),
            *("top_k", "topk_weights"),
        ),
    ),
    "grouped_gemm": ("gemm", ("x_sorted", "w", "expert_offsets")),
    "grouped_gemm_wgrad": ("gemm", ("x_sorted", "grad_y", "expert_offsets")),
    "combine": ("combine", ("rows", "row_ids", "topk_weights")),
    "router": ("router", ("router_logits", "top_k")),
    "activation": ("activation", ("gate_up",)),
    "activation_backward": ("activation", ("grad_act", "gate_up")),
    "experts": (
        "experts",
        ("hidden_states", "gate_up_proj", "down_proj", "topk_weights", "topk_ids"),
    ),
    "experts_backward": (
        "experts",
        ("grad_output", "hidden_states", "gate_up_proj", "down_proj", "topk_weights", "topk_ids"),
    ),
    "moe": ("moe", ("hidden_states", "router_weight", "gate_up_proj", "down_proj", "top_k")),
    "moe_backward": (
        "moe",
        (
            *("grad_output", "hidden_states", "router_weight", "gate_up_proj", "down_proj"),
            "top_k",
        ),
    ),
    "loss": ("loss", ("router_logits", "topk_ids")),
}


# Kinds whose last argument is left out of calls that do not need it.
_LAST_IS_OPTIONAL = ("align", "block_gemm")


def required_arguments(kind: str) -> tuple[str, ...]:
    """Return the arguments that every subject of a kind must take."""
    arguments = KINDS[kind][1]
    return arguments[:-1] if kind in _LAST_IS_OPTIONAL else arguments


def check_function(kind: str) -> Callable[..., Report]:
    """Return ``check_<kind>``; unknown names raise RangeError."""
    if kind == "backend":
        module = "backend"
    elif kind in KINDS:
        module = KINDS[kind][0]
    else:
        raise RangeError(
            f"check: kind must be a known name, got {kind!r}. Known: {', '.join(KINDS)}, backend."
        )
    found: Callable[..., Report] = getattr(
        import_module(f"npmoe.testing.conformance.{module}"), f"check_{kind}"
    )
    return found


def kind_of(function: Callable[..., Any]) -> str:
    """Return the kind whose arguments a function has, by their names, or by its own name.

    Raises
    ------
    RangeError
        If none or several fit.
    """
    try:
        names = tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = ()
    fits = [k for k in KINDS if names and names in (KINDS[k][1], required_arguments(k))]
    if not fits:
        own = getattr(function, "__name__", "")
        named = [kind for kind in KINDS if kind in own]
        fits = [kind for kind in named if not any(kind != k and kind in k for k in named)]
    if len(fits) != 1:
        raise RangeError(
            "check: the kind must be clear from the arguments or the name of the function, got "
            f"{getattr(function, '__name__', function)!r} with ({', '.join(names)}). Say which: "
            f"{', '.join(KINDS)}."
        )
    return fits[0]
