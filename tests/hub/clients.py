"""What the fresh processes of ``test_push.py`` run: ``python -m tests.hub.clients <step> <folder>``.

Each is a user's own process: the Hub is known from ``HF_ENDPOINT`` alone, and nothing is shared but files.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewshot_nlp.hub import AdapterInfo, FewShotAdapter
from fewshot_nlp.learners import build_learner
from tests.tiny import random_episode, tiny_config

REPO = "tester/prompt"
WRITE, READ, WRONG = "hf_writewritewrite", "hf_readreadread", "hf_wrongwrongwrong"


def make(bert: str, adapter: str = "prompt_tuning", seed: int = 0) -> FewShotAdapter:
    learner = build_learner(tiny_config(bert, adapter=adapter, head_init="zero"))
    generator = torch.Generator().manual_seed(seed)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=generator) for n, v in learner.init_params().items()}
    return FewShotAdapter(learner, params, AdapterInfo(["a", "b"], ["home_intents"], command=f"x --hub_token {WRITE}"))


def logits(adapter: FewShotAdapter) -> str:
    """The exact bytes of the logits of a fixed episode, in hexadecimal."""
    episode = random_episode([1, 2], seed=5)
    state = adapter.learner.adapt(adapter.params, episode.support)
    return adapter.learner.predict(adapter.params, state, episode.query).detach().numpy().tobytes().hex()


def refusal(call: Any, *args: Any, **kwargs: Any) -> str:
    """Class and message of the error that a call must end in."""
    try:
        call(*args, **kwargs)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{call} was not refused")


def push(folder: Path) -> dict[str, Any]:
    bert = str(folder / "bert")
    first, second, lora = make(bert), make(bert, seed=1), make(bert, "lora")
    commits = [
        first.push_to_hub(REPO, private=True, token=WRITE, commit_message="the first"),
        second.push_to_hub(REPO, token=WRITE),
        second.push_to_hub(REPO, token=WRITE),
        lora.push_to_hub(REPO, token=WRITE, revision="lora"),
        first.push_to_hub(REPO, token=WRITE, create_pr=True),
        make(bert, "full").push_to_hub("full", token=WRITE),
        lora.save_pretrained(folder / "full", push_to_hub=True, token=WRITE),
    ]
    return {
        "oids": [commit.oid for commit in commits],
        "pr": commits[4].pr_url,
        "logits": [logits(first), logits(second), logits(lora)],
    }


def pull(folder: Path) -> dict[str, Any]:
    oid = json.loads((folder / "push.json").read_text(encoding="utf-8"))["oids"][0]
    # The author's own folder is not told to the world.
    load = partial(FewShotAdapter.from_pretrained, model_name_or_path=str(folder / "bert"))
    latest = load(REPO, token=WRITE)
    return {
        "latest": logits(latest),
        "first": logits(load(REPO, revision=oid, token=WRITE)),
        "branch": logits(load(REPO, revision="lora", token=READ)),
        "pr": logits(load(REPO, revision="refs/pr/1", token=READ)),
        "replaced": logits(load("tester/full", token=READ)),
        "elsewhere": logits(load(REPO, token=READ, cache_dir=folder / "cache", force_download=True)),
        "label_names": latest.info.label_names,
    }


def cached(folder: Path) -> dict[str, Any]:
    return {
        "latest": logits(
            FewShotAdapter.from_pretrained(REPO, local_files_only=True, model_name_or_path=str(folder / "bert"))
        ),
        "other": refusal(FewShotAdapter.from_pretrained, "tester/other", local_files_only=True),
    }


def refused(folder: Path) -> dict[str, Any]:
    adapter = make(str(folder / "bert"))
    load = FewShotAdapter.from_pretrained
    fresh = {"cache_dir": folder / "fresh"}
    return {
        "push with read access": refusal(adapter.push_to_hub, "tester/new", token=READ),
        "push with a wrong token": refusal(adapter.push_to_hub, "tester/new", token=WRONG),
        "push without a token": refusal(adapter.push_to_hub, "tester/new", token=False),
        "push to another's": refusal(adapter.push_to_hub, "someone/new", token=WRITE),
        "push with a broken token": refusal(adapter.push_to_hub, "tester/new", token=WRITE + "\n"),
        "push over another model": refusal(adapter.push_to_hub, "tester/other-model", token=WRITE),
        "pull what is private": refusal(load, REPO, token=False, **fresh),
        "pull what is missing": refusal(load, "tester/missing", token=READ, **fresh),
        "pull with a wrong token": refusal(load, REPO, token=WRONG, **fresh),
        "pull another revision": refusal(load, REPO, revision="nope", token=READ, **fresh),
        "pull another model": refusal(load, "tester/other-model", token=READ, **fresh),
        "pull a plain PEFT adapter": refusal(load, "tester/peft", token=READ, **fresh),
        "pull one whose backbone is elsewhere": refusal(load, REPO, token=READ, **fresh),
    }


if __name__ == "__main__":
    step, folder = sys.argv[1], Path(sys.argv[2])
    answer = {"push": push, "pull": pull, "cached": cached, "refused": refused}[step](folder)
    (folder / f"{step}.json").write_text(json.dumps(answer), encoding="utf-8")
