"""Expert weights in the layouts of other programs, and back.

The canonical layout is that of `MoEParams`, called "halves" here. Every conversion is a
permutation of the numbers (and of their grouping into arrays), so going there and back is exact.
Biases move with the rows that they belong to.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from npmoe._checks import Axes, check_same_dtype, require
from npmoe._typing import HostArray
from npmoe.errors import RangeError, ShapeError
from npmoe.params import MoEParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertArrays:
    """Expert weights in one layout; shapes are those of "halves" and "split".

    Other layouts move the axes of these; see LAYOUTS. With "per_expert" every field is a tuple
    of E arrays without the axis E. Experts without a gate half have (E, I, H) in gate_up_proj,
    or up_proj and no gate_proj.

    Attributes
    ----------
    down_proj : (E, H, I) array
    gate_up_proj : (E, 2I, H) array or None
    gate_proj, up_proj : (E, I, H) array or None
        Instead of gate_up_proj.
    gate_up_bias : (E, 2I) array or None
    gate_bias, up_bias : (E, I) array or None
    down_bias : (E, H) array or None
    """

    down_proj: Any
    gate_up_proj: Any = None
    gate_proj: Any = None
    up_proj: Any = None
    gate_up_bias: Any = None
    gate_bias: Any = None
    up_bias: Any = None
    down_bias: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One entry of LAYOUTS: who uses it, and in what it differs from "halves"."""

    used_by: str
    order: str = "halves"  # of rows in gate_up_proj; "split" where there are two arrays
    transposed: bool = False  # (E, H, 2I) and (E, I, H)
    per_expert: bool = False  # tuples of E arrays
    flat: bool = False  # (E*I, H) each, down_proj transposed; biases (E*I,) and (E, H)

    @property
    def gated_only(self) -> bool:
        """Whether it says how two halves lie together, so that plain experts have no such form."""
        return self.order not in ("halves", "split")


LAYOUTS: dict[str, Layout] = {
    "halves": Layout(used_by="npmoe, vLLM (w13, w2), transformers 5"),
    "halves_swapped": Layout(used_by="ScatterMoE: up rows first", order="swapped"),
    "interleaved": Layout(used_by="SonicMoE: gate and up rows alternate", order="interleaved"),
    "interleaved_blocks": Layout(
        used_by="Megatron's fused GLU kernels: 32 gate rows, 32 up rows, ...", order="blocks"
    ),
    "transposed": Layout(used_by="Llama 4, Aria", transposed=True),
    "transposed_interleaved": Layout(used_by="gpt-oss", order="interleaved", transposed=True),
    "split": Layout(
        used_by="torchtitan (w1 gate, w3 up, w2 down), GGUF (ffn_gate_exps, ...)", order="split"
    ),
    "per_expert": Layout(
        used_by="Mixtral before transformers 5 (w1 gate, w3 up, w2 down), DeepSeek",
        order="split",
        per_expert=True,
    ),
    "flat": Layout(
        used_by="MegaBlocks, DBRX (w1 gate, v1 up, w2 down, not transposed)",
        order="split",
        flat=True,
    ),
}

_BLOCK_SIZE = 32


def to_layout(
    params: MoEParams | ExpertArrays, layout: str, *, block_size: int | None = None
) -> ExpertArrays:
    """Return the experts of `params` in another layout.

    Parameters
    ----------
    params : MoEParams or ExpertArrays
        In the canonical layout; of MoEParams the fields of routed experts. Any dtype.
    layout : str
        A key of LAYOUTS.
    block_size : int, optional
        Rows per block of "interleaved_blocks", 32 if omitted; must divide I.

    Returns
    -------
    ExpertArrays
        New contiguous arrays of the same dtypes.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        If the layout is unknown or has no form for experts without a gate half, or the block
        size does not divide I.

    Notes
    -----
    The shapes cannot tell gate from up, nor rows from columns where H == I.
    """
    target = _known("to_layout", layout, block_size)
    names = [f.name for f in fields(ExpertArrays)]
    own = ExpertArrays(**{name: getattr(params, name, None) for name in names})
    experts = _decode("to_layout", "params", own, "halves", None, None)
    require(
        not target.gated_only or "gate_proj" in experts,
        f"to_layout: layout must be one for experts without a gate half, got {layout!r}. "
        f"Those are: {', '.join(repr(n) for n, v in LAYOUTS.items() if not v.gated_only)}.",
    )
    return _encode("to_layout", experts, target, block_size)


