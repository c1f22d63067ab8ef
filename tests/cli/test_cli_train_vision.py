"""``npmoe train --task vision``: what a run prints and leaves behind, and what it refuses."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from conftest import TINY as TEXT_TINY
from conftest import assert_one_message, contents, npmoe

from npmoe.cli import train as train_command
from npmoe.errors import CheckpointError
from npmoe.models import vision_forward
from npmoe.training import RunFolder, load_trained_vision, read_log, uci_digits, vision_recipe
from npmoe.training.images import normalize_images

VISION = ["train", "--task", "vision"]
TINY = [
    *("--hidden-size", "32", "--layers", "1", "--batch-size", "16"),
    *("--experts", "4", "--workers", "1"),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return (folder, result, summary) of a finished run; not to be changed."""
    place = tmp_path_factory.mktemp("vision")
    summary = place / "summary.json"
    result = npmoe(*VISION, "--out", place / "run", "--json", summary, *TINY, "--steps", 30)
    assert result.code == 0, result
    return place / "run", result, json.loads(summary.read_text(encoding="utf-8"))


def test_the_run_folder_holds_everything(trained):
    from matplotlib import image

    folder, result, _ = trained
    names = {"config.json", "log.jsonl", "checkpoint.safetensors"}
    pictures = {"curves.png", "confusion.png", "patches.png"}
    assert {p.name for p in folder.iterdir()} == names | pictures
    for name in pictures:
        pixels = image.imread(folder / name)
        assert min(pixels.shape[:2]) > 250
        gray = pixels[..., :3].mean(axis=2)
        assert gray.std() > 0.02
        for half in np.array_split(gray, 2):
            for quarter in np.array_split(half, 2, axis=1):
                assert quarter.std() > 0.01, name
    records = read_log(folder / "log.jsonl")
    assert [r["step"] for r in records] == [10, 20, 30]
    assert "30/30" in result.err
    assert "Training on digits: 1 layers of 32, 4 experts, top-2, 30 steps of 256 p" in result.out


def test_the_summary_is_true(trained):
    folder, result, values = trained
    config, params, step = load_trained_vision(RunFolder(folder))
    assert values["steps"] == step == 30
    test = uci_digits().test
    images = normalize_images(test.images, config.channel_mean, config.channel_std)
    logits, _ = vision_forward(images, params, config.model, moe=config.model.moe.for_evaluation())
    right = int((logits.argmax(axis=1) == test.labels).sum())
    assert values["test_accuracy"] == right / 359
    assert f"test accuracy    {right / 359:.2%}" in result.out
    assert f"validation loss  {values['val_loss']:.4f} nats per image" in result.out
    assert "patches per second" in result.out
    assert "sample" not in result.out
    assert values["val_loss"] == read_log(folder / "log.jsonl")[-1]["val_loss"]
    names = {"val_loss", "train_loss", "tokens_per_second", "seconds", "steps", "drop_rate"}
    assert set(values) >= names | {"load_imbalance", "seed", "parameters"}


def test_the_default_run_is_on_the_digits(tmp_path, monkeypatch):
    begun = []

    def note(config, data, *_, **__):
        begun.append((config, data))
        raise CheckpointError("train: enough.")

    monkeypatch.setattr(train_command, "train", note)
    assert_one_message(npmoe(*VISION, "--out", tmp_path / "run"), "npmoe train: error: enough.")
    ((config, data),) = begun
    assert config == vision_recipe(uci_digits())
    assert data.sha256() == uci_digits().sha256()


def test_the_help_states_the_defaults_that_hold():
    out = " ".join(npmoe("train", "--help").out.split())
    config = vision_recipe(uci_digits())
    assert (
        f"With --task vision, --steps is {config.steps} by default, --layers "
        f"{config.model.num_layers} and --batch-size {config.batch_size}."
    ) in out
    for option, value in {
        "--experts E": config.model.moe.num_experts,
        "--top-k K": config.model.moe.top_k,
        "--hidden-size H": config.model.hidden_size,
        "--learning-rate R": config.schedule.learning_rate,
        "--patch-size P": config.model.patch_size,
    }.items():
        assert re.search(rf"{option} [^()]*\({re.escape(f'{value:g}')}[ )]", out), (option, value)


def run(tmp_path, *options, name="run"):
    summary = tmp_path / f"{name}.json"
    result = npmoe(*VISION, "--out", tmp_path / name, "--json", summary, *TINY, *options)
    assert result.code == 0, result
    return result, json.loads(summary.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("options", "words", "dropped"),
    [
        (["--routing", "batch_priority"], "4 experts, top-2", True),
        (["--routing", "expert_choice"], "4 experts, expert choice", False),
        (["--routing", "soft"], "4 experts, soft", False),
        (["--routing", "dense"], "4 experts, dense", False),
        (["--top-k", 1, "--capacity-factor", "1"], "4 experts, top-1", True),
        (["--dense"], "dense blocks", False),
    ],
)
def test_every_routing(tmp_path, quick, options, words, dropped):
    result, values = run(tmp_path, "--steps", 2, *options)
    assert words in result.out
    assert (values["drop_rate"] > 0) == dropped


def test_a_dense_run_has_no_patches_of_experts(tmp_path):
    run(tmp_path, "--steps", 1, "--dense")
    pictures = {p.name for p in (tmp_path / "run").glob("*.png")}
    assert pictures == {"curves.png", "confusion.png"}


