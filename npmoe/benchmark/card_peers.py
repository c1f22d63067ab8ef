"""Other people's experts on a CUDA device, behind a router in torch."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from npmoe._half import HALF_DTYPES, is_half
from npmoe.backends import Availability
from npmoe.benchmark.cases import Direction
from npmoe.benchmark.implementations import Implementation, Peer
from npmoe.benchmark.inputs import Inputs
from npmoe.benchmark.memory import num_bytes
from npmoe.benchmark.peers import find_transformers, mixtral_block
from npmoe.errors import UnsupportedError
from npmoe.params import MoEGrads

_BOTH: tuple[Direction, ...] = ("forward", "forward+backward")
# Where fused_experts(hidden_states, w1, w2, topk_weights, topk_ids) lives, first come first served.
_TRITON_MODULES = (
    "vllm.model_executor.layers.fused_moe",
    "sglang.srt.layers.moe.fused_moe_triton.fused_moe",
)
_TRITON_ARGUMENTS = {"hidden_states", "w1", "w2", "topk_weights", "topk_ids"}


class CudaPeer:
    """Mixtral's router in float32 torch, and experts that a subclass knows.

    Tokens and the experts' weights have the type that the case's products round to; weights are
    converted once, tokens in every call. Outputs and gradients are compared in float32.

    Parameters
    ----------
    device : str
        Torch's name of the device.
    """

    name: str
    reason_no_backward: str | None = None

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def find_experts(self) -> Availability:
        """Import what a subclass needs, or say what is missing."""
        raise NotImplementedError

    def make_experts(self, inputs: Inputs, weights: dict[str, Any]) -> Callable[..., Any]:
        """Return ``experts(tokens, ids, topk_weights)`` on torch tensors."""
        raise NotImplementedError

    def availability(self) -> Availability:
        """Say whether torch sees the device, and the experts can be imported."""
        try:
            torch = import_module("torch")
        except ImportError as error:
            return Availability(False, f"needs torch ({error})")
        if self.device == "cuda" and not torch.cuda.is_available():
            return Availability(False, "needs a torch that sees a CUDA device")
        return self.find_experts()

    def build(self, inputs: Inputs) -> Implementation:
        """Return the layer on copies of the case's arrays."""
        torch = import_module("torch")

        @functools.cache
        def load() -> tuple[dict[str, Any], Callable[..., Any]]:
            weights = {
                name: self._tensor(array, inputs).requires_grad_(self.reason_no_backward is None)
                for name, array in (
                    ("gate_up_proj", inputs.params.gate_up_proj),
                    ("down_proj", inputs.params.down_proj),
                )
            }
            for name, array in (
                ("router_weight", inputs.params.router_weight),
                ("x", inputs.hidden_states),
                ("grad", inputs.grad_output),
            ):
                weights[name] = torch.from_numpy(array).to(self.device)
            return weights, self.make_experts(inputs, weights)

        def layer(x: Any, router_weight: Any) -> Any:
            weights, experts = load()
            topk_weights, ids = _route(torch, x, router_weight, inputs.cfg.top_k)
            return experts(x.to(weights["gate_up_proj"].dtype), ids, topk_weights).to(x.dtype)

        def forward() -> Any:
            with _as_unsupported(self.name), torch.no_grad():
                output = layer(load()[0]["x"], load()[0]["router_weight"])
                self._synchronize()
            return output

        def step() -> MoEGrads:
            weights = load()[0]
            with _as_unsupported(self.name):
                leaves = [weights[n].clone().requires_grad_() for n in ("x", "router_weight")]
                layer(*leaves).backward(weights["grad"])
                grads = MoEGrads(
                    hidden_states=leaves[0].grad,
                    router_weight=leaves[1].grad,
                    gate_up_proj=weights["gate_up_proj"].grad,
                    down_proj=weights["down_proj"].grad,
                )
                # PyTorch's default; to keep the arrays would cost it an accumulation.
                weights["gate_up_proj"].grad = weights["down_proj"].grad = None
                self._synchronize()
            return grads

        return Implementation(
            name=self.name,
            is_peer=True,
            forward=forward,
            step=step,
            rounding="float32",
            new_gradient_bytes=num_bytes(inputs.params) // self._shrink(inputs),
            not_timed=self._not_timed(inputs),
            operands=inputs.operands,
            to_host=_to_host,
            peak=self._peak,
        )

    @staticmethod
    def _shrink(inputs: Inputs) -> int:
        """Return by what the weights become smaller."""
        return 2 if inputs.operands in HALF_DTYPES else 1

    def _tensor(self, array: Any, inputs: Inputs) -> Any:
        """Copy weights to the device, in the type that products round to."""
        torch = import_module("torch")
        types = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        # Torch reads no bfloat16 of NumPy's.
        wide = array.astype(np.float32) if is_half(array.dtype) else array
        return torch.from_numpy(wide).to(
            self.device, types.get(inputs.operands or "", torch.float32)
        )

    def _not_timed(self, inputs: Inputs) -> dict[Direction, str]:
        if inputs.hidden_states.dtype == np.float64:
            return dict.fromkeys(_BOTH, "it has no float64")
        if self.reason_no_backward is not None:
            return {"forward+backward": self.reason_no_backward}
        return {}

    def _synchronize(self) -> None:
        if self.device == "cuda":
            import_module("torch").cuda.synchronize()

    def _peak(self, call: Callable[[], object]) -> int | None:
        """Return torch's own count of a call's peak."""
        if self.device != "cuda":
            return None
        cuda = import_module("torch").cuda
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        call()
        return int(cuda.max_memory_allocated() - before)


