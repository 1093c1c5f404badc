"""Episode lists as files: what a result was measured on, to share and to replay.

A JSON line for the list, then one for each episode. The list's hash covers the settings, the data and the episodes,
so it changes when any of them does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from fewshot_nlp.data.encode import HasPools, pools_by_address
from fewshot_nlp.data.pool import Pool
from fewshot_nlp.types import EpisodeSpec

FORMAT = "fewshot_nlp episodes 1"

_HEADER_KEYS = {"format", "settings", "pools", "num_episodes", "hash"}


def save_episodes(
    path: str | Path,
    specs: Iterable[EpisodeSpec],
    pools: Pool | HasPools | Mapping[str, Pool] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Write ``specs`` to ``path`` and return their hash.

    Args:
        path: a ``.jsonl`` file, replaced if it is there.
        specs: a sampler or mixture of finite length, or any episodes.
        pools: the pools that the rows are of; not needed for a sampler or mixture.
        settings: what made the episodes; a sampler's own if not given.

    Raises:
        ValueError: endless, no episodes, or no pools to go with them.
        OSError: the path cannot be written.
    """
    pools, settings = _context(specs, pools, settings)
    specs = list(specs)
    if not specs:
        raise ValueError("There are no episodes to save.")
    found = episodes_hash(specs, pools, settings)
    header = {
        "format": FORMAT,
        "settings": settings,
        "pools": _fingerprints(specs, pools),
        "num_episodes": len(specs),
        "hash": found,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            for line in (header, *map(asdict, specs)):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return found


def load_episodes(path: str | Path, pools: Pool | HasPools | Mapping[str, Pool] | None = None) -> list[EpisodeSpec]:
    """The episodes in a file of ``save_episodes``.

    Args:
        path: the file.
        pools: data to replay them on. If given, it must be the data they were drawn from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is malformed, the hash does not fit, or the data is not the same.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The episode list {str(path)!r} does not exist. Write one with save_episodes.")
    header: dict[str, Any] = {}
    specs: list[EpisodeSpec] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                content = json.loads(line.decode("utf-8"))
                if number == 1:
                    header = _checked_header(content)
                else:
                    specs.append(spec_from_dict(content))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not header:
        raise ValueError(f"{path} is empty. Write an episode list with save_episodes.")
    if header["num_episodes"] != len(specs):
        raise ValueError(f"{path} holds {len(specs)} of {header['num_episodes']} episodes. Fetch the file again.")
    found = _hash(header["settings"], header["pools"], specs)
    if found != header["hash"]:
        raise ValueError(
            f"{path} has been changed: its content hashes to {found}, its first line says {header['hash']!r}. "
            f"Fetch the file again, or save the episodes anew."
        )
    missing = {f"{spec.pool}/{spec.split}" for spec in specs} - header["pools"].keys()
    if missing:
        raise ValueError(f"{path} has episodes of {sorted(missing)}, which its first line does not list.")
    if pools is not None:
        _check_data(path, header["pools"], specs, pools)
    return specs


def episodes_hash(
    specs: Iterable[EpisodeSpec],
    pools: Pool | HasPools | Mapping[str, Pool] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Hash of the episodes, the settings and the data that they are of. Arguments as for ``save_episodes``."""
    pools, settings = _context(specs, pools, settings)
    specs = list(specs)
    return _hash(settings, _fingerprints(specs, pools), specs)


def spec_from_dict(content: Any) -> EpisodeSpec:
    """An ``EpisodeSpec`` from what ``dataclasses.asdict`` and JSON make of one.

    Raises:
        ValueError: anything else, or an episode that contradicts itself.
    """
    names = {f.name for f in fields(EpisodeSpec)}
    if not isinstance(content, dict) or content.keys() != names:
        raise ValueError(f"an episode must be an object with the keys {sorted(names)}")
    for name in ("split", "pool"):
        if not isinstance(content[name], str):
            raise ValueError(f"{name}={content[name]!r} must be text")
    index = content["index"]
    if type(index) is not int or index < 0:
        raise ValueError(f"index={index!r} must be an int of at least 0")
    classes = content["classes"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("classes must be a list of class names")
    if len(set(classes)) != len(classes):
        raise ValueError("a class is listed twice")
    rows: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name in ("support", "query"):
        if not isinstance(content[name], list) or len(content[name]) != len(classes):
            raise ValueError(f"{name} must hold one list of rows for each of the {len(classes)} classes")
        rows[name] = tuple(_rows(name, part) for part in content[name])
    # Without any, a task is told by the names of its classes alone.
    if any(rows["support"]) and not all(rows["support"]):
        raise ValueError("a class has no support example")
    out_of_scope = _rows("out_of_scope", content["out_of_scope"])
    every = [row for part in (*rows["support"], *rows["query"], out_of_scope) for row in part]
    if len(set(every)) != len(every):
        raise ValueError("a row is used twice")
    return EpisodeSpec(
        split=content["split"],
        index=index,
        pool=content["pool"],
        classes=tuple(classes),
        support=rows["support"],
        query=rows["query"],
        out_of_scope=out_of_scope,
    )


def _rows(name: str, part: Any) -> tuple[int, ...]:
    if not isinstance(part, list) or not all(type(row) is int and row >= 0 for row in part):
        raise ValueError(f"{name} must hold lists of row numbers from 0 on")
    return tuple(part)


def _context(
    specs: Iterable[EpisodeSpec],
    pools: Pool | HasPools | Mapping[str, Pool] | None,
    settings: Mapping[str, Any] | None,
) -> tuple[Pool | HasPools | Mapping[str, Pool], dict[str, Any]]:
    """Pools and settings, those of a sampler where they are not given."""
    if hasattr(specs, "num_episodes") and specs.num_episodes is None:
        raise ValueError("The sampler is endless. Set num_episodes, or give a list of episodes.")
    pools = getattr(specs, "pools", None) if pools is None else pools
    if pools is None:
        raise ValueError("Which data are these episodes of? Give pools, or a sampler in place of a list.")
    return pools, dict(getattr(specs, "settings", {}) if settings is None else settings)


def _fingerprints(specs: list[EpisodeSpec], pools: Pool | HasPools | Mapping[str, Pool]) -> dict[str, str]:
    known = pools_by_address(pools)
    used = dict.fromkeys((spec.pool, spec.split) for spec in specs)
    unknown = [address for address in used if address not in known]
    if unknown:
        raise ValueError(f"There are episodes of {'/'.join(unknown[0])}, which is not among the pools. Give that too.")
    return {"/".join(address): known[address].fingerprint for address in used}


def _hash(settings: Mapping[str, Any], fingerprints: Mapping[str, str], specs: list[EpisodeSpec]) -> str:
    digest = hashlib.sha256(json.dumps([settings, fingerprints], sort_keys=True).encode())
    for spec in specs:
        digest.update(json.dumps(asdict(spec), sort_keys=True).encode())
    return digest.hexdigest()


def _checked_header(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"not an episode list: the first line must say {FORMAT!r}")
    if content.keys() != _HEADER_KEYS:
        raise ValueError(f"the first line must hold the keys {sorted(_HEADER_KEYS)}")
    for name in ("settings", "pools"):
        if not isinstance(content[name], dict):
            raise ValueError(f"{name} must be an object")
    return content


def _check_data(
    path: Path,
    fingerprints: Mapping[str, Any],
    specs: list[EpisodeSpec],
    pools: Pool | HasPools | Mapping[str, Pool],
) -> None:
    """Raise unless the pools hold the data that the list was drawn from."""
    found = _fingerprints(specs, pools)
    for address, fingerprint in found.items():
        if fingerprint != fingerprints[address]:
            raise ValueError(
                f"{path} was drawn from other data: {address} has the fingerprint {fingerprint}, the list has "
                f"{fingerprints[address]}. Load the same data with the same splits, or save the episodes anew."
            )
    known = pools_by_address(pools)
    for spec in specs:
        pool = known[spec.pool, spec.split]
        for name, support, query in zip(spec.classes, spec.support, spec.query, strict=True):
            if not {*support, *query} <= set(pool.rows_by_class.get(name, ())):
                raise ValueError(f"{path}: the episode {spec.address} has rows that are not of its class {name!r}.")
