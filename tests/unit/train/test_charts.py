"""Charts as SVG."""

import json
import re
from html import unescape
from xml.etree import ElementTree

import pytest

from flagdit.train.charts import LEFT, MOST_POINTS, WIDTH, Series, line_chart, smoothed


def points_of(svg, index=0):
    texts = re.findall(r'points="([^"]+)"', svg)
    return [tuple(map(float, p.split(","))) for p in texts[index].split()]


def ticks_of(svg, anchor):
    return re.findall(rf'text-anchor="{anchor}">([^<]+)<', svg)


def test_chart_is_well_formed_and_spans_its_frame():
    svg = line_chart([Series("loss <a>", [(1, 2.0), (2, 3.0), (3, 2.5)])], unit=" x")
    ElementTree.fromstring(svg)
    points = points_of(svg)
    assert points[0][0] == LEFT and points[-1][0] == WIDTH - 14
    assert points[1][1] < points[2][1] < points[0][1]  # higher values stand higher up
    data = json.loads(unescape(re.search(r'data-series="([^"]*)"', svg).group(1)))
    assert data[0]["name"] == "loss <a>" and data[0]["points"][1][2:] == [2, "3"] and data[0]["unit"] == " x"


def test_wide_ranges_of_positive_values_are_logarithmic():
    svg = line_chart([Series("a", [(0, 0.01), (1, 0.1), (2, 1.0)])])
    y = [p[1] for p in points_of(svg)]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert "0.1" in ticks_of(svg, "end")
    narrow = [p[1] for p in points_of(line_chart([Series("a", [(0, 1.0), (1, 2.0), (2, 3.0)])]))]
    assert narrow[0] - narrow[1] == pytest.approx(narrow[1] - narrow[2], abs=0.2)


def test_zero_is_on_the_axis_where_asked_for():
    assert "0" not in ticks_of(line_chart([Series("a", [(0, 900.0), (1, 1000.0)])]), "end")
    assert "0" in ticks_of(line_chart([Series("a", [(0, 900.0), (1, 1000.0)])], zero=True), "end")


@pytest.mark.parametrize("points", [[(5, 1.0)], [(1, 0.0), (2, 0.0)], [(1, 7.0), (2, 7.0)], [(1, -1.0), (2, 3.0)]])
def test_degenerate_data_draws(points):
    ElementTree.fromstring(line_chart([Series("a", points)]))


def test_nothing_to_draw_is_empty():
    assert line_chart([]) == "" == line_chart([Series("a", [])])


def test_long_series_are_thinned_but_keep_their_spikes():
    points = [(i, 1.0) for i in range(20_000)]
    points[12_345] = (12_345, 1.5)
    drawn = points_of(line_chart([Series("a", points)]))
    assert len(drawn) <= MOST_POINTS + 2
    assert min(y for _, y in drawn) == 12


def test_smoothing_starts_at_the_first_value_and_follows():
    flat = smoothed([(i, 3.0) for i in range(100)])
    assert all(y == pytest.approx(3.0) for _, y in flat)
    step = smoothed([(i, float(i >= 50)) for i in range(100)])
    assert step[49][1] == 0 and 0 < step[50][1] < 1 and step[99][1] > 0.99
