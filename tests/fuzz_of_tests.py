"""Input that is anything: files that the entry points read, each a good one with something wrong in it."""

import gzip
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import extract
import train
from twdpo.judge.prompt import JUDGE_PROMPTS
from twdpo.models.source import load_tokenizer

SCRAPS = ["null", "NaN", "1e999", "-1", "10" * 60, '"\\ud800"', "[]", "{}", "[" * 2000, '{"a":' * 500, "\x00", "\ufeff",
          "\r", '"', "\\", ",", "'", "{{", "}}", "{%", "%}", "{question}", "{answer_a}", "true", '"prompt"', '"chosen"',
          '"role": "tool"', '"content": null', '"messages"', "<|eot|>", "\u202e", "\U0001f600", " " * 3000, "a" * 5000,
          "0", "1.5", '"model_type"', '"vocab_size": 1', '"chat_template"', '"date"', '"lr"', "range(10**8)"]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Something wrong in it, up to four times: a scrap put in or in the place of a part, a part dropped or doubled, a
    byte changed, the rest cut off, the lines in another order."""
    for _ in range(rng.randint(1, 4)):
        place = rng.randint(0, len(data))
        end = min(len(data), place + int(2 ** rng.uniform(0, 9)))
        head, part, tail = data[:place], data[place:end], data[end:]
        scrap, lines = rng.choice(SCRAPS).encode("utf-8", "surrogatepass"), data.split(b"\n")
        data = rng.choice([head + scrap + part + tail, head + scrap + tail, head + tail, head + part * 2 + tail,
                           head + bytes([rng.randrange(256)]) + data[place + 1:], head,
                           b"\n".join(rng.sample(lines, len(lines)))])
    return data


def mutate_value(value: object, rng: random.Random) -> object:
    """A JSON value with one of its parts replaced, dropped, or doubled."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = rng.choice(list(value))
        if rng.random() < 0.2:
            return {key: each for key, each in value.items() if key != name}
        return value | {name: mutate_value(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return value[:place] + [mutate_value(value[place], rng)] * rng.choice((0, 1, 2)) + value[place + 1:]
    return rng.choice([None, True, -1, 0, 1.5, 1e308, 10**40, "", "x", "\ud800", [], {}, [[]], {"a": 1}, ["x", None],
                       float("nan"), "\x00", "a" * 3000])


def mutate_json(text: str, rng: random.Random) -> bytes:
    """Of JSON lines or one JSON value; as JSON or, sometimes, as what is none any more."""
    lines = text.splitlines() if text.count("\n{") else [text]
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(mutate_value(json.loads(lines[place]), rng))
    data = "\n".join(lines).encode()
    return mutate(data, rng) if rng.random() < 0.3 else data


def commands(bench, rng: random.Random) -> Iterator[tuple[str, Callable, list[str]]]:
    """(what is wrong, entry point, its command line) for ever."""
    pairs = bench.pairs.read_text()
    template = load_tokenizer(bench.folder / "model", "").chat_template
    bench.call(extract.main, [*bench.extraction(bench.extracted), "--export", str(bench.folder / "columns.jsonl")])
    kinds = {
        "pairs.jsonl": lambda place: (mutate_json(pairs, rng), ["--data", str(place)]),
        "pairs.json": lambda place: (mutate_json(json.dumps(list(map(json.loads, pairs.splitlines()))), rng),
                                     ["--data", str(place)]),
        "pairs.csv": lambda place: (mutate(b"prompt,chosen,rejected\n" + b'"a, b",c,d\n' * 9, rng),
                                    ["--data", str(place)]),
        "pairs.jsonl.gz": lambda place: (mutate(gzip.compress(pairs.encode()), rng), ["--data", str(place)]),
        "held_out.jsonl": lambda place: (mutate_json(pairs, rng), ["--eval-data", f"a={place}"]),
        "template.jinja": lambda place: (mutate(template.encode(), rng), ["--chat-template", str(place)]),
        "prompt.txt": lambda place: (mutate(JUDGE_PROMPTS["short"].encode(), rng), ["--judge-prompt", str(place)]),
        "config.json": lambda place: (mutate_json((bench.whole / "run/config.json").read_text(), rng),
                                      ["--config", str(place)]),
        "columns.jsonl": lambda place: (mutate_json((bench.folder / "columns.jsonl").read_text(), rng),
                                        ["--weights", str(place)]),
    }
    folders = {"model": ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                         "model.safetensors"), "extracted/w": ("meta.json", "shard")}
    while True:
        place = bench.fresh("fuzzed")
        argv = [*bench.argv(place), "--cache-dir", str(bench.folder / "cache"), "--show", "1"]
        if rng.random() < 0.7:
            name = rng.choice(list(kinds))
            data, more = kinds[name](place / name)
            (place / name).write_bytes(data)
        else:
            folder = rng.choice(list(folders))
            shutil.copytree(bench.folder / folder, place / "copy")
            name = rng.choice(folders[folder])
            path = next(path for path in sorted((place / "copy").iterdir()) if path.name.startswith(name))
            text = path.read_bytes()
            path.write_bytes(mutate_json(text.decode(), rng) if path.suffix == ".json" and rng.random() < 0.7
                             else mutate(text, rng))
            name = f"{folder}/{path.name}"
            more = ["--model" if folder == "model" else "--weights", str(place / "copy")]
        main = train.main
        if rng.random() < 0.2 and not {"--config", "--weights"} & set(more):
            main, argv = extract.main, [*bench.extraction(place)]
        keep(bench.folder / "last-fuzzed", place)
        yield f"{name} (kept in {bench.folder / 'last-fuzzed'} until the next)", main, [*argv, *more]


def keep(to: Path, place: Path) -> None:
    """A copy of what is tried: what hangs or kills the harness can be looked at."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(place, to)
