"""Backbones, adapters, pooling and heads."""

from fewshot_nlp.models.backbone import load_backbone, packaged_backbone
from fewshot_nlp.models.model import FewShotModel

__all__ = ["FewShotModel", "load_backbone", "packaged_backbone"]
