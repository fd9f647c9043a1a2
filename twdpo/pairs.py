"""Preference pairs: a conversation and its two answers."""

import json
from dataclasses import dataclass
from functools import cached_property

from twdpo.files import hash_to_int64


@dataclass(frozen=True)
class Pair:
    """One preference: the conversation before the answer as (role, text) turns, and its two answers as given."""

    messages: tuple[tuple[str, str], ...]
    chosen: str
    rejected: str
    where: str  # FILE:LINE, for messages to the user; neither it nor weight and margin are part of the identity
    extras: str = ""  # what a template may print beside texts; empty for nearly all pairs, else JSON of those there are
    # of {"chosen": KEYS, "rejected": KEYS, "tools": [...], "turns": {"2": KEYS}}, KEYS of a message: tool_calls, ...
    weight: float = 1.0  # multiplies the pair's loss
    margin: float = 0.0  # for losses that ask for one

    @cached_property
    def key(self) -> int:
        """64-bit content key, which names the pair in weights files and caches."""
        return hash_to_int64([self.messages, self.chosen, self.rejected, *filter(None, [self.extras])])

    @property
    def answers_call(self) -> bool:
        """Whether an answer calls tools: then what the template prints of it is the answer, and not its text alone."""
        return bool({"chosen", "rejected"} & json.loads(self.extras or "{}").keys())

    def to_row(self) -> dict[str, object]:
        """The pair as an accepted row."""
        extras = json.loads(self.extras or "{}")
        prompt = [{"role": role, "content": text} | extras.get("turns", {}).get(str(turn), {})
                  for turn, (role, text) in enumerate(self.messages)]
        answers = {side: [{"role": "assistant", "content": getattr(self, side)} | extras.get(side, {})]
                   for side in ("chosen", "rejected")}
        return {"prompt": prompt} | answers | ({"tools": extras["tools"]} if "tools" in extras else {})


def show_question(pair: Pair, what: str) -> str:
    """What the judge sees of the conversation: a single user turn as plain text, else `role: text` blocks; of `first`
    the first user turn alone."""
    if what == "first":
        return next((text for role, text in pair.messages if role == "user"), pair.messages[0][1])
    if len(pair.messages) == 1:
        return pair.messages[0][1]
    turns = json.loads(pair.extras or "{}").get("turns", {})
    calls = [[json.dumps(call.get("function", call), ensure_ascii=False)
              for call in turns.get(str(place), {}).get("tool_calls", ())] for place in range(len(pair.messages))]
    return "\n\n".join("\n".join([f"{role}: {text}", *more]) for (role, text), more in zip(pair.messages, calls))
