"""What `fuzz.py` feeds: loaders of files that strangers write, files that they should read, and changes of these."""

from __future__ import annotations

import hashlib
import json
import random
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors.torch import save

from fewshot_nlp.cli.parser import read_yaml
from fewshot_nlp.config import CONFIG_NAME, FewShotConfig
from fewshot_nlp.data import EpisodeSampler, Pool, load_episodes, load_pools, save_episodes
from fewshot_nlp.data.episodes import episodes_hash, spec_from_dict
from fewshot_nlp.data.splits import check_splits, read_split_file
from fewshot_nlp.hub.card import model_card
from fewshot_nlp.hub.files import PARAMS_NAME, read_tensors
from fewshot_nlp.hub.info import RESULTS_NAME, AdapterInfo, read_manifest, write_manifest
from fewshot_nlp.models.adapters import ADAPTER_CONFIG, read_peft_config
from fewshot_nlp.models.safety import check_floats
from fewshot_nlp.training import checkpoint

#: What programs trip over, as JSON.
AWKWARD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", " ",
    "0", "none", "\0", "\x1b[2J", "\u202e", "\ud800", "a" * 5000, "../..", "/", "[" * 50, "{text}", [], {}, [[]],
    [None], {"": {}}, [{}], ["a", 1], {"a": "b"},
)  # fmt: skip
#: What a parser of bytes trips over.
PIECES = (b"{", b"}", b"[", b"]", b'"', b"\\", b",", b":", b"\n", b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"NaN", b"1e999",
          b"\\ud800", b"-", b"- ", b"&a ", b"*a", b"!!python/object:os.system ", b"<<: ", b"2024-99-99", b"? ",
          b"[" * 3000, b"9" * 5000)  # fmt: skip
#: Longest input; larger ones only take longer.
LARGEST = 1 << 16


class Target(NamedTuple):
    """A loader, and files for it.

    Attributes:
        seeds: files that it reads; changes start from these.
        read: writes the bytes it is given where the loader looks, and calls it.
    """

    seeds: list[bytes]
    read: Callable[[bytes], Any]


def changed(data: bytes, rng: random.Random) -> bytes:
    """``data`` after one to four changes: of a JSON value, or a line of one, where it is one, else of bytes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        whole = rng.random() < 0.5
        try:
            if rng.random() < 0.3:
                raise ValueError("for once, bytes")
            lines[at] = json.dumps(_changed_value(json.loads(data if whole else lines[at]), rng)).encode()
            data = lines[at] if whole else b"\n".join(lines)
        except (ValueError, RecursionError):
            data = _changed_bytes(data, rng)
    return data[:LARGEST]


def _changed_value(value: Any, rng: random.Random) -> Any:
    """``value`` with one of the values in it changed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        kind = rng.randrange(4)
        if kind == 0 and isinstance(value, str) and value:
            at = rng.randrange(len(value))
            return value[:at] + rng.choice(("", "\0", "é", "\u202e", value)) + value[at + 1 :]
        if kind == 1 and type(value) is int:
            return value + rng.choice((-1, 1, 1000))
        return [value] if kind == 2 else rng.choice(AWKWARD)
    value = dict(value) if isinstance(value, dict) else list(value)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    kind = rng.randrange(8)
    if kind == 0:
        del value[key]
    elif kind == 1:
        value[key] = value[rng.choice(keys)]
    elif kind == 2 and isinstance(value, dict):
        value[rng.choice(("", "unknown", "\0", key + "s", *map(str, keys)))] = value.pop(key)
    elif kind == 2:
        value.insert(key, value[rng.choice(keys)])
    else:
        value[key] = _changed_value(value[key], rng)
    return value


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((0, 1, 1, 2, 8, 64)))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:start]
    new = (rng.randbytes(end - start), rng.choice(PIECES), data[start:end] * 2)[kind - 1]
    return data[:start] + new + data[end:]


def _pools() -> dict[str, Pool]:
    texts = [f"{name} {i}" for name in "abcdef" for i in range(4)]
    return load_pools(Dataset.from_dict({"text": texts, "label": [text[0] for text in texts]}))


def _settings(folder: Path) -> Target:
    path = folder / CONFIG_NAME
    seeds = []
    for config in (FewShotConfig(), FewShotConfig(adapter="lora", use_label_names=True, learner_kwargs={"a": [1]})):
        write_manifest(folder, config, AdapterInfo(label_names=["a", "b"], datasets=["x"], command="fewshot-nlp --n 1"))
        seeds.append(path.read_bytes())

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_manifest(folder)

    return Target(seeds, read)


def _episodes(folder: Path) -> Target:
    pools = _pools()
    path = folder / "episodes.jsonl"
    sampler = EpisodeSampler(pools["train"], n_way=2, k_shot=1, n_query=2, num_episodes=3)
    save_episodes(path, sampler)

    def read(data: bytes) -> None:
        path.write_bytes(_hashed(data, pools) if len(data) % 4 else data)
        load_episodes(path, pools if len(data) % 2 else None)

    return Target([path.read_bytes()], read)


