"""What losses and weight sources have in common: options from their signatures, a line about each from its docstring.

An option is a keyword-only parameter with a default, which gives its type; a Literal annotation gives its choices.
"""

import inspect
import typing
from collections.abc import Callable, Mapping
from functools import partial, update_wrapper

from twdpo.config import InputError


def options_of(function: Callable) -> dict[str, object]:
    """Names and defaults of a function's options."""
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY}


def bind_options(function: Callable, text: str, flag: str) -> Callable:
    """The function with the options of `NAME=VALUE,NAME=VALUE` set; it keeps its attributes. Raises InputError.

    flag: what gave the text, for messages.
    """
    known, hints, values = options_of(function), typing.get_type_hints(function), {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        if name not in known:
            raise InputError(f"{flag} has {part!r}: the options of {function.__name__} are "
                             + (", ".join(f"{name}={default}" for name, default in known.items()) or "none"))
        kind = type(known[name])
        try:
            values[name] = value in ("1", "true", "on") if kind is bool else kind(value)
        except ValueError as error:
            raise InputError(f"{flag} has {part!r}: {name} must be a {kind.__name__}") from error
        choices = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is typing.Literal else ()
        if choices and values[name] not in choices:
            raise InputError(f"{flag} has {part!r}: {name} must be one of {', '.join(map(str, choices))}")
    return update_wrapper(partial(function, **values), function) if values else function


def summary(function: Callable) -> str:
    """The first paragraph of a docstring: what it is, and its paper."""
    return inspect.cleandoc(function.__doc__ or "").split("\n\n")[0].replace("\n", " ").rstrip(".")


def describe(functions: Mapping[str, Callable], needs_of: Callable[[Callable], tuple[str, ...]]) -> list[list[str]]:
    """Rows of (name, what it is, what it needs, its options with their defaults)."""
    return [[name, summary(function), ", ".join(needs_of(function)) or "-",
             ", ".join(f"{option}={default}" for option, default in options_of(function).items()) or "-"]
            for name, function in functions.items()]
