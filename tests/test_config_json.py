"""config.json of a run is what the run did: settings left to it as it settled them, hub ids with their revisions."""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import pytest
from runs_of_tests import read_rows

import train
from twdpo.toy.grammar import toy_rows

MODEL_REVISION, DATA_REVISION = "a" * 40, "b" * 40


def stored(run_dir) -> dict:
    config = json.loads((run_dir / "config.json").read_text())
    assert len(config.pop("run_id")) == 16  # of this run alone
    return config


def final(run_dir) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run_dir / "final").iterdir()}


@pytest.mark.parametrize("flags, settled", [
    ({}, {"loss": "twdpo", "weights": "attention", "layer": "2", "packing": "on", "judge_max_length": 512}),
    ({"layer": "1+2", "packing": "off"}, {"weights": "attention", "layer": "1+2", "packing": "off"}),
    ({"loss": "simpo", "loss_options": "nll=0.1"}, {"weights": "uniform", "loss_options": "nll=0.1", "layer": "last"}),
], ids=["defaults", "layers", "simpo"])
def test_a_run_of_its_config_is_the_same_run(flags, settled, tmp_path, run_arguments):
    """The same rows, the same bytes, and the same config.json but for its folder."""
    train.main(run_arguments(tmp_path / "run", **flags))
    config = stored(tmp_path / "run")
    assert settled | {"dtype": "float32", "checkpointing": "none", "micro_batch_tokens": 4096,
                      "config": "", "resume": ""} | config == config
    train.main(["--config", str(tmp_path / "run/config.json"), "--output-dir", str(tmp_path / "again")])
    assert read_rows(tmp_path / "again") == read_rows(tmp_path / "run")
    assert final(tmp_path / "again") == final(tmp_path / "run")
    assert stored(tmp_path / "again") == config | {"output_dir": str(tmp_path / "again")}


def test_the_toy_is_named(tmp_path, run_cache):
    train.main(["--max-steps", "1", "--eval-fraction", "0", "--cache-dir", str(run_cache), "--weights", "uniform",
                "--output-dir", str(tmp_path / "run")])
    config = stored(tmp_path / "run")
    assert (config["model"], config["data"], config["preset"], config["beta"]) == ("toy", "toy", "toy", 0.3)


@pytest.mark.parametrize("layer, other", [("last", "1"), ("all", "2"), ("1, 2", "1+2")])
def test_a_resume_takes_over_what_the_run_settled(layer, other, tmp_path, run_arguments, capsys):
    """The command of the start goes on; another value that is named is refused."""
    argv = run_arguments(tmp_path / "run", save_every=2, max_steps=4, layer=layer)
    train.main(argv)
    rows = read_rows(tmp_path / "run")
    train.main([*argv, "--resume"])
    assert read_rows(tmp_path / "run") == rows
    with pytest.raises(SystemExit):
        train.main([*argv, "--resume", "--layer", other])
    assert f"--layer: was '{stored(tmp_path / 'run')['layer']}', is '{other}'" in capsys.readouterr().err


@pytest.fixture
def hub(toy_model, tmp_path, monkeypatch) -> list[tuple]:
    """A hub that holds the toy's model as org/model, and some of its pairs as org/pairs; what was asked of it."""
    import huggingface_hub
    asked = []

    def snapshot_download(repository, revision=None, **_):
        asked.append((repository, revision))
        folder = tmp_path / "hub/models--org--model/snapshots" / MODEL_REVISION
        shutil.copytree(toy_model, folder, dirs_exist_ok=True)
        return str(folder)

    class Split(list):
        info = SimpleNamespace(download_checksums={f"hf://datasets/org/pairs@{DATA_REVISION}/train.parquet": {}})

    def load_dataset(repository, revision=None):
        asked.append((repository, revision))
        return {"train": Split(toy_rows()[0][:12])}
    datasets = ModuleType("datasets")
    datasets.load_dataset, datasets.exceptions = load_dataset, SimpleNamespace(DatasetsError=OSError)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    return asked


def test_hub_ids_stay_ids_with_their_revisions(hub, tmp_path, run_arguments):
    argv = run_arguments(tmp_path / "run", model="org/model", data="org/pairs", weights="uniform", max_steps=2)
    train.main(argv)
    config = stored(tmp_path / "run")
    assert config["model"] == f"org/model@{MODEL_REVISION}" and config["data"] == f"org/pairs@{DATA_REVISION}"
    assert set(hub) == {("org/model", None), ("org/pairs", None)}
    hub.clear()
    train.main(["--config", str(tmp_path / "run/config.json"), "--output-dir", str(tmp_path / "again")])
    assert set(hub) == {("org/model", MODEL_REVISION), ("org/pairs", DATA_REVISION)}
    assert read_rows(tmp_path / "again") == read_rows(tmp_path / "run")
    train.main([*argv, "--resume"])  # the ids without their revisions are of the same run
    assert stored(tmp_path / "run") == config
