"""Attention of a whole row in one call equals attention by sequence: index, offsets, windows, gradients, the judge.

Through a plain implementation of the same contract (tests/varlen_of_tests.py); tests/test_gpu.py has the kernels.
"""

import inspect

import numpy as np
import pytest
import torch
from models_of_tests import IN_ONE_CALL, MODELS, build, build_double
from precision_of_tests import InDouble, assert_exact
from runs_of_tests import assert_close_rows, read_rows
from test_packing import EXAMPLES, example, run
from torch.nn.attention.varlen import varlen_attn
from varlen_of_tests import plain_varlen  # noqa: F401 - a fixture

import train
from twdpo.batch import collate
from twdpo.models import attention, varlen
from twdpo.models.attention import ATTENTION_NAME, AttentionOptions, JudgeCapture, judge_forward
from twdpo.models.build import decoder_layers, enable_checkpointing
from twdpo.models.policy import Policy
from twdpo.models.varlen import attend_rows, index_rows
from twdpo.rows import MicroBatch, pack

CPU = torch.device("cpu")


def groups(*lengths: tuple[int, ...], shared: int) -> list[list[np.ndarray]]:
    """Groups of sequences of these lengths, whose first `shared` tokens (no more than all but one) are equal."""
    rng, place = np.random.default_rng(0), iter(range(10**6))
    made = []
    for group in lengths:
        ids = rng.integers(0, 50, max(group))
        made.append([np.concatenate([ids[:min(shared, length - 1)],
                                     [1000 + next(place) for _ in range(length - min(shared, length - 1))]])
                     for length in group])
    return made


ROWS = {"nothing shared": groups((5, 3), (9, 2), shared=0), "one token": groups((1,), shared=0),
        "one token each": groups((1, 1), (1,), shared=0), "some shared": groups((12, 7), (4, 9), (6,), shared=3),
        "all but one shared": groups((8, 8), (5, 5), shared=99), "three sequences": groups((7, 9, 8), (4, 4), shared=5)}


def operands(num_tokens: int, kv_heads: int = 2, rows: int = 1) -> list[torch.Tensor]:
    """Query, key, value [R, H, T, 8] in fp64, laid out as a model's are: tokens first, then heads."""
    return [torch.randn(rows, num_tokens, heads, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
            for heads in (4, kv_heads, kv_heads)]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_in_one_call_equals_its_sequences(name, window, plain_varlen):  # noqa: F811
    row = pack(ROWS[name])
    num_tokens = len(row.input_ids_T)
    given = operands(num_tokens)
    expected = attention.packed_attention(*given, row.ranges, AttentionOptions(0.3, window)).transpose(1, 2)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, given, upstream)
    ours = attend_rows(*given, index_rows(row.ranges, num_tokens, CPU), 0.3, window)
    assert plain_varlen.calls == 1
    assert_exact(ours, expected)
    for grad, wanted in zip(torch.autograd.grad(ours, given, upstream), expected_grads):
        assert_exact(grad, wanted)


@pytest.mark.parametrize("name", ROWS)
def test_offsets_and_index_by_hand(name):
    """Every sequence's own tokens are queries, its whole length are keys, in its order."""
    row = pack(ROWS[name])
    sequences = [ids for group in ROWS[name] for ids in group]
    index = index_rows(row.ranges, len(row.input_ids_T), CPU)
    assert index.queries is None and index.query_offsets.dtype == index.key_offsets.dtype == torch.int32
    assert index.key_offsets.diff().tolist() == [len(ids) for ids in sequences]
    assert index.query_offsets[-1] == len(row.input_ids_T) and index.longest_key == max(map(len, sequences))
    assert index.longest_query == index.query_offsets.diff().max()
    keys = row.input_ids_T if index.keys is None else row.input_ids_T[index.keys.index_K.numpy()]
    assert keys.tolist() == np.concatenate(sequences).tolist()
    assert (index.keys is None) == (len(keys) == len(row.input_ids_T))


