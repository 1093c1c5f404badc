"""The real decoder, where data_scripts/smollm2.py has made it."""

from __future__ import annotations

import pytest
import torch

from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import backbone as backbone_module
from fewshot_nlp.models import load_backbone, packaged_backbone
from fewshot_nlp.models.backbone import SMOLLM2

real = pytest.mark.skipif(packaged_backbone(SMOLLM2) is None, reason="needs data_scripts/smollm2.py")


@pytest.mark.offline
@real
def test_it_goes_on_with_paris():
    config = FewShotConfig(
        model_name_or_path=SMOLLM2, adapter="none", head="verbalizer", learner="protonet", template="{text} {label}"
    )
    learner = build_learner(config)
    classifier = FewShotClassifier(
        FewShotAdapter(learner, learner.init_params()), device="cpu", classes=["Paris", "London", "the city of Rome"],
        label_texts={"Paris": "Paris", "London": "London", "the city of Rome": "the city of Rome"},
    ).fit([], [])  # fmt: skip
    assert classifier.predict(["The capital of France is", "The capital of Britain is"]).tolist() == ["Paris", "London"]


@pytest.mark.offline
@real
def test_a_text_alone_and_beside_a_longer_one():
    module, tokenizer = load_backbone(SMOLLM2)
    assert tokenizer.pad_token_id is not None and module.name_or_path == SMOLLM2
    with torch.no_grad():
        alone = module(**tokenizer("play some music", return_tensors="pt")).last_hidden_state[0, -1]
    from fewshot_nlp.models import FewShotModel

    model = FewShotModel(module, tokenizer, FewShotConfig(model_name_or_path=SMOLLM2, adapter="none"))
    found = model.features({}, model.encoder()(["play some music", "turn off all the lights in the kitchen"]))[0]
    torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)


def test_without_it_the_script_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(backbone_module, "packaged_backbone", lambda name: None)
    with pytest.raises(OSError, match=r"or `python data_scripts/smollm2.py`"):
        load_backbone(SMOLLM2, cache_dir=str(tmp_path))
