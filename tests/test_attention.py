"""The judge's attention rows and rollout equal the maps of an eager model, on architectures that differ where it
matters; so do all models' outputs, whose attention is ours."""

import numpy as np
import pytest
import torch
from models_of_tests import MODELS, build
from transformers import AutoConfig, AutoModelForCausalLM

from twdpo import attention
from twdpo.attention import (
    ATTENTION_NAME,
    JudgeCapture,
    judge_forward,
    parse_heads,
    parse_layers,
    rollout_rows,
)
from twdpo.config import InputError
from twdpo.model import decoder_layers
from twdpo.rows import pack


def groups() -> list[list[np.ndarray]]:
    """Two pairs of judge inputs: with a long common beginning, and with none; and one input alone."""
    rng = np.random.default_rng(0)
    begin, *ends = (rng.integers(3, 97, length) for length in (9, 12, 14, 5, 8, 6))
    return [[np.concatenate([begin, end]) for end in ends[:2]], ends[2:4], ends[4:]]


def sequences() -> list[np.ndarray]:
    return [ids for group in groups() for ids in group]


@pytest.fixture(scope="module", params=MODELS)
def expected(request):
    """(model's name, of each sequence alone: maps [L, H, T, T] and the last position's logits) of an eager model."""
    plain, results = build(request.param, "eager"), []
    for ids in sequences():
        with torch.no_grad():
            output = plain(torch.from_numpy(ids)[None], output_attentions=True)
        results.append((torch.cat(output.attentions), output.logits[0, -1].float()))
    return request.param, results


def run(name: str, share: bool = True, **options) -> tuple[JudgeCapture, torch.Tensor]:
    """(the capture of one packed row, logits of each sequence's last position)."""
    model = build(name, ATTENTION_NAME)
    capture = JudgeCapture(pack(groups(), share), frozenset(range(3)), **options)
    final = decoder_layers(model)[-1] if "final_layer" in options else None
    hidden_SD = judge_forward(model.get_decoder(), capture, 3, final)
    logits_SV = model.get_output_embeddings()(hidden_SD)
    scale, cap = getattr(model.config, "logit_scale", None), getattr(model.config, "final_logit_softcapping", None)
    logits_SV = logits_SV * scale if scale else logits_SV
    return capture, cap * torch.tanh(logits_SV / cap) if cap else logits_SV


@pytest.mark.parametrize("options", [{}, {"share": False}, {"eager": True}, {"final_layer": 2}, {"heads": (0, 3)}],
                         ids=lambda options: ",".join(options) or "plain")
def test_rows_and_logits_equal_those_of_separate_eager_forwards(expected, options):
    name, results = expected
    capture, logits_SV = run(name, **options)
    for place, (maps_LHTT, logits_V) in enumerate(results):
        for layer in range(3):
            last_HT = maps_LHTT[layer, :, -1]
            ours_T = capture.rows[layer][place]
            wanted_T = (last_HT[[0, 3]] if "heads" in options else last_HT).mean(dim=0)
            assert ours_T.dtype == torch.float32
            torch.testing.assert_close(ours_T, wanted_T, atol=3e-6, rtol=0)
        torch.testing.assert_close(logits_SV[place].float(), logits_V, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [(), (1, 2)])
def test_rollout_is_the_last_row_of_the_dense_product(expected, heads, monkeypatch):
    monkeypatch.setitem(attention.MAP_BLOCK_BYTES, "cpu", 0)  # the least: several blocks a sequence
    name, results = expected
    capture, _ = run(name, keep=True, final_layer=2, heads=heads)
    for ours_T, (maps_LHTT, _) in zip(rollout_rows(capture), results):
        product = torch.eye(len(ours_T))
        for maps_HTT in maps_LHTT:
            maps_TT = (maps_HTT[list(heads)] if heads else maps_HTT).mean(dim=0)
            product = (0.5 * maps_TT + 0.5 * torch.eye(len(ours_T))) @ product
        torch.testing.assert_close(ours_T, product[-1], atol=1e-6, rtol=0)


