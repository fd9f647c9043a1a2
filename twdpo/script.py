"""What every entry point does around its work: join the process group, own its folders, and end a user's error, a full
disk, Ctrl-C and a reader that has gone with one line or none."""

import codecs
import contextlib
import errno
import hashlib
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from twdpo.dist import Process, start, stop
from twdpo.flags import InputError
from twdpo.lock import release_locks

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # no room on the disk, in the quota, in a file (RLIMIT_FSIZE)
FULL_TEXTS = tuple(map(os.strerror, FULL))
INTERRUPTED = 130  # what shells give for Ctrl-C
PLAIN = {"\u00b1": "+-", "\u2013": "-", "\u2014": "-", "\u2026": "...", "\u00b7": "*"}  # for terminals without them


def run_script(name: str, read_config: Callable[[], object], function: Callable[[object, Process], None],
               go_on: Callable[[], str] = str) -> None:
    """Run `function(config, process)` in the process group. A user's error or a full disk becomes one message and
    SystemExit(2), Ctrl-C one line and SystemExit(130); of several processes one says it.

    go_on: says how to go on after an interruption.
    """
    process = None
    with patient_output():
        try:
            config, ended = read_together(read_config)
            process = start()
            if ended:
                ended.say(process)
            function(config, process)
        except KeyboardInterrupt as error:
            say(f"{name}: interrupted{go_on()}", process)
            raise SystemExit(INTERRUPTED) from error
        except (Exception, CheckpointException) as error:
            if not (message := message_of(error)):
                raise
            place = f"[rank {process.rank}] " if process and not process.is_main else ""
            say(f"{name}: error: {message}", process, place)
            raise SystemExit(2) from error
        finally:
            release_locks()
            stop()


@dataclass
class Ended:
    """How reading the command line ended: with a user's error, or with what argparse printed and its exit code."""

    error: InputError | None = None
    printed: str = ""
    code: int = 2

    def say(self, process: Process) -> None:
        """On the first process, before any of them ends: that would end the others unheard. All ranks. Raises."""
        if self.error:
            raise self.error
        if process.is_main:
            print(self.printed, end="", file=sys.stderr if self.code else sys.stdout, flush=True)
        process.gather(None)
        raise SystemExit(self.code)


def read_together(read_config: Callable[[], object]) -> tuple[object, Ended | None]:
    """The settings, or how reading them ended; of several processes none says that yet."""
    printed = io.StringIO()
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        with contextlib.ExitStack() as stack:
            if several:
                stack.enter_context(contextlib.redirect_stdout(printed))
                stack.enter_context(contextlib.redirect_stderr(printed))
            return read_config(), None
    except InputError as error:
        return None, Ended(error)
    except SystemExit as ended:
        if not several:
            raise
        return None, Ended(None, printed.getvalue(), int(ended.code or 0))


def message_of(error: BaseException) -> str:
    """What a user is told of an error; "" for one that is a fault of the program."""
    if isinstance(error, InputError):
        return str(error)
    if found := find_full_disk(error):
        return (f"{found}. What was complete before is whole: make room, then the same command goes on (a run that has "
                "begun with --resume)")
    return ""


def find_full_disk(error: BaseException | None) -> str:
    """The message of a full disk among an error and its causes: libraries wrap it in errors of their own."""
    while error is not None:
        for failure, _ in getattr(error, "failures", {}).values():  # torch.distributed.checkpoint's, by rank
            if found := find_full_disk(failure):
                return found
        if isinstance(error, OSError) and error.errno in FULL:
            return f"{error.filename or 'a file'} can't be written: {error.strerror}"
        if line := next((line for line in str(error).splitlines() if any(text in line for text in FULL_TEXTS)), ""):
            return f"a file can't be written: {line.strip()}"
        error = error.__cause__ or error.__context__
    return ""


def say(message: str, process: Process | None, place: str = "") -> None:
    """Print to standard error, unless another process has said it."""
    is_first = True
    if process and process.world_size > 1:
        with contextlib.suppress(Exception):  # the store may be gone with the first process
            store = dist.distributed_c10d._get_default_store()
            is_first = store.add(f"said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    if is_first:
        print(f"{place}{message}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Output that ends no run

def plain_text(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: text that a terminal can't show as plain signs."""
    text = error.object[error.start:error.end]
    return "".join(PLAIN.get(letter, "?") for letter in text), error.end


codecs.register_error("twdpo.plain", plain_text)


class Patient:
    """A stream that goes on when its reader has gone (`| head`)."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text: str) -> int:
        with self._forgiving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # what is still buffered must have somewhere to go at the end too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


@contextlib.contextmanager
def patient_output() -> Iterator[None]:
    """Standard output and error that end no run, whatever reads them."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="twdpo.plain")
    sys.stdout, sys.stderr = map(Patient, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


# ----------------------------------------------------------------------------------------------------------------------
# Signals

class StopSignals:
    """While this context is open SIGTERM and SIGUSR1 (what a batch system sends before it kills) are noted, not obeyed;
    a second one is."""

    def __init__(self):
        self.seen = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def _note(self, number: int, _) -> None:
        self.seen = number
        self.__exit__()

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
