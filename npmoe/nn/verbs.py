"""The functions of `npmoe.nn` that a backend may have kernels of its own for."""

from __future__ import annotations

from typing import Any, Protocol

from npmoe._typing import HostArray


class ModelVerbs(Protocol):
    """Functions of `npmoe.nn` by their names there; the module itself is one such object.

    What attention returns beside its output goes to the backward of the same object alone.
    """

    def rms_norm(self, x: HostArray, weight: HostArray, eps: float = ...) -> HostArray:
        """Normalise rows."""

    def rms_norm_backward(
        self, grad_y: HostArray, x: HostArray, weight: HostArray, eps: float = ...
    ) -> tuple[HostArray, HostArray]:
        """Return grad_x and grad_weight."""

    def causal_attention(self, q: HostArray, k: HostArray, v: HostArray) -> tuple[HostArray, Any]:
        """Attend to earlier positions."""

    def full_attention(self, q: HostArray, k: HostArray, v: HostArray) -> tuple[HostArray, Any]:
        """Attend to all positions."""

    def causal_attention_backward(
        self,
        grad_out: HostArray,
        q: HostArray,
        k: HostArray,
        v: HostArray,
        probs: Any,
        *,
        out: tuple[HostArray, HostArray, HostArray] | None = ...,
    ) -> tuple[HostArray, HostArray, HostArray]:
        """Return the gradients of q, k and v."""

    def full_attention_backward(
        self,
        grad_out: HostArray,
        q: HostArray,
        k: HostArray,
        v: HostArray,
        probs: Any,
        *,
        out: tuple[HostArray, HostArray, HostArray] | None = ...,
    ) -> tuple[HostArray, HostArray, HostArray]:
        """Return the gradients of q, k and v."""