def _hashed(data: bytes, pools: Any) -> bytes:
    """``data`` with the hash and the number that its episodes have, where they are episodes."""
    first, *rest = data.split(b"\n")
    try:
        header = json.loads(first)
        specs = [spec_from_dict(json.loads(line)) for line in rest if line]
        header |= {"hash": episodes_hash(specs, pools, header["settings"]), "num_episodes": len(specs)}
        return b"\n".join([json.dumps(header).encode(), *rest])
    except (ValueError, TypeError, KeyError, RecursionError):
        return data


def _checkpoint(name: str, output_dir: Path) -> Target:
    tensors = {"head.w": torch.ones(2)}
    progress = {"scheduler": {"last_epoch": 1}, "run": {"seed": 0}, "callbacks": {}}
    whole = checkpoint.Checkpoint(
        tensors, {"exp_avg.head.w": torch.ones(2)}, {"global_step": 1, "log_history": []}, progress
    )
    folder = checkpoint.write_checkpoint(output_dir, 1, whole)
    manifest = json.loads((folder / checkpoint.MANIFEST).read_bytes())

    def read(data: bytes) -> None:
        (folder / name).write_bytes(data)
        if name != checkpoint.MANIFEST:
            manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))
        checkpoint.read_checkpoint(folder)

    return Target([(folder / name).read_bytes()], read)


def _peft(folder: Path) -> Target:
    path = folder / ADAPTER_CONFIG
    lora = {"peft_type": "LORA", "task_type": "FEATURE_EXTRACTION", "r": 8, "target_modules": ["query", "value"]}
    prompt = {"peft_type": "PROMPT_TUNING", "task_type": "FEATURE_EXTRACTION", "num_virtual_tokens": 8}

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_peft_config(folder)

    return Target([json.dumps(each | {"revision": None}).encode() for each in (lora, prompt)], read)


def _tensors(folder: Path) -> Target:
    path = folder / PARAMS_NAME

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_floats(read_tensors(path, "it holds the head"), str(path))

    return Target([save({"head.scale": torch.ones(()), "head.w": torch.ones(2, 3)})], read)


def _results(folder: Path) -> Target:
    path, config = folder / RESULTS_NAME, FewShotConfig()
    entry = {"accuracy": 0.5, "ci95": 0.1, "episodes": 9, "paired_gain": {"mean": 0.1, "ci95": 0.1}}
    entry["baselines"] = {"prototypes": {"accuracy": 0.4, "ci95": 0.1}}
    protocol = {
        "dataset": "x",
        "hub_id": "me/x",
        "split": "test",
        "n_way": 5,
        "classes": ["a"],
        "episodes_hash": {"1": "f"},
    }

    def read(data: bytes) -> None:
        path.write_bytes(data)
        write_manifest(folder, config, AdapterInfo())
        try:
            _, info = read_manifest(folder)
        finally:
            path.unlink()
        model_card(config, info)

    return Target([json.dumps({"test": {"1-shot": entry}, "protocol": protocol}).encode()], read)


def _splits(folder: Path) -> Target:
    pools = _pools()
    path, classes = folder / "split.json", [name for pool in pools.values() for name in pool.label_names]

    def read(data: bytes) -> None:
        path.write_bytes(data)
        check_splits(read_split_file(path), classes)

    return Target([json.dumps({split: pool.label_names for split, pool in pools.items()}).encode()], read)


def _yaml(folder: Path) -> Target:
    path = folder / "settings.yaml"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        read_yaml(path)

    return Target(
        [b"# A run\nlearner: maml\nlearning_rate: 1.0e-3\neval_k_shots: [1, 5]\nlearner_kwargs:\n  slots: 4\n"], read
    )


def tried(target: Target, data: bytes) -> tuple[bool, str | None]:
    """Whether the loader refused ``data`` with a message, and a traceback where it neither did nor read it."""
    try:
        target.read(data)
    except ValueError as error:
        return True, None if str(error) else traceback.format_exc()
    except Exception:
        return False, traceback.format_exc()
    return False, None


#: Each makes its target, with its files in a folder of its own.
TARGETS: dict[str, Callable[[Path], Target]] = {
    CONFIG_NAME: _settings,
    "episode files": _episodes,
    "checkpoint manifests": partial(_checkpoint, checkpoint.MANIFEST),
    "checkpoint states": partial(_checkpoint, checkpoint.STATE),
    "checkpoint tensors": partial(_checkpoint, checkpoint.PARAMS),
    ADAPTER_CONFIG: _peft,
    PARAMS_NAME: _tensors,
    RESULTS_NAME: _results,
    "split files": _splits,
    "settings in YAML": _yaml,
}
