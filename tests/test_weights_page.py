"""The weights page of a run: it shows what the run trains with. And what all pages with shaded tokens must be: readable
in light and dark, narrow, and with keys and without."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_report import Letters, Stored, answer, page_of
from test_show import make_example
from tokenizers_of_tests import byte_level

import extract
import train
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.losses import LOSSES
from twdpo.objective import bind_objective
from twdpo.pages.pairs import describe_pair, render_pairs
from twdpo.pages.show import token_weights
from twdpo.pages.style import STYLE
from twdpo.pages.tokens import CLASSES, CUT, DARKEST, KINDS, MOST_OPAQUE, TOKENS_STYLE, draw_pairs
from twdpo.pages.weights import layer_contexts, page_of_run, piece_ratios, render_page, write_run_weights
from twdpo.pairs import Pair
from twdpo.postprocess import attention_weights
from twdpo.weights import WEIGHTS, WeightContext
from twdpo.weights_file import JudgedAnswer, WeightsFile

LONG = Pair((("user", "what?"),), " ".join(f"word{place}" for place in range(40)), "no <b>", "x:1")
TOKENIZER = byte_level()
CHAT = Chat(TOKENIZER)


def judge(pair: Pair) -> Stored:
    """The whole answers in the tokenizer's own tokens, the later the heavier, in layers 1 and 2 (their squares)."""
    judged = []
    for text in (pair.chosen, pair.rejected):
        encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
        mass_J = np.arange(1.0, len(encoded["input_ids"]) + 1)
        layers = np.stack([np.stack([mass_J ** power] * 2) / (mass_J ** power).sum() for power in (1, 2)])
        judged.append(JudgedAnswer(np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"]),
                                   layers.astype(np.float32)))
    return Stored({pair.key: tuple(judged)})


def of_run(example, source=WEIGHTS["attention"], **settings):
    """The page of a run on this pair."""
    config = TrainConfig(**{"model": "m", "data": "d", "layer": "1,2", "loss": "twdpo"} | settings)
    context = WeightContext(config, attention=judge(example.pair))
    objective = bind_objective(LOSSES["twdpo"], source, source.__name__)
    return page_of_run([example], objective, context, CHAT), token_weights(example, objective, context)


def test_what_is_cut_before_training_is_struck_through_and_the_weights_are_of_what_is_left():
    """n a of the page are those of `attention_weights` on the response as it was cut, which sum to n; figures too."""
    whole = make_example(TOKENIZER, LONG)
    example = make_example(TOKENIZER, LONG, max_length=len(whole.prompt_ids) + 12, max_prompt_length=300)
    page, _ = of_run(example)
    chosen, rejected = page.pairs[0].answers
    expected_N = 12 * attention_weights(example.chosen, judge(LONG)[LONG.key][0], TrainConfig(
        model="m", data="d", layer="1,2"))
    shown = [weight for piece in chosen.pieces for weight in piece.weights or ()]
    assert shown == pytest.approx(expected_N, rel=1e-5) and sum(shown) == pytest.approx(12)
    kept = "".join(piece.text for piece in chosen.pieces if piece.ids)
    assert chosen.pieces[-1] == replace(chosen.pieces[-1], kind=CUT, text=LONG.chosen[len(kept):], ids=(), weights=None)
    assert rejected.pieces[-1].kind == "end of turn" and rejected.pieces[-1].weights == (1.0,)
    assert page.report["sides"]["chosen"]["length"] == 12
    assert page.report["sides"]["chosen"]["max"] == pytest.approx(max(expected_N) / 12)
    body = render_page(page)
    assert f'<span class="cut" title="cut">{LONG.chosen[len(kept):]}</span>' in body and KINDS[CUT] in body
    assert "no end of turn" in body and "chosen, 12 tokens" in body
    assert 'class="cut"' not in render_page(of_run(whole)[0])
    assert "12 tokens, cut" in re.sub("<[^>]*>", "", draw_pairs([("", page.pairs[0].answers)]).replace("</text>", " "))


def test_an_answer_that_lost_the_end_of_its_turn_alone_is_called_cut_too():
    whole = make_example(TOKENIZER, LONG)
    length = len(whole.prompt_ids) + len(whole.chosen.ids)
    body = render_page(of_run(make_example(TOKENIZER, LONG, max_length=length - 1, max_prompt_length=300))[0])
    assert "no end of turn" in body and 'class="cut"' not in body
    assert "no end of turn" not in render_page(of_run(whole)[0])


@pytest.mark.parametrize("settings", [{}, {"sink_k": 0}, {"layer": "1+2"}, {"sink_on": "judge", "unseen": "zero"},
                                      {"judge_rounds": "normalized"}, {"length_normalize": True, "beta": 2.0}])
def test_the_page_shows_what_the_loss_multiplies_with_whatever_the_settings(settings):
    page, trained = of_run(make_example(TOKENIZER, LONG), **settings)
    for answer_shown, expected_N in zip(page.pairs[0].answers, trained):
        assert [weight for piece in answer_shown.pieces for weight in piece.weights or ()] == pytest.approx(expected_N)


