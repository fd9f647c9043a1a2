"""Child processes of tests, forked from one server that has imported train and extract, which takes seconds."""

import importlib
import multiprocessing
import os
import signal
import socket
import traceback
from multiprocessing.connection import wait

CONTEXT = multiprocessing.get_context("forkserver")  # a fork of this process could inherit held locks
CONTEXT.set_forkserver_preload(["train", "extract"])
TIMEOUT = 200  # seconds


def run_ranks(script: str, argv: list[str], count: int = 2, constants: dict[str, object] | None = None) -> None:
    """What `torchrun --nproc_per_node COUNT SCRIPT.py` does; the first error ends all processes.

    constants: of modules, {"twdpo.dist.NAME": value}.
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    errors = CONTEXT.SimpleQueue()
    children = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        children.append(CONTEXT.Process(target=run_rank, args=(script, argv, place, constants or {}, errors)))
        children[-1].start()
    running = {child.sentinel: child for child in children}
    while running:
        ended = wait(running, TIMEOUT)
        codes = [running.pop(sentinel).exitcode for sentinel in ended]
        if not ended or any(codes):
            for child in children:
                child.join(5)  # what fails first may not be heard of first
                child.kill()
            texts = []
            while not errors.empty():
                texts.append(errors.get())
            raise AssertionError("\n".join([f"exit codes {codes}", *texts]))


def run_rank(script: str, argv: list[str], place: dict, constants: dict, errors) -> None:
    """In the child."""
    os.environ |= {name: str(value) for name, value in place.items()}
    set_constants(constants)
    try:
        importlib.import_module(script).main(argv)
    except BaseException:
        errors.put(f"rank {place['RANK']}: {traceback.format_exc()}")
        raise


def run_and_die(script: str, argv: list[str], function: str, number: int,
                constants: dict[str, object] | None = None, quiet: bool = False) -> None:
    """Run SCRIPT.main(argv) in a process that SIGKILLs itself at that call, from 1, of a function: "module.name"."""
    child = CONTEXT.Process(target=run_until_call, args=(script, argv, function, number, constants or {}, quiet))
    child.start()
    child.join(TIMEOUT)
    assert child.exitcode == -signal.SIGKILL


def run_until_call(script: str, argv: list[str], function: str, number: int, constants: dict, quiet: bool) -> None:
    """In the child."""
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
    set_constants(constants)
    module, name = function.rsplit(".", 1)
    original, calls = getattr(importlib.import_module(module), name), []

    def replacement(*args, **kwargs):
        calls.append(None)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    set_constants({function: replacement})
    importlib.import_module(script).main(argv)


def set_constants(values: dict[str, object]) -> None:
    for place, value in values.items():
        module, name = place.rsplit(".", 1)
        setattr(importlib.import_module(module), name, value)
