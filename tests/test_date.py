"""Chat templates are programs: the date that they print is fixed for a run, and what they do wrong is one message."""

import datetime
import json
import shutil
from types import SimpleNamespace

import pytest
from processes_of_tests import run_and_die
from runs_of_tests import read_rows
from transformers.utils import chat_template_utils

import extract
import train
from twdpo.chat import Chat, render
from twdpo.models.source import load_tokenizer

DATED = "{{ strftime_now('%Y %d') }} "


def leap_day() -> str:
    return "2024-02-29"


def next_day() -> str:
    return "2024-03-01"


@pytest.fixture
def template(toy_model, tmp_path):
    """A file with the toy's template behind some text."""
    def write(text: str) -> str:
        path = tmp_path / "template.jinja"
        path.write_text(text + load_tokenizer(toy_model, "").chat_template)
        return str(path)
    return write


def test_the_date_of_a_template_is_that_of_the_chat(toy_model, template):
    tokenizer = load_tokenizer(toy_model, template(DATED))
    chat = Chat(tokenizer, date="2024-02-29")
    assert chat.prints_date and render(chat, [{"role": "user", "content": "x"}]).startswith("2024 29 ")
    assert not Chat(load_tokenizer(toy_model, "")).prints_date


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%-d.%-m.", "100%% %A, %B %d, %Y, %H:%M:%S", "%j %%d", ""])
@pytest.mark.parametrize("text", ["{{ strftime_now(FORM) }}", "\n {{ strftime_now(FORM) }}",
                                  "{% if strftime_now is defined %}{% set x = strftime_now(FORM) %}{{ x }}{% endif %}",
                                  "{% macro y() %}{{ strftime_now(FORM) }}{% endmacro %}{{ y() }}"])
def test_the_clock_that_stands_still_is_strftime(form, text, toy_model, template):
    """Of a clock that runs, transformers' own, the same day printed is the same text."""
    tokenizer = load_tokenizer(toy_model, template(text.replace("FORM", repr(form))))
    day, messages = datetime.date(2024, 2, 9), [{"role": "user", "content": "x"}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: datetime.datetime(2024, 2, 9)))
        expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert day.strftime(form) in expected
    assert render(Chat(tokenizer, date="2024-02-09"), messages) == expected


@pytest.mark.slow
def test_a_run_goes_on_on_another_day(tmp_path, template, run_arguments):
    """Its judge, its tokens and its cache are those of the first day; a new run has its own."""
    argv = run_arguments(tmp_path / "run", chat_template=template(DATED), save_every=2, cache_dir=tmp_path / "cache")
    first, second = ({"twdpo.models.source.today": day} for day in (leap_day, next_day))
    run_and_die("train", argv, "train.train_step", 4, first)
    whole = run_arguments(tmp_path / "whole", chat_template=template(DATED), cache_dir=tmp_path / "other")
    train.main([*whole, "--date", "2024-02-29"])
    run_and_die("train", [*argv, "--resume"], "train.train_step", 3, second)
    train.main([*argv, "--resume"])
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "whole")
    assert json.loads((tmp_path / "run/config.json").read_text())["date"] == "2024-02-29"
    assert len(list((tmp_path / "cache/weights").iterdir())) == 1
    train.main([*run_arguments(tmp_path / "new", chat_template=template(DATED), cache_dir=tmp_path / "cache")])
    assert len(list((tmp_path / "cache/weights").iterdir())) == 2


def test_an_extraction_is_completed_on_another_day(tmp_path, template, toy_model, run_pairs, monkeypatch, capsys):
    argv = ["--model", str(toy_model), "--data", str(run_pairs), "--judge-prompt", "short", "--out",
            str(tmp_path / "w"), "--chat-template", template(DATED)]
    for day, word in ((leap_day, "19 to extract"), (next_day, "nothing to extract")):
        monkeypatch.setattr("twdpo.models.source.today", day)
        extract.main(argv)
        printed = capsys.readouterr().out
        assert word in printed and "that of this run is 2024-02-29" in printed
    assert json.loads((tmp_path / "w/meta.json").read_text())["date"] == "2024-02-29"
    shutil.rmtree(tmp_path / "w")
    extract.main([*argv[:-2]])  # a template without a date
    assert "date" not in json.loads((tmp_path / "w/meta.json").read_text())


@pytest.mark.parametrize("text, message", [
    ("{{ 1/0 }}", "ZeroDivisionError"), ("{% for x in range(10**9) %}{% endfor %}", "OverflowError"),
    ("{{ raise_exception('no') }}", "refuses the conversation: no"), ("{{ messages[99]['content'] }}", "refuses"),
    ("{% for x in range(99999) %}{% for y in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.2 s"),
    ("{{ messages.x.y }}", "refuses"), ("{{ 'a' * (10**15) }}", "MemoryError"), ("{{ none + 1 }}", "TypeError")])
def test_what_a_template_does_wrong_is_one_message(text, message, template, tmp_path, run_arguments, capsys,
                                                   monkeypatch):
    monkeypatch.setattr("twdpo.chat.RENDER_SECONDS", 0.2)
    with pytest.raises(SystemExit) as stopped:
        train.main(run_arguments(tmp_path / "run", chat_template=template(text), loss="dpo"))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error


def test_a_date_that_is_none_is_refused(tmp_path, run_arguments, capsys):
    with pytest.raises(SystemExit):
        train.main([*run_arguments(tmp_path / "run"), "--date", "yesterday"])
    assert "--date is 'yesterday': it must be a day as YYYY-MM-DD" in capsys.readouterr().err
