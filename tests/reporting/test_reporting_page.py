from __future__ import annotations

import re
import struct
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from report_runs import make_run, records, without

from npmoe.errors import CheckpointError, RangeError
from npmoe.reporting import html_report, write_report
from npmoe.reporting.charts import (
    Line,
    line_chart,
    load_heat_map,
    plan_strip,
    png_data_uri,
    table_heat_map,
)
from npmoe.training import uci_digits, vision_recipe

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Collects tags and text; fails on one that is not closed."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def svgs(text):
    return [ET.fromstring(s) for s in re.findall(r"<svg.*?</svg>", text, flags=re.S)]


def test_the_page_of_a_complete_log(tmp_path):
    folder = make_run(tmp_path / "my run", records())
    page = html_report(folder)
    checked = Checker(page)
    text = checked.text
    assert "Run my run" in text
    assert "2 layers of 64, 2 of them with 4 experts (top-2)" in text
    for words in (
        "Loss",
        "Router entropy",
        "Range of the selection bias",
        "Dropped routes",
        "No expert was dead",
        "Step 50",
        "Plan of step 50",
        "In the evaluation at step 40",
        "50 of 50",
    ):
        assert words in text, words
    assert "does not hold" not in text
    # By layer: 15 + 5 of 100 routes fell in layer 0, and nothing in layer 1.
    assert "0 100 0.600" in text
    assert "20.00%" in text
    assert "1 100 1.000" in text
    assert "1 of 4" in text
    # The plan holds kept rows: 25 + 25 + 20 + 10 in four blocks of 64.
    assert "80 rows in 4 blocks of 64, padding 176 of 256 rows (69%)" in text
    assert html_report(folder) == page


def test_every_picture_has_a_name(tmp_path):
    folder = make_run(tmp_path / "run", records())
    (folder.path / "curves.png").write_bytes(b"\x89PNG")
    checked = Checker(html_report(folder))
    shown = [a for a in checked.named("svg") if "aria-hidden" not in a]
    assert len(shown) == 9 + 2 + 2 + 2
    for attributes in shown:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 40
    assert len({a["aria-label"] for a in shown}) == len(shown)
    assert checked.named("img") == [
        {
            "alt": "curves, as npmoe train drew it",
            "src": png_data_uri(b"\x89PNG"),
        }
    ]


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    page = html_report(make_run(tmp_path / "run", records()))
    checked = Checker(page)
    assert "default-src 'none'" in page
    assert not [tag for tag, _ in checked.tags if tag in {"script", "link", "iframe", "object"}]
    for _, attributes in checked.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page.replace("url(#hatch)", "")


def test_dead_experts_are_those_of_the_last_records(tmp_path):
    # Expert 3 of layer 1 is last chosen at step 20.
    few = Checker(html_report(make_run(tmp_path / "few", records()))).text
    assert "No expert was dead: each was chosen in the last 5 records." in few
    many = make_run(tmp_path / "many", records(range(10, 200, 10)), steps=200)
    text = Checker(html_report(many)).text
    assert "Dead experts , not chosen in the last 10 records: layer 1: 3." in text
    assert "dead experts, all layers 1" in text
    assert "Not finished: step 190." in text


def test_a_chosen_step(tmp_path):
    folder = make_run(tmp_path / "run", records())
    text = Checker(html_report(folder, step=20, block_size=10)).text
    assert "Plan of step 20" in text
    assert "80 rows in 9 blocks of 10, padding 10 of 90 rows (11%)" in text
    assert "In the evaluation at step 20" in text
    assert "0 of 4" in text
    assert "In the evaluation" not in Checker(html_report(folder, step=10)).text
    assert '<line class="mark"' in html_report(folder, step=20)
    assert '<line class="mark"' not in html_report(folder)


