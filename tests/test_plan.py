"""The memory plan and the operations of a batch: counted, worked out by hand, and against what a run really holds."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models_of_tests import MODELS, build
from transformers import AutoConfig, LlamaConfig

import train
from twdpo.batch import collate
from twdpo.config import TrainConfig
from twdpo.dist import Process
from twdpo.flags import InputError
from twdpo.models import memory, varlen
from twdpo.models.attention import Layout, run_decoder
from twdpo.models.build import use_fused_norms
from twdpo.models.memory import (
    AUTOMATIC,
    CHECKPOINTING,
    MACHINES,
    FusedKernels,
    LiveBytes,
    ModelCost,
    describe_plan,
    flops,
    measure_decoder,
    model_cost,
    most_tokens,
    plan_memory,
    varlen_scratch_bytes,
)
from twdpo.pairs import Pair
from twdpo.rows import MicroBatch, pack
from twdpo.tokens import Example, Response

ROOT = Path(__file__).resolve().parent.parent
LLAMA = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, tie_word_embeddings=False)


def test_parameters_by_hand():
    cost = model_cost(LlamaConfig(**LLAMA), torch.bfloat16, 64, measure_layers=False)
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    assert (cost.layer_params, cost.layers_params, cost.head_params) == (layer, 3 * layer, 96 * 32)
    assert cost.root_params == 2 * 96 * 32 + 32 and cost.compute_bytes == 2 and cost.heads_width == 3 * 32


@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GH200 480GB", None), ("NVIDIA A10", None), ("Quadro", None),
])
def test_peak_rates_are_those_of_the_card_s_own_data_sheet(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert memory.peak_tflops(torch.device("cuda")) == peak and memory.peak_tflops(torch.device("cpu")) is None


def live_bytes_of_a_real_decoder(model, length: int) -> float:
    """What `measure_decoder` counts on meta, with real tensors: bytes a token that a forward leaves alive."""
    ids = np.arange(length, dtype=np.int32) % 90
    row = pack([[ids, np.concatenate([ids[:length // 4], ids[:length // 4 - 1:-1]])]])
    input_ids = torch.from_numpy(row.input_ids_T).long()[None]
    positions = torch.from_numpy(row.positions_T).long()[None]
    with FusedKernels(), LiveBytes([*model.parameters(), *model.buffers(), input_ids, positions]) as tally:
        hidden = run_decoder(model.get_decoder(), input_ids, positions, Layout(row.ranges))
        live = tally.live
    assert hidden.requires_grad
    return live / len(row.input_ids_T)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt_oss"])
def test_what_a_layer_saves_is_counted_on_meta_as_it_is_with_real_tensors(name, monkeypatch):
    """Attention and norms as fused kernels would keep them; all else is what a model really keeps."""
    model = build(name, "twdpo", max_position_embeddings=2048).train()
    use_fused_norms(model)
    real = live_bytes_of_a_real_decoder(model, 96)
    monkeypatch.setattr(memory, "SAMPLE_TOKENS", 512)
    saved, working = measure_decoder(model.to("meta"), 96, True)
    assert 0.9 * real < saved < 1.1 * real and working > 0


def test_experts_that_need_values_are_refused():
    config = build("gpt_oss", "eager").config
    with pytest.raises(InputError, match="gpt_oss: its memory can't be planned"):
        model_cost(config, torch.float32, 64)
    assert model_cost(config, torch.float32, 64, measure_layers=False).layers_params > 0


def test_what_attention_takes_for_itself_in_a_backward_pass_is_part_of_the_peak():
    """At its backward pass alone are alive: operands, output and its gradient, and log-sum-exps; then the scratch."""
    query, key = (torch.zeros(300, heads, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
                  for heads in (8, 2))
    offsets = torch.zeros(3, device="meta", dtype=torch.int32)
    scratch = varlen_scratch_bytes(query, key, offsets)
    assert scratch == 4 * (300 + 2 * 128) * 512 + 2 * 300 * 512 * 2
    assert varlen_scratch_bytes(query, query, offsets) == 4 * (300 + 2 * 128) * 512
    with LiveBytes([query, key, offsets]) as tally:
        output = varlen._call(query, key, key, offsets, offsets, 200, 200, 1.0, None)
        live = tally.live
        output.backward(torch.empty_like(output))
    assert tally.peak >= live + output.nbytes + scratch


def test_attention_keeps_no_map():
    """Four times the length, the same bytes a token."""
    short, long = (measure_decoder(build("llama", "twdpo").to("meta"), length, True)[0] for length in (512, 2048))
    assert long == pytest.approx(short, rel=0.02)
    with FusedKernels():
        query = torch.zeros(1, 4, 6, 8, device="meta", requires_grad=True)
        key = torch.zeros(1, 2, 6, 8, device="meta", requires_grad=True)
        output = torch.nn.functional.scaled_dot_product_attention(query, key, key.clone(), enable_gqa=True)
    output.sum().backward()
    assert output.shape == query.shape and key.grad.shape == key.shape


def test_a_tally_counts_what_is_alive():
    known = torch.zeros(1000)
    with LiveBytes([known]) as tally:
        first = torch.zeros(256)  # 1 KiB
        view = first[3:].view(-1)
        second = torch.zeros(512) + known[0]
        assert tally.live == 1024 + 2048 and len(view) == 253
        del first
        assert tally.live == 1024 + 2048  # the view keeps it
        del view, second
        assert tally.live == 0 and tally.peak >= 1024 + 2048


COST = ModelCost(params=1000, layer_params=100, layers_params=400, head_params=250, num_layers=4, hidden_size=8,
                 heads_width=32, num_heads=2, compute_bytes=2, saved_bytes=400.0, working_bytes=50.0)


def test_plan_by_hand():
    plan = plan_memory(COST, 2, 1 << 20, "none")
    assert plan["parameters (fp32)"] == 2000 and plan["Adam (fp32)"] == 4000 and plan["gradients (fp32)"] == 2000
    assert plan["gathered embedding, norm, head"] == 1200
    head = (160 << 20) + (1 << 20) * 8 * 8 + 500
    assert plan["layers and fused op"] == (1 << 20) * 450 + head + 10 * 100
    assert plan["peak"] == sum(value for name, value in plan.items() if name != "peak")
    full = plan_memory(COST, 2, 1 << 20, "full")["layers and fused op"]
    assert full == (1 << 20) * (4 * 16 + 100 + 50) + head + 10 * 100  # every layer's input, one layer whole
    selective = plan_memory(COST, 2, 1 << 20, "selective")["layers and fused op"]
    assert selective == (1 << 20) * (2 * 100 + 2 * 16 + 100 + 50) + head + 10 * 100
    attention = plan_memory(COST, 2, 1 << 20, "attention")["layers and fused op"]
    assert attention == full + (1 << 20) * (32 * 2 + 4 * 2 * 4)  # and every layer's outputs of attention
    assert plan_memory(COST, 2, 1 << 20, "none", no_sync=True)["gradients (fp32)"] == 4000
    assert plan_memory(COST, 8, 1 << 20, "none", shards=4)["parameters (fp32)"] == 1000
    alone = plan_memory(replace(COST, compute_bytes=4), 1, 1 << 20, "none")  # fp32 in one process: nothing is gathered
    assert alone["gathered embedding, norm, head"] == 0 and alone["gradients (fp32)"] == 4000
    assert alone["layers and fused op"] == (1 << 20) * 450 + (160 << 20) + (1 << 20) * 8 * 12 + 1000


def test_the_plan_counts_the_heads_cache_and_no_more_of_it_than_the_logits_fill():
    vocabulary = 250 / 8
    for gib, counted in ((1e-3, 1e-3 * 2**30), (8.0, (1 << 20) * 2 * vocabulary)):
        without, plan = (plan_memory(COST, 2, 1 << 20, "full", head_cache_gib=cache) for cache in (0.0, gib))
        for part in ("layers and fused op", "peak"):
            assert plan[part] - without[part] == pytest.approx(counted)
    large = replace(COST, saved_bytes=1e6, head_params=1 << 20)
    assert 0 < most_tokens(large, 1, 8.0, "full", head_cache_gib=0.5) < most_tokens(large, 1, 8.0, "full")


def test_largest_micro_batch_is_the_largest_that_the_plan_fits():
    large = replace(COST, saved_bytes=1e6)
    for checkpointing in CHECKPOINTING:
        tokens = most_tokens(large, 1, 8.0, checkpointing)
        assert tokens and tokens % 1024 == 0 and plan_memory(large, 1, tokens, checkpointing)["peak"] <= 6 * 2**30
        assert plan_memory(large, 1, tokens + 1024, checkpointing)["peak"] > 6 * 2**30
    assert most_tokens(COST, 1, 2.1, "full") == 0


def example(prompt: int, chosen: int, rejected: int) -> Example:
    sides = [Response(np.arange(first, first + length, dtype=np.int32), np.zeros((length, 2), np.int32),
                      np.ones(length, bool))
             for first, length in ((10, chosen), (50, rejected))]
    return Example(Pair((("user", "x"),), "a", "b", "here:1"), np.arange(prompt, dtype=np.int32), *sides)


def test_operations_by_hand():
    """Prompt 3, chosen 2, rejected 4. A packed row computes the prompt once, and its attention to itself once."""
    examples = [example(3, 2, 4)]
    plain, row = (flops(COST, collate(MicroBatch((0,)), examples, [0], packs=packs)) for packs in (False, True))
    head = 6 * 250 * 6
    assert plain == 6 * 400 * 12 + head + 12 * 32 * (25 + 49) / 2
    assert row == 6 * 400 * 9 + head + 12 * 32 * (25 + 49 - 9) / 2


def test_the_plan_of_the_papers_model_needs_no_network_and_starts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(["--model", "meta-llama/Meta-Llama-3-8B-Instruct", "--plan"])
    printed = capsys.readouterr().out
    assert "8.03 B parameters" in printed and all(name in printed for name in MACHINES)
    assert "".join(f"    {line}\n" for line in printed.splitlines()) in (ROOT / "docs/train.md").read_text()
    assert not list(tmp_path.iterdir())
    (full,) = [line.split()[-3:] for line in printed.splitlines() if line.startswith("most tokens, --checkpointing fu")]
    assert len(full) == 3 and all(int(cell.replace(",", "")) >= 8192 for cell in full)


def test_the_plan_of_an_8b_step_is_near_what_one_h200_reserved():
    """138.2 GiB for micro-batches of 16,384 tokens, the allocator's segments of fixed sizes (docs/train.md)."""
    name, settings = memory.PAPER_MODELS["meta-llama/Meta-Llama-3-8B-Instruct"]
    cost = model_cost(AutoConfig.for_model(name, **settings), torch.bfloat16, 2048)
    planned = plan_memory(cost, 1, 16384, "full")["peak"] / 2**30
    assert 0.95 * 138.2 <= planned <= 139.8 - memory.RESERVED_GIB


