"""Cached log-probs of frozen models: the reference, auxiliary models, and the contrast of two; hidden states likewise.

One pass of each before step 1. The reference is the policy as it starts: same module, same kernel and the row plan of
the first epoch, so that the margin at step 0 is exactly zero and no second model is ever resident. A cache folder is
named by what log-probs depend on; a pair in it by its tokens.
"""

import gc
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError

from twdpo.batch import Outputs, PairBatch, collate, plan_micro_batches
from twdpo.config import TrainConfig
from twdpo.dist import Process, pick_dtype, send
from twdpo.files import cache_directory, hash_json, hash_to_int64
from twdpo.flags import InputError
from twdpo.logratio import LOGPS_VERSION, HeadOptions, weighted_logratio
from twdpo.models.policy import Policy, load_policy, settle_packing
from twdpo.models.source import Model, check_length, open_model
from twdpo.rows import RowOptions, evaluation_batches
from twdpo.stored import Damaged, StoredTensors, checksum, write_tensors
from twdpo.tokens import Example
from twdpo.weights import Logps

FLUSH_BATCHES = 16  # global batches between writes to the cache
STATES_FLUSH_BATCHES = 4  # of hidden states, which are thousands of times as large
CONTRAST = 1.0  # cDPO's b: softmax((1 + b) z_positive - b z_negative)

# What a cache folder holds of every pair, end to end; the first word names the files.
LOGPS, STATES = "logps_N", "states_ND"

Sides = dict[int, tuple[torch.Tensor, torch.Tensor]]  # of both answers, by the key of their tokens
Part = tuple[list[Example], list[list[int]]]  # examples, and the global batches of them that are run


class Place(NamedTuple):
    """Rows of a file of the cache: the chosen answer's, first .. middle, then the rejected one's, .. last; and the
    checksums of both."""

    path: Path
    first: int
    middle: int
    last: int
    checksums: tuple[int, int]


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
    stored: dict[int, Logps] = process.broadcast(read_logps(folder, set(keys.values())) if process.is_main else None)
    missing = sum(key not in stored for key in keys.values())
    process.print(f"{what} log-probs: {len(keys) - missing} of {len(keys)} pairs cached in {folder}")

    def write(new: Sides) -> set[int]:
        own = {key: tuple(side.numpy() for side in sides) for key, sides in new.items()}
        found = {key: sides for part in process.gather(own) for key, sides in part.items()}  # all ranks
        refuse_not_finite(found, keys, examples, what)
        if process.is_main and found:
            write_cache(folder, LOGPS, {key: tuple(map(torch.from_numpy, sides)) for key, sides in found.items()})
        stored.update(found)
        return set(found)
    if missing:
        run_missing(process, examples, batches, rows, keys, set(stored), what,
                    lambda batch: model(batch).logps_N.float().cpu(), write)  # sync
    return {examples[pair].pair.key: stored[key] for pair, key in keys.items()}


def refuse_not_finite(found: dict[int, Logps], keys: dict[int, int], examples: list[Example], what: str) -> None:
    """Raise InputError for log-probs that are none, which names a pair of them."""
    bad = {key for key, sides in found.items() if not all(np.isfinite(side).all() for side in sides)}
    if pair := next((pair for pair, key in keys.items() if key in bad), None):
        raise InputError(f"{examples[pair].pair.where}: its log-probabilities under {what} are not finite, before any "
                         "training; the model may need --dtype float32")


