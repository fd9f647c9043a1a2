"""Attention of all sequences of a row in one call: torch's `varlen_attn` on CUDA, and the index and offsets it takes.

One call a sequence is bound by launches, and every length that a kernel has not seen has a price of its own. Here
queries are the row as it is, each token once. Keys and values are gathered so that each sequence has the whole of its
shared beginning before its own tokens: attention is causal and aligned to the end, so its queries see that too.

Shapes: R rows of T tokens, of which `index` speaks as R * T, S sequences, Q queries, K keys, H heads (keys and values
may have fewer), D head dimension.
"""

from functools import cache
from inspect import signature
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable
from torch.nn.attention.varlen import varlen_attn

from twdpo.dist import send
from twdpo.rows import Ranges

DTYPES = (torch.bfloat16, torch.float16)  # that the kernels take


class Gather(NamedTuple):
    """Tokens of rows in the order that a call wants, some of them more than once."""

    index_K: torch.Tensor  # int64, into R * T
    num_tokens: int  # R * T
    # (tokens, their places in index_K), int64: no token twice in one turn. None: all tokens, in order; in the first.
    turns: tuple[tuple[torch.Tensor | None, torch.Tensor], ...]


class RowIndex(NamedTuple):
    """All that a call must know of its rows besides queries, keys and values. None for a gather: the rows as they are.
    """

    queries: Gather | None  # without padding
    keys: Gather | None  # shared beginnings as often as they are attended to
    query_offsets: torch.Tensor  # int32 [S + 1]: of each sequence's own tokens
    key_offsets: torch.Tensor  # int32 [S + 1]: of each whole sequence
    longest_query: int
    longest_key: int


def index_rows(ranges: Ranges, num_tokens: int, device: torch.device) -> RowIndex:
    """Made on the host; the copies to the device are not waited for. num_tokens: R * T, padding counted.

    ranges: pieces of each sequence in R * T (twdpo.rows.PackedRow); the last one is its own.
    """
    queries = [np.arange(*pieces[-1]) for pieces in ranges]
    keys = [np.concatenate([np.arange(*piece) for piece in pieces]) for pieces in ranges]

    def offsets(parts) -> torch.Tensor:
        ends = np.cumsum([0, *map(len, parts)])
        return send(torch.from_numpy(ends.astype(np.int32)), device)
    return RowIndex(_gather(queries, num_tokens, device), _gather(keys, num_tokens, device), offsets(queries),
                    offsets(keys), max(map(len, queries)), max(map(len, keys)))


def _gather(parts: list[np.ndarray], num_tokens: int, device: torch.device) -> Gather | None:
    index = np.concatenate(parts)
    if np.array_equal(index, np.arange(num_tokens)):
        return None

    def places_of(array: np.ndarray) -> torch.Tensor:
        return send(torch.from_numpy(array.astype(np.int64)), device)
    order = np.argsort(index, kind="stable")
    tokens, first, counts = np.unique(index[order], return_index=True, return_counts=True)
    turns = []
    for turn in range(counts.max()):
        again = counts > turn
        is_all = turn == 0 and len(tokens) == num_tokens
        turns.append((None if is_all else places_of(tokens[again]), places_of(order[first[again] + turn])))
    return Gather(places_of(index), num_tokens, tuple(turns))


class _Take(torch.autograd.Function):
    """tensor[index] along the first dimension. Its gradient is added up in one order, without atomics."""

    @staticmethod
    def forward(ctx, tensor_TX, gather: Gather):
        ctx.gather = gather
        return tensor_TX.index_select(0, gather.index_K)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_KX):
        total_TX = None
        for tokens, places in ctx.gather.turns:
            part = grad_KX.index_select(0, places)
            if tokens is None:
                total_TX = part
            elif total_TX is None:
                total_TX = grad_KX.new_zeros(ctx.gather.num_tokens, *grad_KX.shape[1:]).index_copy_(0, tokens, part)
            else:
                total_TX.index_copy_(0, tokens, part + total_TX.index_select(0, tokens))
        return total_TX, None


