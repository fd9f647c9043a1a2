"""What the op gives beside log-probs, by name: entropy, divergences from a reference, collision, and gradients of all.

What is of the reference alone is in test_logratio_reference.py.
"""

import pytest
import torch
from op_of_tests import (  # noqa: F401 - a fixture of all tests
    DIFFERENTIABLE,
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
from precision_of_tests import assert_as_exact

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
@pytest.mark.parametrize("terms", [*((name,) for name in DIFFERENTIABLE), DIFFERENTIABLE], ids="+".join)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_gradcheck_of_the_terms(op, columns, terms, options):
    """Each alone; all beside the log-probs."""
    given = operands([2, 0, 3], vocabulary=37, hidden=3)
    names = ["hidden_ND", "head_VD", "bias_V"]

    def outputs(*leaves):
        ratio_S, logps_N, values = op(**given | dict(zip(names, leaves)), options=options, terms=terms)
        return tuple(values.values()) if len(terms) == 1 else (ratio_S, logps_N, *values.values())
    assert torch.autograd.gradcheck(outputs, [given[name] for name in names], fast_mode=op is triton_op)


@ways(pytest.param(triton_op_many_waves, None, id="one-tile waves"))
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("num_tokens, vocabulary, hidden, bias", [
    (1, 1, 4, False), (1, 33, 4, True), (17, 32, 16, False), (33, 131, 36, True),
])
def test_terms_at_ragged_sizes(op, columns, options, num_tokens, vocabulary, hidden, bias):
    given = operands([num_tokens // 2, num_tokens - num_tokens // 2], vocabulary, hidden, torch.float32, bias)
    given |= {name: given[name].detach().mul(0.5).requires_grad_() for name in ("hidden_ND", "head_VD")}
    assert_equal_to_specification(op, given, options, DIFFERENTIABLE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op, columns", [*WAYS[:2], pytest.param(triton_op_large_tiles, None, id="triton")],
                         indirect=["columns"])
@pytest.mark.parametrize("term", DIFFERENTIABLE)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
def test_errors_of_terms_are_those_of_torch(op, columns, dtype, term, options):
    """Three-way: against fp64 truth, at most a few times the error of the specification in the same dtype."""
    given = operands([40, 60], vocabulary=503, hidden=64, dtype=dtype, bias=False)
    given["hidden_ND"] = (given["hidden_ND"].detach() * torch.linspace(0, 1, 100)[:, None]).to(dtype).requires_grad_()
    exact, same = [gradients(weighted_logratio_spec, case, options, (term,)) for case in (double(given), given)]
    for name, ours in gradients(op, given, options, (term,)).items():
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
def test_terms_of_a_vocabulary_that_a_bias_rules_out(op, columns, options):
    """An entry of probability 0 in both models gives 0 and gets 0, alone in its tile or beside others."""
    given = operands([4, 5], vocabulary=100, dtype=torch.float32)
    given["targets_N"] %= 20
    given["bias_V"] = torch.where(torch.arange(100) < 20, 0.0, float("-inf")).requires_grad_()
    given["ref_states"] = (*given["ref_states"][:2], given["bias_V"].detach())
    ours = gradients(op, given, options, DIFFERENTIABLE)
    assert all(value.isfinite().all() for value in ours.values()) and (ours["grad of bias_V"][20:] == 0).all()
    part = given | {name: given[name].detach()[:20].requires_grad_() for name in ("head_VD", "bias_V")}
    part["ref_states"] = (given["ref_states"][0], given["ref_states"][1][:20], None)
    same, exact = (gradients(weighted_logratio_spec, each, options, DIFFERENTIABLE) for each in (part, double(part)))
    for name, expected in exact.items():
        rows = 20 if name in ("grad of head_VD", "grad of bias_V") else None
        assert_as_exact(ours[name][:rows], same[name], expected, name)


@ways()
@pytest.mark.parametrize("asked", [("top1", "entropy", "collision"), ("kl", "reverse_kl")], ids=["own", "compared"])
@pytest.mark.parametrize("upstream", ["zero", "none"])
def test_terms_without_upstream_change_no_bit(op, columns, asked, upstream):
    given = operands([20, 30], vocabulary=101, hidden=40, dtype=torch.float32)
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    results = []
    for terms in ((), asked):
        ratio_S, logps_N, values = op(**given, options=OPTIONS[3], terms=terms)
        loss = ratio_S.square().sum() - logps_N.square().sum()
        if upstream == "zero":
            loss = loss + sum((0 * value).sum() for name, value in values.items() if name != "top1")
        results.append((ratio_S, logps_N, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(mine, plain) for plain, mine in zip(*results))


@IMPLEMENTATIONS
def test_terms_come_by_name(op):
    given = operands([2, 3], dtype=torch.float32)
    expected = gradients(op, given, terms=("entropy",))
    ours = gradients(op, given, terms=("top1", "entropy"))
    assert all(torch.equal(ours[name], value) for name, value in expected.items()) and ours["top1"].dtype == torch.bool
    assert list(op(**given, terms=("top1",))[2]) == ["top1"]