def test_other_sources_have_a_page_too_and_what_is_made_while_training_or_is_1_has_none(tmp_path):
    def rising(batch, context):
        return torch.cat([torch.arange(1.0, num + 1) for num in batch.seq_lens_S.tolist()])

    def hidden(batch, context):
        raise AssertionError
    hidden.needs = ("hidden",)
    example = make_example(TOKENIZER, LONG)
    context = WeightContext(TrainConfig(model="m", data="d"))
    for source, made in ((rising, True), (hidden, False), (WEIGHTS["uniform"], False)):
        folder = tmp_path / source.__name__
        write_run_weights(folder, [example], bind_objective(LOSSES["dpo"], source, source.__name__), context, CHAT)
        assert folder.exists() == made
    report = json.loads((tmp_path / "rising/report.json").read_text())
    num = len(example.chosen.ids)
    assert report["sides"]["chosen"]["delta"] == pytest.approx(2 * num / (num + 1) - 1) and report["layers"] == []
    body = (tmp_path / "rising/weights.html").read_text()
    assert "the weights of rising" in body and "shades: what is trained." in body and "<dt>sink_k" not in body


def test_layers_that_are_stored_are_weighed_as_if_the_run_named_them(tmp_path, run_arguments, run_pairs, toy_model):
    """A run on a layer of a file of three, answers cut: the page's other choices are the weights of runs on those."""
    extract.main(["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", "short", "--layers", "all",
                  "--rollout", "--out", str(tmp_path / "w")])
    chosen = {}
    for layer in ("2", "rollout", "1,2"):
        out = tmp_path / f"run-{layer}"
        train.main(run_arguments(out, weights=tmp_path / "w", layer=layer, max_steps=1, max_length=48,
                                 max_prompt_length=32))
        body = (out / "weights/weights.html").read_text()
        names = re.findall("<option>(.*?)</option>", body)
        (data,) = re.findall('<script type="application/json" id="weights">(.*?)</script>', body)
        chosen[layer] = {name: [each[place] for each in json.loads(data)] for place, name in enumerate(names)}
    assert list(chosen["2"]) == ["layer 2, as trained", "layer 1", "rollout"]
    assert list(chosen["1,2"]) == ["mean of layers 1, 2, as trained", "layer 1", "layer 2", "rollout"]
    assert chosen["2"]["rollout"] == chosen["rollout"]["rollout, as trained"] != chosen["2"]["layer 1"]
    assert chosen["1,2"]["layer 2"] == chosen["rollout"]["layer 2"] == chosen["2"]["layer 2, as trained"]
    facts = dict(re.findall("<dt>(.*?)</dt><dd>(.*?)</dd>", body[:body.index("What the names mean")]))
    assert facts["weights"] == f"attention, of {tmp_path / 'w'}" and facts["max_length"] == "48"
    assert facts["layer"] == "mean of layers 1, 2" and 'href="../report.html"' in body and 'class="cut"' in body


def test_of_a_weights_file_a_few_pairs_can_be_read(tmp_path, run_pairs, toy_model):
    extract.main(["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", "short", "--out",
                  str(tmp_path / "w")])
    every = WeightsFile(tmp_path / "w")
    key = next(iter(every._answers))
    few = WeightsFile(tmp_path / "w", keys={key})
    assert list(few._answers) == [key] and (few[key][1].attention_LRJ == every[key][1].attention_LRJ).all()
    assert few[key][1].attention_LRJ.base is None and list(WeightsFile(tmp_path / "w", keys={key + 1})._answers) == []
    # A source of two judge prompts has no choice of layers: those of the other prompt would stay.
    context = WeightContext(TrainConfig(model="m", data="d", layer="1"), attention=every)
    for name, layers in (("attention", ["1", "2"]), ("attention_contrast", ["1"])):
        objective = bind_objective(LOSSES["twdpo"], WEIGHTS[name], name)
        assert list(layer_contexts(objective, context, {key})) == layers


# ----------------------------------------------------------------------------------------------------------------------
# All pages with shaded tokens

def colours(dark: bool) -> dict[str, tuple[float, ...]]:
    """The custom properties of the pages' style as RGB."""
    found = {}
    for style in (STYLE, TOKENS_STYLE):
        plain, _, rest = style.partition("@media (prefers-color-scheme: dark)")
        for text in [plain] + [rest.partition("} }")[0]] * dark:
            for name, value in re.findall(r"--(\w+): (#[0-9a-f]{6}|\d+, \d+, \d+);", text):
                parts = [value[place:place + 2] for place in (1, 3, 5)] if value[0] == "#" else value.split(", ")
                found[name] = tuple(int(part, 16 if value[0] == "#" else 10) for part in parts)
    return found


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2's contrast ratio of two RGB colours."""
    lights = []
    for colour in (one, other):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
                  for part in (each / 255 for each in colour)]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


