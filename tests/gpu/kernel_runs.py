"""Tensor-core kernels compiled by NVRTC and run under the PTX checker: variants, problems, runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from accel.cupy_raw.nvrtc import compile_kernel
from accel.curve import curve_of
from accel.device.kernel import Kernel
from npmoe.config import MoEConfig
from npmoe.testing import ptx

TYPES = {"bfloat16": ml_dtypes.bfloat16, "half16": np.float16, "float": np.float32}
EPILOGUES = ("STORE", "ROUTED", "ACTIVATE", "ACTIVATE_BACKWARD")
TILE = 128
UNTOUCHED = 777.0


@dataclass(frozen=True, slots=True)
class Variant:
    """One way of compiling grouped_mma.cu."""

    operand: str = "bfloat16"
    epilogue: str = "STORE"
    gated: bool = False
    gather: bool = False
    transposed: bool = False
    block: int = 64
    aligned: bool = True

    def __str__(self) -> str:
        flags = [n for n in ("gated", "gather", "transposed", "aligned") if getattr(self, n)]
        return "-".join([self.operand, self.epilogue, str(self.block), *flags])

    @property
    def kernel(self) -> Kernel:
        return Kernel(
            "grouped_mma",
            "grouped_gemm",
            (
                ("REAL", "float"),
                ("OPERAND", self.operand),
                ("WEIGHT", self.operand),
                ("EPILOGUE", self.epilogue),
                ("GATED", int(self.gated)),
                ("GATHER", int(self.gather)),
                ("TRANSPOSED", int(self.transposed)),
                ("BLOCK_M", self.block),
                ("ALIGNED", int(self.aligned)),
            ),
        )

    @property
    def threads(self) -> int:
        return {16: 64, 64: 128, 128: 256}[self.block]

    @property
    def shared_bytes(self) -> int:
        return max(256 * (self.block + TILE), 4 * self.block * (TILE + 8))

    @property
    def chunk(self) -> int:
        """Elements in 16 bytes."""
        return 4 if self.operand == "float" else 8


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """One way of compiling wgrad_mma.cu."""

    operand: str = "bfloat16"
    gather: int = 0
    aligned: bool = True

    def __str__(self) -> str:
        return f"{self.operand}-{self.gather}{'-aligned' if self.aligned else ''}"

    @property
    def kernel(self) -> Kernel:
        return Kernel(
            "wgrad_mma",
            "grouped_wgrad",
            (
                ("REAL", "float"),
                ("OPERAND", self.operand),
                ("GATHER", self.gather),
                ("ALIGNED", int(self.aligned)),
            ),
        )

    threads = 256
    shared_bytes = 4 * TILE * (TILE + 8)

    @property
    def chunk(self) -> int:
        return 4 if self.operand == "float" else 8


@lru_cache(maxsize=128)
def load_variant(variant: Any, arch: str = "sm_80") -> ptx.CompiledModule:
    """Compile for the checker, once."""
    return ptx.load(compile_kernel(variant.kernel, arch).decode())


@dataclass(frozen=True, slots=True)
class Blocks:
    """Routes sorted by expert, in blocks, with all that can be odd about them."""

    top_k: int
    owners: np.ndarray  # (T*K,), expert of a route, -1: dropped, -2: of another rank
    sorted_token_ids: np.ndarray
    expert_ids: np.ndarray
    num_tokens_post_padded: np.ndarray
    row_ids: np.ndarray
    pair_ids: np.ndarray  # (T*K,), routes by row; -1 after the last
    expert_offsets: np.ndarray

    @property
    def num_routes(self) -> int:
        return len(self.owners)

    @property
    def num_rows(self) -> int:
        return int(self.expert_offsets[-1])


def draw_owners(rng: Any, routes: int, experts: int) -> np.ndarray:
    """Empty experts, dropped routes (-1), and routes of another rank (-2)."""
    busy = rng.permutation(experts)[: max(1, experts - experts // 4)]
    owners = rng.choice(busy, routes)
    owners[rng.random(routes) < 0.1] = -1
    owners[rng.random(routes) < 0.1] = -2
    owners[0] = busy[0]
    return owners


def sort_routes(owners: np.ndarray, top_k: int, experts: int, block: int) -> Blocks:
    """Blocks of each expert, one of a foreign expert, and a tail that nobody fills."""
    T = len(owners)
    rows = [np.flatnonzero(owners == e) for e in range(experts)]
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    row_ids, pair_ids = np.full(T, -1), np.full(T, -1)
    pair_ids[: offsets[-1]] = np.concatenate(rows)
    row_ids[pair_ids[: offsets[-1]]] = np.arange(offsets[-1])
    groups = [(e, r) for e, r in enumerate(rows)]
    groups.insert(experts // 2, (-1, np.flatnonzero(owners == -2)))
    ids, expert_ids = [], []
    for e, r in groups:
        count = -(-len(r) // block)
        ids.append(np.concatenate([r, np.full(count * block - len(r), T)]))
        expert_ids += [e] * count
    padded = sum(map(len, ids))
    ids.append(np.full(block, T))  # what vLLM's align leaves after the end
    expert_ids.append(experts + 1000)
    return Blocks(
        top_k,
        owners,
        *(
            np.asarray(a, np.int32)
            for a in (np.concatenate(ids), expert_ids, [padded], row_ids, pair_ids, offsets)
        ),
    )


@dataclass(frozen=True, slots=True)
class Curve:
    """An activation by name, as the kernels take it."""

    name: str = "relu"
    alpha: float | None = None
    limit: float | None = None

    @property
    def words(self) -> tuple[int, list[float]]:
        cfg = MoEConfig(
            hidden_size=1, intermediate_size=1, num_experts=1, top_k=1, activation=self.name,
            activation_alpha=self.alpha, activation_limit=self.limit,
        )  # fmt: skip
        curve = curve_of(cfg, np.float32)
        return curve.kind, [float(v) for v in curve.settings]


@dataclass(slots=True)
class Problem:
    """Arguments of one grouped product; N is that of y."""

    variant: Variant
    blocks: Blocks
    N: int
    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    topk_weights: np.ndarray
    y: np.ndarray
    act: np.ndarray
    grad_y: np.ndarray
    dots: np.ndarray
    curve: Curve
    keep_y: bool = True

    @property
    def columns(self) -> int:
        """Columns of the product."""
        v = self.variant
        return self.N // 2 if v.epilogue == "ACTIVATE_BACKWARD" and v.gated else self.N

    @property
    def tiles(self) -> int:
        return -(-self.columns // TILE)


def draw_numbers(rng: Any, shape: tuple[int, ...], operand: str, exact: bool) -> np.ndarray:
    """Small integers, or numbers that the type holds exactly (tf32 is left to the kernel)."""
    values = rng.integers(-2, 3, shape) if exact else rng.standard_normal(shape)
    return values.astype(np.float32).astype(TYPES[operand])


def draw_problem(
    variant: Variant,
    N: int,
    K: int,
    *,
    tokens: int = 30,
    top_k: int = 2,
    experts: int = 4,
    exact: bool = True,
    bias: bool = True,
    keep_y: bool = True,
    curve: Curve | None = None,
    seed: int = 0,
) -> Problem:
    """Draw a problem; N is that of y, even where it is gated."""
    rng = np.random.default_rng([seed, N, K, tokens])
    v = variant
    blocks = sort_routes(draw_owners(rng, tokens * top_k, experts), top_k, experts, v.block)
    T, real = blocks.num_routes, TYPES[v.operand]
    backward = v.epilogue == "ACTIVATE_BACKWARD"
    columns = N // 2 if backward and v.gated else N
    I = N // 2 if v.gated else N
    shape = (experts, K, columns) if v.transposed else (experts, columns, K)
    if curve is None:
        curve = Curve("reglu" if v.gated else "relu")
    problem = Problem(
        variant=v,
        blocks=blocks,
        N=N,
        x=draw_numbers(rng, (tokens if v.gather else T, K), v.operand, exact),
        weight=draw_numbers(rng, shape, v.operand, exact),
        bias=draw_numbers(rng, (experts, N), "float", exact) if bias and not backward else None,
        topk_weights=(rng.choice([0.25, 0.5, 1.0, 2.0], T) if exact else rng.random(T)).astype(
            np.float32
        ),
        y=np.full((T, N), UNTOUCHED, np.float32),
        act=np.full((T, I), UNTOUCHED, np.float32).astype(real),
        grad_y=np.full((T, N), UNTOUCHED, np.float32).astype(real),
        dots=np.full((T, -(-columns // TILE)), UNTOUCHED, np.float32),
        curve=curve,
        keep_y=keep_y,
    )
    if backward:
        problem.y = draw_numbers(rng, (T, N), "float", exact)
    return problem


def to_bytes(a: np.ndarray) -> np.ndarray:
    """Half types as the words that the checker knows."""
    return a.view(np.uint16) if a.dtype.itemsize == 2 else a


def run_grouped(problem: Problem, module: ptx.CompiledModule | None = None, **options: Any) -> Any:
    """Launch; outputs are updated in place."""
    p, v, b = problem, problem.variant, problem.blocks
    backward = v.epilogue == "ACTIVATE_BACKWARD"
    kind, settings = p.curve.words
    out = {"STORE": "y", "ROUTED": "y", "ACTIVATE": "y act", "ACTIVATE_BACKWARD": "act grad_y dots"}

    def output(name: str) -> Any:
        if name == "y" and backward:
            return ptx.ReadOnly(p.y)
        dropped = name == "y" and v.epilogue == "ACTIVATE" and not p.keep_y
        if dropped or name not in out[v.epilogue].split():
            return None
        return ptx.Uninitialized(to_bytes(getattr(p, name)))

    args = [
        *(
            ptx.ReadOnly(a)
            for a in (
                to_bytes(p.x), to_bytes(p.weight), b.sorted_token_ids, b.expert_ids,
                b.num_tokens_post_padded, b.row_ids,
            )
        ),
        b.num_routes, b.top_k, p.N, p.x.shape[1],
        None if p.bias is None else ptx.ReadOnly(p.bias),
        None if v.epilogue in ("STORE", "ACTIVATE") else ptx.ReadOnly(p.topk_weights),
        *(output(name) for name in ("y", "act", "grad_y", "dots")),
        kind, *settings,
    ]  # fmt: skip
    return (module or load_variant(v)).launch(
        "grouped_gemm",
        (len(b.expert_ids), p.tiles),
        v.threads,
        args,
        shared_mem=v.shared_bytes,
        **options,
    )


def round_tf32(a: np.ndarray) -> np.ndarray:
    """To nearest, ties away from zero, 10 bits after the first."""
    return ((a.view(np.uint32) + 0x1000) & 0xFFFFE000).view(np.float32)


def as_multiplied(a: np.ndarray) -> np.ndarray:
    """What the tensor cores multiply, in float64."""
    return (round_tf32(a) if a.dtype == np.float32 else a).astype(np.float64)


def run_wgrad(
    variant: WeightGradient,
    blocks: Blocks,
    grad_y: np.ndarray,
    x: np.ndarray,
    out: np.ndarray,
    *,
    accumulate: bool = False,
    module: ptx.CompiledModule | None = None,
    **options: Any,
) -> ptx.LaunchResult:
    """Launch; `out` (E, M, N) is updated in place."""
    experts, M, N = out.shape
    args = [
        *(ptx.ReadOnly(to_bytes(a)) for a in (grad_y, x)),
        ptx.ReadOnly(blocks.pair_ids) if variant.gather else None,
        ptx.ReadOnly(blocks.expert_offsets),
        blocks.top_k, M, N,
        out if accumulate else ptx.Uninitialized(out), int(accumulate),
    ]  # fmt: skip
    return (module or load_variant(variant)).launch(
        "grouped_wgrad",
        (-(-N // TILE), -(-M // TILE), experts),
        variant.threads,
        args,
        shared_mem=variant.shared_bytes,
        **options,
    )
