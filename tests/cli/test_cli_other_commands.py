"""``npmoe generate``, ``gradcheck``, ``info`` and the command line itself."""

from __future__ import annotations

import json

import pytest
from conftest import TINY, assert_one_message, finish, npmoe, start

import npmoe as package
from npmoe import cli
from npmoe.cli import gradcheck


def test_version_and_no_command():
    result = npmoe("--version")
    assert (result.code, result.out) == (0, f"npmoe {package.__version__}\n")
    result = npmoe()
    assert result.code == 2
    assert "COMMAND" in result.err
    assert npmoe("trian").code == 2
    assert npmoe("train", "--steps", "many").code == 2
    assert npmoe("train", "--steps", "1", "--seconds", "1").code == 2


def test_every_command_has_help():
    for name in cli._COMMANDS:
        result = npmoe(name, "--help")
        assert result.code == 0
        assert f"npmoe {name}" in result.out


def test_the_package_runs_as_an_installed_program(tmp_path):
    result = finish(start("info", "--json", tmp_path / "info.json"))
    assert result.code == 0
    assert result.err == ""
    facts = json.loads((tmp_path / "info.json").read_text(encoding="utf-8"))
    assert facts["version"] == package.__version__
    assert facts["backends"]["numpy"] == {"ok": True, "reason": ""}
    for name in (*facts["packages"], *facts["backends"]):
        assert name in result.out


def text(folder, *options):
    result = npmoe("generate", folder, *options)
    assert result.code == 0, result
    assert result.err == ""
    return result.out


def test_generate_is_decided_by_its_seed(finished):
    folder = finished[0]
    one = text(folder, "--prompt", "the ", "--tokens", 60, "--seed", 3)
    assert one.startswith("the ")
    assert len(one) == 4 + 60 + 1
    assert text(folder, "--prompt", "the ", "--tokens", 60, "--seed", 3) == one
    assert text(folder, "--prompt", "the ", "--tokens", 60, "--seed", 4) != one
    assert text(folder, "--prompt", "the ", "--tokens", 0) == "the \n"


def test_temperature_zero_equals_the_narrowest_choices(finished):
    def fox(*options):
        return text(finished[0], "--prompt", "fox", "--tokens", 60, *options)

    likeliest = fox("--temperature", 0, "--seed", 1)
    assert len(likeliest) == 3 + 60 + 1
    assert fox("--top-k", 1, "--seed", 2) == likeliest
    assert fox("--top-p", "1e-6", "--seed", 3) == likeliest
    assert fox("--top-p", "0.9", "--seed", 3) != likeliest
    assert fox("--temperature", 0, "--backend", "reference") == likeliest


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--prompt", "é"], ["known characters", "'é' (U+00E9) at position 0"]),
        (["--prompt", ""], ["prompt must hold at least one token"]),
        (["--temperature", "-1"], ["temperature must be finite and not negative, got -1.0"]),
        (["--temperature", "nan"], ["temperature must be finite", "got nan"]),
        (["--top-p", "0"], ["top_p must lie in (0, 1], got 0.0"]),
        (["--top-p", "1.5"], ["top_p must lie in (0, 1], got 1.5"]),
        (["--top-k", "0"], ["top_k must be at least 1, got 0"]),
        (["--tokens", "-1"], ["num_tokens must not be negative, got -1"]),
        (["--seed", "-1"], ["seed must not be negative, got -1"]),
        (["--backend", "numbda"], ["'numbda'", "Known: ", "numpy"]),
        (["--backend", "loopback"], ["host arrays, got 'loopback'", "Choose 'numpy'"]),
    ],
)
def test_bad_options_of_generate(finished, options, parts):
    result = npmoe("generate", finished[0], "--prompt", "fox", *options)
    assert_one_message(result, "npmoe generate: error: ", *parts)
    assert result.out == ""


def test_generate_without_a_run(tmp_path):
    assert_one_message(npmoe("generate", tmp_path / "no"), "config.json", "No such file")


def test_generate_with_an_ascii_terminal_and_a_reader_that_leaves(run_folder):
    config = json.loads((run_folder / "config.json").read_text(encoding="utf-8"))
    last = config["characters"][-1]
    config["characters"] = config["characters"][:-1] + "é"
    (run_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert last == "z"
    child = start(
        *("generate", run_folder, "--prompt", "éé", "--tokens", 30),
        env={"PYTHONIOENCODING": "ascii"},
    )
    result = finish(child)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("??")
    with start("generate", run_folder, "--prompt", "fox", "--tokens", 3000) as child:
        child.stdout.read(5)
        child.stdout.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def test_gradcheck_passes_and_says_so(tmp_path):
    path = tmp_path / "errors.json"
    result = npmoe("gradcheck", "--directions", 1, "--json", path)
    values = json.loads(path.read_text(encoding="utf-8"))
    assert result.code == 0
    assert values["ok"] is True
    assert 0 < values["worst_relative_error"] <= 1e-7 == values["tolerance"]
    kinds = [title.split(":")[0] for title in values["errors"]]
    assert kinds == ["model"] * 6 + ["layer"] * 13
    every = [e for errors in values["errors"].values() for e in errors.values()]
    assert max(every) == values["worst_relative_error"]
    assert f"worst relative error {values['worst_relative_error']:.1e}" in result.out
    for errors in values["errors"].values():
        assert all(name in result.out for name in errors)


@pytest.mark.parametrize("wrong", [2e-7, float("nan")])
def test_gradcheck_fails_loudly(tmp_path, monkeypatch, wrong):
    monkeypatch.setattr(
        gradcheck, "gradcheck_model", lambda *_, **__: {"a": 1e-9, "b": wrong, "c": 1e-8}
    )
    path = tmp_path / "errors.json"
    result = npmoe("gradcheck", "--json", path)
    assert_one_message(result, "npmoe gradcheck: error: a gradient is wrong.")
    assert "WRONG" in result.out
    assert "at b (" in result.out
    assert "ABOVE the tolerance" in result.out
    assert '"ok": false' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--directions", "0"], "directions must be at least 1, got 0"),
        (["--seed", "-1"], "seed must be at least 0, got -1"),
        (["--backend", "loopback"], "host arrays, got 'loopback'"),
        (["--backend", "cuda"], "got 'cuda'"),
    ],
)
def test_bad_options_of_gradcheck(options, part):
    assert_one_message(npmoe("gradcheck", *options), "npmoe gradcheck: error: ", part)


@pytest.mark.parametrize("command", ["info", "gradcheck", "train"])
@pytest.mark.parametrize("place", [".", "missing/summary.json"])
def test_an_unwritable_summary_is_told_before_the_work(tmp_path, command, place):
    options = ["--out", tmp_path / "run", "--steps", 1, *TINY] if command == "train" else []
    result = npmoe(command, *options, "--json", tmp_path / place)
    assert_one_message(result, "--json must name a file that can be written", str(tmp_path))
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []
