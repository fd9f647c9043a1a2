"""Weight sources, and how their raw weights become what the loss multiplies with.

A source is `WEIGHTS[name](batch, context) -> raw_N`: fp32 over the response tokens of a batch (twdpo.batch.PairBatch),
without gradient. To add one, write the function and its line in WEIGHTS (or do both in a file given to --import).
Keyword-only parameters are its options (--weights-options NAME=VALUE). Attributes of a source, all optional:
    norm   how raw weights are normalised: "mean1" (the default), "selected_mean", "pair_min" or "none" (`normalize`)
    needs  what it reads beside the pairs: "attention" (context.attention: a weights file), "attention_against" (the
           same: what its option `against` names), "scores" (context.scores: verbalised ones), "aux"
           (context.logps["positive"] and ["negative"]: log-probs under the models of --aux-model, or behind the texts
           of --aux-prompts), "contrast" (context.logps["contrast"]: under the contrast of two models), "ref"
           (batch.ref_logps_N, whatever the loss), "hidden" (batch.hidden_ND: the policy's hidden states that predict
           the response tokens, without gradient and not to be written to; the source is then called inside each
           forward, on the policy's device), "logps" (batch.logps_N: the policy's log-probs, likewise, known after its
           forward), "input_gradient" (batch.input_gradients, of a forward and a backward pass of its own); () is the
           default, and a function of the options is one that gives it
    A source must be a function of the pair: how pairs share a micro-batch is free.

Legend: N response tokens, S sequences (2i chosen, 2i+1 rejected).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from twdpo.config import TrainConfig
from twdpo.flags import InputError
from twdpo.importance import tidpo
from twdpo.judge.verbalized import ScoresFile, character_scores, token_scores
from twdpo.plugins import stated
from twdpo.postprocess import attention_weights, pin_and_share, pinned_tokens
from twdpo.tokens import Example
from twdpo.transport import otpo
from twdpo.weights_file import WeightsFile, read_meta

NORMS = ("mean1", "selected_mean", "pair_min", "none")
SAME_RATIO = 1e-4  # nats: log-ratios that differ by less are equal, as how rows are packed must change no selection
ONLINE_NEEDS = {"hidden", "logps", "input_gradient"}  # what there is while the policy runs alone
Verdicts = Literal["any", "consistent"]  # of the judge: whose pairs' attention is used
Logps = tuple[np.ndarray, np.ndarray]  # of the chosen and of the rejected response's tokens, fp32


@dataclass(frozen=True)
class WeightContext:
    """What a source may read beside the batch."""

    config: TrainConfig
    attention: WeightsFile | None = None
    attention_against: WeightsFile | None = None
    scores: ScoresFile | None = None
    # Of frozen models ("reference", "positive", "negative", "contrast"): log-probs of responses, by the pair's key.
    logps: Mapping[str, Mapping[int, Logps]] = field(default_factory=dict)
    # What runs around the policy's forward, outermost first: make(policy, run, batch) -> run(batch with what it made).
    passes: tuple[Callable, ...] = ()


def uniform(batch, context: WeightContext) -> torch.Tensor:
    """Every token weighs 1: plain DPO (arXiv 2605.21883 Eq. 4)."""
    return torch.ones(len(batch.targets_N))


uniform.norm = "none"


def attention(batch, context: WeightContext, *, verdicts: Verdicts = "any") -> torch.Tensor:
    """AttentionPO: the judge's attention to each token, both rounds, sink fixed (arXiv 2605.21883 Eq. 13, 14).

    verdicts=consistent: of pairs whose two verdicts are for the same answer; others are left uniform. Needs a weights
    file: two judge forwards a pair, once.
    """
    weights = [attention_weights(response, judged, context.config)
               for example in batch.examples
               for response, judged in zip((example.chosen, example.rejected), context.attention[example.pair.key])]
    return by_verdicts(weights, batch, context, verdicts)


attention.needs = ("attention",)


def attention_surprise(batch, context: WeightContext, *, verdicts: Verdicts = "any") -> torch.Tensor:
    """The judge's attention times -log p_ref of the token: what it looks at, where the text could have gone elsewhere.

    The judge looks where the meaning is decided; credit does most where the text branches (this project; no paper).
    Pinned tokens keep 1/n; verdicts as of `attention`. Needs a weights file, and reference log-probs whatever the loss.
    """
    raw_N, weights = attention(batch, context).numpy(), []
    surprise_N = -batch.ref_logps_N.cpu().numpy()
    ends = np.cumsum(batch.seq_lens_S.tolist())[:-1]
    for pinned, raw, surprise in zip(attention_pins(batch, context), np.split(raw_N, ends),
                                     np.split(surprise_N, ends)):
        weights.append(pin_and_share(raw * surprise.clip(min=0), pinned) * raw.sum())  # --no-renormalize: less than 1
    return by_verdicts(weights, batch, context, verdicts)


attention_surprise.needs = ("attention", "ref")


def attention_contrast(batch, context: WeightContext, *, against: str, verdicts: Verdicts = "any") -> torch.Tensor:
    """What the judge looks at for its question and not for another one: max(0, a - b), b its attention of `against`.

    Salience that any question has is taken off (this project; no paper). against: another judge prompt, as
    --judge-prompt takes it, or a folder of extract.py or its --export. Each is normalised first, over tokens that
    neither pins; pinned tokens keep 1/n; verdicts as of `attention`. Needs two weights files, of two judge forwards a
    pair each, once.
    """
    weights = []
    for example in batch.examples:
        both = zip(context.attention[example.pair.key], context.attention_against[example.pair.key])
        for response, judged in zip((example.chosen, example.rejected), both):
            pinned_N = np.any([pinned_tokens(response, each, context.config) for each in judged], axis=0)
            both_2N = [attention_weights(response, each, context.config) for each in judged]
            mass_N, other_N = (free_N / (free_N.sum() or 1) for free_N in np.where(pinned_N, 0, both_2N))
            raw_N = (mass_N - other_N).clip(min=0)
            # Without a positive difference the answer has no weight, which is counted and said.
            raw_N = pin_and_share(raw_N, pinned_N) if raw_N.any() or pinned_N.all() else raw_N
            weights.append(raw_N * both_2N[0].sum())  # less than 1 with --no-renormalize
    return by_verdicts(weights, batch, context, verdicts)


attention_contrast.needs = ("attention", "attention_against")


def verbalized(batch, context: WeightContext) -> torch.Tensor:
    """Scores from 1 to 5 that the model writes for each part of an answer (arXiv 2605.21883 section 4.2).

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


