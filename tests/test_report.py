"""Statistics of the weights by hand, the page and the picture that show them, and what their names mean."""

import dataclasses
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from transformers import AutoTokenizer

import extract
from twdpo.config import ExtractConfig, TrainConfig
from twdpo.pages.figures import MEANINGS, format_report, names_of
from twdpo.pages.tokens import COLUMNS, break_lines, draw_pairs
from twdpo.pages.weights import page_of_extraction, render_page, split_judged, write_report
from twdpo.pairs import Pair
from twdpo.toy.grammar import toy_rows
from twdpo.weights_file import JudgedAnswer


class Stored:
    """A weights file of two layers in memory."""

    layers, meta = ["1", "2"], {}

    def __init__(self, answers: dict):
        self.answers = answers

    def __getitem__(self, key: int):
        return self.answers[key]

    def verdict_statistics(self, keys):
        return {"position consistency": 0.5}


def answer(*rounds: list[float]) -> JudgedAnswer:
    """One-character judge tokens; the first layer is uniform, the second has the rounds given."""
    second = np.array(rounds, dtype=np.float32)
    num = second.shape[1]
    places = np.arange(num, dtype=np.int32)
    layers = np.stack([np.full_like(second, 0.5 / num), second])
    return JudgedAnswer(places + 10, np.stack([places, places + 1], axis=1), layers)


class Letters:
    """Decodes id 10 as 'a', 11 as 'b', ..."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(87 + id) for id in ids)


PAIR = Pair((("user", "which?"),), "abcde", "ab", "x:1")
FIX = TrainConfig(model="m", data="d", sink_k=1, sink_k_min=5)


def page_of(stored: Stored, pairs: list[Pair], min_count: int = 1):
    config = ExtractConfig(model="m", data="d", out="w", report_min_count=min_count)
    return page_of_extraction(stored, pairs, Letters(), config, FIX)


@pytest.fixture
def stored() -> Stored:
    """Chosen: rounds (4, 1, 1, 1, 1)/8 and (2, 1, 3, 1, 1)/8, mean (3, 1, 2, 1, 1)/8. Rejected: (3, 1)/8 twice."""
    chosen = answer([0.5, 0.125, 0.125, 0.125, 0.125], [0.25, 0.125, 0.375, 0.125, 0.125])
    return Stored({PAIR.key: (chosen, answer([0.375, 0.125], [0.375, 0.125]))})


def test_statistics_by_hand(stored):
    """The sink fix sets a_1 = 1/5 and shares 4/5 as 1:2:1:1, so a = (.2, .16, .32, .16, .16): delta = 5 * .32 - 1. The
    rejected answer is shorter than K' = 5: a = (.75, .25), delta = 0.5."""
    report = page_of(stored, [PAIR]).report
    chosen, rejected = report["sides"]["chosen"], report["sides"]["rejected"]
    assert chosen["max"] == pytest.approx(0.32) and chosen["length"] == 5 and chosen["delta"] == pytest.approx(0.6)
    assert chosen["std"] == pytest.approx(np.std([0.2, 0.16, 0.32, 0.16, 0.16]))
    assert [chosen[f"share of token {number} before the sink fix"] for number in (1, 2, 3)] == pytest.approx(
        [0.375, 0.125, 0.25])
    assert rejected["max"] == pytest.approx(0.75) and rejected["delta"] == pytest.approx(0.5)
    first, second = report["most_weighted_tokens"]["chosen"][:2]
    assert (first["token"], second["token"]) == ("c", "a") and first["weight"] == pytest.approx(0.32)
    uniform, last = report["layers"]
    assert uniform["layer"] == "1" and uniform["share of token 1 before the sink fix"] == pytest.approx((0.2 + 0.5) / 2)
    assert uniform["attention on the answer"] == pytest.approx(0.5)
    expected = np.corrcoef(stored[PAIR.key][0].attention_LRJ[1])[0, 1]
    assert last["correlation of the rounds"] == pytest.approx((expected + 1) / 2, abs=1e-6)
    assert page_of(stored, [PAIR], min_count=2).report["most_weighted_tokens"]["chosen"] == []


