"""Numbers that are not finite: which pair they come from, and what to do. Nothing of them is saved."""

from collections.abc import Callable

import torch

from twdpo.batch import Outputs, PairBatch
from twdpo.dist import Process
from twdpo.flags import InputError


@torch.no_grad()
def explain_step(batches: list[PairBatch], run: Callable[[PairBatch], tuple[torch.Tensor, Outputs]], step: int,
                 process: Process) -> str:
    """Why the loss or the gradient of a step (from 1) is not finite, found by a second forward: a sentence that names a
    pair, and says what to do. All ranks.

    run: a micro-batch -> (its losses [P], the policy's outputs).
    """
    found: list[tuple[str, str]] = []
    for batch in batches:
        loss_P, outputs = run(batch)  # all ranks
        parts = outputs.logps_N.split(batch.seq_lens_S.tolist())
        for place, example in enumerate(batch.examples if not batch.is_copy else ()):
            if not all(part.isfinite().all() for part in parts[2 * place:2 * place + 2]):  # sync
                found.append(("logps", example.pair.where))
            elif not loss_P[place].isfinite():  # sync
                found.append(("loss", example.pair.where))
    found = [each for part in process.gather(found) for each in part]
    kinds = {kind: where for kind, where in reversed(found)}
    if "logps" in kinds and step == 1:
        return (f"Before any training the model's own log-probabilities of {kinds['logps']} are not finite: try "
                "--dtype float32, or look at the checkpoint")
    if "logps" in kinds:
        return (f"The policy's log-probabilities of {kinds['logps']} are no longer finite: lower --lr, or try "
                "--dtype float32")
    if "loss" in kinds:
        return (f"The loss of {kinds['loss']} is not finite, its log-probabilities are: lower --beta, or see the "
                "options of the loss")
    return "The loss of every pair is finite, the gradient is not: lower --lr or --beta, or try --dtype float32"


def refuse_not_finite(policy: torch.nn.Module, step: int, process: Process) -> None:
    """Raise InputError when a policy has parameters that are not finite, before it is saved. A sync. All ranks."""
    local = (getattr(parameter, "_local_tensor", parameter) for parameter in policy.parameters())
    bad = sum((~parameter.isfinite()).any() for parameter in local)
    if process.largest(int(bad)):  # sync, all ranks
        raise InputError(f"step {step} made weights that are not finite, and nothing of them is saved: lower --lr")
