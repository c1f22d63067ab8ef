"""Auxiliary losses of a router: pure functions that return (value, grad_router_logits).

Nothing is remembered between calls. Pass the sum of the gradients to `moe_backward` as
`grad_router_logits`. Counts are constants: no gradient flows through a choice. Masked tokens
neither count nor receive gradient.
"""

from npmoe.losses.balance import load_balancing_loss
from npmoe.losses.conventions import BALANCE_CONVENTIONS, BalanceConvention, convert_coeff
from npmoe.losses.per_token import entropy_loss, z_loss
from npmoe.losses.variation import importance_loss, load_loss

__all__ = [
    "BALANCE_CONVENTIONS",
    "BalanceConvention",
    "convert_coeff",
    "entropy_loss",
    "importance_loss",
    "load_balancing_loss",
    "load_loss",
    "z_loss",
]
