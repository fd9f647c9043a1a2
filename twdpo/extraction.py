"""The judge pass: pairs -> attention rows -> weights file. Resumes after a kill with the same bytes."""

from pathlib import Path

import numpy as np
import torch

from twdpo.attention import attention_rows, parse_layers
from twdpo.config import InputError, SharedConfig
from twdpo.dist import Process
from twdpo.files import hash_json
from twdpo.judge import ROUNDS, JudgedPair, JudgeInputs, load_judge_prompt, verdict_ids
from twdpo.logratio import logits_of
from twdpo.model import (
    check_length,
    context_length,
    fingerprint_tokenizer,
    head_options,
    load_judge,
    load_model_config,
    pick_dtype,
)
from twdpo.weights_file import shard_path, stored_keys, write_meta, write_shard

EXTRACTION_VERSION = 1  # raise it when rows change by more than rounding
PAIRS_PER_SHARD = 128


def describe_extraction(config: SharedConfig, layers: str, model_dir: Path, model_fingerprint: str, tokenizer,
                        data_fingerprint: str, device: torch.device) -> dict[str, object]:
    """meta.json: everything that the rows depend on. Raises InputError for settings that make no sense."""
    model_config = load_model_config(model_dir)
    text_config = model_config.get_text_config()
    max_length = config.max_judge_length or context_length(model_config)
    return {
        "code": EXTRACTION_VERSION,
        "model": model_fingerprint,
        "tokenizer": fingerprint_tokenizer(tokenizer),
        "judge_prompt": hash_json(load_judge_prompt(config.judge_prompt)),
        "max_judge_length": max_length,
        "query": config.query,
        "attention": config.attention,
        "judge_dtype": str(pick_dtype(config.judge_dtype, device)).removeprefix("torch."),
        "heads": "mean",
        "layers": [layer + 1 for layer in parse_layers(layers, text_config.num_hidden_layers)],
        "data": data_fingerprint,
    }


def open_judge_inputs(config: SharedConfig, meta: dict[str, object], model_dir: Path, tokenizer, process: Process
                      ) -> JudgeInputs:
    """What builds judge inputs for these settings; warns of lengths past the model's context."""
    appended = config.query == "verdict"
    if config.max_judge_length:
        warning = check_length("--max-judge-length", config.max_judge_length, load_model_config(model_dir))
        process.print(warning) if warning else None
    return JudgeInputs(tokenizer, load_judge_prompt(config.judge_prompt), meta["max_judge_length"] - appended)


def extract_attention(config: SharedConfig, meta: dict[str, object], directory: Path, judged: dict[int, JudgedPair],
                      model_dir: Path, tokenizer, process: Process) -> None:
    """Add the attention of all `judged` pairs (by key) to the weights file in `directory`. All ranks.

    Processes share the work by shards; what is stored already is kept.
    """
    process.on_main(lambda: write_meta(directory, meta))
    stored = process.on_main(lambda: stored_keys(directory))
    keys = list(judged)
    groups = [keys[start:start + PAIRS_PER_SHARD] for start in range(0, len(keys), PAIRS_PER_SHARD)]
    todo = [(number, [key for key in group if key not in stored]) for number, group in enumerate(groups)]
    todo = [(number, group) for number, group in todo if group]
    missing = sum(len(group) for _, group in todo)
    process.print(f"attention: {len(keys) - missing} of {len(keys)} pairs stored in {directory}"
                  + (f", {missing} to extract" if missing else ", nothing to extract"))
    if not todo:
        return
    dtype = pick_dtype(config.judge_dtype, process.device)
    model = load_judge(model_dir, dtype, process.device)
    run = JudgeRun(config, meta, model, tokenizer, process.device)
    mine = todo[process.rank::process.world_size]
    with process.progress(total=sum(len(group) for _, group in mine), desc="judge", unit="pair") as bar:
        for number, group in mine:
            write_shard(shard_path(directory, number, group), run.shard(group, judged, bar))
    del model, run
    process.gather(None)  # all ranks have written before any reads


