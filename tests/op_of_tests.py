"""What tests of the fused op share: its implementations, operands, and comparisons with the specification.

Without a GPU the Triton kernel runs in Triton's interpreter; what only a GPU can show is in test_gpu.py.
"""

from functools import partial

import pytest
import torch
from precision_of_tests import assert_as_exact, assert_exact

from twdpo import chunked_logps, logratio
from twdpo.logratio import TERMS, HeadOptions, weighted_logratio_chunked, weighted_logratio_spec

kernel = pytest.importorskip("twdpo.kernels.weighted_logratio")
# Of several shapes, as on a GPU.
SMALL_TILES = kernel.Tiles(kernel.Tile(16, 32, 16, 4, 1, group_n=2), kernel.Tile(32, 16, 16, 4, 1, group_n=2),
                           kernel.Tile(32, 32, 16, 4, 1, group_n=2))

DIFFERENTIABLE = ("entropy", "kl", "reverse_kl", "collision")
OPTIONS = [HeadOptions(), HeadOptions(softcap=1.5), HeadOptions(logit_scale=0.7),
           HeadOptions(softcap=2.0, logit_scale=3.0)]


def triton_op(*args, options=None, tiles=SMALL_TILES, **given):
    """The kernel with the signature of the others; on the GPU if there is one, with results back on the CPU."""
    options = options or HeadOptions()
    if not kernel.INTERPRETED:
        given = on_tensors(given, torch.Tensor.cuda) | {"seq_lens_S": given["seq_lens_S"]}
    outputs = kernel.weighted_logratio_triton(*args, **given, logit_scale=options.logit_scale, softcap=options.softcap,
                                              tiles=tiles)
    return outputs[0].cpu(), outputs[1].cpu(), {name: value.cpu() for name, value in outputs[2].items()}


def one_shape(*shape, **more):
    """Tiles of one shape for all kernels."""
    return kernel.Tiles(*3 * (kernel.Tile(*shape, **more),))


def on_tensors(given: dict, function) -> dict:
    """The operands with the function's result in place of each tensor, those of the reference included."""
    def change(value):
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return function(value) if isinstance(value, torch.Tensor) else value
    return {name: change(value) for name, value in given.items()}


triton_op_large_tiles = partial(triton_op, tiles=one_shape(64, 128, 64, 8, 1))
# A larger case in fewer programs, each of which the interpreter takes its time for: still several tiles each way.
triton_op_deep_tiles = partial(triton_op, tiles=one_shape(16, 64, 64, 4, 1, group_n=2))
triton_op_many_waves = partial(triton_op, wave_mib=1e-6)  # one tile a wave
triton_op_descriptors = partial(triton_op, tiles=one_shape(16, 32, 16, 4, 1, descriptors=True))
IMPLEMENTATIONS = pytest.mark.parametrize("op", [weighted_logratio_chunked, triton_op], ids=["chunked", "triton"])
interpreted = pytest.mark.skipif(not kernel.INTERPRETED, reason="fp64 kernels run in the interpreter only")


def set_chunk_columns(monkeypatch, columns: int) -> None:
    """Chunks of at most this many vocabulary entries."""
    monkeypatch.setattr(chunked_logps, "KEEP_BYTES", 0)
    monkeypatch.setattr(chunked_logps, "CHUNK_BYTES", 0)
    monkeypatch.setattr(chunked_logps, "REFERENCE_CHUNK_BYTES", 0)
    monkeypatch.setattr(chunked_logps, "CHUNK_COLUMNS", columns)


def operands(seq_lens, vocabulary=37, hidden=11, dtype=torch.float64, bias=True) -> dict:
    """The reference's hidden states are larger than the policy's, and it has a bias where the policy has one."""
    num_tokens, generator = sum(seq_lens), torch.Generator().manual_seed(1)

    def fixed(*shape):
        return torch.randn(shape, generator=generator, dtype=dtype)
    return {
        "hidden_ND": torch.randn(num_tokens, hidden, dtype=dtype, requires_grad=True),
        "head_VD": torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True),
        "targets_N": torch.randint(0, vocabulary, (num_tokens,)),
        "ref_logps_N": -torch.rand(num_tokens),
        "weights_N": torch.rand(num_tokens) * (torch.rand(num_tokens) > 0.3),
        "seq_lens_S": torch.tensor(seq_lens),
        "scale_S": torch.rand(len(seq_lens)) + 1,
        "bias_V": torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None,
        "ref_states": (fixed(num_tokens, hidden + 5), fixed(vocabulary, hidden + 5),
                       fixed(vocabulary) if bias else None),
    }


def gradients(op, given: dict, options=None, terms=()) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of a random mixture of those that are no bool, with upstreams of both signs."""
    ratio_S, logps_N, values = op(**given, options=options, terms=terms)
    outputs = {"ratio_S": ratio_S, "logps_N": logps_N} | values
    mixed = [output for output in outputs.values() if output.is_floating_point()]
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(len(output), generator=generator, dtype=torch.float64).to(output.dtype)
                for output in mixed]
    leaves = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    grads = torch.autograd.grad(mixed, list(leaves.values()), upstream)
    return outputs | {f"grad of {name}": grad for name, grad in zip(leaves, grads)}


def double(given: dict) -> dict:
    """The same operands in fp64."""
    return on_tensors(given, lambda value: value.detach().double().requires_grad_(value.requires_grad)
                      if value.is_floating_point() else value)


def assert_equal_to_specification(op, given: dict, options=None, terms=(), floor: float = 2e-6) -> None:
    """In fp64 equal; in a smaller dtype as exact as the specification is in that dtype."""
    same = gradients(weighted_logratio_spec, given, options, terms)
    exact = gradients(weighted_logratio_spec, double(given), options, terms)
    for name, ours in gradients(op, given, options, terms).items():
        if ours.dtype == torch.float64:
            assert_exact(ours, exact[name], name)
        else:
            assert_as_exact(ours, same[name], exact[name], name, floor)


def three_ways(op, given: dict):
    """(way, operands): the op, the specification in the same dtype, and in fp64."""
    return (op, given), (weighted_logratio_spec, given), (weighted_logratio_spec, double(given))


def calm(given: dict) -> dict:
    """Operands of small logits: a saturated softcap would tie them."""
    return given | {name: 0.2 * given[name].detach() for name in ("hidden_ND", "bias_V")}


def assert_statistics(op, given: dict, options) -> tuple:
    """Entropy and top-1 are those of the logits. Returns the op's outputs."""
    outputs = op(**given, options=options, terms=TERMS)
    same_NV, exact_NV = (logratio.logits_of(each["hidden_ND"], each["head_VD"], each["bias_V"], options).detach()
                         for each in (given, double(given)))
    entropies = [torch.distributions.Categorical(logits=logits_NV).entropy() for logits_NV in (same_NV, exact_NV)]
    assert_as_exact(outputs[2]["entropy"].detach(), *entropies, "entropy")
    best_N2 = exact_NV.topk(2, dim=-1).values
    clear_N = best_N2[:, 0] - best_N2[:, 1] > 1e-4  # not within rounding of each other
    expected_N = exact_NV.argmax(dim=-1) == given["targets_N"]
    assert clear_N.double().mean() >= 0.9 and torch.equal(outputs[2]["top1"][clear_N], expected_N[clear_N])
    return outputs


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory nobody wrote is NaN, so that reading it shows."""
    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor
        return allocate_poisoned
    with torch.device("cpu"):
        torch.empty(0)  # torch keeps a list of what a device context acts on, made at first use: of the real functions
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
