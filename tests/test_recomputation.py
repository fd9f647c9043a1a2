"""What recomputation keeps and computes again, as operations and in bytes; whole runs with it are in test_train.py."""

import numpy as np
import pytest
import torch
from models_of_tests import IN_ONE_CALL, SMALL, build
from test_packing import run
from torch.utils._python_dispatch import TorchDispatchMode

from twdpo.models.attention import ATTENTION_NAME, Layout, run_decoder
from twdpo.models.build import ATTENTION_OPERATIONS, decoder_layers, enable_checkpointing
from twdpo.models.memory import LiveBytes
from twdpo.models.policy import Policy
from twdpo.rows import pack

NO_DROPOUT = dict.fromkeys(("dropout", "embd_pdrop", "resid_pdrop"), 0.0)


class Count(TorchDispatchMode):
    """How often each operation runs inside this context, backward passes included."""

    def __init__(self):
        super().__init__()
        self.calls: dict[object, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] = self.calls.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    @property
    def attention(self) -> int:
        return sum(self.calls.get(operation, 0) for operation in ATTENTION_OPERATIONS)


def on_meta(checkpointing: str) -> tuple[int, float]:
    """(attention's calls, bytes a token that a forward keeps) of a decoder with the attention of a GPU."""
    model = build("llama", ATTENTION_NAME).to("meta", torch.bfloat16).train()
    enable_checkpointing(decoder_layers(model), checkpointing)
    ids = np.arange(600, dtype=np.int32)
    row = pack([[ids, np.concatenate([ids[:200], ids[:199:-1]])]])
    input_ids = torch.zeros(1, len(row.input_ids_T), dtype=torch.long, device="meta")
    positions = torch.zeros_like(input_ids)
    with Count() as count:
        with LiveBytes([*model.parameters(), *model.buffers(), input_ids, positions]) as tally:
            hidden = run_decoder(model.get_decoder(), input_ids, positions, Layout(row.ranges))
            kept = tally.live
        hidden.backward(torch.empty_like(hidden))
    return count.attention, kept / len(row.input_ids_T)


def test_on_a_gpu_attention_runs_once_and_its_outputs_are_kept():
    (once, all_bytes), (twice, least), (kept, more) = map(on_meta, ("none", "full", "attention"))
    assert (once, twice, kept) == (3, 6, 3)
    assert least < more < all_bytes
    heads, head_dim, layers = (SMALL[name] for name in ("num_attention_heads", "head_dim", "num_hidden_layers"))
    # Outputs in bf16 and log-sum-exps in fp32; random states of a few bytes a layer.
    assert more - least == pytest.approx(layers * heads * (2 * head_dim + 4), rel=1e-3)


@pytest.mark.parametrize("name", IN_ONE_CALL)
def test_on_a_cpu_results_stay_and_attention_runs_once(name):
    found, counts = [], []
    for checkpointing in ("none", "full", "attention"):
        model = build(name, ATTENTION_NAME, **NO_DROPOUT).train()
        enable_checkpointing(decoder_layers(model), checkpointing)
        with Count() as count:
            found.append(run(Policy(model), True))
        counts.append(count.attention)
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-4, atol=1e-5)
    assert counts[1] == 2 * counts[0] and (counts[2] == counts[0] or not counts[0])
