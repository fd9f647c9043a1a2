"""Weight sources, and how their raw weights become what the loss multiplies with.

A source is `WEIGHTS[name](batch, context) -> raw_N`: fp32 over the response tokens of a batch (twdpo.batch.PairBatch),
without gradient. To add one, write the function and its line in WEIGHTS (or do both in a file given to --import).
Attributes of a source, all optional:
    norm   how raw weights are normalised per response: "mean1" (the default) or "none"
    needs  what the context must hold: ("attention",) for a weights file, ("scores",) for verbalised scores; ()
           is the default

Legend: N response tokens, S sequences (2i chosen, 2i+1 rejected), J judge tokens of one answer, R rounds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from twdpo.align import align, align_by_edits, match_tokens
from twdpo.chat import Example, Response
from twdpo.config import InputError, TrainConfig
from twdpo.verbalized import ScoresFile, character_scores, token_scores
from twdpo.weights_file import JudgedAnswer, WeightsFile, read_meta


@dataclass(frozen=True)
class WeightContext:
    """What a source may read beside the batch."""

    config: TrainConfig
    attention: WeightsFile | None = None
    scores: ScoresFile | None = None


def uniform(batch, context: WeightContext) -> torch.Tensor:
    """Every token weighs 1: plain DPO (paper Eq. 4). Needs nothing."""
    return torch.ones(len(batch.targets_N))


uniform.norm = "none"


def attention(batch, context: WeightContext) -> torch.Tensor:
    """The judge's attention to each token, rounds averaged, aligned, sink fixed (paper Eq. 13, 14).

    Needs a weights file: two judge forwards a pair, once.
    """
    weights = [attention_weights(response, judged, context.config)
               for example in batch.examples
               for response, judged in zip((example.chosen, example.rejected), context.attention[example.pair.key])]
    return torch.from_numpy(np.concatenate(weights)).float()


attention.needs = ("attention",)

def verbalized(batch, context: WeightContext) -> torch.Tensor:
    """The score that the model itself gave each token's part of the answer, 1 to 5 (paper section 4.2).

    Tokens without a score, the end of the turn among them, get the answer's mean. Needs one generation an answer, once.
    """
    weights = []
    for example in batch.examples:
        for side, response in enumerate((example.chosen, example.rejected)):
            answer = context.scores[example.pair.key][side]
            scores_C = character_scores(int(response.spans_N2.max(initial=0)), answer.spans_J2, answer.score_J)
            scores_N = token_scores(response.spans_N2, scores_C)
            mean = np.nanmean(scores_N) if not np.isnan(scores_N).all() else 1.0
            weights.append(np.where(np.isnan(scores_N), mean, scores_N))
    return torch.from_numpy(np.concatenate(weights)).float()


verbalized.needs = ("scores",)

WEIGHTS = {
    "uniform": uniform,
    "attention": attention,
    "verbalized": verbalized,
}


def attention_weights(response: Response, judged: JudgedAnswer, config: TrainConfig) -> np.ndarray:
    """a_t of one answer, float64 [N], sum 1 unless the config says otherwise.

    Pinned to 1/n are the sink's tokens, the end of the turn, and tokens that the judge did not see; the others share
    the rest in proportion to their aligned mass. Several layers are merged at the end.
    """
    layers_LN = [layer_weights(response, judged, attention_RJ, config) for attention_RJ in judged.attention_LRJ]
    return np.sum(layers_LN, axis=0) if config.layer_merge == "sum" else np.mean(layers_LN, axis=0)


def layer_weights(response: Response, judged: JudgedAnswer, attention_RJ: np.ndarray, config: TrainConfig
                  ) -> np.ndarray:
    """`attention_weights` of one layer."""
    mass_J = average_rounds(attention_RJ, config.rounds)
    sink_k = config.sink_k if len(judged.ids_J) >= config.sink_k_min else 0
    if config.sink_on == "judge" and sink_k:
        mass_J = pin_and_share(mass_J, np.arange(len(mass_J)) < sink_k)
    content = slice(0, response.num_content)
    ids_N, spans_N2 = response.ids[content], response.spans_N2[content]
    num_tokens = len(response.ids)
    mass_N = np.zeros(num_tokens)
    if config.align == "edits":
        # The authors' trainer prints the end of the turn twice, and aligns it too.
        ended_N = np.append(response.ids, response.ids[response.num_content:])
        mass_N[content] = align_by_edits(mass_J, judged.ids_J, ended_N)[content]
    else:
        mass_N[content] = align(mass_J, judged.ids_J, judged.spans_J2, ids_N, spans_N2)
    unseen_N = np.ones(num_tokens, dtype=bool)  # so is the end of the turn
    seen = judged.spans_J2[:, 0].min(), judged.spans_J2[:, 1].max()
    unseen_N[content] = (spans_N2[:, 0] >= seen[1]) | (spans_N2[:, 1] <= seen[0])
    pinned_N = unseen_N if config.unseen == "mean" else np.zeros(num_tokens, dtype=bool)
    if config.sink_on == "training":
        pinned_N[content] |= overlaps_sink(judged, sink_k, ids_N, spans_N2)
    if not config.renormalize:
        return np.where(pinned_N, 1 / num_tokens, mass_N)
    return pin_and_share(mass_N, pinned_N)


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
            content = slice(0, response.num_content)
            ids_N, spans_N2 = response.ids[content], response.spans_N2[content]
            mass_J = average_rounds(judged.attention_LRJ[-1], rounds)
            match_N = match_tokens(judged.ids_J, judged.spans_J2, ids_N, spans_N2)
            copied = mass_J[match_N[match_N >= 0]].sum()
            kept = align(mass_J, judged.ids_J, judged.spans_J2, ids_N, spans_N2).sum()
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


def normalize(raw_N: torch.Tensor, seq_lens_S: torch.Tensor, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw weights -> (weights_N, scale_S) of the fused op.

    mean1: a_t with sum 1, and scale n (Eq. 5); none: as they are, and scale 1. A response without any weight is
    uniform. Raises ValueError for weights that are negative or not finite.
    """
    if not (raw_N.isfinite().all() and (raw_N >= 0).all()):
        raise ValueError(f"token weights must be finite and at least 0; found {raw_N.min()} to {raw_N.max()}")
    if norm == "none":
        return raw_N, torch.ones(len(seq_lens_S))
    if norm != "mean1":
        raise ValueError(f"norm is {norm!r}: it must be mean1 or none")
    parts = []
    for raw in raw_N.double().split(seq_lens_S.tolist()):
        total = raw.sum()
        parts.append(raw / total if total > 0 else torch.full_like(raw, 1 / max(len(raw), 1)))
    return torch.cat(parts).float(), seq_lens_S.float()


