"""The authors' columns: what extract.py --export writes, and train.py reads back."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from precision_of_tests import InDouble, assert_as_exact
from tokenizers import normalizers
from tokenizers_of_tests import TRIMMED, byte_level, gemma_like, sentencepiece_like
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import extract
from twdpo.authors_columns import WeightsColumns, export_columns, find_run, token_spans
from twdpo.data_files import read_file
from twdpo.dataset import load_dataset
from twdpo.flags import InputError
from twdpo.forms import Reading, parse_row
from twdpo.judge import prompt
from twdpo.toy.grammar import toy_rows
from twdpo.weights_file import WeightsFile


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [row | {"extra": number} for number, row in enumerate(toy_rows()[0][:5])]
    rows.insert(2, {"prompt": "no answers"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def export(toy_model, pairs_file, tmp_path_factory) -> Path:
    """A folder with rows.jsonl, an export with both layers and rollout, and the weights file w. To be read only."""
    folder = tmp_path_factory.mktemp("export")
    extract.main(["--model", str(toy_model), "--data", str(pairs_file), "--judge-prompt", "short", "--layers", "1,2",
                  "--rollout", "--out", str(folder / "w"), "--export", str(folder / "rows.jsonl"), "--skip-bad-rows"])
    return folder


@pytest.fixture
def exported(export, tmp_path):
    """(rows of the export, the weights file); the export itself is rows.jsonl in this test's own folder."""
    shutil.copy(export / "rows.jsonl", tmp_path)
    return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()], export / "w"


def test_one_row_per_input_row_with_their_columns(exported, pairs_file, toy_model):
    rows, directory = exported
    given = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    assert [{name: row[name] for name in source} for row, source in zip(rows, given)] == given
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    assert rows[2]["chosen_tokens"] is None and rows[2]["rejected_weights_1"] is None
    for row, pair in zip([*rows[:2], *rows[3:]], load_dataset(str(pairs_file), "").train):
        for number, side in enumerate(("chosen", "rejected")):
            assert tokenizer.decode(row[f"{side}_tokens"]).strip() == row[side].strip()
            for column, layer in (("0", "1"), ("1", "2"), ("attention_rollout", "rollout")):
                weights = row[f"{side}_weights_{column}"]
                stored = WeightsFile(directory, layer)[pair.key][number].attention_LRJ[0].mean(axis=0)
                np.testing.assert_allclose(weights, stored / stored.sum(), rtol=1e-5)
                assert sum(weights) == pytest.approx(1)
        assert isinstance(row["cr_last_token"], str) and isinstance(row["rc_last_token"], str)


@pytest.mark.parametrize("layer, column", [("1", "0"), ("last", "1"), ("rollout", "attention_rollout")])
def test_an_export_is_read_back(layer, column, exported, tmp_path, toy_model, pairs_file):
    rows, directory = exported
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    columns, stored = WeightsColumns(tmp_path / "rows.jsonl", layer, tokenizer), WeightsFile(directory, layer)
    for row, pair in zip([*rows[:2], *rows[3:]], load_dataset(str(pairs_file), "").train):
        assert pair.key in columns
        for ours, theirs in zip(columns[pair.key], stored[pair.key]):
            assert (ours.ids_J == theirs.ids_J).all() and (ours.spans_J2 == theirs.spans_J2).all()
        np.testing.assert_allclose(columns[pair.key][0].attention_LRJ[0, 0], row[f"chosen_weights_{column}"], rtol=1e-6)


