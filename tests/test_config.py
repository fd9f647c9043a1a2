"""Precedence, presets, help, and wrong values that name their flag."""

import dataclasses
import json

import pytest

from twdpo.config import (
    ExtractConfig,
    InputError,
    TrainConfig,
    build_parser,
    changed_settings,
    flag_name,
    parse_config,
    to_json,
)


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


def test_a_stored_config_gives_the_same_config(tmp_path):
    config = parse("--lr", "0.25", "--output-dir", "x", "--import", "a.py", "--no-sync", "--skip-bad-rows")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_json(config)))
    assert to_json(parse("--config", str(path))) | {"config": ""} == to_json(config)
    assert changed_settings(to_json(config), config) == []
    assert changed_settings(to_json(config), dataclasses.replace(config, lr=0.5, save_every=3)) == [
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
    (["--dtype", "int8"], r"--dtype is 'int8'"),
    (["--query", "all"], r"--query is 'all'"),
    (["--preset", "x"], r"--preset is 'x'"),
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


@pytest.mark.parametrize("cls", [TrainConfig, ExtractConfig])
def test_help_is_grouped_and_names_every_flag(cls):
    text = build_parser(cls, "test").format_help()
    for field in dataclasses.fields(cls):
        assert flag_name(cls, field.name) + " " in text or flag_name(cls, field.name) + "," in text
        assert field.metadata["help"] and f"{field.metadata['group']}:" in text
    assert len({field.metadata["group"] for field in dataclasses.fields(cls)}) >= 3


def test_unknown_flags_stop(capsys):
    with pytest.raises(SystemExit):
        parse("--learning-rate", "1")
    assert "--learning-rate" in capsys.readouterr().err
