"""Loading backbones: the packaged one without a network, wrong ones with one clear error, all twice differentiable."""

import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    GPTNeoConfig,
    GptOssConfig,
    MistralConfig,
    ViTMAEConfig,
    ViTMAEModel,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from fewshot_nlp.config import DEFAULT_BACKBONE, FewShotConfig
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel, load_backbone, packaged_backbone
from fewshot_nlp.models import backbone as backbone_module
from fewshot_nlp.models.backbone import cache_argument
from tests.tiny import HIDDEN, SPECIAL, WORDS, random_batch, tiny_tokenizer

offline = [
    pytest.mark.offline,
    pytest.mark.skipif(packaged_backbone(DEFAULT_BACKBONE) is None, reason="needs the offline extra"),
]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def second_derivative(module, inputs):
    """Norm of the derivative of a gradient's norm, with respect to the first layer's query projection."""
    weight = next(p for name, p in module.named_parameters() if name.endswith("layer.0.attention.self.query.weight"))
    weight.requires_grad_()
    loss = module(**inputs).last_hidden_state.square().mean()
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), weight)
    return float(second.norm())


def test_a_folder_loads_frozen_in_float32_and_evaluation_mode(bert_folder):
    module, tokenizer = load_backbone(bert_folder)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert tokenizer.pad_token == "[PAD]"
    assert module.name_or_path == bert_folder


def test_a_checkpoint_in_half_precision_becomes_float32(bert_folder, tmp_path):
    AutoModel.from_pretrained(bert_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(bert_folder).save_pretrained(tmp_path)
    module, _ = load_backbone(str(tmp_path))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hidden_states_are_transformers_own(bert_folder, implementation):
    module, _ = load_backbone(bert_folder)
    inputs = random_batch([3, 2]).inputs
    plain = AutoModel.from_pretrained(bert_folder, attn_implementation=implementation).eval()
    with torch.no_grad():
        found, expected = module(**inputs).last_hidden_state, plain(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-5, atol=1e-6)


def test_it_can_be_differentiated_twice_where_the_fused_kernel_cannot(bert_folder):
    inputs = random_batch([3, 2]).inputs
    module, _ = load_backbone(bert_folder)
    assert second_derivative(module, inputs) > 0
    fused = AutoModel.from_pretrained(bert_folder, attn_implementation="sdpa").eval()
    with pytest.raises(RuntimeError, match=r"derivative for .*scaled_dot_product.* is not implemented"):
        second_derivative(fused, inputs)


def test_keys_and_values_have_the_name_that_the_model_has_for_them(bert_folder):
    class Before(nn.Module):
        def forward(self, input_ids, past_key_values=None): ...

    class Since(nn.Module):
        def forward(self, input_ids, cache=None): ...

    class Without(nn.Module):
        def forward(self, input_ids): ...

    assert [cache_argument(each()) for each in (Before, Since, Without)] == ["past_key_values", "cache", None]
    assert cache_argument(load_backbone(bert_folder)[0]) in ("past_key_values", "cache")


def test_attention_drops_out_in_training_mode_only(bert_folder):
    module, _ = load_backbone(bert_folder)
    inputs = random_batch([3, 2]).inputs
    for layer in module.modules():
        if isinstance(layer, torch.nn.Dropout) and layer is not module.encoder.layer[0].attention.self.dropout:
            layer.p = 0.0
    with torch.no_grad():
        first, second = (module(**inputs).last_hidden_state for _ in range(2))
        assert torch.equal(first, second)
        module.train()
        first, second = (module(**inputs).last_hidden_state for _ in range(2))
        assert not torch.equal(first, second)


def test_the_progress_bar_is_left_as_it_was(bert_folder):
    for switch, expected in ((logging.enable_progress_bar, True), (logging.disable_progress_bar, False)):
        switch()
        load_backbone(bert_folder)
        assert logging.is_progress_bar_enabled() == expected
    logging.enable_progress_bar()


def empty(folder: Path):
    folder.mkdir()


def without_weights(folder: Path):
    (folder / "model.safetensors").unlink()


def without_config(folder: Path):
    (folder / "config.json").unlink()


def cut_off(folder: Path):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])


def of_unknown_type(folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "nonsense"}))


@pytest.mark.parametrize("damage", [empty, without_weights, without_config, cut_off, of_unknown_type])
def test_what_is_no_backbone_is_one_clear_error(bert_folder, tmp_path, damage):
    folder = tmp_path / "backbone"
    if damage is not empty:
        shutil.copytree(bert_folder, folder)
    damage(folder)
    with pytest.raises(OSError, match=r"Cannot load the backbone .* Give a folder with config.json") as caught:
        load_backbone(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["nowhere/at_all", "/no/such/folder", "no folder"])
def test_a_backbone_that_is_nowhere(name):
    with pytest.raises(OSError, match=r"Cannot load the backbone .* or a Hub id that this machine can reach"):
        load_backbone(name)


