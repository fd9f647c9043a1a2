"""Pairs as they are shown before training and on a run's page: what stands there, and what is not read for it."""

import json
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from templates_of_tests import TEMPLATES
from tokenizers_of_tests import byte_level, gemma_like, sentencepiece_like

import train
from twdpo.chat import Chat
from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.inputs import Inputs
from twdpo.losses import LOSSES
from twdpo.models import source
from twdpo.models.source import open_model
from twdpo.objective import bind_objective
from twdpo.pages.pairs import CUT_CHARACTER, describe_pair, format_pairs, render_pairs, split_text, visible
from twdpo.pages.run import write_curves
from twdpo.pages.show import first_pairs, is_weighed_ahead, token_weights
from twdpo.pages.tokens import TOKENS_SCRIPT
from twdpo.pairs import Pair
from twdpo.tokens import tokenize_pairs
from twdpo.weights import WEIGHTS, WeightContext

LLAMA = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
         "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}")
TOKENIZERS = {"byte level": byte_level, "gemma": gemma_like, "sentencepiece": lambda: sentencepiece_like(LLAMA)}
PAIR = Pair((("user", "H\u00e9 <b> \u4f60?"),), "The \U0001f642 fox\n\tjumps \u4f60\u597d.", "Hello <i>there", "x:1")


def make_example(tokenizer, pair: Pair = PAIR, max_length: int = 400, max_prompt_length: int = 300):
    (example,), bad, _ = tokenize_pairs(Chat(tokenizer), [pair], max_length, max_prompt_length)
    assert not bad
    return example


def shown(tokenizer, example, chosen=None, rejected=None):
    return describe_pair(Chat(tokenizer), example, (chosen, rejected))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_whole_text_in_whole_characters(kind):
    tokenizer = TOKENIZERS[kind]()
    example = make_example(tokenizer)
    for answer in shown(tokenizer, example).answers:
        text = "".join(piece.text for piece in answer.pieces)
        response = getattr(example, answer.side)
        assert [id for piece in answer.pieces for id in piece.ids] == answer.ids == response.ids.tolist()
        assert "\ufffd" not in text and CUT_CHARACTER not in text
        content = "".join(piece.text for piece in answer.pieces if piece.kind == "answer")
        assert content.strip() == getattr(PAIR, answer.side)
        assert answer.pieces[-1].kind == "end of turn" and f"(id {answer.ids[-1]})" in answer.remarks[0]
    joined = next(piece for piece in shown(tokenizer, example).answers[0].pieces if "\U0001f642" in piece.text)
    assert len(joined.ids) > 1  # the character is more than one token, and shows once


def test_a_part_of_a_character_is_a_mark_and_what_follows_is_whole():
    tokenizer = byte_level()
    ids = tokenizer("\u4f60 fox", add_special_tokens=False)["input_ids"]
    pieces = list(split_text(tokenizer, [], ids[1:]))  # as a cut leaves it
    assert pieces[0] == (CUT_CHARACTER, 1) and "".join(text for text, _ in pieces).endswith(" fox")


def test_what_is_cut_is_said():
    """Two tokens of the prompt, and all but three of an answer."""
    tokenizer = byte_level()
    whole = make_example(tokenizer)
    num_prompt = len(whole.prompt_ids) - 2
    example = make_example(tokenizer, max_length=num_prompt + 3, max_prompt_length=num_prompt)
    pair = shown(tokenizer, example)
    assert pair.num_cut == 2 and len(pair.prompt_ids) == num_prompt
    (remark,) = pair.answers[1].remarks
    left = len(PAIR.rejected) - example.rejected.spans_N2[-1, 1]
    num = len(whole.rejected.ids) - 3
    assert remark == (f"cut: no end of turn ({num} tokens with it), {left} of {len(PAIR.rejected)} characters not "
                      "trained")
    text = format_pairs([pair], colours=False)
    assert remark in text and f"prompt, {num_prompt} tokens, 2 more cut from its beginning" in text
    assert "end of turn  " not in text  # no such tokens


def test_reasoning_and_the_templates_tokens_are_told_apart():
    tokenizer = byte_level()
    example = make_example(tokenizer)
    content_N = example.chosen.content_N.copy()
    content_N[2] = False
    example = replace(example, chosen=replace(example.chosen, content_N=content_N, num_reasoning=2))
    pair = shown(tokenizer, example)
    kinds = [piece.kind for piece in pair.answers[0].pieces for _ in piece.ids]
    assert kinds[:4] == ["reasoning", "reasoning", "template", "answer"] and kinds[-1] == "end of turn"
    assert "2 of them reasoning" in format_pairs([pair], colours=False)
    page = render_pairs("t", "uniform", [pair])
    assert page.count('<span class="reasoning" title') == 2 and page.count('<span class="template" title') >= 2