def run_missing(process: Process, examples: list[Example], batches: list[list[int]], rows: RowOptions,
                keys: dict[int, int], stored: set[int], what: str, run: Callable[[PairBatch], torch.Tensor],
                write: Callable[[Sides], set[int]], flush_batches: int = FLUSH_BATCHES) -> None:
    """run(batch) -> [N, ...] on the CPU, over all pairs whose keys are not stored; what it gives goes to `write` every
    few global batches, which returns the keys that all processes have written. All ranks."""
    new: Sides = {}
    with process.progress(total=len(keys), desc=what, unit="pair") as bar:
        for number, pairs in enumerate(batches, 1):
            plan = plan_micro_batches(pairs, examples, process.world_size, rows)
            for place, micro_batch in enumerate(plan[process.rank]):
                everyone = [pair for rank in plan for pair in rank[place].pairs]
                if all(keys[pair] in stored for pair in everyone):
                    continue
                batch = collate(micro_batch, examples, pairs, packs=rows.packs).to(process.device)
                parts = run(batch).split(batch.seq_lens_S.tolist())  # all ranks
                new |= {keys[pair]: parts[2 * row:2 * row + 2] for row, pair in enumerate(micro_batch.pairs)
                        if micro_batch.real and keys[pair] not in stored}
            if number % flush_batches == 0 or number == len(batches):
                stored, new = stored | write(new), {}  # all ranks
            bar.update(len(pairs))


def cached_logps(process: Process, examples: list[Example], folder: Path) -> list[Logps] | None:
    """Log-probs of all examples from the cache, None unless it holds every one. All ranks."""
    keys = [example_key(example) for example in examples]
    stored = process.broadcast(read_logps(folder, set(keys)) if process.is_main else None)
    return [stored[key] for key in keys] if all(key in stored for key in keys) else None


def read_logps(folder: Path, wanted: set[int]) -> dict[int, Logps]:
    """Cached log-probs of the wanted keys. A file that is damaged is removed, with a word."""
    found: dict[int, Logps] = {}
    for path, places in read_files(folder, LOGPS):
        own = {key: place for key, place in places.items() if key in wanted}
        try:
            sides = [(chosen.numpy(), rejected.numpy()) for chosen, rejected in read_sides(own.values(), LOGPS)]
        except Damaged as error:
            remove_damaged(path, error)
            continue
        found |= dict(zip(own, sides))
    return found


def write_cache(folder: Path, kind: str, values: Sides) -> None:
    """One file of the cache, written atomically; its name holds a hash of its keys. Raises InputError when it can't be
    written: what others write may fill a disk meanwhile."""
    keys = sorted(values)
    tensors = {
        "key_E": torch.tensor(keys, dtype=torch.int64),
        "length_E2": torch.tensor([[len(side) for side in values[key]] for key in keys], dtype=torch.int64),
        "checksum_E2": torch.tensor([[checksum(side) for side in values[key]] for key in keys], dtype=torch.int64),
        kind: torch.cat([side for key in keys for side in values[key]]),
    }
    path = folder / f"{kind.split('_')[0]}-{hash_json(keys)[:16]}.safetensors"
    try:
        write_tensors(path, tensors)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} can't be written ({error}): what stands in {folder} already is kept and found again; "
                         "make room, or name another --cache-dir") from error


def read_places(folder: Path, kind: str) -> dict[int, Place]:
    """Where the cache has what, by key."""
    return {key: place for _, places in read_files(folder, kind) for key, place in places.items()}


def read_files(folder: Path, kind: str) -> Iterator[tuple[Path, dict[int, Place]]]:
    """The cache's files, and where each has what, by key. One that is damaged there is removed, with a word."""
    for path in sorted(folder.glob(f"{kind.split('_')[0]}-*.safetensors")):
        try:
            file = StoredTensors(path)
            keys, lengths, sums = file["key_E"], file["length_E2"], file["checksum_E2"]
            rows = file.shapes.get(kind, (0,))[0]
            if rows != int(lengths.sum()):
                raise Damaged(f"it holds {rows} tokens, and its lengths say {int(lengths.sum())}")
        except Damaged as error:
            remove_damaged(path, error)
            continue
        ends = lengths.flatten().cumsum(0).view(-1, 2)
        places = torch.cat([ends[:, :1] - lengths[:, :1], ends], dim=1).tolist()
        yield path, {key: Place(path, *place, tuple(both)) for key, place, both in
                     zip(keys.tolist(), places, sums.tolist())}


def remove_damaged(path: Path, error: Damaged) -> None:
    """With a word."""
    print(f"warning: {path} is damaged ({error}): removed, what it held is computed again")
    path.unlink(missing_ok=True)  # another process may have been faster


