"""What only a GPU can show of the reference beside the policy: its kernels' zero, what a step waits for, read-ahead."""

import pytest
import torch
from reference_of_tests import gradients, in_bfloat16, made_run, save_model
from runs_of_tests import read_rows
from test_gpu_runs import flags_of_a_run, waits_of_steps
from test_reference import LOSS, PLACES, assert_near, flags

import train
from twdpo.config import TrainConfig
from twdpo.dist import Process

pytestmark = pytest.mark.gpu


@pytest.fixture
def loss(tmp_path) -> list[str]:
    (tmp_path / "dpo_kl.py").write_text(LOSS)
    return ["--import", str(tmp_path / "dpo_kl.py"), "--loss", "dpo_kl"]


@pytest.mark.parametrize("place", PLACES)
def test_a_step_in_bfloat16_has_the_gradients_of_the_cpu(place, tmp_path, process):
    """The op of a run, not the specification: its head is gathered again for the kernels' backward pass."""
    here = Process(0, 1, torch.device("cpu"))
    directory = save_model(tmp_path / "model", hidden_size=64, head_dim=16)
    cpu = gradients(in_bfloat16(made_run(directory, here, TrainConfig(**flags(tmp_path)))), remake=False)
    config = TrainConfig(**flags(tmp_path, dtype="bfloat16", ref_states=place))
    gpu = gradients(made_run(directory, process, config), remake=False)
    assert_near({name: grad.cpu() for name, grad in gpu.items()}, cpu, 5e-2)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_starts_at_a_kl_of_exactly_0_and_waits_where_it_says(place, tmp_path, monkeypatch, loss):
    waits = waits_of_steps(monkeypatch)
    train.main([*flags_of_a_run(tmp_path, **{"max-steps": 3, "weights": "uniform", "ref-states": place}), *loss])
    rows = [row for row in read_rows(tmp_path / "run") if "loss" in row]
    assert rows[0]["kl"] == 0 < rows[-1]["kl"]
    assert [len(step) for step in waits[1:]] == [2, 2], waits
