"""Run one MoE block of transformers in true float64 and hand it over in npmoe's layout.

Upstream computes parts of its routers in float32 whatever the model's dtype is. `RaiseToFloat64`
turns every such cast into float64 while the block runs, names it, and fails if a float32 tensor
appears anyway.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

Arrays = dict[str, np.ndarray]
Case = dict[str, Any]

# names of the activations upstream -> gated here, plain here
ACTIVATIONS = {
    "silu": ("swiglu", "silu"),
    "gelu": ("geglu", "gelu"),
    "gelu_pytorch_tanh": ("geglu_tanh", "gelu_tanh"),
    "relu": ("reglu", "relu"),
}


class RaiseToFloat64(TorchFunctionMode):
    """Replace float32 by float64 in every torch call; `raised` names those that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.raised: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            self.raised.add(name)
            return args[0].double()
        if torch.float32 in [a for a in args if isinstance(a, torch.dtype)]:
            self.raised.add(name)
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if kwargs.get("dtype") is torch.float32:
            self.raised.add(name)
            kwargs["dtype"] = torch.float64
        result = func(*args, **kwargs)
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype is torch.float32:
                raise AssertionError(f"float32 inside a float64 run, made by {name}")
        return result


@contextmanager
def default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Draw:
    """Random sizes and flags of one configuration: H, I, E, K, batch B and sequence S."""

    rng: np.random.Generator
    H: int = 0
    I: int = 0
    E: int = 0
    K: int = 0
    B: int = 0
    S: int = 0

    @classmethod
    def of(cls, family: str, seed: int) -> Draw:
        rng = np.random.default_rng([zlib.crc32(family.encode()), seed])
        draw = cls(rng)
        draw.H = int(rng.integers(4, 8))
        draw.I = int(rng.choice([i for i in range(3, 8) if i != draw.H and 2 * i != draw.H]))
        draw.E = int(rng.integers(2, 9))
        draw.K = draw.experts_per_token(draw.E)
        draw.B, draw.S = int(rng.integers(1, 4)), int(rng.integers(1, 6))
        return draw

    def pick(self, *values):
        return values[int(self.rng.integers(len(values)))]

    def flag(self) -> bool:
        return bool(self.rng.integers(2))

    def real(self, low: float, high: float) -> float:
        return round(float(self.rng.uniform(low, high)), 3)

    def experts_per_token(self, most: int) -> int:
        """Draw K up to 4; a single expert, where many conventions agree, half as often."""
        drawn = int(self.rng.integers(1, min(most, 4) + 1))
        return drawn if drawn > 1 or self.flag() else min(most, 2)

    def groups(self, least: int = 2) -> tuple[int, int]:
        """Redraw E and K for 1 to 4 groups of at least `least` experts; return (groups, kept)."""
        groups = self.pick(1, 2, 3, 4)
        per_group = int(self.rng.integers(least, 4)) if groups > 1 else int(self.rng.integers(2, 7))
        kept = int(self.rng.integers(1, groups + 1))
        self.E = groups * per_group
        self.K = self.experts_per_token(kept * per_group)
        return groups, kept

    def activation(self) -> str:
        """Draw SiLU half of the time."""
        return self.pick("silu", "silu", "silu", *ACTIVATIONS)

    def array(self, shape: tuple[int, ...], scale: float) -> np.ndarray:
        """Normal values on a grid of 1/1024, which compress well and are exact in float32."""
        return np.round(self.rng.standard_normal(shape) * scale * 1024) / 1024


@dataclass
class Built:
    """One upstream block with what is needed to feed, run and translate it."""

    block: torch.nn.Module
    convert: Callable[[Arrays], Arrays]  # upstream names -> npmoe fields; weights and gradients
    overrides: dict[str, Any] = field(default_factory=dict)
    ids_and_weights: Callable[[tuple, Any], tuple] | None = None  # of the watched module
    watch: str = "experts"  # the submodule whose inputs (or outputs) show the routing
    call: Callable[..., torch.Tensor] = lambda block, hidden: block(hidden)
    scale: dict[str, float] = field(default_factory=dict)  # of parameters whose name has the key
    choice_shift: float | None = None  # added to biases of choice; None draws 0 or -2
    replay: bool = False  # routing is given to npmoe, not recomputed
    drops: bool = False


def fill_randomly(draw: Draw, built: Built) -> None:
    """Give every parameter and every floating buffer random values; biases of choice go below 0."""
    shift = draw.pick(0.0, -2.0) if built.choice_shift is None else built.choice_shift
    tensors = [*built.block.named_parameters(), *built.block.named_buffers()]
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        if not tensor.is_floating_point():
            continue
        scale = next((s for key, s in built.scale.items() if key in name), 0.6)
        values = draw.array(tuple(tensor.shape), scale)
        if "correction_bias" in name:
            values += shift
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(values))


def from_expert_arguments(args: tuple, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Take ids and weights from experts(hidden_states, ids, weights)."""
    return args[1], args[2]


def run_case(family: str, seed: int, build: Callable[[Draw], Built], *, raised: bool) -> Case:
    """Draw one configuration, run upstream forward and backward, return everything in NumPy."""
    draw = Draw.of(family, seed)
    with default_float64():
        built = build(draw)
    block = built.block.double().eval()
    fill_randomly(draw, built)
    hidden = torch.from_numpy(draw.array((draw.B, draw.S, draw.H), 1.0)).requires_grad_()
    grad_output = draw.array((draw.B, draw.S, draw.H), 1.0)

    def numpy_of(items) -> Arrays:
        return {name: t.detach().numpy().astype(np.float64) for name, t in items}

    params = built.convert(numpy_of([*block.named_parameters(), *block.named_buffers()]))

    seen: list[tuple] = []
    extract = built.ids_and_weights or from_expert_arguments

    def hook(module, args, kwargs, output):
        ids, weights = extract((*args, *kwargs.values()), output)
        seen.append((ids.detach().numpy().copy(), weights.detach().double().numpy().copy()))

    block.get_submodule(built.watch).register_forward_hook(hook, with_kwargs=True)
    mode = RaiseToFloat64() if raised else None
    with mode or nullcontext(), default_float64() if raised else nullcontext():
        output = built.call(block, hidden)
    if raised:
        assert output.dtype is torch.float64
    output = output.reshape(hidden.shape)
    output.backward(torch.from_numpy(grad_output).to(output.dtype))
    trained = [(n, p) for n, p in block.named_parameters() if p.requires_grad]
    grads = numpy_of([(n, torch.zeros_like(p) if p.grad is None else p.grad) for n, p in trained])
    (ids, weights) = seen[0]
    case: Case = {
        "family": family,
        "seed": seed,
        "sizes": {
            "hidden_size": draw.H,
            "intermediate_size": draw.I,
            "num_experts": draw.E,
            "top_k": draw.K,
        },
        "overrides": built.overrides,
        "params": params,
        "hidden_states": hidden.detach().numpy(),
        "grad_output": grad_output,
        "output": output.detach().double().numpy(),
        "grads": {**built.convert(grads), "hidden_states": hidden.grad.numpy()},
        "topk_ids": ids.astype(np.int32),
        "topk_weights": weights,
        "replay": built.replay,
        "drops": built.drops,
        "raised": sorted(mode.raised) if mode else [],
    }
    case["grads"].pop("selection_bias", None)
    return case
