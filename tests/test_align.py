"""Alignment by characters: numbers worked by hand, conservation, exact copies."""

import numpy as np
import pytest

from twdpo.align import align, match_tokens


def spans(*pairs) -> np.ndarray:
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)


def ids(*values) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_equal_tokenisations_copy_bit_for_bit():
    # Repeated, overlapping and empty spans at once.
    where = spans((0, 2), (0, 2), (1, 4), (4, 4), (4, 6))
    mass = np.array([0.1, 0.2, 0.3, 1e-30, 0.7])
    assert (align(mass, ids(7, 7, 8, 9, 3), where, ids(7, 7, 8, 9, 3), where) == mass).all()


def test_one_judge_token_over_two_training_tokens():
    # "abcd" as one judge token of mass 1, trained as "a" + "bcd": a quarter and three quarters.
    aligned = align([1.0], ids(1), spans((0, 4)), ids(2, 3), spans((0, 1), (1, 4)))
    np.testing.assert_allclose(aligned, [0.25, 0.75])


def test_characters_shared_by_two_training_tokens():
    # A character that two training tokens cover (halves of an emoji) gives each one half.
    aligned = align([0.6], ids(1), spans((0, 1)), ids(2, 3), spans((0, 1), (0, 1)))
    np.testing.assert_allclose(aligned, [0.3, 0.3])


def test_matched_tokens_copy_and_only_the_rest_moves():
    # "ab|cd" judged, "ab|c|d" trained: "ab" copies, "cd" splits.
    aligned = align([0.4, 0.6], ids(1, 2), spans((0, 2), (2, 4)), ids(1, 5, 6), spans((0, 2), (2, 3), (3, 4)))
    np.testing.assert_allclose(aligned, [0.4, 0.3, 0.3])


def test_mass_of_an_unmatched_judge_token_goes_to_matched_tokens_where_no_other_covers_it():
    # The judge has a second token on the same characters; every training token there is matched already.
    aligned = align([0.4, 0.2], ids(1, 2), spans((0, 2), (0, 2)), ids(1), spans((0, 2)))
    np.testing.assert_allclose(aligned, [0.6])


def test_mass_past_the_cut_is_dropped():
    aligned = align([0.5, 0.4], ids(1, 2), spans((0, 2), (2, 6)), ids(1, 3), spans((0, 2), (2, 3)))
    np.testing.assert_allclose(aligned, [0.5, 0.1])


def test_empty_spans_share_with_their_left_neighbour():
    aligned = align([0.8], ids(1), spans((0, 4)), ids(2, 3, 4), spans((0, 2), (2, 2), (2, 4)))
    np.testing.assert_allclose(aligned, [0.2, 0.2, 0.4])
    # An empty judge token's mass goes where its left neighbour's goes.
    aligned = align([0.8, 0.4], ids(1, 2), spans((0, 2), (2, 2)), ids(3, 4), spans((0, 1), (1, 2)))
    np.testing.assert_allclose(aligned, [0.6, 0.6])


def test_a_character_without_a_token_gives_its_mass_to_the_nearest():
    aligned = align([0.9], ids(1), spans((0, 3)), ids(2, 3), spans((0, 1), (2, 3)))
    assert aligned.sum() == pytest.approx(0.9) and (aligned >= 0.3 - 1e-12).all()


def random_tokens(rng, length: int) -> np.ndarray:
    """Spans that cover [0, length), with some repeated, overlapping and empty ones."""
    cuts = np.unique(np.concatenate([[0, length], rng.integers(0, length + 1, rng.integers(1, length + 1))]))
    found = []
    for start, end in zip(cuts, cuts[1:]):
        found += [(start, end)] * rng.integers(1, 3)
        if rng.random() < 0.2:
            found.append((end, end))
        if rng.random() < 0.2 and end < length:
            found.append((end - 1, end + 1))
    return np.array(found, dtype=np.int32)


@pytest.mark.parametrize("seed", range(200))
def test_mass_of_the_kept_text_is_conserved(seed):
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 30))
    judge_spans, train_spans = random_tokens(rng, length), random_tokens(rng, length)
    mass = rng.random(len(judge_spans))
    judge_ids, train_ids = rng.integers(0, 4, len(judge_spans)), rng.integers(0, 4, len(train_spans))
    aligned = align(mass, judge_ids, judge_spans, train_ids, train_spans)
    assert (aligned >= 0).all() and aligned.sum() == pytest.approx(mass.sum())
    assert (align(mass, judge_ids, judge_spans, judge_ids, judge_spans) == mass).all()
    # Under a cut between characters, what is kept is the mass of the characters before it (ids that never match).
    end = int(rng.integers(1, length + 1))
    kept = np.clip(train_spans, 0, end)[train_spans[:, 0] < end]
    aligned = align(mass, judge_ids, judge_spans, np.full(len(kept), 9), kept)
    filled = [(start, stop) for start, stop in judge_spans]
    for place, (start, stop) in enumerate(filled):
        if start == stop:
            filled[place] = filled[place - 1]
    expected = sum(m * max(0, min(stop, end) - start) / (stop - start) for m, (start, stop) in zip(mass, filled))
    assert aligned.sum() == pytest.approx(expected)


@pytest.mark.parametrize("num_judged, num_trained", [(9, 9), (9, 5), (5, 9), (1, 1)])
def test_where_one_side_begins_with_the_other_tokens_match_as_everywhere(num_judged, num_trained):
    """The short way for equal beginnings against the long one, into which another first token leads."""
    rng = np.random.default_rng(0)
    values, where = rng.integers(1, 3, 9).astype(np.int32), np.repeat(rng.integers(0, 2, (9, 1)), 2, axis=1)
    judged, trained = slice(num_judged), slice(num_trained)
    short = match_tokens(values[judged], where[judged], values[trained], where[trained])
    long = match_tokens(np.append(ids(99), values[judged]), np.concatenate([spans((0, 0)), where[judged]]),
                        values[trained], where[trained])
    assert short.tolist() == np.where(long > 0, long - 1, -1).tolist()
