"""Tokenising on all cores gives what one process gives, in order, and its failures say what to do."""

import dataclasses
import json
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from processes_of_tests import run_ranks
from tokenizers_of_tests import BrokenChat
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import reading
from twdpo import dist, examples
from twdpo.chat import Chat
from twdpo.dataset import load_dataset
from twdpo.examples import from_bytes, to_bytes, tokenize_all
from twdpo.flags import InputError
from twdpo.pairs import Pair
from twdpo.tokens import tokenize_pairs

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = 40, 20  # some prompts and answers are cut


def pairs_of_tests() -> list[Pair]:
    """Among them two that the template refuses, and one twice."""
    pairs = load_dataset("toy", "").train[:60]
    bad = Pair((("user", "hi"),), "so", "no", "x:1")
    return [*pairs[:7], bad, *pairs[7:], pairs[3], bad]


def chat_of_tests(folder) -> Chat:
    """The toy's; its template refuses one prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    refuse = "{% if messages[0].content == 'hi' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    return Chat(tokenizer)


def as_lists(value):
    """A dataclass with all its fields, arrays with their dtype: comparable."""
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tolist()
    if dataclasses.is_dataclass(value) and not isinstance(value, Pair):
        return type(value), [as_lists(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


def assert_equal(found, expected) -> None:
    assert [as_lists(example) for example in found[0]] == [as_lists(example) for example in expected[0]]
    assert found[1:] == expected[1:]


@pytest.fixture
def chat(toy_model) -> Chat:
    return chat_of_tests(toy_model)


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Three pairs a chunk, all by workers; their folder."""
    monkeypatch.setattr(examples, "FEW_PAIRS", 0)
    monkeypatch.setattr(examples, "CHUNK", 3)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_bytes_give_the_examples_back(chat):
    pairs = pairs_of_tests()
    found = tokenize_pairs(chat, pairs, *LENGTHS)[0]
    found[1] = dataclasses.replace(found[1], chosen=dataclasses.replace(found[1].chosen, num_reasoning=2))
    data = to_bytes(pairs, found)
    again = from_bytes(b"1234" + data, 4, pairs)
    assert [as_lists(example) for example in again] == [as_lists(example) for example in found]
    assert all(example.pair is other.pair for example, other in zip(again, found)) and len(found) < len(pairs)
    assert from_bytes(to_bytes(pairs, []), 0, pairs) == []


def test_a_file_may_be_larger_than_int32_counts(chat, tmp_path):
    """The examples stand behind a hole of 2 GiB."""
    pairs = pairs_of_tests()
    found = tokenize_pairs(chat, pairs, *LENGTHS)[0]
    with open(tmp_path / "tokens", "w+b") as file:
        file.seek(offset := 1 << 31)
        file.write(to_bytes(pairs, found))
        file.flush()
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    again = [as_lists(example) for example in from_bytes(buffer, offset, pairs)]
    assert again == [as_lists(example) for example in found]


