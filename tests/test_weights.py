"""From raw rounds to a_t: Eq. 13 and 14 by hand, pins, normalisers."""

import numpy as np
import pytest
import torch

from twdpo.config import PRESETS, TrainConfig
from twdpo.pairs import Pair
from twdpo.postprocess import alignment_shares, attention_weights
from twdpo.tokens import Example, Response
from twdpo.weights import normalize
from twdpo.weights_file import JudgedAnswer


def letters(num_tokens: int, end_of_turn: bool = True) -> Response:
    """A response of one-character tokens, ended or cut."""
    spans = [(place, place + 1) for place in range(num_tokens)] + [(num_tokens, num_tokens)] * end_of_turn
    ids = np.arange(len(spans), dtype=np.int32)
    return Response(ids, np.array(spans, dtype=np.int32), ids < num_tokens)


def judged(*rounds, start: int = 0) -> JudgedAnswer:
    """One-character judge tokens of the same ids, beginning at a character."""
    attention = np.array(rounds, dtype=np.float32)
    places = np.arange(start, start + attention.shape[1], dtype=np.int32)
    return JudgedAnswer(places, np.stack([places, places + 1], axis=1), attention[None])


def test_pair_min_gives_both_sides_the_shorter_one_s_mass():
    weights_N, scale_S = normalize(torch.tensor([1.0, 1.0, 2.0, 3.0, 1.0]), torch.tensor([3, 2]), "pair_min")
    assert weights_N.tolist() == [0.25, 0.25, 0.5, 0.75, 0.25] and scale_S.tolist() == [2.0, 2.0]


def with_sink(sink_k: int, **changes) -> TrainConfig:
    """The paper's post-processing but for what is given."""
    return TrainConfig(sink_k=sink_k, **changes)


def test_sink_fix_by_hand():
    """Five judge tokens, n = 6 with the end of the turn. Rounds average to (9, 1, 2, 3, 4) / 20 (Eq. 13). The first
    token and the end of the turn get 1/6; the others share 4/6 in proportion 1:2:3:4, so 4/60, 8/60, 12/60, 16/60."""
    weights = attention_weights(letters(5), judged([0.8, 0.1, 0.0, 0.3, 0.4], [0.1, 0.0, 0.2, 0.0, 0.0]), with_sink(1))
    np.testing.assert_allclose(weights, [1 / 6, 4 / 60, 8 / 60, 12 / 60, 16 / 60, 1 / 6], rtol=1e-6)


def test_rounds_are_averaged_before_they_are_normalised():
    """Raw sums differ (0.9 and 0.1): the paper's mean keeps round 0's nine-fold say. 3 tokens + end, K off."""
    weights = attention_weights(letters(2, end_of_turn=False), judged([0.9, 0.0], [0.0, 0.1]), with_sink(0))
    np.testing.assert_allclose(weights, [0.9, 0.1], rtol=1e-6)


def test_short_answers_keep_their_first_token():
    """Four judge tokens, fewer than K' = 5: only the end of the turn is pinned, to 1/5."""
    weights = attention_weights(letters(4), judged([0.4, 0.1, 0.1, 0.4], [0.4, 0.1, 0.1, 0.4]), with_sink(1))
    np.testing.assert_allclose(weights, [0.32, 0.08, 0.08, 0.32, 0.2], rtol=1e-6)


def test_sink_k_zero_is_off_and_two_pins_two():
    rows = [0.5, 0.2, 0.1, 0.1, 0.1], [0.5, 0.2, 0.1, 0.1, 0.1]
    assert attention_weights(letters(5), judged(*rows), with_sink(0))[0] == pytest.approx(5 / 6 * 0.5)
    np.testing.assert_allclose(attention_weights(letters(5), judged(*rows), with_sink(2))[:2], 1 / 6)


def test_tokens_that_the_judge_did_not_see_get_the_mean_weight():
    """The judge saw the first two of four characters; n = 5: three tokens pinned to 1/5, two share 2/5 as 1:3."""
    weights = attention_weights(letters(4), judged([0.1, 0.3], [0.1, 0.3]), with_sink(1))
    np.testing.assert_allclose(weights, [0.1, 0.3, 0.2, 0.2, 0.2], rtol=1e-6)


