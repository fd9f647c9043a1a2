"""Every bit of what is kept in caches is checked when it is read."""

import json
import random

import numpy as np
import pytest
import torch
from runs_of_tests import read_rows
from safetensors.torch import save_file

import train
from twdpo.logps import LOGPS, STATES, read_logps, read_places, read_sides, write_cache
from twdpo.stored import Damaged, StoredTensors, write_tensors
from twdpo.weights_file import WeightsFile, cache_name, read_shard, stored_keys, write_meta, write_shard

TENSORS = {"a_N": torch.arange(7), "b_RLJ": torch.rand(2, 3, 4), "c_ND": torch.rand(3, 2).bfloat16(),
           "d_N": torch.zeros(0)}


def read_all(path) -> dict[str, torch.Tensor]:
    stored = StoredTensors(path)
    parts = {f"b{place}": stored.part("b_RLJ", place) for place in range(3)}
    return parts | {name: stored[name] for name in stored.shapes} | {"about": stored.about}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) and value.dtype == other[name].dtype if isinstance(value, torch.Tensor)
        else value == other[name] for name, value in one.items())


def test_what_is_written_is_read(tmp_path):
    write_tensors(tmp_path / "a", TENSORS, in_parts=("b_RLJ",), about="x")
    found = read_all(tmp_path / "a")
    assert found["about"] == "x" and all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert torch.equal(found["b1"], TENSORS["b_RLJ"][:, 1])
    write_tensors(tmp_path / "b", TENSORS, in_parts=("b_RLJ",), about="x")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_bit_of_a_file_is_checked(tmp_path):
    write_tensors(tmp_path / "whole", TENSORS, in_parts=("b_RLJ",), about="x")
    whole, data, harmless = read_all(tmp_path / "whole"), (tmp_path / "whole").read_bytes(), 0
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "bad").write_bytes(damaged)
        try:
            found = read_all(tmp_path / "bad")
        except Damaged:
            continue
        assert same(found, whole), bit
        harmless += 1
    assert harmless < 0.01 * 8 * len(data)  # white space around the header's end
    for cut in (0, 7, 100, len(data) - 1):
        (tmp_path / "bad").write_bytes(data[:cut])
        with pytest.raises(Damaged):
            read_all(tmp_path / "bad")
    save_file(TENSORS, tmp_path / "bad")
    with pytest.raises(Damaged, match="checksums are missing"):
        read_all(tmp_path / "bad")
    with pytest.raises(Damaged, match="No such file"):
        read_all(tmp_path / "none")


META = {"layers": [1, 2]}


def shard() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {"key_E": np.array([5, 7]), "length_E2": np.array([[2, 1], [1, 2]], dtype=np.int32),
            "ids_J": np.arange(6, dtype=np.int32), "spans_J2": np.arange(12, dtype=np.int32).reshape(-1, 2),
            "attention_RLJ": generator.random((2, 2, 6), dtype=np.float32),
            "verdict_ER2": generator.random((2, 2, 2), dtype=np.float32),
            "top_token_ER": np.zeros((2, 2), dtype=np.int32)}


def flip(path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def test_a_damaged_shard_is_removed_and_lengths_must_add_up(tmp_path, capsys):
    write_meta(tmp_path, META)
    path = tmp_path / "shard-00000-x.safetensors"
    write_shard(path, shard() | {"length_E2": np.array([[2, 1], [1, 3]], dtype=np.int32)}, META)
    with pytest.raises(Damaged, match="has 6 tokens, and its lengths say 7"):
        read_shard(path)
    write_shard(path, shard(), META)
    chosen, _ = WeightsFile(tmp_path, "1")[5]
    assert chosen.attention_LRJ.shape == (1, 2, 2)
    assert (chosen.attention_LRJ[0] == shard()["attention_RLJ"][:, 0, :2]).all()
    data, size = path.read_bytes(), path.stat().st_size
    for bit in random.Random(0).sample(range(8 * size), 100):
        flip(path, bit)
        assert stored_keys(tmp_path) in (set(), {5, 7})
        if path.exists():
            assert (WeightsFile(tmp_path, "1")[5][0].attention_LRJ == chosen.attention_LRJ).all(), bit
        else:
            assert f"{path} is damaged" in capsys.readouterr().out
        path.write_bytes(data)


def test_meta_is_made_again_where_the_shards_say_whose_it_was(tmp_path, capsys):
    write_meta(tmp_path, META)
    write_shard(tmp_path / "shard-00000-x.safetensors", shard(), META)
    for text in (None, "", '{"format"'):
        (tmp_path / "meta.json").unlink() if text is None else (tmp_path / "meta.json").write_text(text)
        with pytest.raises(ValueError, match="choose another folder"):
            write_meta(tmp_path, META | {"layers": [1]})
        write_meta(tmp_path, META)
        assert "written anew" in capsys.readouterr().out
        assert json.loads((tmp_path / "meta.json").read_text())["layers"] == [1, 2]
    own = tmp_path / cache_name(META)  # a folder of the cache can hold nothing else
    write_meta(own, META)
    (own / "meta.json").write_text((own / "meta.json").read_text().replace("layers", "lbyers"))
    write_meta(own, META)
    assert "is not as it was written" in capsys.readouterr().out
    assert json.loads((own / "meta.json").read_text())["layers"] == [1, 2]
    (own / "meta.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="no meta.json that can be read"):
        WeightsFile(own)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/meta.json").touch()
    write_meta(tmp_path / "empty", META)
    (tmp_path / "empty/meta.json").unlink()
    (tmp_path / "empty/letter").touch()
    with pytest.raises(ValueError, match="choose another folder"):
        write_meta(tmp_path / "empty", META)


@pytest.mark.parametrize("kind", [LOGPS, STATES])
def test_every_bit_of_the_logps_cache_is_checked(kind, tmp_path, capsys):
    shape = (4,) if kind == STATES else ()
    values = {key: (torch.rand(2, *shape), torch.rand(3, *shape)) for key in (3, 4)}
    write_cache(tmp_path, kind, values)
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 7):
        flip(path, bit)
        try:
            if kind == LOGPS:
                found = {key: tuple(map(torch.from_numpy, sides))
                         for key, sides in read_logps(tmp_path, {3, 4}).items()}
            else:
                places = read_places(tmp_path, kind)
                found = dict(zip(places, read_sides(places.values(), kind)))
            assert all(torch.equal(*pair) for key, sides in found.items() for pair in zip(sides, values[key])), bit
        except Damaged as error:
            assert kind == STATES and "is not as it was written" in str(error)
        path.write_bytes(data)


def test_damaged_caches_of_a_run_are_made_again(tmp_path, run_arguments, capsys):
    argv = run_arguments(tmp_path / "run", cache_dir=tmp_path / "cache", max_steps=1)
    train.main(argv)
    expected = read_rows(tmp_path / "run")
    for name in ("weights/*/shard-*", "reference/*/logps-*"):
        for path in (tmp_path / "cache").glob(name):
            flip(path, 8 * path.stat().st_size - 12)  # of the last value
    for path in (tmp_path / "cache").glob("weights/*/meta.json"):
        path.write_text("")
    capsys.readouterr()
    train.main([*argv, "--overwrite"])
    printed = capsys.readouterr().out
    assert printed.count("is damaged") == 3 and "meta.json is missing or can't be read: written anew" in printed
    assert read_rows(tmp_path / "run") == expected
