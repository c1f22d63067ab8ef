"""Static figures of the grouped products, as the host code launches them and compilers make them.

Run as a script to write npmoe/benchmark/kernel_figures.json anew (PYTHONPATH=., some minutes).
"""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from accel.cupy_raw.backend import TILINGS, CupyBackend
from accel.cupy_raw.nvrtc import compile_kernel, nvrtc_version
from accel.device.emulated import EmulatedDevice
from accel.device.kernel import Kernel
from npmoe import init_params, preset
from npmoe.benchmark import modelled
from npmoe.tree import map_arrays

# What is compiled for sm_80 runs on sm_86 and sm_89.
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
_RESERVED = 1024  # which compilers add to the section themselves from sm_90 on
# float16 is bfloat16 with other instructions of the same number and kind.
PRECISIONS = ("float32", "tf32", "bfloat16")
ORDER = ("gate_up", "down", "down_back", "down_wgrad", "gate_up_wgrad", "gate_up_back")
E, K, H, I = 4, 1, 256, 128


@cache
def gpu_module(name: str):
    """Return a module of the kernels' own tests, which know the disassemblers."""
    path = Path(__file__).parents[1] / "gpu" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_for_figures", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def find_programs() -> tuple[str | None, str | None]:
    """Return nvdisasm and cuobjdump."""
    return gpu_module("sass_counts").find_nvdisasm(), gpu_module("compile_gates").find_cuobjdump()


@dataclass(frozen=True)
class Launch:
    """One grouped product, as the host code asked for it."""

    name: str
    kernel: Kernel
    grid: tuple[int, ...]
    threads: int
    shared_mem: int


class Recorder(EmulatedDevice):
    """A device that notes launches and runs nothing."""

    def __init__(self):
        super().__init__(lambda kernel: ("", kernel.entry))
        self.noted = []

    def launch(self, kernel, grid, threads, args, shared_mem=0):
        if kernel.entry.startswith("grouped"):
            name = ORDER[len(self.noted)]
            self.noted.append(Launch(name, kernel, grid, threads, shared_mem))


def record(precision: str, num_tokens: int, sizes=(H, I, E, K)) -> list[Launch]:
    """Return the grouped products of a step, in order."""
    H, I, E, K = sizes
    device = Recorder()
    backend = CupyBackend(precision, launcher=device)
    cfg = preset("mixtral", hidden_size=H, intermediate_size=I, num_experts=E, top_k=K)
    params = map_arrays(lambda _, a: device.asarray(a), init_params(cfg, 0))
    plan = backend.plan_dispatch(device.asarray(np.zeros((num_tokens, K), np.int32)), num_experts=E)
    x = device.zeros((num_tokens, H), np.float32)
    weights = device.zeros((num_tokens, K), np.float32)
    _, gate_up = backend.experts_forward(x, params, plan, weights, cfg)
    backend.experts_backward(x, x, gate_up, params, plan, weights, cfg)
    assert [launch.name for launch in device.noted] == list(ORDER)
    return device.noted


