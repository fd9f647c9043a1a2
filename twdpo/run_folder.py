"""The folder of a run: opened, resumed or overwritten; which checkpoints it holds; what it was run with."""

import json
import os
import platform
import re
import subprocess
import time
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from twdpo.config import TrainConfig
from twdpo.dist import Process
from twdpo.files import check_directory, remove, remove_temporaries, write_json
from twdpo.flags import InputError, changed_settings, key_name, to_json

MANIFEST = "manifest.json"
ENVIRONMENT, EVALUATION = "environment.json", "evaluation.json"
RUN_FILES = ("config.json", ENVIRONMENT, "metrics.jsonl", "samples.jsonl", "pairs.html", "report.html", "weights",
             "checkpoints", "final", "best")
PACKAGES = ("twdpo", "torch", "transformers", "triton")  # whose versions environment.json has
ROOT = Path(__file__).resolve().parents[1]  # of the checkout, if it is one


def open_run(config: TrainConfig, process: Process) -> tuple[TrainConfig, Path, Path | None]:
    """(config with its output folder, that folder, the checkpoint to resume from or None). All ranks.

    The folder holds a run once config.json is written, which train.py does when all input has been checked.

    Raises InputError when the folder holds a run and neither --resume nor --overwrite is given, or when a resumed run's
    settings differ from the stored ones.
    """
    return process.on_main(lambda: _open_run(config))


def start_run(config: TrainConfig, run_dir: Path) -> None:
    """All input has been checked: the folder holds this run from now on, and with --overwrite no older one."""
    if config.overwrite and (run_dir / "config.json").exists():
        for name in RUN_FILES:
            remove(run_dir / name)
    for directory in (run_dir, run_dir / "checkpoints"):
        remove_temporaries(directory)
    # What was asked of this start alone would contradict the next one's flags.
    write_json(run_dir / "config.json", to_json(replace(config, resume="", overwrite=False, config="")))


def write_environment(run_dir: Path, step: int, process: Process, found: dict[str, object]) -> None:
    """Add this start, at `step`, to environment.json, a list: when, on what and with which versions a run began and
    was resumed. Starts that a resume from an earlier step gave up go.

    found: what else is to be kept of the start.
    """
    path = run_dir / ENVIRONMENT
    before = json.loads(path.read_text(encoding="utf-8")) if step and path.exists() else []
    device = torch.cuda.get_device_name(process.device) if process.device.type == "cuda" else "CPU"
    start = {"step": step, "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
             "processes": process.world_size, "device": device} | describe_code()
    write_json(path, [start_before for start_before in before if start_before["step"] < step] + [start | found])


def describe_code() -> dict[str, str]:
    """The commit of the code and the versions of what it runs on."""
    found = {"commit": code_commit(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # not installed, but on the path
            continue
    return found


def code_commit() -> str:
    """The commit of the checkout that runs, with -dirty where tracked files differ from it; "" where it is unknown."""
    if not (ROOT / ".git").exists():  # installed elsewhere, maybe inside another project's checkout
        return ""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        return subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=ROOT,
                              env=own, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here, or it refuses the folder
        return ""


def _open_run(config: TrainConfig) -> tuple[TrainConfig, Path, Path | None]:
    name = Path(config.model).name or "toy"
    run_dir = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume and not config.output_dir:
        if config.resume == "auto":
            raise InputError("--resume needs --output-dir, the folder of the run to go on with")
        run_dir = Path(config.resume).resolve().parent.parent
    check_directory(run_dir, "--output-dir")
    checkpoint = find_checkpoint(run_dir, config.resume) if config.resume else None
    config = replace(config, output_dir=str(run_dir))
    # The run that the checkpoint is of may stand in another folder.
    stored_path = (checkpoint.resolve().parent.parent if checkpoint else run_dir) / "config.json"
    if config.resume and stored_path.exists():
        try:
            stored = json.loads(stored_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"--resume: {stored_path} is not JSON ({error}); put back the settings of the run, or "
                             "start anew with --overwrite") from error
        config = replace(config, **settled_settings(stored, config))
        if changed := changed_settings(stored, config):
            raise InputError(f"--resume: {stored_path.parent} was started with other settings (--config {stored_path} "
                             "repeats them):\n  " + "\n  ".join(changed))
    elif (run_dir / "config.json").exists() and not config.overwrite:
        raise InputError(f"{run_dir} holds a run: go on with it (--resume), replace it (--overwrite), or choose "
                         "another --output-dir")
    if config.resume and not checkpoint:
        print(f"--resume: no complete checkpoint in {run_dir}: starting at step 0")
    return config, run_dir, checkpoint


def settled_settings(stored: dict[str, object], config: TrainConfig) -> dict[str, object]:
    """What the stored run found for settings that `config` leaves to the run, and revisions of hub ids."""
    settled = {}
    for field in fields(config):
        value, old = getattr(config, field.name), stored.get(key_name(field))
        same = isinstance(old, str) and without_gaps(value) in (old, old.rpartition("@")[0],
                                                                re.sub("@[0-9a-f]{40}", "", old))
        if old is not None and value != "" and (same or value in field.metadata.get("settled", ())):
            settled[field.name] = old
    return settled


def without_gaps(value: object) -> str:
    """A setting without white space around the signs of a list."""
    return re.sub(r"\s*([,=+])\s*", r"\1", str(value))


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:07d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*"))


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that --resume names, or None when `auto` finds none. Raises InputError."""
    if resume == "auto":
        checkpoints = list_checkpoints(run_dir)
        return checkpoints[-1] if checkpoints else None
    if not (Path(resume) / MANIFEST).is_file():
        raise InputError(f"--resume {resume}: no {MANIFEST} there, so it is no complete checkpoint")
    return Path(resume)


def drop_later_checkpoints(run_dir: Path, step: int) -> None:
    """The run goes on from `step`: checkpoints after it, and best/ if it is of later, are of a branch that is given up.
    """
    later = [path for path in list_checkpoints(run_dir) if path.name > checkpoint_path(run_dir, step).name]
    evaluation = run_dir / "best" / EVALUATION
    if evaluation.exists() and json.loads(evaluation.read_text(encoding="utf-8"))["step"] > step:
        later.append(evaluation.parent)
    for path in later:
        print(f"--resume: {path.name} comes after the step that the run goes on from: removed")
        remove(path)
