"""The kit on functions of real systems: what they fail is named here, with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the extra npmoe[parity]: torch")
pytest.importorskip("transformers", reason="needs the extra npmoe[parity]: transformers")
pytest.importorskip("jax", reason="needs the extra npmoe[parity]: jax")

import real_subjects  # noqa: E402

from npmoe.testing import (  # noqa: E402
    check_align,
    check_experts,
    check_experts_backward,
    check_grouped_gemm,
)

JAX_LEDGER = {
    "unused-weights-are-not-read": "jax.lax.ragged_dot on the CPU multiplies by masks: 0 x NaN",
}
UNROUTED = "transformers has no id for 'no expert': expert 0 with weight 0 still reads the token"
NO_GRAPH = "transformers' eager loop over no tokens records no gradient"
HF = [
    (check_experts, "hf_eager", {"unrouted-tokens-are-not-read": UNROUTED}),
    (check_experts, "hf_grouped_mm", {"unrouted-tokens-are-not-read": UNROUTED}),
    (
        check_experts_backward,
        "hf_eager_backward",
        {"unrouted-tokens-are-not-read": UNROUTED, "no-tokens": NO_GRAPH},
    ),
    (
        check_experts_backward,
        "hf_grouped_mm_backward",
        {"unrouted-tokens-are-not-read": UNROUTED},
    ),
]


@pytest.mark.parametrize(("check", "name", "ledger"), HF, ids=[name for _, name, _ in HF])
def test_experts_of_transformers(check, name: str, ledger: dict[str, str]) -> None:
    subject = getattr(real_subjects, name)
    report = check(subject, array="torch", quick=True, expected_failed_checks=ledger)
    assert report.passed, str(report)
    assert {r.name for r in report.results if r.status == "expected failure"} == set(ledger)


def test_an_align_written_from_the_contract() -> None:
    for options in ({}, {"stable": True}, {"strict_tail": True}):
        report = check_align(real_subjects.plain_align, **options)
        assert report.passed, str(report)


def test_jax_ragged_dot(tmp_path: Path) -> None:
    report = check_grouped_gemm(
        real_subjects.jax_ragged_dot, quick=True, expected_failed_checks=JAX_LEDGER
    )
    assert report.passed, str(report)
    bare = check_grouped_gemm(real_subjects.jax_ragged_dot, quick=True, only=list(JAX_LEDGER))
    assert len(bare.write(tmp_path)) == 1  # a reproducer, for whoever wants to see it
    assert "got nan" in bare.failures[0].message


def test_tensors_from_the_command_line(tmp_path: Path, capsys, monkeypatch) -> None:
    from npmoe.cli import main

    monkeypatch.chdir(tmp_path)
    ledger = tmp_path / "ledger.json"
    ledger.write_text(json.dumps({"unrouted-tokens-are-not-read": UNROUTED}), encoding="utf-8")
    target = f"{Path(__file__).with_name('real_subjects.py')}:hf_eager"
    options = ["--as", "experts", "--array", "torch", "--quick", "--ledger", str(ledger)]
    assert main(["check", target, *options]) == 0
    assert "27 of 27 checks passed" in capsys.readouterr().out
