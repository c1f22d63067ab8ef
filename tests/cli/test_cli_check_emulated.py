"""``npmoe check --emulate`` and ``--precision``: what is refused; tests/gpu runs them."""

from __future__ import annotations

import pytest
from conftest import npmoe


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["numpy", "--emulate"], "name must be that of a GPU backend, got 'numpy'. It runs here"),
        (["cupy", "--emulate", "zigzag"], "--emulate must be in-order, reversed or a seed, got"),
        (["cupy", "--emulate", "-1"], "--emulate must be in-order, reversed or a seed, got '-1'"),
        (["nobody", "--emulate"], "backend must name a known backend, got 'nobody'."),
        (["json:dumps", "--emulate"], "TARGET must be the name of a GPU backend with --emulate"),
        (["json:dumps", "--precision", "tf32"], "name of a GPU backend with --precision, got"),
        (
            ["numpy", "--precision", "tf32"],
            "--precision must come with a backend that has one, got 'numpy'. Its options: none.",
        ),
        (["numba", "--precision", "tf32"], "Its options: num_threads, batch_invariant."),
    ],
)
def test_bad_options(arguments: list[str], told: str) -> None:
    if arguments[0] == "numba":
        pytest.importorskip("numba", reason="needs the extra npmoe[numba]: numba")
    result = npmoe("check", *arguments)
    assert result.code != 0
    assert told in result.err.replace("\n", " ")


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    result = npmoe("check", "cupy", "--emulate")
    assert result.code != 0
    assert "get_emulated_backend: 'cupy' cannot be emulated here: " in result.err
