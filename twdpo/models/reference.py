"""The reference beside the policy: the policy as it starts, frozen, for terms that compare whole distributions.

Its head is read inside the forward of its own FSDP root, around the policy's: the outputs of the policy pass through
that root's hooks, so FSDP2 gathers its head again before the op's backward pass makes the reference's logits from it,
and frees it when that ends.

Legend: N response tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from twdpo.batch import Outputs, PairBatch, RefStates
from twdpo.dist import Process, shard_module
from twdpo.logratio import weighted_logratio
from twdpo.models.build import build_on_meta, compile_layers, decoder_layers, head_options, suit_device
from twdpo.models.policy import Policy, response_states
from twdpo.models.shards import load_shards
from twdpo.models.source import load_model_config


class Reference(torch.nn.Module):
    """A frozen causal LM whose forward runs another with `batch.ref_states` of this one."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.options = head_options(model.config)

    def forward(self, batch: PairBatch, run: Callable[[PairBatch], Outputs]) -> Outputs:
        """run(batch with ref_states). Under FSDP2 all ranks; what depends on the head must be among the outputs."""
        head = self.model.get_output_embeddings()
        with torch.no_grad():
            hidden_ND = response_states(self.model, batch)
        return run(replace(batch, ref_states=RefStates(hidden_ND, head.weight, getattr(head, "bias", None))))


class StoredReference(torch.nn.Module):
    """The head of a reference alone, whose hidden states were stored; its forward is as `Reference`'s."""

    def __init__(self, head: torch.nn.Linear, states: Callable[[PairBatch], torch.Tensor]):
        """states: gives the hidden states [N, D] of a batch."""
        super().__init__()
        self.head, self.states = head, states

    def forward(self, batch: PairBatch, run: Callable[[PairBatch], Outputs]) -> Outputs:
        """run(batch with ref_states). Under FSDP2 all ranks; what depends on the head must be among the outputs."""
        return run(replace(batch, ref_states=RefStates(self.states(batch), self.head.weight, self.head.bias)))


@torch.no_grad()
def response_logps_of(reference: Reference, batch: PairBatch) -> torch.Tensor:
    """Log-probs of a batch's response tokens under the reference, fp32 [N]. Its sequences need not be in pairs.

    All ranks.
    """
    def run(batch: PairBatch) -> torch.Tensor:
        hidden_ND, head_VD, bias_V = batch.ref_states
        zeros_N = torch.zeros(len(hidden_ND), device=hidden_ND.device)
        zeros_S = torch.zeros(len(batch.seq_lens_S), device=hidden_ND.device)
        return weighted_logratio(hidden_ND, head_VD, batch.targets_N, zeros_N, zeros_N, batch.seq_lens_S, zeros_S,
                                 bias_V, reference.options)[1]
    return reference(batch, run)


def load_reference(directory: Path, compute_dtype: torch.dtype, process: Process, replicate: int = 1,
                   compile: bool = False) -> Reference:
    """The reference, in shards as the policy's but in the dtype that it computes in; fp32 in one process is whole.

    All ranks. Raises InputError as `load_policy` does.
    """
    model = build_on_meta(load_model_config(directory), compute_dtype).requires_grad_(False)
    layers = decoder_layers(model)
    suit_device(model, process.device)
    if compile:
        compile_layers(layers)
    reference = Reference(model)
    # An embedding that is not the head too is a group of its own: what the root holds stays gathered for the policy.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    groups = [*([embedding] if embedding.weight is not head.weight else []), *layers]
    # Layers cast their inputs as the policy's do: OLMo-2's cosines are fp32.
    shard_frozen(reference, groups, None if compute_dtype == torch.float32 else compute_dtype, process, replicate)
    load_shards(reference, directory, process.device)
    assert all(parameter.dtype == compute_dtype for parameter in reference.parameters())
    return reference.eval()


@torch.no_grad()
def keep_head(policy: Policy, states: Callable[[PairBatch], torch.Tensor], compute_dtype: torch.dtype,
              process: Process, replicate: int = 1) -> StoredReference:
    """A reference of the policy's head as it is now, copied in the same shards. All ranks."""
    head = policy.model.get_output_embeddings()
    num_tokens, hidden_size = head.weight.shape
    kept = torch.nn.Linear(hidden_size, num_tokens, getattr(head, "bias", None) is not None, "meta", compute_dtype)
    reference = StoredReference(kept.requires_grad_(False), states)
    shard_frozen(reference, [], None, process, replicate)
    reference.to_empty(device=process.device)
    for name, parameter in kept.named_parameters():
        own_part(parameter).copy_(own_part(getattr(head, name)))
    return reference


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_frozen(root: torch.nn.Module, layers: list[torch.nn.Module], param_dtype: torch.dtype | None,
                 process: Process, replicate: int) -> None:
    """FSDP2 shards of what has no gradient. param_dtype: as of `shard_module`."""
    shard_module(root, layers, param_dtype, process.device, replicate)
    if isinstance(root, FSDPModule):
        # Only the root is needed in the backward pass; by default it would gather the last layer ahead, for nothing.
        root.set_modules_to_backward_prefetch([root])
