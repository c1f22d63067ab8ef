"""Configs of runs, and their documents."""

from __future__ import annotations

import json

import pytest
from trainer_runs import IDS, make_config

from npmoe.errors import CheckpointError, RangeError
from npmoe.training import (
    TrainConfig,
    Trainer,
    split_text,
    tasks,
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an integer of at least 1, got 2.0"),
        ({"eval_every": -1}, "eval_every must be an integer of at least 1, got -1"),
        ({"seed": -1}, "seed must be an integer and not negative, got -1"),
        ({"seed": "0"}, "seed must be an integer and not negative, got '0'"),
        ({"micro_batches": 3}, "batch_size must be a multiple of micro_batches = 3, got 8"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(change, words):
    with pytest.raises(RangeError, match=f"^TrainConfig: {words}"):
        make_config(**change)


def test_a_config_and_data_of_different_tasks():
    with pytest.raises(RangeError, match=r"^train: config must be a TrainConfig or VisionTrainC"):
        Trainer(None, IDS)
    with pytest.raises(RangeError, match=r"^train: data must be a str with a TrainConfig, got nda"):
        tasks.prepare_data(make_config(), IDS)


def test_a_document_without_a_task_is_one_of_text():
    """As it was written before there were two."""
    config = make_config(plain=True)
    values = json.loads(config.to_json())
    assert values.pop("task") == "text"
    for name in ("selection_bias_rate",):
        del values[name]
    del values["model"]["moe_last"], values["optimizer"]["frozen"]
    assert TrainConfig.from_json(json.dumps(values)) == config
    values["task"] = "vision"
    with pytest.raises(
        CheckpointError,
        match=r"^TrainConfig\.from_json: FILE must be the config\.json of a run of task 'text', "
        r"got 'vision'\. It holds another kind of model\.$",
    ):
        TrainConfig.from_json(json.dumps(values), "FILE")


@pytest.mark.parametrize("dense", [False, True])
def test_a_config_survives_its_document(dense):
    config = make_config(dense=dense, capacity=None if dense else "1.1", seed=3, log_every=7)
    again = TrainConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s[:100],
        lambda s: "",
        lambda s: "[1]",
        lambda s: s.replace("npmoe-run-1", "npmoe-run-9"),
        lambda s: s.replace('"batch_size": 8', '"batch_size": "8"'),
        lambda s: s.replace('"batch_size": 8', '"batch_size": 0'),
        lambda s: s.replace('"batch_size": 8', '"size_of_batch": 8'),
        lambda s: s.replace('"hidden_size"', '"hiden_size"'),
        lambda s: s.replace('"beta1": 0.9', '"beta1": "x"'),
        lambda s: s.replace('"steps": 40', '"steps": null'),
    ],
)
def test_a_damaged_config_is_refused_with_its_name(damage):
    text = make_config().to_json()
    assert damage(text) != text
    with pytest.raises(
        CheckpointError, match=r"^TrainConfig.from_json: FILE must be .*config\.json"
    ):
        TrainConfig.from_json(damage(text), "FILE")


def test_tokens_per_step():
    assert make_config().tokens_per_step == 64
    assert make_config().steps == 40
    assert len(split_text(IDS, 8)[1]) == 90
