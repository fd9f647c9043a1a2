"""What |y| is divided out of, once: --length-normalize and losses that average, over all sources and losses."""

import pytest
import torch
from test_packing import EXAMPLES

from twdpo.batch import collate
from twdpo.config import TrainConfig
from twdpo.logratio import combine
from twdpo.losses import LOSSES
from twdpo.objective import bind_objective
from twdpo.plugins import bind_options, options_of
from twdpo.rows import MicroBatch
from twdpo.weights import WEIGHTS, WeightContext

AVERAGES = ("ipo", "simpo", "orpo", "rrhf", "sigmoid_norm", "sft")  # of what they make of both answers; rrhf: and a sum


def weighed(source: str, loss, **flags):
    """(batch, ratio_S, logps_N) of two pairs with random raw weights, normalised as this source's are."""
    torch.manual_seed(1)
    batch = collate(MicroBatch((0, 1)), EXAMPLES, [0, 1])
    raw_N, logps_N = torch.rand(len(batch.targets_N)) + 0.1, -torch.rand(len(batch.targets_N))

    def given(batch, context):
        return raw_N
    given.norm = getattr(WEIGHTS[source], "norm", "mean1")
    batch = bind_objective(loss, given, source).weigh(batch, WeightContext(TrainConfig(**flags)))
    batch.terms = {name: -torch.rand(len(logps_N)) for name in ("kl", "collision", "reverse_kl")}
    return batch, combine(logps_N, batch.ref_logps_N, batch.weights_N, batch.seq_lens_S, batch.scale_S), logps_N


@pytest.mark.parametrize("source", WEIGHTS)
def test_length_normalize_divides_what_weights_sum_up_to_by_the_length(source):
    (plain, plain_S, _), (batch, ratio_S, _) = (weighed(source, LOSSES["dpo"], length_normalize=on)
                                                for on in (False, True))
    is_mean = source == "sepo"  # already, over the tokens that it selects
    torch.testing.assert_close(ratio_S, plain_S if is_mean else plain_S / plain.seq_lens_S)
    assert batch.averaged and plain.averaged == is_mean


@pytest.mark.parametrize("source", WEIGHTS)
@pytest.mark.parametrize("name", AVERAGES)
@pytest.mark.parametrize("length_by", ["tokens", "mass"])
def test_a_loss_that_averages_divides_no_second_time(source, name, length_by):
    options = f"length_by={length_by}" + ",nll=0" * (name == "rrhf")
    loss, values = bind_options(LOSSES[name], options, "--loss-options"), []
    for on in (False, True):
        config = TrainConfig(beta=0.5, length_normalize=on)
        batch, ratio_S, logps_N = weighed(source, loss, length_normalize=on)
        values.append(loss(ratio_S, logps_N, batch, config)[0])
    torch.testing.assert_close(values[0], values[1])


def test_these_are_the_losses_that_average():
    """All with the option, but for rdpo, whose lengths are a term, and cpo, which may average one of its terms."""
    assert {name for name in LOSSES if "length_by" in options_of(LOSSES[name])} == {*AVERAGES, "rdpo", "cpo"}


@pytest.mark.parametrize("options", ["length_by=tokens", "length_by=mass"])
@pytest.mark.parametrize("source", sorted(WEIGHTS.keys() - {"sepo"}))
def test_lengths_that_are_a_term_stay_those_of_the_answers(source, options):
    loss, lengths = bind_options(LOSSES["rdpo"], options, "--loss-options"), []
    for on in (False, True):
        batch, ratio_S, logps_N = weighed(source, loss, length_normalize=on)
        lengths.append(loss(0 * ratio_S, logps_N, batch, TrainConfig(beta=0.5))[0])
    torch.testing.assert_close(*lengths)


def test_mass_is_what_weights_sum_up_to_under_the_flag_too():
    """sum of W_t lp_t over the sum of W_t, by hand."""
    loss = bind_options(LOSSES["sft"], "length_by=mass", "--loss-options")
    batch, ratio_S, logps_N = weighed("decay", loss, length_normalize=True)
    lens = batch.seq_lens_S.tolist()
    expected = [-(weights * logps).sum() / weights.sum()
                for weights, logps in zip(batch.weights_N.split(lens), logps_N.split(lens))]
    torch.testing.assert_close(loss(ratio_S, logps_N, batch, TrainConfig())[0], torch.stack(expected[0::2]))
