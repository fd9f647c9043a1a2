"""Attention of every model here: SDPA, and beside it the row that a judge's verdict pays to each token.

All rows are causal and none needs a mask: plain rows are padded on the right, sequences of a packed row
(twdpo.rows.PackedRow) are taken apart for the attention alone. On a GPU all sequences of a row go in one call
(twdpo.models.varlen) where its kernels can do that; else, and on a CPU, one by one. No S x S map is ever made, unless
`eager` asks for it as a check. What SDPA can't express (softcap, sinks) and windows shorter than a sequence go block by
block.

Shapes: B rows, S sequences, T tokens, Q queries, K keys, H heads (keys and values may have fewer), D head dimension,
L wanted layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from twdpo.flags import InputError
from twdpo.models.varlen import RowIndex, attend_rows, can_attend_rows, index_rows
from twdpo.rows import PackedRow, Ranges

ATTENTION_NAME = "twdpo"
WINDOW_BLOCK = 512  # queries at once where SDPA needs a window's mask
MAP_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20, "meta": 128 << 20}  # fp32 maps at once where SDPA can't be used


class AttentionOptions(NamedTuple):
    """What an architecture does to q K^T before and in the softmax."""

    scaling: float
    sliding_window: int | None = None  # tokens, the query's own included
    softcap: float | None = None
    sinks_H: torch.Tensor | None = None  # logits of a share of attention that goes nowhere (gpt-oss)


@dataclass
class JudgeCapture:
    """What one judge forward over a packed row collects.

    rows[layer]: for each sequence fp32 [T], the mean over heads of its last token's attention, layers counted from 0.
    kept[layer]: queries, keys and options, when rollout needs them.
    """

    row: PackedRow
    layers: frozenset[int]
    heads: tuple[int, ...] = ()  # empty: all
    eager: bool = False
    keep: bool = False
    final_layer: int = -1  # after which only the last positions are needed; -1: all layers do all positions
    final_output: torch.Tensor | None = None  # of the final layer's attention at the last positions, [1, S, H, D]
    rows: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor, AttentionOptions]] = field(default_factory=dict)


class Layout:
    """What one forward is told of its rows: the decoder's keyword `layout`, which transformers hands on to every
    layer's attention, also where a backward pass computes a layer again. (No dataclass: FSDP2 would copy it.)

    ranges: of the sequences, as the rows stand end to end; None: all rows are whole ones. packs: the row is a packed
    one. capture: of a judge forward. attended: layers, as they attend.
    """

    def __init__(self, ranges: Ranges | None = None, packs: bool = True, capture: JudgeCapture | None = None):
        self.ranges, self.packs, self.capture = ranges, packs and ranges is not None, capture
        self.longest = max(sum(stop - first for first, stop in pieces) for pieces in ranges) if ranges else 0
        self.attended: list[int] = []
        self._index: RowIndex | None = None

    def index(self, query_RHTD: torch.Tensor) -> RowIndex:
        """What one call for all sequences needs to know: made once, in the first layer that asks."""
        if self._index is None:
            num_tokens = query_RHTD.shape[0] * query_RHTD.shape[2]
            self._index = index_rows(self.ranges, num_tokens, query_RHTD.device)
        return self._index


def run_decoder(decoder, input_ids_RT: torch.Tensor, positions_RT: torch.Tensor, layout: Layout,
                num_layers: int | None = None, embeddings_RTD: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states of the last layer, [R, T, D], of tokens, or of `embeddings_RTD` in their place. Raises InputError
    unless each of the first `num_layers` layers (None: of all) attended once: one that does not go through
    transformers' AttentionInterface would get no mask, and look ahead without a word."""
    given = {"input_ids": input_ids_RT} if embeddings_RTD is None else {"inputs_embeds": embeddings_RTD}
    hidden_RTD = decoder(**given, position_ids=positions_RT, use_cache=False, layout=layout).last_hidden_state
    config, attended = decoder.config, layout.attended
    expected = range(config.get_text_config().num_hidden_layers if num_layers is None else num_layers)
    if sorted(attended) != list(expected):
        missing = sorted(set(expected) - set(attended)) or attended
        raise InputError(f"{config.model_type}: the attention of layer {missing[0] + 1} can't be reached (the "
                         "architecture does not use transformers' AttentionInterface); use another model")
    return hidden_RTD


