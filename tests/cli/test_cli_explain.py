"""``npmoe explain``: a published design with random numbers, or a layer of a trained model."""

from __future__ import annotations

import json

import pytest
from conftest import TINY, assert_one_message, npmoe

from npmoe.models import language_forward
from npmoe.training import CharVocabulary, RunFolder
from npmoe.training.loop import load_trained

OPTIONS = "--preset deepseek_v3 --num-experts 16 --top-k 4 --num-groups 4 --topk-group 2"
DEEPSEEK = OPTIONS.split()


def text(*arguments):
    result = npmoe("explain", *arguments)
    assert (result.code, result.err) == (0, ""), result
    return result.out


def test_a_preset(tmp_path):
    path = tmp_path / "explanation.json"
    out = text(*DEEPSEEK, "--token", 3, "--json", path)
    assert out.startswith(
        "preset deepseek_v3, H=64: random hidden states, parameters and selection"
    )
    assert "token 3 of 32 (sequence 0, position 3)" in out
    assert "group   3" in out
    assert "x 2.5" in out
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["token"] == 3
    assert len(values["choices"]) == 4
    assert sum(c["weight"] for c in values["choices"]) == pytest.approx(2.5, rel=1e-6)
    for choice in values["choices"]:
        assert f"{choice['raw']:.4f}" in out
    assert values["cfg"]["num_groups"] == 4


def test_the_same_seed_gives_the_same_text():
    one = text(*DEEPSEEK, "--seed", 1)
    assert "token 31 of 32" in one
    assert text(*DEEPSEEK, "--seed", 1) == one
    assert text(*DEEPSEEK, "--seed", 2) != one
    noisy = ["--preset", "v_moe", "--num-experts", 8]
    assert "noise" in text(*noisy)
    assert text(*noisy) == text(*noisy)


def test_other_options():
    assert "token 7 of 8 " in text("--tokens", 8)
    out = text("--tokens", 8, "--hidden-size", 32, "--set", "capacity_factor=0.5", "--token", 2)
    assert out.startswith("preset mixtral, H=32")
    assert "capacity: 1 row per expert" in out
    assert "selection bias" not in text("--set", "renormalize=False")
    out = text("--set", "routing=hash", "--set", "renormalize=true", "--block-size", 1)
    assert "random table of ids" in out
    assert "given by topk_ids" in out
    assert "blocks of 1 rows" in out
    assert "... and 6 more experts" in text("--max-experts", 2)
    assert text("--backend", "reference", *DEEPSEEK) == text(*DEEPSEEK)


@pytest.mark.parametrize("preset", ["gshard", "soft_moe", "expert_choice", "v_moe", "switch"])
def test_kinds_of_routing(preset):
    assert "token 31 of 32" in text("--preset", preset, "--num-experts", 8)


def test_pictures(tmp_path):
    folder = tmp_path / "a" / "b"
    text("--plot", folder, "--set", "capacity_factor=0.5", "--tokens", 8)
    assert sorted(p.name for p in folder.iterdir()) == ["drops.png", "load.png", "routing.png"]
    text("--plot", tmp_path / "c", "--tokens", 8)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["load.png", "routing.png"]
    text("--plot", tmp_path / "d", "--preset", "soft_moe", "--num-experts", 4, "--tokens", 8)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["routing.png"]
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = npmoe("explain", "--plot", tmp_path / "file")
    assert_one_message(result, "npmoe explain: error: --plot: ", "could not be made: File exists")


