"""Cached log-probs of frozen models: the reference, auxiliary models, and the contrast of two.

One pass of each before step 1. The reference is the policy as it starts: same module, same kernel and the row plan of
the first epoch, so that the margin at step 0 is exactly zero and no second model is ever resident. A cache folder is
named by what log-probs depend on; a pair in it by its tokens.
"""

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from twdpo.batch import Outputs, PairBatch, collate, plan_micro_batches
from twdpo.config import TrainConfig
from twdpo.dist import Process, pick_dtype
from twdpo.files import cache_directory, hash_json, hash_to_int64, write_atomic
from twdpo.flags import InputError
from twdpo.logratio import LOGPS_VERSION, HeadOptions, weighted_logratio
from twdpo.models.policy import Policy, load_policy, settle_packing
from twdpo.models.source import Model, check_length, open_model
from twdpo.rows import RowOptions, evaluation_batches
from twdpo.tokens import Example
from twdpo.weights import Logps

FLUSH_BATCHES = 16  # global batches between writes to the cache
CONTRAST = 1.0  # cDPO's b: softmax((1 + b) z_positive - b z_negative)


def logps_directory(cache: Path, model_fingerprint: str, dtype: torch.dtype, device: torch.device, packs: bool,
                    compiled: bool) -> Path:
    """The cache folder of one set of weights and numerics."""
    # The device: log-probs of another one differ by rounding, and the first margin would not be exactly 0.
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    attention = "varlen" if device.type == "cuda" else "sdpa"  # twdpo.models.varlen, where it can
    key = {"model": model_fingerprint, "dtype": str(dtype), "attention": attention, "packing": packs,
           "compiled": compiled, "op": LOGPS_VERSION, "torch": torch.__version__, "device": device_name}
    return cache / "reference" / hash_json(key)[:24]


def example_key(example: Example) -> int:
    """64-bit content key of a pair's tokens."""
    return hash_to_int64([example.prompt_ids.tolist(), example.chosen.ids.tolist(), example.rejected.ids.tolist()])


@torch.no_grad()
def response_logps(model: Callable[[PairBatch], Outputs], process: Process, examples: list[Example],
                   batches: list[list[int]], rows: RowOptions, folder: Path, what: str = "reference"
                   ) -> dict[int, Logps]:
    """Log-probs under a model as it is now, by the pair's key, for all pairs of `batches` (indices). All ranks.

    folder: of the cache. what: whose they are, for messages.
    """
    keys = {pair: example_key(examples[pair]) for batch in batches for pair in batch}
    # One process reads, so that all agree on what is left to do even when they don't share a disk.
    stored: dict[int, Logps] = process.broadcast(read_cache(folder, set(keys.values())) if process.is_main else None)
    missing = sum(key not in stored for key in keys.values())
    process.print(f"{what} log-probs: {len(keys) - missing} of {len(keys)} pairs cached in {folder}")
    if missing:
        stored = _run_missing(model, process, examples, batches, rows, folder, what, keys, stored)
    return {examples[pair].pair.key: stored[key] for pair, key in keys.items()}


def _run_missing(model, process: Process, examples: list[Example], batches: list[list[int]], rows: RowOptions,
                 folder: Path, what: str, keys: dict[int, int], stored: dict[int, Logps]) -> dict[int, Logps]:
    """`stored` with what it lacks. All ranks."""
    new: dict[int, Logps] = {}
    with process.progress(total=len(keys), desc=what, unit="pair") as bar:
        for number, pairs in enumerate(batches, 1):
            plan = plan_micro_batches(pairs, examples, process.world_size, rows)
            for place, micro_batch in enumerate(plan[process.rank]):
                everyone = [pair for rank in plan for pair in rank[place].pairs]
                if all(keys[pair] in stored for pair in everyone):
                    continue
                batch = collate(micro_batch, examples, pairs, packs=rows.packs).to(process.device)
                logps_N = model(batch).logps_N  # all ranks
                parts = [part.numpy() for part in logps_N.float().cpu().split(batch.seq_lens_S.tolist())]  # sync
                new |= {keys[pair]: tuple(parts[2 * row:2 * row + 2]) for row, pair in enumerate(micro_batch.pairs)
                        if keys[pair] not in stored}
            if number % FLUSH_BATCHES == 0 or number == len(batches):
                for part in process.gather(new):  # all ranks
                    new = part | new
                if process.is_main and new:
                    write_cache(folder, new)
                stored, new = stored | new, {}
            bar.update(len(pairs))
    return stored