def test_without_the_package_the_default_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(backbone_module, "packaged_backbone", lambda name: None)
    with pytest.raises(OSError, match=r'pip install "fewshot_nlp\[offline\]"'):
        load_backbone(DEFAULT_BACKBONE, cache_dir=str(tmp_path))


def test_only_the_default_is_packaged(monkeypatch):
    assert packaged_backbone("sentence-transformers/all-mpnet-base-v2") is None
    monkeypatch.setattr(backbone_module.importlib.util, "find_spec", lambda name: None)
    assert packaged_backbone(DEFAULT_BACKBONE) is None


class TestMiniLM:
    pytestmark = offline

    def test_it_is_found_and_no_network_is_asked(self, no_network):
        module, tokenizer = load_backbone(DEFAULT_BACKBONE)
        assert module.config.hidden_size == 384
        assert len(tokenizer) == module.config.vocab_size
        # An adapter's base is the public name, not a folder of this machine.
        assert module.name_or_path == DEFAULT_BACKBONE

    def test_a_revision_is_asked_of_the_hub(self, tmp_path):
        with pytest.raises(OSError, match="Cannot load the backbone"):
            load_backbone(DEFAULT_BACKBONE, revision="main", cache_dir=str(tmp_path))

    def test_it_is_twice_differentiable(self):
        module, tokenizer = load_backbone(DEFAULT_BACKBONE)
        inputs = tokenizer(["play some music", "stop"], padding=True, return_tensors="pt")
        assert second_derivative(module, inputs) > 0

    def test_features_are_sentence_transformers(self):
        """all-MiniLM-L6-v2 is the mean over token states, as its ``1_Pooling/config.json`` says."""
        folder = packaged_backbone(DEFAULT_BACKBONE)
        assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"]
        texts = ["Turn on the lights in the kitchen.", "Is the kitchen lamp on?", "A recipe for lentil soup"]
        plain, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
        model = FewShotModel.build(FewShotConfig())
        found = model.frozen_features({name: inputs[name] for name in ("input_ids", "attention_mask")})
        for i, text in enumerate(texts):
            with torch.no_grad():
                states = plain(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            torch.testing.assert_close(found[i], states.sum(0) / len(states), rtol=1e-4, atol=1e-5)
        unit = torch.nn.functional.normalize(found, dim=1)
        # It knows what belongs together.
        assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.3


def test_hidden_size(bert_folder):
    config = FewShotConfig(model_name_or_path=bert_folder, adapter="none")
    assert FewShotModel.build(config).hidden_size == HIDDEN


SHAPE = {
    "vocab_size": len(SPECIAL + WORDS), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "initializer_range": 0.3,
}  # fmt: skip
KEYS = {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "scores with a bound": Gemma2Config(**SHAPE, **KEYS, attn_logit_softcapping=1.0, query_pre_attn_scalar=16),
    "sinks": GptOssConfig(**SHAPE, **KEYS, num_local_experts=2, num_experts_per_tok=1),
    "attention of its own": GPTNeoConfig(
        vocab_size=SHAPE["vocab_size"], hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
        attention_types=[[["global", "local"], 1]], bos_token_id=0, eos_token_id=0,
    ),
    "a decoder that does not say so": BloomConfig(vocab_size=SHAPE["vocab_size"], hidden_size=32, n_layer=2, n_head=4),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoder_reads_as_transformers_own(family, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = AutoModel.from_config(FAMILIES[family])
        for value in built.parameters():
            # Where they start, sinks and biases are nothing to see.
            torch.nn.init.normal_(value, std=0.3)
    built.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = FewShotModel.build(FewShotConfig(model_name_or_path=str(tmp_path), adapter="none"))
    inputs = random_batch([2, 2], seed=3).inputs
    plain = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    found = model.frozen_features(inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        with torch.no_grad():
            alone = plain(input_ids=inputs["input_ids"][row : row + 1, :length]).last_hidden_state[0, -1]
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)


def test_what_draws_at_random_is_no_backbone(tmp_path):
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ViTMAEModel(ViTMAEConfig(**settings, image_size=16, patch_size=4)).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"draws at random.*mask_ratio 0"):
        build_learner(FewShotConfig(model_name_or_path=str(tmp_path), adapter="none", learner="protonet"))


def test_a_speaker_that_looks_back_less_far_than_its_texts_is_refused(tmp_path):
    config = MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=40)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = {"model_name_or_path": str(tmp_path), "adapter": "lora", "head": "verbalizer"}
    with pytest.raises(ValueError, match=r"max_length=64 is too long.*looks back 40 tokens.*at most 8"):
        FewShotModel.build(FewShotConfig(**settings))
    FewShotModel.build(FewShotConfig(**settings, max_length=8, template="{text} {label}"))
