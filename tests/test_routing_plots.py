"""The pictures of a routing show its numbers, and are written whole or not at all."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import npmoe
from npmoe import plots, routing_plots
from npmoe.errors import BackendUnavailableError, CheckpointError, RangeError, ShapeError

image = pytest.importorskip("matplotlib.image")


@pytest.fixture
def drawn(monkeypatch):
    """Return the axes of the last picture, as they are when it is saved."""
    axes = []
    save = routing_plots.save_figure

    def keep(figure, path):
        axes[:] = figure.axes
        save(figure, path)

    monkeypatch.setattr(routing_plots, "save_figure", keep)
    return axes


def call(tokens=10, **fields):
    cfg = npmoe.MoEConfig(
        **{"hidden_size": 6, "intermediate_size": 4, "num_experts": 4, "top_k": 2} | fields
    )
    rng = np.random.default_rng(0)
    params = npmoe.init_params(cfg, rng)
    params.router_weight[...] = rng.standard_normal(params.router_weight.shape)
    x = rng.standard_normal((tokens, 6)).astype("f")
    mask = np.ones(tokens, bool)
    mask[-2:] = False
    _, saved = npmoe.moe_forward(x, params, cfg, token_mask=mask)
    return saved


def legend(panel):
    return [t.get_text() for t in panel.get_legend().get_texts()]


def test_the_routing_picture(tmp_path, drawn):
    saved = call(capacity_factor="1/2")
    routing, plan = saved.routing, saved.plan
    plots.plot_routing(routing, tmp_path / "routing.png", plan=plan)
    assert image.imread(tmp_path / "routing.png").std() > 0.02
    panel = drawn[0]
    faint, weights = (i.get_array() for i in panel.get_images())
    assert np.array_equal(faint, routing.probs)
    for t in range(10):
        shown = {e: w for e, w in enumerate(weights[t].tolist()) if w is not None}
        chosen = routing.topk_ids[t] >= 0
        ids, values = routing.topk_ids[t][chosen], routing.topk_weights[t][chosen]
        assert shown == dict(zip(ids.tolist(), values.tolist(), strict=True))
    crosses = {tuple(map(int, p)) for p in panel.collections[0].get_offsets()}
    lost = np.argwhere((plan.row_ids < 0) & (routing.topk_ids >= 0))
    assert len(lost) > 3
    assert crosses == {(int(routing.topk_ids[t, k]), int(t)) for t, k in lost}
    assert "red cross: dropped; hatched: masked" in panel.get_title()
    assert len([p for p in panel.patches if p.get_hatch()]) == 2


def test_a_long_routing_is_cut(tmp_path, drawn):
    saved = call(tokens=30, expert_capacity=2)
    plots.plot_routing(saved.routing, tmp_path / "routing.png", plan=saved.plan, max_tokens=7)
    assert drawn[0].get_images()[0].get_array().shape == (7, 4)
    assert "first 7 of 30 tokens" in drawn[0].get_title()
    rows = {int(y) for _, y in drawn[0].collections[0].get_offsets()}
    assert rows
    assert max(rows) < 7
    assert len(np.argwhere(saved.plan.row_ids < 0)) > 10
    assert "hatched" not in drawn[0].get_title()


def test_soft_routing_is_drawn_by_slots(tmp_path, drawn):
    saved = call(routing="soft", expert_capacity=3, top_k=1)
    plots.plot_routing(saved.routing, tmp_path / "routing.png")
    assert drawn[0].get_xlabel() == "slot (white lines part the experts)"
    assert [line.get_xdata()[0] for line in drawn[0].get_lines()] == [2.5, 5.5, 8.5]
    assert np.array_equal(drawn[0].get_images()[1].get_array(), saved.routing.probs)


def test_the_load_picture(tmp_path, drawn):
    stats = call(capacity_factor="1/2").stats()
    plots.plot_load(stats, tmp_path / "load.png")
    panel = drawn[0]
    kept, dropped = ([b.get_height() for b in bars] for bars in panel.containers)
    assert kept == stats.kept_per_expert.tolist()
    assert dropped == (stats.chosen_per_expert - stats.kept_per_expert).tolist()
    assert [b.get_y() for b in panel.containers[1]] == kept
    mean, capacity = (line.get_ydata()[0] for line in panel.get_lines())
    assert (mean, capacity) == (4.0, stats.capacity)
    texts = legend(panel)
    assert f"dropped ({stats.dropped_routes})" in texts
    assert "capacity (2)" in texts
    assert f"{stats.max_violation:.0%} above the mean" in panel.get_title()


def test_the_load_of_counts_alone(tmp_path, drawn):
    plots.plot_load(np.array([3, 0, 1, 0]), tmp_path / "load.png")
    assert len(drawn[0].containers) == 1
    assert drawn[0].get_title().endswith("2 of 4 unused")
    assert legend(drawn[0]) == ["mean of all choices (1.0)", "kept (4)"]
    plots.plot_load(np.zeros(4, int), tmp_path / "load.png")
    assert "0% above the mean" in drawn[0].get_title()


def test_the_drops_picture(tmp_path, drawn):
    stats = call(capacity_factor="1/2", drop_policy="k_major").stats()
    plots.plot_drops(stats, tmp_path / "drops.png")
    panel = drawn[0]
    rates = [bar.get_height() for bar in panel.containers[0]]
    assert rates == pytest.approx(100 * stats.dropped_per_slot / stats.chosen_per_slot)
    assert rates[0] < rates[1]
    lost, offered = stats.dropped_per_slot[1], stats.chosen_per_slot[1]
    assert f"{lost} of {offered}" in [t.get_text() for t in panel.texts]
    assert f"{stats.drop_rate:.1%} of all" in panel.get_title()
    assert panel.get_ylim()[0] == 0
    plots.plot_drops(call().stats(), tmp_path / "drops.png")
    assert drawn[0].get_ylim() == (0.0, 1.0)


def test_mistakes(tmp_path, monkeypatch):
    saved, other = call(), call(top_k=1)
    path = tmp_path / "missing" / "routing.png"
    with pytest.raises(CheckpointError, match=r"^plots: .*routing\.png could not be written: No"):
        plots.plot_routing(saved.routing, path)
    with pytest.raises(RangeError, match=r"^plot_routing: max_tokens must be at least 1, got 0\."):
        plots.plot_routing(saved.routing, path, max_tokens=0)
    with pytest.raises(ShapeError) as caught:
        plots.plot_routing(saved.routing, path, plan=other.plan)
    assert str(caught.value) == (
        "plot_routing: plan.row_ids must have shape (10, 2), got (10, 1). "
        "Pass the plan of the same call."
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"matplotlib .*pip install 'npmoe\[cli\]'"):
        plots.plot_load(np.ones(3), path)


def test_no_tokens(tmp_path):
    cfg = npmoe.MoEConfig(hidden_size=6, intermediate_size=4)
    _, saved = npmoe.moe_forward(np.zeros((0, 6), "f"), npmoe.init_params(cfg), cfg)
    with pytest.raises(RangeError, match=r"^plot_routing: routing must hold tokens, got none\."):
        plots.plot_routing(saved.routing, tmp_path / "routing.png")
    plots.plot_load(saved.stats(), tmp_path / "load.png")
    plots.plot_drops(saved.stats(), tmp_path / "drops.png")