def cached_logps(process: Process, examples: list[Example], folder: Path) -> list[Logps] | None:
    """Log-probs of all examples from the cache, None unless it holds every one. All ranks."""
    keys = [example_key(example) for example in examples]
    stored = process.broadcast(read_cache(folder, set(keys)) if process.is_main else None)
    return [stored[key] for key in keys] if all(key in stored for key in keys) else None


def write_cache(folder: Path, logps: dict[int, Logps]) -> None:
    """One file of the cache, written atomically; its name holds a hash of its keys."""
    keys = sorted(logps)
    arrays = {
        "key_E": np.array(keys, dtype=np.int64),
        "length_E2": np.array([[len(side) for side in logps[key]] for key in keys], dtype=np.int64),
        "logps_N": np.concatenate([side for key in keys for side in logps[key]]),
    }
    path = folder / f"logps-{hash_json(keys)[:16]}.safetensors"
    write_atomic(path, lambda temporary: safetensors.numpy.save_file(arrays, temporary))


def read_cache(folder: Path, wanted: set[int]) -> dict[int, Logps]:
    """Cached log-probs of the wanted keys. A file that can't be read is removed, with a word."""
    found: dict[int, Logps] = {}
    for path in sorted(folder.glob("logps-*.safetensors")):
        try:
            arrays = safetensors.numpy.load_file(path)
        except SafetensorError as error:
            print(f"warning: {path} is damaged ({error}): removed, its log-probs are computed again")
            path.unlink()
            continue
        ends = np.cumsum(arrays["length_E2"].reshape(-1))[:-1]
        parts = np.split(arrays["logps_N"], ends)
        found |= {key: (parts[2 * place], parts[2 * place + 1]) for place, key in enumerate(arrays["key_E"].tolist())
                  if key in wanted}
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Auxiliary models

def open_aux_models(config: TrainConfig, policy_model: Model, examples: list[Example], process: Process
                    ) -> list[Model]:
    """The positive and the negative model of --aux-model; with --aux-prompts one. Raises InputError. All ranks.

    The negative one, and the one of --aux-prompts, is the policy's starting weights unless it is named.
    """
    names = [name.strip() for name in config.aux_model.split(",") if name.strip()]
    if config.aux_prompts and len(names) > 1:
        raise InputError(f"--aux-prompts compares two prompts of one model, and --aux-model {config.aux_model} names "
                         f"{len(names)}: give one, or none for the policy's starting weights")
    if not config.aux_prompts and not 1 <= len(names) <= 2:
        raise InputError(f"--aux-model is {config.aux_model!r}: this weight source needs one model or two, POSITIVE or "
                         "POSITIVE,NEGATIVE (without the second: the policy's starting weights), or --aux-prompts")
    opened = {policy_model.name: policy_model, config.model: policy_model}
    for name in names:
        if name not in opened:
            opened[name] = open_model(name, process, flag="--aux-model", needs_template=False)
    models = [opened[name] for name in names]
    longest = max(example.longest for example in examples)
    for model in models:
        warning = check_length(f"the longest sequence (for --aux-model {model.folder})", longest, model.config)
        process.print(warning) if warning else None
        if model.tokenizer.get_vocab() != policy_model.tokenizer.get_vocab():
            raise InputError(f"--aux-model {model.folder}: its tokenizer is not the policy's, so their log-probs are "
                             "of other tokens")
    return (models + [policy_model])[:1 if config.aux_prompts else 2]


def auxiliary_logps(config: TrainConfig, names: tuple[str, ...], models: list[Model], examples: list[Example],
                    process: Process) -> dict[str, dict[int, Logps]]:
    """Log-probs of all `examples` by name, "positive" and "negative" or "contrast", and the pair's key. All ranks."""
    logps = {}
    for name in names:
        which = models if name == "contrast" else [dict(zip(("positive", "negative"), models))[name]]
        fingerprint = which[0].fingerprint
        if name == "contrast":
            fingerprint = hash_json(["contrast", CONTRAST, *(model.fingerprint for model in which)])
        else:
            process.print(f"{name} model of --aux-model: {which[0].folder}")
        logps[name] = frozen_logps(config, name, which, fingerprint, examples, process)
        gc.collect()  # FSDP2's modules refer to themselves in circles
    return logps


