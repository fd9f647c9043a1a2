"""Shards of a checkpoint: its tensors read from safetensors files, of a sharded model each process's part alone."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from twdpo.flags import InputError
from twdpo.models.source import checkpoint_files


def load_shards(root: torch.nn.Module, directory: Path, device: torch.device) -> list[str]:
    """Give a sharded module on meta its memory, and each process its part of the checkpoint; the names of tensors that
    have no place in it. Raises InputError."""
    model = root.model
    root.to_empty(device=device)
    if not isinstance(root, FSDPModule):  # which keeps ties through to_empty
        model.tie_weights()
    state = model.state_dict()
    try:
        unplaced = read_tensors(model, state, directory)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the tensors in {directory} don't match a {model.config.model_type} model: {error}"
                         ) from error
    # to_empty leaves buffers that no checkpoint holds (rotary frequencies) as garbage: compute them, and only them.
    loaded = [*model.parameters(), *(buffer for name, buffer in model.named_buffers() if name in state)]
    for tensor in loaded:
        tensor._is_hf_initialized = True
    model.initialize_weights()
    return unplaced


def read_tensors(model, state: dict[str, torch.Tensor], directory: Path) -> list[str]:
    """Copy a checkpoint's tensors into `state`, of a sharded tensor this process's part; the names of those that have
    no place there. Raises ValueError when one is missing, has another shape, or differs from one that the model's
    config ties it to."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import rename_source_key
    renamings, found = get_model_conversion_mapping(model) or [], {}
    for path in checkpoint_files(directory):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                # The file may have other names than the model: transformers has renamed some since (the head of
                # GPT-NeoX), and a checkpoint of the trunk alone lacks a prefix.
                renamed, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
                if name in state or renamed not in found:
                    found[name if name in state else renamed] = path, name
    tied = model.all_tied_weights_keys
    for name, source in tied.items():
        if name in found:
            found.setdefault(source, found[name])
    if missing := sorted(state.keys() - found.keys() - tied.keys()):
        raise ValueError(f"{len(missing)} are missing, {missing[0]} among them")
    for name, tensor in state.items():
        if name not in tied:
            local, part = stored_part(tensor, *found[name])
            local.copy_(part)
    for name in tied.keys() & found.keys():
        local, part = stored_part(state[name], *found[name])
        if not torch.equal(local, part.to(local)):
            raise ValueError(f"its config ties {name} to {tied[name]}, the file holds two different tensors: set "
                             "tie_word_embeddings to false in config.json")
    return [found[name][1] for name in sorted(found.keys() - state.keys() - tied.keys())]


def stored_part(tensor: torch.Tensor, path: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(what this process holds of `tensor`, the same part of a tensor in a safetensors file). Raises ValueError."""
    with safe_open(path, "pt") as file:
        stored = file.get_slice(name)
        if stored.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise ValueError(f"{name} is stored as {stored.get_dtype()}: quantised checkpoints can't be trained")
        if list(tensor.shape) != stored.get_shape():
            raise ValueError(f"{name} is {stored.get_shape()} in the file, {list(tensor.shape)} in the model")
        if not isinstance(tensor, DTensor):
            return tensor, file.get_tensor(name)
        _, first = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local()
        if not local.numel():
            return local, local
        return local, stored[tuple(slice(start, start + size) for start, size in zip(first, local.shape))]


def warn_of_unplaced(model, names: list[str], directory: Path) -> str:
    """What to say of tensors of a checkpoint that a model has no place for; "" without any, or for those that its
    architecture is known to leave."""
    known = ["rotary_emb\\.inv_freq", *(model._keys_to_ignore_on_load_unexpected or ())]
    names = sorted(name for name in names if not any(re.search(pattern, name) for pattern in known))
    if not names:
        return ""
    return (f"warning: {len(names)} tensors in {directory} have no place in the {model.config.model_type} model that "
            f"its config.json describes, and are not loaded: {', '.join(names[:4])}{', ...' * (len(names) > 4)}")
