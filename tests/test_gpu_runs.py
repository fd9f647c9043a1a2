"""What only a GPU can show of attention and of whole runs: the kernels behind twdpo.models.varlen, the allocator, where
a step waits. (tests/test_varlen.py and tests/test_host_waits.py hold what a CPU can show of the same.)"""

import copy
import json
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from models_of_tests import IN_ONE_CALL, build
from precision_of_tests import InDouble
from runs_of_tests import read_rows
from test_packing import EXAMPLES, run
from test_varlen import groups

import train
from twdpo.batch import collate
from twdpo.models import attention, varlen
from twdpo.models.attention import ATTENTION_NAME, JudgeCapture, Layout, attention_forward, judge_forward
from twdpo.models.build import use_fused_norms
from twdpo.models.policy import Policy
from twdpo.rows import MicroBatch, pack

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


class Calls:
    """How often each way of attention is called; `varlen_attn` and SDPA go on as they are."""

    def __init__(self, monkeypatch):
        self.varlen = self.sdpa = 0
        self.functions = varlen.varlen_attn, F.scaled_dot_product_attention
        monkeypatch.setattr(varlen, "varlen_attn", self.count_varlen)
        monkeypatch.setattr(F, "scaled_dot_product_attention", self.count_sdpa)

    def count_varlen(self, *args, **options):
        self.varlen += 1
        return self.functions[0](*args, **options)

    def count_sdpa(self, *args, **options):
        self.sdpa += 1
        return self.functions[1](*args, **options)


@pytest.fixture
def calls(monkeypatch) -> Calls:
    varlen.takes_grouped_heads(CUDA)  # it calls too, once a process
    return Calls(monkeypatch)


@pytest.fixture(autouse=True)
def without_cudnn():
    """As in a run: every length would cost a plan."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


def by_sequence(monkeypatch) -> None:
    monkeypatch.setattr(attention, "can_attend_rows", lambda *_: False)


def on_gpu(name: str, packs: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probs, gradients) of a policy in bf16."""
    policy = Policy(build(name, ATTENTION_NAME).to(CUDA, torch.bfloat16))
    batch = collate(MicroBatch((0, 1, 2, 3)), EXAMPLES, [0, 1, 2, 3], packs=packs).to(CUDA)
    logps_N = policy(batch).logps_N
    (logps_N * torch.linspace(-1, 1, len(logps_N), device=CUDA)).sum().backward()
    return logps_N.detach(), {key: parameter.grad for key, parameter in policy.named_parameters()
                              if parameter.grad is not None}


