"""Inputs of the layer from a structure and a seed: `make_problem`, which needs no Hypothesis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from npmoe._half import HALF_DTYPES, is_float, named_dtype
from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.params import MoEParams, param_axes
from npmoe.testing.exactness import has_exact_choice, is_exact, weight_is_one

__all__ = ["MoEProblem", "is_exact", "make_problem"]

Values = Literal["normal", "integer", "exact"]
Load = Literal["spread", "one_expert", "tied"]
Replay = Literal["none", "full", "holes", "same", "wide"]
Mask = Literal["none", "some", "nothing_valid", "all_valid"]
Layout = Literal["contiguous", "read_only", "strided", "reversed", "fortran"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class MoEProblem:
    """Everything one call of the layer, forward and backward, takes.

    Attributes
    ----------
    cfg : MoEConfig
    params : MoEParams
    hidden_states, grad_output : (T, H) float array
        NaN in masked rows.
    token_mask : (T,) bool array or None
    topk_ids : (T, K) int32 array or None
        Choices to replay.
    grad_router_logits : (T, N) float array or None
        In the router's dtype; NaN in masked rows.
    num_sequences : int
        The tokens are as many sequences of equal length.
    generator_seed : int or None
        Of the generator that the layer gets; None is no generator.
    exact : bool
        All results, in any order of summation, are free of rounding: compare them with ``==``.
    exact_choice : bool
        Rounding cannot change which experts are chosen: choices and ties are the same for all.
    call : str
        The call of `make_problem` that makes this problem again; also its repr.
    """

    cfg: MoEConfig
    params: MoEParams
    hidden_states: HostArray
    grad_output: HostArray
    token_mask: HostArray | None
    topk_ids: HostArray | None
    grad_router_logits: HostArray | None
    num_sequences: int
    generator_seed: int | None
    exact: bool
    exact_choice: bool
    call: str

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """The float dtype of every array, but for expert matrices in half precision."""
        return self.hidden_states.dtype

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return len(self.hidden_states) // self.num_sequences

    @property
    def valid(self) -> HostArray:
        """The token mask, all True if there is none."""
        if self.token_mask is None:
            return np.ones(len(self.hidden_states), bool)
        return self.token_mask

    def generator(self) -> np.random.Generator | None:
        """Return a new generator as the layer gets it."""
        # Not the stream that the values come from.
        seed = self.generator_seed
        return None if seed is None else np.random.default_rng((seed, 1))

    def fold(self, array: HostArray | None) -> HostArray | None:
        """Return an array (T, ...) as the layer gets it: (B, L, ...) if there are sequences."""
        if array is None or self.num_sequences == 1:
            return array
        return array.reshape(self.num_sequences, self.sequence_length, *array.shape[1:])

    def __repr__(self) -> str:
        return self.call

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002
        """Make Hypothesis and IPython print the call, too."""
        printer.text(self.call)


def make_problem(
    cfg: MoEConfig,
    *,
    num_tokens: int,
    seed: int = 0,
    dtype: str = "float64",
    expert_dtype: str | None = None,
    values: Values = "normal",
    load: Load = "spread",
    replay: Replay = "none",
    mask: Mask = "none",
    layout: Layout = "contiguous",
    auxiliary: bool = False,
    num_sequences: int = 1,
    generator: bool = False,
    hidden_exponent: int = 0,
    logit_exponent: int = 0,
    gate_up_exponent: int = 0,
    grad_exponent: int = 0,
) -> MoEProblem:
    """Make the inputs of one call of the layer; the same arguments give the same bits.

    Parameters
    ----------
    cfg : MoEConfig
    num_tokens : int
        T.
    seed : int
        Of all values.
    dtype : {"float32", "float64"}
    expert_dtype : {"float16", "bfloat16"}, optional
        Of gate_up_proj and down_proj, beside float32; their values are rounded to it.
    values : {"normal", "integer", "exact"}
        Normal numbers of the given scales; integers from -2 to 2, whose logits are exact and often
        equal; or integers whose every result is exact, for configs in the sense of `is_exact`.
    load : {"spread", "one_expert", "tied"}
        Logits of no pattern, one expert's higher than all others, or all equal.
    replay : {"none", "full", "holes", "same", "wide"}
        Replayed choices: none, K experts per token, some of them -1, the same K for all, or
        more than K (2 for values="exact").
    mask : {"none", "some", "nothing_valid", "all_valid"}
        The token mask.
    layout : {"contiguous", "read_only", "strided", "reversed", "fortran"}
        How all arrays lie in memory; the gaps of strided ones hold NaN (True, large integers).
    auxiliary : bool
        Whether there is a grad_router_logits.
    num_sequences : int
        Divides T; with 1, the layer gets no axis of sequences.
    generator : bool
        Whether the layer gets a generator, without which nothing is random.
    hidden_exponent, logit_exponent, gate_up_exponent, grad_exponent : int
        Sizes, as powers of two, of hidden_states, router logits, gate_up and grad_output. Integers
        take a logit_exponent only, not negative; with 10 most probabilities underflow to 0.

    Returns
    -------
    MoEProblem
        New arrays.

    Raises
    ------
    RangeError
        For values="exact" with a config or size whose results are not exact, exponents
        without normal values, sequences of unequal length, or another expert_dtype.
    BackendUnavailableError
        For bfloat16 without the package ml_dtypes.
    """
    call = _call(dict(locals()))
    exponents = (logit_exponent, hidden_exponent, gate_up_exponent, grad_exponent)
    if values == "exact" and not is_exact(cfg, num_tokens):
        raise RangeError(
            f"make_problem: cfg must have exact results with values='exact', got {call}. "
            "See is_exact."
        )
    if values != "normal" and (any(exponents[1:]) or exponents[0] < 0):
        raise RangeError(
            f"make_problem: exponents must be 0 with values={values!r}, got {exponents}. "
            "Integers have no scale; only logit_exponent may be positive."
        )
    if num_sequences < 1 or num_tokens % num_sequences:
        raise RangeError(
            f"make_problem: num_sequences must divide num_tokens = {num_tokens}, got "
            f"{num_sequences}. Sequences have equal lengths."
        )
    if expert_dtype is not None and (dtype != "float32" or expert_dtype not in HALF_DTYPES):
        raise RangeError(
            "make_problem: expert_dtype must be None, or 'float16' or 'bfloat16' with dtype "
            f"'float32', got {expert_dtype!r} with {dtype!r}."
        )
    rng = np.random.default_rng(seed)
    H = cfg.hidden_size
    reach = 1 if values == "exact" else 2

    def draw(*shape: int, exponent: int = 0, fan_in: int = 1) -> HostArray:
        if values == "normal":
            return np.asarray(rng.standard_normal(shape) * (2.0**exponent / np.sqrt(fan_in)))
        return np.asarray(rng.integers(-reach, reach, shape, endpoint=True) * 2.0**exponent)

    def arrange(array: HostArray, as_dtype: Any = dtype) -> HostArray:
        as_float = array.dtype.kind == "f"
        return _arrange(array.astype(as_dtype) if as_float else array, layout)

    hidden = draw(num_tokens, H, exponent=hidden_exponent)
    drawn = _draw_params(cfg, draw, hidden_exponent, logit_exponent, gate_up_exponent)
    if load == "one_expert":
        hidden[:, 0] = 2.0**hidden_exponent
        router = drawn["router_weight"]
        router[:, 0] = 0.0
        router[rng.integers(len(router)), 0] = 4.0 * 2.0 ** (logit_exponent - hidden_exponent)
    if load == "tied" or (values == "exact" and not weight_is_one(cfg)):
        # Equal rows give equal logits only if the products are exact.
        drawn["router_weight"][:] = drawn["router_weight"][0] if values != "normal" else 0.0
        if cfg.router_bias:
            drawn["router_bias"][:] = drawn["router_bias"][0]
    matrices = np.dtype(dtype)
    if expert_dtype is not None:
        matrices = named_dtype("make_problem", expert_dtype, "test")
    dtypes = {"gate_up_proj": matrices, "down_proj": matrices}
    params = MoEParams(**{n: arrange(array, dtypes.get(n, dtype)) for n, array in drawn.items()})
    grad_output = draw(num_tokens, H, exponent=grad_exponent)
    grad_logits = None
    if auxiliary:
        grad_logits = draw(num_tokens, cfg.router_size, exponent=grad_exponent)
    most = 2 * cfg.top_k
    if values == "exact":
        most = 1 if weight_is_one(cfg) else 2
    ids = _draw_ids(rng, num_tokens, cfg, replay, most)
    token_mask = _draw_mask(rng, num_tokens, mask)
    if token_mask is not None:
        hidden[~token_mask] = np.nan
        grad_output[~token_mask] = np.nan
        if grad_logits is not None:
            grad_logits[~token_mask] = np.nan
    return MoEProblem(
        cfg=cfg,
        params=params,
        hidden_states=arrange(hidden),
        grad_output=arrange(grad_output),
        token_mask=None if token_mask is None else arrange(token_mask),
        topk_ids=None if ids is None else arrange(ids),
        grad_router_logits=None
        if grad_logits is None
        else arrange(grad_logits, cfg.router_dtype or dtype),
        num_sequences=num_sequences,
        generator_seed=seed if generator else None,
        exact=values == "exact",
        exact_choice=has_exact_choice(cfg, integers=values != "normal", tied=load == "tied"),
        call=call,
    )


def _draw_params(
    cfg: MoEConfig,
    draw: Callable[..., HostArray],
    hidden_exponent: int,
    logit_exponent: int,
    gate_up_exponent: int,
) -> dict[str, HostArray]:
    """Return every parameter of the config, in float64; the exponents are of what they make."""
    sizes = {
        "1": 1,
        "E": cfg.num_experts,
        "N": cfg.router_size,
        "E*C": cfg.router_size,
        "H": cfg.hidden_size,
        "I": cfg.intermediate_size,
        "2*I": cfg.gate_up_size,
        "S": cfg.shared_intermediate_size,
        "2*S": cfg.shared_gate_up_size,
    }
    exponents = {
        "router_weight": logit_exponent - hidden_exponent,
        "router_bias": logit_exponent,
        "selection_bias": logit_exponent if cfg.selection_bias_on == "logits" else 0,
        "gate_up_proj": gate_up_exponent - hidden_exponent,
        "gate_up_bias": gate_up_exponent,
        "shared_gate_up_proj": gate_up_exponent - hidden_exponent,
        "shared_gate_weight": -hidden_exponent,
        "soft_scale": logit_exponent,
    }
    drawn = {}
    for name, axes in param_axes(cfg).items():
        shape = [sizes[letter] for letter in axes]
        # Only matrices sum over their last axis; soft routing makes unit vectors of its rows.
        fan_in = shape[-1] if len(axes) > 1 and not name.endswith("bias") else 1
        drawn[name] = draw(*shape, exponent=exponents.get(name, 0), fan_in=fan_in)
    return drawn


def _draw_ids(
    rng: np.random.Generator, num_tokens: int, cfg: MoEConfig, replay: Replay, most: int
) -> HostArray | None:
    if replay == "none":
        return None
    columns = min(most, cfg.router_size) if replay == "wide" else cfg.top_k
    ids = np.zeros((num_tokens, columns), np.int32)
    for row in ids:
        row[:] = rng.permutation(cfg.router_size)[:columns]
    if replay == "same" and num_tokens:
        ids[:] = ids[0]
    if replay == "holes":
        ids[rng.random(ids.shape) < 0.4] = -1
    return ids


def _draw_mask(rng: np.random.Generator, num_tokens: int, mask: Mask) -> HostArray | None:
    if mask == "none":
        return None
    if mask == "some":
        return np.asarray(rng.random(num_tokens) < 0.6)
    return np.full(num_tokens, mask == "all_valid")


def _arrange(array: HostArray, layout: Layout) -> HostArray:
    """Return the same values in another memory layout, if there is more than one number."""
    if array.ndim == 0:
        return array
    if layout == "read_only":
        array.setflags(write=False)
    elif layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "reversed":
        array = array[..., ::-1].copy()[..., ::-1]
    elif layout == "strided":
        kind = "f" if is_float(array.dtype) else array.dtype.kind
        poison = {"f": np.nan, "b": True, "i": 2**30}[kind]
        room = np.full((*array.shape[:-1], 2 * array.shape[-1]), poison, array.dtype)
        room[..., ::2] = array
        array = room[..., ::2]
    return array


def _call(arguments: dict[str, object]) -> str:
    """Return the call of make_problem with these arguments, defaults left out."""
    cfg = arguments.pop("cfg")
    defaults = make_problem.__kwdefaults__ or {}
    parts = [_config_call(cfg)] if isinstance(cfg, MoEConfig) else []
    parts += [f"{n}={v!r}" for n, v in arguments.items() if n not in defaults or v != defaults[n]]
    return f"make_problem({', '.join(parts)})"


def _config_call(cfg: MoEConfig) -> str:
    parts = []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default or field.name.endswith("_size"):
            text = str(value) if isinstance(value, Fraction) else value
            parts.append(f"{field.name}={text!r}")
    return f"MoEConfig({', '.join(parts)})"
