"""Few-shot learning on Hugging Face models: meta-learned soft prompts and LoRA adapters, text first."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fewshot_nlp.classifier import FewShotClassifier
    from fewshot_nlp.config import FewShotConfig
    from fewshot_nlp.data import EpisodeReader, EpisodeSampler, TextEncoder, home_intents, load_pools
    from fewshot_nlp.data.config import EpisodeConfig
    from fewshot_nlp.evaluation import compare, evaluate
    from fewshot_nlp.hub import FewShotAdapter
    from fewshot_nlp.learners import build_learner
    from fewshot_nlp.learners.planner import plan
    from fewshot_nlp.training import FewShotTrainer, FewShotTrainingArguments

#: Where each public name lives. Loaded when asked for, so that `import fewshot_nlp` stays cheap.
_HOMES = {
    "EpisodeConfig": "data.config",
    "EpisodeReader": "data",
    "EpisodeSampler": "data",
    "FewShotAdapter": "hub",
    "FewShotClassifier": "classifier",
    "FewShotConfig": "config",
    "FewShotTrainer": "training",
    "FewShotTrainingArguments": "training",
    "TextEncoder": "data",
    "build_learner": "learners",
    "compare": "evaluation",
    "evaluate": "evaluation",
    "home_intents": "data",
    "load_pools": "data",
    "plan": "learners.planner",
}

__all__ = [
    "EpisodeConfig",
    "EpisodeReader",
    "EpisodeSampler",
    "FewShotAdapter",
    "FewShotClassifier",
    "FewShotConfig",
    "FewShotTrainer",
    "FewShotTrainingArguments",
    "TextEncoder",
    "build_learner",
    "compare",
    "evaluate",
    "home_intents",
    "load_pools",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