def decay(batch, context: WeightContext, *, gamma: float = 0.98, start: Literal[0, 1] = 0) -> torch.Tensor:
    """Temporal decay (D2PO, Shao et al. 2025, arXiv 2502.14340): gamma^t.

    t counts from `start`: 0 in the paper, 1 in its code. Needs lengths alone.
    """
    return torch.cat([gamma ** torch.arange(start, start + num, dtype=torch.float32)
                      for num in batch.seq_lens_S.tolist()])


decay.norm = "none"


def ld(batch, context: WeightContext, *, alpha: float = 0.5) -> torch.Tensor:
    """Length desensitisation (LD-DPO, Liu et al. 2024, arXiv 2409.06411): 1, and alpha past the shorter answer's end.

    On policy and reference alike (TRL 0.20 weighed the policy's part alone). Needs lengths alone.
    """
    weights = []
    for lengths in batch.seq_lens_S.view(-1, 2).tolist():
        for num in lengths:
            weights.append(torch.where(torch.arange(num) < min(lengths), 1.0, alpha))
    return torch.cat(weights)


ld.norm = "none"


def tis(batch, context: WeightContext, *, transform: Literal["exp", "rank", "scale", "binary", "sigmoid"] = "exp",
        low: float = -0.5, high: float = 1.5, mu: float = 1.0, k: float = 1.0, top: float = 1.0) -> torch.Tensor:
    """Token-level importance (TIS-DPO, Liu et al. 2024, arXiv 2410.04350).

    d is the log-ratio of the positive to the negative model, negated on rejected answers where not said otherwise.
    `exp` (the paper): k exp(mu clamp(d, low, high)), clamped before it is negated. Of its code: `rank`, the rank of d
    in its answer, from 0.7 to 1.3 (its README); `scale`, d from -1.5 to 1.5 as 0.7 to 1.3; `binary`, 1 for the share
    `top` of the largest d, else 0 (its settings file: top=1, so that all are 1). (Its `origin` and `threshold` give
    weights below 0, which are refused here.) `sigmoid`: 2 sigma(d), which is 1 + 2r with r the token reward that T-REG
    (Zhou et al. 2024, arXiv 2412.02685) has of two prompts, there a regulariser and no weight. Needs two auxiliary
    models, or two texts before one (--aux-prompts), one forward each, once.
    """
    if not low < high:
        raise InputError(f"--weights-options low={low},high={high}: low must be less than high")
    if not 0 < top <= 1:
        raise InputError(f"--weights-options top={top}: the share of the largest must be in (0, 1]")
    weights = []
    for positive, negative in aux_logps(batch, context, "positive", "negative"):
        for sign, higher, lower in zip((1.0, -1.0), positive, negative):
            score_N = torch.from_numpy(higher - lower)
            if transform == "exp":
                weights.append(k * torch.exp(sign * mu * score_N.clamp(low, high)))
            elif transform == "sigmoid":
                weights.append(2 * torch.sigmoid(sign * score_N))
            elif transform == "scale":
                weights.append(1 + 0.2 * (sign * score_N).clamp(-1.5, 1.5))
            elif transform == "binary":
                weights.append(largest_share(sign * score_N, top))
            else:
                rank_N = (sign * score_N).argsort(stable=True).argsort()
                share_N = rank_N / (len(rank_N) - 1) if len(rank_N) > 1 else torch.full((len(rank_N),), 0.5)
                weights.append(0.7 + 0.6 * share_N)
    return torch.cat(weights)


