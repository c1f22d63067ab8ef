"""What compilers make of the Python kernels, for every architecture, without a driver."""

from __future__ import annotations

import re
import shutil

import pytest
from compile_gates import find_cuobjdump
from numba_cuda_cases import need_numba_cuda
from numba_cuda_figures import (
    PLAN,
    PRODUCTS,
    ROUTER,
    SUBJECTS,
    Figures,
    bound,
    code_lines,
    measure,
    product,
)
from sass_counts import find_nvdisasm

from accel.device.products import ACTIVATE_BACKWARD
from accel.numba_cuda.compiling import compile_kernel
from npmoe.benchmark.modelled import read_figures

need_numba_cuda()

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
ALL = [(k, arch) for k in SUBJECTS for arch in ARCHITECTURES]
SAMPLE = [
    (PRODUCTS["down/64"], "sm_80"), (PRODUCTS["down/64"], "sm_100"), (PLAN[2], "sm_90"),
    (PLAN[1], "sm_120"),
    (product(ACTIVATE_BACKWARD, gated=1, gather=1, transposed=1, real="double", weight="double"),
     "sm_80"),
    (PRODUCTS["gate_up/64"], "sm_80"), (PRODUCTS["gate_up_wgrad"], "sm_90"), (ROUTER, "sm_80"),
]  # fmt: skip
# Of 256 threads in three blocks, and of 1024 in one, of 65,536 registers.
MOST_REGISTERS = {"grouped_gemm": 80, "grouped_wgrad": 80, "scan_experts": 64, "scan_blocks": 64}


def check_ptx(kernel, arch) -> str:
    text = compile_kernel(kernel, arch)
    assert f".target {arch}" in text
    assert f".entry {kernel.entry}(" in text
    assert not re.search(r"\b(div|rem)\.[su]64", text), "a division of 64 bits"
    assert ".local" not in text, "an array that is not in registers"
    if "double" not in str(kernel):
        assert ".f64" not in text, "a literal has made float64 of float32"
    assert not re.search(r"\bcall\b", text)
    return text


@pytest.mark.parametrize(("kernel", "arch"), SAMPLE, ids=str)
def test_sample(kernel, arch) -> None:
    check_ptx(kernel, arch)


@pytest.mark.parametrize(("kernel", "arch"), SAMPLE, ids=str)
def test_resources_of_a_sample(kernel, arch) -> None:
    check_resources(kernel, arch)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kernel", "arch"), ALL, ids=str)
def test_every_kernel(kernel, arch) -> None:
    check_ptx(kernel, arch)
    check_resources(kernel, arch)


def check_resources(kernel, arch) -> None:
    if shutil.which("ptxas") is None or find_nvdisasm() is None or find_cuobjdump() is None:
        pytest.skip("needs ptxas of the CUDA toolkit, nvdisasm and cuobjdump")
    figures = measure(compile_kernel(kernel, arch), kernel, arch)
    assert figures.local == 0
    assert figures.registers <= MOST_REGISTERS.get(kernel.entry, 128)
    assert figures.shared <= 48 * 1024
    if kernel == PRODUCTS["down/64"]:
        # 8 loads for 16 multiply-adds make 1.5; addresses and the filling of panels are the rest.
        assert 1.5 < figures.per_add <= (3.0 if arch == "sm_90" else 2.8)


def test_lines_are_counted() -> None:
    assert code_lines(PLAN[0], "numba_cuda") > 100
    assert code_lines(PLAN[0], "kernels") > 100


def test_the_bound_is_the_model_s_and_grows_with_instructions() -> None:
    twin = bound("down/64")
    registers, shared, *loop = read_figures()["float32"]["kernels"]["down/64"]["sm_80"]
    same = dict.fromkeys(PRODUCTS, Figures(registers, shared, 0, 0, tuple(loop)))
    assert bound("down/64", same) == twin
    twice = dict.fromkeys(PRODUCTS, Figures(registers, shared, 0, 0, (2 * loop[0], loop[1])))
    changed = bound("down/64", twice)
    assert changed.bound_by == "issue"
    assert changed.issue_seconds == 2 * twin.issue_seconds
    assert changed.memory_seconds == twin.memory_seconds
    assert bound("down/64") == twin
