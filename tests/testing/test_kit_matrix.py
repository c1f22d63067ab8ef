"""The kill matrix: every planted mistake dies, by the check that names it."""

from __future__ import annotations

import pytest

from npmoe.testing.conformance.registry import KINDS, check_function
from npmoe.testing.faults.matrix import Kill, all_faults, kill_matrix, run_fault

FAULTS = all_faults()


def test_there_are_enough_and_each_says_where_it_was_seen() -> None:
    assert len(FAULTS) >= 48
    assert len({f.name for f in FAULTS}) == len(FAULTS)
    assert {f.kind for f in FAULTS} == {*KINDS, "backend"}
    for fault in FAULTS:
        assert len(fault.seen) > 3
        assert fault.check != fault.name


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_it_is_killed_by_the_check_that_names_it(fault) -> None:
    kill = run_fault(fault)
    assert kill.killed_by == fault.check, kill.message


def test_the_matrix_lists_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npmoe.testing.faults.matrix.all_faults", lambda: FAULTS[:3])
    seen: list[str] = []
    kills = list(kill_matrix(progress=seen.append))
    assert [k.fault for k in kills] == list(FAULTS[:3])
    assert seen == [f.name for f in FAULTS[:3]]
    assert all(isinstance(k, Kill) and k.by_name for k in kills)


def test_a_survivor_is_not_called_killed() -> None:
    import dataclasses

    harmless = next(f for f in FAULTS if f.kind == "grouped_gemm")

    def right(x_sorted, w, expert_offsets):
        import numpy as np

        y = np.zeros((len(x_sorted), w.shape[1]), x_sorted.dtype)
        for e in range(len(w)):
            rows = slice(expert_offsets[e], expert_offsets[e + 1])
            y[rows] = x_sorted[rows] @ w[e].T
        return y

    kill = run_fault(dataclasses.replace(harmless, subject=right))
    assert kill.killed_by is None
    assert not kill.by_name


def test_every_kind_has_a_function() -> None:
    for kind in (*KINDS, "backend"):
        assert check_function(kind).__name__ == f"check_{kind}"
