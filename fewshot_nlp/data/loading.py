"""Opening a data set, whatever it is: a Hub id, a file, a folder, or one already in memory."""

from __future__ import annotations

import glob
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.data_files import get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from fewshot_nlp.checks import check_link, first_line, shown
from fewshot_nlp.data.alphabets import glyphs
from fewshot_nlp.data.embedded import home_intents

EMBEDDED: dict[str, Callable[[], DatasetDict]] = {"home_intents": home_intents, "glyphs": glyphs}
_BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip


class Opened(NamedTuple):
    """A data set as it was found.

    Attributes:
        parts: its splits.
        name: what to call it.
        hub_id: its id, if it was loaded from the Hub.
    """

    parts: DatasetDict
    name: str
    hub_id: str | None = None


def open_dataset(
    dataset: str | Path | Dataset | DatasetDict, config_name: str | None = None, revision: str | None = None
) -> Opened:
    """The splits of a data set, a name for it, and where it came from.

    A file or folder of the name wins over an embedded set, and that over the Hub. For ``home_intents`` the
    ``config_name`` is the language; ``glyphs`` has none.

    Raises:
        FileNotFoundError: a path to nothing.
        ValueError: a file of an unknown kind, a folder with a link out of it, a set that is on no Hub that can be
            reached, or a revision of one that is not on a Hub.
        TypeError: neither a name nor a data set.
    """
    if isinstance(dataset, DatasetDict):
        return Opened(dataset, "dataset")
    if isinstance(dataset, Dataset):
        return Opened(DatasetDict({"train": dataset}), "dataset")
    if not isinstance(dataset, (str, Path)):
        raise TypeError(f"dataset must be a name, a path, a Dataset or a DatasetDict, not {type(dataset).__name__}.")
    path, name = Path(dataset).expanduser(), str(dataset)
    if revision is not None and (path.exists() or name in EMBEDDED):
        raise ValueError(f"dataset={name!r} is not on the Hub and has no revision {revision!r}. Leave that out.")
    if path.is_file():
        return Opened(_open_file(path), path.stem if path.stem != "data" else path.resolve().parent.name)
    if path.is_dir():
        return Opened(_open_folder(path, config_name), path.resolve().name)
    if name in EMBEDDED:
        if config_name is None:
            return Opened(EMBEDDED[name](), name)
        if name != "home_intents":
            raise ValueError(f"dataset={name!r} has no configuration {config_name!r}. Leave that out.")
        return Opened(home_intents(config_name), name)
    if path.suffix in _BUILDERS or isinstance(dataset, Path) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"dataset={name!r} does not exist. Name a file, a folder, or a data set of the Hub.")
    try:
        return Opened(_as_dict(load_dataset(name, config_name, revision=revision)), name, hub_id=name)
    except (ConnectionError, DatasetNotFoundError, FileNotFoundError) as error:
        raise ValueError(
            f"dataset={name!r} is no file or folder, no embedded set ({', '.join(EMBEDDED)}), and the Hub has no such "
            f"data set or cannot be reached: {error}"
        ) from error
    except (RuntimeError, ValueError) as error:
        # Such as a repository that is a loading script, or a configuration that must be named.
        raise ValueError(
            f"dataset={name!r} cannot be loaded from the Hub: {error} Set dataset_config_name, or dataset_revision (in "
            f"Python, revision) to 'refs/convert/parquet' where the Hub has converted it."
        ) from error


def _open_file(path: Path) -> DatasetDict:
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"dataset={str(path)!r} is of an unknown kind. Use one of: {', '.join(_BUILDERS)}.")
    if not path.stat().st_size:
        raise ValueError(f"dataset={str(path)!r} is empty. Name a file with examples.")
    options: dict[str, Any] = {"delimiter": "\t"} if path.suffix.lower() == ".tsv" else {}
    return _load(path, builder, data_files=glob.escape(str(path)), **options)


def _open_folder(path: Path, config_name: str | None) -> DatasetDict:
    for found in path.rglob("*"):
        if found.is_symlink():
            check_link(found, path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _check_saved(path)
        return _load(path, str(path), load=load_from_disk)
    if any(path.glob("split_*.json")):
        # Lists of class names beside the data: load_dataset would take them for data.
        files = [f for f in sorted(path.iterdir()) if f.suffix in _BUILDERS and not f.match("split_*.json")]
        if len(files) == 1:
            return _open_file(files[0])
    return _load(path, path, config_name, load=_load_folder)


def _load_folder(path: Path, config_name: str | None) -> DatasetDict:
    """``load_dataset`` of a folder; by itself that takes the folder's name for a pattern, which may fit another."""
    folder = path.resolve().as_posix()
    if (base := glob.escape(folder)) == folder:
        return load_dataset(str(path), config_name)
    files = {split: [f"{base}/{each}" for each in found] for split, found in get_data_patterns(base).items()}
    return load_dataset(str(path), config_name, data_files=files)


def _check_saved(folder: Path) -> None:
    """Raise ``ValueError`` where the list of files of a saved data set names one that is not beside it."""
    for path in (*folder.glob("state.json"), *folder.glob("*/state.json")):
        try:
            names = [file["filename"] for file in json.loads(path.read_text(encoding="utf-8"))["_data_files"]]
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"dataset={str(folder)!r} cannot be read: {path.name} is damaged. Save it again."
            ) from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"dataset={str(folder)!r}: {path} names {shown(name)}, which is no file beside it.")


def _load(path: Path, *args: Any, load: Callable[..., Any] = load_dataset, **options: Any) -> DatasetDict:
    try:
        return _as_dict(load(*args, **options))
    except (DatasetGenerationError, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"dataset={str(path)!r} cannot be read: {reason}. Name one file, or repair it.") from error


def _as_dict(dataset: Dataset | DatasetDict) -> DatasetDict:
    return DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
