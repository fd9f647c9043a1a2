"""The objective of a run: loss and weight source that its flags name, bound to their options, checked, and applied.

Legend: P pairs, S sequences (2i chosen, 2i+1 rejected), N response tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import get_type_hints

import torch

from twdpo.batch import Anchor, Outputs, PairBatch
from twdpo.config import TrainConfig
from twdpo.dist import Process, send
from twdpo.flags import InputError, choices_of
from twdpo.logratio import TERMS, combine
from twdpo.loss_parts import loss_needs
from twdpo.loss_sum import find_loss, parse_sum, prefix_options
from twdpo.losses import LOSSES
from twdpo.plugins import (
    SWITCHES,
    bind_options,
    describe,
    import_files,
    inherit_attributes,
    merge_options,
    name_of,
    stated,
)
from twdpo.weights import (
    NORMS,
    ONLINE_NEEDS,
    WEIGHTS,
    WeightContext,
    find_source,
    judged_lengths,
    normalize,
    source_needs,
)

TOKEN_STATS = ("entropy", "top1")  # terms of --token-stats
LOSS_NEEDS = ("ref", "hidden", "ref_states", "anchor")  # of twdpo.needs.NEEDS; the others are for sources


@dataclass(frozen=True)
class Objective:
    """What is optimised.

    needs: what loss and source read beside the policy (twdpo.needs.NEEDS). norm: of the weights (twdpo.weights).
    terms: of the fused op, which the loss reads as batch.terms. statistics: the loss's, or None. weighs_reasoning:
    whether a reasoning model's thinking has weight.
    """

    loss: Callable
    source: Callable
    source_name: str
    needs: frozenset[str]
    norm: str
    terms: tuple[str, ...]
    statistics: Callable | None
    weighs_reasoning: bool = True

    @property
    def has_reference(self) -> bool:
        """Whether the loss reads reference log-probs."""
        return "ref" in loss_needs(self.loss)

    def place_of_reference(self, config: TrainConfig) -> str:
        """Where the reference itself is that the objective needs, `memory` or `disk`, or `anchors`: in memory, beside
        a second forward over what the policy writes; "": no more of it than its log-probs."""
        if "anchor" in self.needs:
            return "anchors"
        return config.ref_states if "ref_states" in self.needs else ""

    @property
    def is_online(self) -> bool:
        """Whether weights are made inside the policy's forward, from what is there alone."""
        return bool(ONLINE_NEEDS & set(source_needs(self.source)))

    def weigh(self, batch: PairBatch, context: WeightContext) -> PairBatch:
        """The batch with weights_N and scale_S of the source, normalised as `norm` says. Raises InputError."""
        config, lens, norm = context.config, batch.seq_lens_S, self.norm
        raw_N = self.raw_weights(batch, context)
        # Only attention comes with a sum that cuts and the alignment may have lessened.
        attended = norm == "mean1" and "attention" in source_needs(self.source)
        if attended and not config.renormalize:
            weights_N, scale_S = normalize(raw_N, lens, "none")[0], lens.float()
        else:
            weights_N, scale_S = normalize(raw_N, lens, norm)
        if config.length_normalize and norm != "selected_mean":  # which is a mean already
            scale_S = scale_S / lens  # Eq. 15
        elif attended and config.multiplier == "judged":
            scale_S = judged_lengths(batch, context)
        if not self.has_reference:  # reference log-probs were for the source alone
            batch = replace(batch, ref_logps_N=torch.zeros_like(batch.ref_logps_N))
        device = batch.ref_logps_N.device
        return replace(batch, weights_N=weights_N.to(device), scale_S=scale_S.to(device, non_blocking=True),
                       averaged=config.length_normalize or norm == "selected_mean")

    def raw_weights(self, batch: PairBatch, context: WeightContext) -> torch.Tensor:
        """What the source gives, thinking off if asked for, as fp32 without gradient, [N]. Raises InputError for what
        it must not give."""
        raw_N, name = self.source(batch, context), name_of(self.source)
        if not isinstance(raw_N, torch.Tensor) or raw_N.is_complex():
            kind = raw_N.dtype if isinstance(raw_N, torch.Tensor) else type(raw_N).__name__
            raise InputError(f"{name} gives a {kind}: it must be a tensor of the weights")
        if raw_N.shape != batch.targets_N.shape:
            raise InputError(f"{name} gives weights of shape {tuple(raw_N.shape)} for {len(batch.targets_N)} response "
                             "tokens: one number a token")
        raw_N = raw_N.detach().float()
        if not (raw_N.isfinite().all() and (raw_N >= 0).all()):  # sync, of an online source on a GPU
            raise InputError(f"{name} gives {batch.examples[0].pair.where} and the pairs beside it token weights from "
                             f"{raw_N.min():g} to {raw_N.max():g}: they must be finite and at least 0 "
                             "(--weights-options)")
        return raw_N if self.weighs_reasoning else raw_N * send(rest_tokens(batch), raw_N.device)


