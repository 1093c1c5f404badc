"""What a user waits for: `fit` on 25 sentences, and `predict` on 1,000 beside sentence-transformers' `encode`.

    pip install sentence-transformers
    python recipes/benchmarks/classifier.py

On the default backbone, after loading, with sentences of home_intents. `fit` takes 5 inner steps of MAML on a soft
prompt and on LoRA. `predict` and `encode` take turns on the same sentences with the same model, so that noise falls on
both alike; the first turn warms up. `encode` runs with its own default batch size and with ours. Prints medians, and
the ratio of the throughputs turn by turn, to the faster of the two. A soft prompt adds its own tokens to every text: 8
of them more than double what a text of 7 tokens takes; the last column is the ratio to `encode` of texts that are as
long in words.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch

from fewshot_nlp import FewShotAdapter, FewShotClassifier, FewShotConfig, build_learner, load_pools
from fewshot_nlp.config import DEFAULT_BACKBONE
from fewshot_nlp.models.backbone import packaged_backbone

#: sentence-transformers' default, and ours.
BATCH_SIZES = (32, FewShotClassifier().batch_size)
VIRTUAL_TOKENS = 8
LEARNERS: dict[str, dict[str, Any]] = {
    "prototypes": {"learner": "protonet", "adapter": "none", "head": "prototype"},
    "soft prompt, MAML": {
        "learner": "maml",
        "adapter": "prompt_tuning",
        "num_virtual_tokens": VIRTUAL_TOKENS,
        "inner_steps": 5,
    },
    "LoRA, MAML": {"learner": "maml", "adapter": "lora", "inner_steps": 5},
}


def sentences(count: int) -> tuple[list[str], list[str]]:
    """Sentences of home_intents, as evenly of its test classes as they last, and their labels."""
    pool = load_pools("home_intents")["test"]
    columns = [[(text, name) for text in pool.texts(rows)] for name, rows in pool.rows_by_class.items()]
    pairs = [column[i] for i in range(max(map(len, columns))) for column in columns if i < len(column)][:count]
    texts, labels = zip(*pairs, strict=True)
    return list(texts), list(labels)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(chosen.threads)
    peer = SentenceTransformer(str(packaged_backbone(DEFAULT_BACKBONE) or DEFAULT_BACKBONE), device="cpu")
    texts, labels = sentences(1000)
    tokens = sum(map(len, peer.tokenizer(texts)["input_ids"])) / len(texts)
    print(f"{len(texts)} sentences of {tokens:.1f} tokens, {chosen.threads} threads\n")
    # Each of these words is one token.
    longer = [f"{text}{' a' * VIRTUAL_TOKENS}" for text in texts]
    peers = [
        partial(peer.encode, given, batch_size=size, show_progress_bar=False)
        for given in (texts, longer)
        for size in BATCH_SIZES
    ]
    columns = [f"encode, batches of {size}, texts/s" for size in BATCH_SIZES]
    columns += [f"the same, {VIRTUAL_TOKENS} tokens more" for _ in BATCH_SIZES]
    titles = ["learner", "fit on 25, s", "predict, texts/s", *columns, "ratio", "ratio, as many tokens"]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name, settings in LEARNERS.items():
        learner = build_learner(FewShotConfig(**settings))
        adapter = FewShotAdapter(learner, learner.init_params())
        classifier = FewShotClassifier(adapter, device="cpu")
        runs = [partial(classifier.fit, texts[:25], labels[:25]), partial(classifier.predict, texts), *peers]
        times = [[seconds(run) for run in runs] for _ in range(chosen.turns + 1)][1:]
        fit, *rest = (median(column) for column in zip(*times, strict=True))
        short, long = (
            median(min(encodings[first : first + 2]) / prediction for _, prediction, *encodings in times)
            for first in (0, 2)
        )
        rates = " | ".join(f"{len(texts) / each:.0f}" for each in rest)
        same = long if settings["adapter"] == "prompt_tuning" else short
        print(f"| {name} | {fit:.2f} | {rates} | {short:.2f} | {same:.2f} |", flush=True)


if __name__ == "__main__":
    main()
