"""``npmoe train``: what a run prints and leaves behind."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest
from conftest import SIZES, TINY, assert_one_message, finish, npmoe, start

from npmoe.cli import train as train_command
from npmoe.errors import CheckpointError
from npmoe.models import language_forward
from npmoe.testing.bounds import gamma
from npmoe.training import (
    CharVocabulary,
    RunFolder,
    language_recipe,
    load_trained,
    python_topics_text,
    read_log,
    read_text,
    split_text,
    validation_batches,
)


def decoded(path):
    from matplotlib import image

    pixels = image.imread(path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return pixels


def test_the_run_folder_holds_everything(finished):
    folder, result, _ = finished
    names = {"config.json", "log.jsonl", "checkpoint.safetensors", "curves.png", "experts.png"}
    assert {p.name for p in folder.iterdir()} == names
    assert [r["step"] for r in read_log(folder / "log.jsonl")] == [10, 12]
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["batch_size"] == 4
    for name, least in (("curves.png", 700), ("experts.png", 250)):
        pixels = decoded(folder / name)
        assert min(pixels.shape[:2]) > least
        gray = pixels[..., :3].mean(axis=2)
        assert gray.std() > 0.02
        # In each quarter something is drawn.
        for half in np.array_split(gray, 2):
            for quarter in np.array_split(half, 2, axis=1):
                assert quarter.std() > 0.01
    assert result.err.count("\n") <= 2
    assert "12/12" in result.err


def test_the_summary_is_true(finished, text_file):
    folder, result, summary = finished
    values = json.loads(summary.read_text(encoding="utf-8"))
    assert set(values) >= {
        "val_loss",
        "train_loss",
        "tokens_per_second",
        "seconds",
        "steps",
        "drop_rate",
        "load_imbalance",
    }
    config, params, step = load_trained(RunFolder(folder))
    assert values["steps"] == step == 12
    assert values["drop_rate"] == 0.0
    assert values["seconds"] > 0
    assert values["tokens_per_second"] > 12 * 64 / values["seconds"]
    ids = CharVocabulary(config.characters).encode(read_text(text_file))
    train_ids, val_ids = split_text(ids, 16)
    for name, part in (("val_loss", val_ids), ("train_loss", train_ids[-len(val_ids) :])):
        losses, counts = [], np.zeros(4, int)
        for inputs, targets in validation_batches(part, 16, 8):
            logits, saved = language_forward(inputs, params, config.model)
            rows = logits.reshape(-1, len(config.characters))
            for row, wanted in zip(rows, targets.ravel(), strict=True):
                losses.append(np.log(np.exp(row.astype("f8")).sum()) - row[wanted])
            for expert in saved.blocks[0].moe.routing.topk_ids.ravel():
                counts[expert] += 1
        assert abs(values[name] - np.mean(losses)) <= gamma(40, "float32") * max(losses)
        if name == "val_loss":
            imbalance = counts.max() / (counts.sum() / 4) - 1
            assert values["load_imbalance"] == pytest.approx(imbalance, rel=1e-14)
            assert imbalance > 0
    assert values["val_loss"] < np.log(len(config.characters))
    for text in (f"{values['val_loss']:.4f} nats", "12 steps", str(folder), "0.00%"):
        assert text in result.out


def test_a_sample_is_printed_after_its_prompt(finished, text_file):
    _, result, _ = finished
    text = read_text(text_file)
    prompt = "The " if set("The ") <= set(text) else max(text)
    head, _, sample = result.out.partition(f"A sample, after {prompt!r} at temperature 0.6:\n")
    assert "validation loss" in head
    assert sample.startswith(prompt)
    body = sample[len(prompt) :]
    assert len(body) == 400 + 1
    assert set(body) <= set(text) | {"\n"}


def test_a_sample_of_a_text_without_the_usual_prompt(tmp_path):
    path = tmp_path / "digits.txt"
    path.write_text("0123456789 " * 60)
    result = npmoe("train", "--text", path, "--out", tmp_path / "run", *TINY, "--steps", 1)
    assert result.code == 0, result
    assert "A sample, after '9' at temperature 0.6:\n9" in result.out


def test_a_second_run_takes_another_folder(tmp_path, monkeypatch, text_file):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        result = npmoe("train", "--text", text_file, *TINY, "--steps", 1)
        assert result.code == 0, result
        assert f"run folder runs/{number}\n" in result.out
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["1", "2"]
    first, second = (tmp_path / "runs" / n / "checkpoint.safetensors" for n in "12")
    assert first.read_bytes() == second.read_bytes()


def run(tmp_path, text_file, *options, name="run"):
    summary = tmp_path / f"{name}.json"
    result = npmoe(
        "train", "--text", text_file, "--out", tmp_path / name, "--json", summary, *TINY, *options
    )
    assert result.code == 0, result
    return result, json.loads(summary.read_text(encoding="utf-8"))


def test_a_dense_run(tmp_path, text_file):
    result, values = run(tmp_path, text_file, "--dense", "--steps", 3)
    assert (values["drop_rate"], values["load_imbalance"]) == (0.0, 0.0)
    assert "dense blocks" in result.out
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "log.jsonl", "checkpoint.safetensors", "curves.png"}
    assert decoded(tmp_path / "run" / "curves.png").std() > 0.02


def test_a_capacity_drops(tmp_path, text_file):
    result, values = run(tmp_path, text_file, "--capacity-factor", "0.5", "--steps", 2)
    # Half of the routes have room at most.
    assert 0.5 <= values["drop_rate"] < 1
    assert f"{values['drop_rate']:.2%}" in result.out
    # The sample is generated with one route per expert and token at a time.
    assert len(result.out.split("at temperature 0.6:\n")[1]) > 400


def test_seeds_and_workers(tmp_path, text_file, quick):
    found = {}
    for name, options in {
        "one": ["--seed", 5],
        "same": ["--seed", 5, "--workers", 2],
        "other": ["--seed", 6],
    }.items():
        run(tmp_path, text_file, "--steps", 2, *options, name=name)
        found[name] = (tmp_path / name / "checkpoint.safetensors").read_bytes()
    assert found["one"] == found["same"] != found["other"]


def test_the_reference_backend_agrees(tmp_path, text_file, quick):
    values = [
        run(tmp_path, text_file, "--steps", 1, "--backend", name, name=name)[1]
        for name in ("numpy", "reference")
    ]
    # After one step: AdamW's first step has the size of the learning rate whatever the gradient's
    # rounding, except for the few gradients that round to another sign.
    assert abs(values[0]["val_loss"] - values[1]["val_loss"]) <= 1e-5
    other = run(tmp_path, text_file, "--steps", 1, "--seed", 1, name="seed")[1]
    assert abs(values[0]["val_loss"] - other["val_loss"]) > 1e-3


def test_a_budget_of_seconds(tmp_path, text_file, quick):
    """Processor time, so that a busy machine changes nothing; start and evaluation included."""
    before = os.times()
    result, values = run(tmp_path, text_file, "--seconds", 2)
    after = os.times()
    assert values["steps"] >= 1
    assert f" {values['steps']} steps of 64 characters" in result.out
    assert after.user + after.system - before.user - before.system < 2 * 2


def test_a_tiny_budget_makes_one_step(tmp_path, text_file, quick):
    assert run(tmp_path, text_file, "--seconds", "1e-9")[1]["steps"] == 1


def test_without_a_terminal_the_bar_is_short(tmp_path, text_file):
    result = finish(
        start(
            *("train", "--text", text_file, "--out", tmp_path / "run", "--steps", 40),
            *SIZES.split(),
        )
    )
    assert result.code == 0, result.err
    assert len(re.findall(r"\d+/40", result.err)) <= 3
    assert "40/40" in result.err
    assert "Warning" not in result.err


def test_resuming_a_finished_run_draws_and_tells_again(run_folder, text_file, tmp_path):
    before = (run_folder / "checkpoint.safetensors").read_bytes()
    for name in ("curves.png", "experts.png"):
        (run_folder / name).unlink()
    summary = tmp_path / "again.json"
    result = npmoe("train", "--resume", "--out", run_folder, "--json", summary)
    assert result.code == 0, result
    assert (run_folder / "checkpoint.safetensors").read_bytes() == before
    assert (run_folder / "experts.png").stat().st_size > 10_000
    assert json.loads(summary.read_text(encoding="utf-8"))["steps"] == 12


def test_the_default_run_is_on_pythons_documentation(tmp_path, monkeypatch):
    begun = []

    def note(config, text, *_, **__):
        begun.append((config, text))
        raise CheckpointError("train: enough.")

    monkeypatch.setattr(train_command, "train", note)
    result = npmoe("train", "--out", tmp_path / "run")
    assert_one_message(result, "npmoe train: error: enough.")
    ((config, text),) = begun
    assert text == python_topics_text()
    assert config == language_recipe(text, "pydoc_data.topics")
    plan = f"{config.model.num_layers} layers of {config.model.hidden_size}, 8 experts, top-2"
    assert f"Training on pydoc_data.topics: {plan}" in result.out


def test_the_help_states_the_defaults_that_hold():
    out = " ".join(npmoe("train", "--help").out.split())
    config = language_recipe("abc" * 100, "test")
    for option, value in {
        "--steps N": config.steps,
        "--experts E": config.model.moe.num_experts,
        "--top-k K": config.model.moe.top_k,
        "--hidden-size H": config.model.hidden_size,
        "--layers N": config.model.num_layers,
        "--context-length L": config.model.context_length,
        "--batch-size B": config.batch_size,
        "--learning-rate R": config.schedule.learning_rate,
    }.items():
        assert re.search(rf"{option} [^()]*\({re.escape(f'{value:g}')}\)", out), (option, value)
