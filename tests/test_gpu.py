"""What only a GPU can show of the fused op: half precision on tensor cores, sizes past 2^31, memory, host syncs.

    pytest -m gpu          these tests, and those of tests/test_gpu_runs.py
"""

from functools import partial

import pytest
import torch

from twdpo.kernels import weighted_logratio as kernels
from twdpo.logratio import TERMS, HeadOptions, weighted_logratio, weighted_logratio_chunked, weighted_logratio_spec

pytestmark = pytest.mark.gpu
MIB, GIB = 2**20, 2**30
DIFFERENTIABLE = tuple(name for name in TERMS if name != "top1")


def case(num_tokens: int, vocabulary: int, hidden: int, dtype=torch.bfloat16, bias: bool = False,
         compares: bool = True) -> dict:
    """Operands on the GPU; targets have log-probs of all sizes, p = 0.999 included. compares: with a reference near
    the policy, of hidden states twice as wide."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)
    head_VD = normal(vocabulary, hidden) * hidden ** -0.5
    targets_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator, device="cuda")
    strength_N = torch.linspace(0, 25, num_tokens, device="cuda").to(dtype)[:, None]
    lens = [num_tokens // 3, 0, num_tokens // 2, num_tokens - num_tokens // 3 - num_tokens // 2]
    hidden_ND = normal(num_tokens, hidden) + strength_N * head_VD[targets_N]
    return {
        "hidden_ND": hidden_ND.requires_grad_(),
        "head_VD": head_VD.requires_grad_(),
        "bias_V": normal(vocabulary).requires_grad_() if bias else None,
        "targets_N": targets_N,
        "ref_logps_N": -torch.rand(num_tokens, device="cuda"),
        "weights_N": torch.rand(num_tokens, device="cuda") * (torch.rand(num_tokens, device="cuda") > 0.3),
        "seq_lens_S": torch.tensor(lens),
        "scale_S": torch.rand(4, device="cuda") + 1,
        "ref_states": (torch.cat([hidden_ND.detach(), 0.1 * normal(num_tokens, hidden)], dim=1),
                       torch.cat([head_VD.detach(), normal(vocabulary, hidden) * hidden ** -0.5], dim=1),
                       normal(vocabulary) if bias else None) if compares else None,
    }


def results(op, given: dict, options: HeadOptions | None = None, terms=()) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of a mixture of them with upstreams of both signs. terms: all but "top1"."""
    ratio_S, logps_N, values = op(**given, options=options, terms=terms)
    outputs = {"ratio_S": ratio_S, "logps_N": logps_N} | values
    generator = torch.Generator("cuda").manual_seed(3)
    upstream = [torch.randn(len(output), generator=generator, device="cuda", dtype=torch.float64).to(output.dtype)
                for output in outputs.values()]
    leaves = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    return {name: output.detach() for name, output in outputs.items()} | dict(zip(leaves, grads))


def fp64(given: dict) -> dict:
    ref_states = tuple(None if tensor is None else tensor.double() for tensor in given["ref_states"] or ())
    return {name: value.detach().double().requires_grad_()
            if isinstance(value, torch.Tensor) and value.requires_grad else value for name, value in given.items()
            } | {"ref_states": ref_states}


def half_kept(given: dict):
    """The op with a cache of half of the vocabulary, and of one tile where that is less."""
    columns = len(given["head_VD"]) / 2 + 256
    gib = columns * given["head_VD"].element_size() * len(given["targets_N"]) / GIB
    return partial(weighted_logratio, head_cache_gib=gib)


def assert_errors_of_torch(truth: dict, same: dict, ours: dict) -> None:
    """Against fp64, at most twice the error of full logits in the same dtype."""
    for name, value in ours.items():
        error, allowed = ((each.double() - truth[name]).norm() for each in (value, same[name]))
        size = truth[name].norm()
        assert error <= 2 * allowed + 1e-6 * size, f"{name}: {error / size:.2e}, torch {allowed / size:.2e}"


@pytest.mark.parametrize("options", [HeadOptions(), HeadOptions(softcap=30.0), HeadOptions(logit_scale=0.5)],
                         ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens, vocabulary, hidden, bias", [
    (1024, 128256, 1024, False),  # tensor memory accelerator
    (1003, 50257, 771, True),  # rows that don't start at multiples of 16 bytes
    (1, 128256, 1000, False),
    (129, 257, 72, True),
])
def test_error_is_that_of_torch(num_tokens, vocabulary, hidden, bias, dtype, options, monkeypatch):
    """Three-way, without a cache and with one, which changes no bit of what the forward gives."""
    kept, launch = [], kernels.launch_statistics
    monkeypatch.setattr(kernels, "launch_statistics", lambda *args: kept.append(launch(*args)) or kept[-1])
    given = case(num_tokens, vocabulary, hidden, dtype, bias)
    truth = results(weighted_logratio_chunked, fp64(given), options)
    same = results(weighted_logratio_spec, given, options)
    ours = results(weighted_logratio, given, options)
    assert_errors_of_torch(truth, same, ours)
    if options.softcap is None:
        cached = results(half_kept(given), given, options)
        assert_errors_of_torch(truth, same, cached)
        assert all(torch.equal(ours[name], cached[name]) for name in ("ratio_S", "logps_N"))
        assert [each is not None for each in kept] == [False, True]