@torch.compiler.disable  # what a row holds differs from row to row: a compiled layer leaves its attention alone
def attention_forward(module, query_BHTD, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                      softcap=None, s_aux=None, layout: Layout | None = None, **kwargs):
    """The attention function behind `ATTENTION_NAME`, as transformers calls it; returns ([B, T, H, D], None)."""
    layout = layout or Layout()
    capture = layout.capture
    if capture is not None and capture.final_output is not None:
        return capture.final_output, None  # the final layer's second call, `_run_at_last_positions`
    layout.attended.append(module.layer_idx)
    scaling = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is not None:  # made by the architecture itself; it knows nothing of packed rows
        if layout.packs or softcap is not None or s_aux is not None:
            raise InputError("this architecture makes an attention mask of its own: use another model")
        return F.scaled_dot_product_attention(query_BHTD, key, value, attn_mask=attention_mask, scale=scaling,
                                              enable_gqa=key.shape[1] != query_BHTD.shape[1]).transpose(1, 2), None
    options = AttentionOptions(scaling, sliding_window, softcap, s_aux)
    refuse_what_is_not_done(module, layout.longest or query_BHTD.shape[2], sliding_window, kwargs)
    if capture is not None:
        return _judge_attention(layout, module.layer_idx, query_BHTD, key, value, options), None
    if attends_at_once(layout, query_BHTD, key, value, options):
        return attend_rows(query_BHTD, key, value, layout.index(query_BHTD), scaling, sliding_window), None
    if layout.packs:
        return packed_attention(query_BHTD, key, value, layout.ranges, options).transpose(1, 2), None
    return causal_attention(query_BHTD, key, value, options).transpose(1, 2), None


def attends_at_once(layout: Layout, query_BHTD, key, value, options: AttentionOptions) -> bool:
    """Whether all sequences go in one call (twdpo.models.varlen): no softcap, no sinks, and what its kernels take."""
    return (layout.ranges is not None and options.softcap is None and options.sinks_H is None
            and can_attend_rows(query_BHTD, key, value))


def refuse_what_is_not_done(module, num_tokens: int, sliding_window: int | None, kwargs: dict[str, object]) -> None:
    """Raise InputError for what an architecture does by its mask, or asks of its attention, but is not done here."""
    config, layer = getattr(module, "config", None), module.layer_idx
    kind = (getattr(config, "layer_types", None) or {layer: None})[layer]
    window = getattr(config, "sliding_window", None)
    if kind not in (None, "full_attention", "sliding_attention"):
        raise InputError(f"layer {layer + 1} is {kind}, which can't be done without a mask: use another model")
    if window and sliding_window is None and kind != "full_attention" and num_tokens > window:
        raise InputError(f"layer {layer + 1} has a sliding window of {window} tokens that its attention is not told "
                         f"of, and rows are up to {num_tokens} tokens long: use another model, or shorter inputs")
    for name, value in kwargs.items():
        if value is not None and ("bias" in name or name == "alibi"):
            raise InputError(f"layer {layer + 1} adds {name} to its attention, which can't be done: use another model")


def _judge_attention(layout: Layout, layer: int, query_1HTD, key, value, options: AttentionOptions) -> torch.Tensor:
    """Attention of one layer of a judge forward, [1, T, H, D]; rows of wanted layers go into the capture."""
    capture = layout.capture
    if capture.keep:
        capture.kept[layer] = query_1HTD, key, options
    wanted, is_final = layer in capture.layers, layer == capture.final_layer
    rows = capture.rows.setdefault(layer, []) if wanted else []
    at_once = (not is_final and not (wanted and capture.eager)
               and attends_at_once(layout, query_1HTD, key, value, options))
    if at_once:
        output_1THD = attend_rows(query_1HTD, key, value, layout.index(query_1HTD), options.scaling,
                                  options.sliding_window)
        if not wanted:
            return output_1THD
    else:
        output_1THD = value.new_zeros(1, query_1HTD.shape[2], query_1HTD.shape[1], value.shape[3])
    last_1HD, done = [], 0
    for ranges in capture.row.ranges:
        query, keys, values = (_take(tensor, ranges) for tensor in (query_1HTD, key, value))
        stop = ranges[-1][1]
        if wanted or is_final:
            start = 0 if capture.eager else query.shape[2] - 1
            probs_1HQK = attention_probabilities(query[:, :, start:], keys, start, options)
            last_HK = probs_1HQK[0, :, -1]
            if wanted:
                rows.append((last_HK[list(capture.heads)] if capture.heads else last_HK).mean(dim=0))
        if is_final:
            last_1HD.append(_grouped_matmul(last_HK[None, :, None].to(value.dtype), values)[:, :, 0])
        elif not at_once:
            output = (_grouped_matmul(probs_1HQK.to(value.dtype), values) if wanted and capture.eager
                      else causal_attention(query, keys, values, options))
            output_1THD[:, done:stop] = output[:, :, done - stop:].transpose(1, 2)  # a shared beginning is done once
        done = stop
    if is_final:
        capture.final_output = torch.stack(last_1HD, dim=1)
        raise _AttendedAsLast
    return output_1THD


class _AttendedAsLast(Exception):  # noqa: N818 - no error: it leaves the layer's forward
    """The final layer has attended; what follows is needed at the last positions alone."""


