"""Weight sources, and how their raw weights become what the loss multiplies with.

A source is `WEIGHTS[name](batch, context) -> raw_N`: fp32 over the response tokens of a batch (twdpo.batch.PairBatch),
without gradient. To add one, write the function and its line in WEIGHTS (or do both in a file given to --import).
Attributes of a source, all optional:
    norm   how raw weights are normalised per response: "mean1" (the default) or "none"
    needs  what the context must hold: ("attention",) for a weights file; () is the default

Legend: N response tokens, S sequences (2i chosen, 2i+1 rejected), J judge tokens of one answer, R rounds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from twdpo.align import align, match_tokens
from twdpo.chat import Example, Response
from twdpo.config import InputError, TrainConfig
from twdpo.weights_file import JudgedAnswer, WeightsFile


@dataclass(frozen=True)
class WeightContext:
    """What a source may read beside the batch."""

    config: TrainConfig
    attention: WeightsFile | None = None


def uniform(batch, context: WeightContext) -> torch.Tensor:
    """Every token weighs 1: plain DPO (paper Eq. 4). Needs nothing."""
    return torch.ones(len(batch.targets_N))


uniform.norm = "none"


def attention(batch, context: WeightContext) -> torch.Tensor:
    """The judge's attention to each token, rounds averaged, aligned, sink fixed (paper Eq. 13, 14).

    Needs a weights file: two judge forwards a pair, once.
    """
    weights = [attention_weights(response, judged, context.config.sink_k, context.config.sink_k_min)
               for example in batch.examples
               for response, judged in zip((example.chosen, example.rejected), context.attention[example.pair.key])]
    return torch.from_numpy(np.concatenate(weights)).float()


attention.needs = ("attention",)

WEIGHTS = {
    "uniform": uniform,
    "attention": attention,
}


def attention_weights(response: Response, judged: JudgedAnswer, sink_k: int, sink_k_min: int) -> np.ndarray:
    """a_t of one answer, float64 [N], sum 1.

    Pinned to 1/n are the sink's tokens, the end of the turn, and tokens that the judge did not see; the others share
    the rest in proportion to their aligned mass.
    """
    mass_J = judged.attention_RJ.astype(np.float64).mean(axis=0)  # Eq. 13
    content = slice(0, response.num_content)
    ids_N, spans_N2 = response.ids[content], response.spans_N2[content]
    num_tokens = len(response.ids)
    mass_N = np.zeros(num_tokens)
    mass_N[content] = align(mass_J, judged.ids_J, judged.spans_J2, ids_N, spans_N2)
    pinned_N = np.ones(num_tokens, dtype=bool)  # the end of the turn stays pinned
    seen = judged.spans_J2[:, 0].min(), judged.spans_J2[:, 1].max()
    pinned_N[content] = (spans_N2[:, 0] >= seen[1]) | (spans_N2[:, 1] <= seen[0])
    if len(judged.ids_J) >= sink_k_min:
        pinned_N[content] |= overlaps_sink(judged, sink_k, ids_N, spans_N2)
    return pin_and_share(mass_N, pinned_N)


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


def find_source(loss, config: TrainConfig) -> tuple[str, str]:
    """(name in WEIGHTS, weights file or "") that --weights, or the loss's default, stands for. Raises InputError."""
    name = config.weights or getattr(loss, "default_source", "uniform")
    if name in WEIGHTS:
        return name, ""
    if Path(name).is_dir():
        return "attention", name
    raise InputError(f"--weights is {name!r}: neither a source ({', '.join(WEIGHTS)}) nor a folder made by extract.py")


def check_covered(weights_file: WeightsFile, examples: list[Example]) -> None:
    """Raise InputError when a pair has no stored attention."""
    missing = [example.pair for example in examples if example.pair.key not in weights_file]
    if missing:
        raise InputError(f"{len(missing)} of {len(examples)} pairs have no attention in {weights_file.directory}, the "
                         f"first is {missing[0].where}: extract it from the same pairs (a changed row is another "
                         "pair), leave them out with --skip-bad-rows, or leave --weights empty and train.py extracts "
                         "what is missing")