def test_an_export_and_its_reading_find_the_pairs_of_other_columns(exported, tmp_path, toy_model):
    """--columns and --fold-system name the pairs; a weight, which the rows here lack, is none of their identity."""
    rows = [{"question" if name == "prompt" else name: value for name, value in row.items()} for row in exported[0]]
    (path := tmp_path / "renamed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, stored = AutoTokenizer.from_pretrained(toy_model), WeightsFile(exported[1], "1")
    reading = Reading(columns={"prompt": "question", "weight": "w"})
    count, missing = export_columns(tmp_path / "again.jsonl", read_file(path), stored, tokenizer, "raw", reading)
    assert (count, missing) == (6, 1)
    columns = WeightsColumns(tmp_path / "again.jsonl", "1", tokenizer, reading)
    assert all(parse_row("x", row).key in columns for row in [*exported[0][:2], *exported[0][3:]])


def test_a_file_without_the_columns_or_the_layer_is_refused(exported, tmp_path, pairs_file, toy_model):
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    with pytest.raises(InputError, match="no row holds chosen_tokens"):
        WeightsColumns(pairs_file, "last", tokenizer)
    with pytest.raises(InputError, match="stores layers 1, 2, rollout"):
        WeightsColumns(tmp_path / "rows.jsonl", "7", tokenizer)


@pytest.mark.parametrize("name, value, message", [
    ("chosen_tokens", [5, 6, 7, 8], "its weights can't be read"), ("chosen_tokens", [-5], "its weights can't be read"),
    ("rejected_tokens", [], "its weights"), ("rejected_weights_1", float("nan"), "negative or not finite"),
    ("rejected_weights_1", -1.0, "negative or not finite"), ("chosen_weights_1", None, "no column 'chosen_weights_1'"),
])
def test_columns_that_make_no_sense_are_refused(name, value, message, exported, tmp_path, toy_model):
    row = exported[0][0]
    if value is None:
        del row[name]
    else:
        row[name] = value if isinstance(value, list) else [value] * len(row[name])
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in exported[0]))
    with pytest.raises(InputError, match=f"{path}:1: .*{message}"):
        WeightsColumns(path, "last", AutoTokenizer.from_pretrained(toy_model))


def test_an_export_of_an_export_holds_its_own_columns_alone(exported, tmp_path, toy_model, capsys):
    source = tmp_path / "rows.jsonl"
    argv = ["--model", str(toy_model), "--data", str(source), "--judge-prompt", "short", "--layers", "1", "--out",
            str(tmp_path / "w2"), "--skip-bad-rows", "--export"]
    extract.main([*argv, str(tmp_path / "again.jsonl")])
    first = json.loads((tmp_path / "again.jsonl").read_text().splitlines()[0])
    assert {name for name in first if "_weights_" in name} == {"chosen_weights_0", "rejected_weights_0"}
    before = source.read_bytes()
    with pytest.raises(SystemExit):
        extract.main([*argv, str(source)])
    assert "is a file that is read" in capsys.readouterr().err and source.read_bytes() == before


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece_like(TRIMMED)], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("answer", ["The quick brown fox.", "  spaces around ", "caf\u00e9 \u4f60\u597d \U0001f600 x"])
@pytest.mark.parametrize("before, after", [("", ""), ("\n", "\n<|The End"), ("Answer A: ", "\n\nAnswer")])
def test_spans_of_ids_are_those_of_the_prompt_they_come_from(tokenizer, answer, before, after):
    encoded = tokenizer(before + answer + after, add_special_tokens=False, return_offsets_mapping=True)
    spans = np.array(encoded["offset_mapping"]) - len(before)
    inside = (spans[:, 1] > 0) & (spans[:, 0] < len(answer))
    ids, spans = np.array(encoded["input_ids"])[inside], np.clip(spans[inside], 0, len(answer))
    for num in (len(ids), len(ids) - 1):
        assert token_spans(tokenizer, ids[:num], answer).tolist() == spans[:num].tolist()


def test_white_space_is_the_answer_whatever_its_token_spells():
    tokenizer = byte_level()
    for text in (" ", "\n\n", " \n"):
        ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert token_spans(tokenizer, ids, " ").tolist() == [[0, 1]] * len(ids)


