"""Training the vision model: bits, resuming, evaluation, the recipe."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from npmoe.errors import CheckpointError, RangeError
from npmoe.models import init_vision_params, vision_forward
from npmoe.stats import max_violation
from npmoe.testing.bounds import gamma
from npmoe.training import (
    ImageData,
    LabelledImages,
    RunFolder,
    Trainer,
    VisionTrainConfig,
    image_batch,
    load_checkpoint,
    load_trained,
    load_trained_vision,
    prepare_data,
    read_config,
    read_log,
    save_checkpoint,
    steps_for_seconds,
    train,
    uci_digits,
    vision_recipe,
    with_options,
)
from npmoe.training.evaluate_images import STRONGEST, evaluate_image_batch
from npmoe.training.images import normalize_images
from npmoe.training.loop import single_threaded_blas
from npmoe.training.vision_recipe import ROUTINGS

pytest.importorskip("safetensors")
pytest.importorskip("threadpoolctl")

DIGITS = uci_digits()


def stripes(count, seed):
    """Images of bright rows at one of three heights: learnt within a few steps."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = rng.integers(0, 60, (count, 8, 8, 1), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[3 * label : 3 * label + 2] += 150
    return LabelledImages(images=images, labels=labels, num_classes=3)


DATA = ImageData(train=stripes(40, 0), test=stripes(13, 1), source="stripes")
TINY = {"hidden_size": 32, "num_layers": 1, "batch_size": 8, "num_experts": 4, "steps": 14}


def make_config(**options):
    """Return a tiny run with everything random switched on."""
    config = vision_recipe(DATA, **{**TINY, **options})
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dropout=0.1),
        checkpoint_every=3,
        log_every=2,
        eval_every=5,
    )
    noisy = config.model.moe is not None and config.model.moe.routing != "soft"
    return with_options(config, router_noise=0.3) if noisy else config


def contents(folder):
    records = read_log(folder.log)
    for record in records:
        assert record.pop("tokens_per_second") > 0
    return folder.checkpoint.read_bytes(), records, folder.config.read_bytes()


class StopAt:
    def __init__(self, count):
        self.left = count

    def __call__(self):
        self.left -= 1
        return self.left == 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = RunFolder.create(tmp_path_factory.mktemp("undisturbed"))
    return train(make_config(), DATA, folder), folder


@pytest.mark.parametrize("stops", [(1,), (2, 3), (5, 13)])
def test_a_stopped_run_continues_bitwise_whatever_the_workers(undisturbed, tmp_path, stops):
    folder = RunFolder.create(tmp_path / "run")
    for number, stop in enumerate(stops):
        result = train(
            make_config(),
            DATA,
            folder,
            workers=1 + number % 2,
            should_stop=StopAt(stop - (stops[number - 1] if number else 0)),
        )
        assert result.step == stop
        assert result.evaluation is None
    result = train(read_config(folder), DATA, folder, workers=2)
    assert np.array_equal(result.evaluation.confusion, undisturbed[0].evaluation.confusion)
    assert contents(folder) == contents(undisturbed[1])


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_trains_and_continues_bitwise(tmp_path, routing):
    config = make_config(routing=routing)
    one, two = (RunFolder.create(tmp_path / name) for name in ("one", "two"))
    first = train(config, DATA, one)
    train(config, DATA, two, workers=2, should_stop=StopAt(4))
    train(read_config(two), DATA, two, workers=2)
    assert contents(one) == contents(two)
    losses = [r["cross_entropy"] for r in read_log(one.log)]
    assert losses[-1] < 0.9 * losses[0]
    dropping = routing == "batch_priority"
    assert (first.evaluation.drop_rate > 0) == dropping
    assert read_log(one.log)[-1]["val_accuracy"] == first.evaluation.accuracy


def test_a_dense_run_and_a_balanced_one(tmp_path):
    dense = train(make_config(dense=True), DATA, RunFolder.create(tmp_path / "dense"))
    assert dense.evaluation.served.shape == (0, 16, 0)
    assert dense.evaluation.strongest.shape == (0, 0, 16, 2)
    config = with_options(make_config(), balance="bias")
    train(config, DATA, RunFolder.create(tmp_path / "bias"))
    assert read_log(tmp_path / "bias" / "log.jsonl")[-1]["selection_bias_range"][0][1] > 0


def test_a_step_trains_on_the_batch_of_its_number():
    config = make_config()
    plain = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    plain = with_options(plain)
    with single_threaded_blas():
        run = Trainer(plain, DATA.train)
        run.step()
        params = run.flat_params.copy()
        pixels, labels = image_batch(DATA.train, 8, plain.seed, 1, max_shift=plain.max_shift)
        inputs = normalize_images(pixels, plain.channel_mean, plain.channel_std)
        losses = []
        for part in (slice(0, None, 2), slice(1, None, 2)):
            logits, _ = vision_forward(inputs[part], run.params, plain.model)
            for row, label in zip(logits.astype("f8"), labels[part], strict=True):
                losses.append(np.log(np.exp(row).sum()) - row[label])
        report = run.step()
        run.close()
    assert abs(report.cross_entropy - np.mean(losses)) <= gamma(40, "float32") * max(losses)
    assert not np.array_equal(params, run.flat_params)
    assert report.tokens_per_expert.sum() == 8 * 16 * 2