def judged_lengths(batch, context: WeightContext) -> torch.Tensor:
    """How many tokens of each answer the judge saw, fp32 [S]; of the answer itself when there is no weights file."""
    if context.attention is None:
        return batch.seq_lens_S.float()
    return torch.tensor([len(judged.ids_J) for example in batch.examples
                         for judged in context.attention[example.pair.key]], dtype=torch.float32)


def find_source(loss, config: TrainConfig) -> tuple[str, str]:
    """(name in WEIGHTS, weights file or "") that --weights, or the loss's default, stands for. Raises InputError."""
    name = config.weights or getattr(loss, "default_source", "uniform")
    if name in WEIGHTS:
        return name, ""
    if Path(name).is_dir():
        return read_meta(Path(name)).get("source", "attention"), name
    if name.endswith(".jsonl") and Path(name).is_file():
        return "attention", name
    raise InputError(f"--weights is {name!r}: neither a source ({', '.join(WEIGHTS)}) nor a folder made by extract.py "
                     "or a .jsonl file of its --export")


def check_covered(stored: WeightsFile | ScoresFile, examples: list[Example]) -> None:
    """Raise InputError when a pair has no stored attention or scores."""
    missing = [example.pair for example in examples if example.pair.key not in stored]
    if missing:
        raise InputError(f"{len(missing)} of {len(examples)} pairs have no weights in {stored.directory}, the "
                         f"first is {missing[0].where}: extract it from the same pairs (a changed row is another "
                         "pair), leave them out with --skip-bad-rows, or leave --weights empty and train.py extracts "
                         "what is missing")
