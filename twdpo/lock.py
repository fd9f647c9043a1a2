"""One process at a time writes to a folder: a lock that dies with its process, on shared file systems too where they
have locks."""

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from twdpo.flags import InputError

LOCK = ".lock"
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_held: dict[Path, tuple[int, list[Path]]] = {}  # of this process's locks: descriptor, and folders made for it


def take_lock(folder: Path) -> None:
    """Own `folder`, which is made if it is not there, until `release_locks` or the end of this process. Raises
    InputError when another process owns it, and says which.

    A POSIX lock: NFS and Lustre hand it on to other machines, a kill of its process gives it back at once, and a child
    does not keep it. It says nothing between threads.
    """
    path = folder.resolve() / LOCK
    if path in _held:
        return
    made = [each for each in path.parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = describe_owner(path)
            os.close(descriptor)
            if error.errno in UNSUPPORTED:
                path.unlink(missing_ok=True)
                print(f"warning: {folder} is on a file system without locks ({error.strerror}): nothing keeps a second "
                      "run out of it")
                return
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise InputError(f"{folder} is being written to by {owner}: wait until it ends, or stop it") from error
            raise
        if is_same_file(path, descriptor):  # else its last owner has deleted it meanwhile
            break
        os.close(descriptor)
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(owner).encode())
    _held[path] = descriptor, made


def describe_owner(path: Path) -> str:
    """Who holds a lock, as its file says."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['process']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, TypeError, KeyError):  # it is written after the lock is taken
        return "another process"


def is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def release_locks() -> None:
    """Give up all locks of this process; folders that were made for one and hold nothing else go with it."""
    while _held:
        path, (descriptor, made) = _held.popitem()
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # it holds something
            for folder in made:  # the innermost first
                folder.rmdir()


def owned_folders() -> list[Path]:
    """The folders that this process owns."""
    return [path.parent for path in _held]
