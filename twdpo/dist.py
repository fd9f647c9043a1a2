"""Process group, progress on the first process, and the FSDP2 plan. One process runs the same code as many."""

import math
import os
import pickle
import sys
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from twdpo.flags import InputError

ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of_dtype(dtype: torch.dtype) -> str:
    """As flags and files spell it: `float32`."""
    return str(dtype).removeprefix("torch.")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 elsewhere."""
    return DTYPES["bfloat16" if device.type == "cuda" else "float32"] if name == "auto" else DTYPES[name]


@dataclass(frozen=True)
class Process:
    """This process's place: rank of world_size, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *values) -> None:
        """Print on the first process, above a progress bar if one runs."""
        if self.is_main and sys.stderr.isatty():
            tqdm.write(" ".join(map(str, values)))
        elif self.is_main:  # in a log file tqdm.write would repeat every bar after every line
            print(*values, flush=True)

    def progress(self, items=None, **options):
        """tqdm with rate and time left on the first process, nothing elsewhere."""
        interval = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log file gets a line now and then
        return tqdm(items, disable=not self.is_main, dynamic_ncols=True, smoothing=0.1, mininterval=interval, **options)

    def broadcast(self, value):
        """The first process's value (any picklable object), on all. All ranks."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers. On the host, so no device sync. All ranks."""
        box = torch.tensor(number)
        dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def gather(self, value) -> list:
        """Every process's value, on all. All ranks."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function):
        """Call `function()` on the first process while the others wait; its error is raised on all. All ranks."""
        value = error = None
        if self.is_main:
            try:
                value = function()
            except Exception as raised:  # noqa: BLE001 - carried to every process, so that none waits for ever
                error = raised
        value, carried = self.broadcast((value, carriable(error)))
        if carried is not None:
            raise error or carried
        return value


def carriable(error: Exception | None) -> Exception | None:
    """An error that other processes can be sent: one that can't is its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except (pickle.PickleError, TypeError, AttributeError, ValueError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def start() -> Process:
    """Join the process group of torchrun, or make one of this process alone."""
    transformers_logging.disable_progress_bar()  # its bars would tear ours
    _before.setdefault("cudnn_sdp", torch.backends.cuda.cudnn_sdp_enabled())
    _before.setdefault("excepthook", sys.excepthook)  # torch puts its own around it, at every start another one
    # cuDNN builds a plan for every shape, 136 ms for each on an H200: rows, and what is sampled, change their length.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        expand_segments(os.environ)
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, timeout=timedelta(hours=1), **alone)
    return Process(dist.get_rank(), dist.get_world_size(), device)


_before: dict[str, object] = {}  # what `stop` restores


def expand_segments(environment: MutableMapping[str, str]) -> None:
    """Let CUDA's allocator grow its segments, unless the user has set it up: rows of all lengths leave gaps between
    segments of fixed sizes. It reads the environment when it is first used."""
    if not any(name in environment for name in ALLOCATOR_SETTINGS):
        environment[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def stop() -> None:
    """Leave the process group, if there is one, and restore what `start` changed, but for the allocator's settings:
    they hold for as long as the process lives, and for those that it starts."""
    transformers_logging.enable_progress_bar()
    if _before:
        torch.backends.cuda.enable_cudnn_sdp(_before.pop("cudnn_sdp"))
        sys.excepthook = _before.pop("excepthook")
    if dist.is_initialized():
        dist.destroy_process_group()


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on `device` that the host does not wait for: from pinned memory, as more than a little of any other may be
    staged in the order of what the device has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()  # an expanded one (positions of plain rows) can't be pinned
    return tensor.to(device, non_blocking=True)


def check_copies(replicate: int, world_size: int) -> None:
    """Raise InputError when the processes can't hold so many equal copies of the parameters."""
    if world_size % replicate:
        raise InputError(f"--replicate is {replicate}: {world_size} processes can't hold as many equal copies")


def shard_module(root: torch.nn.Module, layers: list[torch.nn.Module], param_dtype: torch.dtype | None, device,
                 replicate: int = 1) -> None:
    """FSDP2: one group a layer, then the rest (embedding, norm, head) as the root, whose forward reads the head.

    Parameters keep their dtype and are gathered as `param_dtype` (None: as they are), each layer's while the one before
    it computes; gradients are summed in fp32 over the processes. replicate: copies of the parameters, each sharded over
    neighbouring ranks (HSDP). Raises InputError when the processes can't be divided so.

    One process without a dtype to gather as is left alone: sharding would only keep everything twice.
    """
    world_size = dist.get_world_size()
    check_copies(replicate, world_size)
    if world_size == 1 and param_dtype is None:
        return
    if replicate == 1:
        mesh = init_device_mesh(device.type, (world_size,))
    else:
        mesh = init_device_mesh(device.type, (replicate, world_size // replicate),
                                mesh_dim_names=("replicate", "shard"))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype, torch.float32))
    # The root's inputs hold reference log-probs and weights: casting them to bf16 would round them.
    # Without reshard_after_forward the root would stay whole after an evaluation, and hide its parameters.
    fully_shard(root, mesh=mesh, reshard_after_forward=True,
                mp_policy=MixedPrecisionPolicy(param_dtype, torch.float32, cast_forward_inputs=False))
    # The backward pass gathers ahead by itself.
    for module, following in zip([root, *layers], layers):
        module.set_modules_to_forward_prefetch([following])
    for module in root.modules():  # neither setting is recursive
        if isinstance(module, FSDPModule):
            # Sum, not mean: the loss is divided by the pairs of the global batch already.
            module.set_force_sum_reduction_for_comms(True)
            if world_size > 1:  # alone, FSDP2 would divide by it all the same: a pass over all gradients, and a copy
                module.set_gradient_divide_factor(1.0)


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients down to a norm of `max_norm` (0: leave them); their norm before. A device sync. All ranks."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
