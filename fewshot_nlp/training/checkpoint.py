"""Checkpoints that are whole or absent: safetensors and JSON only, written aside, then renamed into place.

A checkpoint is a folder ``checkpoint-<step>`` with the tensors of the parameters and of the optimiser, the state of
the run, and ``manifest.json``: size and SHA-256 of every file, by which damage is found before anything is read.
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

from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "checkpoint-"
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
    """Save as ``output_dir/checkpoint-<step>``; whoever looks sees the whole folder or none."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    final, aside = output_dir / f"{PREFIX}{step}", output_dir / f".{PREFIX}{step}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_file(_savable(checkpoint.params), aside / PARAMS)
    save_file(_savable(checkpoint.optimizer), aside / OPTIMIZER)
    _write_json(aside / STATE, checkpoint.state)
    _write_json(aside / PROGRESS, checkpoint.progress)
    manifest = {name: {"bytes": (aside / name).stat().st_size, "sha256": _sha256(aside / name)} for name in FILES}
    _write_json(aside / MANIFEST, manifest)
    for name in (*FILES, MANIFEST):
        _sync(aside / name)
    _sync(aside)
    if final.exists():
        shutil.rmtree(final)
    aside.rename(final)
    _sync(output_dir)
    return final


def check_checkpoint(folder: str | Path) -> None:
    """Raise ``DamagedCheckpoint``, naming the first file that is missing or not what the manifest says.

    Raises:
        FileNotFoundError: if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no checkpoint folder {str(folder)!r}. Give the path of a checkpoint-<step>.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"Checkpoint {folder} is damaged: {MANIFEST} cannot be read ({error}).") from error
    for name in FILES:
        path, expected = folder / name, manifest.get(name) if isinstance(manifest, dict) else None
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
        DamagedCheckpoint: if a file is missing or changed.
    """
    folder = Path(folder)
    check_checkpoint(folder)
    return Checkpoint(
        load_file(folder / PARAMS),
        load_file(folder / OPTIMIZER),
        json.loads((folder / STATE).read_text(encoding="utf-8")),
        json.loads((folder / PROGRESS).read_text(encoding="utf-8")),
    )


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
        shutil.rmtree(folder)


def _savable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies on the CPU: safetensors takes no tensors that share memory."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that a rename cannot overtake its content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
