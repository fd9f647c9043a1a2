"""What a file of pairs costs to read and to tokenise: memory by byte of file, rows a second.

    python benchmarks/reading.py                       files of 200 MB and of 1 GB, made on the spot and deleted
    python benchmarks/reading.py --megabytes 20,100

Each file is read and tokenised in a process of its own, as training does it on all cores, with a byte-level tokenizer
trained on the spot. Its memory is that of the process that trains, above what it has before: private (its own) and
shared (mapped tokens, which a node holds once); workers are gone by then. The slopes are between the smallest and the
largest file, in bytes of memory by byte of file. Linux alone. The last line is JSON.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from harness import ROOT, Report, add_output_flags, machine, output_path, print_machine, whole_numbers

TEMPLATE = ("{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}")
WORDS = 5000  # that texts are made of
MEDIAN_WORDS = {"prompt": 80, "chosen": 160, "rejected": 150}
FIGURES = ("private_after_reading", "private_after_tokenising", "peak_private", "shared_tokens")


def make_words() -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice("etaoinshrdlu") for _ in range(rng.randint(2, 9))) for _ in range(WORDS)]


def make_file(path: Path, size: int) -> int:
    """A .jsonl of at least `size` bytes; its number of rows."""
    rng, words, rows, written = random.Random(1), make_words(), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            lengths = {name: median * rng.lognormvariate(0, 0.6) for name, median in MEDIAN_WORDS.items()}
            row = {name: " ".join(rng.choices(words, k=max(1, round(each)))) for name, each in lengths.items()}
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


def make_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([" ".join(make_words())], trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                            chat_template=TEMPLATE).save_pretrained(folder)


def memory() -> dict[str, int]:
    """This process's memory in bytes: its own, and pages of files, which other processes may share."""
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024
             for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]}
    status = {line.split(":")[0]: int(line.split()[1]) * 1024
              for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(("VmHWM", "RssFile"))}
    return {"private": sizes["Anonymous"], "files": status["RssFile"], "pss": sizes["Pss"], "peak": status["VmHWM"]}


def measure(path: str, tokenizer: str) -> dict[str, float]:
    """In a process of its own: read and tokenise, as a run does."""
    from transformers import AutoTokenizer

    from twdpo import dist
    from twdpo.chat import Chat
    from twdpo.dataset import load_dataset
    from twdpo.examples import tokenize_all
    process, chat = dist.start(), Chat(AutoTokenizer.from_pretrained(tokenizer))
    tokenize_all(chat, [], 2048, 512, process, "")
    start, begin = memory(), time.perf_counter()
    pairs = load_dataset(path, "", with_held_out=False).train
    read, read_at = memory(), time.perf_counter()
    examples, _, _ = tokenize_all(chat, pairs, 2048, 512, process, "tokenise")
    done_at = time.perf_counter()
    sum(int(example.chosen.ids[-1]) + int(example.rejected.spans_N2[0, 0]) for example in examples)  # maps every page
    done = memory()
    dist.stop()
    return {"rows": len(pairs), "read_rows_per_s": len(pairs) / (read_at - begin),
            "tokenise_rows_per_s": len(pairs) / (done_at - read_at), "tokens": sum(each.together for each in examples),
            "private_after_reading": read["private"] - start["private"],
            "private_after_tokenising": done["private"] - start["private"],
            "peak_private": done["peak"] - done["files"] - start["private"],
            "shared_tokens": done["files"] - read["files"], "pss": done["pss"]}


def measure_apart(path: Path, tokenizer: Path) -> dict[str, float]:
    program = f"import reading, json; print(json.dumps(reading.measure({str(path)!r}, {str(tokenizer)!r})))"
    paths = [str(ROOT / "benchmarks"), str(ROOT)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {program}"], check=True,
                          stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


def slopes(rows: list[dict]) -> dict[str, float]:
    """Bytes of memory by byte of file, between the smallest and the largest."""
    small, large = (pick(rows, key=lambda row: row["bytes"]) for pick in (min, max))
    return {name: (large[name] - small[name]) / (large["bytes"] - small["bytes"]) for name in FIGURES}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--megabytes", type=whole_numbers(1), default=[200, 1000], help="of the files, by commas")
    add_output_flags(parser, "reading.json")
    flags = parser.parse_args(argv)
    device = torch.device("cpu")
    head = {"machine": machine(device)}
    report = Report(output_path(flags, device, "reading.json"), head, ("megabytes",))
    print_machine(head)
    print(f"\n{'file, MB':>10}{'rows':>10}{'read rows/s':>13}{'tokenise':>10}"
          + "".join(f"{name.replace('_', ' ') + ', MB':>30}" for name in FIGURES), flush=True)
    with tempfile.TemporaryDirectory(prefix="twdpo-") as folder:
        make_tokenizer(Path(folder) / "tokenizer")
        for megabytes in flags.megabytes:
            path = Path(folder) / "pairs.jsonl"
            make_file(path, megabytes * 10**6)
            row = {"megabytes": megabytes, "bytes": path.stat().st_size}
            row |= measure_apart(path, Path(folder) / "tokenizer")
            print(f"{megabytes:10}{row['rows']:10,}{row['read_rows_per_s']:13,.0f}{row['tokenise_rows_per_s']:10,.0f}"
                  + "".join(f"{row[name] / 1e6:30,.0f}" for name in FIGURES), flush=True)
            report.add(row)
    if len(report.rows) > 1:
        print("\nbytes of memory by byte of file: " + ", ".join(
            f"{name.replace('_', ' ')} {slope:.2f}" for name, slope in slopes(report.rows).items()))
    report.finish()


if __name__ == "__main__":
    main()