def prompted_logps(config: TrainConfig, model: Model, examples: list[Example],
                   prompted: Mapping[str, Mapping[int, Example]], process: Process) -> dict[str, dict[int, Logps]]:
    """Log-probs of all `examples` under one model behind different prompts, by the prompt's name and the pair's key.

    prompted: by name the examples behind that prompt, by the key of the pair that each is of. All ranks.
    """
    behind = {name: {example.pair.key: of[example.pair.key] for example in examples} for name, of in prompted.items()}
    every = [example for of in behind.values() for example in of.values()]
    process.print(f"model behind --aux-prompts: {model.folder}")
    logps = frozen_logps(config, "prompted", [model], model.fingerprint, every, process)
    gc.collect()  # FSDP2's modules refer to themselves in circles
    return {name: {key: logps[example.pair.key] for key, example in of.items()} for name, of in behind.items()}


def frozen_logps(config: TrainConfig, name: str, models: list[Model], fingerprint: str, examples: list[Example],
                 process: Process) -> dict[int, Logps]:
    """Log-probs of all examples under one model, or the contrast of two; no model is loaded when the cache holds all.

    All ranks.
    """
    dtype, cache = pick_dtype(config.dtype, process.device), cache_directory(config)

    def folder(packs: bool) -> Path:
        # Not the reference's folder: its log-probs are of the rows of epoch 0, to the last bit.
        return logps_directory(cache, hash_json(["aux", fingerprint]), dtype, process.device, packs, False)
    for packs in {"on": [True], "off": [False]}.get(config.packing, [True, False]):
        if cached := cached_logps(process, examples, folder(packs)):
            process.print(f"{name} log-probs: all {len(examples)} pairs cached in {folder(packs)}")
            return {example.pair.key: logps for example, logps in zip(examples, cached)}
    policies = [load_policy(model.folder, dtype, process, replicate=config.replicate) for model in models]
    packs = all([settle_packing(policy, config.packing, examples, process) for policy in policies])
    run = policies[0] if len(policies) == 1 else Contrast(*policies)
    return response_logps(run, process, examples, evaluation_batches(len(examples), config.batch_size),
                          RowOptions(packs, config.micro_batch_tokens), folder(packs), name)


class Contrast:
    """Two models as one whose logits are (1 + b) z_positive - b z_negative (cDPO)."""

    def __init__(self, positive: Policy, negative: Policy):
        """Raises InputError for models whose logits are no linear function of their hidden states."""
        for model in (positive, negative):
            if model.options.softcap is not None:
                raise InputError(f"{model.model.config.model_type} caps its logits: their contrast can't be taken "
                                 "blockwise; use another --aux-model")
        self.models = (positive, negative)

    @torch.no_grad()
    def __call__(self, batch: PairBatch) -> Outputs:
        """As a policy's forward, but for ratios. All ranks."""
        hidden, heads, biases = [], [], []
        vocabulary = min(model.model.config.get_text_config().vocab_size for model in self.models)  # some are padded
        for factor, model in zip((1 + CONTRAST, -CONTRAST), self.models):
            hidden_ND, head_VD, bias_V = model.states_and_head(batch)
            factor *= model.options.logit_scale or 1.0
            hidden.append(hidden_ND)
            heads.append(factor * head_VD[:vocabulary])
            biases.append(factor * bias_V[:vocabulary] if bias_V is not None else head_VD.new_zeros(vocabulary))
        # One matrix product over both hidden states is the weighted sum of both logits: V is never written out.
        logps_N = weighted_logratio(torch.cat(hidden, 1), torch.cat(heads, 1), batch.targets_N, batch.ref_logps_N,
                                    batch.weights_N, batch.seq_lens_S, batch.scale_S, sum(biases), HeadOptions())[1]
        return Outputs(None, logps_N, batch, {})
