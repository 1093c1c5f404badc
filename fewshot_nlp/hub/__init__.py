"""Saving, loading and sharing a meta-learned adapter, and its model card."""

from fewshot_nlp.hub.adapter import FewShotAdapter
from fewshot_nlp.hub.card import model_card
from fewshot_nlp.hub.info import AdapterInfo

__all__ = ["AdapterInfo", "FewShotAdapter", "model_card"]