def test_the_text_has_every_weight_and_no_colours_and_the_terminal_has_shades():
    tokenizer = byte_level()
    example = make_example(tokenizer, replace(PAIR, weight=2.0, margin=0.5))
    num = len(example.rejected.ids)
    pair = shown(tokenizer, example, np.full(len(example.chosen.ids), 0.25), np.linspace(0, 6, num))
    text = format_pairs([pair], colours=False)
    assert "\x1b" not in text and "x:1, weight 2, margin 0.5" in text and "plain DPO" in text
    table = text[text.index("rejected,"):]
    assert len(re.findall(r"(?<![\d.])\d\.\d\d", table)) == num and "6.00" in table
    coloured = format_pairs([pair], colours=True)
    assert "48;5;202m" in coloured and "0.25+0.25" in text and "0.25+0.25" not in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).count("Hello <i>there") == 1


def test_texts_of_the_data_can_steer_no_terminal_and_no_page():
    tokenizer = byte_level()
    pair = replace(PAIR, messages=(("user", "\x1b[31m<script>x</script>\u202e"),), chosen="<img src=x>\x1b[2J")
    seen = shown(tokenizer, make_example(tokenizer, pair))
    text, page = format_pairs([seen], colours=False), render_pairs("<t>", "<s>", [replace(seen, where="<w>")])
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31m" in text
    body = page.split("</style>")[1].replace(f"<script>{TOKENS_SCRIPT}</script>", "")
    assert not re.search(r"<script|<img|<link|<[tsw]>", body) and "&lt;w&gt;" in body and "&lt;script&gt;" in body
    assert body.count(">&lt;</") == 4 and "http" not in page  # "<" is a token of both answers, and in their lists
    assert visible("a\nb c\t\x07") == "a\u21b5\nb c\\t\\x07"


def test_the_page_is_light_and_dark_with_ids_that_need_no_pointing():
    tokenizer = byte_level()
    example = make_example(tokenizer)
    pair = shown(tokenizer, example, *(np.ones(len(side.ids)) for side in (example.chosen, example.rejected)))
    page = render_pairs("pairs", "uniform", [pair])
    assert "prefers-color-scheme: dark" in page and page.count("<details>") == 3
    assert f'title="end of turn, id {pair.answers[0].ids[-1]}, n\u00b7a 1"' in page and "--a:0.170" in page
    rows = re.findall(r"<tr><td><code>(.*?)</code></td><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", page)
    assert [int(id) for row in rows for id in row[2].split()] == pair.answers[0].ids + pair.answers[1].ids
    bare = render_pairs("pairs", "mine", [shown(tokenizer, example)])
    assert "mine are made while training" in bare and "--a:" not in bare.split("</style>")[1]
    assert "while training" not in page


@pytest.mark.parametrize("norm, averages", [("mean1", False), ("selected_mean", False), ("mean1", True)])
def test_weights_are_relative_to_plain_dpo(norm, averages):
    """Raw weights 1, 2, 3, ... of n tokens are shown as 2 k / (n + 1), whether the loss sums or averages."""
    def rising(batch, context):
        return torch.cat([torch.arange(1.0, num + 1) for num in batch.seq_lens_S.tolist()])
    rising.norm = norm
    example = make_example(byte_level())
    config = TrainConfig(model="x", data="x", length_normalize=averages)
    for weights_N in token_weights(example, bind_objective(LOSSES["twdpo"], rising, "r"), WeightContext(config)):
        num = len(weights_N)
        assert weights_N == pytest.approx(2 * np.arange(1, num + 1) / (num + 1), rel=1e-5)


def test_first_pairs_are_those_that_the_run_touches():
    inputs = Inputs(None, list(range(40)), [7], "", "", "")
    config = TrainConfig(model="x", data="x", batch_size=4, max_steps=2)
    touched = sorted(pair for batch in inputs.first_epoch(config) for pair in batch)
    assert first_pairs(inputs, config, 5).train == touched[:5] != list(range(5))
    assert first_pairs(inputs, replace(config, max_steps=0), 5).train == list(range(5))
    assert first_pairs(inputs, config, 5).held_out == []


@pytest.mark.parametrize("needs, ahead", [((), True), (("attention",), True), (("aux",), True), (("ref",), False),
                                          (("hidden",), False)])
def test_sources_that_need_the_policy_are_not_weighed_ahead(needs, ahead):
    def mine(batch, context):
        return None
    mine.needs = needs
    assert is_weighed_ahead(bind_objective(LOSSES["dpo"], mine, "mine")) == ahead


# ----------------------------------------------------------------------------------------------------------------------
# Whole commands