def test_plain_rows_equal_an_eager_model(expected, monkeypatch):
    """The policy's forward: padded on the right, no mask given."""
    monkeypatch.setattr(attention, "WINDOW_BLOCK", 4)
    name, results = expected
    model = build(name, ATTENTION_NAME)
    rows = [torch.from_numpy(ids) for ids in sequences()]
    with torch.no_grad():
        logits_STV = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False).logits
    for place, (ids, (_, logits_V)) in enumerate(zip(rows, results)):
        torch.testing.assert_close(logits_STV[place, len(ids) - 1].float(), logits_V, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name, change", [("mistral", {"sliding_window": 64}), ("gemma2", {"sliding_window": 64}),
                                          ("gemma2", {"attn_logit_softcapping": 50.0})])
def test_windows_and_softcap_matter_in_these_models(name, change):
    """The cases above would prove little if the window or the softcap changed nothing."""
    rows = []
    for changes in ({}, change):
        capture = JudgeCapture(pack(groups()), frozenset(range(3)))
        judge_forward(build(name, ATTENTION_NAME, **changes).get_decoder(), capture, 3)
        rows.append(capture.rows[0][0])
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["bloom", "mamba"])
def test_an_architecture_without_the_interface_is_a_clear_error(name):
    config = AutoConfig.for_model(name, vocab_size=97, hidden_size=32, n_layer=2, n_head=4, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=f"{name}: the attention of layer 1 can't be reached"):
        judge_forward(model.get_decoder(), JudgeCapture(pack(groups()), frozenset([1])), 2)


def test_value_heads_of_another_size():
    """Multi-head latent attention: values are smaller than queries."""
    query, key, value = torch.randn(1, 4, 23, 12), torch.randn(1, 4, 23, 12), torch.randn(1, 4, 23, 8)
    module = type("Module", (), {"layer_idx": 0, "config": None})
    row = pack(groups())
    query, key, value = (tensor.repeat(1, 1, 8, 1)[:, :, :len(row.input_ids_T)] for tensor in (query, key, value))
    with attention.capturing(JudgeCapture(row, frozenset([0]))) as capture:
        output, _ = attention.attention_forward(module, query, key, value, None)
    assert output.shape == (1, len(row.input_ids_T), 4, 8)
    (first, stop), = row.ranges[0]
    probs = (query[0, :, first:stop] @ key[0, :, first:stop].transpose(1, 2) * 12 ** -0.5
             + torch.full((stop, stop), float("-inf")).triu(1)).softmax(-1)
    expected = probs @ value[0, :, first:stop]
    torch.testing.assert_close(output[0, first:stop].transpose(0, 1), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(capture.rows[0][0], probs[:, -1].mean(dim=0), atol=1e-6, rtol=0)


def test_what_a_mask_would_have_done_is_refused():
    query = torch.randn(1, 2, 9, 4)

    def attend(layer_types=None, sliding_window=None, **kwargs):
        config = type("Config", (), {"layer_types": layer_types, "sliding_window": sliding_window})
        module = type("Module", (), {"layer_idx": 0, "config": config})
        return attention.attention_forward(module, query, query, query, None, **kwargs)
    attend(sliding_window=9)
    attend(["full_attention"], sliding_window=4)
    attend(position_bias=None)
    for config, kwargs, message in (((None, 4), {}, "not told of"), ((["sliding_attention"], 4), {}, "not told of"),
                                    ((["chunked_attention"], None), {}, "chunked_attention"),
                                    ((None, None), {"position_bias": query}, "position_bias")):
        with pytest.raises(InputError, match=message):
            attend(*config, **kwargs)


def test_layers_and_heads_are_one_based():
    assert parse_layers("last", 32) == [31] and parse_layers("all", 3) == [0, 1, 2]
    assert parse_layers("32,1,8,8", 32) == [0, 7, 31]
    assert parse_heads("mean", 8) == () and parse_heads("8,1", 8) == (0, 7)
    for bad in ("0", "33", "one", "1,,2", ""):
        with pytest.raises(InputError, match="--layers"):
            parse_layers(bad, 32)
        with pytest.raises(InputError, match="--judge-heads"):
            parse_heads(bad, 32)