@contextmanager
def _run_at_last_positions(layer: torch.nn.Module, capture: JudgeCapture) -> Iterator[None]:
    """Inside this context `layer` attends to the whole row, and does all else at each sequence's last position.

    Its forward is left when it has attended, and called again with what it was given at those positions.
    """
    num_tokens, last = len(capture.row.input_ids_T), [ranges[-1][1] - 1 for ranges in capture.row.ranges]
    original = layer.forward

    def shorten(value):
        if isinstance(value, (tuple, list)):
            return type(value)(map(shorten, value))
        is_by_token = isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[1] == num_tokens
        return value[:, last] if is_by_token else value

    def forward(*args, **kwargs):
        try:
            return original(*args, **kwargs)
        except _AttendedAsLast:
            output = original(*map(shorten, args), **{name: shorten(value) for name, value in kwargs.items()})
        first_1SD = output[0] if isinstance(output, tuple) else output
        hidden_1TD = first_1SD.new_zeros(1, num_tokens, first_1SD.shape[2])
        hidden_1TD[:, last] = first_1SD
        return (hidden_1TD, *output[1:]) if isinstance(output, tuple) else hidden_1TD

    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward  # the class's own shows again


def packed_attention(query_1HTD, key, value, row_ranges: Ranges, options: AttentionOptions) -> torch.Tensor:
    """Causal attention of each sequence of a packed row, [1, H, T, D]. A shared beginning is taken from the first."""
    outputs, done = [], 0
    for ranges in row_ranges:
        output = causal_attention(*(_take(tensor, ranges) for tensor in (query_1HTD, key, value)), options)
        outputs.append(output[:, :, done - ranges[-1][1]:])
        done = ranges[-1][1]
    return torch.cat(outputs, dim=2)