def test_every_name_has_a_line_that_says_what_it_is_on_the_page_and_in_the_text(stored):
    page = page_of(stored, [PAIR])
    names = names_of(page.report)
    assert len(names) >= 10 and names[:4] == ["std", "max", "length", "delta"] and "position consistency" in names
    text, body = format_report(page.report), render_page(page)
    for name in names:
        assert f"  {name}: {MEANINGS[name]}" in text
        assert f"<dt>{name}</dt><dd>{MEANINGS[name].replace(chr(39), '&#x27;')}</dd>" in body


def test_the_page_names_what_it_is_of(stored):
    body = render_page(page_of(stored, [PAIR]))
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", body[:body.index("What the names mean")]))
    assert facts["pairs"] == "1, 1 of them shown below" and facts["judge"] == "m" and facts["data"] == "d"
    assert facts["sink_k"].startswith("1, ") and facts["layers stored"] == "1, 2" and "torch" in facts["made with"]
    assert "shades: layer 2." in body and facts["position consistency"] == "0.500" and "report.html" not in body


def test_page_escapes_what_it_shows_and_needs_no_network(stored):
    pair = Pair((("user", "<script>alert(1)</script>"),), "a<b>e", "ab", "x:1")
    stored.answers[pair.key] = stored.answers[PAIR.key]
    page = render_page(page_of(stored, [pair]))
    assert "<script>alert" not in page and "&lt;script&gt;" in page and "http" not in page and "src=" not in page
    assert "prefers-color-scheme: dark" in page and page.count('class="answer"') == 2


def test_judge_tokens_show_every_character_once_and_what_was_not_judged():
    """Two tokens of one character are one piece; a gap of spaces is nothing special, text without a token is cut."""
    spans = np.array([(0, 2), (2, 3), (2, 3), (4, 6)])
    judged = JudgedAnswer(np.arange(4), spans, np.zeros((1, 2, 4), np.float32))
    pieces = split_judged("ab\u4f60 efgh", judged, np.array([2.0, 0.5, 0.75, 1.0]))
    assert [(piece.text, piece.ids, piece.weight) for piece in pieces] == [
        ("ab", (0,), 2.0), ("\u4f60", (1, 2), 0.625), (" ", (), None), ("ef", (3,), 1.0), ("gh", (), None)]
    assert [piece.kind for piece in pieces] == ["answer"] * 4 + ["not judged"]


def test_other_layers_can_be_chosen_and_the_one_of_the_figures_is_shown(stored):
    """Chosen: a = (.2, .16, .32, .16, .16) of five tokens in layer 2, uniform in layer 1; rejected (.75, .25)."""
    body = render_page(page_of(stored, [PAIR]))
    assert re.findall("<option>(.*?)</option>", body) == ["layer 2", "layer 1"]
    (data,) = re.findall('<script type="application/json" id="weights">(.*?)</script>', body)
    assert json.loads(data) == [[[100, 80, 160, 80, 80], [100] * 5], [[150, 50], [100, 100]]]
    shades = [float(value) for value in re.findall(r'<span style="--a:([\d.]+)" title', body)]
    assert shades == pytest.approx([0.85 * ratio / 5 for ratio in (1, 0.8, 1.6, 0.8, 0.8, 1.5, 0.5)], abs=6e-4)
    stored.layers = ["2"]
    for answers in stored.answers.values():
        for each in answers:
            object.__setattr__(each, "attention_LRJ", each.attention_LRJ[1:])
    alone = render_page(page_of(stored, [PAIR]))
    assert "<option" not in alone and 'id="weights"' not in alone and "<output" in alone


def test_a_page_of_many_layers_stays_small(stored):
    """At most five bytes a token and layer beside 70 a token: 24 pairs of 300 tokens an answer in 32 layers take under
    4 MB."""
    num, layers = 300, 32
    rng = np.random.default_rng(0)
    places = np.arange(num)
    pair = Pair((("user", "which?"),), "a" * num, "b" * num, "x:1")
    stored.layers = [str(layer + 1) for layer in range(layers)]
    stored.answers = {pair.key: tuple(
        JudgedAnswer(places % 26 + 10, np.stack([places, places + 1], axis=1),
                     rng.dirichlet(np.full(num, 0.3), size=(layers, 2)).astype(np.float32)) for _ in range(2))}
    page = page_of(stored, [pair])
    tokens = 2 * num
    rest = len(render_page(dataclasses.replace(page, pairs=[])))
    assert len(render_page(page)) - rest < tokens * (5 * layers + 100)