def from_layout(
    arrays: ExpertArrays,
    layout: str,
    *,
    num_experts: int | None = None,
    block_size: int | None = None,
) -> ExpertArrays:
    """Return experts given in some layout in the canonical one, as `MoEParams` takes them.

    Parameters
    ----------
    arrays : ExpertArrays
        In `layout`. Any dtype; gate and up of one.
    layout : str
        A key of LAYOUTS.
    num_experts : int, optional
        E, which "flat" arrays do not tell; checked in the others.
    block_size : int, optional
        As for `to_layout`.

    Returns
    -------
    ExpertArrays
        gate_up_proj, down_proj and their biases, new and contiguous.

    Raises
    ------
    ShapeError, DTypeError
    RangeError
        As `to_layout`, and if num_experts is missing or does not divide the rows.
    """
    _known("from_layout", layout, block_size)
    experts = _decode("from_layout", "arrays", arrays, layout, num_experts, block_size)
    return _encode("from_layout", experts, LAYOUTS["halves"], None)


def _known(function: str, layout: str, block_size: int | None) -> Layout:
    """Return the table's entry."""
    require(
        layout in LAYOUTS,
        f"{function}: layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}.",
    )
    require(
        block_size is None or LAYOUTS[layout].order == "blocks",
        f"{function}: block_size must be None for layout {layout!r}, got {block_size!r}. "
        "It belongs to 'interleaved_blocks'.",
    )
    return LAYOUTS[layout]


