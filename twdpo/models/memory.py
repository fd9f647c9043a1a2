"""Memory of one process, and floating-point operations, of training: known from a model's config alone.

The memory of the layers is counted by running them once on the meta device, forward and backward, with a tally of what
is alive.
"""

import re
import resource
import time
import weakref
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from twdpo.batch import PairBatch
from twdpo.config import TrainConfig
from twdpo.dist import Process
from twdpo.flags import InputError
from twdpo.models.attention import Layout, run_decoder
from twdpo.models.build import build_on_meta, decoder_layers, use_fused_norms
from twdpo.models.source import describe_failure, load_model_config, locate_model
from twdpo.objective import find_objective
from twdpo.rows import pack

GIB = 2**30
# Processes and the memory that CUDA reports on each. One that is not listed here is planned for when it runs.
MACHINES = {"1 x H200": (1, 139.8), "2 x A100-80": (2, 79.2), "8 x H100-80": (8, 79.1)}
# Dense bf16 by NVIDIA's data sheets, for names as CUDA gives them; the first that fits counts. A slice of a card (MIG)
# and a card that none fits have no figure.
PEAK_TFLOPS = {r"H200 NVL": 835.0, r"H200": 989.0, r"H100 NVL": 835.0, r"H100 PCIe": 756.0, r"H100.* HBM3": 989.0,
               r"A100": 312.0}
LLAMA_3_8B = ("llama", dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                            num_attention_heads=32, num_key_value_heads=8))
PAPER_MODELS = {  # transformers' name of the architecture, and its sizes
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3_8B,
    "princeton-nlp/Llama-3-Base-8B-SFT": LLAMA_3_8B,
    "alignment-handbook/zephyr-7b-sft-full": ("mistral", LLAMA_3_8B[1] | dict(vocab_size=32000)),
}
RESERVED_GIB = 2.0  # CUDA context, NCCL, fragments
OP_BUFFER_BYTES = 160 << 20  # kernels/weighted_logratio.py: a wave of logits and what goes with it
SAMPLE_TOKENS = 1 << 14  # of the row that is run on the meta device: many, so that gradients of parameters weigh little
CHECKPOINTING = ("none", "selective", "attention", "full")
AUTOMATIC = ("none", "selective", "full")  # what `auto` chooses among; nobody has timed `attention`
CPU_TOKENS, CUDA_TOKENS = 4096, 1 << 14  # of a micro-batch, unless --micro-batch-tokens says otherwise


@dataclass(frozen=True)
class ModelCost:
    """Sizes of a policy. Bytes a token are of rows in `compute_bytes` a number.

    saved: what the forward keeps for the backward pass, all layers. working: what the backward pass holds beyond that
    at its peak, gradients of parameters left out.
    """

    params: int
    layer_params: int  # of the largest layer
    layers_params: int  # of all layers
    head_params: int
    num_layers: int
    hidden_size: int
    heads_width: int  # heads times head dimension, summed over the layers
    num_heads: int
    compute_bytes: int
    saved_bytes: float  # a token
    working_bytes: float  # a token

    @property
    def root_params(self) -> int:
        """Those outside the layers: embedding, norm, head."""
        return self.params - self.layers_params


def model_cost(model_config, compute_dtype: torch.dtype, max_length: int, packs: bool = True,
               measure_layers: bool = True) -> ModelCost:
    """Count parameters and, unless `measure_layers` is off, the activations of rows of pairs of `max_length` tokens.

    Raises InputError for layers that need values to run (mixtures of experts).
    """
    model = build_on_meta(model_config, compute_dtype)
    text_config = model.config.get_text_config()
    layers = decoder_layers(model)
    layer_params = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    heads = text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // heads
    try:
        saved, working = measure_decoder(model, max_length, packs) if measure_layers else (0.0, 0.0)
    except RuntimeError as error:
        raise InputError(f"{text_config.model_type}: its memory can't be planned, as its layers can't be run without "
                         f"values ({error})") from error
    return ModelCost(sum(parameter.numel() for parameter in model.parameters()), max(layer_params), sum(layer_params),
                     model.get_output_embeddings().weight.numel(), len(layers), text_config.hidden_size,
                     heads * head_dim * len(layers), heads, compute_dtype.itemsize, saved, working)


