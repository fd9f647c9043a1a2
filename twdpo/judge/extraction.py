"""The judge pass: pairs -> attention rows -> weights file. Resumes after a kill with the same bytes.

Both rounds of a pair stand in one packed row and share their common beginning; the forward stops after the last wanted
layer, and the head runs at the last position of each input alone.
"""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PretrainedConfig

from twdpo.config import ExtractConfig, SharedConfig
from twdpo.data_files import BadRow
from twdpo.dist import Process, name_of_dtype, pick_dtype
from twdpo.files import cache_directory, hash_json
from twdpo.flags import InputError
from twdpo.judge.judge import FAILED, AnotherFailed, JudgePass, stores_verdicts
from twdpo.judge.prompt import JudgeInputs, load_judge_prompt
from twdpo.models.attention import parse_heads, parse_layers
from twdpo.models.source import Model, check_length, context_length, fingerprint_tokenizer
from twdpo.pairs import Pair
from twdpo.weights_file import (
    ROLLOUT,
    WeightsFile,
    cache_name,
    parse_layer,
    shard_path,
    stored_keys,
    write_meta,
    write_shard,
)

EXTRACTION_VERSION = 1  # raise it when rows change by more than rounding
PAIRS_PER_SHARD = 128


class Extraction:
    """The attention that a model pays to the answers of pairs under given settings: checked, run, opened.

    meta: everything that the rows depend on, as it stands in the weights file's meta.json. folder: the weights file.
    """

    def __init__(self, config: SharedConfig, model: Model, layers: str, data_fingerprint: str, folder: Path | None,
                 process: Process):
        """layers: to store, as --layers, ROLLOUT among them. folder: None for the cache's own. Raises InputError."""
        self.config, self.model, self.process = config, model, process
        flag = "--layers" if isinstance(config, ExtractConfig) else "--layer"
        self.meta = describe_extraction(config, model, parse_stored_layers(layers, model.config, flag),
                                        data_fingerprint, process.device)
        self.folder = folder or cache_directory(config) / "weights" / cache_name(self.meta)
        appended = config.judge_query == "verdict"
        if config.judge_max_length:
            warning = check_length("--judge-max-length", config.judge_max_length, model.config)
            process.print(warning) if warning else None
        self.inputs = JudgeInputs(model.chat, load_judge_prompt(config.judge_prompt),
                                  self.meta["max_judge_length"] - appended, config.judge_question, config.judge_strip,
                                  config.judge_cut, config.judge_spans)
        if config.judge_spans == "authors" and self.inputs.end_rule is None:
            process.print("--judge-spans authors: their code has no rule for this tokenizer or prompt: spans are exact")

    def check(self, pairs: list[Pair]) -> list[BadRow]:
        """Those that can't be judged, of what is not stored; says what was cut or done apart. All ranks."""
        stored = self.process.on_main(self._stored)
        return check_judge_inputs(self.inputs, [pair for pair in pairs if pair.key not in stored], self.process)

    def run(self, pairs: list[Pair]) -> None:
        """Add the attention of all `pairs` to the weights file; what is stored already is kept. All ranks.

        Processes share the work by shards.
        """
        todo = list_work(self.meta, self.folder, pairs, "attention", self.process)
        if todo:
            extract_attention(self.config, self.meta, self.folder, todo, self.inputs, self.model, self.process)

    @property
    def has_verdicts(self) -> bool:
        """Whether verdicts are stored too: not when the wanted layers stop before them."""
        return stores_verdicts(self.meta, self.model.config.get_text_config().num_hidden_layers)

    def open(self, layer: str = "last") -> WeightsFile:
        """What is stored, of the layers that --layer names. Raises InputError."""
        return WeightsFile(self.folder, layer)

    def _stored(self) -> set[int]:
        """Keys of the pairs whose attention under these settings is there already."""
        if not (self.folder / "meta.json").exists():
            return set()
        write_meta(self.folder, self.meta)  # compares
        return stored_keys(self.folder)


def parse_stored_layers(text: str, model_config: PretrainedConfig, flag: str) -> list[int | str]:
    """`last`, `all`, `1,8` (1-based), ROLLOUT -> what a weights file holds, in its order. Raises InputError."""
    names, _ = parse_layer(text)
    numbers = ",".join(part for part in names if part != ROLLOUT)
    most = model_config.get_text_config().num_hidden_layers
    layers = [layer + 1 for layer in parse_layers(numbers, most, flag)] if numbers or ROLLOUT not in names else []
    return layers + [ROLLOUT] * (ROLLOUT in names)


