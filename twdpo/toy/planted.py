"""Planted words of the toy's answers: which tokens are slot words and which filler, and figures of it.

Legend: N response tokens, S sequences (2i chosen, 2i+1 rejected), P pairs.
"""

from dataclasses import replace

import numpy as np
import torch

from twdpo.batch import Outputs, collate
from twdpo.logratio import segment_sum
from twdpo.metrics import Totals, add_totals, pair_metrics
from twdpo.rows import MicroBatch
from twdpo.tokens import Example, Response
from twdpo.toy.grammar import KINDS, kind_of, planted_spans
from twdpo.weights import WeightContext


def planted_tokens(batch) -> torch.Tensor:
    """Which response tokens of a batch overlap a slot word, bool [N] on the CPU."""
    return torch.from_numpy(np.concatenate([overlaps_planted(text, response.spans_N2)
                                            for text, response in answers_of(batch)]))


def content_tokens(batch) -> torch.Tensor:
    """Which response tokens of a batch are text and not the end of the turn, bool [N] on the CPU."""
    return torch.from_numpy(np.concatenate([response.content_N for _, response in answers_of(batch)]))


def answers_of(batch) -> list[tuple[str, Response]]:
    """(text, tokens) of every sequence, in order."""
    return [(text, response) for example in batch.examples for text, response in
            ((example.pair.chosen, example.chosen), (example.pair.rejected, example.rejected))]


def overlaps_planted(text: str, spans_N2: np.ndarray) -> np.ndarray:
    """Which of the tokens with these characters overlap a slot word of `text`, bool [N]."""
    overlap_N = np.zeros(len(spans_N2), dtype=bool)
    for start, stop in planted_spans(text):
        overlap_N |= (spans_N2[:, 0] < stop) & (spans_N2[:, 1] > start)
    return overlap_N


def planted_lift(raw_N: torch.Tensor, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(lift [S], share [S]) of raw weights: share is their mass on planted tokens over that on all content tokens, lift
    is share over the planted tokens' share of the content tokens, so that uniform weights have lift 1.

    The end of the turn does not count. Uniform for an answer without any mass; NaN for one without planted tokens.
    """
    content_N, planted_N = content_tokens(batch).double(), planted_tokens(batch).double()
    lens = batch.seq_lens_S
    mass_S = segment_sum(raw_N.double() * content_N, lens)
    plain_S = segment_sum(planted_N * content_N, lens) / segment_sum(content_N, lens)
    share_S = torch.where(mass_S > 0, segment_sum(raw_N.double() * planted_N * content_N, lens) / mass_S, plain_S)
    return share_S / plain_S, share_S


def source_lift(source, examples: list[Example], context: WeightContext) -> tuple[float, float]:
    """Means of `planted_lift` over the answers that hold planted tokens, before the first token is reset (sink_k)."""
    pairs = list(range(len(examples)))
    batch = collate(MicroBatch(tuple(pairs), True), examples, pairs, context.logps.get("reference"))
    context = replace(context, config=replace(context.config, sink_k=0))
    lift_S, share_S = planted_lift(source(batch, context), batch)
    known_S = ~lift_S.isnan()
    return float(lift_S[known_S].mean()), float(share_S[known_S].mean())


def filler_drift(logps_N: torch.Tensor, ref_logps_N: torch.Tensor, batch) -> torch.Tensor:
    """Mean |log pi - log pi_ref| (nats) over the filler tokens of both answers of a pair, [P]: how far training moved
    text that has nothing to do with the preference. The end of the turn does not count. NaN without filler."""
    filler_N = (content_tokens(batch) & ~planted_tokens(batch)).to(logps_N.device)
    drift_S = segment_sum((logps_N - ref_logps_N).abs() * filler_N, batch.seq_lens_S)
    count_S = segment_sum(filler_N.to(logps_N), batch.seq_lens_S)
    return drift_S.view(-1, 2).sum(dim=1) / count_S.view(-1, 2).sum(dim=1)


def add_planted(totals: Totals, outputs: Outputs, has_reference: bool, with_lift: bool = False) -> None:
    """Add to an evaluation's totals: accuracy by kind of preference, drift on filler (with a reference), and if asked
    for the lift of the weights that were used."""
    ratio_S, logps_N, batch, *_ = outputs
    accuracy_P = pair_metrics(torch.zeros_like(batch.coefficient_P), {}, ratio_S, logps_N, batch, 1.0, has_reference
                              )["reward_accuracy"]
    for kind in KINDS:
        is_kind_P = torch.tensor([kind_of(example.pair.chosen) == kind for example in batch.examples])
        add_totals(totals, {f"reward_accuracy_{kind}": accuracy_P},
                   batch.coefficient_P * is_kind_P.to(batch.coefficient_P))
    if with_lift:
        lift_P = planted_lift(batch.weights_N.cpu(), batch)[0].view(-1, 2).mean(dim=1).to(batch.coefficient_P)  # sync
        add_totals(totals, {"planted_lift": lift_P}, batch.coefficient_P * ~lift_P.isnan())
    if has_reference:
        drift_P = filler_drift(logps_N, batch.ref_logps_N, batch)
        add_totals(totals, {"filler_drift": drift_P}, batch.coefficient_P * ~drift_P.isnan())
