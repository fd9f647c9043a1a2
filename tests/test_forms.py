"""Forms of rows: each as the pair that it says, what is wrong with others, and what rows were read as."""

import json
import math

import pytest

from twdpo.config import ExtractConfig
from twdpo.data_files import BadRow
from twdpo.dataset import load_dataset
from twdpo.flags import InputError
from twdpo.forms import NAMES, Reading, Report, parse_columns, parse_row, read_pairs, read_row

PLAIN = {"prompt": "why", "chosen": "so", "rejected": "no"}
ASKED = (("user", "why"),)
TALK = (("user", "hi"), ("assistant", "hello"), ("user", "why"))
CALL = {"type": "function", "function": {"name": "look", "arguments": {"zone": "UTC", "at": 1}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def message(role: str, content: object, **more) -> dict:
    return {"role": role, "content": content} | more


def shared(kind: str, value: object) -> dict:
    return {"from": kind, "value": value}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


ANSWERS = {"chosen": "so", "rejected": "no"}
USER, SO, NO = message("user", "why"), message("assistant", "so"), message("assistant", "no")
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why\n\nAssistant:"
FORMS = {  # row, its turns, its form, what of it is not used
    "plain": (PLAIN, ASKED, "prompt, chosen, rejected", []),
    "system": (PLAIN | {"system": "Be brief."}, (("system", "Be brief."), *ASKED),
               "prompt, chosen, rejected with system", []),
    "empty system": (PLAIN | {"system": " "}, ASKED, "prompt, chosen, rejected", ["system"]),
    "Intel": ({"system": "Be brief.", "question": "why", **ANSWERS}, (("system", "Be brief."), *ASKED),
              "question, chosen, rejected with system", []),
    "Intel, no system": ({"system": "", "question": "why", **ANSWERS}, ASKED, "question, chosen, rejected", []),
    "Argilla's Intel": ({"system": None, "input": "why", **ANSWERS, "generations": ["so", "no"], "rating": [9, 1]},
                        ASKED, "input, chosen, rejected", ["generations", "rating"]),
    "UltraFeedback": ({"prompt": "why", "prompt_id": "1f", "chosen": [USER, SO], "rejected": [USER, NO],
                       "messages": [USER, SO], "score_chosen": 8.5, "score_rejected": 3.0}, ASKED,
                      "chosen, rejected as conversations",
                      ["prompt", "prompt_id", "messages", "score_chosen", "score_rejected"]),
    "Argilla": ({"instruction": "why", "chosen": [USER, SO], "rejected": [USER, NO], "chosen-rating": 5,
                 "rejected-rating": None}, ASKED, "chosen, rejected as conversations",
                ["instruction", "chosen-rating"]),
    "Argilla's texts": ({"instruction": "why", "chosen_response": "so", "rejected_response": "no",
                         "chosen_avg_rating": 4.5}, ASKED, "instruction, chosen_response, rejected_response",
                        ["chosen_avg_rating"]),
    "instruction": ({"instruction": "Translate.", "input": "warum", "output": ["so", "no"]},
                    (("user", "Translate.\nwarum"),), "instruction, input, output", []),
    "instruction alone": ({"instruction": "why", "input": "", **ANSWERS}, ASKED, "instruction, chosen, rejected", []),
    "history": ({"instruction": "why", "input": "", "output": ["so", "no"], "history": [["hi", "hello"]]}, TALK,
                "instruction, history, output", []),
    "LLaMA-Factory": ({"conversations": [shared("human", "hi"), shared("gpt", "hello"), shared("human", "why")],
                       "chosen": shared("gpt", "so"), "rejected": shared("gpt", "no")}, TALK,
                      "conversations, chosen, rejected as messages", []),
    "LLaMA-Factory, system": ({"conversations": [shared("system", "Be brief."), shared("user", "why")],
                               "chosen": shared("assistant", "so"), "rejected": shared("assistant", "no")},
                              (("system", "Be brief."), *ASKED), "conversations, chosen, rejected as messages", []),
    "the same system twice": ({"prompt": [message("system", "Be brief."), USER], **ANSWERS, "system": "Be brief."},
                              (("system", "Be brief."), *ASKED), "prompt, chosen, rejected with system", []),
    "text parts": ({"prompt": [message("user", parts("w", "hy"))], "chosen": [message("assistant", parts("so"))],
                    "rejected": [message("assistant", parts("n", "o"))]}, ASKED,
                   "prompt, chosen, rejected as messages", []),
    "one message": ({"prompt": USER, "chosen": SO, "rejected": NO}, ASKED, "prompt, chosen, rejected as messages", []),
    "messages and texts": ({"prompt": [message("user", "hi"), message("assistant", "hello"), USER], **ANSWERS}, TALK,
                           "prompt, chosen, rejected", []),
    "HH": ({"chosen": HH + " so", "rejected": HH + " no"}, TALK,
           "chosen, rejected as Human: and Assistant: texts", []),
    "HH, prompt": ({"prompt": HH, "chosen": " so", "rejected": " no"}, TALK,
                   "prompt, chosen, rejected after Human: and Assistant: texts", []),
    "HH, prompt twice": ({"prompt": HH, "chosen": HH + " so", "rejected": HH + " no"}, TALK,
                         "chosen, rejected as Human: and Assistant: texts", ["prompt"]),
    "text that only quotes": ({"prompt": "Human: why", **ANSWERS}, (("user", "Human: why"),),
                              "prompt, chosen, rejected", []),
    "text that only holds turns": ({"prompt": "Go on:\n\nHuman: why\n\nAssistant:", **ANSWERS},
                                   (("user", "Go on:\n\nHuman: why\n\nAssistant:"),), "prompt, chosen, rejected", []),
    "keys of messages": ({"prompt": [message("user", "why", name="Ann")], "rejected": [NO],
                          "chosen": [message("assistant", "so", weight=1, score=2.0, tool_calls=None)]}, ASKED,
                         "prompt, chosen, rejected as messages", ["messages.weight", "messages.score",
                                                                  "messages.name"]),
    "no images": (PLAIN | {"images": [], "audio": None}, ASKED, "prompt, chosen, rejected", []),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(name):
    row, messages, form, unused = FORMS[name]
    pair, read_as, not_used = read_row("x:1", row, Reading())
    assert (pair.messages, pair.chosen, pair.rejected, pair.extras) == (messages, "so", "no", "")
    assert (read_as, not_used) == (form, unused)
    assert (pair.where, pair.weight, pair.margin) == ("x:1", 1.0, 0.0)
    assert parse_row("y:7", pair.to_row()).key == pair.key


def test_keys_are_those_of_the_files_that_people_have():
    """Weights files and caches name pairs by these keys."""
    assert parse_row("x", PLAIN).key == 4933942912102461602
    before = [message("system", "be"), message("user", "h\u00e9")]
    whole = {side: [*before, message("assistant", text)] for side, text in (("chosen", "a"), ("rejected", "b"))}
    assert parse_row("x", whole).key == -1787110777213870


TALK_WITH_CALLS = [USER, message("assistant", None, tool_calls=[CALL | {"id": "c1", "index": None}]),
                   message("tool", "noon", tool_call_id="c1", name="look")]


@pytest.mark.parametrize("arguments", [CALL["function"]["arguments"], '{"zone": "UTC", "at": 1}'])
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)], TOOL])
def test_calls_tools_and_their_results(arguments, tools):
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": arguments}, "index": None}
    talk = [USER, message("assistant", None, tool_calls=[call]),
            message("tool", "noon", tool_call_id="c1", name="look")]
    row = {"prompt": talk, "chosen": [message("assistant", "", tool_calls=[call])], "rejected": [NO], "tools": tools}
    pair, form, unused = read_row("x:1", row, Reading())
    assert pair.messages == (*ASKED, ("assistant", ""), ("tool", "noon"))
    assert (pair.chosen, pair.rejected) == ("", "no")
    calls = [CALL | {"id": "c1"}]
    extras = json.loads(pair.extras)
    assert extras == {"chosen": {"tool_calls": calls}, "tools": [TOOL],
                      "turns": {"1": {"tool_calls": calls}, "2": {"tool_call_id": "c1", "name": "look"}}}
    assert list(extras) == sorted(extras)
    # The order in which templates print arguments is the row's.
    assert list(extras["chosen"]["tool_calls"][0]["function"]["arguments"]) == ["zone", "at"]
    assert (form, unused) == ("prompt, chosen, rejected as messages with tools", [])
    assert parse_row("y:7", pair.to_row()).key == pair.key != parse_row("x", row | {"tools": None}).key