tis.norm = "none"
tis.needs = ("aux",)


def sepo(batch, context: WeightContext, *, k: float = 0.3, first: bool = True) -> torch.Tensor:
    """Selected tokens (SePO, Yang et al. 2024, arXiv 2408.13518).

    1 for the share k of a chosen answer's tokens that the oracle raises most over its reference, and for the share of a
    rejected answer's that it raises least; else 0. At least one token is selected. first=off: never an answer's first
    token, which their code does not score. Their loss is that of an average over these without a reference: --loss
    simpo, its beta being their gamma, its gamma_ratio their lambda / gamma. Needs two auxiliary models (oracle, its
    reference), one forward each, once.
    """
    if not 0 < k <= 1:
        raise InputError(f"--weights-options k={k}: the share of selected tokens must be in (0, 1]")
    weights = []
    for positive, negative in aux_logps(batch, context, "positive", "negative"):
        for sign, oracle, reference in zip((1.0, -1.0), positive, negative):
            score_N = torch.from_numpy(sign * (oracle - reference))
            skip = int(not first and len(score_N) > 1)
            weights.append(torch.cat([torch.zeros(skip), largest_share(score_N[skip:], k)]))
    return torch.cat(weights)


def largest_share(score_N: torch.Tensor, share: float) -> torch.Tensor:
    """1 for this share of the tokens, at least one, those of the largest scores (the first of equal ones); else 0."""
    selected = score_N.argsort(descending=True, stable=True)[:max(1, int(share * len(score_N)))]
    return torch.zeros(len(score_N)).index_fill(0, selected, 1.0)


sepo.norm = "selected_mean"
sepo.needs = ("aux",)


def cdpo(batch, context: WeightContext) -> torch.Tensor:
    """Critical tokens (cDPO, Lin et al. 2024, arXiv 2411.19943).

    1 on chosen answers; on rejected ones 1 - s_t, s_t the token's probability under the contrast of a model of correct
    and one of incorrect answers, softmax(2 z_positive - z_negative). (Their code pairs the two answers' tokens by
    position instead of summing.) Needs two auxiliary models, one forward each, once.
    """
    weights = []
    for (chosen, rejected), in aux_logps(batch, context, "contrast"):
        weights += [torch.ones(len(chosen)), 1 - torch.from_numpy(rejected).exp().clamp(max=1)]
    return torch.cat(weights).float()


cdpo.norm = "none"
cdpo.needs = ("contrast",)


def tgdpo(batch, context: WeightContext, *, alpha: float = 0.5) -> torch.Tensor:
    """Guidance by rewards of tokens (TGDPO, Zhu et al. 2025, arXiv 2506.14574): 1 + alpha r, rejected 1 - alpha r.

    r is beta, the run's own, times the log-ratio of the positive model (one that was trained with DPO, say) to the
    negative one (its reference, by default the policy as it starts), as in their code; weights below 0, which it does
    not prevent, are 0. Needs one auxiliary model, or two, one forward each, once.
    """
    weights = []
    for positive, negative in aux_logps(batch, context, "positive", "negative"):
        for sign, guide, reference in zip((1.0, -1.0), positive, negative):
            weights.append(1 + sign * alpha * context.config.beta * torch.from_numpy(guide - reference))
    return torch.cat(weights).clamp(min=0)


tgdpo.norm = "none"
tgdpo.needs = ("aux",)


