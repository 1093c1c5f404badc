"""T5 and its kin, encoder-decoders of which the encoder is the backbone: what is particular to them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForTextEncoding,
    MT5Config,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import logging as hf_logging

from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel, load_backbone
from tests.contracts import backbone as contract
from tests.contracts.backbone import Cell, settings
from tests.contracts.families import Family, save_text, text_configs
from tests.tiny import random_batch, random_episode, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

T5 = Family("t5", "text", save_text)
INPUTS = random_batch([2, 2], dtype=torch.float32).inputs


def halves(kind: type[T5Config] = T5Config, **more: object) -> T5Config:
    return kind(**text_configs()["t5"].to_diff_dict() | more)


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    return save_text(halves(), Path(tmp_path_factory.mktemp("t5")))


def test_the_encoder_is_loaded_without_a_word_about_the_rest(tmp_path, caplog):
    """Published checkpoints have a decoder and, of T5 1.1, a language head of its own."""
    save_text(halves(), tmp_path)
    tensors = load_file(path := tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"].clone()}, path, metadata={"format": "pt"})
    hf_logging.enable_propagation()
    try:
        module, _ = load_backbone(str(tmp_path))
    finally:
        hf_logging.disable_propagation()
    assert type(module) is T5EncoderModel and "UNEXPECTED" not in caplog.text
    assert all(torch.equal(value, tensors[name]) for name, value in module.named_parameters())


def test_a_checkpoint_of_the_encoder_alone_is_the_same_backbone(t5, tmp_path):
    AutoModelForTextEncoding.from_pretrained(t5).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert not json.loads((tmp_path / "config.json").read_text())["is_encoder_decoder"]
    whole, alone = (FewShotModel.build(settings(folder, "none", "protonet")) for folder in (t5, str(tmp_path)))
    assert torch.equal(whole.features({}, INPUTS), alone.features({}, INPUTS))


def test_a_checkpoint_that_lacks_a_tensor_of_the_encoder(t5, tmp_path):
    AutoModel.from_pretrained(t5).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    kept = {n: v for n, v in load_file(path).items() if n != "encoder.block.0.layer.0.SelfAttention.q.weight"}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"lacks the tensors \['encoder.block.0.*q.weight'\] of its encoder"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("more", [{"feed_forward_proj": "gated-gelu"}, {"kind": MT5Config}], ids=["gated", "mt5"])
@pytest.mark.parametrize("adapter", ["lora", "ia3", "full"])
def test_its_kin(tmp_path, more, adapter):
    cell = Cell(T5, adapter, save_text(halves(**more), tmp_path))
    contract.meta_gradient_is_exact(cell, "maml")
    contract.a_text_is_read_alone(cell)
    contract.plain_libraries_read_it(cell)


def test_it_has_no_language_head(t5):
    with pytest.raises(ValueError, match=r"does not have \(a t5, of which the encoder is read\). Use head='linear'"):
        FewShotModel.build(settings(t5, "lora", head="verbalizer"))


def test_texts_of_any_length(t5):
    model = FewShotModel.build(settings(t5, "prompt_tuning", max_length=5000))
    assert model.longest is None
    features = model.features(model.init_params(), model.any_texts(1, 300))
    assert features.isfinite().all()


def test_chosen_layers_of_blocks_that_hold_layers(t5):
    model = FewShotModel.build(settings(t5, "lora", lora_layers_to_transform=[1]))
    assert len(model.trainable) == 4 and all(".block.1.layer.0." in name for name in model.trainable)
    # By full names: of two numbers in one, older versions of PEFT take the second.
    targets = model.module.peft_config["default"].target_modules
    assert set(targets) == {f"encoder.block.1.layer.0.SelfAttention.{each}" for each in "qv"}
    with pytest.raises(ValueError, match=r"names 2, and the backbone .* has 2 layers, counted from 0"):
        FewShotModel.build(settings(t5, "lora", lora_layers_to_transform=[2]))


def test_a_trunk_that_hands_on_biases_of_positions_is_not_kept(tmp_path):
    """The first block makes them for all: without them, those above would attend to all distances alike."""
    # Too large to go in one stack with other tasks, and without a graph, either of which would be tried first.
    folder = save_text(halves(d_ff=2048), tmp_path)
    learner = build_learner(settings(folder, "lora", "reptile", lora_layers_to_transform=[1]))
    assert "run once a text" not in learner.describe(random_episode([1, 1]).support)
    assert learner.model.trunk is not None and not learner.model.trunk.works


def test_frozen_matrices_in_half_precision(t5):
    model = FewShotModel.build(settings(t5, "lora"))
    params = model.init_params()
    expected = model.features(params, INPUTS).detach()
    with model.frozen_in("bfloat16"):
        found = model.features(params, INPUTS).detach()
    assert found.dtype == torch.float32 and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_the_lines_on_the_card_load_what_was_trained(t5, tmp_path, adapter):
    cell = Cell(T5, adapter, t5)
    params = cell.params(learner := cell.learner("maml"))
    FewShotAdapter(learner, params).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    lines = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[-1]
    known: dict = {}
    exec(lines.replace("path/to/this/folder", str(tmp_path)).replace("path/to/the/backbone", t5), known)
    with torch.no_grad(), cell.model.holding(params) as module:
        expected, found = module(**INPUTS).last_hidden_state, known["model"].eval()(**INPUTS).last_hidden_state
    real = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