@pytest.mark.parametrize("value", [json.dumps(CALL["function"]), [CALL["function"]], json.dumps([CALL])])
def test_calls_as_llama_factory_and_older_interfaces_write_them(value):
    row = {"conversations": [shared("human", "why"), shared("function_call", value), shared("observation", "noon")],
           "chosen": shared("gpt", "so"), "rejected": shared("function_call", value), "tools": json.dumps([TOOL])}
    pair = parse_row("x", row)
    assert pair.messages == (*ASKED, ("assistant", ""), ("tool", "noon")) and (pair.chosen, pair.rejected) == ("so", "")
    calls = {"tool_calls": [CALL]}
    assert json.loads(pair.extras) == {"rejected": calls, "tools": [TOOL], "turns": {"1": calls}}
    old = message("assistant", None, function_call=CALL["function"])
    assert json.loads(parse_row("x", {"prompt": "why", "chosen": old, "rejected": NO}).extras) == {"chosen": calls}


def test_places_of_calls_are_those_of_the_turns_as_they_come_out():
    row = {"prompt": TALK_WITH_CALLS, **ANSWERS, "system": "Be brief."}
    assert set(json.loads(parse_row("x", row).extras)["turns"]) == {"2", "3"}
    assert set(json.loads(parse_row("x", row, Reading(fold_system=True)).extras)["turns"]) == {"1", "2"}