def test_picture_is_xml_that_shows_both_answers_and_shades_by_weight(stored):
    """Chosen 'abcde' has n a = (1, .8, 1.6, .8, .8), rejected 'a<' (1.5, .5); the darkest shade is that of 5. What XML
    can't hold is a space."""
    pair = Pair((("user", "<which>\x0b & why?"),), "abcde", "a<", "x:1")
    stored.answers[pair.key] = stored.answers[PAIR.key]
    (shown,) = page_of(stored, [pair]).pairs
    root = ElementTree.fromstring(draw_pairs([(shown.prompt, shown.answers)]))
    texts = ["".join(each.itertext()) for each in root.findall(".//{*}text")]
    assert texts[:11] == ["<which>", "&", "why?", "chosen,", "5", "tokens", "abcde", "rejected,", "2", "tokens", "a<"]
    shades = [float(each.get("fill-opacity")) for each in root.findall(".//{*}rect") if each.get("class") == "shade"]
    expected = [0.85 * ratio / 5 for ratio in (1, 0.8, 1.6, 0.8, 0.8, 1.5, 0.5)]
    assert shades == pytest.approx(expected, abs=0.0051)


def test_lines_of_the_picture_hold_every_character_once():
    text = "one two\n\n" + "x" * (COLUMNS + 3) + " end " + "word " * COLUMNS
    lines = break_lines(text, COLUMNS)
    assert "".join(text[start:end] for start, end in lines) == text
    assert all(0 < end - start <= COLUMNS for start, end in lines)
    assert [text[start:end] for start, end in lines[:4]] == ["one two\n", "\n", "x" * COLUMNS, "xxx end " + 8 * "word "]


def test_report_of_an_extraction(tmp_path, toy_model, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0][:6]))
    extract.main(["--model", str(toy_model), "--data", str(path), "--judge-prompt", "short", "--layers", "all",
                  "--rollout", "--out", str(tmp_path / "w"), "--report", str(tmp_path / "report"), "--report-pairs",
                  "3", "--report-min-count", "2"])
    report = json.loads((tmp_path / "report/report.json").read_text())
    assert [layer["layer"] for layer in report["layers"]] == ["1", "2", "rollout"]
    assert report["pairs"] == 6 and len(report["most_weighted_tokens"]["chosen"]) == 10
    assert set(report["verdicts"]) == {"position consistency", "agreement with the label"}
    page = Path(tmp_path / "report/weights.html").read_text()
    assert page.count("<article") == 3
    assert len(ElementTree.parse(tmp_path / "report/weights.svg").findall(".//{*}text")) > 8
    printed = capsys.readouterr().out
    assert "most weighted in chosen" in printed and "correlation of the rounds" in printed
    assert AutoTokenizer.from_pretrained(toy_model).decode([report["most_weighted_tokens"]["chosen"][0]["id"]]) == (
        report["most_weighted_tokens"]["chosen"][0]["token"])


def test_pairs_whose_answers_call_tools_are_counted_and_not_shown(stored, tmp_path):
    """What was judged of them is what a template prints, which their texts are not."""
    calls = dataclasses.replace(PAIR, extras='{"chosen": {"tool_calls": [{"function": {"name": "look"}}]}}')
    stored = Stored({PAIR.key: stored[PAIR.key], calls.key: stored[PAIR.key]})
    config = ExtractConfig(model="m", data="d", out="w", report_min_count=1, report_pairs=9)
    text = write_report(tmp_path, stored, [PAIR, calls], Letters(), config)
    assert "of 2 pairs" in text and (tmp_path / "weights.html").read_text().count("<article") == 1
    assert calls.answers_call and not PAIR.answers_call