@pytest.mark.parametrize(("step", "near"), [(7, "10"), (20 + 1, "20 and 30"), (99, "50")])
def test_a_step_that_was_not_logged(tmp_path, step, near):
    folder = make_run(tmp_path / "run", records())
    with pytest.raises(RangeError) as error:
        html_report(folder, step=step)
    assert str(error.value) == (
        f"report: --step must be a logged step, got {step}. The nearest are {near}."
    )


def test_other_messages(tmp_path):
    folder = make_run(tmp_path / "run", records())
    with pytest.raises(RangeError, match=r"^report: --block-size must be at least 1, got 0\."):
        html_report(folder, block_size=0)
    with pytest.raises(CheckpointError, match=r"could not be written: No such file"):
        write_report(folder, tmp_path / "none" / "report.html")
    folder.config.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json could not be read.*Give the folder"):
        html_report(folder)


NEW = ("router_entropy", "kept_per_expert", "specialisation", "selection_bias_range")


def test_an_older_log_is_shown_and_what_it_lacks_is_said(tmp_path):
    folder = make_run(tmp_path / "run", without(records(), *NEW))
    text = Checker(html_report(folder)).text
    assert (
        "This log does not hold the router's entropy; nor kept rows, by which the drop rate of "
        "each layer is known; nor what the experts took in evaluations."
    ) in text
    assert "Plan of step 50" in text
    assert "The log holds choices only, so that dropped routes are drawn as well." in text
    assert "Router entropy" not in text
    assert "Specialisation" not in text


def test_a_dense_run_has_no_experts_to_show(tmp_path):
    names = ("tokens_per_expert", "kept_per_expert", "router_entropy", "selection_bias_range")
    content = without(records(), *names, "specialisation")
    content = ({**r, "tokens_per_expert": [], "router_entropy": []} for r in content)
    text = Checker(html_report(make_run(tmp_path / "run", content, dense=True))).text
    assert "There are no experts in this run." in text
    assert "does not hold" not in text
    assert "dense blocks" in text
    assert "Plan of step" not in text


def test_a_vision_run(tmp_path):
    config = vision_recipe(uci_digits(), steps=50, num_experts=4, num_layers=2)
    folder = make_run(tmp_path / "run", ({**r, "val_accuracy": 0.9725} for r in records()))
    folder.config.write_text(config.to_json(), encoding="utf-8")
    text = Checker(html_report(folder)).text
    assert "Task vision: 2 layers of 64, 2 of them with 4 experts (top-2); 64 images per" in text
    assert "validation accuracy 97.25%" in text
    assert "Validation accuracy %" in text


def test_one_record_is_enough(tmp_path):
    page = html_report(make_run(tmp_path / "run", records([10])))
    assert "nan" not in page.lower().replace("nanoseconds", "")
    assert page.count("<circle") >= 8


def test_names_are_escaped(tmp_path):
    folder = make_run(tmp_path / "<b>&", records())
    page = html_report(folder)
    assert "Run &lt;b&gt;&amp;" in page
    assert "<b>" not in page


def test_curves_keep_their_peaks_when_thinned():
    values = np.ones(5000)
    values[1234], values[4999] = 7.0, -3.0
    chart = line_chart("x", [Line(name="y", steps=np.arange(5000), values=values)])
    (svg,) = svgs(chart)
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    assert len(points) <= 402
    heights = [y for _, y in points]
    assert min(heights) < sorted(heights)[1] - 30
    assert max(heights) == heights[-1]
    assert [x for x, _ in points] == sorted(x for x, _ in points)


def test_points_lie_where_their_values_say():
    line = Line(name="y", steps=np.array([0, 50, 100]), values=np.array([0.0, 5.0, 10.0]))
    (svg,) = svgs(line_chart("x", [line]))
    points = [tuple(map(float, p.split(","))) for p in svg.find("polyline").get("points").split()]
    assert points[0] == (52.0, 180.0)  # left and bottom of the frame
    assert points[2] == (370.0, 26.0)
    assert points[1] == (211.0, 103.0)
    log = Line(name="y", steps=np.array([0, 50, 100]), values=np.array([1.0, 10.0, 100.0]))
    (svg,) = svgs(line_chart("x", [log], log_scale=True))
    assert [float(p.split(",")[1]) for p in svg.find("polyline").get("points").split()] == [
        180.0,
        103.0,
        26.0,
    ]


