"""What only a GPU can show of passes around the policy's forward: input gradients and anchors in bf16."""

import math
from statistics import median

import pytest
import torch
from models_of_tests import build
from precision_of_tests import InDouble
from runs_of_tests import read_rows
from test_anchor import ANCHORED
from test_attribution import batch_of, plain_gradients
from test_gpu_runs import CUDA, flags_of_a_run

import train
from twdpo.models.attention import ATTENTION_NAME
from twdpo.models.attribution import input_gradients
from twdpo.models.policy import Policy

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_input_gradients_are_as_exact_packed_as_alone(name):
    """Against fp64 of the same bf16 parameters, as near as plain autograd in bf16; each sequence's vector as a whole. A
    near tie of two largest logits may be decided otherwise, so it is the median over the sequences that counts."""
    exact, plain = build(name, "eager").bfloat16().double(), build(name, "eager").to(CUDA, torch.bfloat16)
    with InDouble():
        truth = plain_gradients(exact)

    def error(found: list[torch.Tensor]) -> float:
        return median(float((ours.cpu().double() - each).norm() / each.norm()) for ours, each in zip(found, truth))
    policy, allowed = Policy(build(name, ATTENTION_NAME).to(CUDA, torch.bfloat16)), error(plain_gradients(plain))
    for packs in (True, False):
        found = input_gradients(policy, batch_of(packs).to(CUDA))
        assert all(ours.dtype == torch.float32 and ours.device.type == CUDA.type for ours in found)
        assert error(found) <= 3 * allowed + 2e-2, (packs, allowed)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_run_with_anchors_and_input_gradients(tmp_path):
    """The reference is the policy at the start: the anchors' log-ratios are 0 but for rounding, their mean square from
    1 is 1; a resumed run draws the same."""
    (tmp_path / "anchored.py").write_text(ANCHORED)
    arguments = flags_of_a_run(tmp_path, **{"max-steps": 4, "save-every": 2, "loss": "anchored", "weights": "tidpo",
                                            "import": tmp_path / "anchored.py"})
    train.main(arguments)
    rows = read_rows(tmp_path / "run")
    assert rows[0]["drift"] == pytest.approx(1, abs=5e-2) and all(math.isfinite(row["loss"]) for row in rows)
    train.main([*arguments, "--resume", str(tmp_path / "run" / "checkpoints" / "step-0000002")])
    again = [row["loss"] for row in read_rows(tmp_path / "run")]
    assert again == pytest.approx([row["loss"] for row in rows], rel=2e-2)
