"""Messages and texts that hold several turns, in the forms that people have, become turns."""

import json
import re
from typing import NamedTuple

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
         "function_call": "assistant", "observation": "tool", "tool": "tool"}  # of messages with from and value
KEYS = {"assistant": ("tool_calls", "function_call", "reasoning_content", "thinking"),
        "tool": ("name", "tool_call_id")}  # of messages of a role, that are read beside content
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# What begins a turn in templates that are widely used: texts that hold it have been templated before.
HEADER = re.compile(r"<\|start_header_id\|>\w+<\|end_header_id\|>\s*|<\|im_start\|>\w+(?:\n|<\|im_sep\|>)"
                    r"|<start_of_turn>\w+\n|<\|(?:system|user|assistant)\|>\n?|\[/?INST\] ?"
                    r"|<\uff5c(?:User|Assistant)\uff5c>|### (?:Instruction|Response):\n")
OF_OTHERS = re.compile(r"[Uu]ser|system|human|tool|ipython|\[INST|Instruction")  # a header of no assistant's turn
WRITTEN = re.compile(r"""\s*\[\s*\{\s*['"](?:role|content|from|value)['"]\s*:.*\}\s*\]\s*""", re.DOTALL)  # messages
HH_START = "\n\nHuman:"  # a text that only begins with "Human:" may be of another kind
HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class Turn(NamedTuple):
    """One message. extras: what a template may print beside its text."""

    role: str
    text: str
    extras: dict[str, object]


def kind_of(column: str, value: object) -> str:
    """`text` or `messages`."""
    if value is None:
        raise ValueError(f"{column} is null")
    if isinstance(value, str):
        return "text"
    if not isinstance(value, (list, dict)) or not value:
        raise ValueError(f"{column} must be a string or a list of messages that is not empty, not "
                         + (type_of(value) if not isinstance(value, (list, dict)) else "an empty one"))
    return "messages"


def parse_messages(column: str, value: object, unused_keys: dict) -> list[Turn]:
    """Messages, or one alone, -> turns. Raises ValueError."""
    if kind_of(column, value) != "messages":
        raise ValueError(f"{column} must be a list of messages, not {type_of(value)}")
    return [parse_message(column, message, unused_keys) for message in (value if isinstance(value, list) else [value])]


def parse_message(column: str, message: object, unused_keys: dict) -> Turn:
    """{role, content} or {from, value} -> Turn. Its other keys go into unused_keys, as `messages.KEY`."""
    if not isinstance(message, dict):
        raise ValueError(f"a message of {column} must be an object with role and content, not {message!r:.80}")
    refuse_media(f"a message of {column}", message)
    if message.get("role") is None and message.get("from") is not None:
        message = with_role(column, message)
    role, content, extras = message.get("role"), message.get("content"), {}
    if not isinstance(role, str):
        raise ValueError(f"a message of {column} has no role: {message!r:.80}")
    keys = KEYS.get(role, ())
    if role == "assistant":
        calls = next((message[key] for key in ("tool_calls", "function_call") if not is_empty(message.get(key))), None)
        extras = {"tool_calls": parse_calls(column, calls)} if calls is not None else {}
    elif role == "tool":
        extras = {key: message[key] for key in keys if not is_empty(message.get(key))}
    text = parse_content(column, "" if content is None and extras else content)
    if role == "assistant":
        text = add_reasoning(column, message, text)
    unused_keys.update({f"messages.{key}": None for key, value in message.items()
                        if key not in ("role", "content", *keys) and not is_empty(value)})
    return Turn(role, text, extras)


def with_role(column: str, message: dict) -> dict:
    """{from, value} -> {role, content}; of a function call {role, tool_calls}."""
    name, value = message["from"], message.get("value")
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"a message of {column} is from {name!r:.40}, which is none of {', '.join(ROLES)}")
    others = {key: each for key, each in message.items() if key not in ("from", "value")}
    return others | {"role": ROLES[name], "tool_calls" if name == "function_call" else "content": value}


def parse_content(column: str, content: object) -> str:
    """A text, or a list of parts that are texts, which are joined."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        if isinstance(part, dict):
            refuse_media(f"a part of a message of {column}", part)
        if kind.removeprefix("input_").startswith(("image", "audio", "video")):
            raise ValueError(f"a message of {column} holds an {kind}: only text can be trained on here")
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ValueError(f"the content of a message of {column} must be a string or a list of text parts, not "
                             f"{content!r:.80}")
        texts.append(part["text"])
    return "".join(texts)


def add_reasoning(column: str, message: dict, text: str) -> str:
    """The text of an assistant's message after the reasoning that it holds apart, if any."""
    for key in ("reasoning_content", "thinking"):
        if not is_empty(message.get(key)):
            if not isinstance(message[key], str):
                raise ValueError(f"{key} of a message of {column} must be a string, not {type_of(message[key])}")
            return f"<think>\n{message[key]}\n</think>\n\n{text}"
    return text


def parse_calls(column: str, value: object) -> list[dict]:
    """Tool calls, one or a list, also as JSON text -> [{"type": "function", "function": {"name", "arguments"}}, ...].

    Arguments that are the JSON text of an object become that object: templates print them as JSON themselves.
    """
    value, calls = decode(value), []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool call of {column} must be an object with name and arguments, not {call!r:.80}")
        arguments = decode(function.get("arguments"))
        if isinstance(arguments, dict):
            function = function | {"arguments": arguments}
        whole = call if "function" in call else {"type": "function"}
        calls.append({key: value for key, value in whole.items() if value is not None} | {"function": function})
    return calls


def decode(text: object) -> object:
    """What a JSON text holds; other values, and texts that are no JSON, as they are."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        return text


def hh_turns(text: str) -> list[Turn]:
    """`\\n\\nHuman: ...\\n\\nAssistant: ...` -> turns, without white space around their texts; empty for others."""
    before, *pieces = HH_TURN.split(text.strip())
    if before or not pieces or pieces[0] != "Human":
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Turn(roles[name], piece.strip(), {}) for name, piece in zip(pieces[::2], pieces[1::2])]


def hh_prompt(text: str) -> list[Turn] | None:
    """The turns of a text in that form that ends where the answer begins, or with the user's turn; None for other
    texts."""
    turns = hh_turns(text)
    if turns and turns[-1] == Turn("assistant", "", {}):
        return turns[:-1]
    return turns if turns and turns[-1].role == "user" and text.startswith(HH_START) else None


def parse_history(value: object) -> list[Turn]:
    """[[user's text, assistant's text], ...] -> turns."""
    turns = []
    for texts in value if isinstance(value, list) else [value]:
        if not isinstance(texts, list) or len(texts) != 2 or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"history must be a list of [user's text, assistant's text], not {value!r:.80}")
        turns += [Turn("user", texts[0], {}), Turn("assistant", texts[1], {})]
    return turns


def refuse_media(where: str, values: dict) -> None:
    """Raise ValueError for images, audio and video beside the texts."""
    for name in MEDIA:
        if not is_empty(values.get(name)):
            raise ValueError(f"{where} holds {name}: only text can be trained on here")


def is_empty(value: object) -> bool:
    """Null, or a text or list of nothing: as if it were not there."""
    return value is None or isinstance(value, (str, list, dict)) and not value


def type_of(value: object) -> str:
    """The type of a value in JSON's words."""
    words = {type(None): "null", str: "a string", list: "a list", dict: "an object", bool: "a boolean",
             int: "a number", float: "a number"}
    return words.get(type(value), type(value).__name__)
