"""Learners: one method a file, built by name."""

from __future__ import annotations

import importlib
from typing import Any

from fewshot_nlp.config import LEARNERS, FewShotConfig
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.learners.baselines import FineTuning, FrozenPrototypes, LogisticRegression
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.model import FewShotModel

__all__ = [
    "BaseLearner",
    "FineTuning",
    "FrozenPrototypes",
    "GradientLearner",
    "LogisticRegression",
    "build_learner",
    "learner_class",
]


def learner_class(name: str) -> type[BaseLearner]:
    """The class of the learner that ``config.LEARNERS`` lists as ``name``."""
    home = LEARNERS[name]
    if isinstance(home, str):
        module, _, attribute = home.partition(":")
        home = getattr(importlib.import_module(module), attribute)
    return home


def build_learner(
    config: FewShotConfig, model: FewShotModel | None = None, peft_config: Any = None, seed: int = 0
) -> BaseLearner:
    """The learner that ``config`` names, on ``model`` or on the backbone and adapter that ``config`` names.

    Args:
        config: checked settings.
        model: an already loaded model; loaded from ``config`` if not given.
        peft_config: a PEFT configuration object to use instead of ``config.adapter``.
        seed: of the random start of the adapter and of the learner's own networks.

    Raises:
        ValueError: the parts do not fit each other.
        OSError: the backbone cannot be loaded.
    """
    if model is None:
        model = FewShotModel.build(config, peft_config, seed)
    return learner_class(config.learner)(config, model)
