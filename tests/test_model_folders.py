"""Folders of models that hold more, less or something else than a model: nothing in them is run, and only what is named
is read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import extract
import train
from twdpo.flags import InputError
from twdpo.models.source import fingerprint_model, locate_model, open_model


@pytest.fixture
def folder(toy_model, tmp_path) -> Path:
    """A copy of the toy's model, to be changed."""
    return Path(shutil.copytree(toy_model, tmp_path / "model"))


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def commands(folder, tmp_path, run_arguments, run_pairs):
    """Both entry points with this model."""
    flags = ["--model", str(folder), "--data", str(run_pairs), "--judge-prompt", "short", "--out", str(tmp_path / "w")]
    argv = run_arguments(tmp_path / "run", model=folder, loss="dpo", max_steps=1)
    return lambda *extra: extract.main([*flags, *extra]), lambda *extra: train.main([*argv, *extra])


@pytest.mark.parametrize("model_type", ["llama", "own"])
def test_code_that_a_folder_brings_is_never_run(model_type, folder, commands, tmp_path, capsys, monkeypatch):
    """Neither asked for on standard input nor run, whatever stands there."""
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model", "AutoTokenizer": ["mine.Model"] * 2}
    edit(folder / "config.json", auto_map=auto, model_type=model_type)
    edit(folder / "tokenizer_config.json", auto_map=auto, tokenizer_class="Mine")
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    for command in commands:
        try:
            command()
        except SystemExit as stopped:
            assert stopped.code == 2
            assert "never run here" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_never_read(folder, commands, capsys):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    for command in commands:
        with pytest.raises(SystemExit):
            command()
        assert "pickled weights never" in capsys.readouterr().err


@pytest.mark.parametrize("name, message", [("../x.safetensors", "it may name .safetensors files beside it alone"),
                                           ("/x.safetensors", "beside it alone"), (7, "beside it alone"),
                                           ("x.bin", "beside it alone"), ("x.safetensors", "which is not there")])
def test_an_index_names_files_beside_it_alone(name, message, folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=message):
        locate_model(str(folder), "--model")


def test_the_fingerprint_is_of_what_is_read(folder):
    before = fingerprint_model(folder)
    save_file({"a": torch.zeros(1)}, folder / "stray.safetensors")
    assert fingerprint_model(folder) == before
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "part.safetensors", {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    whole = fingerprint_model(folder)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] * 2}, folder / "part.safetensors")
    assert len({before, whole, fingerprint_model(folder)}) == 3


def test_tensors_without_a_place_are_named(folder, commands, capsys):
    commands[1]()
    assert "have no place" not in capsys.readouterr().out
    edit(folder / "config.json", num_hidden_layers=1)
    for command, extra in zip(commands, ([], ["--overwrite"])):
        command(*extra)
        printed = capsys.readouterr().out
        assert "9 tensors in" in printed and "model.layers.1.input_layernorm.weight" in printed and ", ..." in printed


def test_a_judge_whose_generation_config_is_odd_is_one_message(folder, commands, capsys):
    edit(folder / "generation_config.json", pad_token_id={"a": 1})
    with pytest.raises(SystemExit):
        commands[0]()
    assert f"the model in {folder} can't be loaded: TypeError" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"model_type": 7, "added_tokens": 3}', "\x00"])
def test_damaged_files_are_one_message(name, text, folder, process):
    """One that the file's own library takes is no error."""
    (folder / name).write_text(text)
    try:
        open_model(str(folder), process).chat  # noqa: B018
    except InputError as error:
        assert str(folder) in str(error)
