"""The roofline picture shows every case once, under its limits, without overlaps."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys

import pytest
from bench_fakes import settings

from npmoe.benchmark import CASES, DIRECTIONS, picture, plot_roofline
from npmoe.benchmark.cases import Load
from npmoe.benchmark.machine import Machine
from npmoe.benchmark.result import (
    Agreement,
    BenchmarkResult,
    CaseTimings,
    Memory,
    Sample,
    Timing,
)
from npmoe.errors import BackendUnavailableError, CheckpointError, RangeError

image = pytest.importorskip("matplotlib.image")
NAMES = ("ours", "slower", "peer")


ALL = tuple(CASES.values())


def made_up(cases=ALL, directions=DIRECTIONS):
    """Return a result in which everybody reaches 1/2, 1/3 and 1/4 of the limit."""
    found = []
    for case, direction in itertools.product(cases, directions):
        load = Load(
            num_rows=case.num_tokens * case.top_k,
            used_experts=min(case.num_experts, case.num_tokens * case.top_k),
            largest=case.num_tokens,
        )
        cost = settings().cost(case, load, direction)
        floor = cost.floor(1e11, 1e10)
        timings = tuple(
            Timing(
                name=name,
                is_peer=name == "peer",
                seconds=Sample.of([floor * (i + 2)]),
                share_of_limit=1 / (i + 2),
                ratio_to_best_peer=None,
                memory=Memory(arrays=None, resident=None),
                agreement=Agreement(difference=0.0, bound=1.0, where="output"),
            )
            for i, name in enumerate(NAMES)
        )
        found.append(
            CaseTimings(
                case=case,
                direction=direction,
                load=load,
                cost=cost,
                flops_per_second=Sample.of([1e11]),
                bytes_per_second=Sample.of([1e10]),
                floor_seconds=floor,
                other_load=None,
                timings=timings,
            )
        )
    machine = Machine(
        processor="A processor",
        cores=2,
        usable_cores=2,
        threads=2,
        system="",
        python="",
        npmoe="",
        packages={},
        thread_pools=(),
    )
    return BenchmarkResult(
        machine=machine, settings=settings(), checked={}, cases=tuple(found), omissions=()
    )


def draw(result, path):
    """Return the panel of the picture as it was saved."""
    panels = []
    save = picture.save_figure

    def keep(figure, where):
        panels[:] = figure.axes
        save(figure, where)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "save_figure", keep)
        plot_roofline(result, path)
    (panel,) = panels
    return panel


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("roofline") / "r.png"


@pytest.fixture(scope="module")
def panel(saved):
    """Return the picture of all cases."""
    return draw(made_up(), saved)


def dots(panel):
    """Return (x, y, colour) of every dot."""
    return [
        (*map(float, points.get_offsets()[0]), tuple(points.get_facecolor()[0]))
        for points in panel.collections
    ]


def test_every_implementation_has_a_dot_of_its_colour_at_its_speed(panel, saved):
    found = dots(panel)
    assert len(found) == 8 * 2 * 3
    assert len({colour for *_, colour in found}) == 3
    rates = sorted(y for _, y, _ in found)
    wanted = sorted(
        c.cost.flops / t.seconds.median / 1e9 for c in made_up().cases for t in c.timings
    )
    assert rates == pytest.approx(wanted)
    texts = {t.get_text() for t in panel.texts}
    assert texts >= {*CASES, "matrix products: 100 GFLOP/s", "reads: 10.0 GB/s"}
    labels = [t.get_text() for t in panel.get_legend().get_texts()]
    assert labels == [*NAMES, *DIRECTIONS, "limit of the case"]
    assert panel.get_title() == "MoE layers under the limits of A processor\n2 threads, float32"
    assert (panel.get_xlabel(), panel.get_ylabel()) == (
        "flops per byte of used expert weights",
        "GFLOP/s",
    )
    assert image.imread(saved).shape[0] > 500


def test_forward_and_backward_have_markers_of_their_own(panel):
    shapes = [len(points.get_paths()[0].vertices) for points in panel.collections]
    assert len(set(shapes)) == 2
    assert sorted(shapes).count(min(shapes)) == len(shapes) // 2


def test_the_lines_are_the_limits(panel):
    roof = panel.lines[0]
    (x0, y0), (x1, y1), (x2, y2) = zip(*roof.get_data(), strict=True)
    assert y0 / x0 == pytest.approx(10.0)
    assert (x1, y1) == (pytest.approx(10.0), pytest.approx(100.0))
    assert y2 == pytest.approx(100.0)
    assert x2 > x1 > x0
    bars = [line.get_ydata() for line in panel.lines if line.get_linewidth() == 2.4]
    limits = sorted({round(float(y[0]), 3) for y in bars})
    # 1/2, about 2 and above the ridge: 5, 20.., 100 GFLOP/s.
    assert len(bars) == 16
    assert limits[0] == pytest.approx(5.0)
    assert limits[-1] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("names", "directions"),
    [
        (list(CASES), DIRECTIONS),
        (["train_small"], DIRECTIONS[:1]),
        (["decode1_olmoe", "switch_many"], DIRECTIONS[1:]),
    ],
)
def test_no_text_or_dots_of_two_cases_overlap(tmp_path, names, directions):
    result = made_up(tuple(CASES[name] for name in names), directions)
    panel = draw(result, tmp_path / "r.png")
    panel.figure.draw_without_rendering()
    renderer = panel.figure.canvas.get_renderer()
    texts = [*panel.texts, panel.title, panel.xaxis.label, panel.yaxis.label, panel.get_legend()]
    boxes = [t.get_window_extent(renderer) for t in texts]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    whole = panel.figure.bbox.padded(1)
    assert [b for b in boxes if not (whole.contains(*b.min) and whole.contains(*b.max))] == []
    names_drawn = [t for t in panel.texts if t.get_text() in names]
    tops = max(t.get_window_extent(renderer).y1 for t in names_drawn)
    pixels = [panel.transData.transform((x, y)) for x, y, _ in dots(panel)]
    assert min(y for _, y in pixels) - 5 > tops
    # Dots of one case stand around its name, apart from those of the next.
    extents = [t.get_window_extent(renderer) for t in names_drawn]
    middles = sorted((extent.x0 + extent.x1) / 2 for extent in extents)
    for left, right in itertools.pairwise(middles):
        gap = min(abs(x - (left + right) / 2) for x, _ in pixels)
        assert gap > 5


def test_cases_of_one_intensity_stand_around_it():
    result = made_up((CASES["decode1_mixtral"], CASES["decode1_olmoe"], CASES["train_small"]))
    columns = picture._columns(result.cases)
    assert math.log10(0.5) == pytest.approx(
        (columns["decode1_mixtral"] + columns["decode1_olmoe"]) / 2
    )
    assert columns["train_small"] == pytest.approx(math.log10(512))


def test_a_result_without_cases_has_no_picture(tmp_path):
    empty = dataclasses.replace(made_up(), cases=())
    with pytest.raises(RangeError, match="plot_roofline: result must hold a timed case, got none"):
        plot_roofline(empty, tmp_path / "r.png")


def test_a_picture_that_cannot_be_written(tmp_path):
    result = made_up(ALL[:1], DIRECTIONS[:1])
    with pytest.raises(CheckpointError, match="could not be written: No such file"):
        plot_roofline(result, tmp_path / "gone" / "r.png")


def test_matplotlib_is_named_if_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(BackendUnavailableError, match=r"matplotlib must be .*'npmoe\[cli\]'"):
        plot_roofline(made_up(), tmp_path / "r.png")
