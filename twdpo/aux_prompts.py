"""Pairs behind a text of --aux-prompts: the text is said before the conversation, and the same tokens answer it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from twdpo.chat import Chat, habit_of, messages_of
from twdpo.data_files import BadRow
from twdpo.examples import tokenize_all
from twdpo.flags import InputError
from twdpo.pairs import Pair
from twdpo.tokens import Example, Response

NO_LIMIT = 1 << 30  # tokens


def read_aux_prompts(names: str, chat: Chat) -> list[str]:
    """The texts in the two files of --aux-prompts, the positive one first. Raises InputError."""
    paths = [name.strip() for name in names.split(",") if name.strip()]
    if len(paths) != 2:
        raise InputError(f"--aux-prompts is {names!r}: it takes two text files, POSITIVE,NEGATIVE")
    if chat.templated:
        raise InputError("--aux-prompts with --templated: nothing can be said before texts that hold the template's "
                         "marks already")
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8").strip())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--aux-prompts {path}: it can't be read as text ({error})") from error
        if not texts[-1]:
            raise InputError(f"--aux-prompts {path}: it is empty")
        if found := chat.special_pattern.search(texts[-1]):
            raise InputError(f"--aux-prompts {path}: it spells the special token {found[0]!r}; it is the text of a "
                             "turn, which the chat template puts into its marks")
    return texts


def add_prompt(chat: Chat, pair: Pair, text: str, fold: bool) -> Pair:
    """The pair with `text` said first: as a system turn, before what its own one says; or before the text of the first
    user turn, where the chat template prints no system turn and with `fold` (--fold-system).

    Raises ValueError for a pair that has neither.
    """
    is_led = pair.messages[0][0] == "system"
    system = "\n\n".join(filter(None, [text, pair.messages[0][1] * is_led]))
    led = replace(pair, messages=(("system", system), *pair.messages[is_led:]),
                  extras=pair.extras if is_led else later_turns(pair.extras))
    if not fold and prints_system(chat, led):
        return led
    place = next((place for place, (role, _) in enumerate(pair.messages) if role == "user"), None)
    if place is None:
        raise ValueError("--aux-prompts: no user turn can take the text, and the chat template prints no system turn")
    turn = ("user", "\n\n".join(filter(None, [text, pair.messages[place][1]])))
    return replace(pair, messages=(*pair.messages[:place], turn, *pair.messages[place + 1:]))


def later_turns(extras: str) -> str:
    """A pair's extras when its turns have moved one on."""
    values = json.loads(extras or "{}")
    if "turns" not in values:
        return extras
    values["turns"] = {str(int(place) + 1): keys for place, keys in values["turns"].items()}
    return json.dumps(values, ensure_ascii=False)


def prints_system(chat: Chat, pair: Pair) -> bool:
    """Whether the template prints the text of the system turn that the pair begins with."""
    messages, _, tools = messages_of(pair)
    try:
        return habit_of(chat, messages, tools).printed[0] > 0
    except ValueError:  # it refuses the turn
        return False


def prompted_examples(chat: Chat, examples: list[Example], text: str, fold: bool, process, desc: str
                      ) -> tuple[dict[int, Example], list[BadRow]]:
    """(examples with `text` said first, by the key of the pair that each is of; rows that can't have it). All ranks.

    Their answers are the given examples' own; their prompts lack what those lack, and never a part of the text.
    """
    led, bad = {}, []
    for example in examples:
        try:
            led[example.pair.where] = add_prompt(chat, example.pair, text, fold)
        except ValueError as error:
            bad.append(BadRow(example.pair.where, str(error), example.pair.to_row()))
    if in_turns := sum(not (pair.messages[0][0] == "system" and pair.messages[0][1].startswith(text))
                       for pair in led.values()):
        process.print(f"{desc}: {in_turns} of {len(led)} pairs have the text before their first user turn's, "
                      + ("as --fold-system asks" if fold else "as the chat template prints no system turn"))
    own = {example.pair.where: example for example in examples}
    tokenized, refused, _ = tokenize_all(chat, list(led.values()), NO_LIMIT, NO_LIMIT, process, desc)
    bad += [BadRow(row.where, f"--aux-prompts: {row.reason}", own[row.where].pair.to_row()) for row in refused]
    cut = [example.pair for example in examples if example.prompt_is_cut]
    whole, _, _ = tokenize_all(chat, cut, NO_LIMIT, NO_LIMIT, process, desc)
    whole_ids = {example.pair.where: example.prompt_ids for example in whole}
    made = {}
    for each in tokenized:
        given = own[each.pair.where]
        if not (is_same(each.chosen, given.chosen) and is_same(each.rejected, given.rejected)):
            reason = "--aux-prompts: behind the text its answers are other tokens"
            bad.append(BadRow(given.pair.where, reason, given.pair.to_row()))
            continue
        prompt_ids = each.prompt_ids
        if given.prompt_is_cut:
            prompt_ids = cut_alike(prompt_ids, whole_ids[given.pair.where], given.prompt_ids)
        made[given.pair.key] = replace(given, pair=each.pair, prompt_ids=prompt_ids)
    return made, bad


def is_same(whole: Response, own: Response) -> bool:
    """Whether an answer that is not cut is `own`, or begins with it where that is cut."""
    num_tokens = len(own.ids) if own.is_cut else len(whole.ids)
    return np.array_equal(whole.ids[:num_tokens], own.ids)


def cut_alike(prompt_ids: np.ndarray, whole_ids: np.ndarray, kept_ids: np.ndarray) -> np.ndarray:
    """A prompt with a text said first, without the tokens of the pair's own prompt `whole_ids` that `kept_ids` lacks:
    what both prompts end in is cut to what is kept of it."""
    shared = count_last(prompt_ids, whole_ids)
    kept = min(shared, count_last(kept_ids, whole_ids))
    return np.concatenate([prompt_ids[:len(prompt_ids) - shared], prompt_ids[len(prompt_ids) - kept:]])


def count_last(ids: np.ndarray, others: np.ndarray) -> int:
    """How many last tokens of both are the same."""
    num_tokens = min(len(ids), len(others))
    differs = np.flatnonzero(ids[len(ids) - num_tokens:] != others[len(others) - num_tokens:])
    return num_tokens - int(differs[-1]) - 1 if len(differs) else num_tokens
