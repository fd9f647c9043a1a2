"""The weights file: a folder with the judge's raw attention, from which every post-processing is made later.

    meta.json                what the rows depend on: model, tokenizer, prompt, layers, data
    shard-NNNNN-HASH.safetensors
                             E pairs each, J judge tokens of all their answers (chosen, then rejected, pair by pair):
        key_E                int64 content key of the pair (twdpo.pairs.Pair.key)
        length_E2            int32 judge tokens of chosen and rejected
        ids_J, spans_J2      int32 id of each judge token, and the characters of the row's answer that it covers
        attention_RLJ        fp32 raw attention from the query, by round (0: chosen shown first) and stored layer; the
                             rollout, if it is stored, stands after the layers
        verdict_ER2          fp32 log-probability of A and of B at the query
        top_token_ER         int32 argmax over the whole vocabulary at the query
                             (these two only when the forward reached the model's last layer)

Shards are written to a temporary name and renamed: one that can be seen is complete.
"""

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from twdpo.files import hash_json, read_object, write_json
from twdpo.flags import InputError
from twdpo.stored import Damaged, StoredTensors, write_tensors

FORMAT_VERSION = 2  # 1 had no checksums
ROLLOUT = "rollout"  # stands among layers: attention rollout through all of them


@dataclass(frozen=True)
class JudgedAnswer:
    """Raw attention on the judge tokens of one answer, of the layers that were asked for."""

    ids_J: np.ndarray
    spans_J2: np.ndarray
    attention_LRJ: np.ndarray


def write_meta(directory: Path, meta: dict[str, object]) -> None:
    """Start a weights file, or check that `directory` holds the same extraction. Raises InputError when it does not."""
    directory = Path(directory)
    path, whole = directory / "meta.json", {"format": FORMAT_VERSION} | meta
    old = read_object(path)
    if old is None and (path.exists() or directory.is_dir() and any(is_foreign(each) for each in directory.iterdir())):
        # Its shards say what it was: a loss of power, or a hand, may take meta.json alone.
        shards = [about_shard(shard) for shard in shard_paths(directory)]
        if not (path.exists() or shards) or any(about not in (None, hash_json(meta)) for about in shards):
            raise InputError(f"{directory} is neither empty nor a weights file of this extraction (no meta.json that "
                             "can be read): choose another folder")
        print(f"warning: {path} is missing or can't be read: written anew")
    elif old not in (None, whole) and directory.name == cache_name(meta):
        print(f"warning: {path} is not as it was written: written anew")
        old = None
    elif old not in (None, whole):
        changed = [f"  {key}: was {old.get(key)!r}, is {whole.get(key)!r}"
                   for key in sorted(old.keys() | whole.keys()) if old.get(key) != whole.get(key)]
        raise InputError(f"{directory} holds another extraction; choose another folder. What differs:\n"
                         + "\n".join(changed))
    if old is None:
        write_json(path, whole)


def cache_name(meta: dict[str, object]) -> str:
    """The name of an extraction's folder in the cache, which so can hold no other one."""
    return hash_json(meta)[:24]


def is_foreign(path: Path) -> bool:
    """Whether a file in a folder without meta.json was put there by something else than a kill, or a row that was
    rejected."""
    return path.name != "rejected_rows.jsonl" and not path.name.startswith(".")


def about_shard(path: Path) -> str | None:
    """The hash of a shard's meta; None for one that is damaged."""
    try:
        return StoredTensors(path).about
    except Damaged:
        return None


def read_meta(directory: Path) -> dict[str, object]:
    """meta.json of a weights file. Raises InputError when it is not one, or of another format."""
    meta = read_object(Path(directory) / "meta.json")
    if meta is None or not isinstance(meta.get("layers"), list):
        raise InputError(f"{directory} is no weights file: it has no meta.json that can be read (run extract.py "
                         "into the same folder again, if it was one)")
    if meta.get("format") != FORMAT_VERSION:
        raise InputError(f"{directory} has format {meta.get('format')!r}, this code reads {FORMAT_VERSION}: extract "
                         "it again")
    return meta


def shard_path(directory: Path, number: int, keys: list[int]) -> Path:
    """Where a shard of these pairs goes; the name holds a hash of its content's keys."""
    return Path(directory) / f"shard-{number:05d}-{hash_json(keys)[:12]}.safetensors"


def write_shard(path: Path, arrays: dict[str, np.ndarray], meta: dict[str, object]) -> None:
    """Write one shard atomically. meta: that of `write_meta`, whose hash stands in the shard."""
    write_tensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, in_parts=("attention_RLJ",),
                  about=hash_json(meta))


