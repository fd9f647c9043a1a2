"""Reference log-probs: one pass of the policy's starting weights before step 1, cached per pair.

Same module, same kernel and the row plan of the first epoch, so that the margin at step 0 is exactly zero and no second
model is ever resident. A cache folder is named by what log-probs depend on; a pair in it by its tokens.
"""

from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from twdpo.batch import collate, plan_micro_batches
from twdpo.chat import Example
from twdpo.dist import Process
from twdpo.files import hash_json, hash_to_int64, write_atomic
from twdpo.logratio import LOGPS_VERSION
from twdpo.rows import RowOptions

FLUSH_BATCHES = 16  # global batches between writes to the cache

Logps = tuple[np.ndarray, np.ndarray]  # fp32 log-probs of the chosen and of the rejected response's tokens


def reference_directory(cache: Path, model_fingerprint: str, dtype: torch.dtype, device: torch.device, packs: bool,
                        compiled: bool) -> Path:
    """The cache folder of one set of weights and numerics."""
    # The device: log-probs of another one differ by rounding, and the first margin would not be exactly 0.
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    key = {"model": model_fingerprint, "dtype": str(dtype), "attention": "sdpa", "packing": packs,
           "compiled": compiled, "op": LOGPS_VERSION, "torch": torch.__version__, "device": device_name}
    return cache / "reference" / hash_json(key)[:24]


def example_key(example: Example) -> int:
    """64-bit content key of a pair's tokens."""
    return hash_to_int64([example.prompt_ids.tolist(), example.chosen.ids.tolist(), example.rejected.ids.tolist()])


@torch.no_grad()
def reference_logps(policy, process: Process, examples: list[Example], batches: list[list[int]], rows: RowOptions,
                    directory: Path) -> dict[int, Logps]:
    """Log-probs under the policy as it is now, by index into `examples`, for all pairs of `batches`. All ranks."""
    keys = {pair: example_key(examples[pair]) for batch in batches for pair in batch}
    # One process reads, so that all agree on what is left to do even when they don't share a disk.
    stored: dict[int, Logps] = process.broadcast(read_cache(directory, set(keys.values())) if process.is_main else None)
    missing = sum(key not in stored for key in keys.values())
    process.print(f"reference log-probs: {len(keys) - missing} of {len(keys)} pairs cached in {directory}")
    if not missing:
        return {pair: stored[key] for pair, key in keys.items()}
    new: dict[int, Logps] = {}
    with process.progress(total=len(keys), desc="reference", unit="pair") as bar:
        for number, pairs in enumerate(batches, 1):
            plan = plan_micro_batches(pairs, examples, process.world_size, rows)
            for place, micro_batch in enumerate(plan[process.rank]):
                everyone = [pair for rank in plan for pair in rank[place].pairs]
                if all(keys[pair] in stored for pair in everyone):
                    continue
                batch = collate(micro_batch, examples, pairs, packs=rows.packs).to(process.device)
                _, logps_N = policy(batch)  # all ranks
                parts = [part.numpy() for part in logps_N.float().cpu().split(batch.seq_lens_S.tolist())]  # sync
                new |= {keys[pair]: tuple(parts[2 * row:2 * row + 2]) for row, pair in enumerate(micro_batch.pairs)
                        if keys[pair] not in stored}
            if number % FLUSH_BATCHES == 0 or number == len(batches):
                for part in process.gather(new):  # all ranks
                    new = part | new
                if process.is_main and new:
                    write_cache(directory, new)
                stored, new = stored | new, {}
            bar.update(len(pairs))
    return {pair: stored[key] for pair, key in keys.items()}


def cached_logps(process: Process, examples: list[Example], directory: Path) -> list[Logps] | None:
    """Log-probs of all examples from the cache, None unless it holds every one. All ranks."""
    keys = [example_key(example) for example in examples]
    stored = process.broadcast(read_cache(directory, set(keys)) if process.is_main else None)
    return [stored[key] for key in keys] if all(key in stored for key in keys) else None


def write_cache(directory: Path, logps: dict[int, Logps]) -> None:
    """One file of the cache, written atomically; its name holds a hash of its keys."""
    keys = sorted(logps)
    arrays = {
        "key_E": np.array(keys, dtype=np.int64),
        "length_E2": np.array([[len(side) for side in logps[key]] for key in keys], dtype=np.int64),
        "logps_N": np.concatenate([side for key in keys for side in logps[key]]),
    }
    path = directory / f"logps-{hash_json(keys)[:16]}.safetensors"
    write_atomic(path, lambda temporary: safetensors.numpy.save_file(arrays, temporary))


def read_cache(directory: Path, wanted: set[int]) -> dict[int, Logps]:
    """Cached log-probs of the wanted keys. A file that can't be read is removed, with a word."""
    found: dict[int, Logps] = {}
    for path in sorted(directory.glob("logps-*.safetensors")):
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
