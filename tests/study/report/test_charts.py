"""Charts put numbers where they belong."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest

from lightning_lora.study.report.charts.axis import Axis
from lightning_lora.study.report.charts.interval_chart import Difference, interval_chart
from lightning_lora.study.report.charts.line_chart import Series, line_chart, on_page, spread
from lightning_lora.study.report.charts.svg import polyline, tag
from lightning_lora.study.report.content import Table
from lightning_lora.study.report.html import to_html
from lightning_lora.study.report.numbers import seconds
from lightning_lora.study.report.side_by_side import Beside, side_by_side_page
from lightning_lora.study.report.table import cells_of
from tests.study.report.html_page import HtmlPage

EMPTY = Table("t", "numbers", ["a"], [])


@pytest.mark.parametrize("is_log", [False, True])
def test_equal_steps_have_equal_lengths(is_log: bool) -> None:
    axis = Axis("x", 1.0, 16.0, is_log)
    values = (1.0, 2.0, 4.0, 8.0, 16.0) if is_log else (1.0, 4.75, 8.5, 12.25, 16.0)
    assert [axis.place(value) for value in values] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_what_has_no_place_on_a_logarithmic_axis_is_left_out(value: float) -> None:
    axis = Axis.around("x", [1.0, value, 10.0], is_log=True)
    assert axis.low < 1 < 10 < axis.high
    assert math.isnan(axis.place(value))


@pytest.mark.parametrize("low", [-3.0, 0.0, 1e-5, 0.9997, 123456.0])
@pytest.mark.parametrize("span", [1e-4, 0.3, 1.0, 77.0, 1e7])
def test_ticks_are_few_round_and_on_the_axis(low: float, span: float) -> None:
    for is_log in (False, True) if low > 0 else (False,):
        axis = Axis("x", low, low + span, is_log)
        ticks = axis.ticks()
        assert 1 <= len(ticks) <= 8
        assert all(axis.low <= value <= axis.high for value, _ in ticks)
        assert len({text for _, text in ticks}) == len(ticks)


def test_an_axis_around_one_value_has_a_length() -> None:
    for values in ([], [0.0], [5.0], [math.nan]):
        for is_log in (False, True):
            axis = Axis.around("x", values, is_log)
            assert axis.high > axis.low
            assert axis.ticks()


def test_a_line_goes_through_its_points_and_breaks_where_there_is_none() -> None:
    assert polyline([(0.0, 1.0), (2.0, 3.25), (math.nan, 1.0), (4.0, 5.0)]) == "M0 1L2 3.2M4 5"
    x, y = Axis("x", 0.0, 10.0), Axis("y", 0.0, 1.0)
    series = Series("loss", [(0.0, 1.0), (10.0, 0.0)])
    figure = line_chart("c", "title", "says", x, y, [series])
    (path,) = re.findall(r'd="([^"]+)" class="line"', str(figure.svg))
    ends = [on_page(point, x, y) for point in series.points]
    assert path == polyline(ends)
    assert ends[0][0] < ends[1][0]
    assert ends[0][1] < ends[1][1], "what is less is further down"


def test_long_lines_are_thinned_and_keep_their_ends() -> None:
    points = [(float(step), 1 / step) for step in range(1, 10_001)]
    thin = Series("x", points, low=[0.0] * 10_000, high=[1.0] * 10_000).thinned()
    assert thin.points[0] == points[0]
    assert thin.points[-1] == points[-1]
    assert len(thin.points) == len(thin.low) == len(thin.high) <= 300
    assert spread(300, 300) == list(range(300))


def test_names_at_the_ends_of_lines_do_not_meet() -> None:
    series = [Series(f"arm {number}", [(0.0, 1.0), (1.0, 0.5 + number / 1e4)], number) for number in range(9)]
    figure = line_chart("c", "t", "s", Axis("x", 0.0, 1.0), Axis("y", 0.0, 1.0), series)
    heights = sorted(map(float, re.findall(r'<text x="530" y="([\d.]+)"', str(figure.svg))))
    assert len(heights) == 9
    assert all(second - first >= 14 for first, second in pairwise(heights))


def test_an_interval_without_an_end_reaches_the_edge_and_has_no_cap_there() -> None:
    rows = [Difference("a", "cannot tell", 0.01, -math.inf, 0.02), Difference("b", "matches", 0.0, -0.001, 0.001)]
    figure = interval_chart("d", "t", "s", "nats", rows, 0.005, EMPTY)
    open_end, closed = re.findall(r'class="whisker" d="([^"]+)"', str(figure.svg))
    assert open_end.startswith("M20.0 ")
    assert (open_end.count("v10"), closed.count("v10")) == (1, 2)
    left, width = re.findall(r'class="band" x="([\d.]+)" y="24" width="([\d.]+)"', str(figure.svg))[0]
    low = float(re.findall(r"M([\d.]+) ", closed)[0])
    assert float(left) < low < float(left) + float(width)


def test_texts_and_attributes_are_escaped() -> None:
    assert str(tag("text", "<b>", id='"&')) == '<text id="&#34;&amp;">&lt;b&gt;</text>'
    assert "<b>" not in str(
        line_chart("c", "<b>", "<b>", Axis("<b>", 0, 1), Axis("<b>", 0, 1), [Series("<b>", [(0, 0)])]).svg
    )


def test_runs_side_by_side_have_no_verdict() -> None:
    runs = [
        Beside("LoRA", {1: 3.0, 2: 2.0}, {0: 3.5, 2: 2.1}, {"time": seconds(3.0)}),
        Beside("full", {1: 3.0, 2: 1.9}, {0: 3.5, 2: 2.0}, {"time": seconds(4.0)}),
    ]
    page = side_by_side_page("two runs", runs, ["one remark"])
    assert page.verdict.text == "Validation loss 2.0000 nats with full, 2.1000 with LoRA: one seed each"
    HtmlPage(to_html(page, "made", "date"))
    cells = {(part, row, column): cell.text for part, row, column, cell in cells_of(page)}
    assert cells["runs", "LoRA", "time"] == "3 s"
    assert cells["losses", "full", "2"] == "2"


def test_a_difference_far_from_the_main_one_is_an_arrow_at_the_edge() -> None:
    near = Difference("near", "matches", 0.001, 0.0, 0.002)
    far = Difference("far", "falls behind", 3.0, 2.0, 4.0, text="+3.0000", is_main=False)
    other = Difference("other", "cannot tell", 0.03, 0.02, 0.04, is_main=False)
    svg = str(interval_chart("d", "t", "s", "nats", [near, far, other], 0.005, EMPTY).svg)
    assert len(re.findall('class="whisker"', svg)) == 2
    assert len(re.findall('class="beyond"', svg)) == 1
    assert "+3.0000" in svg
    left, width = map(float, re.findall(r'class="band" x="([\d.]+)" y="24" width="([\d.]+)"', svg)[0])
    assert width > 60, "the band can be seen"
    assert left > 20


def test_a_line_that_is_off_is_in_the_page_and_not_shown() -> None:
    x, y = Axis("x", 1.0, 10.0).marked([2.0, 8.0]), Axis("y", 0.0, 1.0)
    series = [
        Series("on", [(1.0, 1.0)], rings=[(1.0, 1.0)], crosses=[(2.0, 1.0)]),
        Series("off", [(1.0, 0.5)], is_off=True),
    ]
    figure = line_chart("c", "t", "s", x, y, series, limits=(0.25,))
    svg = str(figure.svg)
    assert re.findall(r'<g class="([^"]*)" data-series="1"', svg) == ["s0 off"]
    assert figure.off == [1]
    assert "off</text>" not in svg
    assert svg.count('class="pin ring"') == svg.count('class="pin cross-mark"') == 1
    assert re.findall(r'class="limit" d="M72 ([\d.]+)H', svg) == [f"{14 + 0.75 * 272:.1f}"]
    assert [text for _, text in x.ticks()] == ["2", "8"]
