"""Pages can be read: contrast in light and in dark mode, and nothing that is wider than a narrow screen."""

import re

import pytest

from twdpo.pages import charts
from twdpo.pages.run import RUN_STYLE
from twdpo.pages.style import STYLE

CSS = STYLE + charts.CHART_STYLE + RUN_STYLE
PAPERS = ("paper", "panel")


def colours_of(css: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css))


def split_modes(css: str) -> tuple[str, str]:
    """(CSS outside of dark mode's blocks, inside of them)."""
    dark = re.findall(r"@media \(prefers-color-scheme: dark\) \{ (:root \{.*?\}) \}", css, re.DOTALL)
    for block in dark:
        css = css.replace(block, "")
    return css, "".join(dark)


LIGHT, DARK = (colours_of(css) for css in split_modes(CSS))


def luminance(colour: str) -> float:
    """Relative, as WCAG 2 defines it."""
    parts = [int(colour[start:start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_computed_as_wcag_does():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("mode", [LIGHT, DARK], ids=["light", "dark"])
def test_all_text_has_a_contrast_of_at_least_4_5(mode):
    """On the page and on its panels: text, links, and the names and lines of charts."""
    texts = {name for name in LIGHT if name not in (*PAPERS, "line")}
    assert {"ink", "soft", "link", "series-0", f"series-{len(charts.LIGHT) - 1}"} <= texts <= mode.keys()
    low = {(name, paper): round(contrast(mode[name], mode[paper]), 2) for name in texts for paper in PAPERS
           if contrast(mode[name], mode[paper]) < 4.5}
    assert not low


def test_text_takes_no_colour_but_those():
    """Text is `color`, and `fill` in charts; both name a variable that is checked above."""
    named = re.findall(r"(?<![\w-])(?:color|fill): ([^;}]+)", CSS)
    assert len(named) > 10
    assert {value.strip() for value in named} <= {f"var(--{name})" for name in LIGHT} | {"none"}


def test_only_tables_in_their_own_scroll_box_may_be_wider_than_a_narrow_screen():
    wide = [float(size) for size in re.findall(r"(?<![\w-])(?:min-)?width: (\d+)px", CSS)]
    assert not [size for size in wide if size > 360]
    assert "minmax(min(100%, 360px), 1fr)" in CSS and "figure svg { width: 100%;" in CSS
    assert re.search(r"\.scroll \{[^}]*overflow-x: auto", CSS) and "overflow-wrap: anywhere" in CSS