def _take(tensor_BHTD: torch.Tensor, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The tokens of one sequence; a view where they stand together."""
    pieces = [tensor_BHTD[:, :, first:stop] for first, stop in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _match_heads(key_BHTD: torch.Tensor, query_BHTD: torch.Tensor) -> torch.Tensor:
    """Keys or values with as many heads as the queries."""
    return key_BHTD.repeat_interleave(query_BHTD.shape[1] // key_BHTD.shape[1], dim=1)


def _grouped_matmul(left_BHQX: torch.Tensor, right_BHXY: torch.Tensor) -> torch.Tensor:
    """left @ right, [B, H, Q, Y], where the right side may have fewer heads; nothing is repeated in memory."""
    rows, heads, queries, inner = left_BHQX.shape
    grouped = left_BHQX.reshape(rows, right_BHXY.shape[1], -1, inner) @ right_BHXY
    return grouped.view(rows, heads, queries, -1)


def _map_block(query_BHTD: torch.Tensor) -> int:
    """How many queries of a sequence may have their attention to all of it in memory at once."""
    rows, heads, num_tokens, _ = query_BHTD.shape
    return max(16, MAP_BLOCK_BYTES[query_BHTD.device.type] // (4 * rows * heads * num_tokens))


def causal_attention(query_BHTD, key, value, options: AttentionOptions) -> torch.Tensor:
    """Causal attention of whole sequences, [B, H, T, D]."""
    num_tokens, window = query_BHTD.shape[2], options.sliding_window
    plain = options.softcap is None and options.sinks_H is None
    if plain and (window is None or num_tokens <= window):
        return F.scaled_dot_product_attention(query_BHTD, key, value, is_causal=True, scale=options.scaling,
                                              enable_gqa=key.shape[1] != query_BHTD.shape[1])
    block = WINDOW_BLOCK if plain else _map_block(query_BHTD)
    outputs = []
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        first = 0 if window is None else max(0, start - window + 1)
        query, keys, values = query_BHTD[:, :, start:stop], key[:, :, first:stop], value[:, :, first:stop]
        if plain:
            seen_QK = visible(start - first, stop - start, stop - first, window, query.device)
            outputs.append(F.scaled_dot_product_attention(query, _match_heads(keys, query), _match_heads(values, query),
                                                          attn_mask=seen_QK, scale=options.scaling))
        else:
            probs_BHQK = attention_probabilities(query, keys, start - first, options)
            outputs.append(_grouped_matmul(probs_BHQK.to(value.dtype), values))
    return torch.cat(outputs, dim=2)


def visible(start: int, num_queries: int, num_keys: int, window: int | None, device) -> torch.Tensor:
    """bool [Q, K]: which keys the queries at positions start, start + 1, ... see."""
    queries_Q1 = torch.arange(start, start + num_queries, device=device)[:, None]
    keys_K = torch.arange(num_keys, device=device)
    seen_QK = keys_K <= queries_Q1
    return seen_QK if window is None else seen_QK & (keys_K > queries_Q1 - window)


def attention_probabilities(query_BHQD, key_BHKD, start: int, options: AttentionOptions) -> torch.Tensor:
    """softmax(q K^T * scale) in fp32, [B, H, Q, K], for queries at positions start, start + 1, ... of the keys."""
    scores = _grouped_matmul(query_BHQD.float() * options.scaling, key_BHKD.float().transpose(2, 3))
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    # Without a window all queries see the keys before the first of them: only what follows needs a mask.
    first = start if options.sliding_window is None else 0
    seen_QK = visible(start - first, scores.shape[2], scores.shape[3] - first, options.sliding_window, scores.device)
    scores[..., first:].masked_fill_(~seen_QK, float("-inf"))
    if options.sinks_H is not None:
        sinks = options.sinks_H.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return scores.softmax(dim=-1)


def rollout_rows(capture: JudgeCapture) -> list[torch.Tensor]:
    """Attention rollout (Abnar and Zuidema 2020) of each sequence's last token, fp32 [T] each.

    The last row of the product of all 0.5 I + 0.5 A_l, as vector times matrix from the top layer down, the maps A_l
    (mean over heads) made block by block.
    """
    results = []
    for ranges in capture.row.ranges:
        num_tokens = sum(stop - first for first, stop in ranges)
        flow_T = torch.zeros(num_tokens, device=capture.kept[0][0].device)
        flow_T[-1] = 1.0
        lowest = num_tokens - 1  # queries before it carry nothing yet: the top layer has one
        for layer in sorted(capture.kept, reverse=True):
            query, key, options = capture.kept[layer]
            query, key = _take(query, ranges), _take(key, ranges)
            if capture.heads:
                key = _match_heads(key, query)[:, list(capture.heads)]
                sinks_H = None if options.sinks_H is None else options.sinks_H[list(capture.heads)]
                query, options = query[:, list(capture.heads)], options._replace(sinks_H=sinks_H)
            moved_T = torch.zeros_like(flow_T)
            block = _map_block(query)
            for start in range(lowest, num_tokens, block):
                stop = min(start + block, num_tokens)
                probs_1HQK = attention_probabilities(query[:, :, start:stop], key[:, :, :stop], start, options)
                moved_T[:stop] += (flow_T[start:stop] @ probs_1HQK[0]).mean(dim=0)
            flow_T = 0.5 * flow_T + 0.5 * moved_T
            lowest = 0
        results.append(flow_T)
    return results


# No mask function goes with the name: transformers then makes no mask, and this file takes care of what one would say.
AttentionInterface.register(ATTENTION_NAME, attention_forward)


def parse_layers(text: str, num_layers: int, flag: str = "--layers") -> list[int]:
    """`last`, `all` or `1,8,16` (1-based) -> layers counted from 0, ascending. Raises InputError."""
    if text == "last":
        return [num_layers - 1]
    if text == "all":
        return list(range(num_layers))
    return parse_numbers(flag, text, num_layers, "layers", "last, all,")


def parse_heads(text: str, num_heads: int) -> tuple[int, ...]:
    """`mean` (all heads: empty) or `1,5` (1-based) -> heads counted from 0. Raises InputError."""
    return () if text == "mean" else tuple(parse_numbers("--judge-heads", text, num_heads, "heads", "mean"))


def parse_numbers(flag: str, text: str, largest: int, things: str, words: str) -> list[int]:
    """`1,8,16` -> [0, 7, 15]: ascending, each once, counted from 0. Raises InputError."""
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise InputError(f"{flag} is {text!r}: it must be {words} or numbers separated by commas") from error
    if numbers[0] < 1 or numbers[-1] > largest:
        raise InputError(f"{flag} is {text!r}: the model has {things} 1 to {largest}")
    return [number - 1 for number in numbers]


@torch.no_grad()
def judge_forward(decoder, capture: JudgeCapture, num_layers: int, final_layer: torch.nn.Module | None = None
                  ) -> torch.Tensor:
    """Run the judge over `capture.row`; the hidden states of each sequence's last token, [S, D].

    final_layer: the module of capture.final_layer, when there is one. num_layers: how many layers must have attended,
    each once. Raises InputError when some did not: the architecture does not go through transformers'
    AttentionInterface there, so its attention can't be reached.
    """
    device = next(decoder.parameters()).device
    ids_1T, positions_1T = (torch.from_numpy(part)[None].long().to(device)
                            for part in (capture.row.input_ids_T, capture.row.positions_T))
    with _run_at_last_positions(final_layer, capture) if final_layer is not None else nullcontext():
        layout = Layout(capture.row.ranges, capture=capture)
        hidden_1TD = run_decoder(decoder, ids_1T, positions_1T, layout, num_layers)
    return hidden_1TD[0, [ranges[-1][1] - 1 for ranges in capture.row.ranges]]