def test_router_options_reach_the_run(tmp_path, quick):
    options = ["--balance", "bias", "--router-noise", "0.5", "--router-lr-factor", "0.1"]
    run(tmp_path, "--steps", 4, "--freeze", "experts", "--patch-size", 4, *options)
    config = load_trained_vision(RunFolder(tmp_path / "run"))[0]
    assert config.model.moe.selection_bias
    assert (config.schedule.router_noise_std, config.schedule.router_noise_steps) == (0.5, 2)
    assert config.optimizer.router_lr_factor == 0.1
    assert config.optimizer.frozen == ("*.feed_forward.gate_up_*", "*.feed_forward.down_*")
    assert config.model.patch_size == 4


def test_resuming(tmp_path, quick):
    folder = tmp_path / "run"
    run(tmp_path, "--steps", 4)
    before = contents(folder)
    for task in ([], ["--task", "vision"]):
        result = npmoe("train", "--resume", "--out", folder, *task)
        assert result.code == 0, result
        assert (folder / "checkpoint.safetensors").read_bytes() == before["checkpoint.safetensors"]
    assert_one_message(
        npmoe("train", "--resume", "--out", folder, "--task", "text"),
        f"--task must be that of the run in {folder}, vision, got text. Leave it out",
    )
    for option in (["--routing", "soft"], ["--patch-size", 2], ["--balance", "none"]):
        result = npmoe("train", "--resume", "--out", folder, *option)
        assert_one_message(result, f"{option[0]} must not be given with --resume", "keeps the")
    result = npmoe("train", "--resume", "--out", folder, "--text", "x.txt")
    assert_one_message(result, "--text must not be given with --task vision, got x.txt. It bel")
    assert contents(folder).keys() == before.keys()


def test_a_budget_of_seconds(tmp_path, quick):
    assert run(tmp_path, "--seconds", "1e-9")[1]["steps"] == 1


def test_images_of_a_folder(tmp_path, quick):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count in (("data_batch_1.bin", 20), ("test_batch.bin", 5)):
        records = rng.integers(0, 10, (count, 3073), dtype=np.uint8)
        (folder / name).write_bytes(records.tobytes())
    result, values = run(tmp_path, "--images", folder, "--steps", 1)
    assert f"Training on {folder}: " in result.out
    assert "1 steps of 1,024 patches" in result.out
    assert values["test_accuracy"] in {n / 5 for n in range(6)}
    assert npmoe("train", "--resume", "--out", tmp_path / "run").code == 0
    (folder / "test_batch.bin").write_bytes(bytes(3072))
    result = npmoe("train", "--resume", "--out", tmp_path / "run")
    assert_one_message(result, "test_batch.bin must hold whole records of 3,073 bytes, got 3,072")
    (folder / "test_batch.bin").write_bytes(bytes(3073))
    result = npmoe("train", "--resume", "--out", tmp_path / "run")
    assert_one_message(result, "images must be the ones the run began with", str(folder))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--patch-size", 3], ["patch_size must divide image_size = 8, got 3"]),
        (["--patch-size", 0], ["--patch-size must be at least 1, got 0"]),
        (["--images", "nowhere"], ["folder must be a folder that can be read, got nowhere"]),
        (["--images", "."], ["must hold train-images-idx3-ubyte (MNIST, also .gz) or"]),
        (["--text", "x"], ["--text must not be given with --task vision, got x", "--task text"]),
        (["--context-length", 9], ["--context-length must not be given with --task vision"]),
        (["--routing", "soft", "--capacity-factor", "1"], ["capacity_factor must be None with"]),
        (["--dense", "--freeze", "router"], ["--freeze must not be given with --dense", "routes"]),
        (["--dense", "--balance", "bias"], ["--balance must not be given with --dense, got both"]),
        (["--router-noise", "-1"], ["--router-noise must be finite and not negative, got -1.0"]),
        (["--router-lr-factor", "nan"], ["--router-lr-factor must be finite and not negative"]),
        (
            ["--routing", "soft", "--router-noise", "1"],
            ["must stay 0 with model.moe.routi"],
        ),
    ],
)
def test_bad_options(tmp_path, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    result = npmoe(*VISION, *TINY, *options)
    assert_one_message(result, "npmoe train: error: ", *parts)
    assert result.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--routing", "soft"], ["--images", "."], ["--patch-size", 2]])
def test_options_of_images_without_the_task(tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    result = npmoe("train", *options)
    assert_one_message(
        result, f"{options[0]} must not be given with --task text, got {options[1]}."
    )


def test_a_vision_run_does_not_write_text(trained):
    result = npmoe("generate", trained[0])
    assert_one_message(result, "must hold a run of task 'text', got 'vision'")


def test_a_text_run_balanced_by_a_bias(tmp_path, text_file, quick):
    options = ["--text", text_file, "--out", tmp_path / "run", *TEXT_TINY, "--steps", 1]
    assert npmoe("train", *options, "--balance", "bias").code == 0
    (record,) = read_log(tmp_path / "run" / "log.jsonl")
    assert record["auxiliary"] == 0.0
    assert record["selection_bias_range"][0][1] == pytest.approx(0.001, rel=1e-6)
