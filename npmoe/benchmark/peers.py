"""Mixtral's block of Hugging Face transformers on CPU torch."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

import numpy as np

from npmoe._half import is_half
from npmoe._typing import HostArray
from npmoe.backends import Availability
from npmoe.benchmark.cases import Direction
from npmoe.benchmark.implementations import Implementation, Peer
from npmoe.benchmark.inputs import Inputs
from npmoe.benchmark.memory import num_bytes
from npmoe.params import MoEGrads

_MODELING = "transformers.models.mixtral.modeling_mixtral"
# With more, one backward pass takes minutes.
_EAGER_BACKWARD_EXPERTS = 8


def find_transformers() -> Availability:
    """Import torch and transformers, or say what is missing."""
    try:
        import_module("torch")
        modeling = import_module(_MODELING)
    except ImportError as error:
        return Availability(False, f"needs torch and transformers ({error})")
    if not hasattr(modeling, "MixtralExperts"):
        return Availability(False, "needs transformers 5, whose experts are one tensor")
    return Availability(True)


def mixtral_block(inputs: Inputs, experts: str) -> Any:
    """Return the block of a case's sizes, its parameters without memory."""
    torch, modeling = import_module("torch"), import_module(_MODELING)
    cfg = inputs.cfg
    theirs = modeling.MixtralConfig(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_local_experts=cfg.num_experts,
        num_experts_per_tok=cfg.top_k,
    )
    theirs._experts_implementation = experts
    with torch.device("meta"):
        return modeling.MixtralSparseMoeBlock(theirs)


class HuggingFaceMixtral:
    """`MixtralSparseMoeBlock` with one of its ways to run the experts.

    Parameters
    ----------
    experts : {"eager", "grouped_mm"}
    """

    def __init__(self, experts: str) -> None:
        self.name = f"hf-{experts}"
        self._experts = experts

    def availability(self) -> Availability:
        """Import torch and transformers, or say what is missing."""
        return find_transformers()

    def build(self, inputs: Inputs) -> Implementation:
        """Return the block on the case's own arrays: torch shares NumPy's memory."""

        @functools.cache
        def load() -> tuple[Any, Any, Any]:
            torch = import_module("torch")
            tokens, grad = inputs.hidden_states, inputs.grad_output
            return (
                self._block(inputs),
                torch.from_numpy(tokens)[None],
                torch.from_numpy(grad)[None],
            )

        def forward() -> HostArray:
            block, x, _ = load()
            with import_module("torch").no_grad():
                return np.asarray(block(x)[0])

        def step() -> MoEGrads:
            block, x, grad = load()
            leaf = x.clone().requires_grad_()
            block(leaf).backward(grad)
            grads = MoEGrads(
                hidden_states=leaf.grad[0].numpy(),
                router_weight=block.gate.weight.grad.numpy(),
                gate_up_proj=block.experts.gate_up_proj.grad.numpy(),
                down_proj=block.experts.down_proj.grad.numpy(),
            )
            # PyTorch's default; to keep the arrays would cost it an accumulation.
            block.zero_grad(set_to_none=True)
            return grads

        return Implementation(
            name=self.name,
            is_peer=True,
            forward=forward,
            step=step,
            rounding="float32",  # its router's softmax is in float32 whatever the dtype is
            new_gradient_bytes=num_bytes(inputs.params),
            not_timed=self._not_timed(inputs),
        )

    def _block(self, inputs: Inputs) -> Any:
        torch, params = import_module("torch"), inputs.params
        block = mixtral_block(inputs, self._experts)
        for owner, name, array in (
            (block.gate, "weight", params.router_weight),
            (block.experts, "gate_up_proj", params.gate_up_proj),
            (block.experts, "down_proj", params.down_proj),
        ):
            setattr(owner, name, torch.nn.Parameter(torch.from_numpy(array)))
        return block

    def _not_timed(self, inputs: Inputs) -> dict[Direction, str]:
        if is_half(inputs.params.gate_up_proj.dtype):
            reason = "it has no half-precision weights beside float32 tokens"
            return {"forward": reason, "forward+backward": reason}
        if self._experts == "grouped_mm" and inputs.hidden_states.dtype == np.float64:
            reason = "its grouped_mm has no float64"
            return {"forward": reason, "forward+backward": reason}
        if self._experts == "eager" and inputs.cfg.num_experts > _EAGER_BACKWARD_EXPERTS:
            return {
                "forward+backward": "its backward writes the gradient of all experts once for "
                f"every expert: minutes with more than {_EAGER_BACKWARD_EXPERTS}"
            }
        return {}


PEERS: tuple[Peer, ...] = (HuggingFaceMixtral("eager"), HuggingFaceMixtral("grouped_mm"))
