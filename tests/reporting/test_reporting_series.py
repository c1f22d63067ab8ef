from __future__ import annotations

import pytest
from report_runs import make_run, records, without

from npmoe.errors import CheckpointError
from npmoe.reporting import read_run_log


def test_fields_come_back_with_the_steps_that_have_them(tmp_path):
    log = read_run_log(make_run(tmp_path / "run", records()))
    assert log.steps.tolist() == [10, 20, 30, 40, 50]
    assert log["val_loss"].steps.tolist() == [20, 40]
    assert log["cross_entropy"].values.tolist() == [3.0 - s / 100 for s in log.steps]
    assert log["tokens_per_expert"].values.shape == (5, 2, 4)
    assert log["selection_bias_range"].at(30).tolist() == [[-3.0, 6.0], [-9.0, 12.0]]
    assert log["val_loss"].at(30) is None
    assert [s.step for s in log.specialisations] == [20, 40]
    assert log.specialisations[0].rows == ("lower", "upper", "digit")
    assert log.specialisations[0].choices[1, 2].tolist() == [20, 21, 22, 23]


def test_absent_fields_are_empty(tmp_path):
    log = read_run_log(
        make_run(tmp_path / "run", without(records(), "router_entropy", "specialisation"))
    )
    assert len(log["router_entropy"]) == 0
    assert log["router_entropy"].values.shape == (0, 0)
    assert log.specialisations == []


def test_lines_without_a_step_are_passed_over_and_the_last_of_a_step_counts(tmp_path):
    content = [{"kind": "start"}, {"step": 20, "drop_rate": 0.5}, {"step": 10, "drop_rate": 0.25}]
    content.append({"step": 20, "drop_rate": 0.75})
    log = read_run_log(make_run(tmp_path / "run", content))
    assert log.steps.tolist() == [10, 20]
    assert log["drop_rate"].values.tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("cross_entropy", "low", "step 30: cross_entropy must hold a number, got low. Delete"),
        ("cross_entropy", [1.0], "cross_entropy must hold a number, got [1.0]"),
        ("grad_norm", None, "grad_norm must hold a number, got None"),
        ("tokens_per_expert", [1, 2], "must hold numbers with 2 axes, got [1, 2]"),
        ("tokens_per_expert", [[1, 2], [3]], "tokens_per_expert must hold numbers with 2 axes"),
        (
            "tokens_per_expert",
            [[1, 2, 3]],
            "tokens_per_expert must have shape (2, 4), as at step 10, got (1, 3)",
        ),
        ("specialisation", [], "specialisation must hold rows and choices, got []"),
        ("specialisation", {"rows": ["a"]}, "specialisation must hold rows and choices"),
        (
            "specialisation",
            {"rows": ["a"], "choices": [[[1], [2]]]},
            "choices (layers, rows, E) for 1 rows, got (1, 2, 1)",
        ),
        ("step", "x", "must hold a whole number as step, got 'x'. Delete that line."),
        ("step", 1.5, "must hold a whole number as step, got 1.5"),
        ("step", -1, "must hold a whole number as step, got -1"),
    ],
)
def test_a_damaged_value_names_its_step(tmp_path, field, value, words):
    content = list(records())
    content[2][field] = value
    folder = make_run(tmp_path / "run", content)
    with pytest.raises(CheckpointError) as error:
        read_run_log(folder)
    assert str(error.value).startswith(f"report: {folder.log}")
    assert words in str(error.value)


def test_a_log_without_steps(tmp_path):
    folder = make_run(tmp_path / "run", [{"kind": "start"}])
    with pytest.raises(CheckpointError) as error:
        read_run_log(folder)
    assert str(error.value) == (
        f"report: {folder.log} must hold at least one step, got none. The run has not come to its "
        "first record yet."
    )


def test_numbers_beyond_float_are_damage(tmp_path):
    folder = make_run(tmp_path / "run", records())
    folder.log.write_text('{"step": 1, "grad_norm": NaN}\n', encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"grad_norm must hold a number, got nan"):
        read_run_log(folder)