def forward(policy, batch: PairBatch, objective: Objective, context: WeightContext, config: TrainConfig) -> Outputs:
    """The policy on a micro-batch, with all that the objective asks of it: training and evaluation call it here alone.

    The outputs' batch holds the weights that were used, and what the loss needs. All ranks.
    """
    run = partial(run_policy, policy, objective, context, config)
    for make in reversed(context.passes):
        run = partial(make, policy, run)
    return run(batch)


def run_policy(policy, objective: Objective, context: WeightContext, config: TrainConfig, batch: PairBatch) -> Outputs:
    """`forward` of a batch that holds what was made around it. All ranks."""
    needs, of_source = loss_needs(objective.loss), source_needs(objective.source)
    weigh = partial(objective.weigh, context=context) if objective.is_online else None
    terms = tuple(dict.fromkeys(objective.terms + TOKEN_STATS * config.token_stats))
    if "logps" not in of_source:
        outputs = policy(batch, weigh, terms, "hidden" in needs)
    else:  # weights follow the log-probs that they multiply
        outputs = policy(batch, None, terms, "hidden" in {*needs, *of_source})
        hidden_ND = outputs.hidden_ND.detach() if "hidden" in of_source else None
        batch = replace(weigh(replace(outputs.batch, logps_N=outputs.logps_N.detach(), hidden_ND=hidden_ND)),
                        hidden_ND=None)
        ratio_S = combine(outputs.logps_N, batch.ref_logps_N, batch.weights_N, batch.seq_lens_S, batch.scale_S)
        outputs = outputs._replace(batch=batch, ratio_S=ratio_S)
    hidden_ND = outputs.hidden_ND if "hidden" in needs else None
    return outputs._replace(batch=replace(outputs.batch, terms=outputs.terms, hidden_ND=hidden_ND))


def settings_of_loss(given: dict[str, object], preset: str) -> dict[str, object]:
    """What the loss itself says of its defaults, under this preset. Runs the files of --import."""
    import_objectives(str(given.get("imports", "")))
    first, *others = [name for _, name in parse_sum(str(given.get("loss", TrainConfig.loss)), LOSSES)]
    settings = settings_stated(first, preset)
    if others:  # of these their options alone
        options = [prefix_options(name, str(settings_stated(name, "").get("loss_options", ""))) for name in others]
        own = prefix_options(first, str(settings.get("loss_options", "")))
        settings |= {"loss_options": merge_options(own, *options)} if any((own, *options)) else {}
    if "loss_options" in settings and given.get("loss_options"):
        given["loss_options"] = merge_options(settings["loss_options"], given["loss_options"])
    return settings


def settings_stated(name: str, preset: str) -> dict[str, object]:
    """What one loss says of its defaults under this preset. Raises InputError."""
    settings = getattr(LOSSES[name], "settings", {})
    if not isinstance(settings, dict) or not all(isinstance(values, dict) for values in settings.values()):
        raise InputError(f"the settings of the loss {name} are {settings!s:.80}: they must be "
                         "{preset: {field: value}}")
    if preset.startswith("tuned") and preset not in settings:
        known = [name for name, loss in LOSSES.items() if preset in getattr(loss, "settings", {})]
        raise InputError(f"--preset {preset}: no such settings of {name} are known here, but of {', '.join(known)}")
    settings = settings.get("", {}) | settings.get(preset, {})
    if unknown := settings.keys() - TrainConfig.__dataclass_fields__.keys():
        raise InputError(f"the settings of the loss {name} have {min(unknown)!r}, which is no field of TrainConfig")
    kinds = get_type_hints(TrainConfig)
    for field, value in settings.items():
        if choices_of(kinds[field]):
            continue  # the config checks them
        if type(value) is not kinds[field] and (kinds[field], type(value)) != (float, int):
            raise InputError(f"the settings of the loss {name} have {field} {value!r}: it must be a "
                             f"{kinds[field].__name__}")
    return settings


def find_objective(config: TrainConfig, process: Process) -> Objective:
    """Loss and source, options bound, checked. Raises InputError."""
    loss = find_loss(config.loss, config.loss_options, LOSSES)
    name = find_source(loss, config)
    options, weighs_reasoning = split_reasoning(config.weights_options)
    source = bind_options(WEIGHTS[name], options, "--weights-options")
    objective = replace(bind_objective(loss, source, name), weighs_reasoning=weighs_reasoning)
    try_loss(objective, config, process)
    return objective


def split_reasoning(text: str) -> tuple[str, bool]:
    """(options of the source itself, whether thinking has weight: `reasoning=on|off`, which any source takes).

    Raises InputError.
    """
    parts = [part.strip() for part in text.split(",")]
    values = [part.partition("=")[2].strip().lower() for part in parts if part.partition("=")[0].strip() == "reasoning"]
    if values and values[-1] not in SWITCHES:
        raise InputError(f"--weights-options has reasoning={values[-1]}: it must be on or off")
    own = ",".join(part for part in parts if part.partition("=")[0].strip() != "reasoning")
    return own, not values or SWITCHES[values[-1]]


