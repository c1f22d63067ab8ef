"""The pictures show what the log says, and are written whole or not at all."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from npmoe import plots
from npmoe.errors import BackendUnavailableError, CheckpointError

image = pytest.importorskip("matplotlib.image")


def record(step, **values):
    return {
        "step": step,
        "cross_entropy": 3.0 / step,
        "learning_rate": 0.001 * step,
        "grad_norm": 1.0 + step,
        "load_imbalance": 0.5,
        "drop_rate": 0.0,
        "tokens_per_expert": [[step, 1, 2], [3, 3, 3]],
        **values,
    }


RECORDS = [record(s, **({"val_loss": 2.0} if s == 3 else {})) for s in (1, 2, 3)]
SERVED = np.arange(2 * 5 * 3).reshape(2, 5, 3)
CHARACTERS = "\n 1Aa"


@pytest.fixture
def drawn(monkeypatch):
    """Return the axes by their titles, as they are when the picture is saved."""
    axes = {}
    save = plots._save

    def keep(figure, path):
        axes.update({a.get_title(): a for a in figure.axes if a.get_title()})
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return axes


def test_curves(tmp_path, drawn):
    plots.plot_curves(RECORDS, tmp_path / "curves.png")
    pixels = image.imread(tmp_path / "curves.png")
    assert pixels.shape[0] > 500
    assert pixels.std() > 0.02
    loss = drawn["Loss"]
    training, validation = loss.get_lines()
    assert training.get_xydata().tolist() == [[1, 3.0], [2, 1.5], [3, 1.0]]
    assert validation.get_xydata().tolist() == [[3, 2.0]]
    assert "validation (last 2.000)" in [t.get_text() for t in loss.get_legend().get_texts()]
    assert set(drawn) >= {"Load imbalance", "Dropped routes", "Learning rate and gradient norm"}


@pytest.mark.parametrize(("rates", "top"), [((0, 0, 0), 1.0), ((0.1, 0.5, 0), 52.5)])
def test_the_drop_panel_begins_at_zero_and_has_a_height(tmp_path, drawn, rates, top):
    records = [record(s + 1, drop_rate=r, load_imbalance=0.0) for s, r in enumerate(rates)]
    plots.plot_curves(records, tmp_path / "curves.png")
    assert drawn["Dropped routes"].get_ylim() == (0.0, pytest.approx(top))
    assert drawn["Load imbalance"].get_ylim() == (0.0, 0.1)


def test_experts(tmp_path, drawn):
    plots.plot_experts(RECORDS, SERVED, CHARACTERS, tmp_path / "experts.png")
    pixels = image.imread(tmp_path / "experts.png")
    assert pixels.std() > 0.02
    share = drawn["MoE layer 0: share of choices"].get_images()[0].get_array()
    assert np.allclose(share, [[1 / 4, 2 / 5, 3 / 6], [1 / 4, 1 / 5, 1 / 6], [2 / 4, 2 / 5, 2 / 6]])
    classes = drawn["MoE layer 1: experts of each class"]
    names = [t.get_text() for t in classes.get_yticklabels()]
    assert names == ["lower", "upper", "digit", "space", "newline"]
    table = np.asarray(classes.get_images()[0].get_array())
    assert np.allclose(table.sum(axis=1), 1)
    # "a" is the last of the characters.
    assert np.allclose(table[0], SERVED[1, 4] / SERVED[1, 4].sum())


def test_one_record_is_enough(tmp_path):
    plots.plot_curves([record(1)], tmp_path / "curves.png")
    plots.plot_experts([record(1)], SERVED, CHARACTERS, tmp_path / "experts.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_an_expert_that_served_nothing(tmp_path, drawn):
    empty = np.zeros((1, 5, 3), int)
    empty[0, 4, 1] = 7
    records = [record(1, tokens_per_expert=[[0, 0, 0]])]
    plots.plot_experts(records, empty, CHARACTERS, tmp_path / "experts.png")
    table = drawn["MoE layer 0: experts of each class"].get_images()[0].get_array()
    assert np.asarray(table).tolist() == [[0.0, 1.0, 0.0]]


def test_a_picture_that_cannot_be_written(tmp_path):
    path = tmp_path / "missing" / "curves.png"
    with pytest.raises(CheckpointError, match=r"^plots: .*curves\.png could not be written: No su"):
        plots.plot_curves(RECORDS, path)


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"matplotlib .*pip install 'npmoe\[cli\]'"):
        plots.plot_curves(RECORDS, tmp_path / "curves.png")