def read_shard(path: Path, places: Collection[int] | None = None) -> dict[str, np.ndarray]:
    """The arrays of a shard, of attention that of the layers at these places (None: of all). Raises Damaged."""
    shard = StoredTensors(path)
    arrays = {name: shard[name].numpy() for name in shard.shapes if name != "attention_RLJ" or places is None}
    if places is not None:
        arrays["attention_RLJ"] = np.stack([shard.part("attention_RLJ", place).numpy() for place in places], axis=1)
    if missing := {"key_E", "length_E2", "spans_J2"} - arrays.keys():
        raise Damaged(f"it has no {min(missing)}")
    total = int(arrays["length_E2"].sum())
    for name, array in arrays.items():
        axis = name.rpartition("_")[2].find("J")
        if axis >= 0 and array.shape[axis] != total:
            raise Damaged(f"{name} has {array.shape[axis]} tokens, and its lengths say {total}")
    return arrays


def shard_paths(directory: Path) -> list[Path]:
    """Complete shards, in order of their names."""
    return sorted(Path(directory).glob("shard-*.safetensors"))


def stored_keys(directory: Path) -> set[int]:
    """Keys of all pairs that the weights file holds. A shard that is damaged is removed, with a word."""
    keys: set[int] = set()
    for path in shard_paths(directory):
        try:
            keys.update(read_shard(path)["key_E"].tolist())
        except Damaged as error:
            print(f"warning: {path} is damaged ({error}): removed, its pairs are extracted again")
            path.unlink(missing_ok=True)
    return keys


def parse_layer(text: str) -> tuple[list[str], bool]:
    """--layer: (names of layers, each once; whether their weights are summed). `8,16`: the mean of both, `8+16`: the
    sum. Raises InputError for both in one."""
    if "," in text and "+" in text:
        raise InputError(f"--layer is {text!r}: layers are separated by commas (their mean) or by + (their sum)")
    parts = [part.strip() for part in text.replace("+", ",").split(",")]
    return list(dict.fromkeys(str(int(part)) if part.isdigit() else part for part in parts)), "+" in text


def pick_layers(text: str, stored: list[str], where: str | Path) -> list[str]:
    """The stored layers that --layer names, each once. Raises InputError."""
    numbers = [name for name in stored if name.isdigit()]
    wanted = {"last": numbers[-1:], "all": numbers}.get(text.strip()) or parse_layer(text)[0]
    if set(wanted) - set(stored):
        raise InputError(f"--layer is {text!r}: {where} stores layers {', '.join(stored)}")
    return wanted


