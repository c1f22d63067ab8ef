"""What the host code asks a device for, and what compilers say of it.

`RecordingDevice` is a device that launches nothing and notes everything. `asked_kernels` runs the
backend's verbs on it, so that a variant that the host code can ask for cannot be forgotten.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import npmoe
from accel.cupy_raw import CupyBackend
from accel.cupy_raw.backend import TILINGS
from accel.device.emulated import EmulatedDevice
from accel.device.kernel import Kernel
from accel.device.source import compiler_options, read_source
from npmoe import tree

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True, slots=True)
class Launch:
    """What a device was asked for."""

    kernel: Kernel
    grid: tuple[int, ...]
    threads: int
    args: tuple[Any, ...]
    shared_mem: int


def _no_compiler(kernel: Kernel) -> tuple[str, str]:
    raise AssertionError(kernel)


class RecordingDevice(EmulatedDevice):
    """Arrays that are there, and kernels that are noted instead of run."""

    def __init__(self) -> None:
        super().__init__(_no_compiler)
        self.asked: list[Launch] = []

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Return zeros: nobody fills them here."""
        return self.zeros(shape, dtype)

    def launch(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        threads: int,
        args: Sequence[Any],
        shared_mem: int = 0,
    ) -> None:
        """Note the launch."""
        self.asked.append(Launch(kernel, grid, threads, tuple(args), shared_mem))


def run_layer(backend: Any, cfg: npmoe.MoEConfig, dtype: Any, tokens: int, half: Any = None) -> Any:
    """Run the layer forward and backward with expert weights in half precision, if there is one."""
    params = npmoe.init_params(cfg, dtype=np.dtype(dtype).name)
    rng = np.random.default_rng(0)

    def move(name: str, value: Any) -> Any:
        if half is not None and name in ("gate_up_proj", "down_proj"):
            value = value.astype(half)
        return backend.asarray(value)

    given = tree.map_arrays(move, params)
    x = backend.asarray(rng.standard_normal((tokens, cfg.hidden_size)).astype(dtype))
    out, saved = npmoe.moe_forward(x, given, cfg, backend=backend)
    return npmoe.moe_backward(out, saved, given)


@cache
def asked_kernels() -> dict[Kernel, Launch]:
    """List every variant that the backend "cupy" asks for, with one of its launches."""
    import ml_dtypes  # which tells NumPy of bfloat16

    found: dict[Kernel, Launch] = {}
    halves = (None, np.float16, ml_dtypes.bfloat16)
    lengths = ((16, 8), (6, 5))  # rows that are aligned, and that are not
    precisions: Any = TILINGS
    for precision, dtype, half in itertools.product(precisions, (np.float32, np.float64), halves):
        if half is not None and dtype == np.float64:
            continue
        device = RecordingDevice()
        backend = CupyBackend(precision, launcher=device)
        for (H, I), activation, tokens in itertools.product(
            lengths, ("swiglu", "gelu"), (4, 40, 300)
        ):
            cfg = npmoe.MoEConfig(
                hidden_size=H, intermediate_size=I, num_experts=4, top_k=2,
                activation=activation, expert_bias=True,
            )  # fmt: skip
            run_layer(backend, cfg, dtype, tokens, half)
            _single_verbs(backend, device, cfg, dtype, tokens)
        for launch in device.asked:
            found.setdefault(launch.kernel, launch)
    return found


def _single_verbs(backend: Any, device: Any, cfg: Any, dtype: Any, tokens: int) -> None:
    """Run the verbs that the fused pair does without."""
    E, K, H = cfg.num_experts, cfg.top_k, cfg.hidden_size
    plan = backend.plan_dispatch(device.zeros((tokens, K), np.int32), num_experts=E)
    rows, weights = device.zeros((tokens * K, H), dtype), device.zeros((tokens, K), dtype)
    matrix = device.zeros((E, H, H), dtype)
    backend.gather_rows(device.zeros((tokens, H), dtype), plan)
    backend.combine_rows(rows, plan, topk_weights=weights)
    backend.scale_rows(rows, plan, weights)
    backend.row_dot(rows, rows, plan)
    backend.spread_experts(device.zeros((E, H), dtype), plan)
    backend.segment_sum(rows, plan)
    backend.grouped_gemm(rows, matrix, plan)
    backend.grouped_gemm(rows, matrix, plan, transposed=True)
    backend.grouped_gemm_wgrad(rows, rows, plan)
    gate_up = device.zeros((tokens, 2 * H), dtype)
    backend.activation(gate_up, cfg)
    half = H if cfg.activation == "swiglu" else 2 * H
    backend.activation_backward(device.zeros((tokens, half), dtype), gate_up, cfg)


@dataclass(frozen=True, slots=True)
class Usage:
    """Resources of one kernel."""

    registers: int
    stack: int
    shared: int
    local: int


_USAGE = re.compile(
    r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def find_cuobjdump() -> str | None:
    """Give the program: on the path, or of the wheel nvidia-cuda-cuobjdump."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    folder = Path(sysconfig.get_paths()["purelib"], "nvidia")
    return next((str(p) for p in sorted(folder.glob("**/bin/cuobjdump"))), None)


def read_usage(cubin: bytes, cuobjdump: str) -> dict[str, Usage]:
    """Return the resources of every kernel of a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run(
            [cuobjdump, "-res-usage", str(path)], capture_output=True, text=True, check=True
        )
    text = done.stdout + done.stderr
    return {m[1]: Usage(*map(int, m.groups()[1:])) for m in _USAGE.finditer(text)}


def check_with_nvcc(kernel: Kernel, arch: str, nvcc: str) -> str:
    """Compile with nvcc; a spill is an error. Return what ptxas says."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{kernel.file}.cu")
        path.write_text(read_source(kernel.file), encoding="utf-8")
        done = subprocess.run(
            [nvcc, f"-arch={arch}", "-cubin", "-Xptxas", "-v", "-Xptxas", "--warn-on-spills",
             "-Xptxas", "-Werror", *compiler_options(kernel), "-o", str(Path(folder, "out")),
             str(path)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"{kernel} {arch}: {done.stderr}"
    for stack, stores, loads in _SPILLS.findall(done.stderr):
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kernel} {arch}: {done.stderr}"
    return done.stderr
