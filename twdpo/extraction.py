"""The judge pass: pairs -> attention rows -> weights file. Resumes after a kill with the same bytes.

Both rounds of a pair stand in one packed row and share their common beginning; the forward stops after the last wanted
layer, and the head runs at the last position of each input alone.
"""

import gc
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig

from twdpo.attention import JudgeCapture, parse_heads, parse_layers, rollout_rows
from twdpo.config import ExtractConfig, InputError, SharedConfig
from twdpo.dist import Process, pick_dtype
from twdpo.files import cache_directory, hash_json
from twdpo.judge import ROUNDS, JudgedPair, JudgeInputs, load_judge_prompt, verdict_ids
from twdpo.model import (
    Model,
    check_length,
    context_length,
    fingerprint_tokenizer,
    load_judge,
    load_sharded_judge,
    shards_judge,
)
from twdpo.pairs import BadRow, Pair
from twdpo.rows import common_beginning, fill_rows, pack
from twdpo.weights_file import ROLLOUT, WeightsFile, shard_path, stored_keys, write_meta, write_shard

EXTRACTION_VERSION = 1  # raise it when rows change by more than rounding
PAIRS_PER_SHARD = 128
IDLE, WORKS, FAILED = range(3)  # what a process that runs a sharded judge is up to


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
        self.folder = folder or cache_directory(config) / "weights" / hash_json(self.meta)[:24]
        appended = config.judge_query == "verdict"
        if config.judge_max_length:
            warning = check_length("--judge-max-length", config.judge_max_length, model.config)
            process.print(warning) if warning else None
        self.inputs = JudgeInputs(model.tokenizer, load_judge_prompt(config.judge_prompt),
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
    names = re.split("[,+]", text)
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
        "judge_dtype": str(pick_dtype(config.judge_dtype, device)).removeprefix("torch."),
        "heads": config.judge_heads,
        "layers": layers,
        "data": data_fingerprint,
    }


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
                    arrays = judge.shard(keys, judged, bar)
                except AnotherFailed:
                    raise
                except InputError:
                    judge.keep_step(FAILED)
                    raise
                write_shard(shard_path(folder, number, keys), arrays)
    judge.finish()
    process.gather(None)  # all ranks have written before any reads


class AnotherFailed(InputError):  # noqa: N818 - who failed says why
    """Another process that runs the same sharded judge has stopped."""


