"""What the op gives beside log-probs: the entropy with its gradient, and terms by name."""

import pytest
import torch
from op_of_tests import (  # noqa: F401 - a fixture of all tests
    IMPLEMENTATIONS,
    OPTIONS,
    assert_equal_to_specification,
    double,
    gradients,
    interpreted,
    operands,
    poisoned_memory,
    set_chunk_columns,
    triton_op,
    triton_op_deep_tiles,
    triton_op_large_tiles,
    triton_op_many_waves,
)

from twdpo.logratio import weighted_logratio_chunked, weighted_logratio_spec

# Lanes past the end of a tensor compute on zeros.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

WAYS = [pytest.param(weighted_logratio_chunked, 10, id="chunked"),
        pytest.param(weighted_logratio_chunked, None, id="one chunk, kept"),
        pytest.param(triton_op, None, id="triton")]


@pytest.fixture
def columns(request, monkeypatch):
    """Vocabulary entries of a chunk; None: the default, which is all of them here."""
    if request.param:
        set_chunk_columns(monkeypatch, request.param)


def ways(*more):
    return pytest.mark.parametrize("op, columns", [*WAYS, *more], indirect=["columns"])


@pytest.mark.slow
@interpreted
@ways(pytest.param(weighted_logratio_spec, None, id="spec"))
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_the_entropy(op, columns, alone, options):
    given = operands([2, 0, 3], vocabulary=37, hidden=3)
    names = ["hidden_ND", "head_VD", "bias_V"]

    def outputs(*leaves):
        ratio_S, logps_N, values = op(**given | dict(zip(names, leaves)), options=options, terms=("entropy",))
        return values["entropy"] if alone else (ratio_S, logps_N, values["entropy"])
    assert torch.autograd.gradcheck(outputs, [given[name] for name in names], fast_mode=op is triton_op)


@ways(pytest.param(triton_op_many_waves, None, id="one-tile waves"))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_tokens, vocabulary, hidden, bias", [
    (1, 1, 4, False), (1, 33, 4, True), (17, 32, 16, False), (33, 131, 36, True),
])
def test_entropy_at_ragged_sizes(op, columns, options, num_tokens, vocabulary, hidden, bias):
    given = operands([num_tokens // 2, num_tokens - num_tokens // 2], vocabulary, hidden, torch.float32, bias)
    given |= {name: given[name].detach().mul(0.5).requires_grad_() for name in ("hidden_ND", "head_VD")}
    assert_equal_to_specification(op, given, options, ("entropy",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op, columns", [*WAYS[:2], pytest.param(triton_op_large_tiles, None, id="triton")],
                         indirect=["columns"])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_entropy_errors_are_those_of_torch(op, columns, dtype, options):
    """Three-way: against fp64 truth, at most a few times the error of the specification in the same dtype."""
    given = operands([40, 60], vocabulary=503, hidden=64, dtype=dtype, bias=False)
    given["hidden_ND"] = (given["hidden_ND"].detach() * torch.linspace(0, 1, 100)[:, None]).to(dtype).requires_grad_()
    truth = given | {name: given[name].detach().double().requires_grad_() for name in ("hidden_ND", "head_VD")}
    exact, same = [gradients(weighted_logratio_spec, case, options, ("entropy",)) for case in (truth, given)]
    for name, ours in gradients(op, given, options, ("entropy",)).items():
        error, allowed = ((value.double() - exact[name]).norm() for value in (ours, same[name]))
        assert error <= 4 * allowed + 1e-6 * exact[name].norm(), name


@pytest.mark.parametrize("op, columns", [*WAYS[:2], pytest.param(triton_op_deep_tiles, None, id="triton")],
                         indirect=["columns"])
@pytest.mark.parametrize("top", [20, 1e4])
def test_the_entropy_gradient_of_sure_tokens_is_exact(op, columns, top):
    """p = 1 - 1e-6, and 1: each entry is right in itself, where plain fp32 autograd keeps but two digits."""
    given = operands([20, 30], vocabulary=256, hidden=256, dtype=torch.float32, bias=False)
    logits_NV = torch.randn(50, 256)
    logits_NV[torch.arange(50), given["targets_N"]] = top

    def gradient(op, dtype):
        leaf_NV = logits_NV.to(dtype).requires_grad_()
        values = op(**given | {"head_VD": torch.eye(256, dtype=dtype), "hidden_ND": leaf_NV}, terms=("entropy",))[2]
        return torch.autograd.grad(values["entropy"].sum(), leaf_NV)[0]
    expected_NV = gradient(weighted_logratio_spec, torch.float64)
    assert (expected_NV[torch.arange(50), given["targets_N"]] < 0).all() == (top == 20)
    torch.testing.assert_close(gradient(op, torch.float32).double(), expected_NV, atol=0, rtol=1e-4)


@ways()
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]])
def test_entropy_of_a_vocabulary_that_a_bias_rules_out(op, columns, options):
    """An entry of probability 0 gives 0 and gets 0, alone in its tile or beside others."""
    given = operands([4, 5], vocabulary=100, dtype=torch.float32)
    given["targets_N"] %= 20
    given["bias_V"] = torch.where(torch.arange(100) < 20, 0.0, float("-inf")).requires_grad_()
    ours = gradients(op, given, options, ("entropy",))
    assert all(value.isfinite().all() for value in ours.values()) and (ours["grad of bias_V"][20:] == 0).all()
    assert_equal_to_specification(op, given, options, ("entropy",))
    expected = gradients(weighted_logratio_spec, given, options, ("entropy",))
    part = given | {name: given[name].detach()[:20] for name in ("head_VD", "bias_V")}
    alone_N = weighted_logratio_spec(**part, options=options, terms=("entropy",))[2]["entropy"]
    torch.testing.assert_close(expected["entropy"], alone_N)


@ways()
@pytest.mark.parametrize("upstream", ["zero", "none"])
def test_an_entropy_without_upstream_changes_no_bit(op, columns, upstream):
    given = operands([20, 30], vocabulary=101, hidden=40, dtype=torch.float32)
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    results = []
    for terms in ((), ("top1", "entropy")):
        ratio_S, logps_N, values = op(**given, options=OPTIONS[3], terms=terms)
        loss = ratio_S.square().sum() - logps_N.square().sum()
        if terms and upstream == "zero":
            loss = loss + (0 * values["entropy"]).sum()
        results.append((ratio_S, logps_N, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(mine, plain) for plain, mine in zip(*results))


@IMPLEMENTATIONS
def test_terms_come_by_name(op):
    given = operands([2, 3], dtype=torch.float32)
    expected = gradients(op, given, terms=("entropy",))
    ours = gradients(op, given, terms=("top1", "entropy"))
    assert all(torch.equal(ours[name], value) for name, value in expected.items()) and ours["top1"].dtype == torch.bool
    assert list(op(**given, terms=("top1",))[2]) == ["top1"]
