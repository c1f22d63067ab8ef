"""What a model is trained on: mean cross entropy, and the auxiliary losses of its routers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from npmoe import losses, nn
from npmoe._typing import HostArray
from npmoe.models.block import BlockSaved
from npmoe.models.config import ModelConfig
from npmoe.models.stack import StackSaved

P = TypeVar("P")
S = TypeVar("S")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossResult(Generic[P, S]):
    """Cross entropy (nats per target), the auxiliary losses as added, and all gradients."""

    cross_entropy: float
    auxiliary: float
    grads: P
    saved: S

    @property
    def total(self) -> float:
        """The scalar whose gradients these are."""
        return self.cross_entropy + self.auxiliary


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The two parts of the loss, and their gradients by what the model computed.

    grad_logits has the shape of the logits; grad_router_logits one entry per block.
    """

    cross_entropy: float
    auxiliary: float
    grad_logits: HostArray
    grad_router_logits: tuple[HostArray | None, ...]


def objective(
    logits: HostArray, targets: HostArray, saved: StackSaved, cfg: ModelConfig, scale: float
) -> Objective:
    """Return the loss of logits (..., V) for targets (...), and `scale` times its gradients."""
    flat = logits.reshape(-1, logits.shape[-1])
    flat_targets = targets.reshape(-1)
    cross_entropy, log_sum_exp = nn.cross_entropy(flat, flat_targets)
    grad = nn.cross_entropy_backward(scale, flat, flat_targets, log_sum_exp)
    auxiliary = 0.0
    grad_router: list[HostArray | None] = []
    for saved_block in saved.blocks:
        value, router_grad = _auxiliary(saved_block, cfg, scale)
        auxiliary += value
        grad_router.append(router_grad)
    return Objective(
        cross_entropy=cross_entropy,
        auxiliary=auxiliary,
        grad_logits=grad.reshape(logits.shape),
        grad_router_logits=tuple(grad_router),
    )


def objective_value(
    logits: HostArray, targets: HostArray, saved: StackSaved, cfg: ModelConfig
) -> float:
    """Return the sum of both parts of `objective`, without gradients."""
    cross_entropy, _ = nn.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    auxiliary = 0.0
    for saved_block in saved.blocks:
        auxiliary += _auxiliary(saved_block, cfg, 1.0)[0]
    return cross_entropy + auxiliary


def _auxiliary(saved: BlockSaved, cfg: ModelConfig, scale: float) -> tuple[float, HostArray | None]:
    """Return the auxiliary losses of one block and `scale` times their gradient."""
    if saved.moe is None or saved.moe.soft is not None:  # soft routing has no choices to balance
        return 0.0, None
    routing = saved.moe.routing
    value, grad = losses.load_balancing_loss(routing, coefficient=cfg.load_balancing_coefficient)
    z_value, z_grad = losses.z_loss(routing, coefficient=cfg.z_loss_coefficient)
    grad += z_grad
    grad *= scale
    return value + z_value, grad