class JudgePass:
    """A loaded judge and its settings. Input 2i + r is round r of pair i."""

    def __init__(self, config: SharedConfig, meta: dict[str, object], model: Model, process: Process):
        device, dtype = process.device, pick_dtype(config.judge_dtype, process.device)
        text_config = model.config.get_text_config()
        self.query, self.eager = config.judge_query, config.judge_attention == "eager"
        self.layers = [layer - 1 for layer in meta["layers"] if layer != ROLLOUT]
        self.rollout = ROLLOUT in meta["layers"]
        self.heads = parse_heads(config.judge_heads, text_config.num_attention_heads)
        self.budget = config.judge_batch_tokens or (32768 if device.type == "cuda" else 8192)
        self.verdicts = verdict_ids(model.tokenizer)
        # Nothing after the last wanted layer is loaded or run; the verdict needs them all.
        num_layers = text_config.num_hidden_layers
        self.has_verdict = self.rollout or self.query == "verdict" or self.layers[-1] == num_layers - 1
        if not self.has_verdict:
            num_layers = self.layers[-1] + 1
        self.process, self.sharded = process, shards_judge(config.judge_sharding, model, dtype, process)
        load = load_sharded_judge if self.sharded else load_judge
        self.judge = load(model.folder, dtype, device, num_layers)
        # Some rotary embeddings change with the longest position of a row, and remember it.
        rope = str(getattr(text_config, "rope_parameters", None))
        self.adaptive = "dynamic" in rope or "longrope" in rope
        self.rotary = [(module, {name: buffer.clone() for name, buffer in module._buffers.items()},
                        {name: value for name, value in vars(module).items() if isinstance(value, (int, float))})
                       for module in self.judge.modules()
                       if self.adaptive and any("inv_freq" in name for name in module._buffers)]
        self.shortens = False
        try:
            self.packs = self.check_packing()
        except (AttributeError, TypeError, IndexError, RuntimeError) as error:
            raise InputError(f"{text_config.model_type} can't be run as a judge ({error}): use another model"
                             ) from error
        if not self.packs:
            process.print("judge inputs run one by one: packed rows give this model other hidden states")
        if self.sharded:
            process.print(f"the judge is sharded over {process.world_size} process(es)")

    def check_packing(self) -> bool:
        """Whether two inputs with a common beginning get the hidden states that each gets alone.

        If not, once more with a final layer that does all positions: it may mix tokens outside its attention.
        """
        first = self.filler = np.arange(24, dtype=np.int32) * 7 % self.judge.model.config.get_text_config().vocab_size
        inputs = [first, np.concatenate([first[:12], first[:5:-1]])]
        alone = torch.cat([self.forward(pack([[ids]]), ())[1] for ids in inputs])
        tolerance = 1e-3 if alone.dtype == torch.float32 else 5e-2
        for shortens in (not self.eager, False):
            self.shortens = shortens
            together = self.forward(pack([inputs]), ())[1]
            if (together - alone).norm() <= tolerance * alone.norm():  # sync
                return not self.adaptive
        return False

    def finish(self) -> None:
        """Free the judge; a sharded one first runs along for as long as another process has work. All ranks."""
        while self.keep_step(IDLE) == WORKS:
            self.forward(pack([[self.filler]]), (), keeps_step=False)
        del self.judge
        gc.collect()  # FSDP2's modules refer to themselves in circles

    def keep_step(self, state: int) -> int:
        """Before a forward, which of a sharded judge is collective: tell the other processes what this one is up to;
        the largest of all their states. Raises InputError when another one failed. All ranks."""
        if not self.sharded:
            return IDLE
        largest = self.process.largest(state)
        if largest == FAILED and state != FAILED:
            raise AnotherFailed("another process found its part of the judge's input unfit, see its message")
        return largest

    @torch.no_grad()
    def forward(self, row, layers, keep: bool = False, with_logits: bool = False, keeps_step: bool = True
                ) -> tuple[JudgeCapture, torch.Tensor, torch.Tensor | None]:
        """(what was captured, hidden states of each input's last token [S, D], logits there [S, V] or None).

        The same whatever ran before. keeps_step: tell the other processes, which a sharded judge needs. All ranks then.
        """
        if keeps_step:
            self.keep_step(WORKS)
        for module, buffers, numbers in self.rotary:
            for name, buffer in buffers.items():
                setattr(module, name, buffer.clone())
            for name, number in numbers.items():
                setattr(module, name, number)
        final_layer = self.judge.num_layers - 1 if self.shortens else -1
        capture = JudgeCapture(row, frozenset(layers), self.heads, self.eager, keep, final_layer)
        return capture, *self.judge(capture, with_logits)

    def shard(self, keys: list[int], judged: list[JudgedPair], bar) -> dict[str, np.ndarray]:
        """The arrays of one shard (twdpo.weights_file)."""
        units = [(pair, (0, 1)) for pair in range(len(judged))]
        if not self.packs:
            units = [(pair, (turn,)) for pair, turns in units for turn in turns]
        groups = [[judged[pair].input_ids[turn] for turn in turns] for pair, turns in units]
        lengths = [sum(map(len, group)) - (len(group) - 1) * common_beginning(group) if len(group) > 1
                   else len(group[0]) for group in groups]
        rows, verdicts, top_tokens = {}, {}, {}
        for batch in fill_rows(lengths, self.budget if self.packs else 0):
            attention, verdict_S2, top_S = self.judge_rows([groups[unit] for unit in batch])
            inputs = [(units[unit][0], turn) for unit in batch for turn in units[unit][1]]
            for place, (pair, turn) in enumerate(inputs):
                for side in (0, 1):
                    first, stop = judged[pair].ranges[turn][side]
                    rows[pair, side, turn] = attention[place][:, first:stop]
                if self.has_verdict:
                    verdicts[pair, turn], top_tokens[pair, turn] = verdict_S2[place], top_S[place]
            bar.update(len(inputs) / ROUNDS)
        answers = [(pair, side) for pair in range(len(judged)) for side in (0, 1)]
        attention_RLJ = np.stack([np.concatenate([rows[pair, side, turn] for pair, side in answers], axis=1)
                                  for turn in range(ROUNDS)])
        arrays = {
            "key_E": np.array(keys, dtype=np.int64),
            "length_E2": np.array([[len(ids) for ids in pair.ids] for pair in judged], dtype=np.int32),
            "ids_J": np.concatenate([judged[pair].ids[side] for pair, side in answers]),
            "spans_J2": np.concatenate([judged[pair].spans_N2[side] for pair, side in answers]),
            "attention_RLJ": attention_RLJ,
        }
        if self.has_verdict:
            turns = range(ROUNDS)
            arrays["verdict_ER2"] = np.array([[verdicts[pair, turn] for turn in turns] for pair in range(len(judged))],
                                             dtype=np.float32)
            arrays["top_token_ER"] = np.array([[top_tokens[pair, turn] for turn in turns]
                                               for pair in range(len(judged))], dtype=np.int32)
        return arrays

    def judge_rows(self, groups: list[list[np.ndarray]]) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """(attention of each input [L, T] fp32, log-probs of A and of B [S, 2], argmax over the vocabulary [S])."""
        verdict_S2 = top_S = np.zeros(0)
        reads = self.query == "prompt"
        capture, _, logits_SV = self.forward(pack(groups), self.layers if reads else (), self.rollout and reads,
                                             self.has_verdict)
        if self.has_verdict:
            logps_SV = logits_SV.log_softmax(dim=-1)
            verdict_S2 = torch.stack([logps_SV[:, ids].logsumexp(dim=-1) for ids in self.verdicts], dim=-1)
            verdict_S2 = verdict_S2.cpu().numpy()  # sync
            top_S = logps_SV.argmax(dim=-1).cpu().numpy()
        if self.query == "verdict":
            # Append the likeliest spelling of the likelier verdict and read that token's row instead.
            spellings = [self.verdicts[letter] for letter in verdict_S2.argmax(axis=-1)]
            last = iter([spelling[int(logps_V[spelling].argmax())] for spelling, logps_V in zip(spellings, logps_SV)])
            groups = [[np.append(ids, next(last)).astype(np.int32) for ids in group] for group in groups]
            capture, *_ = self.forward(pack(groups), self.layers, self.rollout)
        rows = [torch.cat(capture.rows[layer]) for layer in self.layers]
        if self.rollout:
            rows.append(torch.cat(rollout_rows(capture)))
        attention_LT = torch.stack(rows).cpu().numpy()  # sync
        if not (np.isfinite(attention_LT).all() and np.isfinite(verdict_S2).all()):
            model_type = self.judge.model.config.model_type
            raise InputError(f"{model_type}: the judge's attention is not finite; try --judge-dtype float32")
        ends = np.cumsum([len(ids) for group in groups for ids in group])[:-1]
        return np.split(attention_LT, ends, axis=1), verdict_S2, top_S
