"""Sources of rows: how --data names them, what each form gives and where its rows stand, shares, splits, errors."""

import gzip
import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from twdpo.authors_columns import export_columns
from twdpo.data_files import (
    TEST_SPLITS,
    TRAIN_SPLITS,
    BadRow,
    Source,
    local_files,
    parse_sources,
    read_rows,
    resolved_name,
    with_test_split,
)
from twdpo.dataset import load_dataset
from twdpo.flags import InputError
from twdpo.forms import AS_NAMED, parse_row, read_pairs

REVISION = "c" * 40


def rows_of(count: int, start: int = 0) -> list[dict]:
    return [{"prompt": f"why {number}", "chosen": "so", "rejected": "no\nno"} for number in range(start, start + count)]


def write(path: Path, rows: list[dict]) -> Path:
    """Rows in the form that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".csv":
        cells = [",".join(f'"{value}"' for value in row.values()) for row in [dict(zip(rows[0], rows[0])), *rows]]
        path.write_bytes(("\ufeff" + "\r\n".join(cells) + "\r\n").encode())
    elif path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else lines)
    return path


def read(text: str, splits=TRAIN_SPLITS, seed: int = 1) -> list:
    return list(read_rows(parse_sources(text), splits, seed))


@pytest.mark.parametrize("text, expected", [
    ("org/x", Source("org/x")),
    ("x@refs/pr/3:conf/train", Source("x", "refs/pr/3", "conf", "train")),
    ("x:conf", Source("x", config="conf")),
    ("x:/train:.5", Source("x", split="train", share=0.5)),
    ("x@v1:0.25", Source("x", "v1", share=0.25)),
    ("x:conf:1", Source("x", config="conf")),
    ("x:2024/train", Source("x", config="2024", split="train")),
    ("toy:/test", Source("toy", split="test")),
])
def test_every_part_of_a_source_but_its_name_may_be_left_out(text, expected):
    (source,) = parse_sources(text)
    assert source == expected and parse_sources(str(source)) == (source,)


def test_paths_that_exist_are_taken_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b:0.5", "a.jsonl", "b.jsonl", "a"):
        write(Path(name), rows_of(1))
    assert parse_sources("a,b:0.5") == (Source("a,b:0.5"),)
    assert parse_sources("a,b:0.5:0.5,a.jsonl:0.5, b.jsonl") == (
        Source("a,b:0.5", share=0.5), Source("a.jsonl", share=0.5), Source("b.jsonl"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_sources("a,~/b.jsonl") == (Source("a"), Source(f"{tmp_path}/b.jsonl"))


@pytest.mark.parametrize("text, message", [
    ("", "a name is missing"), ("x,", "'x,': a name is missing"), (":0.3", "a name is missing"),
    ("x:0", "x:0: the share 0 must be more than 0"), ("x:1.5", "the share 1.5 must"), ("x:-1", "the share -1 must"),
    ("x:", "nothing stands after its :"), ("x:conf/", "nothing stands after its /"), ("x@", "stands after its @"),
    ("x.csv", "no such file or folder .x.csv, seen from"), ("./x", "no such file"), ("a/b/c", "no such file"),
    ("x.tsv", "no such file"), ("toy:conf", "neither revision nor config"), (f"{__file__}:conf", "is a path, after it"),
    (f"{__file__}:/train", "files of this kind are not read; turn it into one of .jsonl"),
])
def test_what_is_no_source_says_what_to_write(text, message):
    with pytest.raises(InputError, match="^(--data|/).*" + message):
        read(text)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "csv"])
def test_all_forms_give_the_same_rows(kind, tmp_path):
    path = write(tmp_path / f"pairs.{kind}", rows_of(3))
    first, line = (2, 2) if kind == "csv" else (1, 1)  # a header; each row of two lines
    assert read(str(path)) == [(f"{path}:{first + line * number}", row) for number, row in enumerate(rows_of(3))]


def test_lines_of_csv_are_those_that_rows_begin_at(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b'prompt,chosen,rejected\n"a\n\nb",so,no\n\nlong,so,no,more\nc,s\xff,no\nd,so\n"e"f,so,no\ng,'
                     + b"x" * 200_000 + b',\n"never closed,so,no\n')
    rows = read(str(path))
    assert [row.where if isinstance(row, BadRow) else row[0] for row in rows] == [
        f"{path}:{number}" for number in (2, 6, 7, 8, 9, 10, 11)]
    assert rows[0][1] == {"prompt": "a\n\nb", "chosen": "so", "rejected": "no"} and len(rows[5][1]["chosen"]) == 200_000
    assert [row.reason for row in rows if isinstance(row, BadRow)] == [
        "4 values, but the first row names 3 columns", "not UTF-8", "2 values, but the first row names 3 columns",
        "not CSV: ',' expected after '\"'", "not CSV: unexpected end of data"]
    path.write_text("a,a\n1,2\n")
    with pytest.raises(InputError, match="each once; it is .'a', 'a'."):
        read(str(path))


def test_lines_of_gz_are_those_of_the_text(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n[\n{"a": 2}'))
    assert [row if isinstance(row, tuple) else row.where for row in read(str(path))] == [
        (f"{path}:1", {"a": 1}), f"{path}:3", (f"{path}:4", {"a": 2})]
    path.write_bytes(gzip.compress(json.dumps(rows_of(500)).encode())[:-20])
    with pytest.raises(InputError, match="x.jsonl.gz: it can't be read to its end"):
        read(str(path))


def test_json_lines_in_a_json_file_are_told_apart(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(InputError, match="is a .jsonl: rename it"):
        read(str(tmp_path / "x.json"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "csv"])
def test_a_file_is_never_held_whole(kind, tmp_path):
    path = write(tmp_path / f"x.{kind}", [row | {"chosen": "so " * 1000} for row in rows_of(5000)])
    tracemalloc.start()
    try:
        assert sum(len(row["chosen"]) for _, row in read_rows(parse_sources(str(path)), TRAIN_SPLITS)) == 15e6
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_what_is_wrong_with_a_source_is_said_when_it_is_its_turn(tmp_path):
    path = write(tmp_path / "x.jsonl", rows_of(1))
    (tmp_path / "y.jsonl").mkdir()
    rows = read_rows(parse_sources(f"{path},{tmp_path / 'y.jsonl'}"), TRAIN_SPLITS)
    assert next(rows)[0] == f"{path}:1"
    with pytest.raises(InputError, match="the folder holds no .jsonl"):
        next(rows)


def test_a_folder_is_its_files_by_the_splits_in_their_names(tmp_path):
    for place, name in enumerate(("data/train-00001-of-2.jsonl", "data/train-00000-of-2.csv", "more.json",
                                  "testimony.jsonl", "test_b.jsonl.gz", "test.jsonl", "validation.jsonl",
                                  ".cache/x.jsonl", "dataset_infos.json", "notes.txt")):
        write(tmp_path / name, rows_of(1, place))
    numbers = {splits: [int(row["prompt"][4:]) for _, row in read(str(tmp_path), splits)]
               for splits in (TRAIN_SPLITS, TEST_SPLITS)}
    assert numbers == {TRAIN_SPLITS: [1, 0, 2, 3], TEST_SPLITS: [5, 4]}
    assert [row["prompt"] for _, row in read(f"{tmp_path}:/validation")] == ["why 6"]
    dataset = load_dataset(str(tmp_path), "")
    assert len(dataset.train) == 4 and [pair.where for pair in dataset.held_out] == [
        f"{tmp_path}/test.jsonl:1", f"{tmp_path}/test_b.jsonl.gz:1"]
    for place, name in enumerate(("test/a.jsonl", "data/test/deep/b.jsonl", "test/train.jsonl", "tests/x.jsonl")):
        write(tmp_path / "nested" / name, rows_of(1, place))
    numbers = [[row["prompt"] for _, row in read(f"{tmp_path}/nested", splits)] for splits in
               (TRAIN_SPLITS, TEST_SPLITS)]
    assert numbers == [["why 2", "why 3"], ["why 1", "why 0"]]
    assert len(read(f"{tmp_path}/nested/data/test")) == 1  # the folder that is named itself says nothing
    shutil.rmtree(tmp_path / "nested")
    write(tmp_path / "train_prefs.jsonl", rows_of(1, 10))  # as of the hub, it comes before train
    assert [row["prompt"] for _, row in read(str(tmp_path))] == ["why 10"]
    with pytest.raises(InputError, match="no split dev is there; it has .*Name one of them as .*:/"):
        read(f"{tmp_path}:/dev")


def test_a_share_is_drawn_by_the_seed_and_keeps_the_order(tmp_path):
    path, other = write(tmp_path / "x.jsonl", rows_of(200)), write(tmp_path / "b.jsonl", rows_of(3))
    whole = read(str(path))
    drawn = read(f"{path}:0.3")
    assert len(drawn) == 60 and drawn == [row for row in whole if row in drawn]
    assert read(f"{path}:0.3") == drawn != read(f"{path}:0.3", seed=2)
    assert read(f"{path}:0.3,{other}") == drawn + read(str(other)) and len(read(f"{other}:0.01")) == 1
    assert any(int(row["prompt"][4:]) > 150 for _, row in drawn) and any(row in drawn for row in whole[:50])
    pairs = load_dataset(f"{path}:0.3", "", seed=1).train
    assert [pair.where for pair in pairs] == [where for where, _ in drawn]


def test_held_out_rows_are_those_of_all_sources_with_a_test_split(tmp_path):
    """Shares are of training rows, also in the export, whose rows stand as they were read."""
    path = write(tmp_path / "x.jsonl", rows_of(4))
    for name in ("train", "test"):
        write(tmp_path / f"folder/{name}.jsonl", rows_of(10, 10))
    text = f"{path},toy:0.1,{tmp_path / 'folder'}:0.5,toy:/train:0.1"
    sources = parse_sources(text)
    assert [str(source) for source in with_test_split(sources)] == ["toy", f"{tmp_path / 'folder'}"]
    dataset = load_dataset(text, "")
    toy = len(load_dataset("toy", "").held_out)
    assert len(dataset.held_out) == toy + 10 and dataset.held_out[-1].where == f"{tmp_path}/folder/test.jsonl:10"
    assert local_files(sources) == {path, tmp_path / "folder/train.jsonl", tmp_path / "folder/test.jsonl"}
    stored = type("Stored", (), {"layers": ["1"], "__contains__": lambda self, key: False})()
    out = tmp_path / "out.jsonl"
    count, missing = export_columns(out, read_rows(sources, TRAIN_SPLITS), stored, None, "raw", AS_NAMED)
    lines = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert count == missing == len(lines) and lines == [pair.messages[0][1] for pair in dataset.train]


# --- what needs libraries


@pytest.mark.parametrize("library, name", [("pyarrow", "x.parquet"), ("datasets", "saved"), ("datasets", "org/pairs")])
def test_a_library_that_is_missing_is_named_with_its_extra(library, name, tmp_path, monkeypatch):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/dataset_dict.json").write_text("{}")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.parquet", None)
    with pytest.raises(InputError, match=rf"{name}.* needs the library {library}: pip install -e '.\[hub\]', or pip"):
        read(name if "/" in name else str(tmp_path / name))


@pytest.mark.parametrize("name", ["x.parquet", "saved", "x.jsonl"])
def test_keys_that_only_other_rows_have_are_not_printed(tmp_path, name):
    def row(tool, **arguments):
        function = {"name": tool, "parameters": {key: {"type": "string"} for key in arguments}}
        calls = [{"function": {"name": tool, "arguments": arguments}}]
        call = {"role": "assistant", "content": None, "tool_calls": calls}
        return {"prompt": [{"role": "user", "content": "why"}, call, {"role": "tool", "content": "so"}],
                "tools": [{"type": "function", "function": function}], "chosen": "so", "rejected": "no"}
    rows = [row("look", zone="a"), row("add", first="1", second="2")]
    if name == "saved":
        pytest.importorskip("datasets").Dataset.from_list(rows).save_to_disk(tmp_path / name)
    else:
        write(tmp_path / name, rows)
    pairs = load_dataset(str(tmp_path / name), "").train
    assert [pair.key for pair in pairs] == [parse_row("x:1", row).key for row in rows]
    write(tmp_path / "y.jsonl", [row("look", zone=None)])  # said in a JSON file it stays
    assert '"zone": null' in load_dataset(str(tmp_path / "y.jsonl"), "").train[0].extras


def test_a_parquet_file_that_is_none(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_bytes(b"PAR1" * 100)
    with pytest.raises(InputError, match="x.parquet: not a whole .parquet file"):
        read(str(tmp_path / "x.parquet"))


def test_saved_data_sets_have_the_splits_of_the_hub(tmp_path):
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_list(rows_of(2, start)) for name, start in
             (("train_sft", 0), ("train_prefs", 10), ("test_prefs", 20), ("test_sft", 30))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "dict")
    parts["test_sft"].save_to_disk(tmp_path / "single")
    dataset = load_dataset(f"{tmp_path}/dict,{tmp_path}/single", "")
    assert [pair.where for pair in dataset.train] == [
        f"{tmp_path}/dict[train_prefs]:1", f"{tmp_path}/dict[train_prefs]:2", f"{tmp_path}/single:1",
        f"{tmp_path}/single:2"]
    assert dataset.train[0].messages == (("user", "why 10"),)
    assert [pair.where for pair in dataset.held_out] == [f"{tmp_path}/dict[test_prefs]:{number}" for number in (1, 2)]
    assert read(f"{tmp_path}/dict:/test_sft")[1] == (f"{tmp_path}/dict[test_sft]:2", rows_of(1, 31)[0])
    datasets.Dataset.from_list([row | {"score": 1.5} for row in rows_of(2)]).with_format(
        "numpy", columns=["score"]).save_to_disk(tmp_path / "formatted")
    assert [row for _, row in read(f"{tmp_path}/formatted")] == [row | {"score": 1.5} for row in rows_of(2)]
    (tmp_path / "single/state.json").write_text("{")
    with pytest.raises(InputError, match="it can't be read, save it again"):
        read(f"{tmp_path}/single")


def test_hub_ids_are_loaded_by_their_parts(monkeypatch):
    asked = []

    class Split(list):
        info = SimpleNamespace(download_checksums={f"hf://datasets/org/pairs@{REVISION}/x.parquet": {}})

    def load_dataset(repository, **options):
        asked.append((repository, options))
        if repository == "org/none":
            raise ValueError("unknown")
        if repository == "org/script":  # as of the library since its version 4
            raise RuntimeError("scripts are no longer supported")
        return {"train_sft": Split(rows_of(1)), "train": Split(rows_of(10, 10)), "test": Split(rows_of(1, 20))}
    datasets = ModuleType("datasets")
    datasets.load_dataset, datasets.exceptions = load_dataset, SimpleNamespace(DatasetsError=OSError)
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    text = "org/pairs@v1:conf/train:0.5,toy:0.5,org/pairs"
    rows = read(text)
    assert asked == [("org/pairs", {"name": "conf", "revision": "v1"}), ("org/pairs", {})]
    assert rows[-1] == ("org/pairs[train]:10", rows_of(1, 19)[0])
    assert sum(where.startswith("org/pairs") for where, _ in rows) == 5 + 10
    assert [str(source) for source in with_test_split(parse_sources(text))] == ["toy", "org/pairs"]
    resolved = resolved_name(text)
    assert resolved == f"org/pairs@{REVISION}:conf/train:0.5,toy:0.5,org/pairs@{REVISION}"
    assert [row for _, row in read(resolved)] == [row for _, row in rows] and resolved_name(resolved) == resolved
    names = [where for where, _ in read("org/pairs:a/train,org/pairs:b/train,org/pairs@v1:b/train")]
    assert len(set(names)) == 30 and names[0] == "org/pairs:a[train]:1"
    with pytest.raises(InputError, match="no file or folder here, and it can't be loaded from the hub .unknown."):
        read("org/none")
    with pytest.raises(InputError, match="can't be loaded from the hub .scripts are no longer supported"):
        read("org/script")
    with pytest.raises(InputError, match="none of the splits test_prefs is there; it has train_sft, train, test. Name"):
        read("org/pairs", ("test_prefs",))


def test_images_of_a_saved_data_set_are_refused_by_name(tmp_path):
    """Also where the package that decodes them is missing."""
    datasets, arrow = pytest.importorskip("datasets"), pytest.importorskip("pyarrow")
    features = datasets.Features({name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")}
                                 | {"image": datasets.Image()})
    columns = {name: ["x"] for name in ("prompt", "chosen", "rejected")} | {"image": [{"bytes": b"x", "path": None}]}
    table = arrow.table(columns).select(list(features)).cast(features.arrow_schema)
    datasets.Dataset(table, info=datasets.DatasetInfo(features=features)).save_to_disk(str(tmp_path / "saved"))
    pairs, (bad,), _ = read_pairs(read_rows(parse_sources(str(tmp_path / "saved")), TRAIN_SPLITS), AS_NAMED)
    assert not pairs and "image" in bad.reason
