"""Does a domain discriminator pay? Prototypes trained on one domain and tested on another, with it and without.

    python recipes/benchmarks/domains.py --pairs en-de en-nl en-fr --seeds 0 1 2
    python recipes/benchmarks/domains.py --pairs clinc150-banking77 --data_dir ../shared/data --seeds 0 1 2
    python recipes/benchmarks/domains.py --pairs en-de --classes validation --weights 0.03 0.1 0.3 --max_steps 60

Pairs of languages are intents of home_intents, trained on in English and answered in the other; the others need the
data sets in --data_dir. Both learners see the same tasks of the source domain, of other classes than are tested; the
discriminator also sees unlabelled texts of the target's training classes. Test tasks are of the target's unseen
classes. Prints one table: accuracy in percent with its 95 % interval over episodes, averaged over the seeds of
training, and the paired gain of the discriminator on the same episodes; writes domains_<classes>.json in --output_dir.
Runs that are there already, with the same settings, are read and not repeated. Choose the weight with --classes
validation, before test classes are looked at.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path

import numpy as np
from runs import settings_of

from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.train import prepare
from fewshot_nlp.evaluation.intervals import Interval, mean_interval, paired_interval
from fewshot_nlp.learners import FrozenPrototypes
from fewshot_nlp.models.cache import FrozenFeatures

RECIPE = Path(__file__).parents[1] / "domain_adversarial.yaml"
#: Target and source of each pair; ``{data}`` is ``--data_dir``.
FILES = (
    "--dataset_name {{data}}/{target}/data.jsonl --dataset_config_name none --min_examples 15 "
    "--split_file {{data}}/{target}/split_1.json --mixture_dataset_names {{data}}/{source}/data.jsonl"
)
PAIRS = {
    **{f"en-{language}": f"--dataset_config_name {language}" for language in ("de", "nl", "fr", "es", "sv")},
    "clinc150-banking77": FILES.format(source="clinc150", target="banking77"),
    "banking77-clinc150": FILES.format(source="banking77", target="clinc150"),
    "home-clinc150": "--dataset_name {data}/clinc150/data.jsonl --dataset_config_name none "
    "--split_file {data}/clinc150/split_1.json --mixture_dataset_names home_intents",
}
WITHOUT = "--learner protonet --learner_kwargs none --n_unlabelled 0"


def accuracies(arguments: list[str], folder: Path, classes: str) -> dict[str, dict[str, list[float]]]:
    """Accuracy in each episode, by learner (trained, untrained prototypes) and number of shots."""
    told = parse([*arguments, "--output_dir", str(folder), "--overwrite_output_dir", "true"], RECIPE)
    known, kept = {"classes": classes, **settings_of(told)}, folder / "accuracies.json"
    if kept.is_file():
        before = json.loads(kept.read_text(encoding="utf-8"))
        if before["settings"] == known:
            return before["accuracies"]
    run = prepare(told)
    count = told.args.test_episodes
    tasks = {name: [sampler[i] for i in range(count)] for name, sampler in run.test.items()}
    tasks = run.trainer.eval_specs if classes == "validation" else tasks
    if not tasks:
        raise SystemExit(
            f"No {classes} episodes: eval_strategy={told.args.eval_strategy.value!r} and test_episodes={count}. Set "
            f"--eval_strategy steps for --classes validation, --test_episodes above 0 for test."
        )
    run.trainer.train()
    untrained = FrozenPrototypes(FrozenFeatures(run.learner.model))
    found = {
        kind: {name: run.trainer.evaluate_on(specs, learner).accuracies for name, specs in tasks.items()}
        for kind, learner in (("trained", None), ("untrained", untrained))
    }
    folder.mkdir(parents=True, exist_ok=True)  # a run that saves nothing leaves no folder
    kept.write_text(json.dumps({"settings": known, "accuracies": found}) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=["en-de", "en-nl", "en-fr"])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.1], help="of the discriminator's gradient")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--classes", choices=("test", "validation"), default="test")
    parser.add_argument("--data_dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output_dir", type=Path, default=Path("output/domains"))
    chosen, extra = parser.parse_known_args()

    ramp = parse(extra, RECIPE)
    ramp_episodes = ramp.args.max_steps * ramp.args.episodes_per_step
    methods = {"without": WITHOUT} | {
        f"weight {weight}": f"""--learner_kwargs '{json.dumps({"weight": weight, "ramp_episodes": ramp_episodes})}'"""
        for weight in chosen.weights
    }
    rows = []
    for pair in chosen.pairs:
        measured: dict[str, list] = {}
        for method, settings in methods.items():
            for seed in chosen.seeds:
                arguments = shlex.split(f"{PAIRS[pair].format(data=chosen.data_dir)} {settings} --seed {seed}")
                folder = chosen.output_dir / f"{pair}_{method.replace(' ', '_')}_{seed}"
                found = accuracies([*arguments, *extra], folder, chosen.classes)
                measured.setdefault(method, []).append(found["trained"])
                measured.setdefault("untrained prototypes", [found["untrained"]])
        for method, by_seed in measured.items():
            row = {"pair": pair, "method": method, "seeds": len(by_seed)}
            for shot in by_seed[0]:
                ours, theirs = (np.mean([each[shot] for each in measured[m]], axis=0) for m in (method, "without"))
                row[shot] = asdict(mean_interval(ours))
                if method.startswith("weight"):
                    row[f"{shot} gain"] = asdict(paired_interval(ours, theirs))
            rows.append(row)
    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    path = chosen.output_dir / f"domains_{chosen.classes}.json"
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")

    shots = [name for name in rows[0] if name.endswith("-shot")]
    print("\n| source-target | method | " + " | ".join(f"{shot} | gain of it" for shot in shots) + " |")
    print("|---" * (2 + 2 * len(shots)) + "|")
    for row in rows:
        cells = [row["pair"], row["method"], *(shown(row.get(f"{s}{end}")) for s in shots for end in ("", " gain"))]
        print("| " + " | ".join(cells) + " |")


def shown(interval: dict | None) -> str:
    """An interval in percent; nothing where there is none."""
    if interval is None:
        return ""
    found = Interval(**interval)
    return f"{100 * found.mean:.1f} ± {100 * (found.ci95 or 0):.1f}"


if __name__ == "__main__":
    main()