def test_ids_that_no_surroundings_give_keep_the_characters_of_those_that_agree():
    tokenizer = byte_level()
    encoded = tokenizer("The quick brown fox", add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"])
    ids[2] = 7  # some other token
    found = token_spans(tokenizer, ids, "The quick brown fox")
    assert (found == spans).all()
    with pytest.raises(ValueError, match="no part of the answer"):
        token_spans(tokenizer, np.array([7, 8, 9, 10]), "The quick brown fox")


@pytest.mark.parametrize("text", ["The quick brown fox jumps. ", "a ", "spam and eggs, "])
@pytest.mark.parametrize("changes", [(0.5,), (0.0, 1.0), (0.1, 0.9)])
def test_long_answers_are_compared_in_one_pass(text, changes):
    """200,000 characters that differ in a few tokens. Where all tokens are equal, none is at home."""
    tokenizer, answer = byte_level(), text * (200_000 // len(text))
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = np.array(encoded["input_ids"], dtype=np.int32), np.array(encoded["offset_mapping"])
    changed = [int(place * (len(ids) - 1)) for place in changes]
    ids[changed] = 7
    assert np.abs(token_spans(tokenizer, ids, answer) - spans).max() <= (50 if text == "a " else 0)


def test_a_run_of_ids_is_found_at_whole_numbers():
    ids = [1 << 8, 1, 2, 1, 2, 3]
    assert find_run(ids, np.array([1, 2, 3])) == 3
    assert find_run(ids, np.array([1])) == 1  # not the second byte of the first
    assert find_run(ids, np.array([3, 1])) == -1


def test_text_that_the_tokenizer_normalises_is_found():
    """NFC, as in Qwen's tokenizers: a letter and its accent become one character before they are tokenised."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    answer = "Hello e\u0301cole friend"
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    found = token_spans(tokenizer, np.array(encoded["input_ids"]), answer)
    assert found.tolist() == list(map(list, encoded["offset_mapping"]))


# The preset authors against a plain transcription of what their extraction does (methods.md 3.2.1)

PROMPT = prompt.JUDGE_PROMPTS["authors"]


def find(ids: list[int], pattern: list[int]) -> int:
    (place,) = [place for place in range(len(ids)) if ids[place:place + len(pattern)] == pattern]
    return place


def columns_of_the_authors(model, tokenizer, row: dict, before: int, end_text: str, drop_first: int) -> dict:
    """One row's columns with dense eager maps. before, end_text, drop_first: their rule for the tokenizer."""
    tokens, weights, last = {}, {}, {}
    for name, order in (("cr", ("chosen", "rejected")), ("rc", ("rejected", "chosen"))):
        shown, question = {side: row[side].strip() or " " for side in order}, row["prompt"]

        def spell(question, shown, order=order):
            text = PROMPT.replace("{question}", question)
            for letter, side in zip("ab", order):
                text = text.replace("{answer_" + letter + "}", shown[side])
            return tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                                 tokenize=True, return_dict=False)
        ids = spell(question, shown)
        if len(ids) >= 2048:
            cut = {side: tokenizer.encode(text, add_special_tokens=False)[:768] for side, text in shown.items()}
            room = 2048 - 300 - sum(map(len, cut.values()))
            question = tokenizer.decode(tokenizer.encode(question, add_special_tokens=False)[-room:])
            ids = spell(question, {side: tokenizer.decode(each) for side, each in cut.items()})
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_attentions=True, logits_to_keep=1)
        last[f"{name}_last_token"] = tokenizer.decode([int(output.logits[0, -1].argmax())])
        maps = {str(layer): each[0].mean(dim=0) for layer, each in enumerate(output.attentions)}
        residual = [0.5 * each + 0.5 * torch.eye(len(ids)) for each in maps.values()]
        # Their product, the last layer's first; of its last row alone it takes seconds less.
        maps["attention_rollout"] = torch.linalg.multi_dot([residual[-1][-1:], *residual[-2::-1]])
        for letter, side in zip("AB", order):
            start_text = f"<|The Start of Answer {letter}|>\n"
            start = find(ids, tokenizer.encode(start_text, add_special_tokens=False)[drop_first:])
            start += len(tokenizer.encode(start_text, add_special_tokens=False)[drop_first:])
            end = find(ids, tokenizer.encode(end_text.replace("X", letter), add_special_tokens=False)[drop_first:])
            end = max(end - before, start + 1)
            tokens[side, name] = ids[start:end]
            for column, each in maps.items():
                part = each[-1, start:end]
                weights.setdefault((side, column), []).append(part / part.sum())
    for side in ("chosen", "rejected"):
        assert tokens[side, "cr"] == tokens[side, "rc"]
    return last | {f"{side}_tokens": tokens[side, "cr"] for side in ("chosen", "rejected")} | {
        f"{side}_weights_{column}": (sum(rounds) / 2).tolist() for (side, column), rounds in weights.items()}


