"""Functions of real systems in the signatures of the kit, and one written from vLLM's contract."""

from __future__ import annotations

import math
from typing import Any

import numpy as np


def jax_ragged_dot(x_sorted: Any, w: Any, expert_offsets: Any) -> Any:
    """Run jax.lax.ragged_dot, whose weights are (E, N, M) and whose groups are sizes."""
    import jax

    with jax.enable_x64(x_sorted.dtype == np.float64):
        sizes = np.diff(expert_offsets).astype(np.int32)
        y = jax.lax.ragged_dot(
            x_sorted, w.transpose(0, 2, 1), sizes, precision=jax.lax.Precision.HIGHEST
        )
        return np.asarray(y)


def torch_grouped_mm(x_sorted: Any, w: Any, expert_offsets: Any) -> Any:
    """Run torch.nn.functional.grouped_mm with inclusive int32 offsets."""
    import torch

    return torch.nn.functional.grouped_mm(x_sorted, w.transpose(1, 2), offs=expert_offsets[1:])


def _experts(implementation: str, gate_up_proj: Any, down_proj: Any, top_k: int) -> Any:
    import torch
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, _, hidden = gate_up_proj.shape
    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=down_proj.shape[2],
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = implementation
    module = MixtralExperts(config)
    module.gate_up_proj = torch.nn.Parameter(gate_up_proj)
    module.down_proj = torch.nn.Parameter(down_proj)
    return module


def _no_expert(topk_weights: Any, topk_ids: Any) -> tuple[Any, Any]:
    """Give -1, which transformers does not know, expert 0 with weight 0."""
    missing = topk_ids < 0
    return topk_weights.masked_fill(missing, 0.0), topk_ids.long().clamp(min=0)


def _pad(x: Any, *sizes: int) -> Any:
    """Pad the last axes with zeros to multiples of 16 bytes, which grouped_mm wants."""
    import torch

    amounts: list[int] = []
    for size in reversed(sizes):
        amounts += [0, -size % 4]
    return torch.nn.functional.pad(x, amounts)


def _padded(hidden: Any, gate_up: Any, down: Any) -> tuple[Any, Any, Any]:
    import torch

    H, I = down.shape[1:]
    gate, up = (_pad(half, I, H) for half in gate_up.chunk(2, dim=1))
    return _pad(hidden, H), torch.cat((gate, up), dim=1), _pad(down, H, I)


def hf_eager(
    hidden_states: Any, gate_up_proj: Any, down_proj: Any, topk_weights: Any, topk_ids: Any
) -> Any:
    """Run the experts of Mixtral in transformers, one after another."""
    module = _experts("eager", gate_up_proj, down_proj, topk_ids.shape[1])
    weights, ids = _no_expert(topk_weights, topk_ids)
    return module(hidden_states, ids, weights)


def hf_grouped_mm(
    hidden_states: Any, gate_up_proj: Any, down_proj: Any, topk_weights: Any, topk_ids: Any
) -> Any:
    """Run the experts of Mixtral in transformers, grouped, on padded widths."""
    hidden, gate_up, down = _padded(hidden_states, gate_up_proj, down_proj)
    module = _experts("grouped_mm", gate_up, down, topk_ids.shape[1])
    weights, ids = _no_expert(topk_weights, topk_ids)
    return module(hidden, ids, weights)[:, : hidden_states.shape[1]]


def _backward(forward: Any, grad_output: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    import torch

    *floats, ids = arguments
    leaves = [a.clone().requires_grad_() for a in floats]
    hidden, gate_up, down, weights = leaves
    module_inputs: tuple[Any, Any, Any] = (hidden, gate_up, down)
    if forward is hf_grouped_mm:
        module_inputs = _padded(hidden, gate_up, down)
    name = "eager" if forward is hf_eager else "grouped_mm"
    module = _experts(name, module_inputs[1].detach(), module_inputs[2].detach(), ids.shape[1])
    del module.gate_up_proj, module.down_proj
    module.gate_up_proj, module.down_proj = module_inputs[1:]
    used, experts = _no_expert(weights, ids)
    output = module(module_inputs[0], experts, used)[:, : hidden.shape[1]]
    grads = torch.autograd.grad(output, leaves, grad_output, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if grad is None else grad
        for grad, leaf in zip(grads, leaves, strict=True)
    )


def hf_eager_backward(grad_output: Any, *arguments: Any) -> tuple[Any, ...]:
    """Differentiate `hf_eager`."""
    return _backward(hf_eager, grad_output, arguments)


def hf_grouped_mm_backward(grad_output: Any, *arguments: Any) -> tuple[Any, ...]:
    """Differentiate `hf_grouped_mm`."""
    return _backward(hf_grouped_mm, grad_output, arguments)


def plain_align(
    topk_ids: Any, block_size: int, num_experts: int, expert_map: Any = None
) -> tuple[Any, Any, int]:
    """Align by plain loops, from the contract of vLLM's ``moe_align_block_size``."""
    flat = topk_ids.ravel().tolist()
    num_routes = len(flat)
    most = num_routes + num_experts * (block_size - 1)
    if num_routes < num_experts:
        most = min(num_routes * block_size, most)
    sorted_token_ids = np.full(most, num_routes, np.int32)
    expert_ids = np.full(math.ceil(most / block_size), -1, np.int32)
    used = block = 0
    for expert in range(num_experts):
        routes = [r for r, e in enumerate(flat) if e == expert]
        blocks = math.ceil(len(routes) / block_size)
        sorted_token_ids[used : used + len(routes)] = routes
        local = expert if expert_map is None else int(expert_map[expert])
        expert_ids[block : block + blocks] = local
        used += blocks * block_size
        block += blocks
    return sorted_token_ids, expert_ids, used