# --- evaluation


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_evaluation_counts_what_the_model_did(routing):
    cfg = make_config(routing=routing).model
    params = init_vision_params(cfg, 3)
    inputs = normalize_images(DATA.test.images, (80.0,), (60.0,))
    found = evaluate_image_batch(params, cfg, inputs, DATA.test.labels, first=100)
    moe = cfg.moe.for_evaluation()
    logits, saved = vision_forward(inputs, params, cfg, moe=moe)
    confusion = np.zeros((3, 3), int)
    nats = 0.0
    for row, label in zip(logits.astype("f8"), DATA.test.labels, strict=True):
        confusion[label, row.argmax()] += 1
        nats += np.log(np.exp(row).sum()) - row[label]
    assert found.confusion.tolist() == confusion.tolist()
    assert abs(found.nats - nats) <= gamma(40, "float32") * nats
    layer = saved.blocks[0].moe
    served, weights = np.zeros((16, 4), int), np.zeros((16, 4))
    strongest = [[] for _ in range(4)]
    for token in range(13 * 16):
        given = np.zeros(4, np.float32)
        if routing == "soft":
            slots = layer.soft.assignments.combine.reshape(13 * 16, 4, -1)
            given = slots[token].sum(axis=1)
        else:
            for expert, weight in zip(
                layer.routing.topk_ids[token], layer.routing.topk_weights[token], strict=True
            ):
                if expert >= 0:
                    served[token % 16, expert] += 1
                    given[expert] = weight
        weights[token % 16] += given
        for expert in range(4):
            strongest[expert].append((-given[expert], 100 + token // 16, token % 16))
    assert found.served[0].tolist() == served.tolist()
    bound = gamma(16, "float32") * weights.max()
    assert np.abs(found.weights[0] - weights).max() <= bound
    for expert in range(4):
        best = sorted(strongest[expert])[:STRONGEST]
        assert found.strongest[0, expert].tolist() == [[i, p] for _, i, p in best]
        assert found.strongest_weights[0, expert].tolist() == [-w for w, _, _ in best]


def test_batches_of_an_evaluation_make_the_whole():
    """The digits are tested in six batches; groups are images, so that one batch gives the same."""
    config = vision_recipe(DIGITS, **{**TINY, "num_experts": 8, "routing": "batch_priority"})
    with single_threaded_blas():
        run = Trainer(config, DIGITS.train, workers=2)
        found = run.evaluate(DIGITS.test)
        inputs = normalize_images(DIGITS.test.images, config.channel_mean, config.channel_std)
        whole = evaluate_image_batch(run.params, config.model, inputs, DIGITS.test.labels)
        run.close()
    assert np.array_equal(found.confusion, whole.confusion)
    assert found.confusion.sum() == 359
    assert found.accuracy == np.trace(found.confusion) / 359
    assert np.array_equal(found.served, whole.served)
    assert found.dropped == whole.dropped > 0
    assert abs(found.loss - whole.nats / 359) <= gamma(100, "float32") * found.loss
    places = set(map(tuple, found.strongest[0, 0].tolist()))
    assert len(places & set(map(tuple, whole.strongest[0, 0].tolist()))) >= STRONGEST - 1
    want = np.mean([max_violation(c) for c in found.served.sum(axis=1)])
    assert found.load_imbalance == want
    assert found.drop_rate == found.dropped / found.served.sum()


def test_an_expert_with_few_patches_shows_no_others():
    cfg = make_config().model
    params = init_vision_params(cfg)
    params.blocks[0].feed_forward.router_weight[...] = 0  # ties: the first two experts take all
    inputs = normalize_images(DATA.test.images, (80.0,), (60.0,))
    with single_threaded_blas():
        run = Trainer(make_config(), DATA.train, initial=params)
        found = run.evaluate(DATA.test)
        run.close()
    assert found.served.sum(axis=1).tolist() == [[208, 208, 0, 0]]
    assert (found.strongest[0, 2:] == -1).all()
    assert (found.strongest[0, :2] >= 0).all()
    assert len(inputs) == 13


# --- recipe and config


def test_the_default_run():
    config = vision_recipe(DIGITS)
    model = config.model
    assert (model.image_size, model.patch_size, model.channels, model.num_classes) == (8, 2, 1, 10)
    assert (model.moe.num_experts, model.moe.top_k, model.num_moe_layers) == (8, 2, 3)
    assert config.max_shift == 1
    assert config.tokens_per_step == config.batch_size * 16
    dense = vision_recipe(DIGITS, dense=True)
    assert dense.model == model.dense_variant()
    assert (dense.schedule, dense.channel_mean) == (config.schedule, config.channel_mean)


@pytest.mark.parametrize(
    ("side", "size"), [(8, 2), (28, 4), (32, 4), (5, 1), (6, 1), (3, 1), (16, 4)]
)
def test_patches_of_every_side(side, size):
    images = np.zeros((4, side, side, 3), np.uint8)
    part = LabelledImages(images=images, labels=np.arange(4), num_classes=4)
    config = vision_recipe(ImageData(train=part, test=part, source="x"), **TINY)
    assert config.model.patch_size == size
    assert config.channel_std == (1.0, 1.0, 1.0)


def test_slots_are_as_many_as_choices():
    for top_k, experts in ((1, 8), (2, 8), (2, 3)):
        moe = vision_recipe(DIGITS, routing="soft", top_k=top_k, num_experts=experts).model.moe
        assert (moe.expert_capacity - 1) * experts < 16 * top_k <= moe.expert_capacity * experts


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"routing": "best"}, "vision_recipe: routing must be one of 'top_k', .*, got 'best'"),
        (
            {"routing": "soft", "capacity_factor": "1"},
            "vision_recipe: capacity_factor must be None with routing='soft', got '1'. Nothing is",
        ),
        (
            {"routing": "dense", "capacity_factor": "1"},
            "vision_recipe: capacity_factor must be None",
        ),
        ({"patch_size": 3}, "VisionConfig: patch_size must divide image_size = 8, got 3"),
    ],
)
def test_wrong_options_of_the_recipe(options, words):
    with pytest.raises(RangeError, match=f"^{words}"):
        vision_recipe(DIGITS, **options)


