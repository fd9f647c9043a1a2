"""The judge's attention rows and rollout equal the maps of an eager model, on architectures that differ where it
matters; so do all models' outputs, whose attention is ours. Equal in fp64; in fp32 as exact as an eager model's."""

import numpy as np
import pytest
import torch
from models_of_tests import MODELS, MODELS_WITHOUT_THE_INTERFACE, build, build_double
from precision_of_tests import InDouble, assert_as_exact, assert_exact
from transformers import AutoConfig, AutoModelForCausalLM

from twdpo.flags import InputError
from twdpo.models import attention
from twdpo.models.attention import ATTENTION_NAME, JudgeCapture, judge_forward, parse_heads, parse_layers, rollout_rows
from twdpo.models.build import decoder_layers
from twdpo.rows import pack


def groups() -> list[list[np.ndarray]]:
    """Two pairs of judge inputs: with a long common beginning, and with none; and one input alone."""
    rng = np.random.default_rng(0)
    begin, *ends = (rng.integers(3, 97, length) for length in (9, 12, 14, 5, 8, 6))
    return [[np.concatenate([begin, end]) for end in ends[:2]], ends[2:4], ends[4:]]


def sequences() -> list[np.ndarray]:
    return [ids for group in groups() for ids in group]


def eager_results(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each sequence alone: (maps [L, H, T, T], the last position's logits)."""
    results = []
    for ids in sequences():
        with torch.no_grad():
            output = model(torch.from_numpy(ids)[None], output_attentions=True)
        results.append((torch.cat(output.attentions), output.logits[0, -1]))
    return results


@pytest.fixture(scope="module", params=MODELS)
def expected(request):
    """(model's name, what an eager model gives in fp64)."""
    model = build_double(request.param, "eager")
    with InDouble():
        return request.param, eager_results(model)


def run(model, share: bool = True, **options) -> tuple[JudgeCapture, torch.Tensor]:
    """(the capture of one packed row, logits of each sequence's last position)."""
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
    model = build_double(name, ATTENTION_NAME)
    with InDouble():
        capture, logits_SV = run(model, **options)
    for place, (maps_LHTT, logits_V) in enumerate(results):
        for layer in range(3):
            last_HT = maps_LHTT[layer, :, -1]
            wanted_T = (last_HT[[0, 3]] if "heads" in options else last_HT).mean(dim=0)
            assert_exact(capture.rows[layer][place], wanted_T)
        assert_exact(logits_SV[place], logits_V)


def dense_rollout(maps_LHTT: torch.Tensor, heads=()) -> torch.Tensor:
    """The last row of the product of whole maps."""
    identity = product = torch.eye(maps_LHTT.shape[-1], dtype=maps_LHTT.dtype)
    for maps_HTT in maps_LHTT:
        product = (0.5 * (maps_HTT[list(heads)] if heads else maps_HTT).mean(dim=0) + 0.5 * identity) @ product
    return product[-1]


@pytest.mark.parametrize("heads", [(), (1, 2)])
def test_rollout_is_the_last_row_of_the_dense_product(expected, heads, monkeypatch):
    monkeypatch.setitem(attention.MAP_BLOCK_BYTES, "cpu", 0)  # the least: several blocks a sequence
    name, results = expected
    model = build_double(name, ATTENTION_NAME)
    with InDouble():
        capture, _ = run(model, keep=True, final_layer=2, heads=heads)
        rollouts = rollout_rows(capture)
    for ours_T, (maps_LHTT, _) in zip(rollouts, results, strict=True):
        assert_exact(ours_T, dense_rollout(maps_LHTT, heads))


@pytest.mark.parametrize("eager", [False, True])
def test_fp32_rows_rollout_and_logits_are_as_exact_as_those_of_an_eager_model(expected, eager):
    name, results = expected
    capture, logits_SV = run(build(name, ATTENTION_NAME), keep=True, eager=eager)
    ours = [[torch.cat(capture.rows[layer]) for layer in range(3)] + [torch.cat(rollout_rows(capture)), logits_SV]]
    for given in (eager_results(build(name, "eager")), results):
        rows = [torch.cat([maps_LHTT[layer, :, -1].mean(dim=0) for maps_LHTT, _ in given]) for layer in range(3)]
        ours.append([*rows, torch.cat([dense_rollout(maps_LHTT) for maps_LHTT, _ in given]),
                     torch.stack([logits_V for _, logits_V in given])])
    for values in zip(*ours, strict=True):
        assert values[0].dtype == torch.float32
        assert_as_exact(*values)


def test_plain_rows_equal_an_eager_model(expected, monkeypatch):
    """The policy's forward: padded on the right, no mask given."""
    monkeypatch.setattr(attention, "WINDOW_BLOCK", 4)
    name, results = expected
    model = build_double(name, ATTENTION_NAME)
    rows = [torch.from_numpy(ids) for ids in sequences()]
    with torch.no_grad(), InDouble():
        logits_STV = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False).logits
    for place, (ids, (_, logits_V)) in enumerate(zip(rows, results)):
        assert_exact(logits_STV[place, len(ids) - 1], logits_V)


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


@pytest.mark.parametrize("name", MODELS_WITHOUT_THE_INTERFACE)
def test_an_architecture_without_the_interface_is_a_clear_error(name):
    config = AutoConfig.for_model(name, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=f"{name}: the attention of layer 1 can't be reached"):
        judge_forward(model.get_decoder(), JudgeCapture(pack(groups()), frozenset([1])), 2)


def test_value_heads_of_another_size():
    """Multi-head latent attention: values are smaller than queries."""
    query, key, value = (torch.randn(1, 4, 23, size, dtype=torch.float64) for size in (12, 12, 8))
    module = type("Module", (), {"layer_idx": 0, "config": None})
    row = pack(groups())
    query, key, value = (tensor.repeat(1, 1, 8, 1)[:, :, :len(row.input_ids_T)] for tensor in (query, key, value))
    capture = JudgeCapture(row, frozenset([0]))
    with InDouble():
        output, _ = attention.attention_forward(module, query, key, value, None,
                                                layout=attention.Layout(row.ranges, capture=capture))
    assert output.shape == (1, len(row.input_ids_T), 4, 8)
    (first, stop), = row.ranges[0]
    probs = (query[0, :, first:stop] @ key[0, :, first:stop].transpose(1, 2) * 12 ** -0.5
             + torch.full((stop, stop), float("-inf")).triu(1)).softmax(-1)
    expected = probs @ value[0, :, first:stop]
    assert_exact(output[0, first:stop].transpose(0, 1), expected)
    assert_exact(capture.rows[0][0], probs[:, -1].mean(dim=0))


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
