"""Files of strangers, changed at random a million times, through the code that reads them.

    pip install atheris   # where it has a wheel; without it the same changes are made without a look at what they reach
    python recipes/benchmarks/fuzz.py --executions 1000000

A target is a loader and files that it should read (`fuzz_targets.py`). Bytes of these are flipped, cut, doubled and
replaced; JSON is taken apart, and its values swapped, dropped, nested and replaced by what programs trip over. Where a
file carries a hash of itself, most changes are followed by a new hash, so that what lies behind the check is reached.
A loader survives where it reads the file or raises `ValueError` with a message. Anything else is printed with the
input, which is kept in `--keep`; the exit status is then 1. Prints a table of what was tried.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Of all executions, in this order: target and share.
SHARES = {
    "fewshot_config.json": 0.25, "episode files": 0.25, "checkpoint manifests": 0.25, "checkpoint states": 0.06,
    "checkpoint tensors": 0.05, "adapter_config.json": 0.05, "fewshot_params.safetensors": 0.05, "results.json": 0.01,
    "split files": 0.02, "settings in YAML": 0.01,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--executions", type=int, default=1_000_000, help="Over all targets, or of --target.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("output/fuzz"), help="Where inputs that did harm are kept.")
    parser.add_argument("--target", choices=SHARES, help="One target alone, in this process.")
    parser.add_argument("--plain", action="store_true", help="Without atheris, also where it is installed.")
    args = parser.parse_args()
    guided = not args.plain and importlib.util.find_spec("atheris") is not None
    if args.target is not None:
        run(args.target, args.executions, args.seed, args.keep, guided)
        return
    rows = []
    for name, share in SHARES.items():
        count = max(1, round(share * args.executions))
        command = [sys.executable, __file__, "--target", name, "--executions", str(count), "--seed", str(args.seed)]
        answer = subprocess.run(
            [*command, "--keep", str(args.keep), *["--plain"] * (not guided)], stdout=subprocess.PIPE, text=True
        )
        try:
            rows.append(json.loads(answer.stdout.splitlines()[-1]))
        except (IndexError, ValueError):
            # The process itself died, or one input took longer than the limit.
            rows.append({"target": name, "executions": 0, "refused": 0, "unhandled": 1, "slowest": 0.0, "seconds": 0.0})
        print(f"{name}: {rows[-1]['executions']:,} executions", file=sys.stderr, flush=True)
    show(rows, "guided by coverage (atheris)" if guided else "unguided")
    sys.exit(any(row["unhandled"] for row in rows))


def show(rows: list[dict[str, Any]], how: str) -> None:
    """Print the table."""
    total = {key: sum(row[key] for row in rows) for key in ("executions", "refused", "unhandled", "seconds")}
    total |= {"target": f"all, {how}", "slowest": max(row["slowest"] for row in rows)}
    print("| file | executions | read | refused with a message | unhandled | slowest, ms | seconds |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in (*rows, total):
        read = row["executions"] - row["refused"] - row["unhandled"]
        print(
            f"| {row['target']} | {row['executions']:,} | {read:,} | {row['refused']:,} | {row['unhandled']:,} "
            f"| {1000 * row['slowest']:.0f} | {row['seconds']:.0f} |"
        )


def run(name: str, executions: int, seed: int, keep: Path, guided: bool) -> None:
    """One target in this process; its row is printed as JSON."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        if guided:
            import atheris

            with atheris.instrument_imports(include=["fewshot_nlp"]):
                import fuzz_targets
        else:
            import fuzz_targets
        folder, corpus = Path(scratch, "files"), Path(scratch, "corpus")
        folder.mkdir()
        corpus.mkdir()
        target = fuzz_targets.TARGETS[name](folder)
        row: dict[str, Any] = {"target": name, "executions": 0, "refused": 0, "unhandled": 0, "slowest": 0.0}
        started = time.perf_counter()

        def once(data: bytes) -> None:
            begun = time.perf_counter()
            refused, trace = fuzz_targets.tried(target, data)
            row["slowest"] = max(row["slowest"], time.perf_counter() - begun)
            row["executions"] += 1
            row["refused"] += refused
            if trace is not None:
                row["unhandled"] += 1
                keep.mkdir(parents=True, exist_ok=True)
                file = keep / f"{name.replace(' ', '_')}-{hashlib.sha256(data).hexdigest()[:12]}"
                file.write_bytes(data)
                print(f"{file}\n{trace}", file=sys.stderr, flush=True)

        def last() -> None:
            print(json.dumps({**row, "seconds": time.perf_counter() - started}), flush=True)

        if not guided:
            unguided(target.seeds, once, executions, seed, fuzz_targets.changed)
            last()
            return

        def once_of_many(data: bytes) -> None:
            once(data)
            if row["executions"] == executions:
                last()
                # libFuzzer would never return, and leaves nothing to clean up after itself.
                shutil.rmtree(scratch, ignore_errors=True)
                os._exit(0)

        for i, file in enumerate(target.seeds):
            (corpus / str(i)).write_bytes(file)
        keep.mkdir(parents=True, exist_ok=True)
        options = {
            "seed": seed + 1,
            "timeout": 20,
            "rss_limit_mb": 0,
            "max_len": 1 << 16,
            "len_control": 0,
            "verbosity": 0,
        }
        argv = [
            sys.argv[0],
            *(f"-{key}={value}" for key, value in options.items()),
            f"-artifact_prefix={keep}/",
            str(corpus),
        ]
        atheris.Setup(
            argv,
            once_of_many,
            custom_mutator=lambda data, size, seed: fuzz_targets.changed(data, random.Random(seed))[:size],
        )
        atheris.Fuzz()


def unguided(
    seeds: list[bytes],
    once: Callable[[bytes], None],
    executions: int,
    seed: int,
    changed: Callable[[bytes, random.Random], bytes],
) -> None:
    """Chains of changes, each from one of the files or from what was last tried."""
    rng = random.Random(seed)
    data = seeds[0]
    for i in range(executions):
        data = seeds[i] if i < len(seeds) else changed(data if rng.random() < 0.6 else rng.choice(seeds), rng)
        once(data)


if __name__ == "__main__":
    main()
