"""The C++ compiler that is missing or broken; the cache on disk, also with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ptx_cases import kernel, needs_compiler

from npmoe import BackendUnavailableError
from npmoe.testing import ptx
from npmoe.testing.ptx import launching, toolchain

TEXT = kernel("ld.param.u32 %r3, [n]; st.global.u32 [%rd1], %r3;", ".u64 p0, .u32 n")


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing remembered in the process; the runtime is not compiled again."""
    before = ptx.cache_folder()
    ptx.load(TEXT)
    monkeypatch.setenv("NPMOE_PTX_CACHE", str(tmp_path))
    for file in before.glob("runtime-*.so"):
        (tmp_path / file.name).symlink_to(file.resolve())
    launching._load.cache_clear()
    yield tmp_path
    launching._load.cache_clear()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"NPMOE_PTX_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, Path("/a/b")),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/npmoe/ptx")),
        ({}, Path.home() / ".cache" / "npmoe" / "ptx"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("NPMOE_PTX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ptx.cache_folder() == expected


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ptx.CompilerMissingError) as caught:
        ptx.find_compiler()
    assert str(caught.value) == (
        "find_compiler: a C++ compiler must be on the path (tried c++, g++, clang++), got none. "
        "PTX is run by compiling it to the CPU. Install g++ (Debian: apt install g++) or clang++, "
        "or set CXX to a compiler."
    )
    assert isinstance(caught.value, BackendUnavailableError)


def test_cxx_that_is_no_program(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    with pytest.raises(
        ptx.CompilerMissingError,
        match=r"CXX must name a C[+][+] compiler, got 'no-such-compiler -O9'",
    ):
        ptx.find_compiler()


@needs_compiler
def test_without_a_compiler_a_launch_says_so(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ptx.CompilerMissingError):
        ptx.launch(TEXT, "k", 1, 1, [np.zeros(1, np.uint32), 1])


@needs_compiler
def test_a_kernel_is_compiled_once(fresh, monkeypatch):
    ptx.load(TEXT)
    made = sorted(p.name for p in fresh.iterdir())
    assert sum(name.startswith("kernel-") and name.endswith(".so") for name in made) == 1
    launching._load.cache_clear()
    monkeypatch.setattr(toolchain, "_compile", lambda *a: pytest.fail("compiled again"))
    out = np.zeros(1, np.uint32)
    ptx.load(TEXT).launch("k", 1, 1, [out, 9])
    assert out[0] == 9
    assert sorted(p.name for p in fresh.iterdir()) == made


@needs_compiler
def test_other_text_other_file(fresh):
    ptx.load(TEXT)
    ptx.load(TEXT.replace("ld.param.u32 %r3, [n];", "ld.param.u32 %r3, [n]; add.u32 %r3, %r3, 1;"))
    assert len(list(fresh.glob("kernel-*.so"))) == 2


@needs_compiler
def test_a_translation_that_does_not_compile(fresh):
    with pytest.raises(ptx.TranslationError, match=r"the C[+][+] compiler rejected a kernel"):
        toolchain.build_kernels("this is not C++")
    assert not list(fresh.glob("kernel-*"))
    assert not list(fresh.glob("*.part"))


@needs_compiler
def test_two_processes_at_once(fresh):
    code = (
        "import numpy as np, sys; from npmoe.testing import ptx\n"
        "out = np.zeros(1, np.uint32); ptx.launch(sys.argv[1], 'k', 1, 1, [out, 5]); "
        "print(int(out[0]))"
    )
    environment = {**os.environ, "NPMOE_PTX_CACHE": str(fresh)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, TEXT],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[3],
        )
        for _ in range(2)
    ]
    for process in both:
        out, errors = process.communicate(timeout=120)
        assert (process.returncode, out, errors) == (0, "5\n", "")
    assert len(list(fresh.glob("kernel-*.so"))) == 1
    assert {p.suffix for p in fresh.iterdir()} == {".so"}


def test_importing_npmoe_does_not_import_it():
    code = "import sys, npmoe; raise SystemExit('npmoe.testing.ptx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    code = (
        "import sys, npmoe.testing.ptx; raise SystemExit('npmoe.testing.ptx' not in "
        "sys.modules or 'numba' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
