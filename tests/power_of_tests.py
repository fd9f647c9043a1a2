"""What a loss of power may leave of a folder: a recorder of syncs, renames and deletions, and the states between them.

At a moment the names in a folder are those of now, or those that were there when a folder was last synced (a journal
keeps their order); what a file holds is all that was written, or what was there when it was last synced, which is
nothing for one that never was.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

RECORDED = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


def hash_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


EMPTY = hash_of(b"")


class Moment(NamedTuple):
    """After one of the recorded calls. Files have numbers of their own: inodes are used again."""

    call: str
    names: dict[str, int]  # path -> file; of folders, which end with /: 0
    written: dict[int, str]  # file -> hash of all that was written
    synced: dict[int, str]  # file -> hash of what was there when it was last synced
    keeps_names: bool  # whether a folder was synced


class Recorder:
    """Records what this process does to the files of a folder while it is open."""

    def __init__(self, root: Path):
        self.root, self.moments = root.resolve(), []
        self.contents = {EMPTY: b""}
        self._files: dict[int, int] = {}  # inode -> file
        self._count = 0
        self._written: dict[int, str] = {}
        self._synced: dict[int, str] = {}
        self._read: dict[tuple[int, int, int], str] = {}

    def __enter__(self) -> "Recorder":
        self._patch = pytest.MonkeyPatch()
        for name in RECORDED:
            self._patch.setattr(os, name, self._recorded(name, getattr(os, name)))
        return self

    def __exit__(self, *_) -> None:
        self._patch.undo()

    def _recorded(self, name: str, original):
        def call(*args, **kwargs):
            result = original(*args, **kwargs)
            synced = Path(os.readlink(f"/proc/self/fd/{args[0]}")) if name == "fsync" else None
            self._note(f"{name} {synced or args[0]}", synced)
            return result
        return call

    def _note(self, call: str, synced: Path | None) -> None:
        found = {path: path.stat().st_ino for path in sorted(self.root.rglob("*")) if path.is_file()}
        self._files = {inode: self._files.get(inode) or self._new() for inode in found.values()}
        self._written |= {self._files[inode]: self._hash(path) for path, inode in found.items()}
        if synced in found:
            self._synced[self._files[found[synced]]] = self._written[self._files[found[synced]]]
        names = {f"{path.relative_to(self.root)}/": 0 for path in self.root.rglob("*") if path.is_dir()}
        names |= {str(path.relative_to(self.root)): self._files[inode] for path, inode in found.items()}
        is_folder = synced is not None and synced.is_dir() and synced.is_relative_to(self.root)
        self.moments.append(Moment(call, names, dict(self._written), dict(self._synced), is_folder))

    def _new(self) -> int:
        self._count += 1
        return self._count

    def _hash(self, path: Path) -> str:
        stat = path.stat()
        key = stat.st_ino, stat.st_mtime_ns, stat.st_size
        if key not in self._read:
            data = path.read_bytes()
            self._read[key] = hash_of(data)
            self.contents[self._read[key]] = data
        return self._read[key]

    def states(self) -> list[dict[str, str | None]]:
        """Each state that a loss of power may leave, once: path -> hash of its content; None of a folder."""
        found, durable = {}, {}
        for moment in self.moments:
            for names in (moment.names, durable):
                for held in (moment.written, moment.synced):
                    state = {name: held.get(file, EMPTY) if file else None for name, file in names.items()}
                    found[hash_of(repr(sorted(state.items(), key=str)).encode())] = state
            if moment.keeps_names:
                durable = moment.names
        return list(found.values())

    def restore(self, state: dict[str, str | None], folder: Path) -> None:
        """Make a folder what a state says."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, held in state.items():
            path = folder / name
            if held is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.contents[held])
