"""From raw rounds to a_t: Eq. 13 and 14 by hand, pins, normalisers."""

import numpy as np
import pytest
import torch

from twdpo.chat import Response
from twdpo.weights import attention_weights, normalize
from twdpo.weights_file import JudgedAnswer


def letters(num_tokens: int, end_of_turn: bool = True) -> Response:
    """A response of one-character tokens, ended or cut."""
    spans = [(place, place + 1) for place in range(num_tokens)] + [(num_tokens, num_tokens)] * end_of_turn
    return Response(np.arange(len(spans), dtype=np.int32), np.array(spans, dtype=np.int32), num_tokens)


def judged(*rounds, start: int = 0) -> JudgedAnswer:
    """One-character judge tokens of the same ids, beginning at a character."""
    attention = np.array(rounds, dtype=np.float32)
    places = np.arange(start, start + attention.shape[1], dtype=np.int32)
    return JudgedAnswer(places, np.stack([places, places + 1], axis=1), attention)


def test_sink_fix_by_hand():
    """Five judge tokens, n = 6 with the end of the turn. Rounds average to (9, 1, 2, 3, 4) / 20 (Eq. 13). The first
    token and the end of the turn get 1/6; the others share 4/6 in proportion 1:2:3:4, so 4/60, 8/60, 12/60, 16/60."""
    weights = attention_weights(letters(5), judged([0.8, 0.1, 0.0, 0.3, 0.4], [0.1, 0.0, 0.2, 0.0, 0.0]), 1, 5)
    np.testing.assert_allclose(weights, [1 / 6, 4 / 60, 8 / 60, 12 / 60, 16 / 60, 1 / 6], rtol=1e-6)


def test_rounds_are_averaged_before_they_are_normalised():
    """Raw sums differ (0.9 and 0.1): the paper's mean keeps round 0's nine-fold say. 3 tokens + end, K off."""
    weights = attention_weights(letters(2, end_of_turn=False), judged([0.9, 0.0], [0.0, 0.1]), 0, 5)
    np.testing.assert_allclose(weights, [0.9, 0.1], rtol=1e-6)


def test_short_answers_keep_their_first_token():
    """Four judge tokens, fewer than K' = 5: only the end of the turn is pinned, to 1/5."""
    weights = attention_weights(letters(4), judged([0.4, 0.1, 0.1, 0.4], [0.4, 0.1, 0.1, 0.4]), 1, 5)
    np.testing.assert_allclose(weights, [0.32, 0.08, 0.08, 0.32, 0.2], rtol=1e-6)


def test_sink_k_zero_is_off_and_two_pins_two():
    rows = [0.5, 0.2, 0.1, 0.1, 0.1], [0.5, 0.2, 0.1, 0.1, 0.1]
    assert attention_weights(letters(5), judged(*rows), 0, 5)[0] == pytest.approx(5 / 6 * 0.5)
    np.testing.assert_allclose(attention_weights(letters(5), judged(*rows), 2, 5)[:2], 1 / 6)


def test_tokens_that_the_judge_did_not_see_get_the_mean_weight():
    """The judge saw the first two of four characters; n = 5: three tokens pinned to 1/5, two share 2/5 as 1:3."""
    weights = attention_weights(letters(4), judged([0.1, 0.3], [0.1, 0.3]), 1, 5)
    np.testing.assert_allclose(weights, [0.1, 0.3, 0.2, 0.2, 0.2], rtol=1e-6)


def test_sink_pins_every_training_token_that_overlaps_the_first_judge_token():
    response = letters(5)  # trained by letters, judged by pairs of letters
    spans = np.array([(0, 2), (2, 3), (3, 4), (4, 5), (4, 5)], dtype=np.int32)
    answer = JudgedAnswer(np.arange(50, 55, dtype=np.int32), spans, np.full((2, 5), 0.1, np.float32))
    np.testing.assert_allclose(attention_weights(response, answer, 1, 5)[:2], 1 / 6)


@pytest.mark.parametrize("rows", [([0.0, 0.0, 0.0, 0.0, 0.0],) * 2, ([1.0, 0.0, 0.0, 0.0, 0.0],) * 2])
def test_without_mass_outside_the_pins_weights_are_uniform(rows):
    np.testing.assert_allclose(attention_weights(letters(5), judged(*rows), 1, 5), 1 / 6)


@pytest.mark.parametrize("seed", range(20))
def test_weights_sum_to_one(seed):
    rng = np.random.default_rng(seed)
    num = int(rng.integers(1, 40))
    response = letters(int(rng.integers(1, 40)), end_of_turn=bool(seed % 2))
    weights = attention_weights(response, judged(rng.random(num), rng.random(num), start=seed % 3), 1, 5)
    assert (weights >= 0).all() and weights.sum() == pytest.approx(1)


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