class WeightsFile:
    """A weights file opened for reading, the wanted layers of it in memory."""

    def __init__(self, directory: Path, layer: str = "last", keys: Collection[int] | None = None):
        """layer: `last` (the last one stored), `all` stored, 1-based layers separated by commas or +, or `rollout`.
        keys: of the pairs to read, if not all.

        Raises InputError for a layer that is not stored.
        """
        self.directory, self.meta = Path(directory), read_meta(directory)
        stored = list(map(str, self.meta["layers"]))
        self.layers = pick_layers(layer, stored, directory)
        places = [stored.index(name) for name in self.layers]
        self._answers: dict[int, tuple[JudgedAnswer, JudgedAnswer]] = {}
        self._verdicts: dict[int, np.ndarray] = {}
        self._top_tokens: dict[int, list[int]] = {}
        for path in shard_paths(directory):
            try:
                self._read(path, places, keys)
            except Damaged as error:
                raise InputError(f"{path} is damaged ({error}): run extract.py into the same folder again, which "
                                 "replaces it") from error

    def _read(self, path: Path, places: list[int], keys: Collection[int] | None) -> None:
        arrays = read_shard(path, places)
        attention_LRJ = arrays["attention_RLJ"].swapaxes(0, 1)
        ends = np.cumsum(arrays["length_E2"].reshape(-1)).tolist()
        for number, key in enumerate(arrays["key_E"].tolist()):
            if keys is not None and key not in keys:
                continue
            cuts = [slice(start, end) for start, end in
                    zip(([0] + ends)[2 * number:2 * number + 2], ends[2 * number:2 * number + 2])]
            self._answers[key] = tuple(JudgedAnswer(arrays["ids_J"][cut], arrays["spans_J2"][cut],
                                                    attention_LRJ[:, :, cut]) for cut in cuts)
            if keys is not None:  # a few views would keep whole shards in memory
                self._answers[key] = copy.deepcopy(self._answers[key])
            if "verdict_ER2" in arrays:
                self._verdicts[key] = arrays["verdict_ER2"][number]
                self._top_tokens[key] = arrays["top_token_ER"][number].tolist()

    def __contains__(self, key: int) -> bool:
        return key in self._answers

    def __getitem__(self, key: int) -> tuple[JudgedAnswer, JudgedAnswer]:
        """The chosen and the rejected answer of a pair."""
        return self._answers[key]

    def of_layer(self, layer: str) -> "WeightsFile":
        """The same in one of the layers that are in memory."""
        one, place = copy.copy(self), self.layers.index(layer)
        one.layers = [layer]
        one._answers = {key: tuple(replace(answer, attention_LRJ=answer.attention_LRJ[[place]]) for answer in answers)
                        for key, answers in self._answers.items()}
        return one

    def top_tokens(self, key: int) -> list[int] | None:
        """The likeliest token at the query of each round, over the whole vocabulary; None when it is not stored."""
        return self._top_tokens.get(key)

    @property
    def has_verdicts(self) -> bool:
        """Whether verdicts are stored: not when the layers that were wanted stop before them."""
        return bool(self._verdicts)

    def verdicts(self, keys: list[int]) -> np.ndarray:
        """What each round gives the letters A and B, as stored, [E, R, 2]; only where there are verdicts."""
        return np.stack([self._verdicts[key] for key in keys])

    def names_a(self, keys: list[int]) -> np.ndarray:
        """Whether each pair's verdicts are A, bool [E, R]; only where there are verdicts."""
        verdict_ER2 = self.verdicts(keys)
        return verdict_ER2[:, :, 0] > verdict_ER2[:, :, 1]

    def prefers_chosen(self, keys: list[int]) -> np.ndarray:
        """Whether each pair's verdicts are for the chosen answer, bool [E, R]; only where there are verdicts."""
        return self.names_a(keys) ^ np.array([False, True])  # round 1 shows the rejected answer first

    def is_consistent(self, keys: list[int]) -> np.ndarray:
        """Whether both verdicts of each pair are for the same answer, bool [E]; only where there are verdicts."""
        prefers_chosen_ER = self.prefers_chosen(keys)
        return prefers_chosen_ER[:, 0] == prefers_chosen_ER[:, 1]

    def verdict_statistics(self, keys: list[int]) -> dict[str, float]:
        """Over these pairs: share of equal verdicts in both rounds, and agreement with the label over both rounds.

        Empty when the layers that were wanted stop before the verdict.
        """
        if not self.has_verdicts:
            return {}
        return {"position consistency": float(self.is_consistent(keys).mean()),
                "agreement with the label": float(self.prefers_chosen(keys).mean())}


# ----------------------------------------------------------------------------------------------------------------------
# What the verdicts say of a judge

def describe_verdicts(stored: WeightsFile, keys: list[int]) -> str:
    """The verdict statistics of these pairs in a line, with the interval of the consistency; "" without verdicts."""
    parts = []
    for name, value in stored.verdict_statistics(keys).items():
        parts.append(f"{name} {value:.3f}")
        if name == "position consistency":
            low, high = wilson_interval(value, len(keys))
            parts[-1] += f" (95 % interval {low:.3f} to {high:.3f})"
    return ", ".join(parts)


def warn_of_verdicts(stored: WeightsFile, keys: list[int]) -> str:
    """What to say of a judge that does not compare, by the verdicts on these pairs: the 95 % interval of its position
    consistency lies below 0.5, which is what a coin has. "" of another, or without verdicts."""
    consistency = stored.verdict_statistics(keys).get("position consistency")
    if consistency is None or wilson_interval(consistency, len(keys))[1] >= 0.5:
        return ""
    share_of_a = float(stored.names_a(keys).mean())
    letter = "A" if share_of_a >= 0.5 else "B"
    return (f"warning: this judge does not compare: for {1 - consistency:.0%} of the pairs it names the same letter in "
            f"both orders ({letter} in {max(share_of_a, 1 - share_of_a):.0%} of all verdicts), so nothing shows "
            "that its attention is that of a choice between the answers. Take a larger judge (extract.py --model JUDGE "
            "--out DIR, then train.py --weights DIR), or train with --weights-options verdicts=consistent, which "
            "leaves pairs with such verdicts uniform")


def wilson_interval(share: float, total: int) -> tuple[float, float]:
    """95 % interval of a share of `total` cases (Wilson's score interval), which holds at 0 and at 1 too."""
    square = 1.959964**2 / total
    middle, half = share + square / 2, math.sqrt(square * (share * (1 - share) + square / 4))
    return (middle - half) / (1 + square), (middle + half) / (1 + square)