def test_sink_pins_every_training_token_that_overlaps_the_first_judge_token():
    response = letters(5)  # trained by letters, judged by pairs of letters
    spans = np.array([(0, 2), (2, 3), (3, 4), (4, 5), (4, 5)], dtype=np.int32)
    answer = JudgedAnswer(np.arange(50, 55, dtype=np.int32), spans, np.full((1, 2, 5), 0.1, np.float32))
    np.testing.assert_allclose(attention_weights(response, answer, with_sink(1))[:2], 1 / 6)


@pytest.mark.parametrize("rows", [([0.0, 0.0, 0.0, 0.0, 0.0],) * 2, ([1.0, 0.0, 0.0, 0.0, 0.0],) * 2])
def test_without_mass_outside_the_pins_weights_are_uniform(rows):
    np.testing.assert_allclose(attention_weights(letters(5), judged(*rows), with_sink(1)), 1 / 6)


@pytest.mark.parametrize("seed", range(20))
def test_weights_sum_to_one(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 40))
    response = letters(int(rng.integers(1, 40)), end_of_turn=bool(seed % 2))
    weights = attention_weights(response, judged(rng.random(num), rng.random(num), start=seed % 3), with_sink(1))
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1)


def test_each_round_may_be_normalised_first():
    """Two of the raw rounds above weigh 0.9 and 0.1 in all; normalised first they have equal say (authors' code)."""
    config = with_sink(0, judge_rounds="normalized")
    weights = attention_weights(letters(2, end_of_turn=False), judged([0.9, 0.0], [0.0, 0.1]), config)
    np.testing.assert_allclose(weights, [0.5, 0.5], rtol=1e-6)


def test_shares_of_mass_by_hand():
    """Letters judged, two letters a training token but for the first, the last judge token cut off: of (.4, .1, .2, .3)
    the first is copied, two are moved, the last is dropped."""
    response = Response(np.array([0, 77], dtype=np.int32), np.array([(0, 1), (1, 3)], dtype=np.int32), np.ones(2, bool))
    given = judged([0.4, 0.1, 0.2, 0.3], [0.4, 0.1, 0.2, 0.3])
    pair = Pair((("user", "x"),), "abcd", "abcd", "x:1")
    example = Example(pair, np.array([1]), response, response)
    shares = alignment_shares([example], {pair.key: (given, given)}, "raw")
    assert shares == pytest.approx({"copied": 0.4, "moved": 0.3, "dropped": 0.3}, abs=1e-6)


def test_several_layers_are_averaged_or_summed():
    first, second = judged([0.1, 0.3], [0.1, 0.3]), judged([0.6, 0.2], [0.6, 0.2])
    both = JudgedAnswer(first.ids_J, first.spans_J2, np.concatenate([first.attention_LRJ, second.attention_LRJ]))
    response = letters(2, end_of_turn=False)
    np.testing.assert_allclose(attention_weights(response, both, with_sink(0)), [0.5, 0.5], rtol=1e-6)
    config = with_sink(0, layer="1+2")
    np.testing.assert_allclose(attention_weights(response, both, config), [1.0, 1.0], rtol=1e-6)


def test_unseen_tokens_may_weigh_nothing():
    """The judge saw two of four characters; the others and the end of the turn get 0, the sum stays 1."""
    weights = attention_weights(letters(4), judged([0.1, 0.3], [0.1, 0.3]), with_sink(1, unseen="zero"))
    np.testing.assert_allclose(weights, [0.25, 0.75, 0, 0, 0], rtol=1e-6)


def test_without_renormalisation_the_sum_is_what_cuts_have_left():
    """Nothing cut: 1, whatever is pinned. Of four judged letters training keeps two, with 0.4 of the mass: weights that
    are 0.25 and 0.75 of it (or 1/2 and 1/2 under the sink fix), and all of none."""
    rounds = [0.1, 0.3, 0.2, 0.4], [0.1, 0.3, 0.2, 0.4]
    for response, first in ((letters(4), [0.1, 0.3]), (letters(6), [0.2, 0.6])):
        for changes in ({}, {"unseen": "zero"}, {"sink_k_min": 1}):
            weights = attention_weights(response, judged(first, first), with_sink(1, renormalize=False, **changes))
            renormalised = attention_weights(response, judged(first, first), with_sink(1, **changes))
            np.testing.assert_allclose(weights, renormalised, rtol=1e-6)
    cut = letters(2, end_of_turn=False)
    np.testing.assert_allclose(attention_weights(cut, judged(*rounds), with_sink(1, renormalize=False)), [0.1, 0.3],
                               rtol=1e-6)
    config = with_sink(1, sink_k_min=1, renormalize=False)
    np.testing.assert_allclose(attention_weights(cut, judged(*rounds), config), [0.2, 0.2], rtol=1e-6)
    nothing = [0.0, 0.0, 0.2, 0.4], [0.0, 0.0, 0.2, 0.4]
    assert not attention_weights(cut, judged(*nothing), config).any()


