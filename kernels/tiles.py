"""How tiles of logits are computed, by dtype and GPU, and what is left of a token's.

benchmarks/tune_loss_kernel.py times shapes on a GPU, benchmarks/kernel_resources.py compiles them without one. Needs
torch only.

Legend: N response tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Tile:
    """How a logits tile is computed. Results do not depend on it beyond the rounding of fp32 sums."""

    block_n: int  # tokens
    block_v: int  # vocabulary entries
    block_d: int  # hidden units a step of the inner loop
    num_warps: int
    num_stages: int
    group_n: int = 16  # row blocks that share a tile of the head while it is in the L2 cache
    descriptors: bool = False  # load through the tensor memory accelerator (compute capability 9.0 and up)


class Tiles(NamedTuple):
    """Of the two kernels that make logits. One block_d, so that both make the same bits."""

    statistics: Tile
    gradient: Tile
    reference: Tile  # of both, where the reference's logits are made beside the policy's: two tiles in registers


class Softmax(NamedTuple):
    """What a token's gradients are made from again, [N] each; the last ones only for the terms that need them."""

    top_N: torch.Tensor  # the largest logit
    inverse_total_N: torch.Tensor  # 1 / sum of exp(logit - top)
    mean_N: torch.Tensor | None = None  # of logit - top: entropy
    over_squares_N: torch.Tensor | None = None  # sum of exp(logit - top) over that of their squares: collision
    ref_top_N: torch.Tensor | None = None
    ref_inverse_total_N: torch.Tensor | None = None
    lead_N: torch.Tensor | None = None  # mean, under the policy, of its logit minus the reference's: reverse_kl


# By element size in bytes, then the smallest compute capability. 12.x has less than half the shared memory of 9.0.
SMALL, SMALL_FP32 = Tile(128, 128, 32, 8, 4), Tile(64, 64, 32, 4, 3)
TILES = {
    2: {(12, 0): Tiles(SMALL, SMALL, SMALL), (0, 0): Tiles(SMALL, SMALL, SMALL),
        (9, 0): Tiles(Tile(128, 256, 64, 8, 3, descriptors=True), Tile(128, 256, 64, 8, 4, descriptors=True),
                      Tile(128, 128, 64, 8, 4, descriptors=True))},
    4: {(0, 0): Tiles(SMALL_FP32, SMALL_FP32, SMALL_FP32)},
}
INTERPRETED_TILES = Tiles(*3 * (Tile(64, 128, 64, 1, 1),))


def default_tiles(dtype: torch.dtype, capability: tuple[int, int], aligned: bool = True) -> Tiles:
    """The tiles for operands of this dtype on a GPU of this compute capability.

    aligned: whether rows of all operands start at multiples of 16 bytes, as the tensor memory accelerator asks.
    """
    choices = TILES[dtype.itemsize]
    tiles = choices[max(least for least in choices if least <= capability)]
    # Without the accelerator the addresses of a large tile would not fit the registers.
    return choices[0, 0] if tiles.statistics.descriptors and not aligned else tiles
