"""Precedence, presets, help, and wrong values that name their flag."""

import dataclasses
import json
import typing

import pytest

import extract
import train
from twdpo.config import PRESETS, ExtractConfig, TrainConfig, parse_config
from twdpo.flags import GROUPS, InputError, build_parser, changed_settings, choices_of, flag_name, to_json
from twdpo.objective import settings_of_loss


def parse(*argv, cls=TrainConfig):
    return parse_config(cls, list(argv), "test")


def test_precedence_is_default_preset_file_flag(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"lr": 0.5, "beta": 0.25, "epochs": 7}))
    config = parse("--config", str(path), "--beta", "0.125")
    assert (config.beta, config.lr, config.epochs) == (0.125, 0.5, 7)
    assert config.preset == "toy" and config.judge_prompt == "short"  # the preset
    assert config.max_grad_norm == 1.0  # the default


def test_paper_defaults():
    config = parse("--model", "meta-llama/Meta-Llama-3-8B-Instruct")
    assert config.data == "princeton-nlp/llama3-ultrafeedback" and config.preset == "paper"
    assert (config.beta, config.lr, config.batch_size, config.epochs) == (5e-3, 1e-6, 32, 1)
    assert (config.max_length, config.max_prompt_length, config.eval_every) == (2048, 1800, 500)
    assert (config.warmup_ratio, config.max_grad_norm) == (0.1, 1.0)
    assert config.sink_k == 1 and config.sink_k_min == 5 and config.judge_prompt == "paper"


def test_length_normalize_changes_the_default_beta_alone():
    assert parse("--length-normalize").beta == 2.0
    assert parse("--length-normalize", "--beta", "0.5").beta == 0.5
    with pytest.raises(InputError, match="--preset tuned --length-normalize: no beta is known"):
        parse("--preset", "tuned", "--length-normalize")
    assert parse("--preset", "tuned", "--length-normalize", "--beta", "0.5").beta == 0.5


def test_a_stored_config_gives_the_same_config(tmp_path):
    config = parse("--lr", "0.25", "--output-dir", "x", "--import", "a.py", "--no-sync", "--skip-bad-rows")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(config)))
    assert to_json(parse("--config", str(path))) | {"config": ""} == to_json(config)
    assert changed_settings(to_json(config), config) == []
    assert changed_settings(to_json(config), dataclasses.replace(config, lr=0.5, save_every=3, head_cache_gib=0.5)) == [
        "--lr: was 0.25, is 0.5"]


@pytest.mark.parametrize("values, message", [
    ({"learning_rate": 1}, "unknown key 'learning_rate'"),
    ({"lr": "fast"}, "lr is 'fast', it must be a float"),
    ({"batch_size": 2.5}, "batch_size is 2.5, it must be a int"),
    ({"overwrite": 1}, "overwrite is 1, it must be a bool"),
    ([], "one JSON object"),
])
def test_wrong_config_files(values, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        parse("--config", str(path))


def test_integers_serve_as_floats_in_config_files(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"lr": 1}')
    assert parse("--config", str(path)).lr == 1.0


@pytest.mark.parametrize("argv, message", [
    (["--beta", "0"], r"--beta is 0.0: it must be > 0"),
    (["--batch-size", "0"], r"--batch-size is 0"),
    (["--eval-fraction", "1"], r"--eval-fraction is 1.0"),
    (["--max-length", "10", "--max-prompt-length", "10"], r"--max-length is 10: it must be more than"),
    (["--batch-size", "many"], r"--batch-size is 'many': it must be a whole number"),
    (["--lr", "1e"], r"--lr is '1e': it must be a number"),
    (["--head-cache-gib", "-0.5"], r"--head-cache-gib is -0.5: it must be a finite number >= 0"),
    (["--sink-k", "-1"], r"--sink-k is -1: it must be a finite number >= 0"),
    (["--preset", "x"], r"--preset is 'x': it must be paper, authors, toy, tuned, tuned-base or tuned-v0.2"),
    (["--resume", "--overwrite", "--output-dir", "x"], r"contradict"),
    (["--data", "x.jsonl"], r"--model"),
    (["--model", "x"], r"--data"),
    (["--config", "missing.json"], r"missing.json"),
])
def test_wrong_values_name_the_flag(argv, message):
    with pytest.raises(InputError, match=message):
        parse(*argv)


def test_extract_needs_a_folder():
    with pytest.raises(InputError, match="--out"):
        parse(cls=ExtractConfig)
    assert parse("--out", "x", cls=ExtractConfig).layers == "last"


def test_resume_alone_means_auto():
    assert parse("--resume", "--output-dir", "x").resume == "auto"
    assert parse("--resume", "a/b").resume == "a/b" and parse().resume == ""


SHARED = """
--cache-dir --chat-template --columns --config --data --date --empty-answers --eval-data --fold-system --judge-attention
--judge-batch-tokens --judge-cut --judge-dtype --judge-heads --judge-max-length --judge-prompt --judge-query
--judge-question --judge-rounds --judge-sharding --judge-spans --judge-strip --model --preset --skip-bad-rows
--templated"""
FLAGS = {TrainConfig: SHARED + """
--align --aux-model --aux-prompts --batch-size --beta --checkpointing --compile --dtype --epochs --eval-every
--eval-fraction --head-cache-gib --help-losses --import --keep-last --layer --leave-out --length-normalize --loss
--loss-options --lr --max-grad-norm --max-length --max-prompt-length --max-steps --micro-batch-tokens --multiplier
--no-sync --output-dir --overwrite --packing --plan --profile --ref-states --renormalize --replicate --resume --sample
--save-dtype --save-every --seed --show --sink-k --sink-k-min --sink-on --token-stats --unseen --wandb --warmup-ratio
--weight-decay --weights --weights-options --weights-tokenizer""",
         ExtractConfig: SHARED + """
--export --layers --out --report --report-min-count --report-pairs --rollout --verbalized"""}


@pytest.mark.parametrize("cls", FLAGS)
def test_the_flags_are_these(cls):
    """What belongs to one loss or source is its option, and no new flag."""
    names = set(build_parser(cls, "test", cls is TrainConfig)._option_string_actions) - {"-h", "--help"}
    names -= {"--no-" + name.removeprefix("--") for name in names}
    assert sorted(names) == sorted(FLAGS[cls].split()) and len(names) <= 79


@pytest.mark.parametrize("cls, script", [(TrainConfig, train), (ExtractConfig, extract)])
def test_help_fits_a_screen(cls, script, capsys):
    """Grouped, with every flag, its choices, its default, and of a switch the name that changes something."""
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) <= 110 and max(map(len, text.splitlines())) <= 110
    titles = [title for title in GROUPS.values() if f"\n{title}:\n" in text]
    assert len(titles) >= 4 and sorted(titles, key=lambda title: text.index(f"\n{title}:\n")) == titles
    words = " ".join(text.split())
    for field in dataclasses.fields(cls):
        name, kind = flag_name(cls, field.name), typing.get_type_hints(cls)[field.name]
        choices = ",".join(filter(None, choices_of(kind)))
        if kind is bool and field.default:
            name = "--no-" + name.removeprefix("--")
        shown = {bool: ""}.get(kind, f" {{{choices}}}" if choices else "")
        assert text.count(f"\n  {name}{shown} ") == 1
        default = "" if kind is bool or field.default == "" else f" [{field.default}]"
        assert f" {field.metadata['help']}{default}" in words
    assert "--no-skip-bad-rows" not in text and "  --renormalize" not in text
    assert ("--help-losses" in text.splitlines()[-1]) is (cls is TrainConfig)