def read_sides(places: Iterable[Place], kind: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both answers' values of each place, in this order; of the files only these are read. Raises Damaged."""
    files: dict[Path, object] = {}
    for path, first, middle, last, sums in places:
        if path not in files:
            files[path] = StoredTensors(path).slices(kind)
        sides = files[path][first:middle], files[path][middle:last]
        if tuple(map(checksum, sides)) != sums:
            raise Damaged(f"{kind} of {path} is not as it was written")
        yield sides


# ----------------------------------------------------------------------------------------------------------------------
# Hidden states on disk

class StoredStates:
    """Hidden states that predict the response tokens, read from the cache when a batch asks for them."""

    def __init__(self, places: dict[int, Place]):
        """places: by the pair's key."""
        self.places = places

    def __call__(self, batch: PairBatch) -> torch.Tensor:
        """[N, D] in the compute dtype, on the batch's device. The host does not wait for it. Raises InputError for a
        file that is damaged, which is removed."""
        places = [self.places[example.pair.key] for example in batch.examples]
        try:
            sides = [side for sides in read_sides(places, STATES) for side in sides]
        except Damaged as error:
            for path in {place.path for place in places}:
                path.unlink(missing_ok=True)
            raise InputError(f"hidden states of the reference are damaged ({error}): removed; the same command makes "
                             "them again, with --resume if the run has a checkpoint") from error
        return send(torch.cat(sides), batch.targets_N.device)


@torch.no_grad()
def store_states(policy: Policy, process: Process, parts: list[Part], rows: RowOptions, folder: Path,
                 dtype: torch.dtype) -> StoredStates:
    """Hidden states of the policy as it is now, for all pairs of all parts, written where they are not yet. All ranks.

    Raises InputError when the disk has no room for them, before the first is computed.
    """
    keys = [{pair: example_key(examples[pair]) for batch in batches for pair in batch} for examples, batches in parts]
    # Several pairs may have the tokens of one key.
    examples = [(key, part[pair]) for (part, _), numbers in zip(parts, keys) for pair, key in numbers.items()]
    stored = process.broadcast(set(read_places(folder, STATES)) if process.is_main else None)
    token_bytes = policy.model.get_output_embeddings().weight.shape[1] * dtype.itemsize
    sizes = {key: token_bytes * (len(each.chosen.ids) + len(each.rejected.ids)) for key, each in examples}
    missing = sum(size for key, size in sizes.items() if key not in stored)
    process.print(f"hidden states of the reference: {sum(sizes.values()) / 2**30:.3g} GiB for {len(sizes)} pairs, "
                  f"{token_bytes} bytes a response token; {missing / 2**30:.3g} GiB are not yet in {folder}")
    process.on_main(lambda: check_room(folder, missing))

    def write(new: Sides) -> set[int]:
        if new:
            write_cache(folder, STATES, new)
        return set().union(*process.gather(set(new)))  # all ranks
    if missing:
        for (part, batches), numbers in zip(parts, keys):
            run_missing(process, part, batches, rows, numbers, stored, "hidden states",
                        lambda batch: policy(batch, with_hidden=True).hidden_ND.cpu(), write, STATES_FLUSH_BATCHES)
    places = read_places(folder, STATES)
    if absent := sizes.keys() - places.keys():
        raise InputError(f"--ref-states disk: {len(absent)} of {len(sizes)} pairs that other processes have written "
                         f"are not in {folder} here: --cache-dir must be one folder for all of them")
    return StoredStates({example.pair.key: places[key] for key, example in examples})


def check_room(folder: Path, needed: int) -> None:
    """Raise InputError when the disk of a folder that may not be there yet has fewer free bytes."""
    existing = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if needed > (free := shutil.disk_usage(existing).free):
        raise InputError(f"--ref-states disk: {needed / 2**30:.3g} GiB of hidden states are to be written to {folder}, "
                         f"where {free / 2**30:.3g} GiB are free: name another --cache-dir, or use --ref-states memory")


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
