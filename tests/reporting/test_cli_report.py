"""``npmoe report``: the command, a real run, and the messages."""

from __future__ import annotations

import contextlib
import io

import pytest
from report_runs import TEXT, make_run, records

from npmoe.cli import main
from npmoe.training import RunFolder, language_recipe, train


def report(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["report", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def test_it_writes_the_page_and_says_where(tmp_path):
    folder = make_run(tmp_path / "run", records())
    code, out, err = report(folder.path)
    assert (code, err) == (0, "")
    assert out == f"{folder.path / 'report.html'}\n"
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "Plan of step 50" in page
    other = tmp_path / "other.html"
    assert report(folder.path, "--step", 20, "--block-size", 8, "--out", other)[0] == 0
    assert "Plan of step 20" in other.read_text(encoding="utf-8")
    assert "blocks of 8" in other.read_text(encoding="utf-8")
    report(folder.path)
    assert (folder.path / "report.html").read_text(encoding="utf-8") == page


def test_a_real_run(tmp_path):
    pytest.importorskip("safetensors")
    pytest.importorskip("threadpoolctl")
    config = language_recipe(
        TEXT,
        "text",
        steps=10,
        hidden_size=32,
        num_layers=1,
        context_length=16,
        batch_size=4,
        num_experts=4,
    )
    folder = RunFolder.create(tmp_path / "run")
    train(config, TEXT, folder)
    code, _, err = report(folder.path)
    assert (code, err) == (0, "")
    page = (folder.path / "report.html").read_text(encoding="utf-8")
    assert "10 of 10" in page
    assert "MoE layer 0: load of each expert" in page


def messages(tmp_path):
    folder = make_run(tmp_path / "run", records())
    damaged = make_run(tmp_path / "damaged", records())
    content = damaged.log.read_bytes().split(b"\n")
    content[1] = content[1][:30]
    damaged.log.write_bytes(b"\n".join(content))
    empty = make_run(tmp_path / "empty", [])
    return {
        (folder.path, "--step", 11): "--step must be a logged step, got 11",
        (folder.path, "--block-size", 0): "--block-size must be at least 1, got 0",
        (tmp_path / "none",): "config.json could not be read: No such file or directory",
        (damaged.path,): 'must hold a JSON object on each line, got b\'{"step": 20',
        (empty.path,): "log.jsonl could not be read: No such file",
        (folder.path, "--out", tmp_path / "none" / "x.html"): "could not be written",
    }


def test_messages(tmp_path):
    for arguments, words in messages(tmp_path).items():
        code, out, err = report(*arguments)
        assert (code, out) == (1, "")
        assert err.startswith("npmoe report: error: ")
        assert len(err.splitlines()) == 1
        assert words in err
