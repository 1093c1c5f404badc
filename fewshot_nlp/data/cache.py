"""Data sets that were built here: kept where Hugging Face caches, written all at once."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Folder of the data sets that this package builds: in ``cache_dir``, by default Hugging Face's."""
    return Path(datasets.config.HF_DATASETS_CACHE if cache_dir is None else cache_dir) / "fewshot_nlp"


def read_splits(folder: Path, splits: tuple[str, ...]) -> DatasetDict:
    """What ``write_splits`` wrote."""
    return DatasetDict({split: Dataset.from_file(str(folder / f"{split}.arrow")) for split in splits})


def write_splits(splits: DatasetDict, folder: Path) -> None:
    """Write all splits beside ``folder`` and move them there at once: a reader never sees half a set.

    Raises:
        OSError: the folder cannot be written.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
    except OSError as error:
        raise OSError(
            f"Cannot write to {folder.parent} ({error}). Set HF_HOME or cache_dir to another folder."
        ) from error
    try:
        for split, dataset in splits.items():
            with pa.ipc.new_stream(scratch / f"{split}.arrow", dataset.features.arrow_schema) as writer:
                writer.write_table(dataset.data.table)
        try:
            scratch.replace(folder)
        except OSError:
            if not folder.is_dir():  # Otherwise another process has built the same set first.
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def save_splits(splits: DatasetDict, folder: Path) -> None:
    """``save_to_disk``, all of it or nothing, in place of a data set that was there.

    Raises:
        ValueError: the folder is there, and holds something else.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
        splits.save_to_disk(f"{scratch}/new")
        if folder.exists():
            if not (folder / "dataset_dict.json").is_file():
                raise ValueError(f"{folder} is there, and no data set. Give another folder.")
            shutil.rmtree(folder)
        Path(scratch, "new").rename(folder)