def test_what_is_taken_twice_gets_both_gradients_in_one_order():
    """Bits don't depend on the order in which a device adds: no token is twice in one turn."""
    row = pack(ROWS["three sequences"])
    keys = index_rows(row.ranges, len(row.input_ids_T), CPU).keys
    assert len(keys.turns) == 3 and keys.turns[0][0] is None
    for tokens, places in keys.turns[1:]:
        assert len(set(tokens.tolist())) == len(tokens) == len(places)
        assert torch.equal(keys.index_K[places], tokens)
    tensor = torch.randn(keys.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(len(keys.index_K), 3, dtype=torch.float64)
    wanted = torch.zeros_like(tensor).index_add(0, keys.index_K, upstream)
    assert_exact(torch.autograd.grad(varlen._Take.apply(tensor, keys), tensor, upstream)[0], wanted)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("lengths", [(5, 9, 1), (9, 9, 9)])
def test_plain_rows_leave_out_their_padding(lengths, window, plain_varlen):  # noqa: F811
    given = operands(9, rows=3)
    ranges = tuple(((9 * number, 9 * number + length),) for number, length in enumerate(lengths))
    index = index_rows(ranges, 27, CPU)
    assert index.query_offsets[-1] == index.key_offsets[-1] == sum(lengths)
    expected = attention.causal_attention(*given, AttentionOptions(0.3, window)).transpose(1, 2)
    real = torch.arange(9) < torch.tensor(lengths)[:, None]
    expected = torch.where(real[:, :, None, None], expected, 0)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, given, upstream)
    ours = attend_rows(*given, index, 0.3, window)
    assert_exact(ours, expected)
    for grad, wanted in zip(torch.autograd.grad(ours, given, upstream), expected_grads):
        assert_exact(grad, wanted)


