"""Steps of training: workers, micro-batches, state, reports, frozen parameters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from trainer_runs import IDS, assert_same_bits, copied, made, make_config

from npmoe.config import MoEConfig
from npmoe.errors import RangeError, ShapeError
from npmoe.models import init_language_params, language_forward
from npmoe.testing.bounds import assert_within, gamma
from npmoe.training import (
    AdamWConfig,
    CharVocabulary,
    ScheduleConfig,
    Trainer,
    batch,
    tasks,
)
from npmoe.training.loop import single_threaded_blas
from npmoe.tree import named_arrays


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