def pixels_of(svg):
    """Decode the picture inside a heat map."""
    import base64

    uri = next(e for e in svg.iter() if e.tag == "image").get("href")
    content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    place, data, size = 8, b"", None
    while place < len(content):
        length, kind = struct.unpack(">I4s", content[place : place + 8])
        body = content[place + 8 : place + 8 + length]
        (check,) = struct.unpack(">I", content[place + 8 + length : place + 12 + length])
        assert check == zlib.crc32(kind + body)
        if kind == b"IHDR":
            size = struct.unpack(">II", body[:8])
        data += body if kind == b"IDAT" else b""
        place += 12 + length
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(size[1], -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(size[1], size[0], 3)


def test_a_heat_map_has_a_cell_for_each_expert_and_step():
    shares = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    (svg,) = svgs(load_heat_map("x", np.array([10, 20]), shares))
    pixels = pixels_of(svg)
    assert pixels.shape == (3, 2, 3)
    assert pixels[1, 0].tolist() == [214, 40, 76]  # nobody chose it
    assert (pixels[2, 0] == pixels[0, 1]).all()
    assert pixels[0, 0].tolist() == [250, 230, 60]
    assert "expert 0; at the last step it is 1.00 times" in svg.get("aria-label")


def test_many_steps_are_averaged_and_a_single_choice_is_not_called_unused():
    shares = np.ones((1000, 2))
    shares[:, 0] = 0
    shares[503, 0] = 1e-3
    (svg,) = svgs(load_heat_map("x", np.arange(1000), shares))
    pixels = pixels_of(svg)
    assert pixels.shape == (2, 240, 3)
    red = (pixels[0] == [214, 40, 76]).all(axis=1)
    assert red.sum() == 239


def test_a_table_names_the_favourites():
    (svg,) = svgs(table_heat_map("x", ["a", "b"], np.array([[0.25, 0.75], [1.0, 0.0]])))
    assert "a: expert 1 (75%); b: expert 0 (100%)" in svg.get("aria-label")
    assert pixels_of(svg).shape == (2, 2, 3)


def test_a_plan_fills_its_width_in_proportion():
    (svg,) = svgs(plan_strip("x", np.array([3, 0, 4]), 4))
    boxes = [e for e in svg.iter() if e.tag == "rect"]
    widths = [float(e.get("width")) for e in boxes]
    assert widths == [282.0, 94.0, 376.0, 0.0]
    assert [e[0].text for e in boxes][:2] == [
        "expert 0: 3 rows in 1 blocks",
        "expert 0: 1 rows of padding",
    ]
    assert "7 rows in 2 blocks of 4, padding 1 of 8 rows (12%)" in svg.get("aria-label")
    (empty,) = svgs(plan_strip("x", np.zeros(3), 4))
    assert "3 of 3 experts without a row" in empty.get("aria-label")


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 0.3, 1.0, 7.0, 12345.0, 1e12])
def test_ticks_are_few_round_and_cover_the_range(scale):
    line = Line(name="y", steps=np.array([1, 2]), values=np.array([0.13, 0.97]) * scale)
    (svg,) = svgs(line_chart("x", [line]))
    labels = [e.text for e in svg.iter() if e.tag == "text" and e.get("text-anchor") == "end"]
    assert 3 <= len(labels) <= 7
    values = [float(label.replace(",", "")) for label in labels]
    assert values[0] <= 0.13 * scale
    assert values[-1] >= 0.97 * scale * (1 - 1e-3)
    assert values == sorted(set(values))
