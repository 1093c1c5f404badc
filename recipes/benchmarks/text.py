"""Every learner on a set of texts, one table: BANKING77 or HuffPost, with their published class splits.

    python recipes/benchmarks/text.py --data_dir ../shared/data/banking77
    python recipes/benchmarks/text.py --data_dir ../shared/data/huffpost --eval_n_query 25 --test_episodes 1000

The folder holds data.jsonl ({"text", "label"} a line) and split_1.json. Each learner has the settings of
recipes/learners/, LoRA on all linear maps of the top one of six layers, and 60 steps, so that methods compare and each
takes some minutes of one thread; none was tuned for the best figure. Prints accuracy on test classes in percent with
its 95 % interval over episodes, and the paired gain over untrained prototypes on the same episodes. Runs that are
already in --output_dir are read, not repeated. Further settings go to all runs.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from runs import Table, add, measured, print_table

RECIPES = Path(__file__).parents[1]
LEARNERS = sorted(path.stem for path in (RECIPES / "learners").glob("*.yaml"))
COMMON = (
    "--eval_n_way 5 --lora_layers_to_transform 5 --max_steps 60 --eval_steps 30 --eval_episodes 50 --disable_tqdm true "
    "--duplicates keep --cpu_threads 1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--split", type=int, default=1)
    parser.add_argument("--learners", nargs="+", choices=LEARNERS, default=LEARNERS)
    parser.add_argument("--output_dir", type=Path, default=Path("output/text"))
    chosen, extra = parser.parse_known_args()
    data = chosen.data_dir
    task = ["--dataset_name", str(data / "data.jsonl"), "--split_file", str(data / f"split_{chosen.split}.json")]

    table: Table = {}
    for name in chosen.learners:
        arguments = [*shlex.split(COMMON), *task, "--config", str(RECIPES / "learners" / f"{name}.yaml"), *extra]
        folder = chosen.output_dir / f"{data.name}_{chosen.split}" / name
        add(table, name, measured(RECIPES / "train.yaml", arguments, folder))
        print_table(table)


if __name__ == "__main__":
    main()
