"""Every variant that the host code can ask for compiles, within limits and as the table says."""

# ruff: noqa: E402  # imports follow what they need
from __future__ import annotations

import random
import shutil
from dataclasses import replace

import pytest
from compile_gates import ARCHITECTURES, RecordingDevice, asked_kernels, check_with_nvcc, run_layer
from emulation import need_emulation, need_tables

need_emulation()

import emulation
import kernel_ratchets
from kernel_ratchets import (
    Figures,
    check_variants,
    draw_variants,
    find_changes,
    find_faults,
    measure,
    need_disassembly,
    read_table,
)

import npmoe
from accel.cupy_raw import CupyBackend, nvrtc
from accel.cupy_raw.nvrtc import KernelCompileError, compile_kernel
from accel.device.kernel import Kernel
from accel.device.source import read_source


def drawn(seed: int) -> list[tuple[Kernel, str]]:
    """Draw a variant of each file and entry."""
    return draw_variants(asked_kernels(), lambda kernel: (kernel.file, kernel.entry), seed)


def test_a_sample_is_within_limits_and_as_in_the_table() -> None:
    pairs = drawn(1)
    assert {(k.file, k.entry) for k, _ in pairs} == {(k.file, k.entry) for k in asked_kernels()}
    check_variants(pairs)


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_are_within_limits_and_as_in_the_table(arch: str) -> None:
    check_variants((kernel, arch) for kernel in asked_kernels())


def nvcc() -> str:
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("needs nvcc on the path")
    return found


def test_a_sample_compiles_with_nvcc() -> None:
    for kernel, arch in random.Random(2).sample(drawn(2), 5):
        check_with_nvcc(kernel, arch, nvcc())


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_compile_with_nvcc(arch: str) -> None:
    for kernel in asked_kernels():
        check_with_nvcc(kernel, arch, nvcc())


def test_the_host_code_asks_for_every_file_and_entry() -> None:
    files = {k.file for k in asked_kernels()}
    assert files == {"plan", "rows", "router", "grouped_simt", "wgrad_simt", "grouped_mma",
                     "wgrad_mma"}  # fmt: skip
    simt = [k for k in asked_kernels() if k.file == "grouped_simt"]
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


def test_the_gate_sees_local_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    need_disassembly()
    monkeypatch.setattr(nvrtc, "read_source", lambda _: SPILLING)
    assert measure(Kernel("spilling", "k"), "sm_90").local > 0


GRADIENT = Kernel("wgrad_simt", "grouped_wgrad", (("REAL", "float"), ("GATHER", 0)))


@pytest.mark.parametrize(
    ("bounds", "fault"), [("(256)", "registers 55 -> 40"), ("(256, 8)", "local memory")]
)
def test_other_launch_bounds_are_noticed(
    monkeypatch: pytest.MonkeyPatch, bounds: str, fault: str
) -> None:
    need_tables()
    text = read_source("wgrad_simt")
    changed = text.replace("__launch_bounds__(256, 3)", f"__launch_bounds__{bounds}")
    assert changed != text
    monkeypatch.setattr(nvrtc, "read_source", lambda _: changed)
    with pytest.raises(AssertionError, match=fault):
        check_variants([(GRADIENT, "sm_80")])


def test_another_compiler_is_held_to_the_limits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulation, "nvrtc_version", lambda: "13.9")
    with pytest.raises(pytest.skip.Exception, match=r"this is 13\.9"):
        check_variants([(GRADIENT, "sm_80")])
    monkeypatch.setattr(kernel_ratchets, "MOST_SHARED", 8319)
    with pytest.raises(AssertionError, match="8320 shared bytes"):
        check_variants([(GRADIENT, "sm_80")])


def test_every_limit_can_be_missed() -> None:
    plain = asked_kernels()[GRADIENT]
    assert (plain.threads, plain.shared_mem) == (256, 0)
    good = Figures(registers=64, shared=1000, local=0)
    assert find_faults(plain, good) == []
    assert find_faults(plain, replace(good, local=8)) == ["8 bytes of local memory, or accesses"]
    wide = replace(plain, threads=1024)
    assert find_faults(wide, good) == []
    # Registers are given in eights.
    assert find_faults(wide, replace(good, registers=65)) == ["73728 registers of a block"]
    large = replace(plain, shared_mem=99 * 1024 - 1000)
    assert find_faults(large, good) == []
    assert find_faults(large, replace(good, shared=1001)) == ["101377 shared bytes"]


def test_every_figure_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Figures(64, 1000, 0, 384, 32)
    assert find_changes(known, known) == []
    assert find_changes(known, None) == ["not in the table"]
    for name, old in (("registers", 64), ("shared", 1000), ("local", 0),
                      ("loop_instructions", 384), ("loop_mma", 32)):  # fmt: skip
        for new in (old - 1, old + 1):
            changed = replace(known, **{name: new})
            assert find_changes(changed, known) == [f"{name} {old} -> {new}"]
    need_tables()
    lower = dict(read_table())
    key = (str(GRADIENT), "sm_80")
    lower[key] = replace(lower[key], registers=lower[key].registers - 1)
    monkeypatch.setattr(kernel_ratchets, "read_table", lambda: lower)
    with pytest.raises(AssertionError, match=r"registers 54 -> 55\nPYTHONPATH=\. python tests"):
        check_variants([(GRADIENT, "sm_80")])


def test_the_table_has_what_is_asked_for() -> None:
    asked = {(str(kernel), arch) for kernel in asked_kernels() for arch in ARCHITECTURES}
    assert read_table().keys() == asked
    launches = {str(kernel): launch for kernel, launch in asked_kernels().items()}
    faults = {key: find_faults(launches[key[0]], f) for key, f in read_table().items()}
    assert {key: found for key, found in faults.items() if found} == {}


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "read_source", lambda _: "nonsense;")
    with pytest.raises(KernelCompileError, match=r"k of wrong \(A=1\) must compile with -arch"):
        compile_kernel(Kernel("wrong", "k", (("A", 1),)), "sm_90", "cubin")
