"""Input gradients: how much each token's embedding moves the policy's largest logit at the end of its sequence.

A pass of its own before the policy's forward. Both sequences of a pair share their common beginning in a packed row,
where one embedding would get the gradients of both: so the chosen sequences run first, then the rejected ones, each
whole. Neither run has more tokens than the row.

Legend: P pairs, S sequences (2i chosen, 2i+1 rejected), R rows of T tokens, D hidden size.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from twdpo.batch import Outputs, PairBatch, places_of
from twdpo.dist import send


def with_input_gradients(policy, run: Callable[[PairBatch], Outputs], batch: PairBatch) -> Outputs:
    """run(batch with input_gradients): a pass of twdpo.objective.forward. All ranks."""
    return run(replace(batch, input_gradients=input_gradients(policy, batch)))


def input_gradients(policy, batch: PairBatch) -> tuple[torch.Tensor, ...]:
    """|d target / d embedding|_1 of each token of each sequence, prompt and response: S vectors, fp32, no gradient.

    target: the policy's largest logit after the last token (TI-DPO, arXiv 2505.19653). Gradients of
    parameters stay as they are. All ranks.
    """
    sides = [side_gradients(policy, one_side(batch, side)) for side in (0, 1)]
    return tuple(vector for pair in zip(*sides) for vector in pair)


def one_side(batch: PairBatch, side: int) -> PairBatch:
    """The chosen (0) or the rejected (1) sequences of a batch in rows of their own, of which the last position of each
    is asked for."""
    device, places = batch.input_ids_RT.device, places_of(batch.ranges)[side::2]
    if batch.packs:
        index_T = send(torch.from_numpy(np.concatenate(places)), device)
        input_ids_RT, positions_RT = (tensor.flatten().index_select(0, index_T)[None]
                                      for tensor in (batch.input_ids_RT, batch.positions_RT))
        starts = np.cumsum([0, *map(len, places)])[:-1].tolist()
    else:
        input_ids_RT, positions_RT = batch.input_ids_RT[side::2], batch.positions_RT[side::2]
        starts = [row * input_ids_RT.shape[1] for row in range(len(places))]
    ranges = tuple(((start, start + len(place)),) for start, place in zip(starts, places))
    last_P = torch.tensor([stop - 1 for (_, stop), in ranges])
    return replace(batch, input_ids_RT=input_ids_RT, positions_RT=positions_RT, ranges=ranges,
                   predict_N=send(last_P, device))


@torch.enable_grad()
def side_gradients(policy, batch: PairBatch) -> list[torch.Tensor]:
    """`input_gradients` of `one_side`, P vectors. All ranks."""
    width = policy.model.get_input_embeddings().embedding_dim
    # An input of FSDP2's root that requires grad: its hooks then end the backward pass as that of a step.
    delta_RTD = batch.input_ids_RT.new_zeros((), dtype=torch.float32).expand(*batch.input_ids_RT.shape, width)
    delta_RTD = delta_RTD.detach().requires_grad_()
    targets_P = policy.largest_logits(batch, delta_RTD)  # all ranks
    (grad_RTD,) = torch.autograd.grad(targets_P.sum(), delta_RTD)  # all ranks; to nothing else
    norms_X = grad_RTD.abs().sum(dim=-1, dtype=torch.float32).flatten()
    return [norms_X[start:stop] for (start, stop), in batch.ranges]
