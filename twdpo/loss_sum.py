"""Sums of losses, as --loss spells them: dpo+0.2*sft.

beta, the norm of the weights, the default source and the settings are the first loss's; what they need is united.
"""

import math
from collections.abc import Callable, Mapping
from copy import copy

import torch

from twdpo.flags import InputError
from twdpo.logratio import combine
from twdpo.loss_parts import loss_needs
from twdpo.plugins import bind_options, bound_options, options_of, stated

Part = tuple[float, str]


def parse_sum(text: str, losses: Mapping[str, Callable]) -> list[Part]:
    """(factor, name) of each loss. Raises InputError for a name that is not there, twice there, or a bad factor."""
    if text.strip() in losses:  # whatever a fork has in a name
        return [(1.0, text.strip())]
    parts: list[Part] = []
    for piece in text.split("+"):
        factor, star, name = piece.rpartition("*")
        name = name.strip()
        try:
            value = float(factor) if star else 1.0
        except ValueError as error:
            raise InputError(f"--loss {text}: {factor.strip()!r} before {name} must be a number") from error
        if not 0 < value < math.inf:
            raise InputError(f"--loss {text}: the factor {value:g} of {name} must be finite and > 0")
        if name not in losses:
            whole = text if star or "+" in text else repr(text)
            raise InputError(f"--loss is {whole}: {f'{name!r} ' if whole == text else 'it '}must be one of "
                             f"{', '.join(losses)}, or a sum of them (dpo+0.2*sft)")
        if name in (other for _, other in parts):
            raise InputError(f"--loss {text}: {name} is in it twice")
        parts.append((value, name))
    return parts


def find_loss(text: str, options: str, losses: Mapping[str, Callable]) -> Callable:
    """The loss that --loss and --loss-options name, its options bound; of a sum of several one function. Raises
    InputError."""
    parts = parse_sum(text, losses)
    bound = [bind_options(losses[name], of_part, "--loss-options")
             for (_, name), of_part in zip(parts, split_options(parts, options, losses))]
    return bound[0] if parts == [(1.0, text.strip())] else sum_losses(text, parts, bound)


def split_options(parts: list[Part], options: str, losses: Mapping[str, Callable]) -> list[str]:
    """The options of each loss: NAME.OPTION=VALUE says whose it is, OPTION=VALUE is of the only one that has it. Raises
    InputError."""
    names = [name for _, name in parts]
    if len(names) == 1:
        return [options]
    of_each: dict[str, list[str]] = {name: [] for name in names}
    for part in filter(None, (part.strip() for part in options.split(","))):
        option = part.partition("=")[0].strip()
        owner, dot, inner = option.rpartition(".")
        if not dot:
            owners = [name for name in names if option in options_of(losses[name])]
            if len(owners) != 1:
                raise InputError(f"--loss-options has {part!r}: {' and '.join(owners) or 'no loss of the sum'} "
                                 f"{'have' if owners else 'has'} {option}; " + (
                                     f"say whose: {owners[0]}.{part}" if owners else
                                     f"the losses are {', '.join(names)} (python train.py --help-losses)"))
            owner = owners[0]
        if owner not in of_each:
            raise InputError(f"--loss-options has {part!r}: the losses of the sum are {', '.join(names)}")
        of_each[owner].append(part.removeprefix(f"{owner}."))
    return [",".join(of_each[name]) for name in names]


def sum_losses(text: str, spelled: list[Part], bound: list[Callable]) -> Callable:
    """One loss of several, which the log calls as the table does. Raises InputError when two of them want different
    norms."""
    parts = [(factor, name, part) for (factor, name), part in zip(spelled, bound)]
    has_reference = any("ref" in loss_needs(part) for part in bound)
    norms = {part.norm: name for _, name, part in parts if getattr(part, "norm", None)}
    if len(norms) > 1:
        raise InputError(f"--loss {text}: " + " and ".join(f"{name} normalises weights as {norm}"
                                                         for norm, name in norms.items())
                         + "; one run has one kind of weights")

    def given(part: Callable, ratio_S: torch.Tensor, logps_N: torch.Tensor, batch) -> tuple:
        """What a loss of the sum is called with: one that reads no reference gets ratios without it."""
        if not has_reference or "ref" in loss_needs(part):
            return ratio_S, logps_N, batch
        plain = changed(batch, ref_logps_N=torch.zeros_like(batch.ref_logps_N))
        return combine(logps_N, plain.ref_logps_N, batch.weights_N, batch.seq_lens_S, batch.scale_S), logps_N, plain

    def loss(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch, config):
        total_P, metrics = 0.0, {}
        for number, (factor, name, part) in enumerate(parts):
            ratio, logps, own = given(part, ratio_S, logps_N, batch)
            if getattr(part, "statistics", None):
                own = changed(own, means={each: value for (place, each), value in batch.means.items()
                                          if place == number})
            loss_P, more = part(ratio, logps, own, config)
            total_P = total_P + factor * loss_P
            metrics |= {f"loss_{name}": loss_P.detach()}
            metrics |= {each if each not in metrics else f"{each}_{name}": value for each, value in more.items()}
        return total_P, metrics

    def statistics(ratio_S: torch.Tensor, logps_N: torch.Tensor, batch) -> dict:
        return {(number, name): value for number, part in enumerate(bound) if getattr(part, "statistics", None)
                for name, value in part.statistics(*given(part, ratio_S, logps_N, batch)).items()}

    loss.__name__, loss.parts = text, bound
    loss.needs = tuple(dict.fromkeys(need for part in bound for need in loss_needs(part)))
    loss.terms = tuple(dict.fromkeys(term for part in bound for term in stated(part, "terms", ())))
    loss.norm, loss.norms = getattr(bound[0], "norm", None), norms
    if source := getattr(bound[0], "default_source", ""):
        loss.default_source = source
    if any(getattr(part, "statistics", None) for part in bound):
        loss.statistics = statistics
    return loss


def changed(batch, **fields):
    """A copy of the batch with other values in these fields."""
    batch = copy(batch)
    vars(batch).update(fields)
    return batch


def prefix_options(name: str, options: str) -> str:
    """`NAME.OPTION=VALUE` of each option."""
    return ",".join(f"{name}.{part.strip()}" for part in options.split(",") if part.strip())


def options_bound(loss: Callable, option: str) -> list[object]:
    """What this option is set to in the losses of a sum, or in the one loss, that have it."""
    options = [bound_options(part) for part in getattr(loss, "parts", [loss])]
    return [each[option] for each in options if option in each]