def test_a_trained_model(finished, tmp_path):
    folder, path = finished[0], tmp_path / "explanation.json"
    out = text("--run", folder, "--text", "the quick", "--token", 4, "--json", path)
    assert out.startswith(f"run {folder}, step 12, layer 0, reading 'the quick'; token 4 is 'q'")
    assert "token 4 of 9 (sequence 0, position 4)" in out
    assert "token 8 is 'k'" in text("--run", folder, "--text", "the quick", "--layer", 0)
    # The numbers are those of this layer when the whole model reads the text.
    values = json.loads(path.read_text(encoding="utf-8"))
    config, params, _ = load_trained(RunFolder(folder))
    evaluation = config.model.moe.for_evaluation()
    ids = CharVocabulary(config.characters).encode("the quick")
    _, saved = language_forward(ids[None], params, config.model, moe=evaluation)
    routing = saved.blocks[0].moe.routing
    assert values["cfg"] == evaluation.to_dict()
    assert values["router_logits"] == routing.router_logits[4].tolist()
    assert [c["expert"] for c in values["choices"]] == routing.topk_ids[4].tolist()
    assert len({str(row) for row in routing.topk_ids.tolist()}) > 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--preset", "mixtrall"], ["must be a known preset, got 'mixtrall'. Did you mean 'mi"]),
        (["--token", "32"], ["token must be an integer in 0..31, got 32"]),
        (["--tokens", "0"], ["--tokens must be at least 1, got 0."]),
        (["--seed", "-1"], ["--seed must not be negative, got -1."]),
        (["--max-experts", "0"], ["--max-experts must be at least 1, got 0."]),
        (["--block-size", "0"], ["block_size must be an integer of at least 1, got 0."]),
        (["--num-experts", "0"], ["num_experts must be an integer of at least 1, got 0."]),
        (["--set", "top_k"], ["--set must be FIELD=VALUE, got 'top_k'."]),
        (["--set", "top_kk=2"], ["must be fields of MoEConfig, got top_kk."]),
        (["--set", "score_fn=relu"], ["score_fn must be one of", "got 'relu'"]),
        (["--text", "abc"], ["--text must come with --run, got abc."]),
        (["--layer", "1"], ["--layer must come with --run, got 1."]),
        (["--backend", "loopback"], ["host arrays, got 'loopback'"]),
        (["--json", "missing/file"], ["--json must name a file that can be written"]),
        (["--run", "no", "--text", "a"], ["config.json", "No such file"]),
        (["--run", "no"], ["--text must hold what the model reads, got none."]),
        (["--run", "no", "--preset", "mixtral"], ["--preset must not be given with --run, got mi"]),
        (["--run", "no", "--top-k", "2"], ["--top-k must not be given with --run, got 2."]),
        (["--run", "no", "--set", "a=1"], ["--set must not be given with --run, got ['a=1']."]),
    ],
)
def test_bad_options(options, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = npmoe("explain", *options)
    assert_one_message(result, "npmoe explain: error: ", *parts)
    assert result.out == ""


def test_bad_options_of_a_trained_model(finished):
    for options, part in (
        (["--layer", "1"], "--layer must be one of 0, got 1."),
        (["--token", "3"], "token must be an integer in 0..2, got 3."),
    ):
        result = npmoe("explain", "--run", finished[0], "--text", "the", *options)
        assert_one_message(result, "npmoe explain: error: ", part)
    result = npmoe("explain", "--run", finished[0], "--text", "é")
    assert_one_message(result, "known characters", "'é' (U+00E9) at position 0")
    result = npmoe("explain", "--run", finished[0], "--text", "the " * 5)
    assert_one_message(result, "at most context_length = 16 columns, got 20")


def test_a_layer_is_that_layer_with_the_capacity_of_evaluation(tmp_path, text_file, quick):
    folder, path = tmp_path / "run", tmp_path / "explanation.json"
    options = [*TINY, "--layers", 2, "--steps", 1, "--capacity-factor", "1", "--out", folder]
    assert npmoe("train", "--text", text_file, *options).code == 0
    config, params, _ = load_trained(RunFolder(folder))
    evaluation = config.model.moe.for_evaluation()
    ids = CharVocabulary(config.characters).encode("lazy dogs")
    _, saved = language_forward(ids[None], params, config.model, moe=evaluation)
    logits = [block.moe.routing.router_logits[8].tolist() for block in saved.blocks]
    for layer in (0, 1):
        out = text("--run", folder, "--text", "lazy dogs", "--layer", layer, "--json", path)
        assert f"layer {layer}, reading" in out
        values = json.loads(path.read_text(encoding="utf-8"))
        assert values["router_logits"] == logits[layer]
        assert values["cfg"] == evaluation.to_dict()
    assert logits[0] != logits[1]


def test_a_model_without_experts(tmp_path, text_file, quick):
    options = [*TINY, "--steps", 1, "--dense", "--out", tmp_path / "run"]
    assert npmoe("train", "--text", text_file, *options).code == 0
    result = npmoe("explain", "--run", tmp_path / "run", "--text", "the")
    assert_one_message(result, "--run must name a model with experts, got ")
