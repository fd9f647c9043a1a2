"""The verbalised self-judge: outputs of the kinds that models give, parts found in answers, scores of tokens."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

import extract
from twdpo.chat import Chat
from twdpo.dataset import load_dataset
from twdpo.judge import verbalize
from twdpo.judge.verbalized import ScoresFile, character_scores, locate_parts, matched_share, parse_parts, token_scores
from twdpo.pairs import Pair
from twdpo.toy.grammar import toy_rows
from twdpo.weights_file import shard_paths

EXPECTED = [("Paris", 5), (" is the capital", 4), (" of France.", 2)]


@pytest.mark.parametrize("output", [
    '[["Paris", 5], [" is the capital", 4], [" of France.", 2]]',
    '[{"Paris", 5}, {" is the capital", 4}, {" of France.", 2}]',  # what Fig. 7 asks for is no JSON
    '[("Paris", 5), (" is the capital", 4), (" of France.", 2)]',
    "[('Paris', 5), (' is the capital', 4), (' of France.', 2)]",
    '[{"Paris": 5}, {" is the capital": 4}, {" of France.": 2}]',
    '{"Paris": 5, " is the capital": 4, " of France.": 2}',
    '[{"text": "Paris", "score": 5}, {"text": " is the capital", "score": 4}, {"text": " of France.", "score": 2}]',
    '[{"part": "Paris", "importance": "5"}, {"part": " is the capital", "importance": "4"}, '
    '{"part": " of France.", "importance": "2"}]',
    'Here is the list:\n```json\n[\n  ["Paris", 5],\n  [" is the capital", 4],\n  [" of France.", 2]\n]\n```\nDone.',
    '[["Paris", 5], [" is the capital", 4], [" of France.", 2], [" It is',  # cut off
    '[["Paris", 5.0], [" is the capital", 4.0], [" of France.", 2.0]]',
    '[\u201cParis\u201d, 5], [\u201c is the capital\u201d, 4], [\u201c of France.\u201d, 2]',
])
def test_outputs_of_real_kinds_are_read(output):
    assert parse_parts(output) == EXPECTED


@pytest.mark.parametrize("output, expected", [
    ('[["He said \\"hi\\"", 3], ["\\nand left", 1]]', [('He said "hi"', 3), ("\nand left", 1)]),
    ('[["He said "hi", twice", 3], ["it\'s", 2]]', [('He said "hi", twice', 3), ("it's", 2)]),  # quotes not escaped
    ('[["a", 7], ["b", 2], ["c", "high"]]', [("b", 2)]),  # scores that are none
    ("", []), ("I can't do that.", []), ("[]", []),
    ('[["caf\\u00e9", 5]]', [("caf\u00e9", 5)]),
])
def test_awkward_outputs(output, expected):
    parts = parse_parts(output)
    assert [part for part in parts if part in expected] == expected
    assert all(1 <= score <= 5 for _, score in parts)


@pytest.mark.parametrize("parts", [
    [("print('a', 3)", 5), ("\nb", 2)], [("d = {'k': 1}", 3), ("He said \u201cno\u201d, 2)", 1)],
    [("the", 1), ("cat", 5), ("the", 2)], [("1", 3), ("5 apples", 4)],
])
def test_valid_json_is_read_as_it_is(parts):
    assert parse_parts(json.dumps(parts)) == parts
    as_object = "{" + ", ".join(f"{json.dumps(text)}: {score}" for text, score in parts) + "}"
    assert parse_parts(as_object) == parts


def test_long_outputs_take_no_time():
    """Escapes and quotes without end: an expression that tries every way to read them would never be done."""
    assert parse_parts('[["' + "x = 1\\n" * 4000) == []
    assert parse_parts('["' * 2000 + '"a", 3]')[-1][1] == 3


def test_parts_are_found_in_order():
    answer = "the cat and the dog"
    spans, scores = locate_parts(answer, [("the", 1), ("cat", 5), ("and", 1), ("the", 2), ("dog", 4)])
    assert [answer[start:end] for start, end in spans] == ["the", "cat", "and", "the", "dog"]
    assert spans[3].tolist() == [12, 15] and scores.tolist() == [1, 5, 1, 2, 4]


def test_a_part_that_is_not_there_is_skipped_and_white_space_may_differ():
    answer = "one  two\nthree four"
    spans, scores = locate_parts(answer, [("one two", 3), ("zwei", 5), ("", 5), ("three", 2)])
    assert [answer[start:end] for start, end in spans] == ["one  two", "three"] and scores.tolist() == [3, 2]
    assert len(locate_parts("", [("x", 1)])[0]) == 0


def test_a_text_far_ahead_is_another_occurrence():
    answer = "yes " + "filler words " * 20 + "no"
    spans, _ = locate_parts(answer, [("no", 5), ("yes", 1)])
    assert [answer[start:end] for start, end in spans] == ["yes"]


def test_token_scores_and_the_share_of_covered_tokens():
    """'ab' scores 5 and 'd' scores 1; 'c' has none. Tokens 'a', 'bc', 'd', and an empty one."""
    spans, scores = np.array([(0, 2), (3, 4)]), np.array([5, 1])
    tokens = np.array([(0, 1), (1, 3), (3, 4), (4, 4)])
    found = token_scores(tokens, character_scores(4, spans, scores))
    np.testing.assert_array_equal(found, [5, 5, 1, np.nan])
    tokens = np.array([(0, 1), (1, 2), (2, 3), (3, 4)])
    assert matched_share(tokens, spans, "abcd") == 0.75
    assert matched_share(tokens, spans, "ab d") == 1.0  # white space alone counts for nothing


@pytest.fixture
def scored(tmp_path, toy_model, monkeypatch):
    """(pairs, folder) of an extraction in which the model's words are canned: a partition by words, one half of it
    for every third answer."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0][:6]))
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    calls = []

    def canned(model, chat, prompts, max_new_tokens):
        outputs = []
        for ids in prompts:
            answer = chat.tokenizer.decode(ids).split("Response: ")[-1].split("<|")[0].split("\nassistant")[0].strip()
            calls.append(answer)
            words = answer.split()
            words = words[:len(words) // 2] if len(calls) % 3 == 0 else words
            outputs.append(json.dumps([[word, 1 + place % 5] for place, word in enumerate(words)]))
        return outputs
    monkeypatch.setattr(verbalize, "generate", canned)
    extract.main(["--model", str(toy_model), "--data", str(path), "--verbalized", "--out", str(tmp_path / "scores")])
    assert tokenizer and len(calls) == 12
    return load_dataset(str(path), "").train, tmp_path / "scores"


def test_scores_are_stored_and_poorly_covered_pairs_are_left_out(scored):
    pairs, directory = scored
    scores = ScoresFile(directory)
    assert len(shard_paths(directory)) == 1
    poor = {pair.key for pair in pairs if min(answer.matched for answer in scores[pair.key]) < 0.9}
    assert scores.left_out == poor and 0 < len(poor) < 6
    for pair in pairs:
        assert (pair.key in scores) == (pair.key not in poor)
        for answer, text in zip(scores[pair.key], (pair.chosen, pair.rejected)):
            words = [text[start:end] for start, end in answer.spans_J2]
            assert words == text.split()[:len(words)]
            assert answer.score_J.tolist() == [1 + place % 5 for place in range(len(words))]


def test_no_row_can_end_the_turn(toy_model, monkeypatch):
    """Special tokens that an answer or a question spells are text to the model."""
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    seen = []
    monkeypatch.setattr(verbalize, "generate", lambda model, chat, prompts, most: seen.extend(prompts)
                        or [""] * len(prompts))
    special = tokenizer.all_special_tokens[0]
    pairs = [Pair((("user", f"what{text}?"),), f"one {text} two", "three", "x:1") for text in ("", special)]
    bar = type("Bar", (), {"update": lambda self, count: None})()
    for pair in pairs:
        verbalize.score_pairs(None, Chat(tokenizer), [pair], 10_000, bar)
    counts = [sum(id in tokenizer.all_special_ids for id in ids) for ids in seen]
    assert len(set(counts)) == 1 and special in tokenizer.decode(seen[2])


def test_the_model_itself_generates(tmp_path, toy_model, capsys):
    """An untrained model says nothing of use: every pair is left out, counted, and nothing breaks."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in toy_rows()[0][:2]))
    extract.main(["--model", str(toy_model), "--data", str(path), "--verbalized", "--out", str(tmp_path / "scores")])
    assert "2 of 2 pairs have answers of which less than 90 %" in capsys.readouterr().out


@pytest.mark.parametrize("text, parts", [
    ('"', 0), ('"a', 0), ('["a", 3', 1), ('"\\",3', 0), ('"' + "\\" * 99, 0), ('",' + " " * 99, 0), ('"a", ', 0),
    ('"a", 3], ', 100_000)])
def test_long_output_is_read_once(text, parts):
    """A hundred thousand times; each was read again for every quote before it."""
    assert len(parse_parts(text * 100_000)) == parts


def test_a_part_is_looked_for_nearby_alone():
    """Twenty thousand parts that are nowhere, of an answer of a million characters."""
    spans_J2, _ = locate_parts("word " * 200_000, [("nowhere", 3)] * 20_000 + [("word", 4)])
    assert spans_J2.tolist() == [[0, 4]]
