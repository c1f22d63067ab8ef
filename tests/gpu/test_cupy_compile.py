"""Every variant that the host code can ask for compiles: no spills, no local memory, in budget."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import random
import shutil
from functools import lru_cache

import pytest
from compile_gates import (
    ARCHITECTURES,
    Launch,
    RecordingDevice,
    Usage,
    asked_kernels,
    check_with_nvcc,
    find_cuobjdump,
    nvrtc_usage,
    read_usage,
    run_layer,
)
from emulation import need_emulation

need_emulation()

import npmoe
from accel.cupy_raw import CupyBackend
from accel.cupy_raw.nvrtc import KernelCompileError, compile_kernel
from accel.device.kernel import Kernel

# Most registers of a thread and bytes of static shared memory, over all architectures: by file,
# entry and REAL. A ratchet: lower what can be lowered.
BUDGETS: dict[tuple[str, str, str], tuple[int, int]] = {
    ("grouped_simt", "grouped_gemm", "float"): (80, 17200),
    ("grouped_simt", "grouped_gemm", "double"): (80, 33900),
    ("wgrad_simt", "grouped_wgrad", "float"): (80, 8400),
    ("wgrad_simt", "grouped_wgrad", "double"): (80, 16700),
    ("grouped_mma", "grouped_gemm", "float"): (255, 1700),
    ("wgrad_mma", "grouped_wgrad", "float"): (255, 1100),
    ("rows", "", "float"): (48, 0),
    ("rows", "", "double"): (64, 0),
    ("router", "route_rows", "float"): (48, 0),
    ("router", "route_rows", "double"): (64, 0),
    ("plan", "", ""): (40, 200),
}
RESERVED = 1024  # what every block gives to the system on sm_80 and later


@lru_cache(maxsize=1)
def asked() -> dict[Kernel, Launch]:
    return asked_kernels()


def cuobjdump() -> str:
    found = find_cuobjdump()
    if found is None:
        pytest.skip("needs cuobjdump, on the path or of the wheel nvidia-cuda-cuobjdump")
    return found


def check_usage(kernel: Kernel, arch: str, launch: Launch) -> Usage:
    """Compile, and hold to the budgets."""
    usage = nvrtc_usage(kernel, arch, cuobjdump())
    real = str(dict(kernel.options).get("REAL", ""))
    key = (kernel.file, kernel.entry, real)
    registers, shared = BUDGETS.get(key) or BUDGETS[kernel.file, "", real]
    what = f"{kernel} for {arch}: {usage}"
    assert (usage.local, usage.stack) == (0, 0), what
    assert usage.registers <= registers, what
    assert usage.shared <= shared + RESERVED, what
    # What one block may have, and all registers of a multiprocessor.
    assert launch.shared_mem + usage.shared <= 99 * 1024, what
    assert usage.registers * launch.threads <= 65536, what
    return usage


def sample(seed: int, count: int) -> list[tuple[Kernel, str]]:
    """Draw variants: of each file and entry some, each for one architecture."""
    rng, groups = random.Random(seed), {}
    for kernel in sorted(asked(), key=str):
        groups.setdefault((kernel.file, kernel.entry), []).append(kernel)
    chosen = [k for of in groups.values() for k in rng.sample(of, min(count, len(of)))]
    return [(kernel, rng.choice(ARCHITECTURES)) for kernel in chosen]


def test_a_sample_compiles_without_spills_within_budget() -> None:
    seen = set()
    for kernel, arch in sample(1, 1):
        check_usage(kernel, arch, asked()[kernel])
        seen.add((kernel.file, kernel.entry))
    assert seen == {(k.file, k.entry) for k in asked()}


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_compile_without_spills_within_budget(arch: str) -> None:
    for kernel, launch in asked().items():
        check_usage(kernel, arch, launch)


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc on the path")
    return found


def test_a_sample_compiles_with_nvcc() -> None:
    for kernel, arch in random.Random(2).sample(sample(2, 1), 5):
        check_with_nvcc(kernel, arch, nvcc())


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_compile_with_nvcc(arch: str) -> None:
    for kernel in asked():
        check_with_nvcc(kernel, arch, nvcc())


def test_the_host_code_asks_for_every_file_and_entry() -> None:
    files = {k.file for k in asked()}
    assert files == {"plan", "rows", "router", "grouped_simt", "wgrad_simt", "grouped_mma",
                     "wgrad_mma"}  # fmt: skip
    simt = [k for k in asked() if k.file == "grouped_simt"]
    assert {dict(k.options)["BLOCK_M"] for k in simt} == {16, 64}
    assert {dict(k.options)["EPILOGUE"] for k in simt} == {0, 1, 2, 3}
    assert {dict(k.options)["WEIGHT"] for k in simt} == {"float", "double", "half16", "bfloat16"}


def test_the_recording_device_sees_the_layer() -> None:
    device = RecordingDevice()
    cfg = npmoe.MoEConfig(hidden_size=4, intermediate_size=4, num_experts=2, top_k=1)
    run_layer(CupyBackend(launcher=device), cfg, "float32", 3)
    entries = [launch.kernel.entry for launch in device.asked]
    assert entries.count("grouped_gemm") == 4
    assert entries.count("grouped_wgrad") == 2


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) k(const float *x, float *y, int n) {
    float a[64];
    for (int i = 0; i < 64; i++) a[i] = x[i * n + threadIdx.x];
    for (int r = 0; r < n; r++)
        for (int i = 0; i < 64; i++) a[i] = a[i] * a[(i * 7 + 3) % 64] + x[r];
    for (int i = 0; i < 64; i++) y[i * n + threadIdx.x] = a[i];
}
"""


def test_the_gate_sees_local_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    import accel.cupy_raw.nvrtc as compiling

    monkeypatch.setattr(compiling, "read_source", lambda _: SPILLING)
    cubin = compile_kernel(Kernel("spilling", "k"), "sm_90", "cubin")
    usage = read_usage(cubin, cuobjdump())["k"]
    assert usage.stack > 0 or usage.local > 0


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import accel.cupy_raw.nvrtc as compiling

    monkeypatch.setattr(compiling, "read_source", lambda _: "nonsense;")
    with pytest.raises(KernelCompileError, match=r"k of wrong \(A=1\) must compile with -arch"):
        compile_kernel(Kernel("wrong", "k", (("A", 1),)), "sm_90", "cubin")