def test_a_system_turn_of_both_answers_leaves_the_prompt():
    row = {side: [message("system", "Be brief."), each] for side, each in (("chosen", SO), ("rejected", NO))}
    pair, form, unused = read_row("x", row | {"prompt": "why"}, Reading())
    assert pair.messages == (("system", "Be brief."), *ASKED)
    assert (form, unused) == ("prompt, chosen, rejected as conversations", [])
    with pytest.raises(ValueError, match="prompt and chosen both begin with a system turn"):
        parse_row("x", row | {"prompt": [message("system", "Be kind."), USER]})
    with pytest.raises(ValueError, match="no column prompt"):
        parse_row("x", row)


def test_an_answer_of_several_messages_goes_on_from_the_prompt():
    before = TALK_WITH_CALLS[1:]
    pair, form, _ = read_row("x", {"prompt": "why", "chosen": [*before, SO], "rejected": [*before, NO]}, Reading())
    assert [role for role, _ in pair.messages] == ["user", "assistant", "tool"]
    assert form == "prompt, chosen, rejected as conversations"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_reasoning_goes_into_the_text(key):
    row = {"prompt": "why", "chosen": message("assistant", "so", **{key: "hm"}), "rejected": NO}
    pair, _, unused = read_row("x", row, Reading())
    assert pair.chosen == "<think>\nhm\n</think>\n\nso" and not unused
    assert parse_row("x", row | {"chosen": message("assistant", "so", **{key: None})}).chosen == "so"


def test_fold_system():
    folded = (("user", "Be brief.\n\nwhy"),)
    for row in (PLAIN | {"system": "Be brief."}, {"prompt": [message("system", "Be brief."), USER], **ANSWERS}):
        assert parse_row("x", row, Reading(fold_system=True)).messages == folded
    talk = [message("system", "Be brief."), message("assistant", "hello"), USER]
    assert parse_row("x", {"prompt": talk, **ANSWERS}, Reading(fold_system=True)).messages == (
        ("assistant", "hello"), *folded)
    assert parse_row("x", PLAIN, Reading(fold_system=True)).messages == ASKED
    with pytest.raises(ValueError, match="no user turn follows"):
        parse_row("x", {"prompt": [message("system", "Be brief.")], **ANSWERS}, Reading(fold_system=True))
    with pytest.raises(ValueError, match="prompt is empty"):
        parse_row("x", PLAIN | {"prompt": "", "system": "Be brief."}, Reading(fold_system=True))