def compare_with_the_authors(directory: Path, rows: list[dict], tmp_path, *rule) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]})
                            + "\n" for row in rows))
    extract.main(["--model", str(directory), "--data", str(path), "--preset", "authors", "--layers", "all", "--rollout",
                  "--out", str(tmp_path / "w"), "--export", str(tmp_path / "rows.jsonl")])
    plain, double = (AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager") for _ in range(2))
    double, tokenizer = double.double(), AutoTokenizer.from_pretrained(directory)
    for line, row in zip((tmp_path / "rows.jsonl").read_text().splitlines(), rows):
        ours, same = json.loads(line), columns_of_the_authors(plain, tokenizer, row, *rule)
        with InDouble():
            expected = columns_of_the_authors(double, tokenizer, row, *rule)
        for name, value in expected.items():
            if "weights" in name:
                exact_J = torch.tensor(value, dtype=torch.float64)
                assert_as_exact(torch.tensor(ours[name]), torch.tensor(same[name]), exact_J, name, floor=5e-6)
            else:
                assert ours[name] == value, name


def make_model(directory: Path, tokenizer) -> Path:
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
                         initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.slow
def test_the_preset_authors_equals_their_extraction(tmp_path, monkeypatch):
    """A tokenizer made known to the rule of Llama-3: the last one or two tokens are left out, answers are stripped."""
    tokenizer = byte_level()
    monkeypatch.setattr(prompt, "AUTHORS_END_RULES", (({"<|im_end|>": 2}, 3, 2),))
    rows = [{"prompt": f"what of {number}?", "chosen": f" The fox jumps, {number} times. ", "rejected": "No.\n"}
            for number in range(3)]
    rows.append({"prompt": "long " * 900, "chosen": "dog " * 900, "rejected": "lazy"})  # past their limit
    rows += [{"prompt": "why?", "chosen": "", "rejected": "The fox."},
             {"prompt": "how?", "chosen": "So.", "rejected": "\n"}]
    directory = make_model(tmp_path / "model", tokenizer)
    compare_with_the_authors(directory, rows, tmp_path, 3, "|The End of Answer X|", 0)


@pytest.mark.slow
def test_the_preset_authors_equals_their_extraction_by_the_rule_of_gemma(tmp_path):
    """A tokenizer with what their rule relies on: Gemma-3's ids of turn marks, line breaks as tokens of their own."""
    tokenizer = gemma_like()
    assert prompt.find_end_rule(tokenizer, PROMPT) == (0, 0)
    assert tokenizer.convert_ids_to_tokens([105, 106, 107]) == ["<start_of_turn>", "<end_of_turn>", "\n"]
    rows = [{"prompt": f"what of {number}?", "chosen": f" The fox jumps,\n\n{number} times. ", "rejected": "No.\n"}
            for number in range(3)]
    rows.append({"prompt": "why?", "chosen": "", "rejected": "The fox."})
    directory = make_model(tmp_path / "model", tokenizer)
    compare_with_the_authors(directory, rows, tmp_path, 0, "\n<|The End of Answer X|>", 0)


@pytest.mark.slow
@pytest.mark.parametrize("name, rule", [("llama3", (3, "|The End of Answer X|", 0)),
                                        ("mistral-v1", (2, "\n<|The End of Answer X|>", 1))])
def test_the_preset_authors_equals_their_extraction_on_real_pairs(name, rule, shared, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    lines = (shared / "pairs/permissive_train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[::160]]
    directory = make_model(tmp_path / "model", tokenizer)
    compare_with_the_authors(directory, rows, tmp_path, *rule)


def test_an_unknown_tokenizer_has_exact_spans_and_says_so(tmp_path, toy_model, pairs_file, capsys):
    extract.main(["--model", str(toy_model), "--preset", "authors", "--judge-prompt", "short", "--judge-cut", "common",
                  "--data", str(pairs_file), "--out", str(tmp_path / "w"), "--skip-bad-rows"])
    assert "no rule for this tokenizer or prompt: spans are exact" in capsys.readouterr().out


def test_columns_of_an_answer_that_calls_tools_are_refused(tmp_path, toy_model):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    row = {"prompt": "why", "chosen": [call], "rejected": [{"role": "assistant", "content": "no"}],
           **{f"{side}_{name}": [1] for side in ("chosen", "rejected") for name in ("tokens", "weights_0")}}
    (path := tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="rows.jsonl:1.*calls tools"):
        WeightsColumns(path, "last", AutoTokenizer.from_pretrained(toy_model))
