"""Alignment of judge tokens with training tokens: mass carried over by the characters of the answer.

Equal tokenisations copy exactly; elsewhere mass moves through characters, and none of the kept text's is lost.
Tokens may repeat, overlap or have empty spans. J judge tokens, N training tokens.
"""

from collections import defaultdict

import numpy as np


def match_tokens(judge_ids_J, judge_spans_J2, ids_N, spans_N2) -> np.ndarray:
    """The judge token of equal id and span for each training token, in order, each used once; -1: there is none."""
    same, places_N = min(len(judge_ids_J), len(ids_N)), np.arange(len(ids_N))
    if (np.array_equal(judge_ids_J[:same], ids_N[:same])
            and np.array_equal(judge_spans_J2[:same], spans_N2[:same])):  # of one tokenizer: nearly always
        return np.where(places_N < same, places_N, -1)
    waiting = defaultdict(list)
    judge_keys = zip(judge_ids_J.tolist(), map(tuple, judge_spans_J2.tolist()))
    for place, key in enumerate(judge_keys):
        waiting[key].append(place)
    for places in waiting.values():
        places.reverse()
    keys = zip(ids_N.tolist(), map(tuple, spans_N2.tolist()))
    return np.array([waiting[key].pop() if waiting.get(key) else -1 for key in keys], dtype=np.int64)


def align(mass_J, judge_ids_J, judge_spans_J2, ids_N, spans_N2, stop: int | None = None) -> np.ndarray:
    """Mass of judge tokens -> mass of training tokens, float64 [N].

    mass_J: float, at least 0. Spans are characters of the same answer. stop: where the text that training keeps ends
    (None: with the last training token). Mass on characters after it is dropped; the rest is conserved.
    """
    mass_J = np.asarray(mass_J, dtype=np.float64)
    aligned_N = np.zeros(len(ids_N))
    if not len(ids_N):
        return aligned_N
    match_N = match_tokens(judge_ids_J, judge_spans_J2, ids_N, spans_N2)
    matched_N = match_N >= 0
    aligned_N[matched_N] = mass_J[match_N[matched_N]]
    left_J = np.ones(len(mass_J), dtype=bool)
    left_J[match_N[matched_N]] = False
    if not left_J.any():
        return aligned_N
    judge_spans_J2, spans_N2 = fill_empty(judge_spans_J2), fill_empty(spans_N2)
    density_C = spread(mass_J[left_J], judge_spans_J2[left_J], int(spans_N2[:, 1].max()) if stop is None else stop)
    # A character gives its mass to the unmatched tokens that cover it, else to all that cover it.
    for takers_N in (~matched_N, np.ones(len(ids_N), dtype=bool)):
        cover_C = count_cover(spans_N2[takers_N], len(density_C))
        shared_C = np.where(cover_C > 0, density_C / np.maximum(cover_C, 1), 0.0)
        for place in np.flatnonzero(takers_N):
            aligned_N[place] += shared_C[spans_N2[place, 0]:spans_N2[place, 1]].sum()
        density_C[cover_C > 0] = 0.0
    for character in np.flatnonzero(density_C):  # covered by no token (an NFC tokenizer leaves such): the nearest one
        distance_N = np.maximum(spans_N2[:, 0] - character, character - (spans_N2[:, 1] - 1))
        aligned_N[int(np.argmin(distance_N))] += density_C[character]
    return aligned_N


def align_by_edits(mass_J, judge_ids_J, ids_N) -> np.ndarray:
    """Mass of judge tokens -> mass of training tokens, float64 [N], as the paper's authors do it (appendix D).

    Where one side begins with the other it copies. Else the tokens that a cheapest edit script keeps copy, and all
    others get 0: mass is lost. Ties go to keeping or substituting, then to inserting, then to deleting.
    """
    mass_J, aligned_N = np.asarray(mass_J, dtype=np.float64), np.zeros(len(ids_N))
    shorter = min(len(ids_N), len(judge_ids_J))
    if (ids_N[:shorter] == judge_ids_J[:shorter]).all():
        aligned_N[:shorter] = mass_J[:shorter]
        return aligned_N
    steps = np.arange(len(judge_ids_J) + 1)
    costs = [steps]  # of turning the first i training tokens into the first j judge tokens
    for row, id in enumerate(ids_N, 1):
        cheapest = np.minimum(costs[-1][:-1] + (judge_ids_J != id), costs[-1][1:] + 1)
        cheapest = np.concatenate([[row], cheapest])
        costs.append(np.minimum.accumulate(cheapest - steps) + steps)  # insertions run along the row
    row, column = len(ids_N), len(judge_ids_J)
    while row and column:
        differs = ids_N[row - 1] != judge_ids_J[column - 1]
        if costs[row - 1][column - 1] + differs == costs[row][column]:
            row, column = row - 1, column - 1
            if not differs:
                aligned_N[row] = mass_J[column]
        elif costs[row][column - 1] + 1 == costs[row][column]:
            column -= 1
        else:
            row -= 1
    return aligned_N


def fill_empty(spans_2: np.ndarray) -> np.ndarray:
    """Spans with every empty one replaced by its left neighbour's, or by the first one's that is not empty."""
    filled_2 = np.array(spans_2)
    full = np.flatnonzero(filled_2[:, 1] > filled_2[:, 0])
    if len(full):
        before = np.searchsorted(full, np.arange(len(filled_2)), side="right") - 1
        filled_2 = filled_2[full[np.maximum(before, 0)]]
    return filled_2


def spread(mass_J: np.ndarray, spans_J2: np.ndarray, num_characters: int) -> np.ndarray:
    """Mass per character, each token's spread evenly over its span; what lies past `num_characters` is dropped."""
    density_C = np.zeros(num_characters)
    for mass, (start, end) in zip(mass_J, spans_J2):
        density_C[start:end] += mass / max(end - start, 1)
    return density_C


def count_cover(spans_N2: np.ndarray, num_characters: int) -> np.ndarray:
    """How many of the tokens cover each character."""
    steps = np.zeros(num_characters + 1, dtype=np.int64)
    np.add.at(steps, spans_N2[:, 0], 1)
    np.add.at(steps, spans_N2[:, 1], -1)
    return np.cumsum(steps)[:-1]
