"""The head's cache: exponentials of the last tiles, kept by the forward pass, turned into gradients by the backward."""

from functools import partial

import pytest
import torch
from op_of_tests import (  # noqa: F401 - a fixture of all tests
    OPTIONS,
    SMALL_TILES,
    assert_equal_to_specification,
    gradients,
    interpreted,
    kernel,
    one_shape,
    operands,
    poisoned_memory,
    three_ways,
    triton_op,
)
from precision_of_tests import assert_as_exact

from twdpo.logratio import weighted_logratio, weighted_logratio_chunked

# Lanes past the end of a tensor compute on zeros.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

GIB = 2**30
# The tile of the kernel that makes logits again reaches over the first column that is kept, or ends before it.
TILES = pytest.mark.parametrize("tiles", [
    SMALL_TILES,
    kernel.Tiles(*(kernel.Tile(16, block_v, 16, 4, 1) for block_v in (32, 64, 32))),
    one_shape(16, 32, 16, 4, 1, descriptors=True),
], ids=["small", "wide", "descriptors"])


@pytest.fixture
def caches(monkeypatch) -> list:
    """Every cache that a forward pass fills, None where it keeps nothing, and then what a backward pass turns."""
    seen = []

    def spy(name, pick):
        function = getattr(kernel, name)

        def noted(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.append(pick(result, args))
            return result
        monkeypatch.setattr(kernel, name, noted)
    spy("launch_statistics", lambda result, args: result)
    spy("turn_kept", lambda result, args: args[0])
    return seen


def room(tiles: float, given: dict, block_v: int = 32) -> float:
    """GiB that hold so many tiles, and with a bias what the backward pass sums of them."""
    width, num_tokens = kernel._kept_dtype(given["hidden_ND"].dtype).itemsize, len(given["targets_N"])
    sums = 0 if given["bias_V"] is None else -(-num_tokens // kernel.KEPT_ROWS) * max(width, 4)
    return tiles * block_v * (width * num_tokens + sums) / GIB


def all_leaves(given: dict) -> dict:
    """Gradients of reference, weights and scales too."""
    return given | {name: given[name].clone().requires_grad_() for name in ("ref_logps_N", "weights_N", "scale_S")}


def spread_targets(given: dict) -> dict:
    """Targets from the first column to the last one."""
    targets_N = torch.linspace(0, len(given["head_VD"]) - 1, len(given["targets_N"])).long()
    return given | {"targets_N": targets_N.flip(0)}


@interpreted
@TILES
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]])
@pytest.mark.parametrize("seq_lens", [[5, 3, 0, 20], [1]])
@pytest.mark.parametrize("held, kept", [(0.99, 0), (1, 1), (3.5, 3), (5, 5), (100, 5)])
def test_any_part_of_the_vocabulary_may_be_kept(held, kept, seq_lens, options, tiles, caches, monkeypatch):
    """131 columns are five tiles of 32, the last one of 3."""
    monkeypatch.setattr(kernel, "KEPT_ROWS", 16)
    given = spread_targets(all_leaves(operands(seq_lens, 131, 12, bias=options is OPTIONS[0])))
    op = partial(triton_op, tiles=tiles, wave_mib=1e-6, head_cache_gib=room(held, given))
    assert_equal_to_specification(op, given, options)
    if not kept:
        assert caches == [None]
        return
    made, turned = caches
    assert made is turned and made.first_col == 160 - 32 * kept and made.exps_NC.shape[1] == 131 - made.first_col
    assert made.exps_NC.untyped_storage().nbytes() <= room(held, given) * GIB


@interpreted
@TILES
def test_gradcheck(tiles):
    given = operands([2, 0, 3], vocabulary=71, hidden=3)
    names = ["hidden_ND", "head_VD", "bias_V", "ref_logps_N", "weights_N", "scale_S"]
    leaves = [given[name].detach().double().requires_grad_() for name in names]
    op = partial(triton_op, tiles=tiles, head_cache_gib=room(2, given))
    # Its second pass over a graph makes all logits again.
    assert torch.autograd.gradcheck(lambda *leaves: op(**given | dict(zip(names, leaves)), options=OPTIONS[2])[:2],
                                    leaves, fast_mode=True, nondet_tol=1e-12)