def results(name: str, packs: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs and gradients of a policy on four pairs, some with answers that begin alike."""
    policy = Policy(build_double(name, ATTENTION_NAME))
    with InDouble():
        return run(policy, packs)


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_policies_in_one_call_equal_those_by_sequence(name, packs, request):
    expected_N, expected_grads = results(name, packs)
    plain = request.getfixturevalue("plain_varlen")
    logps_N, grads = results(name, packs)
    assert plain.calls == (3 if name in IN_ONE_CALL else 0)
    assert_exact(logps_N, expected_N)
    for parameter, grad in grads.items():
        assert_exact(grad, expected_grads[parameter], parameter)


@pytest.mark.parametrize("name", IN_ONE_CALL)
def test_a_layer_that_is_computed_again_attends_in_one_call_again(name, plain_varlen):  # noqa: F811
    """In fp32: what makes a model exact in fp64 here does not reach into a backward pass."""
    found = []
    for recomputes in (False, True):
        model = build(name, ATTENTION_NAME, **dict.fromkeys(("dropout", "embd_pdrop", "resid_pdrop"), 0.0))
        if recomputes:
            enable_checkpointing(decoder_layers(model.train()), "full")
        found.append(run(Policy(model), True))
    assert plain_varlen.calls == 3 + 2 * 3
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def judged(name: str, **options) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(hidden states of the last tokens, rows of all layers) of a judge on both rounds of three pairs."""
    row = pack([[ids % 97 for ids in group] for group in groups((15, 15), (9, 9), (20,), shared=6)])
    model = build_double(name, ATTENTION_NAME)
    capture = JudgeCapture(row, frozenset(options.pop("layers", range(3))), **options)
    final = decoder_layers(model)[-1] if "final_layer" in options else None
    with InDouble():
        hidden_SD = judge_forward(model.get_decoder(), capture, 3, final)
    return hidden_SD, [row_T for layer in sorted(capture.rows) for row_T in capture.rows[layer]]


@pytest.mark.parametrize("options, at_once", [({}, 3), ({"layers": (2,)}, 3), ({"final_layer": 2}, 2),
                                              ({"eager": True, "layers": (1,)}, 2)], ids=str)
@pytest.mark.parametrize("name", IN_ONE_CALL)
def test_judges_in_one_call_equal_those_by_sequence(name, options, at_once, request):
    expected_SD, expected_rows = judged(name, **options)
    plain = request.getfixturevalue("plain_varlen")
    hidden_SD, rows = judged(name, **options)
    assert plain.calls == at_once
    assert_exact(hidden_SD, expected_SD)
    for ours_T, row_T in zip(rows, expected_rows, strict=True):
        assert_exact(ours_T, row_T)


def test_the_index_is_made_once_a_micro_batch(plain_varlen, monkeypatch):  # noqa: F811
    made = []
    monkeypatch.setattr(attention, "index_rows", lambda *args: made.append(args) or index_rows(*args))
    model = build("llama", ATTENTION_NAME)
    enable_checkpointing(decoder_layers(model.train()), "full")
    run(Policy(model), True)
    assert len(made) == 1 and plain_varlen.calls == 6


def test_what_the_kernels_can_not_do_goes_by_sequence(plain_varlen, monkeypatch):  # noqa: F811
    def takes(head_dim=8, value_dim=None, **options) -> bool:
        query = torch.zeros(1, 2, 3, head_dim)
        value = torch.zeros(1, 2, 3, value_dim or head_dim)
        layout = attention.Layout((((0, 3),),))
        return attention.attends_at_once(layout, query, query, value, AttentionOptions(1.0, **options))
    assert takes() and takes(256) and takes(192) and takes(sliding_window=2)
    assert not any([takes(12), takes(264), takes(200), takes(224), takes(8, 16), takes(softcap=2.0),
                    takes(sinks_H=torch.zeros(2))])
    monkeypatch.setattr(varlen, "DTYPES", (torch.bfloat16, torch.float16))
    assert not takes()
    monkeypatch.undo()
    assert not takes()  # a CPU
    planned = torch.zeros(1, 2, 3, 8, device="meta", dtype=torch.float16)
    for ranges in (None, (((0, 3),),)):  # of rows without ranges nothing is known
        layout = attention.Layout(ranges)
        assert attention.attends_at_once(layout, planned, planned, planned, AttentionOptions(1.0)) == bool(ranges)


def test_torch_still_has_the_contract():
    """The names that the plain implementation takes are those that torch's own has."""
    ours, torchs = (inspect.signature(function).parameters for function in (
        lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size: None, varlen_attn))
    assert list(ours)[:7] == list(torchs)[:7] and set(ours) <= set(torchs)


@pytest.mark.parametrize("names", [True, False])
def test_grouped_heads_are_named_where_torch_has_the_name(names, plain_varlen, monkeypatch):  # noqa: F811
    """Without, they are handed over as they are where a device takes them, and repeated where it does not."""
    seen = []

    def record(query, key, *args, **options):
        seen.append((key.shape[1], options.get("enable_gqa")))
        return plain_varlen(query, key, *args, **options | {"enable_gqa": True})
    monkeypatch.setattr(varlen, "varlen_attn", record)
    monkeypatch.setattr(varlen, "NAMES_GROUPED_HEADS", names)
    row = pack(ROWS["some shared"])
    given = operands(len(row.input_ids_T))
    index = index_rows(row.ranges, len(row.input_ids_T), CPU)
    outputs = [attend_rows(*given, index, 1.0, None)]
    if not names:
        monkeypatch.setattr(varlen, "takes_grouped_heads", lambda device: False)
        outputs.append(attend_rows(*given, index, 1.0, None))
        assert_exact(*outputs)
    assert seen == ([(2, True)] if names else [(2, None), (4, None)])


def test_plain_batches_name_their_ranges():
    batch = collate(MicroBatch((0, 1)), [example(0, 4, 2, 3), example(1, 2, 5, 1)], [0, 1])
    width = batch.input_ids_RT.shape[1]
    assert not batch.packs and batch.ranges == tuple(((width * row, width * row + length),)
                                                     for row, length in enumerate((6, 7, 7, 3)))
    assert collate(MicroBatch((0, 1, 2, 3)), EXAMPLES, [0, 1, 2, 3], packs=True).packs


def test_a_run_in_one_call_is_the_run_by_sequence(run_arguments, plain_run, tmp_path, plain_varlen):  # noqa: F811
    """Judge, reference, steps and evaluations."""
    train.main(run_arguments(tmp_path / "run", cache_dir=tmp_path / "cache"))
    assert plain_varlen.calls > 20
    assert_close_rows(read_rows(tmp_path / "run"), read_rows(plain_run))
