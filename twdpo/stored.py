"""Tensors in files that show when they are damaged: a checksum of each stands in the safetensors metadata.

CRC-32 finds every single bit and every burst of up to 32 that a disk or a copy changes; it is no protection against
people. It runs at gigabytes a second, so that files are checked whenever they are read.
"""

import json
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from twdpo.files import write_atomic

METADATA = "twdpo"  # the entry's name


class Damaged(Exception):
    """What is wrong with a file."""


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of a tensor's dtype, shape and values."""
    head = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    if not tensor.numel():
        return head
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), head)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], in_parts: Collection[str] = (), about: str = ""
                  ) -> None:
    """Write a file atomically. Raises OSError or SafetensorError when it can't be written.

    in_parts: tensors of which single places of the second axis can be read. about: a text that is kept with them.
    """
    sums = {name: [checksum(part) for part in tensor.unbind(1)] if name in in_parts else checksum(tensor)
            for name, tensor in tensors.items()}
    text = json.dumps({"checksums": sums, "about": about})
    # One entry: the order of several is not the same twice, and equal content is to be equal bytes.
    metadata = {METADATA: f"{zlib.crc32(text.encode())} {text}"}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomic(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


class StoredTensors:
    """A file of `write_tensors`, open for reading; what is read of it is checked. All of it raises Damaged.

    shapes: of the tensors, by name. about: the text that was given with them.
    """

    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, "pt")
        except (SafetensorError, FileNotFoundError) as error:
            raise Damaged(error) from error
        seal, _, text = (self._file.metadata() or {}).get(METADATA, "").partition(" ")
        if seal != str(zlib.crc32(text.encode())):
            raise Damaged("its checksums are missing, or not as they were written")
        self._sums, self.about = (json.loads(text)[name] for name in ("checksums", "about"))
        self.shapes = {name: tuple(self.slices(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118
        if self.shapes.keys() != self._sums.keys():
            raise Damaged(f"it holds {', '.join(sorted(self.shapes))}, not {', '.join(sorted(self._sums))}")

    def __getitem__(self, name: str) -> torch.Tensor:
        """A whole tensor."""
        sums = self._sum(name)
        if isinstance(sums, list):
            return torch.stack([self.part(name, place) for place in range(len(sums))], dim=1)
        return self._checked(name, self._file.get_tensor(name), sums)

    def part(self, name: str, place: int) -> torch.Tensor:
        """A tensor at one place of its second axis."""
        sums = self._sum(name)
        if not isinstance(sums, list) or self.shapes[name][1] != len(sums):
            raise Damaged(f"the shape of {name} is {self.shapes[name]}")
        return self._checked(name, self.slices(name)[:, place], sums[place])

    def slices(self, name: str):
        """A tensor that is read by slices, which are not checked here."""
        return self._file.get_slice(name)

    def _sum(self, name: str) -> int | list[int]:
        if name not in self._sums:
            raise Damaged(f"it has no {name}")
        return self._sums[name]

    def _checked(self, name: str, tensor: torch.Tensor, expected: int) -> torch.Tensor:
        if checksum(tensor) != expected:
            raise Damaged(f"{name} is not as it was written")
        return tensor
