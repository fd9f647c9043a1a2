"""Every implementation of the op against its specification: values, every gradient, awkward sizes and numbers.

Without a GPU the Triton kernel runs in Triton's interpreter; what only a GPU can show is in test_gpu.py.
"""

from functools import partial

import pytest
import torch
from op_of_tests import (  # noqa: F401 - a fixture of all tests
    IMPLEMENTATIONS,
    OPTIONS,
    assert_equal_to_specification,
    assert_statistics,
    calm,
    double,
    gradients,
    interpreted,
    kernel,
    one_shape,
    operands,
    poisoned_memory,
    set_chunk_columns,
    three_ways,
    triton_op,
    triton_op_deep_tiles,
    triton_op_descriptors,
    triton_op_large_tiles,
    triton_op_many_waves,
)
from precision_of_tests import assert_as_exact
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from twdpo import dist, logratio
from twdpo.kernels.tiles import TILES
from twdpo.logratio import TERMS, weighted_logratio, weighted_logratio_chunked, weighted_logratio_spec

# Lanes past the end of a tensor compute on zeros.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


# The whole op, fp64


@pytest.mark.parametrize("columns", [1, 10, 1000])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seq_lens", [[5, 3, 1, 7], [1], [0, 4], [3, 0], [0, 0]])
def test_chunked_equals_the_specification(columns, options, seq_lens, monkeypatch):
    if columns < 1000:
        set_chunk_columns(monkeypatch, columns)
    given = operands(seq_lens)
    given["targets_N"][:2] = 5  # repeated
    assert_equal_to_specification(weighted_logratio_chunked, given, options)


@interpreted
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seq_lens", [[5, 3, 1, 20], [1], [0, 4], [3, 0], [0, 0]])
def test_triton_equals_the_specification(options, seq_lens):
    given = operands(seq_lens)
    given["targets_N"][:2] = 5  # repeated
    assert_equal_to_specification(triton_op_many_waves, given, options)


