"""Omniglot, 5-way and 20-way, 1-shot: a four-block convolutional network from scratch, one table beside the papers'.

    python data_scripts/omniglot.py --data_dir ../shared/data/omniglot
    python recipes/benchmarks/omniglot.py

Trains each method on the train alphabets, picks its checkpoint on validation alphabets, and tests on test alphabets:
600 episodes of 5 queries a class, accuracy in percent with its 95 % interval over episodes. Methods with an inner loop
train on 5-way tasks, metric methods and Reptile on 20-way ones (as Snell et al. 2017, who train on more classes than
they test on); one training serves both tests. The network has 32 filters, not the papers' 64, and training is cut to
some minutes of one thread a method, where the papers take hours of a GPU; there are 137 characters to train on (four
times that with rotations), not 1,200. So figures are below the published ones, and compare among themselves.

Transductive runs normalise with the statistics of the batch at hand, the queries among it, as the published figures of
MAML and its kin do; the others normalise each image alone. Untrained are the class means of the network before it is
trained, on the same episodes. Runs that are already in --output_dir are read, not repeated. Further settings go to all
runs. Most settings are first guesses; Reptile's were chosen on validation classes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import datasets
import torch
from runs import interval, measured

from fewshot_nlp import EpisodeReader, EpisodeSampler, FewShotAdapter, evaluate, load_pools
from fewshot_nlp.learners import FrozenPrototypes
from fewshot_nlp.models.cache import FrozenFeatures
from fewshot_nlp.models.scratch import Conv4Config, Conv4Model

FILTERS = 32
#: The harder test; the easier one is that of the run.
WAYS = 20
COMMON = (
    "--adapter full --k_shot 1 --n_query 5 --eval_n_way 5 --eval_k_shots 1 --eval_n_query 5 --eval_episodes 100 "
    "--test_episodes 600 --baseline_episodes 0 --save_strategy best --save_total_limit 1 "
    "--load_best_model_at_end true --learning_rate 2e-3 --warmup_steps 20 --max_grad_norm 10 --eval_steps 150 "
    "--logging_steps 50 --disable_tqdm true --cpu_threads 1"
)
PROTOTYPES = "--distance euclidean --head_scale 0.1"
INNER = f"--n_way 5 --meta_batch_size 4 --head linear {PROTOTYPES}"
METRIC = "--n_way 20 --meta_batch_size 1"
#: Normalisation of the network, settings, and published accuracies (5-way, 20-way) of each method.
METHODS: dict[str, tuple[str, str, tuple[float | None, float | None]]] = {
    "maml": ("batch", f"{INNER} --inner_steps 1 --inner_learning_rate 0.4 --max_steps 600", (98.7, 95.8)),
    "anil": ("batch", f"{INNER} --inner_steps 2 --head_learning_rate 0.4 --max_steps 900", (None, 96.2)),
    # One example a class leaves nothing to generalise to: each step sees what the last one saw. As in the paper, tasks
    # of training have more of them, and Adam inside; more classes, too.
    "reptile": (
        "batch",
        f"--n_way 20 --k_shot 5 --n_query 1 --max_k_shot none --meta_batch_size 1 --head linear {PROTOTYPES} "
        "--inner_rule adam --inner_steps 5 --inner_learning_rate 3e-3 --optim sgd --learning_rate 0.5 "
        "--max_grad_norm 0 --max_steps 400",
        (97.7, 89.4),
    ),
    "protonet": ("group", f"{METRIC} --head prototype {PROTOTYPES} --max_steps 1200", (98.8, 96.0)),
    "matching": ("group", f"{METRIC} --max_steps 1200", (98.1, 93.8)),
    "relation": ("group", f"{METRIC} --max_steps 1200", (99.6, 97.6)),
    "snail": ("group", "--n_way 5 --meta_batch_size 4 --max_steps 900", (99.1, 97.6)),
    "meta_lstm": ("batch", f"{INNER} --inner_steps 2 --max_steps 400", (None, None)),
    "leo": ("group", "--n_way 5 --meta_batch_size 4 --inner_steps 5 --max_steps 900", (None, None)),
}


def network(norm: str, folder: Path) -> Path:
    """Folder of an untrained network, always the same one."""
    path = folder / f"conv4_{FILTERS}_{norm}"
    if not path.is_dir():
        torch.manual_seed(0)
        Conv4Model(Conv4Config(num_filters=FILTERS, norm=norm)).save_pretrained(path)
    return path


def at_20_way(folder: Path, dataset: str) -> dict:
    """The trained model of ``folder`` on 20-way episodes, as many as it had of 5-way ones; measured once."""
    results, path = folder / "results.json", folder / "20_way.json"
    run = hashlib.sha256(results.read_bytes()).hexdigest()
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["run"] == run and "untrained" in found:
            return found
    told = json.loads(results.read_text(encoding="utf-8"))["protocol"]
    adapter, pool = FewShotAdapter.from_pretrained(folder), load_pools(dataset)["test"]
    sampler = EpisodeSampler(pool, n_way=WAYS, k_shot=1, n_query=told["n_query"], seed=told["seed"])
    reader = EpisodeReader(pool, adapter.learner.model.encoder())
    tasks = [sampler[i] for i in range(told["episodes"])]
    result = evaluate(adapter.learner, adapter.params, tasks, reader)
    untrained = FrozenPrototypes(FrozenFeatures(adapter.learner.model))
    mean, ci95, episodes = result.accuracy, result.interval.ci95, len(result)
    found = {"run": run, "accuracy": mean, "ci95": ci95, "episodes": episodes, "seed": told["seed"]}
    found["untrained"] = asdict(evaluate(untrained, {}, tasks, reader).interval)
    found |= {"adapt_seconds": result.adapt_seconds / episodes, "predict_seconds": result.predict_seconds / episodes}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def row(name: str, chosen: argparse.Namespace, extra: list[str]) -> list[str]:
    """Cells of the table for one method, which is trained and tested unless it was before."""
    norm, settings, published = METHODS[name]
    folder = chosen.output_dir / name
    arguments = [*shlex.split(COMMON), "--learner", name, *shlex.split(settings), *extra]
    arguments += ["--model_name_or_path", str(network(norm, chosen.output_dir)), "--dataset_name", chosen.dataset_name]
    five = measured(None, arguments, folder)["1-shot"]
    twenty = at_20_way(folder, chosen.dataset_name)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    protocol, training = results["protocol"], results["training"]
    cells = [name, "yes" if protocol["transductive"] else "no"]
    before = (five["baselines"]["prototypes"]["accuracy"], twenty["untrained"]["mean"])
    for found, start, figure in zip((five, twenty), before, published, strict=True):
        cells += [interval(found["accuracy"], [found["ci95"] or 0.0]), f"{100 * start:.1f}"]
        cells.append("" if figure is None else f"{figure:.1f}")
    milliseconds = 1000 * (twenty["adapt_seconds"] + twenty["predict_seconds"])
    cells += [f"{training['episodes']:,}", f"{training['train_runtime']:.0f}", f"{milliseconds:.0f}"]
    return [*cells, f"{five['episodes']}, seed {protocol['seed']}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / "fewshot_nlp" / "omniglot-train"
    parser.add_argument("--dataset_name", default=str(cache), help="what data_scripts/omniglot.py wrote")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--output_dir", type=Path, default=Path("output/omniglot"))
    chosen, extra = parser.parse_known_args()
    if not Path(chosen.dataset_name).is_dir():
        raise SystemExit(f"error: {chosen.dataset_name} does not exist. Run data_scripts/omniglot.py first.")
    titles = ["method", "transductive", "5-way", "untrained", "published", "20-way", "untrained", "published"]
    titles += ["training tasks", "seconds", "ms a 20-way task", "test episodes"]
    rows = []
    for name in chosen.methods:
        rows.append(row(name, chosen, extra))
        print("\n| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
        print("\n".join("| " + " | ".join(cells) + " |" for cells in rows), flush=True)


if __name__ == "__main__":
    main()
