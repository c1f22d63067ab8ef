"""The picture and the text of a plan show its blocks, experts, routes and padding."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from npmoe import block_plots
from npmoe.dispatch import plan_dispatch
from npmoe.errors import BackendUnavailableError, CheckpointError, DTypeError, RangeError
from npmoe.plans.blocks import BlockPlan, align_block_size
from npmoe.plots import blocks_text, plot_blocks

image = pytest.importorskip("matplotlib.image")
colors = pytest.importorskip("matplotlib.colors")

# Expert 0 has 2 blocks of 4, expert 1 has 1, expert 2 has 2, expert 3 has 1.
IDS = np.array([[0, 2], [2, 1], [1, 0], [2, 3], [0, 1], [2, 0], [0, 2], [2, 0], [2, 3]], np.int32)
PLAN = plan_dispatch(IDS, num_experts=4)
BLOCKS = align_block_size(IDS, 4, 4)


@pytest.fixture
def panel(monkeypatch):
    """Return the panel as it is when the picture is saved."""
    kept = []
    save = block_plots.save_figure

    def keep(figure, path):
        kept.extend(figure.axes)
        save(figure, path)

    monkeypatch.setattr(block_plots, "save_figure", keep)
    return kept


def texts(panel: Any) -> list[str]:
    return [t.get_text() for t in panel.texts]


def test_two_one_two_one_blocks(tmp_path, panel):
    plot_blocks(PLAN, tmp_path / "blocks.png", block_size=4)
    pixels = image.imread(tmp_path / "blocks.png")
    assert pixels.std() > 0.02
    (axes,) = panel
    drawn = texts(axes)
    assert [t for t in drawn if t.startswith("expert")] == [f"expert {e}" for e in range(4)]
    assert [t for t in drawn if t.startswith("block")] == [f"block {b}" for b in range(6)]
    assert [t for t in drawn if " of 4" in t] == [f"{n} of 4" for n in (4, 2, 3, 4, 3, 2)]
    numbers = [t for t in drawn if t.isdigit()]
    assert BLOCKS.sorted_token_ids is not None
    assert numbers == [str(r) for r in BLOCKS.sorted_token_ids[:24]]
    tokens = [t for t in drawn if t.startswith("token")]
    assert tokens == [f"token {int(r) // 2}" for r in numbers if r != "18"]
    assert axes.get_title() == (
        "18 routes in 6 blocks of 4; padding: 6 of 24 rows (25 %)\n"
        "number: the route t*K + k of a row; hatched: padding, which holds 18"
    )
    cells = [p for p in axes.patches if p.get_fill()]
    assert len(cells) == 24
    padding = [p for p in cells if p.get_hatch()]
    assert [p.get_x() for p in padding] == [2.0, 3.0, 3.0, 3.0, 2.0, 3.0]
    faces = [colors.to_hex(p.get_facecolor()) for p in cells if not p.get_hatch()]
    experts = np.repeat(np.arange(4), PLAN.tokens_per_expert).tolist()
    assert len(set(faces)) == 4
    assert [faces.index(f) for f in faces] == [experts.index(e) for e in experts]


def test_blocks_lie_below_each_other(tmp_path, panel):
    plot_blocks(PLAN, tmp_path / "blocks.png", block_size=4)
    (axes,) = panel
    tops = sorted({p.get_y() for p in axes.patches})
    assert len(tops) == 6
    assert (np.diff(tops) > 1).all()
    bottom, top = axes.get_ylim()
    assert top < tops[0]
    assert tops[-1] + 1 < bottom


@pytest.mark.parametrize("block_size", [1, 4, 16, 128])
def test_no_word_is_cut_off_or_covered(tmp_path, panel, block_size):
    ids = np.array([[1023]] * 200 + [[7]] * 3)
    plan = align_block_size(ids[-60 if block_size < 128 else 0 :], block_size, 1024)
    plot_blocks(plan, tmp_path / "b.png", block_size=block_size, num_routes=ids.size, top_k=1)
    (axes,) = panel
    axes.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in axes.texts]
    for i, box in enumerate(boxes):
        assert axes.bbox.x0 <= box.x0
        assert box.x1 <= axes.bbox.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_block_plan_and_a_dispatch_plan_give_the_same_picture(tmp_path):
    plot_blocks(PLAN, tmp_path / "a.png", block_size=4)
    plot_blocks(BLOCKS, tmp_path / "b.png", block_size=4, num_routes=18, top_k=2)
    a, b = (tmp_path / n for n in ("a.png", "b.png"))
    assert a.read_bytes() == b.read_bytes()


def test_wide_blocks_have_no_numbers_but_lengths(tmp_path, panel):
    ids = np.repeat(np.arange(3), [40, 0, 70])[:, None]
    plot_blocks(
        align_block_size(ids, 32, 3), tmp_path / "blocks.png", block_size=32, num_routes=110
    )
    (axes,) = panel
    assert not any(t.isdigit() for t in texts(axes))
    stretches = [(p.get_x(), p.get_width()) for p in axes.patches if p.get_fill()]
    wanted = [(0, 32), (0, 8), (8, 24), (0, 32), (0, 32), (0, 6), (6, 26)]
    assert stretches == wanted
    assert axes.get_title().endswith("\nhatched: padding, which holds 110")
    assert [t for t in texts(axes) if t.startswith("expert")] == ["expert 0", "expert 2"]


def test_blocks_without_an_expert_are_gray(tmp_path, panel):
    plan = align_block_size(IDS, 4, 4, np.array([0, 1, -1, -1]))
    plot_blocks(plan, tmp_path / "blocks.png", block_size=4, num_routes=18)
    (axes,) = panel
    drawn = texts(axes)
    assert [t for t in drawn if "expert" in t] == ["expert 0", "expert 1", "no expert"]
    assert not any(t.startswith("token") for t in drawn)
    gray = [p for p in axes.patches if colors.to_hex(p.get_facecolor()) == "#c8c8c8"]
    assert len(gray) == 9


def test_only_the_first_blocks(tmp_path, panel):
    plot_blocks(PLAN, tmp_path / "blocks.png", block_size=4, max_blocks=2)
    (axes,) = panel
    assert [t for t in texts(axes) if t.startswith("block")] == ["block 0", "block 1"]
    assert "(25 %); the first 2 blocks\n" in axes.get_title()
    plot_blocks(PLAN, tmp_path / "all.png", block_size=4, max_blocks=6)
    assert "first" not in panel[1].get_title()


def test_text():
    assert blocks_text(PLAN, block_size=4) == (
        "expert 0  block 0 |  0  5  8 11\n"
        "          block 1 | 12 15  .  .\n"
        "expert 1  block 2 |  3  4  9  .\n"
        "expert 2  block 3 |  1  2  6 10\n"
        "          block 4 | 13 14 16  .\n"
        "expert 3  block 5 |  7 17  .  .\n"
        "18 routes in 6 blocks of 4; padding: 6 of 24 rows (25 %)"
    )
    assert blocks_text(BLOCKS, block_size=4, num_routes=18) == blocks_text(PLAN, block_size=4)


def test_text_of_long_blocks_and_of_many():
    ids = np.zeros((40, 1), int)
    lines = blocks_text(
        align_block_size(ids, 18, 1), block_size=18, num_routes=40, max_blocks=2
    ).splitlines()
    assert lines[0] == f"expert 0  block 0 | {' '.join(f'{i:>2}' for i in range(16))} ... 18 routes"
    assert lines[1].startswith("          block 1 | 18 19 20")
    assert lines[2:] == [
        "... 1 more block",
        "40 routes in 3 blocks of 18; padding: 14 of 54 rows (26 %)",
    ]
    lines = blocks_text(PLAN, block_size=4, max_blocks=4).splitlines()
    assert lines[4] == "... 2 more blocks"


def test_text_of_one_route_per_block_and_of_none():
    plan = align_block_size(np.array([[1, -1]]), 2, 3, dialect="naive")
    assert blocks_text(plan, block_size=2, num_routes=2) == (
        "expert 1   block 0 | 0 .\n"
        "no expert  block 1 | 1 .\n"
        "2 routes in 2 blocks of 2; padding: 2 of 4 rows (50 %)"
    )
    empty = align_block_size(np.empty((0, 2), int), 2, 3)
    assert blocks_text(empty, block_size=2, num_routes=0) == (
        "0 routes in 0 blocks of 2; padding: 0 of 0 rows"
    )
    one = align_block_size(np.array([[0]]), 1, 1)
    assert blocks_text(one, block_size=1, num_routes=1).endswith(
        "\n1 route in 1 block of 1; padding: 0 of 1 rows (0 %)"
    )


def test_a_plan_that_is_wrong_is_shown_as_it_is():
    wrong = BlockPlan(
        np.array([0, 7, -1, 2], np.int32),
        np.array([0, 0], np.int32),
        np.array([4], np.int32),
    )
    assert blocks_text(wrong, block_size=2, num_routes=3).startswith(
        "expert 0  block 0 | 0 .\n          block 1 | . 2\n2 routes in 2 blocks"
    )


@pytest.mark.parametrize(
    ("plan", "options", "error", "message"),
    [
        (
            BLOCKS,
            {},
            RangeError,
            "num_routes must be given with a BlockPlan, got None. It is the sentinel.",
        ),
        (PLAN, {"block_size": 0}, RangeError, "block_size must be at least 1, got 0."),
        (PLAN, {"block_size": 1.5}, DTypeError, "block_size must be an integer, got 1.5."),
        (PLAN, {"max_blocks": 0}, RangeError, "max_blocks must be at least 1, got 0."),
    ],
)
def test_messages(tmp_path, plan, options, error, message):
    options = {"block_size": 4, **options}
    with pytest.raises(error) as caught:
        plot_blocks(plan, tmp_path / "blocks.png", **options)
    assert str(caught.value) == f"plot_blocks: {message}"
    with pytest.raises(error) as caught:
        blocks_text(plan, **options)
    assert str(caught.value) == f"blocks_text: {message}"


def test_a_picture_of_nothing_cannot_be_drawn(tmp_path):
    with pytest.raises(RangeError) as caught:
        plot_blocks(
            plan_dispatch(np.full((2, 2), -1, np.int32), num_experts=2),
            tmp_path / "blocks.png",
            block_size=2,
        )
    assert str(caught.value) == "plot_blocks: plan must hold a block, got none."


def test_a_picture_that_cannot_be_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"^plots: .*blocks\.png could not be written"):
        plot_blocks(PLAN, tmp_path / "missing" / "blocks.png", block_size=4)


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"matplotlib .*pip install 'npmoe\[cli\]'"):
        plot_blocks(PLAN, tmp_path / "blocks.png", block_size=4)
    assert blocks_text(PLAN, block_size=4).startswith("expert 0")