class GroupedMmExperts(CudaPeer):
    """Hugging Face's `MixtralExperts` over torch's grouped_mm."""

    name = "torch-grouped_mm"

    def find_experts(self) -> Availability:
        """Import transformers, or say what is missing."""
        return find_transformers()

    def make_experts(self, inputs: Inputs, weights: dict[str, Any]) -> Callable[..., Any]:
        """Return the module with the weights as its parameters."""
        torch = import_module("torch")
        experts = mixtral_block(inputs, "grouped_mm").experts
        for name in ("gate_up_proj", "down_proj"):
            parameter = torch.nn.Parameter(weights[name].detach())
            setattr(experts, name, parameter)
            weights[name] = parameter
        module: Callable[..., Any] = experts
        return module


class TritonExperts(CudaPeer):
    """The Triton kernels of vLLM or SGLang behind ``fused_experts``."""

    name = "triton-fused_moe"
    reason_no_backward = "it has no backward"

    def find_experts(self) -> Availability:
        """Import one of the two packages, or say that neither is there."""
        try:
            function = _find_fused_experts()
        except ImportError as error:
            return Availability(False, f"needs vllm or sglang, which are not installed ({error})")
        missing = _TRITON_ARGUMENTS - set(inspect.signature(function).parameters)
        if missing:
            return Availability(
                False, f"{function.__module__}.fused_experts has no {', '.join(sorted(missing))}"
            )
        return Availability(True)

    def make_experts(
        self,
        inputs: Inputs,  # noqa: ARG002  # the other subclass reads sizes from it
        weights: dict[str, Any],
    ) -> Callable[..., Any]:
        """Return the function on the weights; the routing is torch's."""
        function = _find_fused_experts()

        def experts(tokens: Any, ids: Any, topk_weights: Any) -> Any:
            return function(
                hidden_states=tokens,
                w1=weights["gate_up_proj"],
                w2=weights["down_proj"],
                topk_weights=topk_weights,
                topk_ids=ids.int(),
            )

        return experts


def _find_fused_experts() -> Callable[..., Any]:
    """Return the function of the first package that is installed."""
    for module in _TRITON_MODULES[:-1]:
        try:
            function: Callable[..., Any] = import_module(module).fused_experts
        except ImportError:
            continue
        return function
    last: Callable[..., Any] = import_module(_TRITON_MODULES[-1]).fused_experts
    return last


def _route(torch: Any, x: Any, router_weight: Any, top_k: int) -> tuple[Any, Any]:
    """Return weights that sum to one, and ids: Mixtral's router."""
    probs = torch.softmax(x @ router_weight.T, dim=-1)
    chosen, ids = torch.topk(probs, top_k, dim=-1)
    return chosen / chosen.sum(dim=-1, keepdim=True), ids


@contextlib.contextmanager
def _as_unsupported(name: str) -> Iterator[None]:
    """Turn what torch and Triton say of a case into an omission of it."""
    try:
        yield
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        line = str(error).partition("\n")[0]
        raise UnsupportedError(f"{name}: it cannot run this case, and says: {line}.") from error


def _to_host(tensor: Any) -> Any:
    return tensor.detach().float().cpu().numpy()


CARD_PEERS: tuple[Peer, ...] = (GroupedMmExperts(), TritonExperts())
