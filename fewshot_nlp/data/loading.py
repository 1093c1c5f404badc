"""Opening a data set, whatever it is: a Hub id, a file, a folder, or one already in memory."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import FILES_TO_IGNORE, DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.csv.csv import CsvConfig

from fewshot_nlp.checks import check_link, first_line, shown
from fewshot_nlp.data.alphabets import glyphs
from fewshot_nlp.data.embedded import home_intents

EMBEDDED: dict[str, Callable[[], DatasetDict]] = {"home_intents": home_intents, "glyphs": glyphs}
_BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet",
    ".arrow": "arrow",
}  # fmt: skip
#: A class may be called "NA" or "None", which pandas would take for a missing cell.
_CSV = {"keep_default_na": False, "na_values": [""]}
_OPTIONS: dict[str, dict[str, Any]] = {".csv": _CSV, ".tsv": {**_CSV, "delimiter": "\t"}}


class Opened(NamedTuple):
    """A data set as it was found.

    Attributes:
        parts: its splits.
        name: what to call it.
        hub_id: its id, if it was loaded from the Hub.
        config_name: its configuration, if it is one of several; of ``home_intents`` the language.
    """

    parts: DatasetDict
    name: str
    hub_id: str | None = None
    config_name: str | None = None


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
        return Opened(_open_folder(path, config_name), path.resolve().name, config_name=config_name)
    if name in EMBEDDED:
        language = (config_name or "en") if name == "home_intents" else None
        if config_name is None:
            return Opened(EMBEDDED[name](), name, config_name=language)
        if language is None:
            raise ValueError(f"dataset={name!r} has no configuration {config_name!r}. Leave that out.")
        return Opened(home_intents(language), name, config_name=language)
    if path.suffix in _BUILDERS or isinstance(dataset, Path) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"dataset={name!r} does not exist. Name a file, a folder, or a data set of the Hub.")
    try:
        parts = _as_dict(_load_from_hub(name, config_name, revision))
        chosen = config_name or next(iter(parts.values())).config_name
        return Opened(parts, name, hub_id=name, config_name=None if chosen == "default" else chosen)
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


def _load_from_hub(name: str, config_name: str | None, revision: str | None) -> Dataset | DatasetDict:
    """``load_dataset``, which reads csv files as the local ones are read."""
    chosen = config_name
    try:
        builder = load_dataset_builder(name, config_name, revision=revision)
    except ValueError:
        # Also what a Hub that cannot be reached leaves, where the data are kept under the options alone.
        chosen, may_be_csv = config_name or "default", True
    else:
        # Of a repository's own options none is overruled.
        own: Any = builder.config
        plain_csv = isinstance(own, CsvConfig) and own.keep_default_na and own.na_values is None
        # Without a name, options would put all configurations into one.
        chosen, may_be_csv = own.name, plain_csv or isinstance(builder, Cache)
    if may_be_csv:
        try:
            return load_dataset(name, chosen, revision=revision, **_CSV)
        except (ValueError, DatasetGenerationError):
            # No csv; or columns that the repository declares as numbers hold such a word.
            pass
    return load_dataset(name, config_name, revision=revision)


def _open_file(path: Path) -> DatasetDict:
    builder = _BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"dataset={str(path)!r} is of an unknown kind. Use one of: {', '.join(_BUILDERS)}.")
    if not path.stat().st_size:
        raise ValueError(f"dataset={str(path)!r} is empty. Name a file with examples.")
    return _load(path, builder, data_files=glob.escape(str(path)), **_OPTIONS.get(path.suffix.lower(), {}))


def _open_folder(path: Path, config_name: str | None) -> DatasetDict:
    for found in path.rglob("*"):
        if found.is_symlink():
            check_link(found, path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        _check_saved(path)
        return _load(path, str(path), load=load_from_disk)
    return _load(path, path, config_name, load=_load_folder)


def _load_folder(path: Path, config_name: str | None) -> DatasetDict:
    """``load_dataset`` of a folder.

    By itself that takes the folder's name for a pattern, which may fit another, and lists of classes for data. Of files
    of several kinds it reads the most frequent alone.
    """
    folder = path.resolve()
    files = [file for file in folder.rglob("*") if file.is_file()]
    files = [file for file in files if not any(part.startswith((".", "__")) for part in file.relative_to(folder).parts)]
    data = [file for file in files if not file.match("split_*.json")]
    # Beside tables and images: what load_dataset passes over, or reads together with the images.
    beside = {*FILES_TO_IGNORE, "metadata.csv", "metadata.jsonl", "metadata.parquet"}
    counted = [file for file in data if file.name not in beside]
    counts = Counter(map(_kind, counted))
    tables = {_kind(file): file.name for file in counted if _kind(file) in _BUILDERS}
    if len(tables) > 1 and config_name is None:
        names = " and ".join(sorted(tables.values()))
        raise ValueError(f"it has files of several kinds, such as {names}, of which one kind would be read")
    kind = max(counts, key=lambda each: (counts[each], each in _BUILDERS), default="")
    options = dict(_OPTIONS.get(kind, {})) if len(tables) == 1 else {}
    base = glob.escape(folder.as_posix())
    if len(data) < len(files) or base != folder.as_posix():
        read = {file.as_posix() for file in data if kind not in _BUILDERS or _kind(file) == kind}
        found = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
        named = {split: [glob.escape(file) for file in files if file in read] for split, files in found.items()}
        options["data_files"] = {split: files for split, files in named.items() if files}
    return load_dataset(str(path), config_name, **options)


def _kind(file: Path) -> str:
    """Ending of a file, one for all of JSON."""
    ending = file.suffix.lower()
    return ".json" if _BUILDERS.get(ending) == "json" else ending


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
    found = DatasetDict({"train": dataset}) if isinstance(dataset, Dataset) else dataset
    for part in found.values():
        # pandas takes what stands in front of the named columns for names of rows, and the rest for texts.
        if part.info.builder_name == "csv" and "__index_level_0__" in part.features:
            raise ValueError(
                "its rows have more cells than its first line has names, as those with a comma in a text have that is "
                "not in quotation marks"
            )
    return found
