"""Plots as SVG: their shapes, their texts for those who cannot see them, and their extremes."""

import re
from xml.etree import ElementTree

import pytest
from markupsafe import Markup

from batchserve.web.plots import bars, histogram, line

SVG = "{http://www.w3.org/2000/svg}"


def parsed(drawing: Markup) -> ElementTree.Element:
    text = str(drawing).replace("<svg ", f'<svg xmlns="{SVG[1:-1]}" ')
    return ElementTree.fromstring(text)  # noqa: S314 - our own


def numbers(element: ElementTree.Element, tag: str, name: str) -> list[float]:
    return [float(each.attrib[name]) for each in element.iter(f"{SVG}{tag}")]


def test_bars_are_as_long_as_their_counts() -> None:
    drawn = parsed(bars("species", [("setosa", 60), ("virginica", 30), ("none", 0)], 90))
    longest, half, none = numbers(drawn, "rect", "width")
    assert [half, none] == pytest.approx([longest / 2, 0])
    assert drawn.attrib["role"] == "img"
    assert drawn[0].text == "species: setosa 60, virginica 30, none 0"
    assert "60 (66.7%)" in {text.text for text in drawn.iter(f"{SVG}text")}


def test_bins_are_as_tall_as_their_counts_and_stand_on_the_ground() -> None:
    drawn = parsed(histogram("probability", [10, 0, 40, 20], 0.0, 1.0))
    heights, tops = numbers(drawn, "rect", "height"), numbers(drawn, "rect", "y")
    assert [height / max(heights) for height in heights] == pytest.approx([0.25, 0, 1, 0.5], abs=0.01)
    assert {round(top + height) for top, height in zip(tops, heights, strict=True)} == {186}
    assert "most of them from 0.5 to 0.75" in str(drawn[0].text)


def test_a_line_goes_through_its_points() -> None:
    drawn = parsed(line("speed", [(0, 50.0), (10, 100.0), (20, 0.0)], "rows/s"))
    points = drawn.find(f"{SVG}polyline")
    assert points is not None
    places = [tuple(map(float, point.split(","))) for point in points.attrib["points"].split()]
    assert [x for x, _ in places] == pytest.approx([64, 348, 632])
    assert places[1][1] < places[0][1] < places[2][1]
    assert str(drawn[0].text) == "speed: 0 to 100 rows/s"


@pytest.mark.parametrize(
    "drawing",
    [
        bars("nothing", [], 0),
        bars("zeros", [("a", 0)], 0),
        histogram("nothing", [], 0.0, 0.0),
        histogram("zeros", [0, 0], -1e300, 1e300),
        line("nothing", [], "rows/s"),
        line("one", [(5.0, 1e-9)], "rows/s"),
    ],
)
def test_extremes_are_drawn_with_finite_numbers(drawing: Markup) -> None:
    drawn = parsed(drawing)
    assert not re.search(r"nan|inf", str(drawing), re.IGNORECASE)
    assert drawn[0].text
    assert all(len(text.text or "") < 24 for text in drawn.iter(f"{SVG}text"))


def test_markup_in_names_is_text() -> None:
    drawing = bars("<b>", [("<script>alert(1)</script>", 1)], 1)
    assert "<script" not in drawing
    assert "<script>alert(1)" in str(parsed(drawing)[0].text)


def test_a_long_name_is_cut_and_told_in_full() -> None:
    drawing = bars("class", [("x" * 100, 1)], 1)
    assert "x" * 23 + "…" in drawing
    assert f"<title>{'x' * 100}: 1 (100.0%)</title>" in drawing
