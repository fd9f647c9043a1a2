"""All pairs in tokens, on all cores of a node: chunks of pairs in worker processes, their arrays in files that all
processes of the node map, so that a node holds one copy of them, in its page cache."""

import contextlib
import errno
import mmap
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from twdpo.chat import Chat
from twdpo.data_files import BadRow
from twdpo.flags import InputError
from twdpo.pairs import Pair
from twdpo.tokens import Example, Response, tokenize_pairs

if TYPE_CHECKING:  # it imports torch, which workers do without
    from twdpo.dist import Process

FEW_PAIRS = 4000  # so many are tokenised here sooner than workers start
CHUNK = 500  # pairs that a worker takes at once
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT}


@dataclass(frozen=True)
class Chunk:
    """What came of pairs [start, stop): bytes [offset, offset + size) of its rank's file hold the examples."""

    start: int
    stop: int
    offset: int
    size: int
    bad: list[BadRow]
    counts: Counter
    endings: dict[str, str]  # Chat's


def tokenize_all(chat: Chat, pairs: list[Pair], max_length: int, max_prompt_length: int, process: "Process", desc: str
                 ) -> tuple[list[Example], list[BadRow], Counter]:
    """What `tokenize_pairs` gives, in the same order, by all cores of each node. Raises InputError. All ranks.

    desc: names the progress bar. The arrays of many pairs are read-only.
    """
    if len(pairs) < FEW_PAIRS:
        return tokenize_pairs(chat, pairs, max_length, max_prompt_length,
                              lambda items: process.progress(items, desc=desc, unit="pair"))
    node = process.gather((socket.gethostname(), os.environ.get("GROUP_RANK")))
    ranks = [rank for rank, name in enumerate(node) if name == node[process.rank]]
    cores = set().union(*(process.gather(os.sched_getaffinity(0))[rank] for rank in ranks))
    place = ranks.index(process.rank)
    folder = Path(process.gather(together(process, lambda: make_folder() if place == 0 else ""))[ranks[0]])
    starts = range(0, len(pairs), CHUNK)[place::len(ranks)]
    try:
        def work() -> None:
            with explained(folder), process.progress(total=len(pairs), desc=desc, unit="pair") as bar:
                chunks = run_workers(chat, pairs, starts, (max_length, max_prompt_length), folder / f"{place}.tokens",
                                     max(1, len(cores) // len(ranks)),
                                     lambda count: bar.update(min(count * len(ranks), bar.total - bar.n)))
                (folder / f"{place}.index").write_bytes(pickle.dumps(chunks))
        together(process, work)
        return together(process, lambda: merge(folder, len(ranks), pairs, chat))
    finally:
        if place == 0:  # the maps outlive the files
            shutil.rmtree(folder, ignore_errors=True)


def make_folder() -> str:
    with explained(tempfile.tempdir or "TMPDIR"):
        return tempfile.mkdtemp(prefix="twdpo-")


@contextlib.contextmanager
def explained(folder: Path | str) -> Iterator[None]:
    """What the machine lacks becomes an InputError."""
    try:
        yield
    except BrokenProcessPool as error:
        raise InputError(f"a process that tokenises died, as it does when memory runs out (or TMPDIR, {folder}, is "
                         "memory): give the run more of it, fewer pairs, or a TMPDIR on a disk") from error
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise InputError(f"{folder}: no room for the pairs' tokens ({error.strerror}): make some, or name a folder "
                         "that has it with TMPDIR=FOLDER") from error


def together(process: "Process", function):
    """This rank's `function()`, when every rank has its own; an error on one is raised on all. All ranks."""
    value = error = None
    try:
        value = function()
    except Exception as raised:  # noqa: BLE001 - told to every process, so that none waits for ever
        error = raised
    is_users = isinstance(error, InputError)
    failures = process.gather(error and (is_users, str(error) if is_users else "".join(
        traceback.format_exception(error))))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure:
            raise InputError(failure[1]) if failure[0] else RuntimeError(f"rank {rank} failed:\n{failure[1]}")
    return value


def run_workers(chat: Chat, pairs: list[Pair], starts: range, lengths: tuple[int, int], path: Path, number: int, advance
                ) -> list[Chunk]:
    """Tokenise the chunks that begin at `starts` into `path`, in `number` processes."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads' locks and what CUDA holds
    path.touch()
    chunks = []
    with without_main(), ProcessPoolExecutor(min(number, max(1, len(starts))), context, start_worker,
                                             (chat, lengths, str(path), context.Lock())) as pool:
        try:
            tasks = [pool.submit(tokenize_chunk, start, pairs[start:start + CHUNK]) for start in starts]
            for task in as_completed(tasks):
                chunks.append(task.result())
                advance(chunks[-1].stop - chunks[-1].start)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return chunks


@contextlib.contextmanager
def without_main() -> Iterator[None]:
    """In this context new processes don't import the script that runs, which takes torch along and seconds."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


# ----------------------------------------------------------------------------------------------------------------------
# In a worker

_worker: dict[str, object] = {}  # what every chunk needs


def start_worker(chat: Chat, lengths: tuple[int, int], path: str, lock) -> None:
    """Keep what all chunks need; end with the process that started this one, and leave no tokens of a killed run."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every core has a worker already
    _worker.update(chat=chat, lengths=lengths, path=path, lock=lock)

    def end(*_) -> None:
        Path(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the file of another rank lies there
            Path(path).parent.rmdir()
        os._exit(1)

    def watch() -> None:
        multiprocessing.parent_process().join()
        end()
    signal.signal(signal.SIGTERM, end)  # torchrun sends it to all processes of a rank
    threading.Thread(target=watch, daemon=True).start()


def tokenize_chunk(start: int, pairs: list[Pair]) -> Chunk:
    """Tokenise pairs and append their arrays to the file."""
    examples, bad, counts = tokenize_pairs(_worker["chat"], pairs, *_worker["lengths"])
    data = to_bytes(pairs, examples)
    with _worker["lock"], open(_worker["path"], "ab") as file:
        offset = file.tell()
        file.write(data)
        file.flush()  # a full disk is told here
    return Chunk(start, start + len(pairs), offset, len(data), bad, counts, _worker["chat"].endings)


# ----------------------------------------------------------------------------------------------------------------------
# Examples as bytes: a table of int32, then the ids of all their sequences, then spans, then content

COLUMNS = 1 + 2 + 2 * 3  # place of the pair; prompt: tokens, is_cut; each answer: tokens, is_cut, num_reasoning


def to_bytes(pairs: list[Pair], examples: list[Example]) -> bytes:
    """Examples of some of these pairs, in their order; a whole number of int32."""
    table, ids, spans, content, place = [], [], [], [], -1
    for example in examples:
        place = next(later for later in range(place + 1, len(pairs)) if pairs[later] is example.pair)
        row = [place, len(example.prompt_ids), example.prompt_is_cut]
        ids.append(example.prompt_ids)
        for response in (example.chosen, example.rejected):
            row += [len(response.ids), response.is_cut, response.num_reasoning]
            ids.append(response.ids)
            spans.append(response.spans_N2.ravel())
            content.append(response.content_N)
        table.append(row)
    parts = [np.array([len(table), *np.array(table, dtype=np.int64).ravel()], dtype=np.int32)]
    parts += [np.concatenate([np.zeros(0, np.int32), *arrays], dtype=np.int32, casting="equiv")
              for arrays in (ids, spans)]
    flags = np.concatenate([np.zeros(0, bool), *content], dtype=bool, casting="equiv").tobytes()
    return b"".join([*(part.tobytes() for part in parts), flags, bytes(-len(flags) % 4)])


def from_bytes(buffer, offset: int, pairs: list[Pair]) -> list[Example]:
    """The examples at `offset` of a buffer as `to_bytes` wrote them, their arrays views of it."""
    (count,) = np.frombuffer(buffer, np.int32, 1, offset).tolist()  # int32 would overflow in a file of 2 GiB
    table = np.frombuffer(buffer, np.int32, count * COLUMNS, offset + 4).reshape(count, COLUMNS).tolist()
    num_content = sum(row[3] + row[6] for row in table)
    num_ids = num_content + sum(row[1] for row in table)
    offset += 4 * (1 + count * COLUMNS)
    ids = np.frombuffer(buffer, np.int32, num_ids, offset)
    spans_N2 = np.frombuffer(buffer, np.int32, 2 * num_content, offset + 4 * num_ids).reshape(-1, 2)
    content_N = np.frombuffer(buffer, bool, num_content, offset + 4 * num_ids + 8 * num_content)
    examples, at, token = [], 0, 0
    for place, num_prompt, prompt_is_cut, *answers in table:
        prompt_ids, at = ids[at:at + num_prompt], at + num_prompt
        responses = []
        for num, is_cut, num_reasoning in (answers[:3], answers[3:]):
            responses.append(Response(ids[at:at + num], spans_N2[token:token + num], content_N[token:token + num],
                                      bool(is_cut), num_reasoning))
            at, token = at + num, token + num
        examples.append(Example(pairs[place], prompt_ids, *responses, bool(prompt_is_cut)))
    return examples


def merge(folder: Path, num_ranks: int, pairs: list[Pair], chat: Chat
          ) -> tuple[list[Example], list[BadRow], Counter]:
    """What all ranks of the node made, in the order of the pairs; `chat` learns what they found to end turns."""
    chunks = []
    for place in range(num_ranks):
        path = folder / f"{place}.tokens"
        if not path.stat().st_size:
            continue  # it had no chunk
        with open(path, "rb") as file:
            buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        chunks += [(chunk, buffer) for chunk in pickle.loads((folder / f"{place}.index").read_bytes())]
    examples, bad, counts = [], [], Counter()
    for chunk, buffer in sorted(chunks, key=lambda item: item[0].start):
        examples += from_bytes(buffer, chunk.offset, pairs[chunk.start:chunk.stop])
        bad += chunk.bad
        counts.update(chunk.counts)
        chat.endings.update(chunk.endings)
    return examples, bad, counts