BAD = [
    ({"question": "why", **ANSWERS}, r"^no column prompt; `question` looks like one: --columns prompt=question$"),
    ({"ask": "why", "good": "so", "bad": "no"},
     r"no column chosen; `good` looks like one: --columns prompt=ask,chosen=good,rejected=bad$"),
    ({"x": "why", **ANSWERS}, "no column prompt; the row has x, chosen, rejected: --columns prompt=COLUMN"),
    ({"prompt": "why", "text": "?", "chosen": "so", "bad": "no"}, "--columns rejected=bad$"),
    ({"messages": [USER], "chosen": SO, "rejected": NO}, "--columns prompt=messages"),
    (PLAIN | {"rejected": None}, "^rejected is null$"),
    (PLAIN | {"chosen": None}, "^chosen is null$"),
    (PLAIN | {"prompt": None}, "^prompt is null$"),
    (PLAIN | {"chosen": 3}, "chosen must be a string or a list of messages .*, not a number"),
    (PLAIN | {"rejected": True}, "rejected must be .*, not a boolean"),
    (PLAIN | {"chosen": [SO]}, "chosen is a list and rejected a string"),
    (PLAIN | {"system": 5}, "system must be a string, not a number"),
    ({"prompt": [message("system", "A"), USER], **ANSWERS, "system": "B"}, "system says another thing"),
    ({"instruction": "why", "output": ["so"]}, "output must hold two answers, the better one first; it has 1"),
    ({"instruction": "why", "output": ["so", None]}, r"^output\[1\] is null$"),
    ({"instruction": "why", "output": ["so", " "]}, r"^output\[1\] is empty$"),
    ({"instruction": 3, "input": "a", **ANSWERS}, "instruction must be a string, not a number"),
    ({"instruction": "why", **ANSWERS, "history": ["hi"]}, "history must be a list of"),
    ({"instruction": "", **ANSWERS}, "prompt is empty"),
    (PLAIN | {"images": ["a.png"]}, "the row holds images: only text"),
    (PLAIN | {"audio": {"path": "a.wav"}}, "the row holds audio: only text"),
    ({"prompt": [message("user", [*parts("why"), {"type": "image_url", "image_url": {}}])], **ANSWERS},
     "a message of prompt holds an image_url: only text"),
    ({"prompt": [message("user", [{"text": "why", "image": "a.png"}])], **ANSWERS},
     "a part of a message of prompt holds image: only text"),
    ({"prompt": "why", "chosen": json.dumps([USER, SO]), "rejected": json.dumps([USER, NO])},
     "chosen and rejected are messages written as text: give them as lists of objects, in a .jsonl"),
    (PLAIN | {"prompt": str([USER])}, "prompt is messages written as text"),
    ({"prompt": [message("user", [{"type": "input_audio"}])], **ANSWERS}, "holds an input_audio"),
    ({"prompt": [message("user", "why", images=["a.png"])], **ANSWERS}, "a message of prompt holds images"),
    ({"prompt": [message("user", [{"type": "file"}])], **ANSWERS}, "must be a string or a list of text parts"),
    ({"prompt": "why", "chosen": message("assistant", None), "rejected": NO}, "must be a string"),
    ({"prompt": "why", "chosen": ["so"], "rejected": ["no"]}, "a message of chosen must be an object"),
    ({"conversations": [shared("bing", "why")], "chosen": shared("gpt", "so"), "rejected": shared("gpt", "no")},
     "a message of conversations is from 'bing', which is none of human, user, gpt"),
    ({"conversations": "why", **ANSWERS}, "conversations must be a list of messages, not a string"),
    ({"conversations": [shared("human", "why")], "chosen": shared("human", "so"), "rejected": shared("gpt", "no")},
     "the last message of chosen is the user's"),
    ({"chosen": HH + " so", "rejected": "\n\nHuman: what\n\nAssistant: no"}, "differ before the last answer"),
    ({"chosen": HH, "rejected": HH + " no"}, "chosen is empty"),
    ({"chosen": "\n\nHuman: why", "rejected": HH + " no"}, "the last message of chosen is the user's"),
    ({"prompt": "why", "chosen": message("assistant", "", tool_calls=[{"id": "c1"}]), "rejected": NO},
     "a tool call of chosen must be an object with name and arguments"),
    ({"prompt": "why", "chosen": shared("function_call", "look!"), "rejected": NO}, "a tool call of chosen"),
    ({"prompt": "why", "chosen": shared("function_call", None), "rejected": NO}, "must be a string"),
    (PLAIN | {"tools": "hammer"}, "tools must be a list of objects, or one as JSON text, not 'hammer'"),
    ({"prompt": "why", "chosen": message("assistant", "so", thinking=1), "rejected": NO}, "thinking of a message of"),
    ({"prompt": "why", "chosen": message("assistant", "so", tool_calls=[{"name": "\ud800"}]), "rejected": NO},
     "surrogates not allowed"),
]