@TILES
@pytest.mark.parametrize("num_tokens, vocabulary, hidden", [(1, 1, 4), (1, 33, 4), (17, 32, 16), (70, 131, 36)])
@pytest.mark.parametrize("bias", [False, True])
def test_ragged_sizes(num_tokens, vocabulary, hidden, bias, tiles, caches):
    given = spread_targets(operands([num_tokens], vocabulary, hidden, torch.float32, bias))
    assert_equal_to_specification(partial(triton_op, tiles=tiles, head_cache_gib=room(2, given)), given)
    assert caches[-1] is not None


def test_no_tokens():
    given = operands([0, 0])
    assert_equal_to_specification(partial(triton_op, head_cache_gib=1.0), given)


@pytest.mark.parametrize("needs", ["hidden_ND", "head_VD", "bias_V"])
def test_each_input_alone_may_need_a_gradient(needs, caches):
    given = operands([2, 3], vocabulary=131, dtype=torch.float32)
    for name in ("hidden_ND", "head_VD", "bias_V"):
        given[name].requires_grad_(name == needs)
    assert_equal_to_specification(partial(triton_op, head_cache_gib=room(3, given)), given)
    assert len(caches) == 2 and caches[0] is caches[1]


@pytest.mark.parametrize("terms", [(), ("entropy", "top1", "collision")])
def test_what_the_forward_gives_is_the_same_bits_and_so_is_every_run(terms):
    given = operands([20, 30], vocabulary=131, hidden=40, dtype=torch.float32)
    cached = partial(triton_op, head_cache_gib=room(2, given))
    plain, ours = (op(**given, terms=terms) for op in (triton_op, cached))
    assert torch.equal(plain[0], ours[0]) and torch.equal(plain[1], ours[1])
    assert all(torch.equal(plain[2][name], ours[2][name]) for name in terms)
    first, second = gradients(cached, given), gradients(cached, given)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_nothing_is_kept_where_no_gradient_can_be_asked_for(caches):
    given = operands([2, 3], dtype=torch.float32)
    with torch.no_grad():
        triton_op(**given, head_cache_gib=1.0)
    frozen = given | {name: given[name].detach() for name in ("hidden_ND", "head_VD", "bias_V")}
    triton_op(**frozen | {"weights_N": given["weights_N"].requires_grad_()}, head_cache_gib=1.0)
    assert caches == [None, None]


def test_a_second_backward_pass_makes_all_logits_again(caches):
    """The first one has turned what was kept."""
    given = operands([20, 13], vocabulary=131, dtype=torch.float32)
    leaves = [given[name] for name in ("hidden_ND", "head_VD", "bias_V")]
    plain, cached = (triton_op(**given, head_cache_gib=gib)[1].square().sum() for gib in (0.0, 1.0))
    first, second = (torch.autograd.grad(cached, leaves, retain_graph=True) for _ in range(2))
    assert len(caches) == 3  # of two forward passes, and one that was turned
    for kept, again, expected in zip(first, second, torch.autograd.grad(plain, leaves)):
        assert torch.equal(again, expected)
        torch.testing.assert_close(kept, expected)


@pytest.mark.parametrize("term", ["entropy", "collision"])
def test_a_term_with_a_gradient_makes_all_logits_again(term, caches):
    given = operands([20, 13], vocabulary=131, dtype=torch.float32)
    plain, cached = (gradients(partial(triton_op, head_cache_gib=gib), given, terms=(term,)) for gib in (0.0, 1.0))
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())
    ratio_S, _, values = triton_op(**given, terms=(term,), head_cache_gib=1.0)
    torch.autograd.grad(ratio_S.sum(), given["hidden_ND"])  # nothing is asked of the term
    assert len(caches) == 4 and caches[2] is caches[3]


