"""Terms that compare the policy's distribution with a reference's, and collision: what the two models have in common,
what one of them rules out, exactness, and what is not computed or held."""

from functools import partial

import pytest
import torch
from op_of_tests import (  # noqa: F401 - a fixture of all tests
    IMPLEMENTATIONS,
    OPTIONS,
    assert_equal_to_specification,
    double,
    gradients,
    kernel,
    one_shape,
    operands,
    poisoned_memory,
    set_chunk_columns,
    triton_op,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twdpo import chunked_logps
from twdpo.logratio import OF_REFERENCE, weighted_logratio, weighted_logratio_chunked, weighted_logratio_spec

# Lanes past the end of a tensor compute on zeros.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
COMPARED = ("kl", "reverse_kl")
ALL = (*COMPARED, "collision")


def policy_of(given: dict) -> tuple:
    """A reference that is the policy, to the tensor."""
    return given["hidden_ND"], given["head_VD"], given["bias_V"]


@IMPLEMENTATIONS
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3]])
@pytest.mark.parametrize("dtype, size", [(torch.float32, 1), (torch.bfloat16, 1), (torch.float32, 1e3)])
def test_a_reference_that_is_the_policy_is_no_bit_away(op, options, dtype, size, monkeypatch):
    set_chunk_columns(monkeypatch, 10)
    given = operands([20, 13], vocabulary=131, dtype=dtype)
    given["head_VD"] = (size * given["head_VD"].detach()).requires_grad_()
    _, logps_N, values = op(**given | {"ref_states": policy_of(given)}, options=options, terms=COMPARED)
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    grads = torch.autograd.grad([value.sum() for value in values.values()], leaves, retain_graph=True)
    assert all((value == 0).all() for value in values.values())
    for grad, other in zip(grads, torch.autograd.grad(logps_N.sum(), leaves)):  # 0 up to a product's rounding
        assert grad.norm() <= 1e-6 * other.norm()


@IMPLEMENTATIONS
def test_the_two_directions(op):
    """kl is of the reference from the policy: by hand, of (1/2, 1/2) and (1/4, 3/4)."""
    given = operands([1], vocabulary=2, hidden=2, dtype=torch.float32, bias=False)
    given |= {"hidden_ND": torch.ones(1, 2), "head_VD": torch.zeros(2, 2),
              "ref_states": (torch.ones(1, 1), torch.tensor([[0.25], [0.75]]).log(), None)}
    _, _, values = op(**given, terms=ALL)
    q = torch.tensor([0.25, 0.75])
    expected = {"kl": (q * (q / 0.5).log()).sum(), "reverse_kl": (0.5 * (0.5 / q).log()).sum(),
                "collision": torch.tensor(0.5).log()}
    for name, value in expected.items():
        torch.testing.assert_close(values[name][0], value)


@IMPLEMENTATIONS
@pytest.mark.parametrize("apart", [1e-4, 1e-2])
def test_small_divergences_do_not_drown(op, apart):
    """Of logits near 30 that differ by little: a divergence is off by roundings of 1, not of the logits."""
    given = operands([20, 30], vocabulary=101, hidden=40, dtype=torch.float32)
    head_VD = 3 * given["head_VD"].detach()
    near_VD = head_VD * (1 + apart * torch.randn_like(head_VD))
    # Exact in fp64: what is compared are the sums, not the products of fp32 matrices.
    logits_NV, near_NV = (given["hidden_ND"].detach() @ each.T for each in (head_VD, near_VD))
    given |= {"hidden_ND": logits_NV, "head_VD": torch.eye(101), "bias_V": None,
              "ref_states": (near_NV, torch.eye(101), None)}
    assert logits_NV.abs().amax() > 30
    _, _, ours = op(**given, terms=COMPARED)
    _, _, exact = weighted_logratio_spec(**double(given), terms=COMPARED)
    for name, value in ours.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-6)


