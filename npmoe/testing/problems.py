"""Inputs of the layer from a structure and a seed: `make_problem`, which needs no Hypothesis."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from npmoe._typing import HostArray
from npmoe.config import MoEConfig
from npmoe.errors import RangeError
from npmoe.params import MoEParams

Values = Literal["normal", "integer", "exact"]
Load = Literal["spread", "one_expert", "tied"]
Replay = Literal["none", "full", "holes", "same"]
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
    grad_router_logits : (T, E) float array or None
        NaN in masked rows.
    exact : bool
        All results, in any order of summation, are free of rounding: compare them with ``==``.
    exact_logits : bool
        The router logits are free of rounding, hence the choices and their ties the same for all.
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
    exact: bool
    exact_logits: bool
    call: str

    @property
    def dtype(self) -> np.dtype[np.floating]:
        """The float dtype of every array."""
        return self.hidden_states.dtype

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
    values: Values = "normal",
    load: Load = "spread",
    replay: Replay = "none",
    mask: Mask = "none",
    layout: Layout = "contiguous",
    auxiliary: bool = False,
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
    values : {"normal", "integer", "exact"}
        Normal numbers of the given scales; integers from -2 to 2, whose logits are exact and often
        equal; or integers whose every result is exact, for configs in the sense of `is_exact`.
    load : {"spread", "one_expert", "tied"}
        Logits of no pattern, one expert's higher than all others, or all equal.
    replay : {"none", "full", "holes", "same"}
        Replayed choices: none, K experts per token, some of them -1, or the same K for all.
    mask : {"none", "some", "nothing_valid", "all_valid"}
        The token mask.
    layout : {"contiguous", "read_only", "strided", "reversed", "fortran"}
        How all arrays lie in memory; the gaps of strided ones hold NaN (True, large integers).
    auxiliary : bool
        Whether there is a grad_router_logits.
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
        For values="exact" with a config or size whose results are not exact, or exponents
        without normal values.
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
    rng = np.random.default_rng(seed)
    E, H, I = cfg.num_experts, cfg.hidden_size, cfg.intermediate_size
    reach = 1 if values == "exact" else 2

    def draw(*shape: int, exponent: int = 0, fan_in: int = 1) -> HostArray:
        if values == "normal":
            return np.asarray(rng.standard_normal(shape) * (2.0**exponent / np.sqrt(fan_in)))
        return rng.integers(-reach, reach, shape, endpoint=True) * 2.0**exponent

    def arrange(array: HostArray) -> HostArray:
        as_float = array.dtype.kind == "f"
        return _arrange(array.astype(dtype) if as_float else array, layout)

    hidden = draw(num_tokens, H, exponent=hidden_exponent)
    router = draw(E, H, exponent=logit_exponent - hidden_exponent, fan_in=H)
    tied = load == "tied" or (values == "exact" and not _weight_is_one(cfg))
    if load == "one_expert":
        hidden[:, 0] = 2.0**hidden_exponent
        router[:, 0] = 0.0
        router[rng.integers(E), 0] = 4.0 * 2.0 ** (logit_exponent - hidden_exponent)
    if tied:
        # Equal rows give equal logits only if the products are exact.
        router[:] = router[0] if values != "normal" else 0.0
    router_bias = draw(E, exponent=logit_exponent) if cfg.router_bias else None
    if router_bias is not None and tied:
        router_bias[:] = router_bias[0]
    wide = cfg.gate_up_size
    bias = cfg.expert_bias
    params = MoEParams(
        router_weight=arrange(router),
        gate_up_proj=arrange(
            draw(E, wide, H, exponent=gate_up_exponent - hidden_exponent, fan_in=H)
        ),
        down_proj=arrange(draw(E, H, I, fan_in=I)),
        router_bias=None if router_bias is None else arrange(router_bias),
        gate_up_bias=arrange(draw(E, wide, exponent=gate_up_exponent)) if bias else None,
        down_bias=arrange(draw(E, H)) if bias else None,
    )
    grad_output = draw(num_tokens, H, exponent=grad_exponent)
    grad_logits = draw(num_tokens, E, exponent=grad_exponent) if auxiliary else None
    ids = _draw_ids(rng, num_tokens, cfg, replay)
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
        grad_router_logits=None if grad_logits is None else arrange(grad_logits),
        exact=values == "exact",
        exact_logits=values != "normal" or load == "tied",
        call=call,
    )


def is_exact(cfg: MoEConfig, num_tokens: int) -> bool:
    """Return whether values="exact" leaves no rounding anywhere, already in float32.

    ReLU keeps integers. A softmax over K = 1 chosen logit is 1; otherwise all logits are made
    equal, and E and K powers of two make probabilities, weights and gradients dyadic. With inputs
    in -1..1 and the sizes below, |x|.|w| sums stay below 2**24 of their last bits: the longest
    is grad_router_weight, with at most 11 bits before and 6 after the point, summed over 16 tokens.
    """
    sizes = (cfg.hidden_size, cfg.intermediate_size, cfg.num_experts)
    small = max(sizes) <= 8 and num_tokens <= 16 and cfg.activation == "relu"
    scaled = cfg.routed_scaling_factor not in (0.5, 1.0)
    dyadic = cfg.num_experts in (1, 2, 4, 8) and cfg.top_k in (1, 2)
    return small and not scaled and (dyadic or _weight_is_one(cfg))


def _weight_is_one(cfg: MoEConfig) -> bool:
    """Return whether every weight is exactly 1, and its gradient 0, whatever the logits are."""
    return cfg.top_k == 1 and cfg.router_order == "topk_score"


def _draw_ids(
    rng: np.random.Generator, num_tokens: int, cfg: MoEConfig, replay: Replay
) -> HostArray | None:
    if replay == "none":
        return None
    ids = np.zeros((num_tokens, cfg.top_k), np.int32)
    for row in ids:
        row[:] = rng.permutation(cfg.num_experts)[: cfg.top_k]
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
    """Return the same values in another memory layout."""
    if layout == "read_only":
        array.setflags(write=False)
    elif layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "reversed":
        array = array[..., ::-1].copy()[..., ::-1]
    elif layout == "strided":
        poison = {"f": np.nan, "b": True, "i": 2**30}[array.dtype.kind]
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