def test_show_reads_no_weights_unless_the_source_needs_them(run_arguments, toy_model, tmp_path, monkeypatch, capsys):
    """The weight files are no weight files, and nobody notices; the run in the folder stays as it is."""
    folder = tmp_path / "model"
    shutil.copytree(toy_model, folder)
    for path in folder.glob("*.safetensors"):
        path.write_text("no weights")

    def fails(_):
        raise AssertionError("the weight files were hashed")
    monkeypatch.setattr(source, "fingerprint_model", fails)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    monkeypatch.setenv("NO_COLOR", "1")
    train.main([*run_arguments(run, model=folder, weights="uniform", loss="dpo"), "--show", "2"])
    printed = capsys.readouterr().out
    assert printed.count("the turn ends with <|eot|>") == 4 and "pair 3" not in printed and "\x1b" not in printed
    page = (run / "show/show.html").read_text()
    assert page.count("<article>") == 2 and "report.html" not in page and str(run / "show/show.html") in printed
    assert (run / "config.json").read_text() == "{}" and sorted(os.listdir(run)) == ["config.json", "show"]


def test_show_judges_the_shown_pairs_alone_and_training_goes_on_from_there(run_arguments, tmp_path, capsys):
    arguments = run_arguments(tmp_path / "run", cache_dir=tmp_path / "cache", max_steps=1)
    train.main([*arguments, "--show", "2"])
    printed = capsys.readouterr().out
    assert "0 of 2 pairs stored" in printed and "2 to extract" in printed
    assert len(set(re.findall(r"(?<![\d.])\d+\.\d\d(?![\d.])", printed[printed.index("pair 1"):]))) > 10
    train.main(arguments)
    assert " 2 of " in capsys.readouterr().out
    first = (tmp_path / "run/show/show.html").read_text().split("<article>")[1]
    assert first in (tmp_path / "run/pairs.html").read_text()  # as they were trained
    assert 'href="pairs.html"' in (tmp_path / "run/report.html").read_text()


def test_weights_that_are_made_while_training_are_not_shown(run_arguments, tmp_path, capsys):
    def hidden(batch, context):
        raise AssertionError("there are no hidden states")
    hidden.needs = ("hidden",)
    WEIGHTS["mine"] = hidden
    train.main([*run_arguments(tmp_path / "run", weights="mine", loss="dpo"), "--show", "1"])
    assert "the weights of mine are made while training" in capsys.readouterr().out


def test_a_run_links_to_its_pairs_if_they_are_there(plain_run, tmp_path):
    pairs = (plain_run / "pairs.html").read_text()
    assert pairs.count("<article>") == 8 and '<a href="report.html">' in pairs
    assert '<a href="pairs.html">' in (plain_run / "report.html").read_text()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(plain_run / name, tmp_path)
    write_curves(tmp_path)
    assert "pairs.html" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("with_config", [False, True])
def test_adapters_are_refused_by_name(with_config, tmp_path, toy_model, process):
    if with_config:
        shutil.copy(toy_model / "config.json", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(InputError, match=rf"--model {tmp_path} is a PEFT adapter of some/base: .* --model some/base$"):
        open_model(str(tmp_path), process)
    path.write_text("{}")
    with pytest.raises(InputError, match="does not name its base model"):
        open_model(str(tmp_path), process)


def test_an_adapter_of_the_hub_is_refused(tmp_path, process, monkeypatch):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(InputError, match="--model me/lora is a PEFT adapter of some/base"):
        open_model("me/lora", process)


def test_what_follows_a_templated_answer_is_no_matter_of_the_template():
    header, end = "[INST] ", "<|im_end|>\n"
    pair = Pair((("user", f"{header}What?"),), f"yes{end}", f"no{end}</s>", "x:1")
    chat = Chat(byte_level(), templated=True)
    (example,), bad, _ = tokenize_pairs(chat, [pair], 400, 300)
    chosen, rejected = (answer.remarks for answer in describe_pair(chat, example, (None, None)).answers)
    assert not bad and len(chosen) == 1 and rejected[1:] == ["4 characters after it are not trained"]


@pytest.mark.parametrize("max_length", [400, 80])
def test_of_answers_that_call_tools_no_characters_are_counted(max_length):
    """What is printed of a call is longer than the answer's text."""
    tokenizer = byte_level(TEMPLATES["qwen2.5"])
    call = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "fox" * 20}}}]}
    pair = replace(PAIR, chosen="Let me look.", extras=json.dumps({"chosen": call}))
    example = make_example(tokenizer, pair, max_length, 60)
    assert example.chosen.is_cut == (max_length == 80)
    chosen, rejected = (answer.remarks for answer in shown(tokenizer, example).answers)
    assert chosen[0].startswith("cut: no end of turn (" if max_length == 80 else "the turn ends with ")
    assert "characters" not in " ".join(chosen + rejected)