class JudgeRun:
    """A loaded judge and its settings."""

    def __init__(self, config: SharedConfig, meta: dict[str, object], model, tokenizer, device: torch.device):
        self.model, self.query, self.eager = model, config.query, config.attention == "eager"
        self.layers = [layer - 1 for layer in meta["layers"]]
        self.budget = config.judge_batch_tokens or (32768 if device.type == "cuda" else 8192)
        self.verdicts = verdict_ids(tokenizer)
        self.options = head_options(model.config)

    def head_logits(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        head = self.model.get_output_embeddings()
        return logits_of(hidden_ND, head.weight, getattr(head, "bias", None), self.options)

    def shard(self, keys: list[int], judged: dict[int, JudgedPair], bar) -> dict[str, np.ndarray]:
        """The arrays of one shard (twdpo.weights_file), its inputs batched by length up to the token budget."""
        inputs = [(key, turn) for key in keys for turn in range(ROUNDS)]
        inputs.sort(key=lambda place: -len(judged[place[0]].input_ids[place[1]]))
        rows, verdicts, top_tokens = {}, {}, {}
        start = 0
        while start < len(inputs):
            longest = len(judged[inputs[start][0]].input_ids[inputs[start][1]]) + 1
            batch = inputs[start:start + max(1, self.budget // longest)]
            attention_SLT, verdict_S2, top_S = self.judge([judged[key].input_ids[turn] for key, turn in batch])
            for place, (key, turn) in enumerate(batch):
                for side in (0, 1):
                    first, stop = judged[key].ranges[turn][side]
                    rows[key, side, turn] = attention_SLT[place, :, first:stop]
                verdicts[key, turn], top_tokens[key, turn] = verdict_S2[place], top_S[place]
            start += len(batch)
            bar.update(len(batch) / ROUNDS)
        answers = [(key, side) for key in keys for side in (0, 1)]
        attention_RLJ = np.stack([np.concatenate([rows[key, side, turn] for key, side in answers], axis=1)
                                  for turn in range(ROUNDS)])
        return {
            "key_E": np.array(keys, dtype=np.int64),
            "length_E2": np.array([[len(judged[key].ids[side]) for side in (0, 1)] for key in keys], dtype=np.int32),
            "ids_J": np.concatenate([judged[key].ids[side] for key, side in answers]),
            "spans_J2": np.concatenate([judged[key].spans_N2[side] for key, side in answers]),
            "attention_RLJ": attention_RLJ,
            "verdict_ER2": np.array([[verdicts[key, turn] for turn in range(ROUNDS)] for key in keys], np.float32),
            "top_token_ER": np.array([[top_tokens[key, turn] for turn in range(ROUNDS)] for key in keys], np.int32),
        }

    def judge(self, sequences: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(attention [S, L, T], log-probs of A and of B [S, 2], argmax over the vocabulary [S])."""
        rows, logits_SV = attention_rows(self.model, self.head_logits, sequences, self.layers, self.eager)
        logps_SV = logits_SV.log_softmax(dim=-1)
        verdict_S2 = torch.stack([logps_SV[:, ids].logsumexp(dim=-1) for ids in self.verdicts], dim=-1)
        if self.query == "verdict":
            # Append the likeliest spelling of the likelier verdict and read that token's row instead.
            spellings = [self.verdicts[letter] for letter in verdict_S2.argmax(dim=-1).tolist()]
            appended = [np.append(ids, spelling[int(logps_V[spelling].argmax())])
                        for ids, spelling, logps_V in zip(sequences, spellings, logps_SV)]
            rows, _ = attention_rows(self.model, self.head_logits, appended, self.layers, self.eager)
        return rows.numpy(), verdict_S2.numpy(), logits_SV.argmax(dim=-1).numpy()


def require_single_layer(text: str) -> None:
    """--layer names one layer: raise InputError for a list."""
    if text != "last" and not text.isdigit():
        raise InputError(f"--layer is {text!r}: it must be last or one number")
