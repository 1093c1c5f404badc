"""Learners: one method a file, built by name."""

from __future__ import annotations

from typing import Any

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners.anil import ANIL
from fewshot_nlp.learners.base import BaseLearner
from fewshot_nlp.learners.baselines import FineTuning, FrozenPrototypes, LogisticRegression
from fewshot_nlp.learners.fomaml import FOMAML
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.learners.maml import MAML
from fewshot_nlp.learners.protonet import ProtoNet
from fewshot_nlp.learners.reptile import Reptile
from fewshot_nlp.models.model import FewShotModel

LEARNER_CLASSES: dict[str, type[BaseLearner]] = {
    "maml": MAML,
    "fomaml": FOMAML,
    "anil": ANIL,
    "reptile": Reptile,
    "protonet": ProtoNet,
}

__all__ = [
    "ANIL",
    "FOMAML",
    "LEARNER_CLASSES",
    "MAML",
    "BaseLearner",
    "FineTuning",
    "FrozenPrototypes",
    "GradientLearner",
    "LogisticRegression",
    "ProtoNet",
    "Reptile",
    "build_learner",
]


def build_learner(
    config: FewShotConfig, model: FewShotModel | None = None, peft_config: Any = None, seed: int = 0
) -> BaseLearner:
    """The learner that ``config`` names, on ``model`` or on the backbone and adapter that ``config`` names.

    Args:
        config: checked settings.
        model: an already loaded model; loaded from ``config`` if not given.
        peft_config: a PEFT configuration object to use instead of ``config.adapter``.
        seed: of the adapter's random start.

    Raises:
        ValueError: the parts do not fit each other.
        OSError: the backbone cannot be loaded.
    """
    if model is None:
        model = FewShotModel.build(config, peft_config, seed)
    return LEARNER_CLASSES[config.learner](config, model)