def test_nothing_is_kept_beside_a_reference(caches):
    given = operands([20, 13], vocabulary=131, dtype=torch.float32)
    plain, cached = (gradients(partial(triton_op, head_cache_gib=gib), given, terms=("kl",)) for gib in (0.0, 1.0))
    assert all(torch.equal(value, cached[name]) for name, value in plain.items()) and caches == [None, None]


def test_capped_logits_are_made_again(caches):
    given = operands([5, 3], vocabulary=131, dtype=torch.float32)
    assert_equal_to_specification(partial(triton_op, head_cache_gib=1.0), given, OPTIONS[3])
    assert caches == [None]


@pytest.mark.parametrize("top, rivals", [(8, (0, 0)), (20, (0, 0)), (1e4, (0, 0)), (8, (8.3, 8.6))])
def test_what_a_target_gets_is_the_same_bits_as_without_a_cache(top, rivals):
    """1 - p is all the gradient of a token of p = 0.99, 1 - 1e-6 or 1; and of one with likelier ones in its tile and
    in another."""
    given = operands([20, 30], vocabulary=256, hidden=256, dtype=torch.float32, bias=False)
    logits_NV = torch.randn(50, 256)
    for logit, away in zip((*rivals, top), (1, 100, 0)):
        logits_NV[torch.arange(50), (given["targets_N"] + away) % 256] = logit + 0.2 * torch.rand(50)
    given |= {"head_VD": torch.eye(256), "hidden_ND": logits_NV.requires_grad_()}
    plain_NV, kept_NV = (torch.autograd.grad(triton_op(**given, tiles=one_shape(16, 64, 64, 4, 1), head_cache_gib=gib
                                                       )[1].sum(), given["hidden_ND"])[0] for gib in (0.0, 1.0))
    assert torch.equal(*(grad_NV[torch.arange(50), given["targets_N"]] for grad_NV in (plain_NV, kept_NV)))
    torch.testing.assert_close(kept_NV, plain_NV, atol=0, rtol=1e-5)


@interpreted
def test_small_exponentials_keep_their_bits_in_16_of_them(monkeypatch):
    """Down to e^-20 of the largest, which fp16 alone would flush to 0. Buffers are of 16 bits here, as on a GPU."""
    monkeypatch.setattr(kernel, "_buffer_dtype", lambda operand_dtype: operand_dtype)
    logits_NV = torch.linspace(-20, -8, 40 * 128).view(128, 40).T.contiguous().half()
    targets_N, coefficients_N = torch.arange(40), torch.full((40,), 2.0**18)  # in fp16's range
    logits_NV[targets_N, targets_N] = 0
    plan = kernel.Plan(None, None, one_shape(16, 64, 64, 4, 1), 1.0, head_cache_gib=1.0)
    ones_N = torch.ones(40)
    _, _, softmax, _, kept = kernel.forward(logits_NV, torch.eye(128).half(), None, targets_N, ones_N, ones_N,
                                            torch.tensor([0, 40]), torch.ones(1), plan)
    assert kept.exps_NC.dtype == torch.float16
    gradient_NV = kernel.turn_kept(kept, None, targets_N, softmax, coefficients_N, torch.float16, plan).gradient_NW
    exact_NV = 2.0**18 * (torch.eye(40, 128) - logits_NV.double().softmax(dim=-1))
    assert gradient_NV.dtype == torch.float16 and gradient_NV.data_ptr() == kept.exps_NC.data_ptr()
    torch.testing.assert_close(gradient_NV.double(), exact_NV, atol=0, rtol=2**-9)


@TILES
def test_vocabulary_that_a_bias_rules_out(tiles):
    """Whole tiles of probability 0, kept and not, and some of a tile."""
    given = operands([4, 5], vocabulary=200, dtype=torch.float32)
    given["targets_N"] = given["targets_N"] % 20 + 100
    allowed = (torch.arange(200) >= 100) & (torch.arange(200) < 120)
    given["bias_V"] = torch.where(allowed, 0.0, float("-inf")).requires_grad_()
    for held in (2, 4, 7):
        op = partial(triton_op, tiles=tiles, head_cache_gib=room(held, given))
        assert all(value.isfinite().all() for value in gradients(op, given).values())
        assert_equal_to_specification(op, given)


