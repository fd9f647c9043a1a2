"""A config class's command line, JSON file and checks, made from its fields."""

import argparse
import dataclasses
import json
import textwrap
import typing
from pathlib import Path
from typing import Literal

GROUPS = {"data": "model and data", "objective": "objective", "judge": "judge", "steps": "optimisation",
          "held-out": "held-out pairs", "hardware": "hardware", "output": "output",
          "parity": "parity with the authors' code"}  # of --help, in order


class InputError(ValueError):
    """Something the user gave is wrong: the message holds the value, where it is, and what to do."""


def flag(default, group: str, help: str, **metadata):
    """A field with its place and line in `--help`; its type gives the choices.

    metadata: `name` overrides the flag's name, `free` lets a resume change it, `alone` is the value of the bare flag.
    Of a `settled` one these values leave it to the run, and config.json holds what the run found.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, **metadata})


def require(config, name: str, ok: bool, wanted: str) -> None:
    """Raise InputError that names the flag and its value."""
    if not ok:
        raise InputError(f"{flag_name(config, name)} is {getattr(config, name)!r}: it must be {wanted}")


def choices_of(kind: object) -> tuple[object, ...]:
    """What a field of this type may be; empty when it is no Literal."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def spell_choices(choices: tuple[object, ...]) -> str:
    """`auto, on or off`; an empty one goes without saying."""
    return " or ".join(", ".join(map(str, filter(None, choices))).rsplit(", ", 1))


def flag_name(cls, name: str) -> str:
    """`max_length` -> `--max-length`."""
    metadata = {field.name: field.metadata for field in dataclasses.fields(cls)}[name]
    return "--" + metadata.get("name", name).replace("_", "-")


def key_name(field: dataclasses.Field) -> str:
    """The key of a field in a JSON config: its flag's name with underscores."""
    return field.metadata.get("name", field.name)


def to_json(config) -> dict[str, object]:
    """All settings, keyed as in `OUT/config.json`."""
    return {key_name(field): getattr(config, field.name) for field in dataclasses.fields(config)}


class HelpFormatter(argparse.HelpFormatter):
    """A flag's text begins beside it, however long it is itself."""

    def __init__(self, prog: str):
        super().__init__(prog, width=110)

    def _format_action(self, action):
        line = f"  {self._format_action_invocation(action):24}  {self._expand_help(action)}"
        return textwrap.fill(line, 110, subsequent_indent=" " * 28, break_on_hyphens=False) + "\n"


def build_parser(cls, description: str, lists_losses: bool = False) -> argparse.ArgumentParser:
    """The command line of a config class, values as text; a flag that is not given leaves no trace in the namespace."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [FLAG VALUE ...]", allow_abbrev=False, add_help=False, formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS, description=f"{description} Defaults stand in [brackets]; a switch is off "
        "by default, and on where it stands as --no-NAME.", epilog="--help-losses lists every loss and weight source "
        "with its options, those of --import too." if lists_losses else None)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    if lists_losses:
        parser.add_argument("--help-losses", action="store_true", help=argparse.SUPPRESS)
    used = dict.fromkeys([*GROUPS, *(field.metadata["group"] for field in dataclasses.fields(cls))])
    groups = {key: parser.add_argument_group(GROUPS.get(key, key)) for key in used}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        group, name, kind = groups[field.metadata["group"]], flag_name(cls, field.name), hints[field.name]
        text = field.metadata["help"].replace("%", "%%")
        if kind is bool:
            for switch, value in ((name, True), (name.replace("--", "--no-", 1), False)):
                if not switch.startswith("--no-no-"):  # shown is the one that changes something
                    group.add_argument(switch, dest=field.name, action="store_const", const=value,
                                       help=argparse.SUPPRESS if value == field.default else text)
            continue
        choices = ",".join(filter(None, choices_of(kind)))
        options = {"metavar": f"{{{choices}}}" if choices else kind.__name__.upper()}
        if "alone" in field.metadata:
            options |= {"nargs": "?", "const": field.metadata["alone"]}
        default = "" if field.default == "" else f" [{field.default}]"  # the text says what empty means
        group.add_argument(name, dest=field.name, help=text + default, **options)
    return parser


def parse_flags(cls, argv: list[str] | None, description: str, lists_losses: bool = False) -> dict[str, object]:
    """The flags that are given, as values of their fields' types. Raises InputError for one that is none; argparse
    exits on an unknown flag."""
    given, hints = vars(build_parser(cls, description, lists_losses).parse_args(argv)), typing.get_type_hints(cls)
    for name, value in given.items():
        if isinstance(value, str):  # no switch
            try:
                given[name] = hints[name](value) if hints[name] in (int, float) else value.strip()
            except ValueError as error:
                wanted = "a whole number" if hints[name] is int else "a number"
                raise InputError(f"{flag_name(cls, name)} is {value!r}: it must be {wanted}") from error
    return given


def read_config_file(cls, path: str) -> dict[str, object]:
    """Settings from a JSON object; unknown keys and wrong types raise InputError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: it must hold one JSON object, not {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    by_key = {key_name(field): field.name for field in dataclasses.fields(cls)}
    settings = {}
    for key, value in values.items():
        if key == "run_id":  # OUT/config.json's
            continue
        if key not in by_key:
            raise InputError(f"--config {path}: unknown key {key!r}; the keys are the flags' names with underscores")
        kind = hints[by_key[key]]
        if (choices := choices_of(kind)) and value not in choices:
            raise InputError(f"{flag_name(cls, by_key[key])} is {value!r}: it must be {spell_choices(choices)}")
        if kind is float and type(value) is int and abs(value) < 1 << 1000:
            value = float(value)
        if not choices and type(value) is not kind:
            raise InputError(f"--config {path}: {key} is {value!r}, it must be a {kind.__name__}")
        settings[by_key[key]] = value.strip() if isinstance(value, str) else value
    return settings


def changed_settings(old: dict[str, object], new) -> list[str]:
    """Settings that a resume may not change and that differ from a stored config.json, as readable lines."""
    lines = []
    for field in dataclasses.fields(new):
        key, value = key_name(field), getattr(new, field.name)
        if not field.metadata.get("free") and old.get(key) != value:
            lines.append(f"{flag_name(new, field.name)}: was {old.get(key)!r}, is {value!r}")
    return lines
