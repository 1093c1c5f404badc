"""What the benchmark scripts share: a run is measured once, and never passed off as one of other settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.train import execute, prepare

#: Entries of results.json by shot, one a run, by name of the method.
Table = dict[str, dict[str, list[dict]]]


def measured(recipe: Path | None, arguments: list[str], folder: Path) -> dict:
    """``test`` of the results of a run, from ``folder`` if they are there and were measured with these settings."""
    told, results = parse([*arguments, "--output_dir", str(folder)], recipe), folder / "results.json"
    # A setting that has come since had its default.
    once(told, settings_of(told), results, lambda: execute(prepare(told)), settings_of(parse([])))
    return json.loads(results.read_text(encoding="utf-8"))["test"]


def once(
    told: Any,
    known: dict[str, Any],
    results: Path,
    run: Callable[[], object],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """``run``, unless ``results`` were measured with the settings ``known`` before.

    Args:
        told: what the run is told; it is given leave to replace what a run left that was stopped.
        known: its settings, kept beside ``results``.
        results: the file that the run leaves.
        run: makes them.
        defaults: of settings that older results may not know.

    Raises:
        SystemExit: the results are of other settings, and may not be replaced.
    """
    folder, beside = results.parent, results.parent / "arguments.json"
    kept = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    before = {**(defaults or {}), **kept}
    changed = [f"{name}={value!r}" for name, value in known.items() if before.get(name) != value]
    if results.is_file() and changed and not told.args.overwrite_output_dir:
        raise SystemExit(
            f"error: {folder} was measured with other settings than {', '.join(changed[:5])}. Give another "
            f"--output_dir, or --overwrite_output_dir true to measure it again."
        )
    if changed or not results.is_file():
        # What a run left that was stopped before its results is in the way.
        told.args.overwrite_output_dir = True
        run()
        beside.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")


def joined(split_file: Path, path: Path) -> Path:
    """Write the split whose train classes are those of train and validation to ``path``."""
    lists = json.loads(split_file.read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps({"train": lists["train"] + lists["validation"], "test": lists["test"]}), encoding="utf-8"
    )
    return path


def settings_of(told: Any) -> dict[str, Any]:
    """Every setting of a run but the folder it writes to; of a stream, those of its runs."""
    found = asdict(told.config) | {"head_scale": told.config.logit_scale} | asdict(told.episodes) | told.args.to_dict()
    return {name: value for name, value in found.items() if "output_dir" not in name}


def add(table: Table, method: str, test: Mapping[str, dict], baselines: str | None = None) -> None:
    """Put the results of a run into ``table``, and those of its baselines under ``"<baselines>: <name>"``."""
    for shot, entry in test.items():
        table.setdefault(method, {}).setdefault(shot, []).append({**entry, "gain": entry["paired_gain"]})
        for name, baseline in entry["baselines"].items():
            label = name if baselines is None else f"{baselines}: {name}"
            # Without a name of their own, baselines are those of the first run: all are on the same episodes.
            if baselines is not None or len(table.get(label, {}).get(shot, [])) == 0:
                table.setdefault(label, {}).setdefault(shot, []).append(baseline)


def print_table(table: Table, columns: Sequence[tuple[str, str]] = ()) -> None:
    """Accuracy and paired gain over untrained prototypes by shot, means over runs; ``columns`` say more of all rows."""
    shots = list(next(iter(table.values())))
    titles = ["method", *(title for title, _ in columns)]
    print("\n| " + " | ".join(titles) + " | " + " | ".join(f"{shot} | gain over prototypes" for shot in shots) + " |")
    print("|---" * (len(titles) + 2 * len(shots)) + "|")
    for name, by_shot in table.items():
        cells = [name, *(text for _, text in columns)]
        for shot in shots:
            parts = by_shot.get(shot, [])
            cells.append(interval(mean(p["accuracy"] for p in parts), [p["ci95"] for p in parts]) if parts else "")
            gains = [part["gain"] for part in parts if part.get("gain")]
            cells.append(interval(mean(g["mean"] for g in gains), [g["ci95"] for g in gains]) if gains else "")
        print("| " + " | ".join(cells) + " |")


def interval(value: float, halves: list[float]) -> str:
    """``value`` in percent, with the half-width of a mean of independent runs."""
    half = sum(h * h for h in halves) ** 0.5 / len(halves)
    return f"{100 * value:.1f} ± {100 * half:.1f}"
