"""`varlen_attn` in plain torch, and how a CPU takes it for torch's own, whose kernels are a GPU's."""

import pytest
import torch

from twdpo.models import varlen


class PlainVarlen:
    """The contract of `torch.nn.attention.varlen.varlen_attn`, a sequence at a time; `calls` counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                 enable_gqa=False):
        self.calls += 1
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
        assert cu_seq_q[0] == cu_seq_k[0] == 0 and cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value))
        assert query.shape[1] == key.shape[1] or enable_gqa
        left, right = window_size
        assert right == 0  # causal
        times = query.shape[1] // key.shape[1]
        outputs = []
        for place in range(len(cu_seq_q) - 1):
            own = query[cu_seq_q[place]:cu_seq_q[place + 1]]
            keys, values = (tensor[cu_seq_k[place]:cu_seq_k[place + 1]].repeat_interleave(times, dim=1)
                            for tensor in (key, value))
            assert 0 < len(own) <= len(keys)
            # Aligned to the end: the last query stands at the last key.
            behind = (torch.arange(len(own))[:, None] + len(keys) - len(own)) - torch.arange(len(keys))
            hidden = behind < 0 if left < 0 else (behind < 0) | (behind > left)
            scores = torch.einsum("qhd,khd->hqk", own * scale, keys).masked_fill(hidden, float("-inf"))
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        return torch.cat(outputs)


@pytest.fixture
def plain_varlen(monkeypatch) -> PlainVarlen:
    """Inside a test with this fixture a CPU attends to whole rows as a GPU does, in any dtype."""
    plain = PlainVarlen()
    monkeypatch.setattr(varlen, "varlen_attn", plain)
    monkeypatch.setattr(varlen, "NAMES_GROUPED_HEADS", True)
    monkeypatch.setattr(varlen, "has_kernels", lambda device: True)
    monkeypatch.setattr(varlen, "DTYPES", (torch.float64, torch.float32))
    return plain