def rest_tokens(batch: PairBatch) -> torch.Tensor:
    """0 for tokens of a reasoning model's thinking and the marks around it, else 1; fp32 [N] on the CPU."""
    responses = [response for example in batch.examples for response in (example.chosen, example.rejected)]
    return torch.cat([(torch.arange(len(each.ids)) >= each.num_reasoning).float() for each in responses])


def bind_objective(loss: Callable, source: Callable, source_name: str) -> Objective:
    """The objective of a loss and a source whose options are bound. Raises InputError for what they say of themselves
    (that a source's needs are known, twdpo.needs.open_needs checks)."""
    for what, needs in ((loss, loss_needs(loss)), (source, source_needs(source))):
        if not isinstance(needs, (tuple, list)):
            raise InputError(f"{name_of(what)}.needs is {needs!r}: it must be a tuple of names")
        if (norm := getattr(what, "norm", "none") or "none") not in NORMS:
            raise InputError(f"{name_of(what)}.norm is {norm!r}: it must be one of {', '.join(NORMS)}")
    if not set(loss_needs(loss)) <= set(LOSS_NEEDS):
        raise InputError(f"{name_of(loss)}.needs is {loss_needs(loss)!r}: a loss can need {', '.join(LOSS_NEEDS)} "
                         f"(what the op can give beside log-probs it names in `terms`, of {', '.join(TERMS)})")
    terms = stated(loss, "terms", ())
    if not isinstance(terms, (tuple, list)) or not set(terms) <= set(TERMS):
        raise InputError(f"{name_of(loss)}.terms is {terms!r}: it must be a tuple of {', '.join(TERMS)}")
    norm = getattr(loss, "norm", None) or getattr(source, "norm", "mean1")
    for other, name in getattr(loss, "norms", {}).items():
        if other != norm:  # a sum's first loss takes the source's
            raise InputError(f"--loss {name_of(loss)}: its first loss takes weights as {source_name} gives them, "
                             f"{norm}, and {name} normalises them as {other}; one run has one kind of weights")
    return Objective(loss, source, source_name, frozenset([*loss_needs(loss), *source_needs(source)]), norm,
                     tuple(terms), getattr(loss, "statistics", None))


def try_loss(objective: Objective, config: TrainConfig, process: Process) -> None:
    """Raise InputError for a loss that gives something else than losses, or with these options no finite ones."""
    loss, numbers = objective.loss, torch.tensor([-2.0, -1.0, -1.0, -1.0], requires_grad=True)
    pairs = made_up_batch(objective.terms, config.length_normalize or objective.norm == "selected_mean")
    try:
        if objective.statistics:
            pairs.means = {name: torch.zeros(()) for name in objective.statistics(numbers, numbers, pairs)}
        result = loss(numbers, numbers, pairs, config)
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"--loss-options {config.loss_options}: {error}") from error
    except Exception as error:  # noqa: BLE001 - it may read more of a batch than this has, or need longer answers
        process.print(f"{name_of(loss)} can't be tried on two made-up pairs ({type(error).__name__}: {error}): whether "
                      "it works shows in the first step")
        return
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.Tensor)
            and isinstance(result[1], dict) and result[0].shape == (2,)
            and all(isinstance(value, torch.Tensor) and value.shape == (2,) for value in result[1].values())):
        raise InputError(f"{name_of(loss)} returns something else than (one loss a pair, {{name: one value a pair}})")
    if config.loss_options and not result[0].isfinite().all():
        raise InputError(f"--loss-options {config.loss_options}: the loss is no finite number with these")


def made_up_batch(terms: tuple[str, ...] = (), averaged: bool = False) -> SimpleNamespace:
    """What losses read of a batch, of two pairs of one-token answers."""
    return SimpleNamespace(
        seq_lens_S=torch.ones(4, dtype=torch.long), weights_N=torch.ones(4), scale_S=torch.ones(4), averaged=averaged,
        ref_logps_N=torch.zeros(4), targets_N=torch.zeros(4).long(), pair_weights_P=torch.ones(2),
        margins_P=torch.zeros(2), pair_count=2, chosen_tokens=2, means={}, hidden_ND=torch.ones(4, 8),
        terms={name: torch.ones(4, dtype=torch.bool if name == "top1" else torch.float32) for name in terms},
        anchor=Anchor(-torch.ones(2), torch.zeros(2), torch.ones(2, dtype=torch.long)))


def import_objectives(paths: str) -> None:
    """Run the files of --import, which add to LOSSES and WEIGHTS. Raises InputError."""
    import_files(paths)
    inherit_attributes(LOSSES)
    inherit_attributes(WEIGHTS)


def list_objectives(paths: str = "") -> str:
    """What --help-losses prints: every loss and weight source, those of these files among them, from their docstrings.

    Raises InputError for a file that can't be run.
    """
    import_objectives(paths)
    lines = ["--weights-options reasoning=off, with any source: a reasoning model's thinking has no weight"]
    for title, rows in (("losses", describe(LOSSES, loss_needs)),
                        ("weight sources", describe(WEIGHTS, source_needs))):
        lines.append(f"{title} (name; options and their defaults; what it needs):")
        lines += [f"  {name:20}{what}; {options}; {needs}" for name, what, needs, options in rows]
    return "\n".join(lines)
