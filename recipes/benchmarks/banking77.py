"""BANKING77, 5-way 1- and 5-shot, 600 test episodes of 5 queries a class, the protocol and splits of ProtAugment.

    python recipes/benchmarks/banking77.py --data_dir ../shared/data/banking77
    python recipes/benchmarks/banking77.py --data_dir ../shared/data/banking77 --methods full_anil --splits 1 2 3 4 5

The folder holds data.jsonl ({"text", "label"} a line) and split_1.json to split_5.json. Trains each method on the train
classes of each split, picks its checkpoint on validation classes, tests on test classes, and prints one table: accuracy
in percent with its 95 % interval over episodes, the paired gain over untrained prototypes on the same episodes, and for
several splits their mean. Methods that end in _trainval train on the validation classes too, with settings chosen
before; those with _names are given the names of the classes as support examples, and so are their baselines. Runs that
are already in --output_dir are read, not repeated; those of other settings are an error, unless --overwrite_output_dir
true has them measured again. Settings were chosen on validation classes.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from runs import Table, add, joined, measured, print_table

RECIPES = Path(__file__).parents[1]
COMMON = "--max_length 48 --eval_on_start true --disable_tqdm true --eval_n_way 5"
TASK_STEPS = "--max_steps 45 --eval_steps 15 --eval_episodes 30"
#: All train classes at once: every step tells each of them from all the others.
WIDE = (
    "--n_way 25 --n_query 4 --max_k_shot none --meta_batch_size 1 --max_steps 60 --eval_steps 20 --eval_episodes 300 "
    "--baseline_episodes 0"
)
HEAD_STEPS = "--learner anil --head linear --inner_steps 20 --head_learning_rate 0.2"
#: Once settings are chosen, the validation classes may be trained on as well (as Rusu et al., LEO, do). There are twice
#: the classes, each of them in half of the tasks; the last step is what is tested.
TRAINVAL = "--max_steps 100 --eval_strategy no --eval_on_start false --save_strategy no --load_best_model_at_end false"
#: The name of each class is one more support example, for the learner and the baselines alike.
NAMES = "--use_label_names true"
#: Recipe and settings of each method.
METHODS = {
    "prompt_maml": (
        "prompt_maml",
        f"{TASK_STEPS} --inner_steps 1 --max_k_shot 3 --baseline_episodes 30 "
        "--prompt_tuning_init_text 'what does the customer want'",
    ),
    "lora_maml": ("lora_maml", f"{TASK_STEPS} --inner_steps 1 --max_k_shot 3 --baseline_episodes 30"),
    "lora_reptile": (
        "lora_reptile",
        f"{TASK_STEPS} --n_way 25 --k_shot 10 --n_query 1 --meta_batch_size 1 --inner_steps 5 "
        "--inner_learning_rate 5e-4 --optim sgd --learning_rate 1.0 --max_grad_norm 0 --baseline_episodes 0 "
        "--eval_episodes 100 --lora_layers_to_transform 4 5 --lora_target_modules query key value dense",
    ),
    "lora_protonet": ("protonet", f"{WIDE} --learning_rate 5e-4 --lora_target_modules query key value dense"),
    "full_protonet": ("protonet", f"{WIDE} --learning_rate 4e-5 --adapter full"),
    "full_anil": ("protonet", f"{WIDE} --learning_rate 4e-5 --adapter full {HEAD_STEPS}"),
    "full_anil_trainval": ("protonet", f"{WIDE} --learning_rate 4e-5 --adapter full {HEAD_STEPS} {TRAINVAL}"),
    "full_anil_names": ("protonet", f"{WIDE} --learning_rate 4e-5 --adapter full {HEAD_STEPS} {NAMES}"),
    "full_anil_names_trainval": (
        "protonet",
        f"{WIDE} --learning_rate 4e-5 --adapter full {HEAD_STEPS} {NAMES} {TRAINVAL}",
    ),
}


def run(method: str, split: int, data_dir: Path, folder: Path, extra: list[str]) -> dict:
    """Results of one method on one split."""
    recipe, settings = METHODS[method]
    arguments = [*shlex.split(COMMON), *shlex.split(settings), *extra]
    arguments += ["--dataset_name", str(data_dir / "data.jsonl")]
    split_file = data_dir / f"split_{split}.json"
    if method.endswith("_trainval"):
        split_file = joined(split_file, folder.parent / f"split_{split}_trainval.json")
    return measured(RECIPES / f"{recipe}.yaml", [*arguments, "--split_file", str(split_file)], folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--splits", nargs="+", type=int, default=[1])
    parser.add_argument("--output_dir", type=Path, default=Path("output/banking77"))
    chosen, extra = parser.parse_known_args()

    table: Table = {}
    for method in chosen.methods:
        for split in chosen.splits:
            folder = chosen.output_dir / f"{method}_{split}"
            add(table, method, run(method, split, chosen.data_dir, folder, extra), baselines=method)
    print_table(table, [("splits", ", ".join(map(str, chosen.splits)))])


if __name__ == "__main__":
    main()
