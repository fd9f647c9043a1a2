"""Post-processing of raw attention into a_t: rounds averaged, aligned to training tokens, sink fixed, normalised.

Legend: N response tokens, J judge tokens of one answer, R rounds, L layers.
"""

import numpy as np

from twdpo.align import align, align_by_edits, match_tokens
from twdpo.config import TrainConfig
from twdpo.tokens import Example, Response
from twdpo.weights_file import JudgedAnswer, WeightsFile, parse_layer


def attention_weights(response: Response, judged: JudgedAnswer, config: TrainConfig) -> np.ndarray:
    """a_t of one answer, float64 [N], sum 1; with --no-renormalize the share of the judge's mass that the training cut
    and the alignment have left.

    Pinned to 1/n of the sum are the sink's tokens, the end of the turn, and tokens that the judge did not see; the
    others share the rest in proportion to their aligned mass. Several layers are averaged at the end (`--layer 8,16`)
    or summed, as the authors' code does (`8+16`).
    """
    layers_LN = [layer_weights(response, judged, attention_RJ, config) for attention_RJ in judged.attention_LRJ]
    return np.sum(layers_LN, axis=0) if parse_layer(config.layer)[1] else np.mean(layers_LN, axis=0)


def layer_weights(response: Response, judged: JudgedAnswer, attention_RJ: np.ndarray, config: TrainConfig
                  ) -> np.ndarray:
    """`attention_weights` of one layer."""
    mass_J = average_rounds(attention_RJ, config.judge_rounds)
    sink_k = config.sink_k if len(judged.ids_J) >= config.sink_k_min else 0
    if config.sink_on == "judge" and sink_k:
        mass_J = pin_and_share(mass_J, np.arange(len(mass_J)) < sink_k)
    content = response.content_N
    ids_N, spans_N2 = response.ids[content], response.spans_N2[content]
    num_tokens = len(response.ids)
    mass_N = np.zeros(num_tokens)
    if config.align == "edits":
        # The authors' trainer prints the end of the turn twice, and aligns it too.
        end = int(np.flatnonzero(content)[-1]) + 1 if content.any() else num_tokens
        ended_N = np.append(response.ids, response.ids[end:])
        mass_N[content] = align_by_edits(mass_J, judged.ids_J, ended_N)[:num_tokens][content]
    else:
        mass_N[content] = align(mass_J, judged.ids_J, judged.spans_J2, ids_N, spans_N2, kept_text(response))
    weights_N = pin_and_share(mass_N, pinned_tokens(response, judged, config))
    return weights_N if config.renormalize else weights_N * mass_N.sum()


def kept_text(response: Response) -> int:
    """Where the text that training keeps of an answer ends; its last characters may stand in the end of the turn."""
    return int(response.spans_N2[:, 1].max(initial=0))


def pinned_tokens(response: Response, judged: JudgedAnswer, config: TrainConfig) -> np.ndarray:
    """Tokens whose weight is 1/n whatever their attention: the sink's, the end of the turn, and those that the judge
    did not see; bool [N]."""
    content = response.content_N
    ids_N, spans_N2 = response.ids[content], response.spans_N2[content]
    unseen_N = np.ones(len(response.ids), dtype=bool)  # so is the end of the turn
    seen = judged.spans_J2[:, 0].min(), judged.spans_J2[:, 1].max()
    unseen_N[content] = (spans_N2[:, 0] >= seen[1]) | (spans_N2[:, 1] <= seen[0])
    pinned_N = unseen_N if config.unseen == "mean" else np.zeros(len(response.ids), dtype=bool)
    if config.sink_on == "training":
        sink_k = config.sink_k if len(judged.ids_J) >= config.sink_k_min else 0
        pinned_N[content] |= overlaps_sink(judged, sink_k, ids_N, spans_N2)
    return pinned_N


def average_rounds(attention_RJ: np.ndarray, rounds: str) -> np.ndarray:
    """One mass per judge token, float64 [J], sum 1; zeros when there is none.

    raw: the mean of the rounds, normalised (Eq. 13); normalized: the mean of normalised rounds, a round without mass
    being uniform.
    """
    mass_RJ = attention_RJ.astype(np.float64)
    if rounds == "raw":
        mass_RJ = mass_RJ.mean(axis=0, keepdims=True)
    totals_R1 = mass_RJ.sum(axis=1, keepdims=True)
    without = 1 / mass_RJ.shape[1] if rounds == "normalized" else 0.0
    return np.where(totals_R1 > 0, mass_RJ / np.where(totals_R1 > 0, totals_R1, 1), without).mean(axis=0)


def alignment_shares(examples: list[Example], weights_file: WeightsFile, rounds: str) -> dict[str, float]:
    """Where the mass of these pairs' judge tokens goes, as shares of it, mean over answers.

    copied: to a training token of the same id and characters; moved: through characters, to other tokens; dropped:
    past the training cut.
    """
    totals = {"copied": 0.0, "moved": 0.0, "dropped": 0.0}
    num_answers = 0
    for example in examples:
        for response, judged in zip((example.chosen, example.rejected), weights_file[example.pair.key]):
            content = response.content_N
            ids_N, spans_N2 = response.ids[content], response.spans_N2[content]
            mass_J = average_rounds(judged.attention_LRJ[-1], rounds)
            match_N = match_tokens(judged.ids_J, judged.spans_J2, ids_N, spans_N2)
            copied = mass_J[match_N[match_N >= 0]].sum()
            kept = align(mass_J, judged.ids_J, judged.spans_J2, ids_N, spans_N2, kept_text(response)).sum()
            for name, value in (("copied", copied), ("moved", kept - copied), ("dropped", mass_J.sum() - kept)):
                totals[name] += float(value)
            num_answers += 1
    return {name: max(total, 0.0) / max(num_answers, 1) for name, total in totals.items()}


def overlaps_sink(judged: JudgedAnswer, num_first: int, ids_N: np.ndarray, spans_N2: np.ndarray) -> np.ndarray:
    """Training tokens that overlap, or are, one of the first judge tokens."""
    first_J2 = judged.spans_J2[:num_first]
    overlap_N = ((spans_N2[:, :1] < first_J2[:, 1]) & (spans_N2[:, 1:] > first_J2[:, 0])).any(axis=1)
    match_N = match_tokens(judged.ids_J, judged.spans_J2, ids_N, spans_N2)
    return overlap_N | ((match_N >= 0) & (match_N < num_first))


def pin_and_share(mass_N: np.ndarray, pinned_N: np.ndarray) -> np.ndarray:
    """1/n on pinned tokens, the rest of the sum in proportion to mass on the others (Eq. 14); uniform without mass."""
    num_tokens = len(mass_N)
    free_mass = mass_N[~pinned_N].sum()
    if not free_mass > 0:
        return np.full(num_tokens, 1 / num_tokens)
    shared_N = mass_N * (1 - pinned_N.sum() / num_tokens) / free_mass
    return np.where(pinned_N, 1 / num_tokens, shared_N)