def selective(batch, context: WeightContext, *, k: float = 0.4,
              direction: Literal["lag", "ratio"] = "lag") -> torch.Tensor:
    """Tokens that the policy has yet to move (Selective-DPO, Dong 2025, arXiv 2507.07725): 1 for the share k, else 0.

    By log(pi / pi_ref) of the policy as it is: the smallest of a chosen and the largest of a rejected answer (`lag`:
    their code), or the largest of both (`ratio`). What ties with the last one is selected too: while all log-ratios are
    0 every token, so that the first step is DPO's. Needs reference log-probs, whatever the loss.
    """
    if not 0 < k <= 1:
        raise InputError(f"--weights-options k={k}: the share of selected tokens must be in (0, 1]")
    weights = []
    for place, ratio_N in enumerate((batch.logps_N - batch.ref_logps_N).split(batch.seq_lens_S.tolist())):
        score_N = -ratio_N if direction == "lag" and place % 2 == 0 else ratio_N
        count = int(k * (len(ratio_N) - 1) + 1e-9) + 1  # those at or above their quantile 1 - k
        weights.append((score_N >= score_N.topk(count).values[-1] - SAME_RATIO).float())
    return torch.cat(weights)


selective.norm = "none"
selective.needs = ("logps", "ref")


WEIGHTS = {
    "uniform": uniform,
    "attention": attention,
    "attention_surprise": attention_surprise,
    "attention_contrast": attention_contrast,
    "verbalized": verbalized,
    "decay": decay,
    "ld": ld,
    "tis": tis,
    "sepo": sepo,
    "cdpo": cdpo,
    "tidpo": tidpo,
    "tgdpo": tgdpo,
    "selective": selective,
    "otpo": otpo,
}


def source_needs(source) -> tuple[str, ...]:
    """What a source needs beside the pairs."""
    return stated(source, "needs", ())


def aux_logps(batch, context: WeightContext, *names: str) -> list[tuple[Logps, ...]]:
    """Of each pair of the batch, the log-probs of its responses under the models of these names."""
    return [tuple(context.logps[name][example.pair.key] for name in names) for example in batch.examples]


def by_verdicts(weights: list[np.ndarray], batch, context: WeightContext, verdicts: str) -> torch.Tensor:
    """Weights of each sequence as raw_N; 1/n in those whose pair's verdicts differ, if only `consistent` ones count."""
    if verdicts == "consistent":
        used = np.repeat(context.attention.is_consistent([example.pair.key for example in batch.examples]), 2)
        weights = [each if is_used else np.full(len(each), 1 / len(each)) for each, is_used in zip(weights, used)]
    return torch.from_numpy(np.concatenate(weights)).float()


def attention_pins(batch, context: WeightContext) -> list[np.ndarray]:
    """Of each sequence, the tokens that `attention` pins to 1/n, bool [N]."""
    return [pinned_tokens(response, judged, context.config) for example in batch.examples
            for response, judged in zip((example.chosen, example.rejected), context.attention[example.pair.key])]


def normalize(raw_N: torch.Tensor, seq_lens_S: torch.Tensor, norm: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw weights -> (weights_N, scale_S) of the fused op.

    mean1: a_t with sum 1, and scale n (Eq. 5); selected_mean: sum 1, and scale 1: a mean; pair_min: sum 1, and scale
    min(n_w, n_l), as OTPO does; none: as they are, and scale 1. A response without any weight is uniform, but for none.
    Raises ValueError for weights that are negative or not finite.
    """
    if not (raw_N.isfinite().all() and (raw_N >= 0).all()):  # sync, of an online source on a GPU
        raise ValueError(f"token weights must be finite and at least 0; found {raw_N.min()} to {raw_N.max()}")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}: it must be one of {', '.join(NORMS)}")
    if norm == "none":
        return raw_N, torch.ones(len(seq_lens_S))
    parts = []
    for raw in raw_N.double().split(seq_lens_S.tolist()):
        total = raw.sum()
        parts.append(torch.where(total > 0, raw / total, 1 / max(len(raw), 1)))
    scale_S = seq_lens_S.float()
    if norm == "pair_min":
        scale_S = scale_S.view(-1, 2).amin(dim=1).repeat_interleave(2)
    elif norm == "selected_mean":
        scale_S = torch.ones_like(scale_S)
    return torch.cat(parts).float(), scale_S


def judged_lengths(batch, context: WeightContext) -> torch.Tensor:
    """How many tokens of each answer the judge saw, fp32 [S]; of the answer itself when there is no weights file."""
    if context.attention is None:
        return batch.seq_lens_S.float()
    return torch.tensor([len(judged.ids_J) for example in batch.examples
                         for judged in context.attention[example.pair.key]], dtype=torch.float32)


def find_source(loss, config: TrainConfig) -> str:
    """The name in WEIGHTS that --weights, or the loss's default, stands for. Raises InputError."""
    name = config.weights or getattr(loss, "default_source", "uniform")
    if name in WEIGHTS:
        return name
    if Path(name).is_dir():
        return read_meta(Path(name)).get("source", "attention")
    if name.endswith(".jsonl") and Path(name).is_file():
        return "attention"
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