def variants(precision: str) -> dict[str, Launch]:
    """Return name -> launch, for all block sizes; wgrad has one."""
    found = {}
    for size in TILINGS[precision].block_sizes:
        for launch in record(precision, E * size // 2):
            wgrad = launch.kernel.entry == "grouped_wgrad"
            found[launch.name if wgrad else f"{launch.name}/{size}"] = launch
    return found


def measure(precision: str, launch: Launch, arch: str) -> list[int]:
    """Return registers, static shared bytes, and the main loop's instructions and multiplies."""
    nvdisasm, cuobjdump = find_programs()
    cubin = compile_kernel(launch.kernel, arch, "cubin")
    usage = gpu_module("compile_gates").read_usage(cubin, cuobjdump)[launch.kernel.entry]
    shared = shared_bytes(cubin) - _RESERVED * (int(arch[3:]) >= 90)
    text = gpu_module("sass_counts").disassemble(cubin, nvdisasm)
    return [usage.registers, shared, *main_loop(text, stage_multiplies(precision, launch))]


def stage_multiplies(precision: str, launch: Launch) -> int:
    """Return how often a warp multiplies in one stage of the main loop."""
    facts, tiling = geometry(precision), TILINGS[precision]
    rows, columns = tiling.wgrad_tile
    if launch.kernel.entry == "grouped_gemm":
        rows, columns = dict(launch.kernel.options)["BLOCK_M"], tiling.tile_n
    per_instruction = modelled.MULTIPLY_ADDS[facts["multiply"]]
    return facts["depth"] * rows * columns // (launch.threads // 32) // per_instruction


def main_loop(text: str, stage: int) -> tuple[int, int]:
    """Count what a pass of the main loop executes: instructions, and FFMA or HMMA.

    That is the smallest loop with a barrier and multiplications. Where a loop inside it multiplies
    too, it turns as often as makes a `stage` of multiplications.
    """
    machine = gpu_module("sass_counts").read_machine(text)
    names = machine.opcodes
    kind = "HMMA" if any(name.startswith("HMMA") for name in names) else "FFMA"
    loops = []
    for first, last in machine.loops:
        inside = names[first : last + 1]
        multiplies = sum(n.startswith(kind) for n in inside)
        if multiplies:
            barrier = any(n.startswith("BAR") for n in inside)
            loops.append((len(inside), multiplies, barrier, first, last))
    size, multiplies, _, first, last = min(loop for loop in loops if loop[2])
    if multiplies % stage == 0:
        return size, multiplies
    inner = [loop for loop in loops if first <= loop[3] and loop[4] <= last and not loop[2]]
    ((inner_size, inner_multiplies, *_),) = inner
    turns, rest = divmod(stage - (multiplies - inner_multiplies), inner_multiplies)
    assert rest == 0
    return size + (turns - 1) * inner_size, stage


def shared_bytes(cubin: bytes) -> int:
    """Return the size of the section .nv.shared.*, of an ELF file of 64 bits."""
    (at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    names = sections[names_at][4]

    def name(section):
        start = names + section[0]
        return cubin[start : cubin.index(b"\0", start)]

    return sum(s[5] for s in sections if name(s).startswith(b".nv.shared."))


def geometry(precision: str) -> dict[str, object]:
    """Return what of a tiling does not depend on the compiler."""
    tiling = TILINGS[precision]
    of_size = {str(b): tiling for b in tiling.block_sizes}
    return {
        "multiply": {"float32": "FFMA", "tf32": "HMMA.1688", "bfloat16": "HMMA.16816"}[precision],
        "block_sizes": list(tiling.block_sizes),
        "tile_n": tiling.tile_n,
        "wgrad_tile": list(tiling.wgrad_tile),
        "depth": {"float32": 16, "tf32": 16, "bfloat16": 32}[precision],
        "threads": {b: t.threads(int(b)) for b, t in of_size.items()}
        | {"wgrad": tiling.wgrad_threads},
        "dynamic_shared": {b: t.shared_mem(int(b)) for b, t in of_size.items()}
        | {"wgrad": tiling.wgrad_shared_mem},
    }


def write() -> None:
    """Compile and count everything."""
    lines = []
    for precision in PRECISIONS:
        rows = [
            f'      "{name}": '
            + json.dumps({arch: measure(precision, launch, arch) for arch in ARCHITECTURES})
            for name, launch in variants(precision).items()
        ]
        head = json.dumps(geometry(precision))[:-1]
        lines.append(f'  "{precision}": {head}, "kernels": {{\n' + ",\n".join(rows) + "\n    }}")
    text = (
        f'{{\n  "compiler": "NVRTC {nvrtc_version()}",\n'
        '  "columns": ["registers", "static_shared", "loop_instructions", "loop_multiplies"],\n'
        + ",\n".join(lines)
        + "\n}\n"
    )
    modelled.FIGURES.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
