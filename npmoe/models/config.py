"""LanguageConfig: the sizes and choices of the language model, and its parameter counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from npmoe.activations import ACTIVATIONS
from npmoe.config import MoEConfig
from npmoe.errors import RangeError, UnsupportedError
from npmoe.params import num_active_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """Say what a decoder-only language model looks like.

    Parameters
    ----------
    vocab_size, context_length, hidden_size, num_layers : int
    num_heads, num_kv_heads : int
        Query heads, and the key/value heads that groups of them share.
    norm : {"rms", "layer"}
    norm_position : {"pre", "post"}
        Normalise what enters each sublayer (and the head), or each residual sum.
    moe : MoEConfig or None
        The MoE sublayer; None makes every block dense.
    moe_every : int
        Every n-th block has the MoE sublayer (the last of each n), the others a dense one.
    dense_intermediate_size : int
        Intermediate size of dense blocks.
    activation : str
        Activation of dense blocks.
    dropout : float
        Probability on the embedding and on what each sublayer adds.
    tie_embeddings : bool
        Whether the output head is the embedding.
    rope_base : float
        Base of the rotary frequencies.
    load_balancing_coefficient, z_loss_coefficient : float
        Weights of the auxiliary losses, summed over MoE layers.

    Raises
    ------
    RangeError
        If a value is out of range or contradicts another.
    """

    vocab_size: int
    context_length: int = 256
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    moe: MoEConfig | None = None
    moe_every: int = 1
    dense_intermediate_size: int = 512
    activation: str = "swiglu"
    dropout: float = 0.0
    tie_embeddings: bool = True
    rope_base: float = 10000.0
    load_balancing_coefficient: float = 0.01
    z_loss_coefficient: float = 0.001

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in (
            "vocab_size",
            "context_length",
            "hidden_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "moe_every",
            "dense_intermediate_size",
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise RangeError(
                    f"LanguageConfig: {name} must be an integer of at least 1, got {value!r}."
                )
        self._require(
            self.hidden_size % (2 * self.num_heads) == 0,
            "hidden_size",
            f"be a multiple of 2 * num_heads = {2 * self.num_heads}",
        )
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads",
            f"be a multiple of num_kv_heads = {self.num_kv_heads}",
        )
        known = ", ".join(map(repr, ACTIVATIONS))
        self._require(self.activation in ACTIVATIONS, "activation", f"be one of {known}")
        self._require(self.norm in ("rms", "layer"), "norm", "be 'rms' or 'layer'")
        self._require(self.norm_position in ("pre", "post"), "norm_position", "be 'pre' or 'post'")
        self._require(0 <= self.dropout < 1, "dropout", "lie in [0, 1)")
        self._require(self.rope_base > 1, "rope_base", "be above 1")
        for name in ("load_balancing_coefficient", "z_loss_coefficient"):
            self._require(0 <= getattr(self, name) < float("inf"), name, "be finite and >= 0")
        if self.moe is not None and self.moe.hidden_size != self.hidden_size:
            raise RangeError(
                f"LanguageConfig: moe.hidden_size must equal hidden_size = {self.hidden_size}, "
                f"got {self.moe.hidden_size}."
            )
        if self.moe is not None and self.moe.routing not in ("token_choice", "dense"):
            raise RangeError(
                "LanguageConfig: moe.routing must be 'token_choice' or 'dense', got "
                f"{self.moe.routing!r}. A language model must not see later tokens, and has no "
                "table of ids."
            )
        self._require(
            self.moe is not None or self.moe_every == 1, "moe_every", "stay 1 without moe"
        )
        self._require(
            self.moe_every <= self.num_layers,
            "moe_every",
            f"be at most num_layers = {self.num_layers}",
        )

    def _require(self, condition: bool, name: str, requirement: str) -> None:
        if not condition:
            raise RangeError(
                f"LanguageConfig: {name} must {requirement}, got {getattr(self, name)!r}."
            )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether this block has the MoE sublayer."""
        return self.moe is not None and layer % self.moe_every == self.moe_every - 1

    @property
    def num_moe_layers(self) -> int:
        """How many blocks have the MoE sublayer."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    def dense_variant(self) -> LanguageConfig:
        """Return the same model with dense blocks of the same active parameters per token.

        The dense sublayer is K times as wide as one expert, and wider for the shared expert, the
        router and biases, rounded up: it is never the smaller of the two.

        Raises
        ------
        UnsupportedError
            If the experts' activation has parameters of its own.
        """
        if self.moe is None:
            return self
        moe = self.moe
        if moe.activation_call()[1:] != (None, None):
            raise UnsupportedError(
                "dense_variant: moe.activation_alpha and moe.activation_limit must be None, got "
                f"{moe.activation_alpha} and {moe.activation_limit}. The dense sublayer has the "
                "published values."
            )
        column = (3 if moe.gated else 2) * moe.hidden_size
        active = num_active_parameters(moe)
        return dataclasses.replace(
            self,
            moe=None,
            moe_every=1,
            dense_intermediate_size=-(-active // column),
            activation=moe.activation,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "moe": None if self.moe is None else self.moe.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LanguageConfig:
        """Return the config with these fields; unknown names raise RangeError."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise RangeError(
                f"LanguageConfig.from_dict: values must hold known fields, got "
                f"{', '.join(unknown)}. Was it written by another version?"
            )
        moe = values.get("moe")
        return cls(**{**values, "moe": None if moe is None else MoEConfig.from_dict(moe)})