def weights_of_the_authors(rounds, judge_ids, train_ids, keep_from: int = 5) -> np.ndarray:
    """a_t before their multiplier, step by step as methods.md lists them: D1, D9, D15 (no renormalisation)."""
    mass = sum(np.array(each) / sum(each) for each in rounds) / 2
    if len(mass) >= keep_from:
        total, rest = mass.sum(), mass[1:].sum()
        first = total / len(mass)
        mass = np.concatenate([[first], mass[1:] * (total - first) / rest])
    shorter = min(len(judge_ids), len(train_ids))
    aligned = np.zeros(len(train_ids))
    if list(judge_ids[:shorter]) == list(train_ids[:shorter]):
        aligned[:shorter] = mass[:shorter]
    else:
        for place, other in kept_by_edits(list(train_ids), list(judge_ids)):
            aligned[place] = mass[other]
    return aligned


def kept_by_edits(a: list[int], b: list[int]) -> list[tuple[int, int]]:
    """Places that a cheapest edit script keeps; of equal costs: substitute or keep, insert, delete."""
    cost = {(0, 0): (0, None)}
    for i in range(len(a) + 1):
        for j in range(len(b) + 1):
            ways = []
            if i and j:
                ways.append((cost[i - 1, j - 1][0] + (a[i - 1] != b[j - 1]), (i - 1, j - 1)))
            if j:
                ways.append((cost[i, j - 1][0] + 1, (i, j - 1)))
            if i:
                ways.append((cost[i - 1, j][0] + 1, (i - 1, j)))
            if ways:
                cost[i, j] = min(ways, key=lambda way: way[0])  # the first of equals
    kept, at = [], (len(a), len(b))
    while cost[at][1] is not None:
        before = cost[at][1]
        if before == (at[0] - 1, at[1] - 1) and a[at[0] - 1] == b[at[1] - 1]:
            kept.append(before)
        at = before
    return kept[::-1]


@pytest.mark.parametrize("seed", range(40))
def test_the_preset_authors_gives_their_weights(seed):
    """Equal tokens, a cut, other tokens: random cases against a plain transcription of what their code does."""
    rng = np.random.default_rng(seed)
    response = letters(int(rng.integers(1, 14)))
    response.ids[-1] = 999  # the end of the turn is no judge token
    num = int(rng.integers(2, 14))
    answer = judged(rng.random(num), rng.random(num))
    if seed % 2:  # another tokenisation: some ids differ
        answer.ids_J[rng.random(num) < 0.4] = rng.integers(0, 14)
    config = TrainConfig(**{name: value for name, value in PRESETS["authors"].items()})
    weights = attention_weights(response, answer, config)
    ended = [*response.ids.tolist(), response.ids[-1]]  # their trainer ends an answer twice
    expected = weights_of_the_authors(answer.attention_LRJ[0], answer.ids_J, ended)[:len(weights)]
    np.testing.assert_allclose(weights, expected, atol=1e-6)
    if not seed % 2 and num > len(response.ids):
        assert weights.sum() < 1  # what the cut took is not given back


def test_normalisers():
    raw, lens = torch.tensor([1.0, 3.0, 0.0, 0.0, 2.0]), torch.tensor([2, 2, 1])
    weights, scale = normalize(raw, lens, "mean1")
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.75, 0.5, 0.5, 1.0]))  # no mass: uniform
    assert scale.tolist() == [2, 2, 1]
    weights, scale = normalize(raw, lens, "none")
    assert torch.equal(weights, raw) and scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), -0.1, float("inf")])
def test_weights_that_make_no_sense_are_refused(bad):
    with pytest.raises(ValueError, match="token weights"):
        normalize(torch.tensor([1.0, bad]), torch.tensor([2]), "mean1")