def measure_decoder(model, max_length: int, packs: bool) -> tuple[float, float]:
    """(bytes a token that a forward saves, bytes a token beyond that at the backward pass's peak), on meta tensors."""
    length = max(8, min(max_length, SAMPLE_TOKENS // 2))
    prompt, answer = length // 4, length - length // 4
    sequence = np.arange(prompt + answer, dtype=np.int32)
    pair = [sequence, np.concatenate([sequence[:prompt], sequence[prompt:][::-1]])]
    row = pack([pair] * max(1, SAMPLE_TOKENS // (prompt + 2 * answer)), share=packs)
    num_tokens = len(row.input_ids_T)
    ids = torch.zeros(1, num_tokens, dtype=torch.long, device="meta")
    positions = torch.zeros_like(ids)
    model.config.pad_token_id = None  # some models look for it among the ids
    known = [*model.parameters(), *model.buffers(), ids, positions]
    use_fused_norms(model)
    with FusedKernels(), LiveBytes(known) as tally:
        hidden = run_decoder(model.get_decoder(), ids, positions, Layout(row.ranges))
        tally.peak = saved = tally.live
        for parameter in model.parameters():  # their gradients are planned for apart
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        hidden.backward(torch.empty_like(hidden))
    return saved / num_tokens, (tally.peak - saved) / num_tokens


class FusedKernels(TorchFunctionMode):
    """Inside this context attention and RMS norms keep what fused kernels keep: no S x S map, no fp32 copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return _Flash.apply(*args[:3])
        if func is F.rms_norm:
            return _Norm.apply(args[0], kwargs["weight"])
        return func(*args, **(kwargs or {}))


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query_BHTD, key, value):
        output = query_BHTD.new_empty(*query_BHTD.shape[:3], value.shape[3])
        ctx.save_for_backward(query_BHTD, key, value, output,
                              query_BHTD.new_empty(query_BHTD.shape[:3], dtype=torch.float32))  # log-sum-exps
        return output

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_X, weight_D):
        ctx.save_for_backward(hidden_X, weight_D, hidden_X.new_empty(hidden_X.shape[:-1], dtype=torch.float32))
        return torch.empty_like(hidden_X)

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:2])


class LiveBytes(TorchDispatchMode):
    """Inside this context: bytes of the tensors that are alive, and their peak; those given are left out."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.known = known  # kept, so that no new storage takes the place of one of them
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torch_attn._varlen_attn_backward.default:
            self.peak = max(self.peak, self.live + varlen_scratch_bytes(*args[1:3], args[6]))
        outputs = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return outputs

    def _count(self, storage) -> None:
        place = storage._cdata
        if place in self.seen:
            return
        self.seen.add(place)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, place, storage.nbytes())

    def _free(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.live -= size


def varlen_scratch_bytes(query_QHD, key_KHD, query_offsets) -> int:
    """What the kernels behind `varlen_attn` take for themselves in a backward pass: the queries' gradient in fp32,
    each sequence rounded up to a block of 128, and where heads are grouped keys' and values' of every head."""
    (num_queries, heads, head_dim), sequences = query_QHD.shape, len(query_offsets) - 1
    scratch = 4 * (num_queries + 128 * sequences) * heads * head_dim
    if key_KHD.shape[1] != heads:
        scratch += 2 * len(key_KHD) * heads * head_dim * key_KHD.element_size()
    return scratch


def plan_memory(cost: ModelCost, world_size: int, num_tokens: int, checkpointing: str, no_sync: bool = False,
                shards: int = 0, head_cache_gib: float = 0.0, reference: str = "") -> dict[str, float]:
    """Bytes of one process at the peak of a training step, by what they are for; "peak" is their sum.

    num_tokens: of a micro-batch. shards: processes that share one copy of the parameters (0: all of them). reference:
    twdpo.objective.Objective.place_of_reference.
    """
    shards, width = shards or world_size, cost.compute_bytes
    kept = {"none": cost.num_layers, "selective": -(-cost.num_layers // 2)}.get(checkpointing, 0)
    a_layer = cost.saved_bytes / cost.num_layers
    # What a layer that is computed again keeps is its input; one of them at a time is whole again.
    activations = kept * a_layer + (cost.num_layers - kept) * cost.hidden_size * width
    if checkpointing == "attention":  # its outputs, and in fp32 its log-sum-exps
        activations += cost.heads_width * width + 4 * cost.num_heads * cost.num_layers
    activations += (a_layer if checkpointing != "none" else 0) + cost.working_bytes
    head = OP_BUFFER_BYTES + num_tokens * cost.hidden_size * (4 + 2 * width) + width * cost.head_params
    head += min(head_cache_gib * GIB, num_tokens * width * cost.head_params / cost.hidden_size)
    head += num_tokens * cost.hidden_size * width if reference else 0  # its hidden states
    # Two layers are gathered at once, one of them has gradients and their fp32 copy that is reduced.
    in_backward = num_tokens * activations + head + (3 * width + 4) * cost.layer_params
    at_its_end = (width + 4) * cost.root_params  # gradients of embedding, norm and head, and their fp32 copy
    gathered = width * cost.root_params
    if world_size == 1 and width == 4:  # nothing is gathered or copied (twdpo.dist.shard_module)
        in_backward, at_its_end, gathered = num_tokens * activations + head, 0, 0
    parts = {
        "parameters (fp32)": 4 * cost.params / shards,
        "Adam (fp32)": 8 * cost.params / shards,
        "gradients (fp32)": 4 * cost.params / (1 if no_sync and shards > 1 else shards),
        "gathered embedding, norm, head": gathered,
        "layers and fused op": max(in_backward, at_its_end),
    }
    if reference == "anchors":
        # Of the second forward, taken to be as long. Its gradients wait, whole, for those of the first.
        is_whole = world_size == 1 and width == 4
        parts["anchors' forward"] = num_tokens * activations + (0 if is_whole else width * cost.params)
    if reference:
        parts["frozen reference"] = reference_bytes(cost, world_size, shards, reference)
    return parts | {"peak": sum(parts.values())}


def reference_bytes(cost: ModelCost, world_size: int, shards: int, reference: str) -> float:
    """What is resident of a frozen reference while the policy runs: its shards, and its head gathered. (Its layers run,
    two gathered at once, before the policy's, which take more.)"""
    # Whole in one process: twdpo.dist.shard_module, twdpo.models.reference.keep_head.
    is_whole = world_size == 1 and (cost.compute_bytes == 4 or reference == "disk")
    params = cost.head_params if reference == "disk" else cost.params
    return cost.compute_bytes * (params / shards + (0 if is_whole else cost.head_params))


def most_tokens(cost: ModelCost, world_size: int, memory_gib: float, checkpointing: str, no_sync: bool = False,
                shards: int = 0, head_cache_gib: float = 0.0, reference: str = "") -> int:
    """The largest micro-batch in tokens, in steps of 1,024, that the plan says fits; 0 when none does."""
    room = (memory_gib - RESERVED_GIB) * GIB
    tokens = 0
    while tokens < 1 << 20 and plan_memory(cost, world_size, tokens + 1024, checkpointing, no_sync, shards,
                                           head_cache_gib, reference)["peak"] <= room:
        tokens += 1024
    return tokens


def choose(cost: ModelCost, world_size: int, memory_gib: float, config: TrainConfig, reference: str = ""
           ) -> tuple[str, int]:
    """(--checkpointing, --micro-batch-tokens) as they are given, or the least recomputation that lets the wanted tokens
    fit by the plan; 0 tokens when nothing fits. reference: as of `plan_memory`."""
    wanted = config.micro_batch_tokens or CUDA_TOKENS
    shards = world_size // config.replicate
    for checkpointing in AUTOMATIC if config.checkpointing == "auto" else (config.checkpointing,):
        tokens = min(wanted, most_tokens(cost, world_size, memory_gib, checkpointing, config.no_sync, shards,
                                         config.head_cache_gib, reference))
        if tokens == wanted:
            break
    return checkpointing, config.micro_batch_tokens or tokens


def settle_memory(config: TrainConfig, model_config, compute_dtype: torch.dtype, process: Process, reference: str = ""
                  ) -> tuple[str, int]:
    """(--checkpointing, --micro-batch-tokens) of a run. reference: as of `plan_memory`.

    Raises InputError when the plan finds no room on a GPU.
    """
    if process.device.type != "cuda":
        if config.head_cache_gib:
            process.print(f"--head-cache-gib {config.head_cache_gib:g} has no effect on a CPU")
        return config.checkpointing.replace("auto", "none"), config.micro_batch_tokens or CPU_TOKENS
    if config.checkpointing != "auto" and config.micro_batch_tokens:
        return config.checkpointing, config.micro_batch_tokens
    memory = torch.cuda.get_device_properties(process.device).total_memory / GIB
    try:
        cost = model_cost(model_config, compute_dtype, config.max_length, config.packing != "off")
    except InputError as error:  # what can't be planned is not refused
        process.print(f"{error}; --checkpointing full")
        return config.checkpointing.replace("auto", "full"), config.micro_batch_tokens or CUDA_TOKENS
    checkpointing, tokens = choose(cost, process.world_size, memory, config, reference)
    if not tokens:
        raise InputError(f"the model does not fit {process.world_size} device(s) of {memory:.0f} GiB by the memory "
                         "plan (--plan): use more of them, or set --micro-batch-tokens and --checkpointing to try"
                         + ", or --ref-states disk, without a second model" * (reference == "memory"))
    return checkpointing, tokens


def describe_plan(cost: ModelCost, machines: dict[str, tuple[int, float]], config: TrainConfig, reference: str = ""
                  ) -> str:
    """The memory plan as text, one column a machine: what a run would take, its parts, and what else fits."""
    runs = {name: choose(cost, size, memory, config, reference) for name, (size, memory) in machines.items()}
    plans = {name: plan_memory(cost, size, runs[name][1], runs[name][0], config.no_sync, size // config.replicate,
                               config.head_cache_gib, reference) for name, (size, _) in machines.items()}

    def line(title: str, cells) -> str:
        return f"{title:42}" + "".join(f"{cell:>15}" for cell in cells)
    lines = [f"{cost.params / 1e9:.2f} B parameters, {cost.root_params / 1e9:.2f} B of them outside the "
             f"{cost.num_layers} layers; GiB on each device",
             line("", plans), line("--checkpointing", (checkpointing for checkpointing, _ in runs.values())),
             line("--micro-batch-tokens (0: does not fit)", (f"{tokens:,}" for _, tokens in runs.values()))]
    for part in next(iter(plans.values())):
        lines.append(line(f"  {part}", (f"{plan[part] / GIB:.1f}" for plan in plans.values())))
    lines.append(line("  of the device", (f"{memory:.1f}" for _, memory in machines.values())))
    for checkpointing in CHECKPOINTING:
        cells = (most_tokens(cost, size, memory, checkpointing, config.no_sync, size // config.replicate,
                             config.head_cache_gib, reference) for size, memory in machines.values())
        lines.append(line(f"most tokens, --checkpointing {checkpointing}", (f"{cell:,}" for cell in cells)))
    return "\n".join(text.rstrip() for text in lines)


def plan_for(config: TrainConfig, process: Process) -> str:
    """What --plan prints: the memory of this run on a few machines, and on this one's GPUs. Raises InputError."""
    model_config = find_model_config(config)
    machines, size = dict(MACHINES), process.world_size
    if process.device.type == "cuda":
        memory = torch.cuda.get_device_properties(process.device).total_memory / GIB
        machines = {f"{size} here": (size, memory)} | machines
    elif size > 1:
        machines = {f"{size} x H100-80": (size, MACHINES["8 x H100-80"][1])} | machines
    machines = {name: machine for name, machine in machines.items() if machine[0] % config.replicate == 0}
    if not machines:
        raise InputError(f"--replicate is {config.replicate}: none of the planned machines can hold as many copies; "
                         "start the plan with torchrun and as many processes as the run")
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    try:
        cost = model_cost(model_config, dtype, config.max_length, config.packing != "off")
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - a config may say anything
        raise InputError(f"--plan: no causal language model can be built from the config of {config.model} "
                         f"({type(error).__name__}: {error})") from error
    return describe_plan(cost, machines, config, find_objective(config, process).place_of_reference(config))


def find_model_config(config: TrainConfig):
    """The config of --model: of a folder, from the hub, or known here. Raises InputError."""
    if config.model in ("", "toy"):
        return load_model_config(locate_model("toy", "--model"))
    if config.model in PAPER_MODELS:  # gated; and a hub that can't be reached is asked again for half a minute
        name, settings = PAPER_MODELS[config.model]
        return AutoConfig.for_model(name, **settings)
    try:
        return AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a config may say anything
        raise InputError(f"--model {config.model}: its config can't be read "
                         f"({describe_failure(error)})") from error


def flops(cost: ModelCost, batch: PairBatch, reference: str = "") -> float:
    """Operations of a forward and a backward pass over a micro-batch: 6 for each acting parameter and token, the head
    on response tokens alone, attention on what each token sees; a third of it for a forward of the reference, of whose
    layers nothing runs when its hidden states are on disk. Nothing that is computed again is counted, and nothing of
    anchors. Dense models; sliding windows are counted as if they were not there. reference: as of `plan_memory`."""
    lengths = [len(example.prompt_ids) + len(response.ids) for example in batch.examples
               for response in (example.chosen, example.rejected)]
    shared = [pieces[0][1] - pieces[0][0] if len(pieces) > 1 else 0 for pieces in batch.ranges]
    tokens = sum(lengths) - sum(shared)
    seen = sum(length ** 2 - before ** 2 for length, before in zip(lengths, shared)) / 2
    layers = 6.0 * cost.layers_params * tokens + 12.0 * cost.heads_width * seen
    head = 6.0 * cost.head_params * len(batch.targets_N)
    return layers * (4 / 3 if reference == "memory" else 1) + head * (4 / 3 if reference in ("memory", "disk") else 1)


def peak_tflops(device: torch.device) -> float | None:
    """What the data sheet of a GPU says for dense bf16; None for one that is not listed here, and for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.search(rf"\b{pattern}\b", name)), None)


def throughput(process: Process, batches: list[PairBatch], num_pairs: int, started: float, cost: ModelCost | None,
               reference: str) -> dict[str, float]:
    """Rates over all processes since `started`, and the peak memory of one process; with the model's cost also TFLOP/s
    and MFU of one process, copies that keep it in step not counted. reference: as of `flops`. All ranks."""
    tokens = sum(process.gather(sum(batch.num_tokens for batch in batches)))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    if process.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    row = {"tokens_per_s": tokens / seconds, "pairs_per_s": num_pairs / seconds, "peak_memory_gib": peak / GIB}
    if process.device.type == "cuda":
        row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB  # what the card has to hold, gaps included
    if cost:
        done = sum(flops(cost, batch, reference) for batch in batches if not batch.is_copy)
        row["tflops"] = sum(process.gather(done)) / process.world_size / seconds / 1e12
        if peak_rate := peak_tflops(process.device):
            row["mfu"] = row["tflops"] / peak_rate
    return row