@pytest.mark.parametrize("row, reason", BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_rows_say_what_to_do(row, reason):
    with pytest.raises(ValueError, match=reason) as error:
        parse_row("x:1", row)
    assert not isinstance(error.value, InputError)  # which would stop a run that skips bad rows


def test_one_answer_may_spell_messages():
    assert parse_row("x", PLAIN | {"chosen": json.dumps([SO])}).chosen == json.dumps([SO])


def test_answers_with_calls_are_not_empty():
    row = {"prompt": "why", "chosen": message("assistant", "", tool_calls=[CALL]), "rejected": message("assistant", "")}
    with pytest.raises(ValueError, match="rejected is empty"):
        parse_row("x", row)
    pair = parse_row("x", row, Reading(empty_answers="space"))
    assert (pair.chosen, pair.rejected) == ("", " ")


def test_columns_by_other_names():
    reading = Reading(columns=parse_columns("prompt=question, chosen=good,rejected=bad,system=role"))
    row = {"question": "why", "good": "so", "bad": "no", "role": "Be brief.", "prompt": "?", "system": "?"}
    pair, form, unused = read_row("x", row, reading)
    assert (pair.messages, pair.chosen, pair.rejected) == ((("system", "Be brief."), *ASKED), "so", "no")
    assert (form, unused) == ("question, good, bad with role", ["prompt", "system"])
    assert parse_row("x", PLAIN, reading).messages == ASKED  # a row of another source, which has them by name
    swapped = parse_row("x", PLAIN, Reading(columns={"chosen": "rejected", "rejected": "chosen"}))
    assert (swapped.chosen, swapped.rejected) == ("no", "so")
    with pytest.raises(ValueError, match="--columns chosen=good,prompt=question$"):
        parse_row("x", {"question": "why", "good": "so", "rejected": "no"}, Reading(columns={"chosen": "good"}))


@pytest.mark.parametrize("text", ["promt=question", "prompt", "prompt=", "prompt=a,prompt=b", "=a"])
def test_flags_that_name_no_column_are_refused(text):
    with pytest.raises(InputError) as error:
        Reading.of(ExtractConfig(out="w", columns=text))
    assert f"--columns {text}: " in str(error.value)
    assert "twice" in str(error.value) or ", ".join(NAMES) in str(error.value)


def test_the_flags_make_the_reading():
    config = ExtractConfig(out="w", columns="prompt=q,weight=w", fold_system=True, empty_answers="space")
    assert Reading.of(config) == Reading("space", {"prompt": "q", "weight": "w"}, True)
    assert Reading.of(config).of_texts == Reading("space", {"prompt": "q"}, True)
    assert Reading.of(ExtractConfig(out="w")) == Reading()


@pytest.mark.parametrize("value, number", [(2, 2.0), ("0.5", 0.5), (0, 0.0)])
@pytest.mark.parametrize("name", ["weight", "margin"])
def test_weight_and_margin_are_read_where_they_are_named(name, value, number):
    row = PLAIN | {name: 7, "w": value}
    plain = parse_row("x", row)
    assert (plain.weight, plain.margin) == (1.0, 0.0)
    pair, _, unused = read_row("x", row, Reading(columns={name: "w"}))
    assert getattr(pair, name) == number and unused == [name]
    assert pair.key == plain.key


@pytest.mark.parametrize("other", [{"output": ["so", "no"]}, {"chosen_response": "so", "rejected_response": "no"}])
def test_columns_of_other_rows_are_null_in_a_table(other):
    nulls = dict.fromkeys(["prompt", "conversations", "output", "chosen_response", "rejected_response", "chosen",
                           "rejected", "system", "tools", "history", "images"])
    row = nulls | {"instruction": "why"} | other
    assert read_row("x", row, Reading())[1:] == (", ".join(["instruction", *other]), [])
    with pytest.raises(ValueError, match="chosen is null"):
        parse_row("x", nulls | {"instruction": "why"})


@pytest.mark.parametrize("value", [-1, "-0.5", math.nan, "inf", True, None, "much", [1], 10 ** 400])
@pytest.mark.parametrize("name", ["weight", "margin"])
def test_weights_and_margins_that_are_no_number_make_a_bad_row(name, value):
    with pytest.raises(ValueError, match=f"w, the {name}, is .*: it must be a finite number >= 0"):
        parse_row("x", PLAIN | {"w": value}, Reading(columns={name: "w"}))
    with pytest.raises(ValueError, match=f"no column w, which --columns names as {name}"):
        parse_row("x", PLAIN, Reading(columns={name: "w"}))


def test_rows_are_read_as_a_stream_and_counted():
    intel = {"system": "Be brief.", "question": "why", **ANSWERS, "id": 1}

    def stream():
        yield from ((f"x:{number}", PLAIN | {"score": number}) for number in range(3))
        yield BadRow("x:4", "not JSON", "{")
        yield "x:5", {"chosen": "so"}
        yield "x:6", 7
        yield "x:7", intel

    pairs, bad, report = read_pairs(stream(), Reading())
    assert [pair.where for pair in pairs] == ["x:0", "x:1", "x:2", "x:7"]
    assert [row.where for row in bad] == ["x:4", "x:5", "x:6"] and bad[1].row == {"chosen": "so"}
    assert report.lines() == ["3 rows: prompt, chosen, rejected; 1: question, chosen, rejected with system",
                              "columns that the pairs do not use: score (3 of 4 rows), id (1 of 4 rows)"]
    assert (report + report).lines()[0].startswith("6 rows: prompt, chosen, rejected; 2: question")
    assert Report().lines() == []


def test_a_named_column_that_no_row_has_is_an_error(tmp_path):
    (path := tmp_path / "pairs.jsonl").write_text(json.dumps(PLAIN | {"q": 1}) + "\n")
    (other := tmp_path / "other.jsonl").write_text(json.dumps({"ask": "why", **ANSWERS}) + "\n")
    with pytest.raises(InputError, match="--columns prompt=ask: no row has a column 'ask'; there are prompt, chosen, "
                                         "rejected, q"):
        load_dataset(str(path), "", reading=Reading(columns={"prompt": "ask"}))
    dataset = load_dataset(str(path), str(other), reading=Reading(columns={"prompt": "ask"}))
    assert dataset.train[0].key == dataset.held_out[0].key  # one of the files has it
    assert dataset.report.lines()[0] == "1 row: prompt, chosen, rejected; 1: ask, chosen, rejected"


@pytest.mark.parametrize("row", [
    {"prompt": "hi", "chosen": "\n\nHuman: hi\n\nAssistant: so", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    {"prompt": "\n\nHuman: hi", "chosen": " so", "rejected": "no"}])
def test_hh_texts_beside_a_prompt_and_without_the_last_header(row):
    pair = parse_row("x:1", row)
    assert (pair.messages, pair.chosen, pair.rejected) == ((("user", "hi"),), "so", "no")


def test_a_label_that_says_which_answer_is_better_is_named():
    with pytest.raises(ValueError, match="no column chosen: better_response_id says which answer is better"):
        parse_row("x:1", {"prompt": "hi", "response_0": "a", "response_1": "b", "better_response_id": 1})


@pytest.mark.parametrize("weight, shown", [(1e39, "1e.39"), ("1e31", "'1e31'"), (None, "null")])
def test_weights_that_fp32_does_not_hold(weight, shown):
    row = {"prompt": "hi", "chosen": "a", "rejected": "b", "w": weight}
    with pytest.raises(ValueError, match=f"w, the weight, is {shown}: it must be a finite number"):
        parse_row("x:1", row, Reading(columns={"weight": "w"}))