@pytest.mark.parametrize("config", [
    {"model_type": "t5"}, {"model_type": "mamba"}, {"model_type": "llama", "num_hidden_layers": 0},
    {"model_type": "llama", "hidden_size": "64"}, {"model_type": "llama", "hidden_act": "foo"}, {}])
def test_a_plan_of_an_odd_config_is_one_message(config, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        train.main(["--model", str(tmp_path), "--plan"])
    assert "train.py: error: " in capsys.readouterr().err


def test_a_plan_follows_the_flags(toy_model, monkeypatch, capsys):
    large = replace(HUGE, params=8 * 10**9, layers_params=7 * 10**9, layer_params=2 * 10**8)
    monkeypatch.setattr(memory, "model_cost", lambda *_: large)
    argv = ["--model", str(toy_model), "--plan", "--micro-batch-tokens", "1024"]
    printed = []
    for extra in (["--checkpointing", "full"], ["--checkpointing", "none"], ["--replicate", "2"], ["--no-sync"],
                  ["--head-cache-gib", "1"]):
        train.main([*argv, *extra])
        printed.append(capsys.readouterr().out)
    assert len(set(printed)) == 5 and "1 x H200" not in printed[2]


def test_a_plan_without_a_config_is_one_message(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.main(["--model", str(tmp_path / "nowhere"), "--plan"])
    assert "its config can't be read" in capsys.readouterr().err


def test_a_plan_that_fits_nowhere_says_0():
    lines = describe_plan(HUGE, MACHINES, TrainConfig()).splitlines()
    assert [line.split()[-3:] for line in lines[-3:]] == [["0"] * 3] * 3 == [lines[3].split()[-3:]] * 3


HUGE = ModelCost(10**12, 10**10, 10**12, 10**9, 100, 8192, 8192, 64, 2, 1e7, 1e5)
GPUS = Process(0, 2, torch.device("cuda"))


def test_a_run_takes_the_least_recomputation_that_lets_its_tokens_fit(monkeypatch):
    """A memory in which 16,384 tokens fit only with everything computed again, then more and less of it."""
    cost = replace(COST, saved_bytes=4e5, working_bytes=1e4, hidden_size=64)
    gpu = type("Properties", (), {})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(memory, "model_cost", lambda *_: cost)

    def settle(gib: float, **flags) -> tuple[str, int]:
        gpu.total_memory = gib * 2**30
        return memory.settle_memory(TrainConfig(**flags), None, torch.bfloat16, GPUS)
    needed = {name: plan_memory(cost, 2, 16384, name)["peak"] / 2**30 + 2 for name in CHECKPOINTING}
    assert needed["full"] < needed["selective"] < needed["none"]
    for name in AUTOMATIC:
        assert settle(needed[name] + 0.01) == (name, 16384)
    assert settle(needed["none"] - 0.5)[0] == "selective" and settle(needed["full"] - 0.5)[0] == "full"
    assert 0 < settle(needed["full"] - 0.5)[1] < 16384
    assert settle(needed["full"], checkpointing="none", micro_batch_tokens=99999) == ("none", 99999)
    assert settle(needed["attention"] + 0.01, checkpointing="attention") == ("attention", 16384)
    assert settle(needed["full"] + 0.01, micro_batch_tokens=8192)[1] == 8192
    with pytest.raises(InputError, match="does not fit 2 device"):
        settle(2.0)
    here = Process(0, 1, torch.device("cpu"))
    assert memory.settle_memory(TrainConfig(), None, torch.float32, here) == ("none", 4096)
