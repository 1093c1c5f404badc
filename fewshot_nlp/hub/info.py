"""What an adapter remembers of its training, and how ``fewshot_config.json`` holds it.

::

    {"format_version": 1, "library_version": "0.1.0", "config": {FewShotConfig}, "label_names": [...],
     "datasets": [...], "hub_datasets": [...], "language": [...], "license": null, "command": "...",
     "versions": {...}}
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from fewshot_nlp import __version__
from fewshot_nlp.checks import choice, from_mapping, shown
from fewshot_nlp.config import CONFIG_NAME, FewShotConfig
from fewshot_nlp.hub.paths import public_path, with_public_paths

#: Raised by one when a reader of the old format would misread the new one.
FORMAT_VERSION = 1
RESULTS_NAME, CURVE_NAME = "results.json", "learning_curve.png"

#: Characters of any one text that is known of an adapter.
LONGEST = 10_000
#: Of what is known of it, objects in lists in objects.
DEEPEST = 50

_ENVELOPE = ("format_version", "library_version", "config")
_TOKENS = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{8,}")
_URL_SECRETS = re.compile(r"//[^/\s@'\"]+@")
#: A shorter one would be found in words.
_SHORTEST_TOKEN = 8
_TOKEN_ARGUMENTS = re.compile(r"((?:^|\s)--?[\w-]*token(?:\s*=\s*|\s+))(\"[^\"]*\"|'[^']*'|\S+)", re.IGNORECASE)


def library_versions() -> dict[str, str]:
    """Versions of the installed libraries that an adapter's numbers may depend on."""
    found = {"fewshot_nlp": __version__}
    for name in ("torch", "transformers", "peft", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@dataclass
class AdapterInfo:
    """What is known about an adapter besides its weights.

    Attributes:
        label_names: classes seen in training.
        datasets: names of the training data sets; of a path, what ``public_path`` leaves.
        results: the evaluation in the form of ``results.json``; ``None`` where nothing was measured.
        command: the command that made the adapter. Access tokens are removed from it, and paths shortened.
        language: ISO 639 codes of the training texts.
        license: an identifier of the Hub's list, such as ``apache-2.0``; nothing is claimed without it.
        learning_curve: a PNG file, or what it holds, to save beside the adapter and show on the card. It is not kept
            in ``fewshot_config.json``.
        versions: library name to version, at the time of training.
        hub_datasets: ids of those of the data sets that came from the Hub; the card links to these alone.
        kind: what an example is, ``"text"`` or ``"image"``.
    """

    label_names: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    results: dict[str, Any] | None = None
    command: str | None = None
    language: list[str] = field(default_factory=list)
    license: str | None = None
    learning_curve: str | Path | bytes | None = None
    versions: dict[str, str] = field(default_factory=library_versions)
    hub_datasets: list[str] = field(default_factory=list)
    kind: str = "text"

    def __post_init__(self) -> None:
        for each in fields(self):
            _check_lengths(each.name, getattr(self, each.name))
        for name in ("label_names", "datasets", "hub_datasets", "language"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"{name}={value!r} must be a list of strings.")
            setattr(self, name, [without_tokens(item) for item in value])
        choice("kind", self.kind, ("text", "image"))
        for name in ("command", "license"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be a string, or None where it is not known.")
        if not isinstance(self.versions, dict):
            raise ValueError(f"versions={self.versions!r} must be an object of library names and versions.")
        if self.results is not None and not isinstance(self.results, dict):
            raise ValueError(f"results must be an object as in {RESULTS_NAME}, not {type(self.results).__name__}.")
        self.datasets = [public_path(name) for name in self.datasets]
        self.command = None if self.command is None else with_public_paths(without_tokens(self.command))
        self.results = without_tokens(self.results)


def _check_lengths(name: str, value: Any, depth: int = 0) -> None:
    """Raise ``ValueError`` where a string in a JSON-like value is longer than any name, sentence or command, or where
    the value holds others many times over."""
    if depth > DEEPEST:
        raise ValueError(f"{name} holds objects or lists in one another more than {DEEPEST} times over.")
    if isinstance(value, str) and len(value) > LONGEST:
        raise ValueError(f"{name} holds a text of {len(value):,} characters, {shown(value)}. Use {LONGEST:,} at most.")
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    for item in value if isinstance(value, list | tuple) else ():
        _check_lengths(name, item, depth + 1)


def without_tokens(value: Any) -> Any:
    """Replace access tokens in every string of a JSON-like value by ``***``: those of the Hub's form, those of a
    command's arguments and of URLs, and the one that is logged in, whatever its form."""
    own = get_token() or ""

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            value = value.replace(own, "***") if len(own) >= _SHORTEST_TOKEN else value
            return _TOKEN_ARGUMENTS.sub(r"\1***", _URL_SECRETS.sub("//***@", _TOKENS.sub("***", value)))
        if isinstance(value, dict):
            return {clean(key): clean(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [clean(item) for item in value]
        return value

    return clean(value)


def write_manifest(folder: Path, config: FewShotConfig, info: AdapterInfo) -> None:
    """Write ``fewshot_config.json``, and ``results.json`` where there are results."""
    known = asdict(info)
    results = known.pop("results")
    known.pop("learning_curve")
    envelope = {"format_version": FORMAT_VERSION, "library_version": __version__, "config": config.to_dict()}
    write_json(folder / CONFIG_NAME, envelope | known)
    if results is not None:
        write_json(folder / RESULTS_NAME, results)


def read_manifest(folder: Path) -> tuple[FewShotConfig, AdapterInfo]:
    """Read what ``write_manifest`` wrote.

    Raises:
        ValueError: on damaged JSON, an unknown key or setting, or a format of a later version.
    """
    path = folder / CONFIG_NAME
    manifest = read_json(path)
    found = manifest.get("format_version")
    if type(found) is not int or found < 1:
        raise ValueError(f"{path} has format_version={found!r}, which is no version. Save the adapter again.")
    if found > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version={found}, and this fewshot_nlp {__version__} reads up to {FORMAT_VERSION}. "
            f"It was written by fewshot_nlp {manifest.get('library_version')}: upgrade to that version or later."
        )
    if "config" not in manifest:
        raise ValueError(f"{path} has no key 'config' with the settings of the learner. Save the adapter again.")
    config = FewShotConfig.from_dict(manifest["config"], f"'config' in {path}")
    known = {key: value for key, value in manifest.items() if key not in _ENVELOPE}
    # Both are AdapterInfo's own fields, but neither is read from this file.
    for key in ("results", "learning_curve"):
        if key in known:
            raise ValueError(f"{path} has an unknown key {key!r}.")
    if "versions" not in known:
        known["versions"] = {}
    info: AdapterInfo = from_mapping(AdapterInfo, known, str(path))
    if (folder / RESULTS_NAME).is_file():
        results = read_json(folder / RESULTS_NAME)
        _check_lengths(str(folder / RESULTS_NAME), results)
        info.results = results
    if (folder / CURVE_NAME).is_file():
        info.learning_curve = (folder / CURVE_NAME).read_bytes()
    return config, info


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ``ValueError`` where it is damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Save or download the adapter again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(content).__name__}.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as people read it."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # Half of a surrogate pair, which a file may hold as an escape, goes back as that.
    path.write_text(text, encoding="utf-8", errors="backslashreplace")
