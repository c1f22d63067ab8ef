"""``npmoe check``: targets, options, what is printed and written, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import npmoe

THEIRS = """
import os
import numpy as np

def product(x_sorted, w, expert_offsets):
    y = np.zeros((len(x_sorted), w.shape[1]), x_sorted.dtype)
    for e in range(len(w)):
        rows = slice(expert_offsets[e], expert_offsets[e + 1])
        y[rows] = x_sorted[rows] @ w[e].T
    return y

def loses_a_row(x_sorted, w, expert_offsets):
    y = product(x_sorted, w, expert_offsets)
    y[-1:] = 0
    return y

def dies(x_sorted, w, expert_offsets):
    os.abort()

def two(x, w):
    return x
"""


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs_for_check.py").write_text(THEIRS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "theirs_for_check"
    sys.modules.pop("theirs_for_check", None)


def test_expert_weights_in_half_precision(theirs):
    result = npmoe("check", "numpy", "--quick", "--dtype", "bfloat16")
    assert result.code == 0
    assert "half-weights-are-read-exactly" in result.out
    assert "note: expert weights in bfloat16, all else float32; " in result.out
    result = npmoe("check", f"{theirs}:product", "--dtype", "float16")
    assert result.code == 1
    assert result.err.endswith(
        "check_grouped_gemm: dtype must be 'float32' or 'float64', got 'float16'.\n"
    )


def test_a_right_function(theirs, tmp_path):
    result = npmoe("check", f"{theirs}:product", "--quick", "--json", "r.json", "--html", "r.html")
    assert result.code == 0
    assert "grouped_gemm: theirs_for_check:product" in result.out
    assert "11 of 11 checks passed\n" in result.out
    assert "note: hangs and deaths of the process are not covered; use --isolate." in result.out
    values = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert values["passed"] is True
    assert [c["status"] for c in values["reports"][0]["checks"]] == ["passed"] * 11
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "integers-are-exact" in page
    assert "http" not in page  # it loads nothing
    assert not (tmp_path / "npmoe-check").exists()


def test_a_wrong_function(theirs, tmp_path):
    result = npmoe(
        "check", f"{theirs}:loses_a_row", "--quick", "--out", "cases", "--html", "r.html"
    )
    assert result.code == 1
    assert "integers-are-exact           FAILED" in result.out
    assert "checks passed: WRONG" in result.out
    script = tmp_path / "cases" / "integers-are-exact.py"
    assert f"reproduce: python {script.relative_to(tmp_path)}" in result.out
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "AssertionError: output 0" in done.stderr
    assert "integers-are-exact" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_ledger(theirs, tmp_path):
    all_names = npmoe("check", f"{theirs}:loses_a_row", "--quick", "--json", "r.json")
    values = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    failed = [c["name"] for c in values["reports"][0]["checks"] if c["status"] == "failed"]
    assert all_names.code == 1
    ledger = tmp_path / "ledger.json"
    ledger.write_text(json.dumps(dict.fromkeys(failed, "being fixed")), encoding="utf-8")
    assert npmoe("check", f"{theirs}:loses_a_row", "--quick", "--ledger", ledger).code == 0
    mended = npmoe("check", f"{theirs}:product", "--quick", "--ledger", ledger)
    assert mended.code == 1
    assert "unexpected pass" in mended.out


def test_in_a_child_process(theirs, monkeypatch):
    result = npmoe("check", f"{theirs}:product", "--quick", "--isolate")
    assert result.code == 0
    assert "not covered" not in result.out
    monkeypatch.setattr("npmoe.testing.conformance.runner._COSTLY_SHRINKS", 1)
    result = npmoe("check", f"{theirs}:dies", "--quick", "--isolate")
    assert result.code == 1
    assert "got Died: the process died by SIGABRT" in result.out


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("gone:f", [], "target-can-be-imported: gone must be importable, got ModuleNotFoundError"),
        ("{0}:zzz", [], "target-can-be-imported: theirs_for_check must hold 'zzz', got only: "),
        ("{0}:two", ["--as", "grouped_gemm"], "target-takes-the-arguments: the function must take"),
    ],
)
def test_targets_that_cannot_be_called_are_findings(theirs, target, options, words):
    result = npmoe("check", target.format(theirs), *options)
    assert result.code == 1
    assert words in result.out
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "TARGET or --faults must be given, and not both."),
        (["numpy", "--faults"], "TARGET or --faults must be given, and not both."),
        (["{0}:two"], "the kind must be clear from the arguments or the name of the function"),
        (["{0}:product", "--set", "dialect"], "--set must be NAME=VALUE, got 'dialect'."),
        (
            ["{0}:product", "--set", "dialect=x"],
            "--set must name an option of check_grouped_gemm, got 'dialect'. Options: none.",
        ),
        (["{0}:product", "--ledger", "gone.json"], "--ledger: gone.json must be readable JSON"),
        (["numpy", "--html", "gone/x"], "--html must name a file that can be written, got gone/x."),
        (["{0}:product", "--seed", "-1"], "seed must be an integer >= 0, got -1."),
        (["numbda"], "backend must name a known backend, got 'numbda'"),
    ],
)
def test_mistakes_on_the_command_line(theirs, arguments, words):
    result = npmoe("check", *(a.format(theirs) for a in arguments))
    assert result.code == 1
    assert words in result.err
    assert "Traceback" not in result.err
