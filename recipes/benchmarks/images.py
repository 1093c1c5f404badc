"""EfficientNet-Lite0 on CIFAR-FS, 5-way 1- and 5-shot: LoRA on its last block, learned as a prototypical network,
beside the frozen backbone; one table.

    pip install -e ".[vision]"
    python data_scripts/cifar_fs.py --data_dir ../shared/data/cifar100
    python recipes/benchmarks/images.py

The splits are those of Bertinetto et al., ICLR 2019 (arXiv:1805.08136). Images of 32×32 are made 224×224, the size of
pre-training, by Pillow's bilinear filter: smaller is cheaper and worse (validation classes, frozen prototypes, 5-way
1-shot: 59 % at 96, 61 % at 128, 64 % at 160, 65 % at 224). One image is in a class of train and in one of test:
training does without it. Accuracy on test classes in percent with its 95 % interval over 600 episodes of 15 queries a
class, and the paired gain over the frozen prototypes on the same episodes. Inductive: batch norms keep the statistics
of pre-training. Most of the time goes to the blocks below the trained one, which every image passes once. Runs that
are already in --output_dir are read, not repeated. Further settings go to all runs.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from runs import Table, add, measured, print_table

from fewshot_nlp.data.cache import cache_root

COMMON = (
    "--model_name_or_path efficientnet_lite0 --adapter lora --lora_layers_to_transform 15 --eval_n_way 5 "
    "--eval_n_query 15 --test_episodes 600 --baseline_episodes 0 --eval_strategy no --save_strategy no "
    "--load_best_model_at_end false --logging_steps 5 --disable_tqdm true --cpu_threads 1 --duplicates drop"
)
#: Settings of each method, chosen on validation classes.
METHODS = {
    "lora_protonet": (
        "--learner protonet --head prototype --learning_rate 1e-3 --n_way 10 --k_shot 5 --n_query 5 "
        "--meta_batch_size 1 --max_steps 40 --warmup_steps 10 --lr_scheduler_type cosine"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", default=str(cache_root() / "cifar_fs"), help="what data_scripts wrote")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output_dir", type=Path, default=Path("output/images"))
    chosen, extra = parser.parse_known_args()
    if not Path(chosen.dataset_name).is_dir():
        raise SystemExit(f"error: {chosen.dataset_name} does not exist. Run data_scripts/cifar_fs.py first.")

    table: Table = {}
    for method in chosen.methods:
        arguments = [*shlex.split(COMMON), *shlex.split(METHODS[method]), "--dataset_name", chosen.dataset_name, *extra]
        add(table, method, measured(None, arguments, chosen.output_dir / method))
        print_table(table)


if __name__ == "__main__":
    main()
