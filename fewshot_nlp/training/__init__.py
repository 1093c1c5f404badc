"""Meta-training on Accelerate, with Hugging Face's argument names and transformers' callbacks."""

from __future__ import annotations

from fewshot_nlp.training.arguments import FewShotTrainingArguments
from fewshot_nlp.training.callbacks import EpisodeProgressCallback, LinePrinterCallback
from fewshot_nlp.training.checkpoint import DamagedCheckpoint, find_checkpoint, read_checkpoint
from fewshot_nlp.training.faults import LostProcess, UnreadableEpisode
from fewshot_nlp.training.interrupts import Interrupted
from fewshot_nlp.training.metrics_log import read_reports
from fewshot_nlp.training.trainer import FewShotTrainer, TrainOutput

__all__ = [
    "DamagedCheckpoint",
    "EpisodeProgressCallback",
    "FewShotTrainer",
    "FewShotTrainingArguments",
    "Interrupted",
    "LinePrinterCallback",
    "LostProcess",
    "TrainOutput",
    "UnreadableEpisode",
    "find_checkpoint",
    "read_checkpoint",
    "read_reports",
]
