"""One training step: workers, micro-batches, what it depends on, and what it reports."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from npmoe.config import MoEConfig
from npmoe.errors import CheckpointError, RangeError, ShapeError, UnsupportedError
from npmoe.models import LanguageConfig, init_language_params, language_forward
from npmoe.stats import max_violation
from npmoe.testing.bounds import assert_within, gamma
from npmoe.training import (
    AdamWConfig,
    CharVocabulary,
    ScheduleConfig,
    TrainConfig,
    Trainer,
    batch,
    evaluate,
    split_text,
    tasks,
)
from npmoe.training.config import text_sha256
from npmoe.training.loop import single_threaded_blas
from npmoe.tree import named_arrays

TEXT = "".join(np.random.default_rng(0).choice(list("abcdefg .\n"), 900))
IDS = CharVocabulary.from_text(TEXT).encode(TEXT)


def make_config(*, dense=False, plain=False, capacity=None, **options):
    """Return a tiny config; `plain` leaves out what differs between micro-batches."""
    moe = MoEConfig(
        hidden_size=16,
        intermediate_size=12,
        num_experts=4,
        top_k=2,
        renormalize=True,
        capacity_factor=capacity,
    )
    model = LanguageConfig(
        vocab_size=10,
        context_length=8,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        moe=moe,
        dropout=0.0 if plain else 0.1,
        load_balancing_coefficient=0.0 if plain else 0.01,
        z_loss_coefficient=0.0 if plain else 0.001,
    )
    noisy = not (dense or plain)
    return TrainConfig(
        model=model.dense_variant() if dense else model,
        optimizer=options.pop("optimizer", AdamWConfig()),
        schedule=ScheduleConfig(
            steps=40,
            learning_rate=1e-2,
            warmup_steps=4,
            router_noise_std=0.3 if noisy else 0.0,
            router_noise_steps=20 if noisy else 0,
        ),
        characters="".join(sorted(set(TEXT))),
        text_source="test",
        text_sha256=text_sha256(TEXT),
        **{"batch_size": 8, **options},
    )


def made(config, steps, *, workers=1, backend=None):
    with single_threaded_blas():
        run = Trainer(config, IDS, workers=workers, backend=backend)
        reports = [run.step() for _ in range(steps)]
        run.close()
    return run, reports


def copied(run):
    return {name: array.copy() for name, array in run.state().items()}


def assert_same_bits(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        assert one[name].tobytes() == two[name].tobytes(), name


@pytest.mark.parametrize("dense", [False, True])
def test_workers_change_no_bit(dense):
    config = make_config(dense=dense, micro_batches=4, capacity=None if dense else "0.8")
    states, reports = [], []
    for workers in (1, 2, 4):
        run, report = made(config, 5, workers=workers)
        states.append(run.state())
        reports.append([dataclasses.asdict(r) for r in report])
    assert_same_bits(states[0], states[1])
    assert_same_bits(states[0], states[2])
    assert repr(reports[0]) == repr(reports[1]) == repr(reports[2])


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
@pytest.mark.parametrize("dense", [False, True])
def test_micro_batches_average_to_the_gradient_of_the_batch(monkeypatch, micro_batches, dense):
    """The first moment after one step is 0.1 times the gradient; in float64, to see it well."""

    def wide(cfg, seed):
        return init_language_params(cfg, seed, "float64")

    monkeypatch.setattr(tasks, "init_language_params", wide)
    moments, losses = [], []
    for parts in (1, micro_batches):
        config = make_config(
            plain=True,
            dense=dense,
            micro_batches=parts,
            optimizer=AdamWConfig(grad_clip=None, beta1=0.5),
        )
        run, (report,) = made(config, 1)
        moments.append(run.state()["optimizer.m"].copy())
        losses.append(report.cross_entropy)
    assert moments[0].dtype == np.float64
    # Sums over 64 positions behind some 400 roundings; other partial sums, and nothing else.
    bound = gamma(64 + 400, "float64")
    assert_within(moments[1], moments[0], bound * np.abs(moments[0]).max(), "gradient")
    assert abs(losses[1] - losses[0]) <= bound * losses[0]


def test_a_step_is_a_function_of_the_state_and_the_step_number():
    config = make_config(capacity="0.8")
    run, _ = made(config, 3)
    state = copied(run)
    with single_threaded_blas():
        after = [run.step() for _ in range(3)]
        other, _ = made(config, 7)  # has been elsewhere
        other = Trainer(config, IDS, workers=2)
        np.random.default_rng(1).random(3)
        other.load_state(state, 3)
        again = [other.step() for _ in range(3)]
        other.close()
    assert repr(after) == repr(again)
    assert [r.step for r in after] == [3, 4, 5]
    assert_same_bits(run.state(), other.state())
    wrong = Trainer(config, IDS)
    wrong.load_state(state, 4)
    wrong.step()
    assert repr(wrong.step()) != repr(after[1])
    wrong.close()


def test_loading_copies():
    run, _ = made(make_config(), 2)
    state = copied(run)
    before = {name: array.copy() for name, array in state.items()}
    run.load_state(state, 2)
    made_again = Trainer(make_config(), IDS)
    made_again.load_state(state, 2)
    made_again.step()
    made_again.close()
    assert_same_bits(state, before)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("what", ["logits", "gradients"])
def test_a_step_that_is_not_finite_changes_nothing(monkeypatch, what, workers):
    run, _ = made(make_config(), 2)
    run = Trainer(make_config(), IDS, workers=workers)
    with single_threaded_blas():
        run.step()
        if what == "logits":
            run.params.blocks[0].feed_forward.router_weight[0, 0] = np.nan
        else:
            real = tasks.language_loss

            def spoilt(*args, **kwargs):
                result = real(*args, **kwargs)
                result.grads.embedding[3, 3] = np.nan
                return result

            monkeypatch.setattr(tasks, "language_loss", spoilt)
        before, number = copied(run), run.step_number
        with pytest.raises(RangeError, match=r"finite|NaN"):
            run.step()
        run.close()
    assert run.step_number == number == 1
    assert run.optimizer.state().t == 1
    assert_same_bits(run.state(), before)


def test_the_report_counts_what_the_model_did():
    config = make_config(plain=True, capacity="0.6", micro_batches=2)
    with single_threaded_blas():
        run = Trainer(config, IDS)
        run.step()
        params = run.params
        inputs, _ = batch(IDS, 8, 8, config.seed, 1)
        counts, dropped = np.zeros((2, 4), int), 0
        for part in (inputs[0::2], inputs[1::2]):
            _, saved = language_forward(part, params, config.model)
            for layer, block in enumerate(saved.blocks):
                for expert in block.moe.routing.topk_ids.ravel():
                    counts[layer, expert] += 1
                dropped += int((block.moe.plan.row_ids < 0).sum())
        report = run.step()
        run.close()
    assert report.tokens_per_expert.tolist() == counts.tolist()
    assert counts.sum(axis=1).tolist() == [8 * 8 * 2] * 2
    assert dropped > 0
    assert report.drop_rate == dropped / (2 * 8 * 8 * 2)
    violations = [c.max() / c.mean() - 1 for c in counts]
    assert abs(report.load_imbalance - np.mean(violations)) <= gamma(4, "float64") * 4
    assert report.auxiliary == 0.0
    assert report.learning_rate == 1e-2 * 2 / 4


def test_a_dense_model_has_no_experts_to_report():
    run, reports = made(make_config(dense=True), 3)
    assert [r.tokens_per_expert.shape[0] for r in reports] == [0, 0, 0]
    assert [(r.load_imbalance, r.drop_rate, r.auxiliary) for r in reports] == [(0.0, 0.0, 0.0)] * 3
    assert not any("router" in name for name in run.state())


@pytest.mark.parametrize("dense", [False, True])
def test_it_learns(dense):
    text = "abcdefgh" * 100
    ids = CharVocabulary.from_text(text).encode(text)
    config = make_config(plain=True, dense=dense)
    with single_threaded_blas():
        run = Trainer(config, ids)
        first = run.step().cross_entropy
        for _ in range(38):
            last = run.step().cross_entropy
        run.close()
    # The next letter is certain: log(10) at first, and no floor.
    assert first > 1.5
    assert last < first / 3


def test_backends_agree_on_a_step():
    moments = [
        made(make_config(plain=True, optimizer=AdamWConfig(grad_clip=None)), 1, backend=name)[0]
        for name in ("numpy", "reference")
    ]
    one, two = (run.state()["optimizer.m"] for run in moments)
    assert_within(one, two, gamma(464, "float32") * np.abs(two).max(), "gradient")


# --- evaluation


@pytest.mark.parametrize("length", [9, 16, 17, 33, 90])
@pytest.mark.parametrize("dense", [False, True])
def test_evaluation_predicts_every_character_but_the_first_once(dense, length):
    config = make_config(dense=dense)
    cfg, ids = config.model, IDS[:length]
    params = init_language_params(cfg, 0, "float64")
    found = evaluate(params, cfg, ids, batch_size=3)
    losses, served = [], np.zeros((cfg.num_moe_layers, 10, 0 if dense else 4), int)
    for start in range(0, length - 1, 8):
        window = ids[start : min(start + 8, length - 1)]
        logits, saved = language_forward(window[None], params, cfg)
        for i, row in enumerate(logits[0]):
            losses.append(np.log(np.exp(row).sum()) - row[ids[start + i + 1]])
        for layer, block in enumerate(saved.blocks):
            if block.moe is not None:
                for v, experts in zip(window, block.moe.routing.topk_ids, strict=True):
                    served[layer, v, experts] += 1
    assert len(losses) == length - 1
    assert abs(found.loss - np.mean(losses)) <= gamma(2000, "float64") * max(losses)
    assert found.served.tolist() == served.tolist()
    assert found.dropped == 0
    counts = served.sum(axis=1)
    assert found.tokens_per_expert.tolist() == counts.tolist()
    want = np.mean([max_violation(c) for c in counts]) if len(counts) else 0.0
    assert found.load_imbalance == want


def test_evaluation_is_the_same_with_workers_and_ignores_noise_and_dropout():
    config = make_config()
    run, _ = made(config, 2, workers=2)
    one = evaluate(run.params, config.model, IDS[:200])
    noisy = dataclasses.replace(
        config.model, dropout=0.5, moe=dataclasses.replace(config.model.moe, router_noise_std=9.0)
    )
    with single_threaded_blas():
        run = Trainer(dataclasses.replace(config, model=noisy), IDS, workers=2)
        run.load_state(made(config, 2)[0].state(), 2)
        two = run.evaluate(IDS[:200])
        run.close()
    assert one.loss == two.loss
    assert np.array_equal(one.served, two.served)


def test_evaluation_has_its_own_capacity():
    config = make_config(capacity="0.5")
    params = init_language_params(config.model)
    tight = evaluate(params, config.model, IDS[:90])
    assert 0 < tight.drop_rate < 1
    assert tight.drop_rate == tight.dropped / (89 * 2 * 2)
    moe = dataclasses.replace(config.model.moe, eval_capacity_factor="4")
    roomy = evaluate(params, dataclasses.replace(config.model, moe=moe), IDS[:90])
    assert roomy.drop_rate == 0.0
    assert roomy.loss != tight.loss


def test_a_perfectly_balanced_load_counts_as_zero():
    ids = np.zeros(17, np.int32)
    config = make_config()
    found = evaluate(init_language_params(config.model), config.model, ids)
    balanced = dataclasses.replace(found, served=np.full((2, 10, 4), 3))
    assert balanced.load_imbalance == 0.0
    # One input character only: two of four experts take everything.
    skewed = np.zeros((1, 10, 4), int)
    skewed[0, 0, :2] = 16
    assert dataclasses.replace(found, served=skewed).load_imbalance == 1.0


# --- config


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


def biased(rate=0.01, **options):
    """Return a config balanced by a selection bias alone."""
    config = make_config(plain=True, **options)
    moe = dataclasses.replace(config.model.moe, selection_bias=True)
    model = dataclasses.replace(config.model, moe=moe)
    return dataclasses.replace(config, model=model, selection_bias_rate=rate)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_selection_bias_moves_against_the_load_of_every_step(workers):
    """Spelled out: a rate up for experts below the mean, down above, by all parts of the step."""
    config = biased(micro_batches=4)
    want = np.zeros((2, 4), np.float32)
    with single_threaded_blas():
        run = Trainer(config, IDS, workers=workers)
        for _ in range(6):
            report = run.step()
            for layer, counts in enumerate(report.tokens_per_expert):
                assert counts.sum() == 8 * 8 * 2
                for expert, count in enumerate(counts):
                    want[layer, expert] += np.float32(0.01 * np.sign(counts.mean() - count))
            found = [block.feed_forward.selection_bias for block in run.params.blocks]
            assert np.array_equal(np.array(found), want)
            range_now = np.array([(b.min(), b.max()) for b in want], np.float64)
            assert np.array_equal(report.selection_bias_range, range_now)
        moments = run.optimizer.state()
        run.close()
    assert np.abs(want).max() > 0.01
    names = [name for name in run.state() if name.endswith("selection_bias")]
    assert len(names) == 2
    groups = [g for g in run.optimizer.groups if g.name.endswith("selection_bias")]
    assert [g.frozen for g in groups] == [True, True]
    assert not any(moments.m[g.start : g.stop].any() for g in groups)


def test_the_selection_bias_is_part_of_the_state():
    config = biased(rate=0.05)
    run, _ = made(config, 4)
    state = copied(run)
    with single_threaded_blas():
        after = [run.step() for _ in range(3)]
        other = Trainer(config, IDS, workers=2)
        other.load_state(state, 4)
        again = [other.step() for _ in range(3)]
        other.close()
    assert repr(after) == repr(again)
    assert_same_bits(run.state(), other.state())


def test_a_selection_bias_balances():
    """Two experts that begin with almost every choice lose them, and keep them without."""
    loads = []
    for rate in (0.01, 1e-9):
        with single_threaded_blas():
            run = Trainer(biased(rate=rate), IDS)
            for block in run.params.blocks:
                block.feed_forward.selection_bias[:2] = 0.25
            imbalances = [run.step().load_imbalance for _ in range(40)]
            run.close()
        loads.append(np.mean(imbalances[-8:]))
    assert loads[0] < 0.5
    assert loads[1] > 0.8


def test_a_selection_bias_and_its_rate_come_together():
    config = biased()
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(RangeError) as caught:
            dataclasses.replace(config, selection_bias_rate=wrong)
        assert str(caught.value) == (
            "TrainConfig: selection_bias_rate must be positive with model.moe.selection_bias=True "
            f"and 0 without, got {wrong} with True. The bias moves by it after every step."
        )
    for dense in (False, True):
        with pytest.raises(RangeError, match=r"selection_bias_rate must be .* 0\.1 with False"):
            make_config(dense=dense, selection_bias_rate=0.1)


def test_identity_experts_are_not_balanced_by_a_bias():
    config = biased()
    moe = dataclasses.replace(config.model.moe, num_identity_experts=1)
    with pytest.raises(UnsupportedError) as caught:
        dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    assert str(caught.value) == (
        "TrainConfig: model.moe.num_identity_experts must be 0 with selection_bias=True, got 1. "
        "Balancing counts the experts that compute."
    )


@pytest.mark.parametrize(
    ("patterns", "kinds"),
    [
        (("*.router_weight",), {"router_weight"}),
        (("*.gate_up_proj", "*.down_proj"), {"gate_up_proj", "down_proj"}),
        (("embedding", "final_norm.*"), {"embedding", "final_norm.weight"}),
    ],
)
def test_frozen_parameters_stay_and_the_others_train(patterns, kinds):
    config = make_config(optimizer=AdamWConfig(frozen=patterns))
    before = dict(named_arrays(init_language_params(config.model, config.seed)))
    run, _ = made(config, 3, workers=2)
    still = {n for n, a in named_arrays(run.params) if np.array_equal(a, before[n])}
    assert still == {n for n in before if n.endswith(tuple(kinds))}


def test_the_gradients_of_frozen_parameters_do_not_clip_the_others():
    free = make_config(plain=True, optimizer=AdamWConfig(grad_clip=1e-3))
    frozen = dataclasses.replace(free.optimizer, frozen=("embedding",))
    norms = []
    for config in (free, dataclasses.replace(free, optimizer=frozen)):
        run, (report,) = made(config, 1)
        norms.append(report.grad_norm)
        groups = [g for g in run.optimizer.groups if g.name == "embedding"]
        flat = run._flat_grads[0].astype("f8")
    ((start, stop),) = [(g.start, g.stop) for g in groups]
    rest = np.concatenate([flat[:start], flat[stop:]])
    assert abs(norms[1] - np.sqrt((rest**2).sum())) <= gamma(2 * rest.size, "float64") * norms[1]
    assert norms[1] < 0.9 * norms[0]


def test_given_start_values_are_copied():
    config = make_config(plain=True)
    start = init_language_params(config.model, 77)
    run = Trainer(config, IDS, initial=start)
    for (_, one), (_, two) in zip(named_arrays(run.params), named_arrays(start), strict=True):
        assert np.array_equal(one, two)
        assert not np.shares_memory(one, two)
    run.close()
    with pytest.raises(ShapeError) as caught:
        Trainer(config, IDS, initial=init_language_params(config.model.dense_variant()))
    assert str(caught.value).startswith(
        "train: initial.blocks.0.feed_forward.down_proj must be ((4"
    )
    assert str(caught.value).endswith("It is bound by config.model.")
    with pytest.raises(ShapeError, match=r"float32.*, got .*float64"):
        Trainer(config, IDS, initial=init_language_params(config.model, 0, "float64"))


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


@pytest.mark.parametrize(
    "options",
    [
        {"score_fn": "sigmoid", "shared_intermediate_size": 8, "shared_gated": True},
        {"router_jitter": 0.1, "expert_dropout": 0.1, "logit_softcap": 5.0, "output_bias": True},
        {"second_expert_policy": "sampling", "num_identity_experts": 1},
        {"weight_position": "input", "activation": "reglu", "drop_policy": "random"}
        | {"expert_capacity": 6},
        {"routing": "dense"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_kind_of_layer_trains(options):
    config = make_config(plain=True)
    moe = MoEConfig(hidden_size=16, intermediate_size=8, num_experts=4, top_k=2, **options)
    model = dataclasses.replace(config.model, moe=moe, load_balancing_coefficient=0.01)
    _, reports = made(dataclasses.replace(config, model=model), 12)
    assert reports[-1].cross_entropy < reports[0].cross_entropy


def test_a_dense_model_takes_no_noise():
    noisy = ScheduleConfig(steps=4, learning_rate=0.1, router_noise_std=0.1, router_noise_steps=2)
    with pytest.raises(RangeError, match=r"router_noise_std must stay 0 without model\.moe, got 0"):
        dataclasses.replace(make_config(dense=True), schedule=noisy)


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
