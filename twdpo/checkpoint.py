"""Checkpoints saved and loaded, models exported. No pickle is ever written or read.

OUT/checkpoints/step-0000500/  sharded tensors (model, AdamW moments, RNG states) and manifest.json, which holds the
                               step, the world size, and size and sha256 of each file. It is written last, and the
                               folder renamed into place after it: a folder named step-* is complete.
OUT/final, OUT/best            Hugging Face models
"""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

from twdpo.dist import DTYPES, Process
from twdpo.files import discard, hash_file, remove, sync, temporary_path, write_atomic, write_json
from twdpo.flags import InputError
from twdpo.models.policy import Policy
from twdpo.models.source import load_model_config
from twdpo.run_folder import EVALUATION, MANIFEST, checkpoint_path, list_checkpoints, read_manifest, write_manifest


def state_tensors(policy: Policy, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name, sharded as they are; moments that don't exist yet are made, as zeros.

    AdamW's step counts are left to the caller: they are the manifest's step.
    """
    state: dict[str, torch.Tensor] = {}
    for name, parameter in policy.named_parameters():
        moments = optimizer.state[parameter]
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment not in moments:
                moments[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
            state[f"optim.{moment}.{name}"] = moments[moment]
        state[f"model.{name}"] = parameter.detach()
    persistent = policy.state_dict().keys()
    return state | {f"model.{name}": buffer for name, buffer in policy.named_buffers() if name in persistent}


def rng_tensors(process: Process) -> dict[str, torch.Tensor]:
    """The random states of this process, under its own names."""
    states = {f"rng.cpu.{process.rank}": torch.get_rng_state()}
    if process.device.type == "cuda":
        states[f"rng.cuda.{process.rank}"] = torch.cuda.get_rng_state()
    return states


def save_checkpoint(run_dir: Path, step: int, policy: Policy, optimizer: torch.optim.AdamW, origin: dict[str, object],
                    process: Process, keep_last: int) -> Path:
    """Write the checkpoint of `step`, then delete all but the last `keep_last` (0: keep all). All ranks.

    origin: what the run is made from, which stands in the manifest: run_id, settings, and the identity that
    `load_checkpoint` compares.
    """
    path = checkpoint_path(run_dir, step)
    temporary = process.broadcast(temporary_path(path))
    process.on_main(lambda: temporary.mkdir(parents=True))
    try:
        writer = dcp.HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        dcp.save(state_tensors(policy, optimizer) | rng_tensors(process), storage_writer=writer)
        mine = list(temporary.glob(f"shard-{process.rank + 1:05d}-*"))
        for file in mine:  # each process what it wrote: another machine's sync would not wait for it
            sync(file)
        hashes = process.gather({file.name: hash_file(file) for file in mine})
        process.on_main(lambda: finish_checkpoint(temporary, path, hashes, origin | {"step": step}, process))
    except BaseException:
        if process.is_main:  # half a checkpoint is large, and the disk may be full
            remove(temporary)
        raise
    if keep_last:
        process.on_main(lambda: [discard(old) for old in list_checkpoints(run_dir)[:-keep_last]])
    return path


def finish_checkpoint(temporary: Path, path: Path, hashes: list[dict[str, str]], manifest: dict[str, object],
                      process: Process) -> None:
    """Write the manifest of what all processes have written, and give the folder its name. The first process."""
    known = {name: digest for part in hashes for name, digest in part.items()}
    for file in temporary.iterdir():
        if file.name not in known:
            sync(file)
    files = {file.name: {"size": file.stat().st_size, "sha256": known.get(file.name) or hash_file(file)}
             for file in sorted(temporary.iterdir())}
    write_manifest(temporary, manifest | {"world_size": process.world_size, "files": files})
    os.rename(temporary, path)
    sync(path.parent)


def load_checkpoint(path: Path, policy: Policy, optimizer: torch.optim.AdamW, identity: dict[str, str],
                    process: Process) -> int:
    """Restore model, optimizer and random states in place: the step. All ranks.

    Raises InputError when a file is missing, extra or changed, and names it; and when the run was made from something
    else than `identity`. Another world size may read it; the random states are then those of the processes that exist
    in both.
    """
    manifest = read_manifest(path)
    check_identity(path, manifest, identity)
    problems = process.gather(check_files(path, manifest, process))
    if first := next((problem for part in problems for problem in part), None):
        raise InputError(f"checkpoint {path} is damaged: {first}. Resume from another one with --resume DIR")
    tensors = state_tensors(policy, optimizer)
    rng = rng_tensors(process) if process.rank < manifest["world_size"] else {}
    dcp.load(tensors | rng, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group["fused"] else "cpu"  # where AdamW keeps its own count
            optimizer.state[parameter]["step"] = torch.tensor(float(manifest["step"]), device=device)
    for name, state in rng.items():
        (torch.cuda if ".cuda." in name else torch).set_rng_state(state)
    return manifest["step"]


def check_identity(path: Path, manifest: dict[str, object], identity: dict[str, str]) -> None:
    """Raise InputError that names what has changed under the same settings since the checkpoint was written."""
    old = manifest["identity"]
    if changed := [name for name in sorted(old.keys() | identity.keys()) if old.get(name) != identity.get(name)]:
        raise InputError(f"checkpoint {path} is of another run: since then {', '.join(changed)} changed. Put back what "
                         "it was, or start anew in another --output-dir")


def check_files(path: Path, manifest: dict[str, object], process: Process) -> list[str]:
    """What is wrong with a checkpoint's files; the processes share the hashing."""
    files, present = manifest["files"], {file.name for file in path.iterdir()} - {MANIFEST}
    problems = [f"{name} is missing" for name in sorted(files.keys() - present)]
    problems += [f"{name} does not belong to it" for name in sorted(present - files.keys())]
    for name in sorted(files.keys() & present)[process.rank::process.world_size]:
        if (path / name).stat().st_size != files[name]["size"] or hash_file(path / name) != files[name]["sha256"]:
            problems.append(f"{name} has changed")
    return problems


def export_model(path: Path, policy: Policy, tokenizer, source: Path, save_dtype: str, process: Process,
                 evaluation: dict[str, float] | None = None) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load, in `save_dtype`. All ranks.

    source: the model folder that training started from; an empty `save_dtype` is its own. evaluation: the policy's row
    of metrics.jsonl, kept beside it.
    """
    full = get_model_state_dict(policy, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write(temporary: Path) -> None:
        model_config = load_model_config(source)
        dtype = DTYPES[save_dtype] if save_dtype else model_config.dtype or torch.float32
        with torch.device("meta"):  # the shell's dtype is what config.json will say
            shell = AutoModelForCausalLM.from_config(model_config, dtype=dtype, trust_remote_code=False)
        state = {name.removeprefix("model."): tensor.to(dtype) for name, tensor in full.items()}
        for name in shell.all_tied_weights_keys:
            state.pop(name, None)
        shell.save_pretrained(temporary, state_dict=state)
        if (source / "generation_config.json").is_file():
            shutil.copyfile(source / "generation_config.json", temporary / "generation_config.json")
        tokenizer.save_pretrained(temporary)
        if evaluation:
            write_json(temporary / EVALUATION, evaluation)

    process.on_main(lambda: write_atomic(path, write))