@interpreted
@pytest.mark.parametrize("op", [weighted_logratio_chunked, triton_op_many_waves], ids=["chunked", "triton"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_gradcheck(op, options, monkeypatch):
    """Every differentiable operand, learned weights and scales included."""
    set_chunk_columns(monkeypatch, 2)
    given = operands([2, 0, 3], vocabulary=37, hidden=3)
    names = ["hidden_ND", "head_VD", "bias_V", "ref_logps_N", "weights_N", "scale_S"]
    leaves = [given[name].detach().double().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(lambda *leaves: op(**given | dict(zip(names, leaves)), options=options)[:2],
                                    leaves, fast_mode=op is triton_op_many_waves)


# Awkward sizes, fp32


@pytest.mark.parametrize("op", [triton_op, triton_op_many_waves, triton_op_descriptors],
                         ids=["plain", "one-tile waves", "descriptors"])
@pytest.mark.parametrize("num_tokens, vocabulary, hidden", [(1, 1, 4), (1, 33, 4), (17, 32, 16), (33, 131, 36)])
@pytest.mark.parametrize("bias", [False, True])
def test_ragged_sizes(op, num_tokens, vocabulary, hidden, bias):
    given = operands([num_tokens // 2, num_tokens - num_tokens // 2], vocabulary, hidden, torch.float32, bias)
    assert_equal_to_specification(op, given)


def test_tile_shape_and_waves_do_not_matter():
    given = operands([20, 30], vocabulary=131, hidden=40, dtype=torch.float32)
    for tiles in (one_shape(64, 16, 32, 4, 2, group_n=1), one_shape(32, 128, 64, 8, 3, group_n=16)):
        for wave_mib in (1e-6, 0.02, 160):
            assert_equal_to_specification(partial(triton_op, tiles=tiles, wave_mib=wave_mib), given, OPTIONS[3])


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_loops_of_the_finishing_kernels(options, monkeypatch):
    """More tiles than one block of tiles, more tokens than one block of tokens or of a sequence's sum."""
    for name, size in (("TOKEN_BLOCK", 16), ("TILE_BLOCK", 2), ("SUM_BLOCK", 8)):
        monkeypatch.setattr(kernel, name, size)
    given = operands([20, 0, 3], vocabulary=131, dtype=torch.float32)
    assert_equal_to_specification(triton_op, given, options)
    assert_statistics(triton_op, calm(given), options)


@IMPLEMENTATIONS
def test_order_of_sequences_does_not_matter(op):
    """Permuted sequences give permuted results."""
    given = operands([7, 0, 12, 30], vocabulary=67, dtype=torch.float32)
    order = [2, 0, 3, 1]
    tokens = torch.cat([torch.arange(49).split([7, 0, 12, 30])[sequence] for sequence in order])
    permuted = given | {name: given[name][tokens].detach().requires_grad_(given[name].requires_grad)
                        for name in ("hidden_ND", "targets_N", "ref_logps_N", "weights_N")}
    permuted |= {name: given[name][order] for name in ("seq_lens_S", "scale_S")}

    def run(op, given):
        ratio_S, logps_N, _ = op(**given)
        return ratio_S, logps_N, torch.autograd.grad(ratio_S.square().sum(), given["hidden_ND"])[0]
    plain, exact = run(weighted_logratio_spec, given), run(weighted_logratio_spec, double(given))
    for ours, each, truth, places in zip(run(op, permuted), plain, exact, (order, tokens, tokens)):
        assert_as_exact(ours, each[places], truth[places])


# Awkward numbers


@IMPLEMENTATIONS
def test_huge_logits_and_sure_tokens_stay_finite_and_right(op):
    given = operands([3], vocabulary=5, hidden=5, dtype=torch.float32, bias=False)
    given["head_VD"] = torch.eye(5, requires_grad=True)
    given["hidden_ND"] = torch.tensor([[1e4, -1e4, 0, 0, 0], [-1e4, 1e4, 0, 0, 0], [8.3, 0, 0, 0, 0]],
                                      requires_grad=True)
    given["targets_N"] = torch.tensor([0, 0, 0])
    ours = gradients(op, given)
    assert ours["logps_N"][0] == 0 and ours["logps_N"][1] == -2e4 and 0.998 < ours["logps_N"][2].exp() < 0.9999
    assert_equal_to_specification(op, given)


@pytest.mark.parametrize("op", [weighted_logratio_chunked, triton_op_deep_tiles], ids=["chunked", "triton"])
@pytest.mark.parametrize("top", [8, 50, 1e4])
def test_sure_tokens_are_as_exact_as_torch(op, top, monkeypatch):
    """p = 0.99 at any size of the logits: a log-sum-exp rounded to one number would be off by its last bit."""
    set_chunk_columns(monkeypatch, 100)
    given = operands([20, 30], vocabulary=256, hidden=256, dtype=torch.float32, bias=False)
    logits_NV = top - 10 + 0.5 * torch.randn(50, 256)
    logits_NV[torch.arange(50), given["targets_N"]] = top
    given |= {"head_VD": torch.eye(256), "hidden_ND": logits_NV.requires_grad_(),
              "ref_logps_N": torch.full((50,), -0.01), "weights_N": torch.ones(50)}
    # An error of one rounding of 1 is any exponential's; the last bit of 50 is thirty of it.
    assert_equal_to_specification(op, given, floor=2 * torch.finfo(torch.float32).eps)


@IMPLEMENTATIONS
def test_vocabulary_that_a_bias_rules_out(op, monkeypatch):
    """Whole tiles and chunks of probability 0, as in a vocabulary padded to a multiple."""
    set_chunk_columns(monkeypatch, 10)
    given = operands([4, 5], vocabulary=100, dtype=torch.float32)
    given["targets_N"] %= 20
    given["bias_V"] = torch.where(torch.arange(100) < 20, 0.0, float("-inf"))
    assert_equal_to_specification(op, given)
    assert op(**given, terms=TERMS)[2]["entropy"].isfinite().all()


@IMPLEMENTATIONS
def test_zero_weights_and_upstream_give_zero_gradients(op):
    given = operands([20, 20], dtype=torch.float32) | {"weights_N": torch.zeros(40)}
    given["weights_N"][:3] = 1.0  # the later blocks of rows are skipped
    names = ("hidden_ND", "head_VD", "bias_V")
    ours, same, exact = [torch.autograd.grad(way(**each)[0].sum(), [each[name] for name in names])
                         for way, each in three_ways(op, given)]
    assert (ours[0][3:] == 0).all()
    for name, *values in zip(names, ours, same, exact):
        assert_as_exact(*values, name)


@IMPLEMENTATIONS
def test_what_is_not_finite_shows(op):
    """A NaN upstream, a NaN hidden state, and a target outside the vocabulary: no number hides them."""
    given = operands([20, 20], dtype=torch.float32)
    _, logps_N, _ = op(**given)
    upstream = torch.zeros(40).index_fill(0, torch.tensor(30), float("nan"))
    grad_hidden_ND, = torch.autograd.grad(logps_N, given["hidden_ND"], upstream)
    assert grad_hidden_ND[30].isnan().all() and grad_hidden_ND[:16].isfinite().all()
    broken = given | {"hidden_ND": given["hidden_ND"].detach().index_fill(0, torch.tensor(7), float("nan"))}
    ratio_S, logps_N, values = op(**broken, terms=("entropy",))
    assert logps_N.isnan().nonzero().tolist() == values["entropy"].isnan().nonzero().tolist() == [[7]]
    _, logps_N, _ = op(**given | {"targets_N": given["targets_N"].index_fill(0, torch.tensor(3), 37)})
    assert logps_N.isnan().nonzero().tolist() == [[3]]


# Modes


@IMPLEMENTATIONS
@pytest.mark.parametrize("terms", [(), ("entropy", "kl", "reverse_kl", "collision")], ids=["alone", "with terms"])
@pytest.mark.parametrize("needs", ["hidden_ND", "head_VD", "bias_V"])
def test_each_input_alone_may_need_a_gradient(op, needs, terms):
    given = operands([2, 3], dtype=torch.float32)
    for name in ("hidden_ND", "head_VD", "bias_V"):
        given[name].requires_grad_(name == needs)
    assert_equal_to_specification(op, given, terms=terms)


@IMPLEMENTATIONS
@pytest.mark.parametrize("columns", [10, 1000])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_entropy_and_top1(op, columns, options, monkeypatch):
    if columns < 1000:
        set_chunk_columns(monkeypatch, columns)
    given = calm(operands([30, 20], vocabulary=101, dtype=torch.float32))
    logits_NV = logratio.logits_of(given["hidden_ND"], given["head_VD"], given["bias_V"], options)
    given["targets_N"][::2] = logits_NV.argmax(dim=-1)[::2]
    ratio_S, logps_N, values = assert_statistics(op, given, options)
    assert 0.5 <= values["top1"].double().mean() < 0.7 and not values["top1"].requires_grad
    plain = op(**given, options=options)
    assert torch.equal(plain[0], ratio_S) and torch.equal(plain[1], logps_N) and plain[2] == {}


@IMPLEMENTATIONS
def test_without_gradients_log_probs_are_the_same_bits(op):
    """The reference pass and the policy's first step agree exactly on the same batch; so do two runs."""
    given = operands([20, 30], vocabulary=101, hidden=40, dtype=torch.float32)
    first, second = gradients(op, given), gradients(op, given)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    with torch.no_grad():
        assert torch.equal(op(**given)[1], first["logps_N"])


def test_a_second_backward_pass_gives_the_same():
    given = operands([2, 3])
    _, logps_N, _ = weighted_logratio_chunked(**given)
    first, second = [torch.autograd.grad(logps_N.sum(), given["hidden_ND"], retain_graph=True)[0] for _ in range(2)]
    assert torch.equal(first, second)


@IMPLEMENTATIONS
def test_strides_do_not_matter(op):
    """Every operand and the upstream gradients as views with gaps, or expanded from one number."""
    given = operands([5, 3, 9], dtype=torch.float32)
    given["scale_S"].requires_grad_()

    def spread(tensor):
        if not isinstance(tensor, torch.Tensor) or tensor is given["seq_lens_S"]:
            return tensor
        return torch.stack([tensor.detach(), torch.zeros_like(tensor)], dim=-1)[..., 0].requires_grad_(
            tensor.requires_grad)
    views = {name: spread(tensor) for name, tensor in given.items()}
    assert not views["hidden_ND"].is_contiguous() and not views["weights_N"].is_contiguous()
    assert_equal_to_specification(op, views)
    given["weights_N"] = torch.ones(1).expand(17)
    names = ("hidden_ND", "scale_S")
    gradients_ = [torch.autograd.grad(sum(output.sum() for output in way(**each)[:2]), [each[name] for name in names])
                  for way, each in three_ways(op, given)]
    for name, *values in zip(names, *gradients_):
        assert_as_exact(*values, name)


@IMPLEMENTATIONS
def test_a_second_derivative_is_refused(op):
    given = operands([2, 3], dtype=torch.float32)
    grad_hidden_ND, = torch.autograd.grad(op(**given)[1].sum(), given["hidden_ND"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad_hidden_ND.square().sum().backward()


@IMPLEMENTATIONS
def test_no_sequences(op):
    given = operands([], dtype=torch.float32)
    ratio_S, logps_N, _ = op(**given | {"seq_lens_S": torch.zeros(0, dtype=torch.int64)})
    assert ratio_S.shape == logps_N.shape == (0,)


def test_the_kernel_asks_for_no_precision_by_the_old_interface_and_restores_what_it_sets():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    name = "allow_bf16_reduced_precision_reduction"
    try:
        settings.fp32_precision = "tf32"
        setattr(settings, name, (False, False))
        gradients(triton_op, operands([2, 3], dtype=torch.float32))
        assert (getattr(settings, name), getattr(settings, f"{name}_split_k")) == (False, False)
    finally:
        settings.fp32_precision = before
        setattr(settings, name, (True, True))


def test_tiles_without_the_accelerator_are_small():
    large, small = (kernel.default_tiles(torch.bfloat16, (9, 0), aligned) for aligned in (True, False))
    assert all(tile.descriptors for tile in large) and not any(tile.descriptors for tile in small)
    assert [[tile.block_v for tile in tiles] for tiles in (large, small)] == [[256, 256, 128], [128] * 3]


def test_all_kernels_of_a_gpu_make_the_same_bits():
    """The inner loop's step decides in which order a logit is summed."""
    for choices in TILES.values():
        assert all(len({tile.block_d for tile in tiles}) == 1 for tiles in choices.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [weighted_logratio_chunked, triton_op_large_tiles], ids=["chunked", "triton"])
def test_half_precision_error_is_that_of_torch(op, dtype, monkeypatch):
    """Against fp64 truth, beside the specification in the same dtype."""
    set_chunk_columns(monkeypatch, 100)
    assert_equal_to_specification(op, operands([40, 60], vocabulary=1003, hidden=64, dtype=dtype, bias=False))


# Dispatch and refusals


@pytest.mark.parametrize("op", [weighted_logratio, weighted_logratio_chunked, weighted_logratio_spec])
def test_an_unknown_term_is_refused_and_a_repeated_one_is_one(op):
    with pytest.raises(ValueError, match="unknown term 'entropie': it must be of entropy, top1"):
        op(**operands([2, 3]), terms=("top1", "entropie"))
    given = operands([2, 3])
    expected, ours = [gradients(op, given, terms=("entropy",) * times) for times in (1, 2)]
    assert all(torch.equal(ours[name], value) for name, value in expected.items())


def test_the_cpu_takes_the_chunked_path(monkeypatch):
    monkeypatch.setattr(logratio, "weighted_logratio_chunked", lambda *args: args[9])
    assert weighted_logratio(**operands([2, 3]), terms=("top1",)) == ("top1",)


@pytest.mark.parametrize("changes, message", [
    ({"seq_lens_S": torch.tensor([2, 2])}, r"sequences of \[2, 2\] tokens don't fit 5 targets"),
    ({"weights_N": torch.ones(4)}, r"weights is \(4,\)"),
    ({"scale_S": torch.ones(3)}, r"scale is \(3,\)"),
    ({"head_VD": torch.ones(37, 12)}, r"hidden is \(5, 11\)"),
    ({"bias_V": torch.ones(36)}, r"bias is \(36,\)"),
    ({"head_VD": torch.ones(37, 11).bfloat16()}, "cast them to one dtype"),
    ({"head_VD": torch.ones(37)}, r"head is of shape \(37,\)"),
    ({"hidden_ND": torch.ones(5, 11, dtype=torch.int64)}, "hidden states are torch.int64"),
    ({"targets_N": torch.zeros(5)}, "targets is torch.float32"),
    ({"targets_N": torch.zeros(5, 1, dtype=torch.int64)}, r"targets is torch.int64 of shape \(5, 1\)"),
    ({"seq_lens_S": torch.tensor([2.0, 3.0])}, "seq_lens is torch.float32"),
    ({"seq_lens_S": torch.tensor([-2, 7])}, r"sequences of \[-2, 7\] tokens"),
    ({"ref_states": (torch.ones(5, 4), torch.ones(36, 4), None)}, r"the reference's head is \(36, 4\)"),
    ({"ref_states": (torch.ones(4, 4), torch.ones(37, 4), None)}, r"the reference's hidden is \(4, 4\)"),
    ({"ref_states": (torch.ones(5, 3), torch.ones(37, 4), None)}, r"the reference's hidden is \(5, 3\)"),
    ({"ref_states": (torch.ones(5, 4), torch.ones(37), None)}, r"the reference's head is of shape \(37,\)"),
    ({"ref_states": (torch.ones(5, 4), torch.ones(37, 4), torch.ones(1))}, r"the reference's bias is \(1,\)"),
    ({"ref_states": (*2 * (torch.ones(5, 4).double(),), None)}, "and those of the reference, are .*: cast them to one"),
    ({"ref_states": None}, "the term 'kl' compares with the reference: give ref_states"),
])
def test_operands_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        weighted_logratio(**operands([2, 3], dtype=torch.float32) | changes, terms=("kl",))


def test_a_dtensor_is_refused():
    process = dist.start()
    try:
        given = operands([2, 3], dtype=torch.float32)
        mesh = init_device_mesh(process.device.type, (1,))
        head, *ref_states = (DTensor.from_local(tensor, mesh, [Replicate()])
                             for tensor in (given["head_VD"], *given["ref_states"]))
        with pytest.raises(ValueError, match="DTensor"):
            weighted_logratio(**given | {"head_VD": head})
        with pytest.raises(ValueError, match="DTensor.* the reference's head"):
            weighted_logratio(**given | {"ref_states": tuple(ref_states)}, terms=("kl",))
    finally:
        dist.stop()