@IMPLEMENTATIONS
@pytest.mark.parametrize("top", [20, 1e4])
def test_sure_tokens_of_both_models_and_huge_logits(op, top, monkeypatch):
    """p and q within 1e-6 of 1, of one token and of two: as exact as torch, up to single roundings."""
    set_chunk_columns(monkeypatch, 30)
    given = operands([10, 20], vocabulary=70, hidden=70, dtype=torch.float32, bias=False)
    logits_NV, ref_logits_NV = torch.randn(2, 30, 70)
    for each_NV, away in ((logits_NV, 0), (ref_logits_NV, (torch.arange(30) % 2))):
        each_NV[torch.arange(30), (given["targets_N"] + away) % 70] = top
    given |= {"head_VD": torch.eye(70), "hidden_ND": logits_NV.requires_grad_(),
              "ref_states": (ref_logits_NV, torch.eye(70), None)}
    values = gradients(op, given, terms=ALL)
    assert all(value.isfinite().all() for value in values.values())
    assert_equal_to_specification(op, given, terms=ALL, floor=2 * torch.finfo(torch.float32).eps)


@IMPLEMENTATIONS
def test_what_one_model_alone_rules_out(op, monkeypatch):
    """KL of what the policy can't say is infinite, and its gradient is not; a direction that is finite stays so; a
    token whose divergence is infinite does no harm where nothing is asked of it."""
    set_chunk_columns(monkeypatch, 10)
    given = operands([4, 5], vocabulary=100, dtype=torch.float32)
    given["targets_N"] %= 20
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    some_V = torch.where(torch.arange(100) < 20, 0.0, float("-inf"))
    strict = given | {"bias_V": some_V.requires_grad_()}  # of the policy
    _, _, values = op(**strict, terms=COMPARED)
    assert (values["kl"] == float("inf")).all() and values["reverse_kl"].isfinite().all()
    for value in values.values():
        grads = torch.autograd.grad(value.sum(), [*leaves[:2], strict["bias_V"]], retain_graph=True)
        assert all(grad.isfinite().all() for grad in grads)
    lax = given | {"ref_states": (*given["ref_states"][:2], some_V.detach())}
    _, _, values = op(**lax, terms=COMPARED)
    assert values["kl"].isfinite().all() and (values["reverse_kl"] == float("inf")).all()
    upstream_N = torch.zeros(9)
    for grad in torch.autograd.grad(values["kl"].sum(), leaves, retain_graph=True):
        assert grad.isfinite().all()
    for grad in torch.autograd.grad([values["kl"], values["reverse_kl"]], leaves, [upstream_N + 1, upstream_N]):
        assert grad.isfinite().all()


@IMPLEMENTATIONS
def test_a_part_of_the_vocabulary_that_both_rule_out_in_two_ways(op, monkeypatch):
    """By a bias of -inf in one model, by logits far below all others in the other: neither direction is infinite."""
    set_chunk_columns(monkeypatch, 10)
    given = operands([4, 5], vocabulary=100, dtype=torch.float32)
    given["targets_N"] %= 20

    def biased(bias, ref_bias):
        bias_V, ref_bias_V = (torch.where(torch.arange(100) < 20, 0.0, each) for each in (bias, ref_bias))
        return given | {"bias_V": bias_V.requires_grad_(), "ref_states": (*given["ref_states"][:2], ref_bias_V)}
    exact = gradients(weighted_logratio_spec, double(biased(-1e4, -1e4)), terms=COMPARED)
    for biases in ((-torch.inf, -1e4), (-1e4, -torch.inf)):
        for name, value in gradients(op, biased(*biases), terms=COMPARED).items():
            torch.testing.assert_close(value.double(), exact[name], atol=1e-3, rtol=1e-4)


