"""What a run optimises: the loss and the weight source that its flags name, bound to their options and checked."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import get_type_hints

import torch

from twdpo.config import InputError, TrainConfig, choices_of
from twdpo.dist import Process
from twdpo.inputs import import_files
from twdpo.losses import LOSSES, loss_needs
from twdpo.plugins import bind_options, describe, inherit_attributes, merge_options, name_of
from twdpo.weights import NORMS, WEIGHTS, find_source, source_needs


def settings_of_loss(given: dict[str, object], preset: str) -> dict[str, object]:
    """What the loss itself says of its defaults, under this preset. Runs the files of --import."""
    import_objectives(str(given.get("imports", "")))
    name = given.get("loss", TrainConfig.loss)
    settings = getattr(LOSSES.get(name), "settings", {})
    if not isinstance(settings, dict) or not all(isinstance(values, dict) for values in settings.values()):
        raise InputError(f"the settings of the loss {name} are {settings!s:.80}: they must be "
                         "{preset: {field: value}}")
    if preset.startswith("tuned") and name in LOSSES and preset not in settings:
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
    if "loss_options" in settings and given.get("loss_options"):
        given["loss_options"] = merge_options(settings["loss_options"], given["loss_options"])
    return settings


def find_objective(config: TrainConfig, process: Process) -> tuple[Callable, Callable, str, str]:
    """(loss, weight source, its name in WEIGHTS, weights file or ""), options bound. Raises InputError."""
    if config.loss not in LOSSES:
        raise InputError(f"--loss is {config.loss!r}: it must be one of {', '.join(LOSSES)}")
    loss = bind_options(LOSSES[config.loss], config.loss_options, "--loss-options")
    source_name, weights_path = find_source(loss, config)
    source = bind_options(WEIGHTS[source_name], config.weights_options, "--weights-options")
    check_plugins(loss, source, config, process)
    return loss, source, source_name, weights_path


def check_plugins(loss, source, config: TrainConfig, process: Process) -> None:
    """Raise InputError for what a loss or a source says of itself, or its options, that can't be."""
    for what, needs, known in ((loss, loss_needs(loss), {"ref"}),
                               (source, source_needs(source), {"attention", "scores", "aux", "contrast", "ref"})):
        if not isinstance(needs, (tuple, list)) or not set(needs) <= known:
            raise InputError(f"{name_of(what)}.needs is {needs!r}: it must be a tuple of {', '.join(sorted(known))}")
        if (norm := getattr(what, "norm", "none") or "none") not in NORMS:
            raise InputError(f"{name_of(what)}.norm is {norm!r}: it must be one of {', '.join(NORMS)}")
    norm = getattr(loss, "norm", None) or getattr(source, "norm", "mean1")
    numbers = torch.tensor([-2.0, -1.0, -1.0, -1.0], requires_grad=True)  # two pairs of one-token answers
    pairs = SimpleNamespace(seq_lens_S=torch.ones(4, dtype=torch.long), weights_N=torch.ones(4), pair_count=2,
                            scale_S=torch.ones(4), ref_logps_N=torch.zeros(4), targets_N=torch.zeros(4).long(),
                            chosen_tokens=2, averaged=config.length_normalize or norm == "selected_mean",
                            means=dict.fromkeys(("chosen", "rejected"), torch.zeros(())))
    try:
        result = loss(numbers, numbers, pairs, config)
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"--loss-options {config.loss_options}: {error}") from error
    except Exception as error:  # noqa: BLE001 - it may read more of a batch than this has, or need longer answers
        process.print(f"{name_of(loss)} can't be tried on two made-up pairs ({type(error).__name__}: {error}): whether "
                      "it works shows in the first step")
        return
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.Tensor)
            and isinstance(result[1], dict) and result[0].shape == (2,)):
        raise InputError(f"{name_of(loss)} returns something else than (one loss a pair, {{name: one value a pair}})")
    if config.loss_options and not result[0].isfinite().all():
        raise InputError(f"--loss-options {config.loss_options}: the loss is no finite number with these")


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
    lines = []
    for title, rows in (("losses", describe(LOSSES, loss_needs)),
                        ("weight sources", describe(WEIGHTS, source_needs))):
        lines.append(f"{title} (name; options and their defaults; what it needs):")
        lines += [f"  {name:20}{what}; {options}; {needs}" for name, what, needs, options in rows]
    return "\n".join(lines)
