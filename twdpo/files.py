"""Files that are never half written, and hashes that name their content."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from twdpo.config import SharedConfig
from twdpo.flags import InputError

# What write_atomic makes beside a path: its name, who writes, and whether it is what stood there before.
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{8}(?P<old>\.old)?\.tmp")


def temporary_path(path: Path, old: bool = False) -> Path:
    """A hidden name beside `path` that no other process has: those of several machines may share the folder."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{'.old' * old}.tmp")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that goes in the end."""
    temporary = temporary_path(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    finally:
        remove(temporary)


def write_atomic(path: Path, write: Callable[[Path], None], replace: bool = True) -> None:
    """Call `write(temporary)` and rename the result to `path`: a reader sees the whole file or none, and what it sees
    is on the disk, also after a loss of power.

    `write` may make a file or a folder. A folder that already stands at `path` is moved aside first and deleted last;
    without `replace` it stays and the new one is dropped (several processes may make the same folder at once).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        write(temporary)
        share(temporary)
        sync_tree(temporary)
        try:
            os.replace(temporary, path)
        except OSError:  # a folder that is not empty is never replaced
            if not path.is_dir():
                raise
            if replace:
                old = temporary_path(path, old=True)
                os.rename(path, old)
                os.rename(temporary, path)
                sync(path.parent)
                remove(old)
        sync(path.parent)
    finally:
        remove(temporary)


def share(path: Path) -> None:
    """Give files the permissions that new files have here: safetensors makes them readable by their owner alone."""
    os.umask(mask := os.umask(0))
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # a file system that can't, of a folder
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` of a file, or of a folder and all that it holds."""
    for each in [*(path.rglob("*") if path.is_dir() else ()), path]:
        if not each.is_symlink():
            sync(each)


def discard(path: Path) -> None:
    """Delete a file or a folder so that a kill leaves it whole or gone."""
    if path.exists() or path.is_symlink():
        hidden = temporary_path(path)
        os.rename(path, hidden)
        sync(path.parent)  # before what it held: else a loss of power could bring its name back without it
        remove(hidden)


def mend(directory: Path) -> None:
    """Delete what killed processes left half written, in a folder that no other process writes to; what one had moved
    aside and not yet replaced comes back."""
    for path in Path(directory).glob(".*.tmp"):
        if match := TEMPORARY.fullmatch(path.name):
            if match["old"] and not path.with_name(match["name"]).exists():
                os.rename(path, path.with_name(match["name"]))
            else:
                remove(path)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_object(path: Path) -> dict[str, object] | None:
    """A JSON object; None where there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def make_directory(path: Path, flag: str) -> Path:
    """Make a folder that a flag names, if it is not there. Raises InputError, also when it can't be written to."""
    check_directory(path, flag)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {path}: the folder can't be made ({error.strerror})") from error
    return path


def check_directory(path: Path, flag: str) -> Path:
    """Raise InputError when a folder that a flag names can't be made or written to. Makes nothing."""
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"{flag} {path}: the folder can't be made or written to ({error.strerror})") from error
    return path


def cache_directory(config: SharedConfig) -> Path:
    """--cache-dir, else the user's cache folder; made if it is not there. Raises InputError."""
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "twdpo"
        return make_directory(Path(config.cache_dir).expanduser() if config.cache_dir else default, "--cache-dir")
    except RuntimeError as error:
        raise InputError(f"--cache-dir {config.cache_dir}: nobody's home folder is known here ({error}): name a folder"
                         ) from error


def remove(path: Path) -> None:
    """Delete a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, hex."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: object) -> str:
    """sha256 of a JSON value, hex; equal for equal values whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def hash_to_int64(value: object) -> int:
    """A signed 64-bit key of a JSON value, to index it in a tensor."""
    return int.from_bytes(bytes.fromhex(hash_json(value))[:8], "little", signed=True)
