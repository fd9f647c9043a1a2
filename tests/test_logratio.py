"""The chunked op against its specification: values, every gradient, awkward sizes and numbers."""

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from twdpo import dist, logratio
from twdpo.logratio import HeadOptions, weighted_logratio, weighted_logratio_reference

OPTIONS = [HeadOptions(), HeadOptions(softcap=1.5), HeadOptions(logit_scale=0.7),
           HeadOptions(softcap=2.0, logit_scale=3.0)]


def operands(seq_lens, vocabulary=37, hidden=11, dtype=torch.float64, bias=True) -> dict:
    num_tokens = sum(seq_lens)
    return {
        "hidden_ND": torch.randn(num_tokens, hidden, dtype=dtype, requires_grad=True),
        "head_VD": torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True),
        "targets_N": torch.randint(0, vocabulary, (num_tokens,)),
        "ref_logps_N": -torch.rand(num_tokens),
        "weights_N": torch.rand(num_tokens) * (torch.rand(num_tokens) > 0.3),
        "seq_lens_S": torch.tensor(seq_lens),
        "scale_S": torch.rand(len(seq_lens)) + 1,
        "bias_V": torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None,
    }


def gradients(op, given: dict, options=None) -> tuple:
    """Outputs, and gradients of a random mixture of both outputs with upstreams of both signs."""
    ratio_S, logps_N = op(**given, options=options)
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(len(output), generator=generator, dtype=torch.float64).to(output.dtype)
                for output in (ratio_S, logps_N)]
    leaves = [value for value in given.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    grads = torch.autograd.grad((ratio_S, logps_N), leaves, upstream)
    return ratio_S, logps_N, *grads


@pytest.mark.parametrize("chunk", [1, 4, 1000])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seq_lens", [[5, 3, 1, 7], [1], [0, 4], [3, 0]])
def test_equals_the_specification(chunk, options, seq_lens, monkeypatch):
    monkeypatch.setattr(logratio, "CHUNK_ELEMENTS", chunk * 37)
    given = operands(seq_lens)
    given["targets_N"][:2] = 5  # repeated
    for ours, expected in zip(gradients(weighted_logratio, given, options),
                              gradients(weighted_logratio_reference, given, options)):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=1e-10)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(logratio, "CHUNK_ELEMENTS", 2 * 7)
    given = operands([2, 3], vocabulary=7, hidden=3)

    def op(hidden_ND, head_VD, bias_V):
        return weighted_logratio(**given | {"hidden_ND": hidden_ND, "head_VD": head_VD, "bias_V": bias_V})
    assert torch.autograd.gradcheck(op, (given["hidden_ND"], given["head_VD"], given["bias_V"]))


@pytest.mark.parametrize("needs", ["hidden_ND", "head_VD"])
def test_each_input_alone_may_need_a_gradient(needs):
    given = operands([2, 3], bias=False)
    expected = gradients(weighted_logratio_reference, given)[2 + (needs == "head_VD")]
    for name in ("hidden_ND", "head_VD"):
        given[name].requires_grad_(name == needs)
    torch.testing.assert_close(gradients(weighted_logratio, given)[2], expected)


def test_huge_logits_and_sure_tokens_stay_finite_and_right():
    given = operands([3], vocabulary=5, hidden=5, dtype=torch.float32, bias=False)
    given["head_VD"] = torch.eye(5, requires_grad=True)
    given["hidden_ND"] = torch.tensor([[1e4, -1e4, 0, 0, 0], [-1e4, 1e4, 0, 0, 0], [8.3, 0, 0, 0, 0]],
                                      requires_grad=True)
    given["targets_N"] = torch.tensor([0, 0, 0])
    ours = gradients(weighted_logratio, given)
    assert ours[1][0] == 0 and ours[1][1] == -2e4 and 0.998 < ours[1][2].exp() < 0.9999
    for value, expected in zip(ours, gradients(weighted_logratio_reference, given)):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)


def test_bf16_error_is_that_of_bf16_torch():
    """Three-way: against fp32 truth, at most twice the error of the specification in bf16."""
    given = operands([40, 60], vocabulary=1003, hidden=64, dtype=torch.bfloat16, bias=False)
    truth = {name: value.detach().float().requires_grad_() if name in ("hidden_ND", "head_VD") else value
             for name, value in given.items()}
    exact = gradients(weighted_logratio_reference, truth)
    names = ("ratio", "logps", "grad hidden", "grad head")
    for name, want, ours, same in zip(names, exact, gradients(weighted_logratio, given),
                                      gradients(weighted_logratio_reference, given)):
        error, allowed = ((value.float() - want).norm() for value in (ours, same))
        assert error <= 2 * allowed + 1e-6, name


def test_dtensor_and_shapes_that_do_not_fit_are_refused():
    given = operands([2, 3], dtype=torch.float32)
    with pytest.raises(ValueError, match="don't fit"):
        weighted_logratio(**given | {"seq_lens_S": torch.tensor([2, 2])})
    process = dist.start()
    try:
        mesh = init_device_mesh(process.device.type, (1,))
        head = DTensor.from_local(given["head_VD"], mesh, [Replicate()])
        with pytest.raises(ValueError, match="DTensor"):
            weighted_logratio(**given | {"head_VD": head})
    finally:
        dist.stop()
