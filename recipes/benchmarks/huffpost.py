"""HuffPost headlines, 5-way 1- and 5-shot, 1,000 test episodes of 25 queries a class, the protocol and classes of Bao
et al., ICLR 2020 (arXiv:1908.06039): 20 train, 5 validation and 16 test classes, all 900 headlines of each.

    python recipes/benchmarks/huffpost.py --data_dir ../shared/data/huffpost

The folder holds data.jsonl ({"text", "label"} a line) and split_1.json. Prints one table as banking77.py does. Each
method is there without and with the names of the classes, which count for three examples each, and the untrained
baselines of a row know as much as the row does. Inductive: every query is answered alone. Settings were chosen on
validation classes; methods that end in _trainval then train on those, too.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

from runs import Table, add, joined, measured, once, print_table, settings_of

from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.train import baselines_of, prepare, tested
from fewshot_nlp.hub import FewShotAdapter

RECIPES = Path(__file__).parents[1]
COMMON = (
    "--max_length 48 --eval_on_start true --disable_tqdm true --eval_n_way 5 --eval_n_query 25 --test_episodes 1000 "
    "--baseline_episodes 0"
)
#: All train classes at once: every step tells each of them from all the others.
WIDE = (
    "--adapter full --learning_rate 4e-5 --n_way 20 --n_query 4 --max_k_shot none --meta_batch_size 1 --max_steps 100 "
    "--eval_steps 50 --eval_episodes 600"
)
HEAD_STEPS = "--learner anil --head linear --inner_steps 20 --head_learning_rate 0.2"
#: With names there is less to learn, and it is learned sooner.
NAMES = "--use_label_names true --label_name_weight 3 --learning_rate 1e-4 --max_steps 60"
#: Training tasks of clusters within the classes, told by the names of these, too: there is more to learn.
CLUSTERS = (
    "--clusters_per_class 50 --use_label_names true --label_name_weight 3 --names_in_training_alone true "
    "--center_features true --whiten_features 0.05 --max_steps 600"
)
#: Once settings are chosen; the last step is what is tested.
TRAINVAL = (
    "--n_way 25 --n_query 3 --eval_strategy no --eval_on_start false --save_strategy no --load_best_model_at_end false"
)
#: Recipe and settings of each method.
METHODS = {
    "full_protonet": ("protonet", WIDE),
    "full_protonet_names": ("protonet", f"{WIDE} {NAMES}"),
    "full_anil": ("protonet", f"{WIDE} {HEAD_STEPS}"),
    "full_anil_names": ("protonet", f"{WIDE} {HEAD_STEPS} {NAMES}"),
    "full_clusters": ("protonet", f"{WIDE} {CLUSTERS}"),
    "full_anil_trainval": ("protonet", f"{WIDE} {HEAD_STEPS} {TRAINVAL}"),
    "full_clusters_trainval": ("protonet", f"{WIDE} {CLUSTERS} {TRAINVAL}"),
    "full_anil_names_trainval": ("protonet", f"{WIDE} {HEAD_STEPS} {NAMES} {TRAINVAL}"),
}
#: What another method has trained, answering otherwise: by squared distances of unit features, where names, which
#: training had shrunk, are as long as examples.
EUCLIDEAN = {"distance": "euclidean", "normalize_features": True}
WITH_NAMES = {**EUCLIDEAN, "names_in_training_alone": False}
ANSWERED = {
    "full_clusters_euclidean": ("full_clusters", EUCLIDEAN),
    "full_clusters_names": ("full_clusters", WITH_NAMES),
    "full_clusters_euclidean_trainval": ("full_clusters_trainval", EUCLIDEAN),
    "full_clusters_names_trainval": ("full_clusters_trainval", WITH_NAMES),
}


def run(method: str, data_dir: Path, folder: Path, extra: list[str]) -> dict:
    """Results of one method."""
    trained, otherwise = ANSWERED.get(method, (method, {}))
    recipe, settings = METHODS[trained]
    split_file = data_dir / "split_1.json"
    if method.endswith("_trainval"):
        split_file = joined(split_file, folder.parent / "split_1_trainval.json")
    data = ["--dataset_name", str(data_dir / "data.jsonl"), "--split_file", str(split_file)]
    arguments, recipe_file = [*shlex.split(COMMON), *shlex.split(settings), *data, *extra], RECIPES / f"{recipe}.yaml"
    results = measured(recipe_file, arguments, folder.parent / trained)
    return answered(folder.parent / trained, otherwise, recipe_file, arguments, folder) if otherwise else results


def answered(trained: Path, otherwise: dict, recipe: Path, arguments: list[str], folder: Path) -> dict:
    """Results of the adapter in ``trained`` with the settings ``otherwise``, on the same test episodes."""
    changes = [item for name, value in otherwise.items() for item in (f"--{name}", str(value).lower())]
    place = ["--output_dir", str(folder)]
    # Its training tasks are not used, and any will do.
    told = parse([*arguments, *changes, "--clusters_per_class", "1", "--n_way", "2", *place], recipe)
    known = {**settings_of(parse([*arguments, *place], recipe)), **otherwise, "trained": trained.name}
    results = folder / "results.json"

    def evaluate() -> None:
        run = prepare(told)
        adapter = FewShotAdapter.from_pretrained(
            trained, config_overrides=otherwise, device=run.trainer.accelerator.device
        )
        test = tested(run, baselines_of(run.learner, told.args), adapter)
        folder.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps({"test": test}, indent=2) + "\n", encoding="utf-8")

    once(told, known, results, evaluate, settings_of(parse([])))
    return json.loads(results.read_text(encoding="utf-8"))["test"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ANSWERED], default=[*METHODS, *ANSWERED])
    parser.add_argument("--output_dir", type=Path, default=Path("output/huffpost"))
    chosen, extra = parser.parse_known_args()

    table: Table = {}
    for method in chosen.methods:
        add(table, method, run(method, chosen.data_dir, chosen.output_dir / method, extra), baselines=method)
        print_table(table)


if __name__ == "__main__":
    main()
