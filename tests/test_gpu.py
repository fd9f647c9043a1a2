"""What only a GPU can show of the fused op: half precision on tensor cores, sizes past 2^31, memory, host syncs.

    pytest -m gpu          these tests, and those of tests/test_gpu_runs.py
"""

import pytest
import torch

from twdpo.logratio import TERMS, HeadOptions, weighted_logratio, weighted_logratio_chunked, weighted_logratio_spec

pytestmark = pytest.mark.gpu
MIB = 2**20


def case(num_tokens: int, vocabulary: int, hidden: int, dtype=torch.bfloat16, bias: bool = False) -> dict:
    """Operands on the GPU; targets have log-probs of all sizes, p = 0.999 included."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device="cuda").to(dtype)
    head_VD = normal(vocabulary, hidden) * hidden ** -0.5
    targets_N = torch.randint(0, vocabulary, (num_tokens,), generator=generator, device="cuda")
    strength_N = torch.linspace(0, 25, num_tokens, device="cuda").to(dtype)[:, None]
    lens = [num_tokens // 3, 0, num_tokens // 2, num_tokens - num_tokens // 3 - num_tokens // 2]
    return {
        "hidden_ND": (normal(num_tokens, hidden) + strength_N * head_VD[targets_N]).requires_grad_(),
        "head_VD": head_VD.requires_grad_(),
        "bias_V": normal(vocabulary).requires_grad_() if bias else None,
        "targets_N": targets_N,
        "ref_logps_N": -torch.rand(num_tokens, device="cuda"),
        "weights_N": torch.rand(num_tokens, device="cuda") * (torch.rand(num_tokens, device="cuda") > 0.3),
        "seq_lens_S": torch.tensor(lens),
        "scale_S": torch.rand(4, device="cuda") + 1,
    }


def results(op, given: dict, options: HeadOptions | None = None, terms=()) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of a mixture of them with upstreams of both signs. terms: "entropy" or none."""
    ratio_S, logps_N, values = op(**given, options=options, terms=terms)
    outputs = {"ratio_S": ratio_S, "logps_N": logps_N} | values
    generator = torch.Generator("cuda").manual_seed(3)
    upstream = [torch.randn(len(output), generator=generator, device="cuda", dtype=torch.float64).to(output.dtype)
                for output in outputs.values()]
    leaves = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.requires_grad}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    return {name: output.detach() for name, output in outputs.items()} | dict(zip(leaves, grads))


def fp64(given: dict) -> dict:
    return {name: value.detach().double().requires_grad_()
            if isinstance(value, torch.Tensor) and value.requires_grad else value for name, value in given.items()}


@pytest.mark.parametrize("options", [HeadOptions(), HeadOptions(softcap=30.0), HeadOptions(logit_scale=0.5)],
                         ids=["plain", "softcap", "scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens, vocabulary, hidden, bias", [
    (1024, 128256, 1024, False),  # tensor memory accelerator
    (1003, 50257, 771, True),  # rows that don't start at multiples of 16 bytes
    (1, 128256, 1000, False),
    (129, 257, 72, True),
])
def test_error_is_that_of_torch(num_tokens, vocabulary, hidden, bias, dtype, options):
    """Three-way: against fp64, at most twice the error of full logits in the same dtype."""
    given = case(num_tokens, vocabulary, hidden, dtype, bias)
    truth = results(weighted_logratio_chunked, fp64(given), options)
    same = results(weighted_logratio_spec, given, options)
    for name, ours in results(weighted_logratio, given, options).items():
        error, allowed = ((value.double() - truth[name]).norm() for value in (ours, same[name]))
        size = truth[name].norm()
        assert error <= 2 * allowed + 1e-6 * size, f"{name}: {error / size:.2e}, torch {allowed / size:.2e}"


@pytest.mark.parametrize("options", [HeadOptions(), HeadOptions(softcap=30.0, logit_scale=0.5)],
                         ids=["plain", "softcap and scale"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens, vocabulary, hidden, bias", [(1024, 32000, 1024, False), (1003, 50257, 771, True)])
def test_entropy_errors_are_those_of_torch(num_tokens, vocabulary, hidden, bias, dtype, options):
    """Three-way, the entropy beside the log-probs: at most a few times the error of full logits in the same dtype."""
    given = case(num_tokens, vocabulary, hidden, dtype, bias)
    truth = results(weighted_logratio_chunked, fp64(given), options, ("entropy",))
    same = results(weighted_logratio_spec, given, options, ("entropy",))
    for name, ours in results(weighted_logratio, given, options, ("entropy",)).items():
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


def test_fp32_is_not_rounded_to_tf32():
    given = case(257, 5003, 320, torch.float32, bias=True)
    truth = results(weighted_logratio_chunked, fp64(given))
    for name, ours in results(weighted_logratio, given).items():
        assert (ours.double() - truth[name]).norm() <= 3e-6 * truth[name].norm(), name


@pytest.mark.parametrize("num_tokens, vocabulary, hidden", [
    (20_011, 128_256, 64),  # N V = 2.6e9
    (70, 128_256, 17_000),  # V D = 2.2e9: offsets into the head itself pass 2^31
    (70, 128_256, 17_001),  # and without the tensor memory accelerator
    (2_200_000, 100, 1_000),  # N D = 2.2e9
])
def test_sizes_past_32_bit_offsets(num_tokens, vocabulary, hidden):
    """More than 2^31 elements: the last rows and columns are as right as the first."""
    given = case(num_tokens, vocabulary, hidden)
    ours = results(weighted_logratio, given)
    chunked = results(weighted_logratio_chunked, given)
    for name in ("logps_N", "hidden_ND", "head_VD"):
        for part in (slice(0, 100), slice(-100, None)):
            torch.testing.assert_close(ours[name][part].float(), chunked[name][part].float(), atol=3e-2, rtol=3e-2,
                                       msg=lambda text, name=name, part=part: f"{name} {part}: {text}")


def test_eight_runs_are_bitwise_equal():
    given = case(2000, 128256, 512)
    first = results(weighted_logratio, given)
    for _ in range(7):
        again = results(weighted_logratio, given)
        assert all(torch.equal(value, again[name]) for name, value in first.items())
    with torch.no_grad():
        assert torch.equal(weighted_logratio(**given)[1], first["logps_N"])


@pytest.mark.parametrize("num_tokens", [4096, 16384])
def test_no_full_logits(num_tokens):
    """Peak memory above inputs and gradients: at most 300 MiB and the fp32 gradient of the hidden states."""
    given = case(num_tokens, 128256, 1024)
    results(weighted_logratio, case(64, 128256, 1024))  # compiles, and lets cuBLAS take its workspace
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(weighted_logratio, given)
    torch.cuda.synchronize()
    gradients = 2 * (given["hidden_ND"].numel() + given["head_VD"].numel())
    extra = torch.cuda.max_memory_allocated() - before - gradients
    assert extra <= 300 * MIB + 4 * given["hidden_ND"].numel(), f"{extra / MIB:.0f} MiB"


def test_the_host_never_waits():
    given = case(500, 5003, 256, bias=True)
    results(weighted_logratio, given)  # compiles
    upstream = torch.ones(4, device="cuda"), torch.ones(500, device="cuda")
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    torch.cuda.set_sync_debug_mode("error")
    try:
        ratio_S, logps_N, values = weighted_logratio(**given, terms=TERMS)
        torch.autograd.grad((ratio_S, logps_N, values["entropy"]), leaves, (*upstream, upstream[1]))
    finally:
        torch.cuda.set_sync_debug_mode("default")
