"""What the two models look like: their sizes and choices, and their parameter counts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from npmoe.activations import ACTIVATIONS
from npmoe.config import MoEConfig
from npmoe.errors import RangeError, UnsupportedError
from npmoe.params import num_active_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """Say what the blocks of a model look like; the part that both models share.

    Parameters
    ----------
    hidden_size, num_layers : int
    num_heads, num_kv_heads : int
        Query heads, and the key/value heads that groups of them share.
    norm : {"rms", "layer"}
    norm_position : {"pre", "post"}
        Normalise what enters each sublayer (and the head), or each residual sum.
    moe : MoEConfig or None
        The MoE sublayer; None makes every block dense.
    moe_every : int
        Every n-th block has the MoE sublayer (the last of each n), the others a dense one.
    moe_last : int
        Only the last n of those have it; 0 is all.
    dense_intermediate_size : int
        Intermediate size of dense blocks.
    activation : str
        Activation of dense blocks.
    dropout : float
        Probability on the embedding and on what each sublayer adds.
    load_balancing_coefficient, z_loss_coefficient : float
        Weights of the auxiliary losses, summed over MoE layers.
    """

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    norm: Literal["rms", "layer"] = "rms"
    norm_position: Literal["pre", "post"] = "pre"
    moe: MoEConfig | None = None
    moe_every: int = 1
    moe_last: int = 0
    dense_intermediate_size: int = 512
    activation: str = "swiglu"
    dropout: float = 0.0
    load_balancing_coefficient: float = 0.01
    z_loss_coefficient: float = 0.001

    # Fields that must be integers of at least 1.
    _SIZES: ClassVar[tuple[str, ...]] = (
        *("hidden_size", "num_layers", "num_heads", "num_kv_heads"),
        *("moe_every", "dense_intermediate_size"),
    )

    def __post_init__(self) -> None:
        """Check the fields."""
        for name in self._SIZES:
            self._require_integer(name, 1)
        self._require_integer("moe_last", 0)
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
        for name in ("load_balancing_coefficient", "z_loss_coefficient"):
            self._require(0 <= getattr(self, name) < float("inf"), name, "be finite and >= 0")
        if self.moe is not None and self.moe.hidden_size != self.hidden_size:
            raise RangeError(
                f"{type(self).__name__}: moe.hidden_size must equal hidden_size = "
                f"{self.hidden_size}, got {self.moe.hidden_size}."
            )
        for name, default in (("moe_every", 1), ("moe_last", 0)):
            self._require(
                self.moe is not None or getattr(self, name) == default,
                name,
                f"stay {default} without moe",
            )
        self._require(
            self.moe_every <= self.num_layers,
            "moe_every",
            f"be at most num_layers = {self.num_layers}",
        )
        most = self.num_layers // self.moe_every
        self._require(
            self.moe_last <= most, "moe_last", f"be at most num_layers // moe_every = {most}"
        )

    def _require(self, condition: bool, name: str, requirement: str) -> None:
        if not condition:
            raise RangeError(
                f"{type(self).__name__}: {name} must {requirement}, got {getattr(self, name)!r}."
            )

    def _require_integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        self._require(
            not isinstance(value, bool) and isinstance(value, int) and value >= least,
            name,
            f"be an integer of at least {least}",
        )

    def is_moe_layer(self, layer: int) -> bool:
        """Whether this block has the MoE sublayer."""
        if self.moe is None or layer % self.moe_every != self.moe_every - 1:
            return False
        candidates = self.num_layers // self.moe_every
        return not self.moe_last or layer // self.moe_every >= candidates - self.moe_last

    @property
    def num_moe_layers(self) -> int:
        """How many blocks have the MoE sublayer."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))

    def dense_variant(self) -> Self:
        """Return the same model with dense blocks of the same active parameters per token.

        The dense sublayer is K times as wide as one expert, and wider for the shared expert, the
        router and biases, rounded up: it is never the smaller of the two.

        Raises
        ------
        UnsupportedError
            If the experts' activation has parameters of its own, or some blocks are dense.
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
        if self.num_moe_layers < self.num_layers:
            raise UnsupportedError(
                "dense_variant: every block must have experts, got moe_every = "
                f"{self.moe_every} and moe_last = {self.moe_last}. All dense blocks have one width."
            )
        column = (3 if moe.gated else 2) * moe.hidden_size
        active = num_active_parameters(moe)
        return dataclasses.replace(
            self,
            moe=None,
            moe_every=1,
            moe_last=0,
            dense_intermediate_size=-(-active // column),
            activation=moe.activation,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**values, "moe": None if self.moe is None else self.moe.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the config with these fields; unknown names raise RangeError."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise RangeError(
                f"{cls.__name__}.from_dict: values must hold known fields, got "
                f"{', '.join(unknown)}. Was it written by another version?"
            )
        moe = values.get("moe")
        return cls(**{**values, "moe": None if moe is None else MoEConfig.from_dict(moe)})


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig(TransformerConfig):
    """Say what a decoder-only language model looks like.

    Parameters
    ----------
    vocab_size, context_length : int
    tie_embeddings : bool
        Whether the output head is the embedding.
    rope_base : float
        Base of the rotary frequencies.
    others
        As for `TransformerConfig`.

    Raises
    ------
    RangeError
        If a value is out of range or contradicts another.
    """

    vocab_size: int
    context_length: int = 256
    tie_embeddings: bool = True
    rope_base: float = 10000.0

    causal: ClassVar[bool] = True
    _SIZES: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "context_length"),
        *TransformerConfig._SIZES,
    )

    def __post_init__(self) -> None:
        """Check the fields."""
        # Not super(): a class with slots is made a second time, and super would name the first.
        TransformerConfig.__post_init__(self)
        self._require(self.rope_base > 1, "rope_base", "be above 1")
        if self.moe is not None and self.moe.routing not in ("token_choice", "dense"):
            raise RangeError(
                "LanguageConfig: moe.routing must be 'token_choice' or 'dense', got "
                f"{self.moe.routing!r}. A language model must not see later tokens, and has no "
                "table of ids."
            )

    @property
    def sequence_length(self) -> int:
        """Tokens of a full sequence."""
        return self.context_length


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig(TransformerConfig):
    """Say what a vision transformer looks like.

    Parameters
    ----------
    image_size : int
        Side of the square images.
    channels, num_classes : int
    patch_size : int
        Side of a patch; divides image_size.
    positions : {"learned", "sinusoidal"}
        What is added to the patches: parameters, or `npmoe.nn.grid_positions`.
    others
        As for `TransformerConfig`. moe may have any routing but "hash"; with
        ``capacity_scope="sequence"`` the patches of one image compete for rows among themselves,
        so that an image's result does not depend on the others of its batch.

    Raises
    ------
    RangeError
        If a value is out of range or contradicts another.
    """

    image_size: int
    channels: int = 1
    num_classes: int = 10
    patch_size: int
    positions: Literal["learned", "sinusoidal"] = "learned"

    causal: ClassVar[bool] = False
    rope_base: ClassVar[None] = None
    _SIZES: ClassVar[tuple[str, ...]] = (
        *("image_size", "channels", "num_classes", "patch_size"),
        *TransformerConfig._SIZES,
    )

    def __post_init__(self) -> None:
        """Check the fields."""
        TransformerConfig.__post_init__(self)
        self._require(
            self.image_size % self.patch_size == 0,
            "patch_size",
            f"divide image_size = {self.image_size}",
        )
        self._require(
            self.positions in ("learned", "sinusoidal"), "positions", "be 'learned' or 'sinusoidal'"
        )
        self._require(
            self.positions == "learned" or self.hidden_size % 4 == 0,
            "hidden_size",
            "be a multiple of 4 with positions='sinusoidal'",
        )
        routing = None if self.moe is None else self.moe.routing
        if routing == "hash":
            raise RangeError(
                "VisionConfig: moe.routing must not be 'hash', got 'hash'. Patches have no ids."
            )
        if routing in ("soft", "expert_choice"):
            self._require(
                self.load_balancing_coefficient == 0,
                "load_balancing_coefficient",
                f"be 0 with moe.routing={routing!r}, whose experts are equally full",
            )
        if routing == "soft":
            self._require(
                self.z_loss_coefficient == 0,
                "z_loss_coefficient",
                "be 0 with moe.routing='soft', whose logits are bounded",
            )

    @property
    def num_patches(self) -> int:
        """L, the patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def sequence_length(self) -> int:
        """Tokens of an image."""
        return self.num_patches


ModelConfig = LanguageConfig | VisionConfig
