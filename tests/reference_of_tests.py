"""What tests of the reference share: a loss that needs it, and its gradients, in one process or several."""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import safetensors.torch
import torch
from models_of_tests import build
from test_packing import EXAMPLES
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import train
from twdpo import dist
from twdpo.config import TrainConfig
from twdpo.dist import DTYPES, Process
from twdpo.inputs import Inputs
from twdpo.log import StageClock
from twdpo.logratio import segment_sum, weighted_logratio, weighted_logratio_spec
from twdpo.losses import LOSSES, dpo
from twdpo.models.policy import load_policy
from twdpo.needs import ReferenceStates, open_context
from twdpo.objective import bind_objective
from twdpo.rows import RowOptions
from twdpo.weights import WEIGHTS

DRIFT = 1.1  # what the policy's parameters are multiplied with, so that it is no longer the reference


def dpo_kl(ratio_S, logps_N, batch, config):
    """DPO, and KL(reference || policy) of both answers, times 1 + its mean over the chosen ones."""
    loss_P, metrics = dpo(ratio_S, logps_N, batch, config)
    kl_S = segment_sum(batch.terms["kl"], batch.seq_lens_S)
    return loss_P + 0.1 * (1 + batch.means["chosen"]) * (kl_S[0::2] + kl_S[1::2]), metrics | {"kl": kl_S[0::2].detach()}


dpo_kl.needs, dpo_kl.terms = ("ref", "ref_states"), ("kl",)
dpo_kl.statistics = lambda ratio_S, logps_N, batch: {
    "chosen": segment_sum(batch.terms["kl"], batch.seq_lens_S)[0::2]}  # so that each batch runs forward twice


def save_model(directory: Path, **changes) -> Path:
    build("llama", "eager", tie_word_embeddings=False, **changes).save_pretrained(directory)
    return directory


def made_run(directory: Path, process: Process, config: TrainConfig, packs: bool = True) -> train.Run:
    """A run whose policy has drifted from the reference that its context holds."""
    LOSSES["dpo_kl"] = dpo_kl
    objective = bind_objective(dpo_kl, WEIGHTS["uniform"], "uniform")
    rows = RowOptions(packs, config.micro_batch_tokens)
    policy = load_policy(directory, DTYPES[config.dtype], process, config.checkpointing, config.replicate)
    need = ReferenceStates(process, None)
    model = SimpleNamespace(folder=directory, fingerprint="made")
    need.prepare_with_policy(config, Inputs(model, EXAMPLES, {}, "", "", ""), policy, rows)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(DRIFT)
    return train.Run(config, process, objective, None, EXAMPLES, {}, open_context(config, [need]), policy, None, rows,
                     1, StageClock(False, process.device))


def in_bfloat16(run: train.Run) -> train.Run:
    """A run in fp32 of one process, with parameters that are bf16 themselves: nothing is sharded."""
    for module in (run.policy, run.context.passes[0].__self__.reference):
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    return run


def made_twice(*operands):
    """The op with all of its logits, both models', made again in the backward pass from what it was given, whatever
    their size: the kernels do so, small logits are kept elsewhere."""
    return checkpoint(weighted_logratio_spec, *operands, use_reentrant=False, preserve_rng_state=False)


def gradients(run: train.Run, remake: bool = True) -> dict[str, torch.Tensor]:
    """Of a global batch of all examples, whole; after an evaluation of it. remake: with `made_twice`. All ranks."""
    with patch("twdpo.models.policy.weighted_logratio", made_twice if remake else weighted_logratio):
        return _gradients(run)


def _gradients(run: train.Run) -> dict[str, torch.Tensor]:
    batches = train.with_means(run, train.micro_batches(run, EXAMPLES, list(range(len(EXAMPLES)))))
    with torch.no_grad():
        for batch in batches:
            train.run_pairs(run, batch, {})
    for number, batch in enumerate(batches, 1):
        run.policy.set_requires_gradient_sync(not run.config.no_sync or number == len(batches))
        loss_P, _ = train.run_pairs(run, batch, {})
        ((loss_P * batch.coefficient_P).sum() / batch.pair_count).backward()
    found = {name: parameter.grad for name, parameter in run.policy.named_parameters()}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def main(argv: list[str]) -> None:
    """A script for several processes: DIRECTORY OUT FLAGS..., each a JSON of TrainConfig's fields; the gradients with
    each go into OUT, numbered."""
    directory, out, *flags = argv
    process = dist.start()
    for number, each in enumerate(flags):
        found = gradients(made_run(Path(directory), process, TrainConfig(**json.loads(each))))
        if process.is_main:
            safetensors.torch.save_file(found, f"{out}/{number}.safetensors")
    dist.stop()