def exact(name: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same on the CPU, in fp64 from the same bf16 parameters."""
    policy = Policy(build(name, ATTENTION_NAME).bfloat16().double())
    with InDouble():
        return run(policy, False)


@pytest.mark.parametrize("name", IN_ONE_CALL)
def test_packed_plain_and_by_sequence_agree_in_bfloat16(name, calls, monkeypatch):
    """Each is as near to fp64 as SDPA by sequence is, whole vectors compared."""
    found = {("at once", packs): on_gpu(name, packs) for packs in (True, False)}
    assert (calls.varlen, calls.sdpa) == (6, 0)
    by_sequence(monkeypatch)
    plain_way = on_gpu(name, True)
    assert calls.varlen == 6 and calls.sdpa > 0
    truth_N, truth_grads = exact(name)

    def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
        return float((ours.cpu().double() - truth).norm() / truth.norm())
    for way, (logps_N, grads) in found.items():
        assert error(logps_N, truth_N) <= 2 * error(plain_way[0], truth_N) + 1e-3, way
        for parameter, truth in truth_grads.items():
            if truth.norm():
                allowed = 3 * error(plain_way[1][parameter], truth) + 5e-2  # kernels round their outputs apart
                assert error(grads[parameter], truth) <= allowed, (way, parameter)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_judges_agree_in_bfloat16(name, calls, monkeypatch):
    row = pack([[ids % 97 for ids in group] for group in groups((15, 15), (9, 9), (20,), shared=6)])

    def judged() -> list[torch.Tensor]:
        capture = JudgeCapture(row, frozenset([0, 2]))
        decoder = build(name, ATTENTION_NAME).to(CUDA, torch.bfloat16).get_decoder()
        return [judge_forward(decoder, capture, 3), *map(torch.cat, (capture.rows[0], capture.rows[2]))]
    ours = judged()
    assert (calls.varlen, calls.sdpa) == (3, 0)
    by_sequence(monkeypatch)
    for one, other in zip(ours, judged()):
        assert (one.float() - other.float()).norm() <= 3e-2 * other.float().norm()


def attend(lengths: list[int]) -> None:
    """Forward and backward of one layer's attention over a packed row of sequences of these lengths."""
    num_tokens, place = sum(lengths), 0
    ranges = []
    for length in lengths:
        ranges.append(((place, place + length),))
        place += length
    query, key, value = (torch.randn(1, num_tokens, heads, 64, device=CUDA, dtype=torch.bfloat16).transpose(1, 2)
                         .requires_grad_() for heads in (8, 2, 2))
    module = type("Module", (), {"layer_idx": 0, "config": None})
    attention_forward(module, query, key, value, None, layout=Layout(tuple(ranges)))[0].sum().backward()


def test_forty_lengths_are_one_call_as_forty_of_one_length_are(calls):
    attend([300] * 40)
    attend([*range(300, 340)])
    assert (calls.varlen, calls.sdpa) == (2, 0)


def test_grouped_heads_are_tried_once_and_either_way_is_right(monkeypatch, calls):
    varlen.takes_grouped_heads.cache_clear()
    takes = varlen.takes_grouped_heads(CUDA)
    assert takes == varlen.takes_grouped_heads(CUDA) and calls.varlen == (0 if varlen.NAMES_GROUPED_HEADS else 2)
    # Not by its name, but by its kernels: a torch that repeats them would only be slower.
    print(f"grouped heads are {'taken' if takes else 'repeated'}")
    row = pack(groups((12, 7), (4, 9), shared=3))
    index = varlen.index_rows(row.ranges, len(row.input_ids_T), CUDA)
    found = []
    for either in (takes, False):
        monkeypatch.setattr(varlen, "takes_grouped_heads", lambda device, either=either: either)
        generator = torch.Generator(CUDA).manual_seed(0)
        given = [torch.randn(1, len(row.input_ids_T), heads, 64, device=CUDA, generator=generator).bfloat16()
                 .transpose(1, 2).requires_grad_() for heads in (8, 2, 2)]
        output = varlen.attend_rows(*given, index, 0.2, 4)
        found.append([output.detach(), *torch.autograd.grad(output.float().square().sum(), given)])
    for one, other in zip(*found):
        assert (one.float() - other.float()).norm() <= 1e-2 * other.float().norm()


def test_a_fused_norm_is_as_exact_as_the_model_s_own():
    """Forward and backward, against fp64: torch's kernel rounds once where the model's own norm rounds twice."""
    ours = build("llama", ATTENTION_NAME).to(CUDA, torch.bfloat16).model
    plain = build("llama", ATTENTION_NAME).to(CUDA, torch.bfloat16).model
    use_fused_norms(ours)
    assert type(ours.norm) is torch.nn.RMSNorm
    numbers = torch.randn(300, 32, device=CUDA).bfloat16()
    upstream = torch.randn(300, 32, device=CUDA).bfloat16()
    found = []
    ways = (ours.norm, torch.bfloat16), (plain.norm, torch.bfloat16), (copy.deepcopy(ours.norm).double(), torch.float64)
    for module, dtype in ways:
        leaf = numbers.to(dtype).requires_grad_()
        output = module(leaf)
        found.append([output.detach(), *torch.autograd.grad(output, (leaf, module.weight), upstream.to(dtype))])
    for one, other, truth in zip(*found):
        errors = [(value.double() - truth).norm() / truth.norm() for value in (one, other)]
        assert errors[0] <= 1.5 * errors[1] + 1e-4


def flags_of_a_run(folder, **more) -> list[str]:
    flags = {"model": "toy", "data": "toy", "cache-dir": folder / "cache", "save-every": 0, "eval-fraction": 0,
             "output-dir": folder / "run"} | more
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def test_a_whole_run(tmp_path, calls):
    """Extraction, reference, bf16, fused AdamW, NCCL: the first margin is exactly 0, the loss falls, the checkpoint
    resumes and loads; nothing goes by sequence."""
    arguments = flags_of_a_run(tmp_path, **{"max-steps": 12, "save-every": 6})
    train.main(arguments)
    assert calls.varlen > 24 and calls.sdpa == 0
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert math.isclose(losses[0], math.log(2), abs_tol=1e-6) and losses[-1] < losses[0]
    assert list((tmp_path / "cache").glob("*/**/*.safetensors"))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-0000006"
    train.main([*arguments, "--resume", str(checkpoint)])
    again = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    assert again == pytest.approx(losses, rel=1e-3)
    from transformers import AutoModelForCausalLM
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final")


def test_a_compiled_run(tmp_path, calls):
    """Attention stays outside of what is compiled. Uniform weights: nothing is extracted, which is not compiled."""
    train.main([*flags_of_a_run(tmp_path, **{"max-steps": 3, "weights": "uniform"}), "--compile"])
    losses = [row["loss"] for row in read_rows(tmp_path / "run") if "loss" in row]
    # The reference and the step are compiled apart, and round apart in bf16.
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(2), abs=2e-2) and losses[-1] < losses[0]
    assert calls.varlen and not calls.sdpa


def waits_of_steps(monkeypatch) -> list[list[str]]:
    """What each step of the runs that follow waits for; it is filled as they go."""
    waits, original = [], train.train_step

    def counted(run):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                row = original(run)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append([str(warning.message) for warning in seen if "synchronizing" in str(warning.message)])
        return row
    monkeypatch.setattr(train, "train_step", counted)
    return waits


@pytest.mark.parametrize("flags", [
    ["--loss", "twdpo", "--token-stats"], ["--loss", "simpo", "--checkpointing", "full"],
    ["--loss", "kto_pair", "--no-sync", "--micro-batch-tokens", "400", "--checkpointing", "attention"],
], ids=" ".join)
def test_a_step_waits_where_it_says(flags, tmp_path, monkeypatch):
    """Twice: for its metrics and for the gradient's norm. In the first step more is read, and compiled."""
    waits = waits_of_steps(monkeypatch)
    train.main([*flags_of_a_run(tmp_path, **{"max-steps": 3, "weights": "uniform"}), *flags])
    assert [len(step) for step in waits[1:]] == [2, 2], waits


def test_the_allocator_grows_its_segments_unless_the_user_says_otherwise():
    program = ("import json, torch; from twdpo import dist; process = dist.start(); "
               "kept = torch.empty(1 << 24, device='cuda'); "
               "print(json.dumps([part['is_expandable'] for part in torch.cuda.memory_snapshot()]))")
    for setting, expected in (({}, True), ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, False)):

        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_")} | setting
        output = subprocess.run([sys.executable, "-c", program], env=environment, text=True, stdout=subprocess.PIPE,
                                check=True).stdout
        segments = json.loads(output.strip().splitlines()[-1])
        assert segments and set(segments) == {expected}
