"""Options of losses and weight sources, from their signatures; a line about each, from its docstring; --import.

An option is a keyword-only parameter with a default, which gives its type; a Literal annotation gives its choices.
"""

import importlib.util
import inspect
import math
import sys
import traceback
import typing
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper
from pathlib import Path

from twdpo.flags import InputError

REQUIRED = inspect.Parameter.empty
SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def options_of(function: Callable) -> dict[str, object]:
    """Names and defaults of a function's options; REQUIRED for one without."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def stated(function: Callable, name: str, default: object) -> object:
    """What a loss or source says of itself in this attribute; where that is a function of its options, for those that
    are set. Raises InputError for one that does not take them."""
    value = getattr(function, name, default)
    if not callable(value):
        return value
    try:
        return value(**bound_options(function))
    except TypeError as error:
        raise InputError(f"{name_of(function)}.{name} can't be called with the options of {name_of(function)} by name, "
                         f"{', '.join(bound_options(function)) or 'of which there are none'}: {error}") from error


def bound_options(function: Callable) -> dict[str, object]:
    """Names and values of a function's options, as `bind_options` has set them."""
    return options_of(function) | getattr(function, "keywords", {})


def merge_options(*texts: str) -> str:
    """Options of several texts as one, each once; the last one that sets it counts."""
    merged = {}
    for part in ",".join(texts).split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if part.strip():
            merged[name] = equals + value
    return ",".join(name + value for name, value in merged.items())


def bind_options(function: Callable, text: str, flag: str) -> Callable:
    """The function with the options of `NAME=VALUE,NAME=VALUE` set; it keeps its attributes. Raises InputError.

    flag: what gave the text, for messages.
    """
    known, values = options_of(function), {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in known:
            raise InputError(f"{flag} has {part!r}: the options of {name_of(function)} are {spell_options(function)}")
        values[name] = parse_option(function, name, known[name], value, f"{flag} has {part!r}")
    if missing := [name for name, default in known.items() if default is REQUIRED and name not in values]:
        raise InputError(f"{name_of(function)} needs {flag} {missing[0]}=VALUE")
    return update_wrapper(partial(function, **values), function) if values else function


def parse_option(function: Callable, name: str, default: object, value: str, message: str) -> object:
    """A value of the type that the option's default has, or else its annotation. Raises InputError."""
    hint = hint_of(function, name)
    if alternatives := [kind for kind in typing.get_args(hint) if kind is not type(None)]:
        if typing.get_origin(hint) is not typing.Literal:  # float | None, Optional[float]
            hint = alternatives[0]
    kind = type(default) if default is not None and default is not REQUIRED else hint if isinstance(hint, type) else str
    try:
        parsed = SWITCHES[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError) as error:
        raise InputError(f"{message}: {name} must be a {kind.__name__}") from error
    if kind is float and not math.isfinite(parsed):
        raise InputError(f"{message}: {name} must be finite")
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    if choices and parsed not in choices:
        raise InputError(f"{message}: {name} must be one of {', '.join(map(str, choices))}")
    return parsed


def inherit_attributes(table: Mapping[str, Callable]) -> None:
    """Give partials in a table the attributes of the function that they are of, where they have none of their own."""
    for function in table.values():
        if isinstance(function, partial):
            own = vars(function).copy()
            update_wrapper(function, function.func)
            vars(function).update(own)


def hint_of(function: Callable, name: str) -> object:
    """The annotation of an option; str where there is none that means anything here."""
    try:
        return typing.get_type_hints(function if inspect.isroutine(function) else getattr(function, "func", function)
                                     ).get(name, str)
    except (TypeError, NameError):
        return str


def name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def spell_options(function: Callable) -> str:
    """`name=default, name=default|other`, or "none"."""
    parts = []
    for name, default in options_of(function).items():
        choices = [default, *(choice for choice in typing.get_args(hint_of(function, name)) if choice != default)]
        literal = typing.get_origin(hint_of(function, name)) is typing.Literal
        shown = "|".join(map(str, choices)) if literal else default
        parts.append(f"{name}={'VALUE' if default is REQUIRED else shown}")
    return ", ".join(parts) or "none"


def summary(function: Callable) -> str:
    """The first paragraph of a docstring: what it is, and its paper."""
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def describe(functions: Mapping[str, Callable], needs_of: Callable[[Callable], tuple[str, ...]]) -> list[list[str]]:
    """Rows of (name, what it is, what it needs, its options with their defaults)."""
    return [[name, summary(function), spell_needs(function, needs_of),
             spell_options(function).replace("none", "-")]
            for name, function in functions.items()]


def spell_needs(function: Callable, needs_of: Callable[[Callable], tuple[str, ...]]) -> str:
    """`need, need`, or "-"; what follows from options without a default is not known before they are set."""
    try:
        return ", ".join(needs_of(function)) or "-"
    except InputError:
        if REQUIRED in options_of(function).values():
            return "by its options"
        raise


def import_files(paths: str) -> None:
    """Run the files of --import, which add to LOSSES or WEIGHTS. Raises InputError for one that is not there."""
    for path in split_paths(paths):
        if not Path(path).is_file():
            raise InputError(f"--import {path}: no such file")
        name = f"twdpo_import_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # noqa: BLE001 - whatever the user's file does
            frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
            line = error.lineno if isinstance(error, SyntaxError) else frames[-1] if frames else "?"
            raise InputError(f"--import {path}:{line}: {type(error).__name__}: {error}") from error


def split_paths(paths: str) -> list[str]:
    """The files of --import."""
    return [path.strip() for path in paths.split(",") if path.strip()]
