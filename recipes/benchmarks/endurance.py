"""Long runs: does memory grow, or the time an episode takes? Ten thousand episodes of training and of evaluation.

    python recipes/benchmarks/endurance.py
    python recipes/benchmarks/endurance.py --episodes 1000 --recipes protonet

Prompt-MAML, LoRA-Reptile and prototypes with LoRA on the top layer, whose lower layer is kept from text to text, on a
small random BERT; 3-way tasks of home_intents, a log line every ten steps. Memory is what the process holds (resident
set), read at each tenth of the episodes; its slope is that of the straight line through the last nine tenths, as the
first fills caches that are bounded. An evaluation keeps its answers, some 0.5 MB for 1,000 episodes of 9 queries.
Prints a table: MB per 1,000 episodes, and milliseconds of processor time an episode by tenths, which do not count what
other programs took.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from small import RECIPES, SHORT, make_empty, small_backbone

from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.train import prepare
from fewshot_nlp.functional.memory import resident

METHODS = ("prompt_maml", "lora_reptile", "protonet")
PARTS = 10


class Watch:
    """A reader that notes memory and time at each tenth of ``episodes``; all else is the reader's own."""

    def __init__(self, reader: Any, episodes: int) -> None:
        self._reader, self._part, self._count = reader, episodes // PARTS, 0
        self.notes = [(time.process_time(), resident())]

    def __call__(self, spec: Any) -> Any:
        episode = self._reader(spec)
        self._count += 1
        if self._count % self._part == 0:
            self.notes.append((time.process_time(), resident()))
        return episode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def row(self) -> str:
        times, memory = np.array(self.notes).T
        episodes = self._part * np.arange(1, PARTS + 1)
        slope = np.polyfit(episodes, memory[1:] / 2**20, 1)[0] * 1000
        each = 1000 * np.diff(times) / self._part
        return f"{slope:+.2f} | {memory[-1] / 2**20:.0f} | {' '.join(f'{ms:.1f}' for ms in each)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--recipes", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--output_dir", type=Path, default=Path("output/endurance"))
    chosen = parser.parse_args()
    make_empty(chosen.output_dir, "endurance")
    backbone = small_backbone(chosen.output_dir / "backbone")
    titles = ("method", "", "MB per 1,000 episodes", "MB at the end", "processor ms an episode, by tenths")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name in chosen.recipes:
        arguments = [*SHORT, "--model_name_or_path", str(backbone), "--output_dir", str(chosen.output_dir / name)]
        arguments += ["--max_steps", str(chosen.episodes // 2), "--save_steps", str(chosen.episodes // PARTS)]
        arguments += ["--eval_strategy", "no", "--load_best_model_at_end", "false", "--logging_steps", "10"]
        top = ["--lora_layers_to_transform", "1"] if name == "protonet" else []
        run = prepare(parse([*arguments, *top], RECIPES / f"{name}.yaml"))
        reader = run.trainer.reader
        watch = run.trainer.reader = Watch(reader, chosen.episodes)
        run.trainer.train()
        print(f"| {name} | training | {watch.row()} |", flush=True)
        shots, sampler = next(iter(run.test.items()))
        specs = [sampler[i] for i in range(chosen.episodes)]
        watch = run.trainer.reader = Watch(reader, chosen.episodes)
        run.trainer.evaluate_on(specs)
        print(f"| {name} | evaluation, {shots} | {watch.row()} |", flush=True)


if __name__ == "__main__":
    main()