def blend(mark: tuple[float, ...], paper: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    return tuple(alpha * above + (1 - alpha) * below for above, below in zip(mark, paper))


def test_contrast_is_computed_as_by_wcag():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_the_darkest_shade_and_everywhere(dark):
    found = colours(dark)
    assert contrast(found["ink"], found["paper"]) > 14 and (sum(found["paper"]) < 100) == dark
    for ground in (found["paper"], found["panel"]):
        assert contrast(found["ink"], blend(found["mark"], ground, MOST_OPAQUE)) >= 4.5
        assert contrast(found["soft"], ground) >= 4.5  # cut text, and notes
        assert contrast(blend(found["mark"], ground, MOST_OPAQUE), ground) >= 2.5  # and the shade can be seen


def test_text_can_be_read_on_the_darkest_shade_of_the_picture():
    picture = draw_pairs([])
    ink, mark, paper = (tuple(int(code[place:place + 2], 16) for place in (0, 2, 4)) for code in (
        re.search(rf"{name}\{{fill:#(\w+)", picture)[1] if name[0] == "." else
        re.search(r'rx="8" fill="#(\w+)"', picture)[1] for name in (".ink", ".shade", "paper")))
    assert contrast(ink, blend(mark, paper, MOST_OPAQUE)) >= 4.5


def pages() -> dict[str, str]:
    """A page of a run, of an extraction and of pairs, with what is hard to lay out."""
    pair = replace(LONG, messages=(("user", "long" * 200),), chosen="unbroken" * 60, where="folder/" * 40)
    example = make_example(TOKENIZER, pair, max_length=1400, max_prompt_length=1300)
    stored = Stored({pair.key: (answer([0.1] * 5, [0.1] * 5), answer([0.1] * 5, [0.1] * 5))})
    run, trained = of_run(example)
    return {"run": render_page(run), "extraction": render_page(page_of(stored, [pair])),
            "pairs": render_pairs("p" * 200, "attention", [describe_pair(CHAT, example, trained)], "report.html")}


@pytest.mark.parametrize("name", ["run", "extraction", "pairs"])
def test_tables_scroll_in_boxes_of_their_own_and_long_words_wrap(name):
    page = pages()[name]
    style, body = page.split("</style>")
    assert len(re.findall("<table", body)) == len(re.findall(r'class="scroll">(?:<h2>[^<]*</h2>)?<table', body)) > 0
    assert 'content="width=device-width, initial-scale=1"' in page and "<pre" not in body and "<img" not in body
    for rule in (r"body \{[^}]*overflow-wrap: break-word", r"\.answer \{[^}]*overflow-wrap: anywhere",
                 r"\.prompt \{[^}]*overflow-wrap: anywhere", r"\.scroll \{ overflow-x: auto", r"dd \{[^}]*anywhere",
                 r"max-width: 720px\) \{[^@]*\.sides \{ grid-template-columns: 1fr"):
        assert re.search(rule, style), rule


@pytest.mark.parametrize("name", ["run", "extraction", "pairs"])
def test_figures_need_no_pointer_and_the_page_no_script(name):
    """Shades and titles are in the page itself; what only a script can do is hidden without it; an answer is one stop
    of the Tab key; the key shows shades and says what 1 is."""
    page = pages()[name]
    body = page.split("</style>")[1]
    assert body.count('<div class="answer" tabindex="0"') == 2 and '<div id="foot" hidden>' in body
    assert body.index('id="choice"') > body.index('id="foot"') if "<select" in body else True
    assert 'foot.hidden = false' in body and "onclick" not in body and not re.search(r"https?:|src=|<link", page)
    assert "1 is what every token has in plain DPO" in body and '--a:0.170">1: plain DPO<' in body
    assert f'--a:{MOST_OPAQUE:.3f}">{DARKEST:g} and more<' in body
    assert len(re.findall(r'<span[^>]* style="--a:[\d.]+" title="[^"]*n\u00b7a [^"]+"', body)) >= 7


def test_every_kind_of_token_has_a_mark_and_words_for_it():
    assert KINDS.keys() == CLASSES.keys()
    for classes in CLASSES.values():
        assert all(f".answer .{name} {{" in TOKENS_STYLE for name in classes.split())


def test_pieces_of_several_tokens_have_their_mean():
    example = make_example(TOKENIZER)
    num = len(example.chosen.ids)
    chosen = describe_pair(CHAT, example, (np.arange(num) / 100, None)).answers[0]
    values, place = piece_ratios(chosen, np.arange(num) / 100), 0
    for piece, value in zip((piece for piece in chosen.pieces if piece.ids), values, strict=True):
        assert value == pytest.approx(np.mean(np.arange(place, place + len(piece.ids))), abs=0.51)
        place += len(piece.ids)
    assert len(values) < num and Letters().decode([10]) == "a"
