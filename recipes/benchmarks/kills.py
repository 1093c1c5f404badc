"""Kill runs with SIGKILL at random moments and start them again: each must end as the run that was never stopped.

    python recipes/benchmarks/kills.py
    python recipes/benchmarks/kills.py --kills 5 --recipes protonet

Runs of 12 steps of prompt-MAML, LoRA-Reptile and prototypes on a small random BERT, with a checkpoint every second
step, each in a process of its own that does what `fewshot-nlp RECIPE --resume_from_checkpoint auto` does, and is
forked from one that has done the imports. A third of the kills come at a moment drawn evenly from the length of a run,
a third while a checkpoint is being written and a third right after one: these wait until the folder
.checkpoint-<step>.partial, or checkpoint-<step>, is seen from outside. Before it dies each process is made to write
down where it is, by faulthandler, and that is what the table counts. One in four runs that went on is killed again.

Compared with the run that was never stopped, to the byte: parameters and optimiser of the last checkpoint, the saved
adapter, the picture of the learning curve; and, but for the clock, results.json, the state of the trainer and the
reports in metrics.jsonl. Prints a table of survivals by place, and every difference; exits with 1 if there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from small import RECIPES, SHORT, make_empty, small_backbone

from fewshot_nlp.cli.train import main as train
from fewshot_nlp.training.checkpoint import PARTIAL, list_checkpoints
from fewshot_nlp.training.metrics_log import read_reports

METHODS = ("prompt_maml", "lora_reptile", "protonet")
WAYS = ("at any moment", "while a checkpoint is written", "right after a checkpoint")
CLOCKS = ("seconds", "runtime", "per_second")
#: Where a process was, from the functions that it was in; the first that is found counts.
PLACES = {
    "writing a checkpoint": ("write_checkpoint",),
    "deleting a checkpoint": ("prune_checkpoints", "clear_checkpoints"),
    "writing a report": ("append_report",),
    "reading a checkpoint": ("restore", "load_best", "check_resumable"),
    "validation": ("_validate",),
    "a training step": ("_train_step",),
    "the test": ("_test",),
    "saving the adapter": ("save_pretrained", "_draw"),
    "elsewhere in training": ("_train",),
    "before training": ("prepare", "parse"),
    "elsewhere": ("main",),
}


class Victim:
    """A run in a process of its own."""

    def __init__(self, arguments: list[str], recipe: Path, folder: Path) -> None:
        self.folder, self.trace = folder, folder.with_suffix(".trace")
        self.trace.write_bytes(b"")
        self.pid = os.fork()
        if self.pid == 0:
            self._live(arguments, recipe)

    def _live(self, arguments: list[str], recipe: Path) -> None:
        with self.folder.with_suffix(".log").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        code = 1
        try:
            faulthandler.register(signal.SIGUSR1, self.trace.open("ab", buffering=0), all_threads=False)
            train([*arguments, "--output_dir", str(self.folder)], recipe)
            code = 0
        except SystemExit as error:
            print(error, flush=True)
        finally:
            os._exit(code)

    def alive(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait_for(self, appears: str, count: int) -> bool:
        """Until ``count`` folders that match ``appears`` have come up; ``False`` if the process ends before."""
        seen: set[str] = set()
        while self.alive():
            seen |= {path.name for path in self.folder.glob(appears)}
            if len(seen) >= count:
                return True
            time.sleep(0.0002)
        return False

    def kill(self) -> str | None:
        """Where the process was, and ``None`` where it had come to its end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 1
        # It goes no further until all of it is written.
        while self.alive() and not self._stack().endswith(("<module>", "...")) and time.monotonic() < deadline:
            time.sleep(0.0001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        if self.wait() != -signal.SIGKILL:
            return None
        functions = {line.rpartition(" in ")[2] for line in self._stack().splitlines()}
        return next((place for place, names in PLACES.items() if functions & set(names)), "elsewhere")

    def _stack(self) -> str:
        return self.trace.read_text().strip()


def without_clock(value: Any) -> Any:
    """``value`` without the entries that hold seconds."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if not any(clock in k for clock in CLOCKS)}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


def ending(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, by name; files as their bytes."""
    left: dict[str, Any] = {"folders": [path.name for path in list_checkpoints(folder)]}
    last = list_checkpoints(folder)[-1]
    for path in (last / "params.safetensors", last / "optimizer.safetensors", *folder.glob("*.safetensors")):
        left[path.name] = path.read_bytes()
    left["learning_curve.png"] = (folder / "learning_curve.png").read_bytes()
    for path in (last / "trainer_state.json", last / "progress.json", folder / "results.json"):
        # Where the run was saved is another folder in each trial.
        left[path.name] = without_clock(json.loads(path.read_text().replace(str(folder), "FOLDER")))
    left["metrics.jsonl"] = without_clock(read_reports(folder))
    return left


def strike(victim: Victim, way: str, length: float, rng: random.Random) -> str | None:
    if way == WAYS[0]:
        time.sleep(rng.random() * length)
    elif victim.wait_for(f".checkpoint-*{PARTIAL}" if way == WAYS[1] else "checkpoint-*", 1 + int(rng.random() * 6)):
        time.sleep(rng.random() * 0.02)
    return victim.kill()


def trials(
    name: str, kills: int, folder: Path, backbone: Path, rng: random.Random
) -> tuple[Counter, Counter, list[str]]:
    """Kill ``kills`` times; kills and survivals by place, and what differed."""
    arguments = [*SHORT, "--model_name_or_path", str(backbone), "--resume_from_checkpoint", "auto"]
    recipe = RECIPES / f"{name}.yaml"
    started = time.monotonic()
    if Victim(arguments, recipe, folder / "whole").wait():
        raise SystemExit(f"error: the run itself fails; see {folder / 'whole.log'}.")
    length, expected = time.monotonic() - started, ending(folder / "whole")
    struck: Counter = Counter()
    survived: Counter = Counter()
    differences: list[str] = []
    halves = 0
    while struck.total() < kills:
        trial = folder / f"trial-{struck.total()}"
        places: list[str] = []
        while not places or (struck.total() + len(places) < kills and rng.random() < 0.25):
            victim = Victim(arguments, recipe, trial)
            place = strike(victim, WAYS[(struck.total() + len(places)) % 3], length, rng)
            if place is None:
                break
            places.append(place)
            halves += bool(list(trial.glob(f".checkpoint-*{PARTIAL}")))
        found: dict[str, Any] = {}
        if Victim(arguments, recipe, trial).wait():
            wrong = ["it does not go on"]
        else:
            found = ending(trial)
            wrong = [key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key)]
        left = [path.name for path in trial.glob(".*")] if found else []
        struck.update(places)
        if wrong or left:
            differences.append(f"{name}, killed at {', '.join(places)}: {', '.join([*wrong, *left])}; see {trial}")
        else:
            survived.update(places)
            shutil.rmtree(trial, ignore_errors=True)
    print(
        f"{name}: {struck.total()} kills of runs of {length:.1f} s; {halves} left a checkpoint half written", flush=True
    )
    return struck, survived, differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each method")
    parser.add_argument("--recipes", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("output/kills"))
    chosen = parser.parse_args()
    make_empty(chosen.output_dir, "kills")
    rows, wrong = [], []
    for name in chosen.recipes:
        (chosen.output_dir / name).mkdir()
        backbone = small_backbone(chosen.output_dir / "backbone")
        rng = random.Random(f"{chosen.seed}/{name}")
        struck, survived, differences = trials(name, chosen.kills, chosen.output_dir / name, backbone, rng)
        rows += [f"| {name} | {place} | {struck[place]} | {survived[place]} |" for place in PLACES if struck[place]]
        rows.append(f"| {name} | all | {struck.total()} | {survived.total()} |")
        wrong += differences
    print("\n".join(["| method | where it was killed | kills | survived |", "|---|---|---|---|", *rows, *wrong]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