@pytest.mark.parametrize("cores", [1, 3])
def test_workers_give_what_one_process_gives(cores, chat, scratch, process, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    pairs = pairs_of_tests()
    found = tokenize_all(chat, pairs, *LENGTHS, process, "x")
    assert set(chat.endings.values()) == {"<|eot|>"}
    assert_equal(found, tokenize_pairs(chat, pairs, *LENGTHS))
    assert len(found[1]) == 2 and found[2]["chosen answers cut"] and any(each.prompt_is_cut for each in found[0])
    assert not found[0][0].prompt_ids.flags.owndata and not list(scratch.iterdir())


def test_few_pairs_start_no_process(chat, process, monkeypatch):
    monkeypatch.setattr(examples, "run_workers", None)
    assert len(tokenize_all(chat, pairs_of_tests(), *LENGTHS, process, "x")[0]) == 61


KILLED = """
import os, signal, sys, tempfile
sys.path[:0] = {path!r}
import test_examples as tests
from twdpo import dist, examples
examples.FEW_PAIRS, examples.CHUNK, tempfile.tempdir = 0, 1, {folder!r}
pairs = tests.pairs_of_tests() * 40
process = dist.start()
def advance(task):
    (os.killpg if {whole} else os.kill)(os.getpid(), signal.SIGTERM)
examples.as_completed = lambda tasks: map(advance, tasks[5].result() and tasks)
tests.tokenize_all(tests.chat_of_tests({model!r}), pairs, *tests.LENGTHS, process, "x")
"""


@pytest.mark.parametrize("whole", [False, True])
def test_a_killed_run_leaves_no_tokens(whole, toy_model, tmp_path):
    script = KILLED.format(path=[str(ROOT), str(ROOT / "tests")], folder=str(tmp_path), model=str(toy_model),
                           whole=whole)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120,
                         start_new_session=True)
    assert run.returncode == -signal.SIGTERM, run.stderr
    for _ in range(100):
        if not list(tmp_path.iterdir()):
            return
        time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def main(argv: list[str]) -> None:
    """A rank of the test below, as a script."""
    process = dist.start()
    tempfile.tempdir = argv[1] if process.rank == 0 else "/nowhere"  # the first of the node decides
    pairs, chat = pairs_of_tests(), chat_of_tests(argv[0])
    assert_equal(tokenize_all(chat, pairs, *LENGTHS, process, "x"), tokenize_pairs(chat, pairs, *LENGTHS))
    dist.stop()


def test_two_processes_share_the_chunks(toy_model, tmp_path):
    run_ranks("test_examples", [str(toy_model), str(tmp_path)],
              constants={"twdpo.examples.FEW_PAIRS": 0, "twdpo.examples.CHUNK": 10})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind, error, message", [
    ("dies", InputError, "a process that tokenises died.*a TMPDIR on a disk"),
    ("full", InputError, "no room for the pairs' tokens .No space left.*TMPDIR=FOLDER"),
    ("bug", ZeroDivisionError, "in a worker")])
def test_what_fails_in_a_worker_says_what_to_do(kind, error, message, scratch, process):
    with pytest.raises(error, match=message) as raised:
        tokenize_all(BrokenChat(kind), pairs_of_tests(), *LENGTHS, process, "x")
    assert kind != "bug" or "tokenize_chunk" in str(raised.value.__cause__)
    assert not list(scratch.iterdir())


# --- benchmarks/reading.py


@pytest.mark.slow
def test_the_benchmark_measures_a_file(tmp_path, capsys):
    reading.main(["--megabytes", "1", "--out", str(tmp_path / "x.json")])
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert 1e6 <= row["bytes"] < 1.1e6 and row["rows"] > 100 and row["tokens"] > 1e5
    assert row["private_after_tokenising"] > 0 and [row] == json.loads((tmp_path / "x.json").read_text())["rows"]


def test_slopes_are_between_the_smallest_and_the_largest_file():
    rows = [{"bytes": size} | dict.fromkeys(reading.FIGURES, 100 + 3 * size) for size in (20, 30, 10)]
    assert reading.slopes(rows) == dict.fromkeys(reading.FIGURES, 3.0)


def test_the_documented_figures_are_those_of_the_committed_run():
    rows = json.loads((ROOT / "benchmarks/results/cpu/reading.json").read_text())["rows"]
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    assert len(rows) == 2
    for row in rows:
        figures = " | ".join(f"{row[name] / 1e6:,.0f} MB" for name in reading.FIGURES)
        assert (f"| {row['megabytes']:,} MB | {row['rows']:,} | {row['read_rows_per_s']:,.0f} | "
                f"{row['tokenise_rows_per_s']:,.0f} | {figures} |\n") in page
    slopes = " | ".join(f"{slope:.2f}" for slope in reading.slopes(rows).values())
    assert f"| bytes by byte of file | | | | {slopes} |\n" in page