def test_switches_can_be_turned_both_ways(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"compile": True, "renormalize": False}))
    assert parse("--config", str(path)).compile and not parse("--config", str(path)).renormalize
    config = parse("--config", str(path), "--no-compile", "--renormalize")
    assert not config.compile and config.renormalize and not parse("--no-renormalize").renormalize


CHOICES = [(cls, field.name, choices_of(typing.get_type_hints(cls)[field.name]))
           for cls in FLAGS for field in dataclasses.fields(cls)
           if choices_of(typing.get_type_hints(cls)[field.name])]


@pytest.mark.parametrize("cls, name, choices", CHOICES)
def test_choices_are_accepted_and_all_else_is_refused(cls, name, choices, tmp_path):
    """As a flag, from a file, and by the class: one line with the flag, the value, and what it may be."""
    flag, path = flag_name(cls, name), tmp_path / "config.json"
    out = [] if cls is TrainConfig else ["--out", "x"]

    def results(value):
        path.write_text(json.dumps({name: value}))
        yield lambda: parse(*out, flag, value, cls=cls)
        yield lambda: parse(*out, "--config", str(path), cls=cls)
        yield lambda: cls(**{name: value}, **({"out": "x"} if out else {}))
    for choice in choices:
        for make in results(choice):
            assert getattr(make(), name) == choice or not choice
    named = [choice for choice in choices if choice]
    for make in results("auto-on"):
        with pytest.raises(InputError) as error:
            make()
        assert str(error.value) == f"{flag} is 'auto-on': it must be {', '.join(named[:-1])} or {named[-1]}"
    path.write_text(json.dumps({name: [1]}))
    with pytest.raises(InputError, match=rf"{flag} is \[1\]: it must be "):
        parse(*out, "--config", str(path), cls=cls)


def test_presets_are_the_choices():
    assert set(choices_of(typing.get_type_hints(TrainConfig)["preset"])) == PRESETS.keys() | {""}


def test_a_loss_brings_its_options_and_given_ones_stand_above():
    def options(*argv):
        return parse_config(TrainConfig, ["--loss", "robust", *argv], "test", settings_of_loss).loss_options
    assert options() == "label_smoothing=0.1"
    assert options("--loss-options", "label_smoothing=0.2") == "label_smoothing=0.2"


@pytest.mark.parametrize("argv", [["--import", "FILE", "--help-losses"], ["--help-losses", "--import", "FILE"]])
def test_the_tables_of_losses_hold_those_of_import(argv, tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("""
from twdpo.losses import LOSSES
def odd(ratio_S, logps_N, batch, config, *, edge: float = 2.5):
    'An odd loss.'
LOSSES["odd"] = odd
""")
    argv = [str(path) if part == "FILE" else part for part in argv]
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.index("\n  twdpo ") < text.index("\n  odd ") < text.index("\n  attention ")
    assert "An odd loss; edge=2.5; ref" in text and "gamma_ratio=0.25, form=sigmoid|hinge" in text
    path.write_text("1 / 0")
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2 and capsys.readouterr().err == (
        f"train.py: error: --import {path}:1: ZeroDivisionError: division by zero\n")


def test_unknown_flags_stop(capsys):
    with pytest.raises(SystemExit):
        parse("--learning-rate", "1")
    assert "--learning-rate" in capsys.readouterr().err