def test_zero_coefficients_give_zero_gradients(monkeypatch):
    monkeypatch.setattr(kernel, "KEPT_ROWS", 16)
    given = operands([20, 20], vocabulary=131, dtype=torch.float32) | {"weights_N": torch.zeros(40)}
    given["weights_N"][:3] = 1.0  # the later blocks of rows are skipped
    op = partial(triton_op, head_cache_gib=1.0)
    names = ("hidden_ND", "head_VD", "bias_V")
    ours, same, exact = [torch.autograd.grad(way(**each)[0].sum(), [each[name] for name in names])
                         for way, each in three_ways(op, given)]
    assert (ours[0][3:] == 0).all()
    for name, *values in zip(names, ours, same, exact):
        assert_as_exact(*values, name)


@pytest.mark.parametrize("held", [2, 5])
def test_what_is_not_finite_shows(held, monkeypatch):
    """A NaN upstream, a NaN hidden state, and a target outside the vocabulary: no number hides them."""
    monkeypatch.setattr(kernel, "KEPT_ROWS", 16)
    given = operands([20, 20], vocabulary=131, dtype=torch.float32)
    op = partial(triton_op, head_cache_gib=room(held, given))
    upstream = torch.zeros(40).index_fill(0, torch.tensor(35), float("nan"))
    grad_hidden_ND, grad_head_VD = torch.autograd.grad(op(**given)[1], [given["hidden_ND"], given["head_VD"]], upstream)
    assert grad_hidden_ND[35].isnan().all() and grad_hidden_ND[:32].isfinite().all() and grad_head_VD.isnan().all()
    broken = given | {"hidden_ND": given["hidden_ND"].detach().index_fill(0, torch.tensor(7), float("nan"))}
    grad_head_VD, = torch.autograd.grad(op(**broken)[1].sum(), given["head_VD"])
    assert grad_head_VD.isnan().all()
    outside = given | {"targets_N": given["targets_N"].index_fill(0, torch.tensor(3), 131)}
    _, logps_N, _ = op(**outside)
    assert logps_N.isnan().nonzero().tolist() == [[3]]
    plain, cached = (torch.autograd.grad(way(**outside)[1][:3].sum(), given["head_VD"])[0] for way in (triton_op, op))
    torch.testing.assert_close(cached, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_error_is_that_of_torch(dtype):
    given = operands([40, 60], vocabulary=1003, hidden=64, dtype=dtype, bias=False)
    op = partial(triton_op, tiles=one_shape(64, 128, 64, 8, 1), head_cache_gib=room(4, given, 128))
    assert_equal_to_specification(op, given)


def test_the_torch_path_takes_the_argument_and_does_the_same():
    given = operands([5, 3], dtype=torch.float32)
    for op in (weighted_logratio, weighted_logratio_chunked):
        plain, cached = gradients(op, given), gradients(partial(op, head_cache_gib=1.0), given)
        assert all(torch.equal(value, cached[name]) for name, value in plain.items())


@pytest.mark.parametrize("gib, options, message", [
    (-0.5, OPTIONS[0], "cache is -0.5 GiB: it must be a finite number >= 0"),
    (float("nan"), OPTIONS[0], "cache is nan GiB"),
    (0.5, OPTIONS[1], r"cache is 0.5 GiB: it must be 0 for a model that caps its logits \(at 1.5\)"),
])
def test_a_cache_that_can_not_be_is_refused(gib, options, message):
    with pytest.raises(ValueError, match=message):
        weighted_logratio(**operands([2, 3]), options=options, head_cache_gib=gib)


@interpreted
def test_a_budget_beyond_all_bounds_keeps_every_column(caches):
    given = operands([5, 3], 131, 12)
    assert_equal_to_specification(partial(triton_op, tiles=SMALL_TILES, head_cache_gib=1e300), given)
    assert caches[0].first_col == 0
