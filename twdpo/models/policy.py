"""The policy: a causal LM in FSDP2 shards whose forward ends in weighted log-ratios."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import register_fsdp_forward_method

from twdpo.batch import Outputs, PairBatch, SequenceBatch, collate
from twdpo.dist import Process, shard_module
from twdpo.flags import InputError
from twdpo.logratio import logits_of, weighted_logratio
from twdpo.models.attention import Layout, run_decoder
from twdpo.models.build import (
    build_on_meta,
    compile_layers,
    decoder_layers,
    enable_checkpointing,
    head_options,
    suit_device,
)
from twdpo.models.shards import load_shards, warn_of_unplaced
from twdpo.models.source import load_model_config
from twdpo.rows import MicroBatch
from twdpo.tokens import Example

NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(^|[._])norm($|\.)")  # parameters' names, as of transformers' Trainer


class Policy(torch.nn.Module):
    """A causal LM whose forward ends in weighted log-ratios.

    The head's weight is read inside this forward, where FSDP2 has gathered it: this module is the FSDP root.
    """

    def __init__(self, model, head_cache_gib: float = 0.0):
        super().__init__()
        self.model, self.head_cache_gib = model, head_cache_gib
        self.options = head_options(model.config)

    def forward(self, batch: PairBatch, weigh: Callable[[PairBatch], PairBatch] | None = None,
                terms: tuple[str, ...] = (), with_hidden: bool = False) -> Outputs:
        """Log-probs and weighted log-ratios of a batch. Only response tokens reach the head.

        weigh: gives the batch the weights of an online source, which reads batch.hidden_ND. terms: of the fused op
        (twdpo.logratio.TERMS), some of which compare with batch.ref_states. with_hidden: the outputs hold the hidden
        states too.
        """
        # No mask: rows are causal, and padded on the right only or packed (twdpo/rows.py).
        hidden_ND, head = response_states(self.model, batch), self.model.get_output_embeddings()
        if weigh is not None:
            batch = replace(weigh(replace(batch, hidden_ND=hidden_ND.detach())), hidden_ND=None)
        ratio_S, logps_N, found = weighted_logratio(
            hidden_ND, head.weight, batch.targets_N, batch.ref_logps_N, batch.weights_N, batch.seq_lens_S,
            batch.scale_S, getattr(head, "bias", None), self.options, terms, self.head_cache_gib, batch.ref_states)
        return Outputs(ratio_S, logps_N, replace(batch, ref_states=None), found, hidden_ND if with_hidden else None)

    def states_and_head(self, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(hidden_ND, head_VD, bias_V) for what `forward` does not do; copies of the head, which outlive its shards.

        Under FSDP2 all ranks.
        """
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        return (response_states(self.model, batch), head.weight.detach().clone(),
                None if bias is None else bias.detach().clone())

    def largest_logits(self, batch: SequenceBatch, delta_RTD: torch.Tensor) -> torch.Tensor:
        """The largest logit at each position of batch.predict_N, [N] fp32, where `delta_RTD` is added to the embeddings
        of the tokens. (What FSDP2 has to know of must be an argument of its own.) Under FSDP2 all ranks."""
        embeddings_RTD = self.model.get_input_embeddings()(batch.input_ids_RT).detach()
        hidden_ND = response_states(self.model, batch, embeddings_RTD + delta_RTD.to(embeddings_RTD.dtype))
        head = self.model.get_output_embeddings()
        logits_NV = logits_of(hidden_ND, head.weight, getattr(head, "bias", None), self.options)
        return logits_NV.max(dim=-1).values

    def set_requires_gradient_sync(self, on: bool) -> None:
        """FSDP2 replaces this; one process that holds everything has nothing to reduce."""

    def generate(self, **arguments) -> torch.Tensor:
        """transformers' `generate` of the model. Under FSDP2 all ranks."""
        return self.model.generate(**arguments)


def response_states(model, batch: SequenceBatch, embeddings_RTD: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states of a causal LM that predict the response tokens [N, D]; of its tokens, or of these embeddings."""
    layout = Layout(batch.ranges, batch.packs)
    hidden_RTD = run_decoder(model.get_decoder(), batch.input_ids_RT, batch.positions_RT, layout,
                             embeddings_RTD=embeddings_RTD)
    return hidden_RTD.flatten(0, 1).index_select(0, batch.predict_N)


@torch.no_grad()
def settle_packing(policy: Policy, packing: str, examples: list[Example], process: Process) -> bool:
    """Whether rows are packed: as --packing says; `auto` compares the log-probs of a few short pairs. All ranks.

    Raises InputError when --packing on changes them.
    """
    if packing == "off" or not examples:
        return False
    few = sorted(examples, key=lambda example: example.longest)[:4]
    micro_batch = MicroBatch(tuple(range(len(few))))
    packed_N, plain_N = (
        policy(collate(micro_batch, few, list(micro_batch.pairs), packs=packs).to(process.device)).logps_N
        for packs in (True, False))
    difference = max(process.gather(((packed_N - plain_N).norm() / plain_N.norm()).item()))  # sync, all ranks
    exact = next(policy.model.parameters()).dtype == torch.float32 and packed_N.device.type == "cpu"
    if difference <= (1e-4 if exact else 2e-2):
        return True
    message = f"packed rows change log-probs by {difference:.2g} (relative) for this model"
    if packing == "on":
        raise InputError(f"--packing on: {message}; use --packing off")
    process.print(f"{message}: plain rows are used")
    return False


def load_policy(directory: Path, compute_dtype: torch.dtype, process: Process, checkpointing: str = "none",
                replicate: int = 1, compile: bool = False, head_cache_gib: float = 0.0) -> Policy:
    """The policy: built without memory, sharded, then each process reads its own shards of the checkpoint. All ranks.

    Parameters are fp32. checkpointing, replicate, compile, head_cache_gib: as the flags say. Raises InputError for a
    checkpoint whose tensors don't match the architecture.
    """
    policy = build_policy(load_model_config(directory), compute_dtype, process, checkpointing, replicate, compile,
                          head_cache_gib)
    unplaced = load_shards(policy, directory, process.device)
    if warning := warn_of_unplaced(policy.model, unplaced, directory):
        process.print(warning)
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())
    return policy


def make_optimizer(policy: Policy, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters; norms and biases don't decay, by the rule of transformers' Trainer."""
    norms = {parameter for module in policy.modules() if isinstance(module, torch.nn.LayerNorm)
             for parameter in module.parameters()}
    decaying, others = [], []
    for name, parameter in policy.named_parameters():
        (others if NO_DECAY.search(name.lower()) or parameter in norms else decaying).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=True)


def build_policy(model_config, compute_dtype: torch.dtype, process: Process, checkpointing: str, replicate: int,
                 compile: bool, head_cache_gib: float = 0.0) -> Policy:
    """The sharded policy, still on meta. All ranks."""
    model = build_on_meta(model_config, torch.float32)
    layers = decoder_layers(model)
    suit_device(model, process.device)
    if compile:
        compile_layers(layers)
    enable_checkpointing(layers, checkpointing)
    policy = Policy(model, head_cache_gib)
    shard_module(policy, layers, None if compute_dtype == torch.float32 else compute_dtype, process.device, replicate)
    for name in ("generate", "states_and_head", "largest_logits"):
        register_fsdp_forward_method(policy, name)
    return policy.train()