@pytest.mark.parametrize("options", [HeadOptions(), HeadOptions(softcap=30.0, logit_scale=0.5)],
                         ids=["plain", "softcap and scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens, vocabulary, hidden, bias", [(1024, 32000, 1024, False), (1003, 50257, 771, True)])
@pytest.mark.parametrize("terms", [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE], ids="+".join)
def test_errors_of_terms_are_those_of_torch(num_tokens, vocabulary, hidden, bias, dtype, options, terms):
    """Three-way, terms beside the log-probs: at most a few times the error of full logits in the same dtype."""
    given = case(num_tokens, vocabulary, hidden, dtype, bias)
    truth = results(weighted_logratio_chunked, fp64(given), options, terms)
    same = results(weighted_logratio_spec, given, options, terms)
    for name, ours in results(weighted_logratio, given, options, terms).items():
        error, allowed = ((value.double() - truth[name]).norm() for value in (ours, same[name]))
        size = truth[name].norm()
        assert error <= 4 * allowed + 3e-6 * size, f"{name}: {error / size:.2e}, torch {allowed / size:.2e}"


@pytest.mark.parametrize("top", [20, 1e4])
def test_the_entropy_gradient_of_sure_tokens_is_exact(top):
    """p = 1 - 1e-6, and 1: each entry is right in itself, where plain fp32 autograd keeps but two digits."""
    given = case(50, 256, 256) | {"head_VD": torch.eye(256, device="cuda", dtype=torch.bfloat16)}
    logits_NV = torch.randn(50, 256, device="cuda").bfloat16()
    logits_NV[torch.arange(50), given["targets_N"]] = top
    gradients = []
    for op, operands in ((weighted_logratio, given), (weighted_logratio_spec, given | {
            "head_VD": given["head_VD"].double()})):
        leaf_NV = logits_NV.to(operands["head_VD"].dtype).requires_grad_()
        entropy_N = op(**operands | {"hidden_ND": leaf_NV}, terms=("entropy",))[2]["entropy"]
        gradients.append(torch.autograd.grad(entropy_N.sum(), leaf_NV)[0].double())
    torch.testing.assert_close(*gradients, atol=0, rtol=1e-2)


@pytest.mark.parametrize("hidden", [256, 771])  # with and without the tensor memory accelerator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reference_that_is_the_policy_is_no_bit_away(dtype, hidden):
    given = case(300, 5003, hidden, dtype, bias=True)
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    values = weighted_logratio(**given | {"ref_states": tuple(leaves)}, terms=("kl", "reverse_kl"))[2]
    grads = torch.autograd.grad([value.sum() for value in values.values()], leaves)
    assert all((value == 0).all() for value in (*values.values(), *grads))


def test_fp32_is_not_rounded_to_tf32():
    given = case(257, 5003, 320, torch.float32, bias=True)
    truth = results(weighted_logratio_chunked, fp64(given))
    for name, ours in results(weighted_logratio, given).items():
        assert (ours.double() - truth[name]).norm() <= 3e-6 * truth[name].norm(), name


@pytest.mark.parametrize("num_tokens, vocabulary, hidden, cache_gib, terms", [
    (20_011, 128_256, 64, 0.0, ()),  # N V = 2.6e9
    (20_011, 128_256, 64, 4.5, ()),  # of which 2.4e9 are kept
    (20_011, 128_256, 64, 0.0, ("kl", "reverse_kl")),
    (70, 128_256, 17_000, 0.0, ()),  # V D = 2.2e9: offsets into the head itself pass 2^31
    (70, 128_256, 17_001, 0.0, ()),  # and without the tensor memory accelerator
])
def test_sizes_past_32_bit_offsets(num_tokens, vocabulary, hidden, cache_gib, terms):
    """More than 2^31 elements: the last rows and columns are as right as the first."""
    given = case(num_tokens, vocabulary, hidden, compares=bool(terms))
    ours = results(partial(weighted_logratio, head_cache_gib=cache_gib), given, terms=terms)
    chunked = results(weighted_logratio_chunked, given, terms=terms)
    for name in ("logps_N", *terms, "hidden_ND", "head_VD"):
        for part in (slice(0, 100), slice(-100, None)):
            torch.testing.assert_close(ours[name][part].float(), chunked[name][part].float(), atol=3e-2, rtol=3e-2,
                                       msg=lambda text, name=name, part=part: f"{name} {part}: {text}")


def test_millions_of_tokens():
    """N D = 2.2e9. An entry of the head's gradient is then a sum of 2.2 million terms rounded to bf16: its error is
    compared with torch's, as a norm, and the truth is made in parts."""
    num_tokens, part = 2_200_000, 100_000
    given = case(num_tokens, 100, 1_000, compares=False)
    upstream_N = torch.randn(num_tokens, generator=torch.Generator("cuda").manual_seed(3), device="cuda")

    def run(op, given, upstream_N):
        logps_N = op(**given)[1]
        grads = torch.autograd.grad(logps_N, [given["hidden_ND"], given["head_VD"]], upstream_N)
        return {"logps_N": logps_N.detach()} | dict(zip(("hidden_ND", "head_VD"), grads))
    ways = [run(op, given, upstream_N) for op in (weighted_logratio, weighted_logratio_spec)]
    squares = {name: torch.zeros(3, dtype=torch.float64, device="cuda") for name in ways[0]}  # ours, torch, truth

    def add(name, truth, rows=slice(None)):
        for place, value in enumerate((*(way[name][rows].double() - truth for way in ways), truth)):
            squares[name][place] += value.square().sum()
    head_VD = torch.zeros(100, 1_000, dtype=torch.float64, device="cuda")
    for first in range(0, num_tokens, part):
        rows = slice(first, first + part)
        tokens = {name: given[name][rows] for name in ("hidden_ND", "targets_N", "ref_logps_N", "weights_N")}
        one = {"seq_lens_S": torch.tensor([part]), "scale_S": torch.ones(1, device="cuda")}
        truth = run(weighted_logratio_chunked, fp64(given | tokens | one), upstream_N[rows].double())
        head_VD += truth["head_VD"]
        for name in ("logps_N", "hidden_ND"):
            add(name, truth[name], rows)
    add("head_VD", head_VD)
    for name, (error, allowed, size) in ((name, values.sqrt().tolist()) for name, values in squares.items()):
        assert error <= 2 * allowed + 1e-6 * size, f"{name}: {error / size:.2e}, torch {allowed / size:.2e}"


@pytest.mark.parametrize("keeps, terms", [(False, ()), (True, ()), (False, ("kl", "reverse_kl", "collision"))])
def test_eight_runs_are_bitwise_equal(keeps, terms):
    given = case(2000, 128256, 512)
    op = half_kept(given) if keeps else weighted_logratio
    first = results(op, given, terms=terms)
    for _ in range(7):
        again = results(op, given, terms=terms)
        assert all(torch.equal(value, again[name]) for name, value in first.items())
    with torch.no_grad():
        assert torch.equal(weighted_logratio(**given, terms=terms)[1], first["logps_N"])


@pytest.mark.parametrize("num_tokens, cache_gib, terms", [
    (4096, 0.0, ()), (16384, 0.0, ()), (4096, 0.5, ()), (4096, 0.0, DIFFERENTIABLE), (16384, 0.0, DIFFERENTIABLE)])
def test_no_full_logits(num_tokens, cache_gib, terms):
    """Peak memory above inputs and gradients: at most 300 MiB, the cache, and the hidden states' gradient in fp32."""
    given, op = case(num_tokens, 128256, 1024), partial(weighted_logratio, head_cache_gib=cache_gib)
    results(op, case(64, 128256, 1024), terms=terms)  # compiles, and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(op, given, terms=terms)
    torch.cuda.synchronize()
    gradients = 2 * (given["hidden_ND"].numel() + given["head_VD"].numel())
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra <= 300 * MIB + 4 * given["hidden_ND"].numel() + cache_gib * GIB, f"{extra / MIB:.0f} MiB"


def test_the_host_never_waits():
    given = case(500, 5003, 256, bias=True)
    cached = half_kept(given)
    for op in (weighted_logratio, cached):
        results(op, given)  # compiles
    results(weighted_logratio, given, terms=DIFFERENTIABLE)
    upstream = torch.ones(4, device="cuda"), torch.ones(500, device="cuda")
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ratio_S, logps_N, values = weighted_logratio(**given, terms=TERMS)
        asked = [values[name] for name in DIFFERENTIABLE]
        torch.autograd.grad((ratio_S, logps_N, *asked), leaves, (*upstream, *[upstream[1]] * len(asked)))
        torch.autograd.grad(cached(**given)[:2], leaves, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