def _decode(
    function: str,
    label: str,
    arrays: ExpertArrays,
    name: str,
    num_experts: int | None,
    block_size: int | None,
) -> dict[str, HostArray]:
    """Return the checked fields as in "split"; they may share memory with the input."""
    layout = LAYOUTS[name]
    given = _present(function, label, arrays, name)
    E, I = _check_arrays(function, label, given, layout, num_experts)
    if layout.flat:
        for field in given.keys() - {"down_bias"}:
            given[field] = given[field].reshape(E, I, *given[field].shape[1:])
    for field in _turned(layout):
        given[field] = given[field].swapaxes(1, 2)
    for kind in ("proj", "bias"):
        joint = given.pop(f"gate_up_{kind}", None)
        if joint is None:
            continue
        if joint.shape[1] == I:
            given[f"up_{kind}"] = joint
            continue
        block = _block(function, layout, I, block_size)
        pairs = joint.reshape(E, I // block, 2, block, *joint.shape[2:])
        parts = [pairs[:, :, i].reshape(E, I, *joint.shape[2:]) for i in (0, 1)]
        given[f"gate_{kind}"], given[f"up_{kind}"] = parts[:: _direction(layout)]
    return given


def _encode(
    function: str, experts: dict[str, HostArray], layout: Layout, block_size: int | None
) -> ExpertArrays:
    """Invert `_decode`, into new arrays."""
    out = dict(experts)
    E, _, I = out["down_proj"].shape
    for kind in ("proj", "bias") if layout.order != "split" else ():
        parts = [out.pop(f"{h}_{kind}") for h in ("gate", "up") if f"{h}_{kind}" in out]
        if len(parts) == 2:
            block = _block(function, layout, I, block_size)
            pairs = [a.reshape(E, I // block, block, *a.shape[2:]) for a in parts]
            joint = np.stack(pairs[:: _direction(layout)], axis=2)
            out[f"gate_up_{kind}"] = joint.reshape(E, 2 * I, *joint.shape[4:])
        elif parts:
            out[f"gate_up_{kind}"] = parts[0]
    for field in _turned(layout):
        out[field] = out[field].swapaxes(1, 2)
    if layout.flat:
        for field in out.keys() - {"down_bias"}:
            out[field] = out[field].reshape(E * I, *out[field].shape[2:])
    if layout.per_expert:
        return ExpertArrays(**{f: tuple(np.array(e, order="C") for e in a) for f, a in out.items()})
    return ExpertArrays(**{f: np.array(a, order="C") for f, a in out.items()})


def _direction(layout: Layout) -> int:
    """Return the step that puts (gate, up) in the order of the layout, or back."""
    return -1 if layout.order == "swapped" else 1


def _turned(layout: Layout) -> tuple[str, ...]:
    """Return the fields whose last two axes are exchanged."""
    if layout.transposed:
        return ("gate_up_proj", "down_proj")
    return ("down_proj",) if layout.flat else ()


def _block(function: str, layout: Layout, I: int, block_size: int | None) -> int:
    """Return how many rows of one half lie together."""
    if layout.order != "blocks":
        return 1 if layout.order == "interleaved" else I
    block = _BLOCK_SIZE if block_size is None else block_size
    require(
        block >= 1 and I % block == 0,
        f"{function}: block_size must be at least 1 and divide I = {I}, got {block}.",
    )
    return block


def _present(function: str, label: str, arrays: ExpertArrays, name: str) -> dict[str, HostArray]:
    """Return the fields that are not None, checked to be those of the layout."""
    layout = LAYOUTS[name]
    given = {f.name: getattr(arrays, f.name) for f in fields(ExpertArrays)}
    required, refused = {"down_proj", "gate_up_proj"}, {"gate_proj", "up_proj"}
    refused |= {"gate_bias", "up_bias"}
    if layout.order == "split":
        required, refused = {"down_proj", "up_proj"}, {"gate_up_proj", "gate_up_bias"}
        if given["gate_proj"] is None:
            refused.add("gate_bias")
        elif given["gate_bias"] is not None or given["up_bias"] is not None:
            required |= {"gate_bias", "up_bias"}
    for field, value in given.items():
        if field in (required if value is None else refused):
            must, got = ("an array", "None") if value is None else ("None", "an array")
            parts = "arrays of their own" if layout.order == "split" else "one array"
            raise ShapeError(
                f"{function}: {label}.{field} must be {must}, got {got}. Layout {name!r} has gate "
                f"and up in {parts}."
            )
    convert = _stack if layout.per_expert else lambda *args: np.asarray(args[-1])
    return {f: convert(function, f"{label}.{f}", v) for f, v in given.items() if v is not None}


def _stack(function: str, name: str, arrays: Any) -> HostArray:
    """Stack one array for each expert, of one shape and dtype."""
    members = [np.asarray(a) for a in arrays]
    if not members:
        raise ShapeError(f"{function}: {name} must have one array for each expert, got none.")
    for e, member in enumerate(members):
        if member.shape != members[0].shape:
            raise ShapeError(
                f"{function}: {name}[{e}] must have shape {members[0].shape}, got "
                f"{member.shape}. It is bound by {name}[0]."
            )
        check_same_dtype(function, f"{name}[{e}]", member, members[0].dtype, f"{name}[0]")
    return np.stack(members)


def _check_arrays(
    function: str,
    label: str,
    given: dict[str, HostArray],
    layout: Layout,
    num_experts: int | None,
) -> tuple[int, int]:
    """Raise unless the arrays fit the layout and each other; return E and I."""
    down = given["down_proj"]
    axes = Axes(function)
    if num_experts is not None:
        axes.bind("num_experts", E=num_experts)
    if layout.flat:
        rows = len(down) if down.ndim else 0
        if num_experts is None or num_experts < 1 or rows % num_experts:
            raise RangeError(
                f"{function}: num_experts must be given for layout 'flat' and divide the {rows} "
                f"rows of {label}.down_proj, got {num_experts}."
            )
        axes.bind(f"num_experts and {label}.down_proj {down.shape}", I=rows // num_experts)
    try:
        _check_shapes(axes, label, given, layout)
    except ShapeError as error:
        turned = replace(layout, transposed=not layout.transposed)
        hint = ""
        if layout.order != "split" and _fits(given, turned):
            hint = f" They fit a layout {'with' if turned.transposed else 'without'} transposition."
        raise ShapeError(f"{error}{hint}") from None
    for kind in ("proj", "bias"):
        if f"gate_{kind}" in given:
            field, up = f"{label}.gate_{kind}", given[f"up_{kind}"]
            check_same_dtype(function, field, given[f"gate_{kind}"], up.dtype, f"{label}.up_{kind}")
    if num_experts is not None and layout.flat:
        return num_experts, len(down) // num_experts
    return len(down), down.shape[1 if layout.transposed else 2]


def _check_shapes(axes: Axes, label: str, given: dict[str, HostArray], layout: Layout) -> None:
    """Check every array against the letters of the layout."""
    down = ("E", "I", "H") if layout.transposed else ("E", "H", "I")
    rows = ("E*I",) if layout.flat else ("E", "I")
    wide = "I" if not layout.gated_only and _looks_plain(given, layout) else "2*I"
    letters: dict[str, tuple[str, ...]] = {
        "down_proj": ("E*I", "H") if layout.flat else down,
        "gate_up_proj": ("E", "H", wide) if layout.transposed else ("E", wide, "H"),
        "gate_proj": (*rows, "H"),
        "up_proj": (*rows, "H"),
        "gate_up_bias": ("E", wide),
        "gate_bias": rows,
        "up_bias": rows,
        "down_bias": ("E", "H"),
    }
    for field, spelled in letters.items():
        if field in given:
            axes.check(f"{label}.{field}", given[field], *spelled)


def _looks_plain(given: dict[str, HostArray], layout: Layout) -> bool:
    """Whether gate_up_proj has as many rows as down_proj has columns."""
    joint, down = given.get("gate_up_proj"), given["down_proj"]
    if joint is None or joint.ndim != 3 or down.ndim != 3:
        return False
    rows, columns = (2, 1) if layout.transposed else (1, 2)
    return bool(joint.shape[rows] == down.shape[columns])


def _fits(given: dict[str, HostArray], layout: Layout) -> bool:
    try:
        _check_shapes(Axes(""), "", given, layout)
    except ShapeError:
        return False
    return True