@IMPLEMENTATIONS
def test_what_is_not_finite_shows(op):
    """A NaN of either model, and a NaN upstream: no number hides them."""
    given = operands([20, 20], dtype=torch.float32)
    upstream_N = torch.zeros(40).index_fill(0, torch.tensor(30), float("nan"))
    for name, value in op(**given, terms=ALL)[2].items():
        grad_ND, = torch.autograd.grad(value, given["hidden_ND"], upstream_N, retain_graph=True)
        assert grad_ND[30].isnan().all() and grad_ND[:16].isfinite().all(), name

    def broken(hidden):
        return hidden.detach().index_fill(0, torch.tensor(7), float("nan"))
    ref_hidden_NE, *rest = given["ref_states"]
    for each, names in ((given | {"ref_states": (broken(ref_hidden_NE), *rest)}, COMPARED),
                        (given | {"hidden_ND": broken(given["hidden_ND"])}, ALL)):
        _, _, values = op(**each, terms=ALL)
        assert all(values[name].isnan().nonzero().tolist() == [[7]] for name in names)


@IMPLEMENTATIONS
def test_no_gradient_goes_to_the_reference(op):
    given = operands([2, 3], dtype=torch.float32)
    given["ref_states"] = tuple(tensor.clone().requires_grad_() for tensor in given["ref_states"])
    _, _, values = op(**given, terms=COMPARED)
    sum(value.sum() for value in values.values()).backward()
    assert given["hidden_ND"].grad is not None and all(tensor.grad is None for tensor in given["ref_states"])


@IMPLEMENTATIONS
def test_strides_of_the_reference_do_not_matter(op):
    given = operands([5, 3, 9], dtype=torch.float32)
    given["ref_states"] = tuple(torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]
                                for tensor in given["ref_states"])
    assert not any(tensor.is_contiguous() for tensor in given["ref_states"])
    assert_equal_to_specification(op, given, terms=ALL)


@IMPLEMENTATIONS
@pytest.mark.parametrize("seq_lens", [[0, 4], [0, 0], []])
def test_empty_sequences(op, seq_lens):
    given = operands([0, *seq_lens], dtype=torch.float32)
    assert_equal_to_specification(op, given, terms=ALL)


def test_the_reference_s_logits_are_made_again_only_for_what_needs_them(monkeypatch):
    given, made = operands([5, 3], dtype=torch.float32), []

    def note(module, name, reference_of):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: made.append(reference_of(args)) or function(*args))
    note(chunked_logps, "logits_of_chunk", lambda args: args[1].shape == given["ref_states"][0].shape)
    note(kernel, "_tile_arguments", lambda args: args[3].head_VE is not None)
    for op in (weighted_logratio_chunked, triton_op):
        ratio_S, _, values = op(**given, terms=("top1", *ALL))
        made.clear()
        torch.autograd.grad([ratio_S.sum(), values["collision"].sum()], given["hidden_ND"], retain_graph=True)
        assert made and not any(made)
        torch.autograd.grad(values["kl"].sum(), given["hidden_ND"])
        assert any(made)


@IMPLEMENTATIONS
def test_nothing_is_as_large_as_all_logits(op, monkeypatch):
    """No tensor that a forward and a backward pass make takes a quarter of the memory of one model's logits."""
    set_chunk_columns(monkeypatch, 32)
    given, largest = operands([32, 32], vocabulary=1024, hidden=2, dtype=torch.float32), 0
    if op is triton_op:
        op = partial(triton_op, tiles=one_shape(64, 64, 64, 1, 1), wave_mib=1e-6)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **kwargs or {})
            largest = max([largest, *(each.nbytes for each in tree_leaves(result) if isinstance(each, torch.Tensor))])
            return result
    with Watch():
        ratio_S, _, values = op(**given, terms=ALL)
        torch.autograd.grad([ratio_S.sum(), *(value.sum() for value in values.values())], given["head_VD"])
    assert 64 * 64 <= largest < 4 * 64 * 1024 / 4


def test_the_op_takes_a_reference_and_leaves_one_that_nothing_compares_with():
    assert set(OF_REFERENCE) == set(COMPARED)
    given = operands([5, 3])
    assert_equal_to_specification(weighted_logratio, given, terms=ALL)
    weighted_logratio(**given | {"ref_states": ("not", "looked", "at")}, terms=("entropy", "collision"))