def test_top_one_keeps_a_router_that_learns():
    moe = vision_recipe(DIGITS, top_k=1, capacity_factor="1.25").model.moe
    assert not moe.constant_weights
    assert moe.capacity_scope == "sequence"


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_config_survives_its_document(routing):
    config = make_config(routing=routing)
    assert VisionTrainConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_shift": 8}, r"max_shift must be an integer in 0\.\.7, got 8"),
        ({"max_shift": -1}, r"max_shift must be an integer in 0\.\.7, got -1"),
        ({"channel_mean": (1.0, 2.0)}, "channel_mean must hold one finite number for each of 1 ch"),
        ({"channel_mean": (float("nan"),)}, "channel_mean must hold one finite number"),
        ({"channel_std": (0.0,)}, "channel_std must hold .*, above 0 for channel_std, got"),
        ({"batch_size": 3}, "batch_size must be a multiple of micro_batches = 2, got 3"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(change, words):
    with pytest.raises(RangeError, match=f"^VisionTrainConfig: {words}"):
        dataclasses.replace(make_config(), **change)


def test_soft_layers_have_no_router_to_disturb():
    with pytest.raises(RangeError) as caught:
        with_options(make_config(routing="soft"), router_noise=0.1)
    assert str(caught.value) == (
        "VisionTrainConfig: schedule.router_noise_std must stay 0 with model.moe.routing='soft', "
        "got 0.1. A soft layer has no router to disturb."
    )


# --- refused, with everything kept


def test_other_images_are_refused(tmp_path):
    folder = RunFolder.create(tmp_path)
    train(make_config(), DATA, folder, should_stop=StopAt(3))
    before = contents(folder)
    other = ImageData(train=stripes(40, 2), test=DATA.test, source="stripes")
    with pytest.raises(
        CheckpointError,
        match=r"^train: images must be the ones the run began with \(stripes\), got others\. Give "
        r"the same images, or start a new run\.$",
    ):
        train(make_config(), other, folder)
    assert contents(folder) == before
    with pytest.raises(
        RangeError, match=r"^train: data must be ImageData with a VisionTrainConfig"
    ):
        prepare_data(make_config(), "text")


def test_the_checkpoint_of_another_architecture_is_refused(tmp_path):
    folder, other = (RunFolder.create(tmp_path / name) for name in ("one", "other"))
    train(make_config(), DATA, folder, should_stop=lambda: True)
    train(make_config(num_layers=2), DATA, other, should_stop=lambda: True)
    folder.checkpoint.write_bytes(other.checkpoint.read_bytes())
    message = r"must hold .* of shape .*, got .*It belongs to another config\.json\."
    with pytest.raises(CheckpointError, match=message):
        train(make_config(), DATA, folder)
    with pytest.raises(CheckpointError, match=message):
        load_trained_vision(folder)
    with pytest.raises(
        CheckpointError,
        match=r"^load_trained: .* must hold a run of task 'text', got 'vision'\. It holds another",
    ):
        load_trained(folder)


def test_the_trained_model_is_that_of_the_checkpoint(undisturbed):
    result, folder = undisturbed
    config, params, step = load_trained_vision(folder)
    assert (config, step) == (make_config(), 14)
    assert np.array_equal(params.head, result.params.head)
    arrays, metadata = load_checkpoint(folder.checkpoint)
    assert np.array_equal(arrays["params.patch_proj"], params.patch_proj)
    with pytest.raises(CheckpointError, match="could not be written"):
        save_checkpoint(folder.path / "no" / "x.safetensors", arrays, metadata)


def test_a_budget_of_seconds():
    assert steps_for_seconds(make_config(), DATA, 1e-9) == 1
    assert steps_for_seconds(make_config(), DATA, 60.0) > 20
