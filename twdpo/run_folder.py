"""The folder of a run: opened, resumed or overwritten; which checkpoints it holds."""

import json
import re
import time
from dataclasses import fields, replace
from pathlib import Path

from twdpo.config import TrainConfig
from twdpo.dist import Process
from twdpo.files import check_directory, remove, remove_temporaries, write_json
from twdpo.flags import InputError, changed_settings, key_name, to_json

MANIFEST = "manifest.json"
RUN_FILES = ("config.json", "metrics.jsonl", "samples.jsonl", "pairs.html", "report.html", "weights", "checkpoints",
             "final", "best")


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
    """The run goes on from `step`: checkpoints after it are of a branch that is given up."""
    for path in list_checkpoints(run_dir):
        if path.name > checkpoint_path(run_dir, step).name:
            print(f"--resume: {path.name} comes after the step that the run goes on from: removed")
            remove(path)