def describe_extraction(config: SharedConfig, model: Model, layers: list[int | str], data_fingerprint: str,
                        device: torch.device) -> dict[str, object]:
    """meta.json: everything that the rows depend on. Raises InputError for settings that make no sense."""
    parse_heads(config.judge_heads, model.config.get_text_config().num_attention_heads)
    return {
        "code": EXTRACTION_VERSION,
        "model": model.fingerprint,
        "tokenizer": fingerprint_tokenizer(model.tokenizer),
        "judge_prompt": hash_json(load_judge_prompt(config.judge_prompt)),
        "question": config.judge_question,
        "strip_answers": config.judge_strip,
        "judge_cut": config.judge_cut,
        "spans": config.judge_spans,
        "max_judge_length": config.judge_max_length or context_length(model.config),
        "query": config.judge_query,
        "attention": config.judge_attention,
        "judge_dtype": name_of_dtype(pick_dtype(config.judge_dtype, device)),
        "heads": config.judge_heads,
        "layers": layers,
        "data": data_fingerprint,
    } | ({"templated": True} if model.templated else {}) | ({"date": model.printed_date} if model.printed_date else {})


def check_judge_inputs(inputs: JudgeInputs, pairs: list[Pair], process: Process) -> list[BadRow]:
    """Rows that can't be judged, in order; says what was cut or done apart. The processes share the work. All ranks."""
    bad: dict[int, BadRow] = {}
    mine = range(process.rank, len(pairs), process.world_size)
    with process.progress(total=len(mine), desc="judge inputs", unit="pair") as bar:
        for start in range(0, len(mine), PAIRS_PER_SHARD):
            places = mine[start:start + PAIRS_PER_SHARD]
            for place, built in zip(places, inputs.build_all([pairs[place] for place in places])):
                if isinstance(built, ValueError):
                    bad[place] = BadRow(pairs[place].where, str(built), pairs[place].to_row())
            bar.update(len(places))
    counts: Counter = Counter()
    for other_bad, other_counts in process.gather((bad, inputs.counts)):
        bad |= other_bad
        counts.update(other_counts)
    for what, count in counts.items():
        process.print(f"{what}: {count}") if count else None
    return [bad[place] for place in sorted(bad)]


def list_work(meta: dict[str, object], directory: Path, pairs: list[Pair], what: str, process: Process
              ) -> list[tuple[int, list[Pair]]]:
    """(number, pairs) of the shards that the folder lacks; each pair once. All ranks."""
    process.on_main(lambda: write_meta(directory, meta))
    stored = process.on_main(lambda: stored_keys(directory))
    pairs = list({pair.key: pair for pair in pairs}.values())
    groups = [pairs[start:start + PAIRS_PER_SHARD] for start in range(0, len(pairs), PAIRS_PER_SHARD)]
    todo = [(number, [pair for pair in group if pair.key not in stored]) for number, group in enumerate(groups)]
    todo = [(number, group) for number, group in todo if group]
    missing = sum(len(group) for _, group in todo)
    process.print(f"{what}: {len(pairs) - missing} of {len(pairs)} pairs stored in {directory}"
                  + (f", {missing} to extract" if missing else ", nothing to extract"))
    return todo


def extract_attention(config: SharedConfig, meta: dict[str, object], folder: Path, todo: list[tuple[int, list[Pair]]],
                      inputs: JudgeInputs, model: Model, process: Process) -> None:
    """The judge pass over the shards that `list_work` gave. All ranks."""
    judge = JudgePass(config, meta, model, process)
    mine = todo[process.rank::process.world_size]
    with process.progress(total=sum(len(group) for _, group in mine), desc="judge", unit="pair") as bar:
        with ThreadPoolExecutor(1) as pool:  # the next shard is tokenised while the device works on this one
            following = pool.submit(inputs.build_all, mine[0][1]) if mine else None
            for place, (number, group) in enumerate(mine):
                judged = following.result()
                for pair, built in zip(group, judged):
                    if isinstance(built, ValueError):  # checked before, unless a damaged shard was removed since
                        raise InputError(f"{pair.where}: {built}")
                if place + 1 < len(mine):
                    following = pool.submit(inputs.build_all, mine[place + 1][1])
                keys = [pair.key for pair in group]
                try:
                    arrays = judge.shard(group, judged, bar)
                except AnotherFailed:
                    raise
                except InputError:
                    judge.keep_step(FAILED)
                    raise
                write_shard(shard_path(folder, number, keys), arrays, meta)
    judge.finish()
    process.gather(None)  # all ranks have written before any reads
