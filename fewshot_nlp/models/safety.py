"""Files that a stranger may have written, looked at before a library reads them.

What is read is JSON and safetensors. Still a file may name other files, code to fetch and run, or a pattern whose
search never ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fewshot_nlp.checks import check_link, shown

WEIGHT_INDEX = "model.safetensors.index.json"
#: For every ``from_pretrained``: code that comes with a model is not run, and nobody is asked whether it should be.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}
#: What transformers raises over files that are no model's.
UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, SafetensorError,
              StrictDataclassError)  # fmt: skip
#: What PEFT reads in an adapter's settings to reach for other files, servers or packages; the weights do without.
_REACHING = ("tokenizer_kwargs", "megatron_config", "prompt_tuning_init_state_dict_path", "adapters")
#: Where PEFT takes a string, or a key, for a regular expression.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_inside(folder: Path, names: Iterable[str]) -> None:
    """Raise ``ValueError`` unless what is in ``folder`` under ``names``, which may be patterns, are files of its own.

    A link may lead to another place in the folder, and in the Hub's cache to the files of the same repository.
    """
    for path in (path for name in names for path in folder.glob(name)):
        real = check_link(path, folder)
        if not real.is_file():
            raise ValueError(f"{path} is no file. Save or download the folder again.")


def check_model_folder(folder: Path) -> None:
    """Raise ``ValueError`` where a model's ``folder`` would have others be read: weights elsewhere, a kernel for its
    attention, a base model, or packages for quantised weights."""
    index, settings = (_object(folder / name) for name in (WEIGHT_INDEX, "config.json"))
    weight_map = index.get("weight_map", {})
    for shard in weight_map.values() if isinstance(weight_map, dict) else [weight_map]:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{folder / WEIGHT_INDEX} names {shown(shard)}, which is no file beside it.")
    if settings.get("quantization_config"):
        raise ValueError(f"{folder / 'config.json'} is of a quantised model. Give one of plain weights.")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds a PEFT adapter (adapter_config.json), not a backbone alone.")


def refused_setting(settings: Mapping[str, Any]) -> str | None:
    """Why PEFT may not be given ``settings``: for them it would run code, open other files or search without end."""
    asked = settings.get("tokenizer_kwargs")
    if isinstance(asked, Mapping) and asked.get("trust_remote_code"):
        return "it asks for trust_remote_code, which would run code from its author. Remove tokenizer_kwargs"
    for name in _REACHING:
        if settings.get(name):
            return f"{name}={shown(settings[name])} may have other files, servers or packages asked. Remove it"
    for pattern in (each for name in _PATTERNS for each in _patterns(settings.get(name))):
        # Each further quantifier multiplies the search by the length of a module's name; one on a group squares it.
        if len(re.findall(r"[*+{]", pattern)) > 3 or re.search(r"\)[*+{]", pattern):
            return f"the search for the pattern {shown(pattern)} may not end. List the names of the modules"
    return None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, which may be missing or damaged: ``OSError`` or ``SafetensorError``."""
    # Copies: where a tensor of a file begins in memory, a processor's products may have other last bits.
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def check_floats(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise ``ValueError`` unless all ``tensors``, of the file ``source``, are finite floats of 16 to 64 bits."""
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{source}: {shown(name)} is of type {kind}, not float. Save or download it again.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {shown(name)} holds values that are not finite. Train or download it again.")


def _patterns(value: Any) -> Iterator[str]:
    # A list holds names, which PEFT compares as they are; a mapping's keys are patterns.
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from map(str, value)


def _object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not {shown(content)}.")
    return content