def can_attend_rows(query_RHTD, key, value) -> bool:
    """Whether the kernels take such operands, on such a device."""
    head_dim = query_RHTD.shape[-1]
    # Some GPUs have no backward pass for 192 to 224, and SDPA alone pads what is no multiple of 8.
    fits = head_dim % 8 == 0 and head_dim <= 256 and not 192 < head_dim <= 224
    return (query_RHTD.dtype in DTYPES and fits and key.shape[-1] == value.shape[-1] == head_dim
            and has_kernels(query_RHTD.device))


@cache
def has_kernels(device: torch.device) -> bool:
    """Whether this device has them; `meta` stands for a GPU that is planned for."""
    if device.type != "cuda":
        return device.type == "meta"
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_rows(query_RHTD, key, value, index: RowIndex, scale: float, window: int | None) -> torch.Tensor:
    """Causal attention within each sequence, [R, T, H, D]; 0 where no sequence is. window: tokens, the query's own
    included; None: all."""
    rows, heads, num_tokens, head_dim = query_RHTD.shape
    query, key, value = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query_RHTD, key, value))
    if index.queries is not None:
        query = _Take.apply(query, index.queries)
    if index.keys is not None:
        key, value = _Take.apply(key, index.keys), _Take.apply(value, index.keys)
    output_QHD = _call(query, key, value, index.query_offsets, index.key_offsets, index.longest_query,
                       index.longest_key, scale, window if window and window < index.longest_key else None)
    if index.queries is not None:
        output_QHD = output_QHD.new_zeros(rows * num_tokens, heads, head_dim).index_copy(
            0, index.queries.index_K, output_QHD)
    return output_QHD.view(rows, num_tokens, heads, head_dim)


def _call(query_QHD, key_KHD, value_KHD, query_offsets, key_offsets, longest_query: int, longest_key: int,
          scale: float, window: int | None) -> torch.Tensor:
    """One call of `varlen_attn`, causal."""
    options = {}
    if key_KHD.shape[1] != query_QHD.shape[1]:
        if takes_grouped_heads(query_QHD.device):
            options = {"enable_gqa": True} if NAMES_GROUPED_HEADS else {}
        else:
            times = query_QHD.shape[1] // key_KHD.shape[1]
            key_KHD, value_KHD = (tensor.repeat_interleave(times, dim=1) for tensor in (key_KHD, value_KHD))
    return varlen_attn(query_QHD, key_KHD, value_KHD, query_offsets, key_offsets, longest_query, longest_key,
                       scale=scale, window_size=(-1, 0) if window is None else (window - 1, 0), **options)


NAMES_GROUPED_HEADS = "enable_gqa" in signature(varlen_attn).parameters  # since torch 2.13


@cache
def takes_grouped_heads(device: torch.device) -> bool:
    """Whether keys and values may have fewer heads. Where torch does not say (2.11), one small call is compared with
    repeated heads, forward and backward: a host-device sync, once a process, when its first model is built."""
    if NAMES_GROUPED_HEADS or device.type != "cuda":
        return True
    generator = torch.Generator().manual_seed(0)
    query, few, grad = (torch.randn(96, heads, 64, generator=generator).to(device, torch.bfloat16)
                        for heads in (8, 2, 8))
    offsets = torch.tensor([0, 31, 96], dtype=torch.int32, device=device)
    found = []
    with torch.enable_grad():
        for times in (4, 1):
            leaf = few.clone().requires_grad_()
            keys = leaf.repeat_interleave(times, dim=1)
            try:
                output = varlen_attn(query, keys, keys, offsets, offsets, 65, 65, window_size=(-1, 0))
                found.append((output.detach().float(), torch.autograd.grad(output, leaf, grad)[0].float()))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # it says so, and heads are repeated
                return False
    return all(torch.allclose(*pair, atol=2e-2, rtol=2e-2) for pair in zip(*found))  # sync
