"""Collate a micro-batch. The label shift happens here, once: after this file index n is a response token everywhere.

Legend: P pairs, S = 2P sequences (2i chosen, 2i+1 rejected), T tokens of the longest, N response tokens of all
sequences one after another.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from twdpo.chat import Example
from twdpo.rows import MicroBatch
from twdpo.weights import WEIGHTS, WeightContext, judged_lengths, normalize


@dataclass
class PairBatch:
    """One micro-batch of plain rows. Tensors live on the compute device, but for seq_lens_S, which stays on the CPU so
    that splitting by sequence never waits for the device."""

    examples: list[Example]
    input_ids_ST: torch.Tensor  # int64, padded on the right
    predict_N: torch.Tensor  # int64, index into S*T of the position whose output predicts response token n
    targets_N: torch.Tensor  # int64, the response tokens
    ref_logps_N: torch.Tensor  # fp32, 0 when the loss needs no reference
    weights_N: torch.Tensor  # fp32, as the op receives them
    scale_S: torch.Tensor  # fp32
    seq_lens_S: torch.Tensor  # int64 on the CPU, n = |y|
    coefficient_P: torch.Tensor  # fp32, 1, or 0 for copies that only keep the processes in step
    pair_count: int  # pairs of the global batch

    @property
    def num_tokens(self) -> int:
        """Tokens that count towards throughput: no padding, no copies."""
        lens = self.seq_lens_S.tolist()
        prompts = sum(2 * len(example.prompt_ids) for example in self.examples)
        return int(self.coefficient_P.sum() > 0) * (sum(lens) + prompts)

    def to(self, device: torch.device) -> "PairBatch":
        """A copy on `device`."""
        moved = {item.name: getattr(self, item.name).to(device, non_blocking=True) for item in fields(self)
                 if isinstance(getattr(self, item.name), torch.Tensor) and item.name != "seq_lens_S"}
        return replace(self, **moved)


def collate(micro_batch: MicroBatch, examples: list[Example], pair_count: int,
            ref_logps: dict[int, tuple[np.ndarray, np.ndarray]] | None = None) -> PairBatch:
    """Tensors of one micro-batch on the CPU, weights uniform.

    ref_logps: reference log-probs of the response tokens by index into `examples`, or None (then 0).
    """
    selected = [examples[pair] for pair in micro_batch.pairs]
    sequences = [(example.prompt_ids, response.ids) for example in selected
                 for response in (example.chosen, example.rejected)]
    rows = [torch.from_numpy(np.concatenate(sequence)).long() for sequence in sequences]
    input_ids_ST = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    num_tokens = input_ids_ST.shape[1]
    # The label shift: the token at position t is predicted by the output at position t - 1.
    predict_N = torch.cat([torch.arange(len(prompt) - 1, len(prompt) - 1 + len(response)) + row * num_tokens
                           for row, (prompt, response) in enumerate(sequences)])
    targets_N = torch.cat([torch.from_numpy(response).long() for _, response in sequences])
    if ref_logps is None:
        ref_logps_N = torch.zeros(len(targets_N))
    else:
        ref_logps_N = torch.from_numpy(np.concatenate([side for pair in micro_batch.pairs for side in ref_logps[pair]]))
    seq_lens_S = torch.tensor([len(response) for _, response in sequences])
    return PairBatch(selected, input_ids_ST, predict_N, targets_N, ref_logps_N.float(), torch.ones(len(targets_N)),
                     torch.ones(len(sequences)), seq_lens_S, torch.full((len(selected),), float(micro_batch.real)),
                     pair_count)


def set_weights(batch: PairBatch, source_name: str, loss, context: WeightContext) -> PairBatch:
    """Fill in weights_N and scale_S from a weight source, normalised as the loss (else the source) declares."""
    source = WEIGHTS[source_name]
    norm = getattr(loss, "norm", None) or getattr(source, "norm", "mean1")
    raw_N = source(batch, context)
    if norm == "mean1" and not context.config.renormalize:
        weights_N, scale_S = normalize(raw_N, batch.seq_lens_S, "none")[0], batch.seq_lens_S.float()
    else:
        weights_N, scale_S = normalize(raw_N, batch.seq_lens_S, norm)
    if norm == "mean1" and context.config.multiplier == "judged":
        scale_S = judged_lengths(batch, context)
    if context.config.length_normalize:
        # Eq. 15 drops |y|: weights of sum 1 and scale 1.
        if context.config.renormalize:
            weights_N = normalize(weights_N, batch.seq_lens_S, "mean1")[0]
        scale_S = torch.ones_like(scale_S)
    return replace(batch, weights_N=weights_N, scale_S=scale_S)
