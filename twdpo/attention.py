"""The attention row of a verdict: SDPA everywhere, and on the wanted layers one query row in fp32 beside it.

No S x S map is ever made (unless `eager` asks for it, as a check). Shapes: S sequences, T tokens, H heads, D head
dimension, L wanted layers, V vocabulary.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from twdpo.config import InputError

ATTENTION_NAME = "twdpo_row"


@dataclass
class RowCapture:
    """What one judge forward collects: `rows[layer]` is fp32 [S, T], the mean over heads, layers counted from 0."""

    layers: set[int]
    queries_S: torch.Tensor  # position of the wanted query in each sequence
    eager: bool
    rows: dict[int, torch.Tensor] = field(default_factory=dict)


_capture: RowCapture | None = None


@contextmanager
def capturing(capture: RowCapture):
    """Rows are collected inside this context. It does not nest."""
    global _capture
    assert _capture is None
    _capture = capture
    try:
        yield capture
    finally:
        _capture = None


def row_attention_forward(module, query_SHTD, key, value, attention_mask, scaling=None, dropout=0.0,
                          sliding_window=None, softcap=None, s_aux=None, **kwargs):
    """The attention function behind `ATTENTION_NAME`; its output is SDPA's, or eager's where SDPA has no such option.

    softcap (Gemma-2) and s_aux (sinks, gpt-oss) can't be expressed by SDPA.
    """
    wanted = _capture is not None and module.layer_idx in _capture.layers
    scaling = query_SHTD.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query_SHTD.shape[1] // key.shape[1]
    options = {"scaling": scaling, "softcap": softcap, "s_aux": s_aux, "sliding_window": sliding_window}
    eager = (wanted and _capture.eager) or softcap is not None or s_aux is not None
    if eager:
        positions_ST = torch.arange(query_SHTD.shape[2], device=query_SHTD.device).expand(query_SHTD.shape[0], -1)
        probs_SHTT = attention_probabilities(query_SHTD, key, attention_mask, positions_ST, **options)
        output = (probs_SHTT.to(value.dtype) @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous()
    else:
        output, _ = sdpa_attention_forward(module, query_SHTD, key, value, attention_mask, dropout=dropout,
                                           scaling=scaling, sliding_window=sliding_window, **kwargs)
    if wanted:
        queries_S1 = _capture.queries_S[:, None]
        rows = torch.arange(len(queries_S1), device=query_SHTD.device)
        if eager:
            row_ST = probs_SHTT[rows, :, _capture.queries_S].mean(dim=1)
        else:
            query_SH1D = query_SHTD[rows, :, _capture.queries_S][:, :, None]
            mask = None if attention_mask is None else attention_mask[rows, :, _capture.queries_S][:, :, None]
            row_ST = attention_probabilities(query_SH1D, key, mask, queries_S1, **options)[:, :, 0].mean(dim=1)
        _capture.rows[module.layer_idx] = row_ST
    return output, None


def attention_probabilities(query_SHQD, key, mask, positions_SQ, scaling, softcap=None, s_aux=None,
                            sliding_window=None) -> torch.Tensor:
    """softmax(q K^T * scale) in fp32, [S, H, Q, T], for queries at the given positions; key may have fewer heads."""
    key_SHTD = key.repeat_interleave(query_SHQD.shape[1] // key.shape[1], dim=1)
    scores = query_SHQD.float() @ key_SHTD.float().transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The mask may be None where SDPA's own causal flag would do: causality and the window are applied either way.
    keys_T = torch.arange(key.shape[2], device=key.device)
    seen = keys_T <= positions_SQ[:, None, :, None]
    if sliding_window is not None:
        seen = seen & (keys_T > positions_SQ[:, None, :, None] - sliding_window)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask[..., :key.shape[2]]
    elif mask is not None:
        scores = scores + mask[..., :key.shape[2]].float()
    # Finite, so that a padding query which sees nothing gives no NaN; a masked key's share is still exactly 0.
    scores = scores.masked_fill(~seen, torch.finfo(torch.float32).min)
    if s_aux is not None:  # a sink takes a share of the attention and gives nothing
        sinks = s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    return scores.softmax(dim=-1)


AttentionInterface.register(ATTENTION_NAME, row_attention_forward)
# Without a mask function of the same name transformers hands over no mask at all, without a word.
AttentionMaskInterface.register(ATTENTION_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def parse_layers(text: str, num_layers: int) -> list[int]:
    """`last`, `all` or `1,8,16` (1-based) -> layers counted from 0, ascending. Raises InputError."""
    if text == "last":
        return [num_layers - 1]
    if text == "all":
        return list(range(num_layers))
    try:
        layers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise InputError(f"--layers is {text!r}: it must be last, all, or numbers separated by commas") from error
    if layers[0] < 1 or layers[-1] > num_layers:
        raise InputError(f"--layers is {text!r}: the model has layers 1 to {num_layers}")
    return [layer - 1 for layer in layers]


@torch.no_grad()
def attention_rows(model, head_logits, sequences: list, layers: list[int], eager: bool = False
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of each sequence's last position, and the logits that it predicts.

    model: a causal LM loaded with attn_implementation=ATTENTION_NAME. head_logits: hidden [N, D] -> fp32 logits
    [N, V]. sequences: S arrays of token ids. Returns rows [S, L, T] fp32 on the CPU (T: the longest sequence, zeros
    after a shorter one's end) and logits [S, V] fp32 on the CPU.
    Raises InputError when a wanted layer gave no row: the architecture does not go through transformers' interface.
    """
    device = next(model.parameters()).device
    lengths_S = torch.tensor([len(ids) for ids in sequences])
    input_ids_ST = torch.nn.utils.rnn.pad_sequence([torch.as_tensor(ids) for ids in sequences], batch_first=True).long()
    mask_ST = torch.arange(input_ids_ST.shape[1]) < lengths_S[:, None]
    capture = RowCapture(set(layers), (lengths_S - 1).to(device), eager)
    with capturing(capture):
        hidden_STD = model.get_decoder()(input_ids=input_ids_ST.to(device), attention_mask=mask_ST.to(device),
                                         use_cache=False).last_hidden_state
    missing = [layer + 1 for layer in layers if layer not in capture.rows]
    if missing:
        raise InputError(f"{model.config.model_type}: the attention of layer {missing[0]} can't be reached (the "
                         "architecture does not use transformers' AttentionInterface); use another judge model")
    rows = torch.stack([capture.rows[layer] for layer in layers], dim=1).cpu()  # sync
    logits = head_logits(hidden_STD[torch.arange(len(sequences), device=device), capture.queries_S]).cpu()  # sync
    if not (rows.isfinite().all() and logits.isfinite().all()):
        raise InputError(f"{model.config.model_type}: the judge's attention is not finite; try --judge-dtype float32")
    return rows, logits
