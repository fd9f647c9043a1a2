"""The folder of a run: opened, resumed or overwritten; which checkpoints it holds; what it was run with."""

import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from twdpo.config import TrainConfig
from twdpo.dist import Process
from twdpo.files import check_directory, discard, hash_json, mend, read_object, write_json
from twdpo.flags import InputError, changed_settings, flag_name, key_name, to_json
from twdpo.lock import owned_folders, take_lock

CONFIG, MANIFEST = "config.json", "manifest.json"
ENVIRONMENT, EVALUATION = "environment.json", "evaluation.json"
RUN_FILES = ("checkpoints", CONFIG, ENVIRONMENT, "metrics.jsonl", "samples.jsonl", "pairs.html", "report.html",
             "weights", "final", "best")  # in the order in which --overwrite deletes them
MANIFEST_KEYS = {"step", "world_size", "run_id", "settings", "identity", "files", "digest"}
STEP_NAME = re.compile(r"step-(\d{7,})")
PACKAGES = ("twdpo", "torch", "transformers", "triton")  # whose versions environment.json has
ROOT = Path(__file__).resolve().parents[1]  # of the checkout, if it is one


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, which this process owns until it ends.

    run_id: of the run, in its config.json and its checkpoints. checkpoint: that it goes on from, of the run in
    `source`, which is another folder when this one branches off.
    """

    path: Path
    run_id: str
    checkpoint: Path | None = None
    source: Path | None = None


def open_run(config: TrainConfig, process: Process) -> tuple[TrainConfig, RunFolder]:
    """(config with its output folder, that folder). All ranks.

    The folder holds the run once config.json is written, which train.py does when all input has been checked.

    Raises InputError when another process writes to the folder, when it holds a run and neither --resume nor
    --overwrite is given, when a resumed run's settings differ from the stored ones, or when what is read would be
    deleted.
    """
    return process.on_main(lambda: _open_run(config))


def start_run(config: TrainConfig, folder: RunFolder) -> None:
    """All input has been checked: the folder holds this run from now on, and with --overwrite no older one.

    Each deletion is whole or not begun. Without its checkpoints a run still is one, whose --resume begins at step 0;
    without config.json, which goes next, what is left is none.
    """
    path = folder.path
    if config.overwrite:
        for name in RUN_FILES:
            discard(path / name)
    if folder.source and folder.source != path.resolve():
        for name in ("metrics.jsonl", "samples.jsonl", ENVIRONMENT):  # the log cuts them back to the checkpoint's step
            if (folder.source / name).exists():
                shutil.copyfile(folder.source / name, path / name)
    # What was asked of this start alone would contradict the next one's flags.
    settings = to_json(replace(config, resume="", overwrite=False, config=""))
    write_json(path / CONFIG, settings | {"run_id": folder.run_id})


def describe_origin(config: TrainConfig, folder: RunFolder, identity: dict[str, str]) -> dict[str, object]:
    """What every checkpoint of a run says that it is made from. identity: fingerprints of what the settings only name.
    """
    free = {key_name(field) for field in fields(config) if field.metadata.get("free")}
    settings = {name: value for name, value in to_json(config).items() if name not in free}
    return {"run_id": folder.run_id, "settings": settings, "identity": identity}


def describe_resume() -> str:
    """How the run goes on whose folder this process owns; "" of none."""
    for folder in owned_folders():
        if checkpoints := list_checkpoints(folder):
            return f"; --output-dir {folder} --resume goes on from {checkpoints[-1].name}"
        if (folder / CONFIG).exists():
            return f"; {folder} has no checkpoint yet (--save-every): --resume there begins at step 0"
        return "; nothing was trained yet: the same command begins anew, and finds what it has cached"
    return ""


def write_environment(run_dir: Path, step: int, process: Process, found: dict[str, object]) -> None:
    """Add this start, at `step`, to environment.json, a list: when, on what and with which versions a run began and
    was resumed. Starts that a resume from an earlier step gave up go.

    found: what else is to be kept of the start.
    """
    path = run_dir / ENVIRONMENT
    before = []
    if step and path.exists():
        with suppress(ValueError):  # only for people to read
            before = json.loads(path.read_text(encoding="utf-8"))
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


def _open_run(config: TrainConfig) -> tuple[TrainConfig, RunFolder]:
    name = Path(config.model).name or "toy"
    run_dir = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume and not config.output_dir:
        if config.resume == "auto":
            raise InputError("--resume needs --output-dir, the folder of the run to go on with")
        if Path(config.resume).resolve().parent.name != "checkpoints":
            raise InputError(f"--resume {config.resume} lies in no run's checkpoints/: name the run's --output-dir")
        run_dir = Path(config.resume).resolve().parent.parent
    check_directory(run_dir, "--output-dir")
    take_lock(run_dir)
    for directory in (run_dir, run_dir / "checkpoints"):
        mend(directory)
    config = replace(config, output_dir=str(run_dir))
    check_inputs_stay(config, run_dir)
    if not config.resume:
        if not config.overwrite and (left := files_of_run(run_dir)):
            raise InputError(f"{run_dir} holds a run ({', '.join(left)}): go on with it (--resume), replace it "
                             "(--overwrite), or choose another --output-dir")
        return config, RunFolder(run_dir, new_id())
    checkpoint = find_checkpoint(run_dir, config.resume)
    source = checkpoint.resolve().parent.parent if checkpoint else run_dir.resolve()
    if source != run_dir.resolve() and (left := files_of_run(run_dir)):
        raise InputError(f"--resume {config.resume}: --output-dir {run_dir} holds another run ({', '.join(left)}): "
                         "leave the flag out to go on in the checkpoint's folder, or choose a new one to branch off")
    stored = read_object(source / CONFIG)
    if checkpoint:
        manifest = read_manifest(checkpoint)
        if stored is None:
            print(f"--resume: {source / CONFIG} is missing or damaged: it is written anew")
        elif stored.get("run_id") != manifest["run_id"]:
            raise InputError(f"--resume: {checkpoint} is of another run than {source / CONFIG} (run_id "
                             f"{manifest['run_id']}, {stored.get('run_id')}): put back the one that is of this run")
        stored = manifest["settings"] | {"run_id": manifest["run_id"]}
    elif left := [name for name in files_of_run(run_dir) if name != CONFIG and stored is None]:
        raise InputError(f"--resume: {run_dir} has no {CONFIG} that can be read and no checkpoint, only what is left "
                         f"of a run ({', '.join(left)}): start anew with --overwrite")
    else:
        print(f"--resume: no complete checkpoint in {run_dir}: starting at step 0")
    if stored:
        config = replace(config, **settled_settings(stored, config))
        if changed := changed_settings(stored, config):
            raise InputError(f"--resume: {source} was started with other settings (--config {source / CONFIG} "
                             "repeats them):\n  " + "\n  ".join(changed))
    branches = source != run_dir.resolve()
    run_id = (not branches and stored and stored.get("run_id")) or new_id()
    for path in list_checkpoints(run_dir):
        if run_id_of(path) not in (run_id, None):
            raise InputError(f"--resume: {path} is of another run (run_id {run_id_of(path)}, here {run_id}): move it "
                             "out of this folder")
    return config, RunFolder(run_dir, run_id, checkpoint, source)


def new_id() -> str:
    return uuid.uuid4().hex[:16]


def files_of_run(run_dir: Path) -> list[str]:
    """What a folder holds of the names that a run writes, and a start would not leave as it is."""
    left = [name for name in RUN_FILES if name not in ("checkpoints", "weights") and (run_dir / name).exists()]
    return left + ["checkpoints"] * bool(list_checkpoints(run_dir))


def check_inputs_stay(config: TrainConfig, run_dir: Path) -> None:
    """Raise InputError when a flag names something inside what the run replaces or --overwrite deletes."""
    names = RUN_FILES if config.overwrite else ("final", "best", "checkpoints")
    lost = [(run_dir / name).resolve() for name in names]
    for field in fields(config):
        value = getattr(config, field.name)
        if not isinstance(value, str) or field.name in ("output_dir", "resume", "config"):
            continue
        parts = [value, *value.split(",")]
        parts += [part.partition("=")[2] for part in parts]
        for part in filter(None, map(str.strip, parts)):
            path = Path(os.path.expanduser(part))
            if os.path.exists(path) and any(path.resolve().is_relative_to(each) for each in lost):
                what = "--overwrite deletes" if config.overwrite else "the run replaces"
                raise InputError(f"{flag_name(config, field.name)} {part} lies in what {what} in {run_dir}: choose "
                                 "another --output-dir, or move it out of there")


def settled_settings(stored: dict[str, object], config: TrainConfig) -> dict[str, object]:
    """What the stored run found for settings that `config` leaves to the run, and revisions of hub ids."""
    settled = {}
    for field in fields(config):
        value, old = getattr(config, field.name), stored.get(key_name(field))
        same = isinstance(old, str) and without_gaps(value) in (old, old.rpartition("@")[0],
                                                                re.sub("@[0-9a-f]{40}", "", old))
        if old is not None and (value != "" and same or value in field.metadata.get("settled", ())):
            settled[field.name] = old
    return settled


def without_gaps(value: object) -> str:
    """A setting without white space around the signs of a list."""
    return re.sub(r"\s*([,=+])\s*", r"\1", str(value))


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:07d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first; other names in their folder are not the run's."""
    found = {int(match[1]): path for path in (run_dir / "checkpoints").glob("step-*")
             if (match := STEP_NAME.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that --resume names, or None when `auto` finds none. Raises InputError."""
    if resume == "auto":
        checkpoints = list_checkpoints(run_dir)
        return checkpoints[-1] if checkpoints else None
    if not (Path(resume) / MANIFEST).is_file():
        raise InputError(f"--resume {resume}: no {MANIFEST} there, so it is no complete checkpoint")
    return Path(resume)


def write_manifest(path: Path, manifest: dict[str, object]) -> None:
    """manifest.json of a checkpoint, with a digest of itself."""
    write_json(path / MANIFEST, manifest | {"digest": hash_json(manifest)})


def read_manifest(path: Path) -> dict[str, object]:
    """manifest.json of a checkpoint, as it was written. Raises InputError."""
    another = "resume from another one with --resume DIR"
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        missing = MANIFEST_KEYS - dict(manifest).keys()
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"checkpoint {path}: {MANIFEST} can't be read ({error}); {another}") from error
    if missing:
        raise InputError(f"checkpoint {path}: {MANIFEST} has no {', '.join(sorted(missing))}; {another}")
    if hash_json({name: value for name, value in manifest.items() if name != "digest"}) != manifest["digest"]:
        raise InputError(f"checkpoint {path} is damaged: {MANIFEST} is not as it was written; {another}")
    if (match := STEP_NAME.fullmatch(path.resolve().name)) and int(match[1]) != manifest["step"]:
        raise InputError(f"checkpoint {path} is of step {manifest['step']}: give it back its name")
    return manifest


def run_id_of(path: Path) -> str | None:
    """The run that a checkpoint is of; None where its manifest can't be read."""
    try:
        return read_manifest(path)["run_id"]
    except InputError:
        return None


def drop_later_checkpoints(run_dir: Path, step: int) -> None:
    """The run goes on from `step`: checkpoints after it, and best/ if it is of later, are of a branch that is given up.
    """
    later = [path for path in list_checkpoints(run_dir) if int(path.name.split("-")[1]) > step]
    if (of_best := read_step(run_dir / "best" / EVALUATION)) == math.inf:
        print(f"warning: {run_dir / 'best' / EVALUATION} can't be read, so that nothing says which step best/ is of: "
              "removed")
        discard(run_dir / "best")
    elif of_best > step:
        later.append(run_dir / "best")
    for path in later:
        print(f"--resume: {path.name} comes after the step that the run goes on from: removed")
        discard(path)


def read_step(path: Path) -> float:
    """The step of an evaluation.json; 0 where there is none, infinity for one that can't be read."""
    if not path.exists():
        return 0
    step = (read_object(path) or {}).get("step")
    return step if isinstance(step, int) else math.inf
