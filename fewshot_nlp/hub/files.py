"""Folders and files of a saved adapter: written all or nothing, fetched from the Hub, read without pickle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from torch import Tensor

from fewshot_nlp import __version__
from fewshot_nlp.config import CONFIG_NAME
from fewshot_nlp.hub.info import CURVE_NAME, RESULTS_NAME, read_json, write_json
from fewshot_nlp.hub.paths import public_path
from fewshot_nlp.models.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fewshot_nlp.models.safety import read_safetensors

PARAMS_NAME = "fewshot_params.safetensors"
#: Results, adapter and backbone. A save that does not write one of them removes it: a config.json beside a PEFT adapter
#: breaks AutoModel, and results, curve or weights of an earlier save would be read as if they belonged to this one.
OWN_PATTERNS = [
    RESULTS_NAME,
    CURVE_NAME,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PARAMS_NAME,
    "config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
]
#: What is said where the Hub has nothing to give; of two kinds that fit, the first.
_REFUSALS: dict[type[Exception], str] = {
    HFValidationError: "There is no folder {name!r}, and it is not a Hub id of the form 'user/name'. Check the path.",
    RevisionNotFoundError: "{name!r} has no revision {revision!r}. Name a branch, tag or commit of it.",
    GatedRepoError: "{name!r} is gated. Ask for access on its page, then log in with `hf auth login` or pass token=.",
    RepositoryNotFoundError: "There is no folder {name!r}, and no such repository that may be read. Check the name; "
    "for a private repository log in with `hf auth login` or pass token=.",
    LocalEntryNotFoundError: "There is no folder {name!r}, and revision {revision!r} of a repository of that name is "
    "not in the local cache and cannot be downloaded. {remedy}, or name a folder.",
}
#: How the folder of a save that has not ended begins.
STAGING = ".saving-"
#: What ``from_pretrained`` reads, and so all it downloads.
READ_PATTERNS = [CONFIG_NAME, *OWN_PATTERNS]


@contextmanager
def replaced_files(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder, and move what was written there into ``folder`` once the block has ended well.

    A ``fewshot_config.json`` must be among it: it marks the folder as an adapter.

    Until then ``folder`` is as it was, so a save that fails halfway never replaces a good one. Files of other names
    stay; weights and results of an earlier save that this one does not write are removed.

    Raises:
        ValueError: where ``folder`` is a file, cannot be written, or already holds a model of another kind.
        OSError: a disk that is full.
    """
    target = Path(folder).expanduser()
    if target.exists() and not target.is_dir():
        raise ValueError(f"save_directory={str(folder)!r} is a file. Name a folder.")
    saved_before = (target / CONFIG_NAME).is_file()
    if (target / "config.json").exists() and not saved_before:
        raise ValueError(
            f"save_directory={str(folder)!r} holds another model (config.json), which an adapter beside it would "
            "break. Name another folder."
        )
    existed = target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        # Inside the target, so that it is on the same file system and every move is atomic.
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=target))
    except OSError as error:
        raise ValueError(
            f"save_directory={str(folder)!r} cannot be written ({error.strerror}). Name a folder that you may write to."
        ) from error
    try:
        yield staging
        written = [path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()]
        # fewshot_config.json last, so that its move completes the save.
        for path in sorted(written, key=lambda path: path.name == CONFIG_NAME):
            if not (target / path).parent.resolve().is_relative_to(target.resolve()):
                raise ValueError(f"{(target / path).parent} is a link out of {target}. Remove the link.")
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            # safetensors makes files that their owner alone can read.
            shutil.copymode(staging / CONFIG_NAME, staging / path)
            (staging / path).replace(target / path)
        if saved_before:
            for path in target.iterdir():
                if any(fnmatch(path.name, pattern) for pattern in OWN_PATTERNS) and Path(path.name) not in written:
                    path.unlink()
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"The adapter cannot be saved to {str(folder)!r}: {getattr(error, 'strerror', None) or error}. Free some "
            "space, or name another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and not any(target.iterdir()):
            target.rmdir()


def publish_paths(folder: Path, path: str) -> None:
    """Shorten ``path``, that of a backbone, in the settings saved in ``folder``, before strangers read them."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        return public_path(path) if value == path else value

    for file in (folder / CONFIG_NAME, folder / ADAPTER_CONFIG):
        if file.is_file() and public_path(path) != path:
            write_json(file, shorten(read_json(file)))


def resolve_folder(
    path_or_repo: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The local folder of an adapter, downloaded where ``path_or_repo`` is a Hub id.

    Raises:
        FileNotFoundError: where there is no such folder, repository or revision, or it may not be read.
        ValueError: where the folder or repository is not a few-shot adapter.
    """
    check_token(token)
    folder = Path(path_or_repo).expanduser()
    if folder.exists():
        if not folder.is_dir():
            raise ValueError(f"{str(path_or_repo)!r} is a file. Name the folder that save_pretrained wrote.")
        check_is_adapter(folder, str(path_or_repo))
        return folder
    name = str(path_or_repo)
    try:
        folder = Path(
            snapshot_download(
                name,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=READ_PATTERNS,
                library_name="fewshot_nlp",
                library_version=__version__,
            )
        )
    except tuple(_REFUSALS) as error:
        words = next(words for kind, words in _REFUSALS.items() if isinstance(error, kind))
        remedy = "Drop local_files_only" if local_files_only else "Check the connection and HF_HUB_OFFLINE"
        raise FileNotFoundError(words.format(name=name, revision=revision or "main", remedy=remedy)) from error
    check_is_adapter(folder, name)
    return folder


def check_repository(api: HfApi, repo_id: str, revision: str | None = None) -> None:
    """Raise ``ValueError`` where a repository holds a model of another kind."""
    present = set(api.list_repo_files(repo_id, revision=revision))
    if "config.json" in present and CONFIG_NAME not in present:
        raise ValueError(
            f"{repo_id!r} holds another model (config.json), which an adapter beside it would break. Push to another "
            "repository."
        )


def check_token(token: str | bool | None) -> None:
    """Refuse a token that cannot be sent: the HTTP client would quote it in its own error."""
    if isinstance(token, str) and not (token and token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("token is empty or has blanks, line ends or other characters that no access token has.")


def check_is_adapter(folder: Path, name: str) -> None:
    """Raise ``ValueError`` unless ``folder`` holds a ``fewshot_config.json``."""
    if (folder / CONFIG_NAME).is_file():
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise ValueError(
            f"{name!r} is a plain PEFT adapter: it has {ADAPTER_CONFIG} but no {CONFIG_NAME}, so neither the head nor "
            "the way to learn a task is known. Load it with peft.PeftModel.from_pretrained(backbone, ...), or train a "
            "few-shot adapter on its backbone."
        )
    raise ValueError(
        f"{name!r} is not a few-shot adapter: {CONFIG_NAME} is missing. Name a folder or repository that "
        "FewShotAdapter.save_pretrained or push_to_hub wrote."
    )


def read_tensors(path: Path, needed_for: str) -> dict[str, Tensor]:
    """Tensors of a safetensors file.

    Raises:
        ValueError: where the file is missing or damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing in {path.parent}: {needed_for}. Save or download the adapter again.")
    try:
        return read_safetensors(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}. Save or download the adapter again.") from error
