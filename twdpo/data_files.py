"""Rows as files, folders, saved data sets and the hub hold them, one after the other, by split; lines that are no rows.

A source is FILE, FOLDER, ID[@REVISION][:[CONFIG][/SPLIT]] or toy, and at its very end may stand :SHARE.
"""

import csv
import gzip
import importlib
import itertools
import json
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from twdpo.config import PAPER_DATA, TrainConfig
from twdpo.flags import InputError
from twdpo.toy.grammar import toy_rows

TRAIN_SPLITS = ("train_prefs", "train")
TEST_SPLITS = ("test_prefs", "test")
# What the name of a file in a folder may begin with, and the split that it then is of.
SPLIT_NAMES = {name: name for name in TRAIN_SPLITS + TEST_SPLITS}
SPLIT_NAMES |= dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation")
OTHER_KINDS = (".gz", ".zst", ".zip", ".txt", ".tsv", ".arrow", ".xlsx")  # names of files that are not read, not of ids
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
PARQUET_ROWS = 1024  # read at once


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, and why."""

    where: str
    reason: str
    row: object


Row = tuple[str, object] | BadRow  # (FILE:LINE, value)


@dataclass(frozen=True)
class Source:
    """One place that rows come from. name: a path, a hub id or `toy`; share: how many of its rows are read.

    split: "" is the one that is asked for; config, revision: of a hub id alone. flag: what named it, for messages.
    """

    name: str
    revision: str = ""
    config: str = ""
    split: str = ""
    share: float = 1.0
    flag: str = field(default="--data", compare=False)

    def __str__(self) -> str:
        """As a flag spells it."""
        part = self.config + f"/{self.split}" * bool(self.split)
        return (self.name + f"@{self.revision}" * bool(self.revision) + f":{part}" * bool(part)
                + f":{self.share!r}" * (self.share < 1))


def parse_sources(text: str, flag: str = "--data") -> tuple[Source, ...]:
    """The sources that a flag names, separated by commas; nothing is opened. Raises InputError.

    A path that exists is taken as it is, whatever commas and colons it has.
    """
    parts, sources, place = text.split(","), [], 0
    while place < len(parts):
        ends = range(len(parts), place + 1, -1)  # the longest path of several parts, or one part
        stop = next((end for end in ends if is_path(",".join(parts[place:end]))), place + 1)
        sources.append(parse_source(",".join(parts[place:stop]).strip(), text, flag))
        place = stop
    return tuple(sources)


def is_path(item: str) -> bool:
    """Whether an item is a path that exists, with or without a split and a share behind it."""
    name = split_share(item.strip())[0]
    head, _, part = name.rpartition(":")
    return exists(name) or exists(head) and "," not in part


def exists(name: str) -> bool:
    return bool(name) and os.path.exists(os.path.expanduser(name))  # the shell expands no ~ after a comma


def split_share(item: str) -> tuple[str, str]:
    """(what stands before the share, the share's number or "")."""
    name, _, number = item.rpartition(":")
    return (name, number) if NUMBER.fullmatch(number) and name and not exists(item) else (item, "")


def parse_source(item: str, text: str, flag: str) -> Source:
    """One item of `text`."""
    name, number = split_share(item)
    share = float(number or 1)
    if not name or name.startswith(":"):
        raise InputError(f"{flag} {text!r}: a name is missing before, between or after commas; write A,B")
    if not 0 < share <= 1:
        raise InputError(f"{flag} {item}: the share {number} must be more than 0 and at most 1 (a config of the hub "
                         f"that is a number is written with its split: ID:{number}/train)")
    head, _, part = name.rpartition(":")
    if not exists(name) and exists(head):
        if not re.fullmatch("/[^/]+", part):
            raise InputError(f"{flag} {item}: {head} is a path, after it :/SPLIT and :SHARE may stand, not {part!r}")
        return Source(os.path.expanduser(head), split=part[1:], share=share, flag=flag)
    if exists(name):
        return Source(os.path.expanduser(name), share=share, flag=flag)
    name, colon, part = name.partition(":")
    name, at, revision = name.partition("@")
    config, slash, split = part.rpartition("/") if "/" in part else (part, "", "")
    if colon and not part or slash and not split or at and not revision:
        raise InputError(f"{flag} {item}: nothing stands after its {'@' if at and not revision else slash or colon}; "
                         "a data set of the hub is ID@REVISION:CONFIG/SPLIT, each part but ID may be left out")
    if name == "toy" and (at or config):
        raise InputError(f"{flag} {item}: the toy has neither revision nor config; write toy or toy:/train")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.lower().endswith(
            (*READERS, *OTHER_KINDS)):
        raise InputError(f"{flag} {item}: no such file or folder ({name}, seen from {os.getcwd()}): mend the path")
    return Source(name, revision, config, split, share, flag)


def read_rows(sources: tuple[Source, ...], splits: tuple[str, ...], seed: int = TrainConfig.seed) -> Iterator[Row]:
    """The rows of all sources in order: (FILE:LINE, value), or what is no row. Raises InputError, also on the way.

    splits: the first of them that a source has is read, unless the source names its own. seed: draws the rows of
    shares, the same for the same number of rows in a file or split of that name.
    """
    for source in sources:
        found = open_splits(source)
        split = next((name for name in ((source.split,) if source.split else splits) if name in found), None)
        if split is None:
            wanted = f"no split {source.split}" if source.split else f"none of the splits {', '.join(splits)}"
            raise InputError(f"{source.flag} {source}: {wanted} is there; it has {', '.join(found)}. Name one of them "
                             f"as {source.name}:/{next(iter(found), 'SPLIT')}")
        yield from draw(found[split], source, seed)


def draw(read: Callable[[], Iterable[Row]], source: Source, seed: int) -> Iterator[Row]:
    """A source's share of the rows that `read()` gives, in their order; without a share all of them.

    They are counted first, so that it is the share to the row (at least one).
    """
    if source.share == 1:
        yield from read()
        return
    left = sum(1 for _ in read())
    wanted = max(1, round(source.share * left))
    rng = random.Random(f"{seed}:{Path(source.name).name}")
    for row in read():
        if rng.random() * left < wanted:
            wanted -= 1
            yield row
        left -= 1


def with_test_split(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Those with a test split of their own, whole. One whose split is named has no other."""
    return tuple(replace(source, share=1.0) for source in sources
                 if not source.split and any(name in open_splits(source) for name in TEST_SPLITS))


def resolved_name(text: str) -> str:
    """What a flag names, every hub id with the revision that was loaded, where the library says it."""
    sources = parse_sources(text) if text else ()
    resolved = [replace(source, revision=loaded_revision(source)) if is_of_hub(source) else source
                for source in sources]
    return text if list(sources) == resolved else ",".join(map(str, resolved))


def local_files(sources: tuple[Source, ...]) -> set[Path]:
    """The files that are read, of those sources that are files or folders of files."""
    paths = [Path(source.name) for source in sources if source.name != "toy"]
    files = [path for path in paths if path.is_file()]
    files += [file for path in paths if path.is_dir() and not is_saved(path) for file in files_of_folder(path)]
    return {path.resolve() for path in files}


# ----------------------------------------------------------------------------------------------------------------------
# Sources to rows by split

def is_of_hub(source: Source) -> bool:
    return source.name != "toy" and not exists(source.name)


def open_splits(source: Source) -> dict[str, Callable[[], Iterable[Row]]]:
    """What reads a source's rows, by split; a file and a folder without splits are `train`. Raises InputError."""
    path = Path(source.name)
    if source.name == "toy":
        splits = dict(zip(("train", "test"), toy_rows()))
        return {name: partial(numbered, f"toy[{name}]", rows) for name, rows in splits.items()}
    if is_of_hub(source):
        label = replace(source, split="", share=1.0)  # rows of two configs are not of one name
        return {name: partial(of_arrow, f"{label}[{name}]", rows) for name, rows in load_hub(source).items()}
    if path.is_file():
        return {"train": partial(read_files, [path])}
    if is_saved(path):
        loaded = load_saved(source)
        if not isinstance(loaded, dict):
            return {"train": partial(of_arrow, path, loaded)}
        return {name: partial(of_arrow, f"{path}[{name}]", rows) for name, rows in loaded.items()}
    splits: dict[str, list[Path]] = {}
    files = files_of_folder(path)
    if not files:
        raise InputError(f"{source.flag} {source}: the folder holds no {', '.join(READERS)} and was not written by "
                         "save_to_disk; name one that does")
    for file in files:
        splits.setdefault(split_of_file(file.relative_to(path)), []).append(file)
    return {name: partial(read_files, files) for name, files in splits.items()}


def numbered(label: object, rows: Iterable[object]) -> Iterator[Row]:
    """Rows by their 1-based number."""
    for number, row in enumerate(rows, 1):
        yield f"{label}:{number}", row


def of_arrow(label: object, rows: Iterable[dict[str, object]]) -> Iterator[Row]:
    """Rows of a table, by their number. There all objects of a column have the keys of any; those that one lacks are
    null, and left out here: a template would print them in tools and arguments of calls."""
    def without_nulls(value):
        if isinstance(value, dict):
            return {key: without_nulls(each) for key, each in value.items() if each is not None}
        return list(map(without_nulls, value)) if isinstance(value, list) else value
    for where, row in numbered(label, rows):
        yield where, {column: without_nulls(value) for column, value in row.items()}


def files_of_folder(folder: Path) -> list[Path]:
    """Its files of rows and those of folders in it, sorted; hidden ones and the `datasets` library's notes are none."""
    return sorted(path for path in folder.rglob("*") if path.name.lower().endswith(tuple(READERS)) and path.is_file()
                  and not any(part.startswith(".") for part in path.relative_to(folder).parts)
                  and path.name not in ("dataset_info.json", "dataset_infos.json"))


def split_of_file(path: Path) -> str:
    """The split that a file's name begins with, as a whole word, or else that of the folder that it stands in, and so
    on; `train` where all begin with none. path: seen from the folder that is read."""
    for part in reversed(path.parts):
        for name in sorted(SPLIT_NAMES, key=len, reverse=True):
            if re.match(name + r"(?![a-z])", part.lower()):
                return SPLIT_NAMES[name]
    return "train"


def import_extra(module: str, source: object, what: str):
    """A library of the extra [hub]. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{source}: {what} needs the library {module.partition('.')[0]}: pip install -e '.[hub]', or "
                         f"pip install {module.partition('.')[0]}") from error


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the `datasets` library wrote it: a DatasetDict or a single Dataset."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_saved(source: Source):
    """Rows by split, or of a single Dataset its rows; read from disk when they are asked for."""
    datasets = import_extra("datasets", f"{source.flag} {source}", "a folder of save_to_disk")
    try:
        return undecoded(datasets.load_from_disk(source.name).with_format(None))  # whatever they were for
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source.flag} {source}: it can't be read, save it again ({error})") from error


def load_hub(source: Source):
    """A data set of the hub, rows by split; read from the library's cache when they are asked for."""
    paper = " (what the paper trains on; name your own pairs with --data FILE)" * (source.name in PAPER_DATA.values())
    datasets = import_extra("datasets", f"{source.flag} {source}{paper} is no file or folder here",
                            "a data set of the hub")
    options = {name: value for name, value in (("name", source.config), ("revision", source.revision)) if value}
    try:
        return undecoded(datasets.load_dataset(source.name, **options))
    except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
        raise InputError(f"{source.flag} {source}: no file or folder here, and it can't be loaded from the hub "
                         f"({error}). Is there a network, is HF_HUB_OFFLINE unset, have you access? Or name pairs of "
                         "your own with --data FILE") from error


def undecoded(loaded):
    """A loaded data set whose images and audio stay bytes: to decode them takes packages that no text needs."""
    if isinstance(loaded, dict):
        return type(loaded)({name: undecoded(rows) for name, rows in loaded.items()})
    for name, feature in (getattr(loaded, "features", None) or {}).items():
        if type(feature).__name__ in ("Image", "Audio", "Video"):
            loaded = loaded.cast_column(name, type(feature)(decode=False))
    return loaded


def loaded_revision(source: Source) -> str:
    """The commit that a hub id is loaded at, where the library says it; else as it was named."""
    for rows in load_hub(source).values():
        for address in rows.info.download_checksums or {}:  # hf://datasets/ID@REVISION/FILE
            if match := re.search(r"@([0-9a-f]{40})/", address):
                return match[1]
    return source.revision


# ----------------------------------------------------------------------------------------------------------------------
# Files to rows

def read_files(paths: list[Path]) -> Iterator[Row]:
    return itertools.chain.from_iterable(map(read_file, paths))


def read_file(path: Path) -> Iterator[Row]:
    """The rows of one file: (FILE:LINE, value), or what is no row. Raises InputError."""
    reader = next((read for kind, read in READERS.items() if path.name.lower().endswith(kind)), None)
    if reader is None:
        what = "no such file" if not path.exists() else (
            f"files of this kind are not read; turn it into one of {', '.join(READERS)}")
        raise InputError(f"{path}: {what}")
    try:
        yield from reader(path)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: it can't be read to its end ({error})") from error


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON value a line; blank lines are skipped, line numbers count them."""
    with (gzip.open if path.name.lower().endswith(".gz") else open)(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError, JSONDecodeError, lists in lists in ...
                yield BadRow(f"{path}:{number}", f"not JSON: {error}", line.rstrip(b"\n").decode("utf-8", "replace"))


def read_json(path: Path) -> Iterator[Row]:
    """A JSON list, held whole; numbers are those of its items, from 1."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        hint = "; a file of one value a line is a .jsonl: rename it" if "Extra data" in str(error) else ""
        raise InputError(f"{path}: not JSON ({error}){hint}") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: it must hold a JSON list of rows, not {type(rows).__name__}")
    return numbered(path, rows)


def read_parquet(path: Path) -> Iterator[Row]:
    """Numbers are those of the rows, from 1."""
    parquet = import_extra("pyarrow.parquet", path, "a .parquet file")
    arrow = import_extra("pyarrow", path, "a .parquet file")
    try:
        with parquet.ParquetFile(path) as file:
            yield from of_arrow(path, (row for batch in file.iter_batches(PARQUET_ROWS) for row in batch.to_pylist()))
    except arrow.ArrowException as error:
        raise InputError(f"{path}: not a whole .parquet file ({error})") from error


def read_csv(path: Path) -> Iterator[Row]:
    """Comma-separated, the first row names the columns, all values are text. Numbers are those of the lines that rows
    begin at, line breaks in quotes counted."""
    csv.field_size_limit(sys.maxsize)  # of 128 kB otherwise
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader, names = csv.reader(file, strict=True), None
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                yield BadRow(where, f"not CSV: {error}", None)
                continue
            if values is None:
                return
            if names is None:
                names = values
                if len(set(names)) < len(names):
                    raise InputError(f"{path}: its first row must name the columns, each once; it is {values!r:.200}")
            elif len(values) not in (0, len(names)):  # 0: a blank line
                yield BadRow(where, f"{len(values)} values, but the first row names {len(names)} columns", values)
            elif values:
                try:
                    ",".join(values).encode()
                    yield where, dict(zip(names, values))
                except UnicodeEncodeError:
                    yield BadRow(where, "not UTF-8", [value.encode("utf-8", "replace").decode() for value in values])


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".jsonl.gz": read_jsonl,
    ".parquet": read_parquet,
    ".csv": read_csv,
}
