"""Checkpoints that are whole or absent: safetensors and JSON only, written aside, then renamed into place.

A checkpoint is a folder ``checkpoint-<step>`` with the tensors of the parameters and of the optimiser, the state of
the run, and ``manifest.json``: size and SHA-256 of every file, by which damage is found before anything is read.

One that is being written is called ``.checkpoint-<step>.partial``, one that is being deleted
``.checkpoint-<step>.stale``: a process that is killed at either leaves nothing that could be taken for a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fewshot_nlp.models.safety import check_floats, check_inside, read_safetensors

PREFIX = "checkpoint-"
PARTIAL, STALE = ".partial", ".stale"
MANIFEST = "manifest.json"
PARAMS = "params.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "trainer_state.json"
PROGRESS = "progress.json"
FILES = (PARAMS, OPTIMIZER, STATE, PROGRESS)


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those that were saved."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        params: meta-parameters by name.
        optimizer: tensors of the optimiser, named ``<kind>.<parameter>``.
        state: fields of transformers' ``TrainerState``.
        progress: the rest, JSON-able: scheduler, running averages, what the run was asked to do.
    """

    params: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: dict[str, Any]
    progress: dict[str, Any]


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder; -1 for any other name."""
    match = re.fullmatch(re.escape(PREFIX) + r"(\d+)", folder.name)
    return int(match.group(1)) if match else -1


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders in ``output_dir``, oldest step first."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.is_dir() and step_of(path) >= 0]
    return sorted(folders, key=step_of)


def write_checkpoint(output_dir: str | Path, step: int, checkpoint: Checkpoint) -> Path:
    """Save as ``output_dir/checkpoint-<step>``; whoever looks sees the whole folder or none.

    Raises:
        OSError: a disk that is full or cannot be written, with the newest sound checkpoint, which stays as it is.
    """
    output_dir = Path(output_dir)
    final, aside = output_dir / f"{PREFIX}{step}", output_dir / f".{PREFIX}{step}{PARTIAL}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        _write_files(aside, checkpoint)
        # Of the same step there is one where a run goes on from an older checkpoint than the newest.
        delete_checkpoint(final)
        aside.rename(final)
        sync(output_dir)
    except (OSError, SafetensorError) as error:
        # What was written of it takes the room that the user will need.
        shutil.rmtree(aside, ignore_errors=True)
        raise OSError(_cannot_save(output_dir, step, checkpoint, error)) from error
    return final


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint, if it is there, in one move: it is renamed before its files go."""
    stale = folder.with_name(f".{folder.name}{STALE}")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
        shutil.rmtree(stale)


def clear_leftovers(output_dir: str | Path) -> None:
    """Delete what a killed process left of checkpoints that it was writing or deleting."""
    for suffix in (PARTIAL, STALE):
        for folder in Path(output_dir).glob(f".{PREFIX}*{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)


def check_checkpoint(folder: str | Path) -> None:
    """Raise ``DamagedCheckpoint``, naming the first file that is missing or not what the manifest says.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {str(folder)!r}. Give the path of a checkpoint-<step>.")
    try:
        check_inside(folder, (MANIFEST, *FILES))
    except ValueError as error:
        raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: {error}") from error
    manifest = _read_json(folder, MANIFEST)
    for name in FILES:
        path, expected = folder / name, manifest.get(name)
        if not isinstance(expected, dict):
            raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: {MANIFEST} does not list {name}.")
        if not path.is_file():
            raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: {name} is missing.")
        if path.stat().st_size != expected.get("bytes"):
            raise DamagedCheckpoint(
                f"Checkpoint {folder} is damaged: {name} has {path.stat().st_size} bytes, not {expected.get('bytes')}."
            )
        if _sha256(path) != expected.get("sha256"):
            raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: the SHA-256 of {name} does not match.")


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Load a checkpoint.

    Raises:
        FileNotFoundError: if the folder does not exist.
        DamagedCheckpoint: if a file is missing or changed, or whoever wrote it and its hash put something else there.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    params, optimizer = (_read_tensors(folder, name) for name in (PARAMS, OPTIMIZER))
    return Checkpoint(params, optimizer, _read_json(folder, STATE), _read_json(folder, PROGRESS))


def find_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest sound checkpoint, or ``None``. Damaged ones are named in a warning and passed over."""
    for folder in reversed(list_checkpoints(output_dir)):
        try:
            check_checkpoint(folder)
        except DamagedCheckpoint as error:
            warnings.warn(f"{error} Looking for an older one.", stacklevel=2)
        else:
            return folder
    return None


def prune_checkpoints(
    output_dir: str | Path, limit: int | None, best: str | Path | None, newest: str | Path | None = None
) -> None:
    """Delete checkpoints until ``limit`` are left, never the best nor the newest.

    ``newest`` is the last that was written, by default the one of the highest step. Those of higher steps, which a
    resumed run has passed over, go first; then the oldest.
    """
    folders = list_checkpoints(output_dir)
    if limit is None or len(folders) <= limit:
        return
    last = folders[-1].name if newest is None else Path(newest).name
    kept = {last} if best is None else {last, Path(best).name}
    others = [folder for folder in folders if folder.name not in kept]
    others.sort(key=lambda folder: (step_of(folder) < step_of(Path(last)), step_of(folder)))
    surplus = min(len(folders) - limit, len(others))
    for folder in others[:surplus]:
        delete_checkpoint(folder)


def _write_files(folder: Path, checkpoint: Checkpoint) -> None:
    save_file(_savable(checkpoint.params), folder / PARAMS)
    save_file(_savable(checkpoint.optimizer), folder / OPTIMIZER)
    _write_json(folder / STATE, checkpoint.state)
    _write_json(folder / PROGRESS, checkpoint.progress)
    manifest = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in FILES}
    _write_json(folder / MANIFEST, manifest)
    for name in (*FILES, MANIFEST):
        sync(folder / name)
    sync(folder)


def _cannot_save(output_dir: Path, step: int, checkpoint: Checkpoint, error: Exception) -> str:
    """What happened, how much room there is and how much is needed, and how to go on."""
    tensors = [*checkpoint.params.values(), *checkpoint.optimizer.values()]
    needed = sum(tensor.nbytes for tensor in tensors) / 1e6
    try:
        room = f"{shutil.disk_usage(output_dir).free / 1e6:.1f} MB free there, and its tensors take {needed:.1f} MB"
    except OSError:
        room = f"its tensors take {needed:.1f} MB"
    last = find_checkpoint(output_dir)
    kept = "No checkpoint was written before" if last is None else f"{last} and what was logged are as they were"
    remedy = "start anew" if last is None else "go on from there with resume_from_checkpoint: true"
    reason = getattr(error, "strerror", None) or error
    return (
        f"{PREFIX}{step} cannot be written to output_dir={str(output_dir)!r}: {reason}; {room}. {kept}. Free some "
        f"space, or see that the folder can be written, then {remedy}."
    )


def _savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies on the CPU: safetensors takes no tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    try:
        tensors = read_safetensors(folder / name)
        check_floats(tensors, name)
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: {name} cannot be read ({error}).") from error
    return tensors


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: {name} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: {name} holds no JSON object.")
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a rename cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
