"""Every family of language models: a text's features are its own, wherever padding stands."""

from __future__ import annotations

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch.nn.functional import pad
from transformers import AutoModel, AutoTokenizer

from fewshot_nlp.models import FewShotModel, load_backbone
from tests.languages import DECODERS, FAMILIES
from tests.tiny import SPECIAL, WORDS, tiny_config

#: PEFT says that it knows GPT-2's transposed layers.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

TEXTS = [[5, 9, 12], [7, 6, 18, 11, 5, 8], [10]]
ADAPTERS = ("none", "prompt_tuning", "prefix_tuning", "lora")
#: Families without a cache of keys and values, which a prefix is.
NO_PREFIX = ("distilbert", "albert", "mpnet", "deberta-v2", "modernbert")


def model_of(folder, family, **settings):
    config = tiny_config(folder, num_virtual_tokens=3, **settings)
    if family in ("electra", "deberta-v2") and config.adapter == "lora":
        config.lora_target_modules = ["query", "value"] if family == "electra" else ["query_proj", "value_proj"]
    return FewShotModel.build(config)


def params_of(model):
    rng = torch.Generator().manual_seed(1)
    start = model.init_params()
    return {name: value + 0.2 * torch.randn(value.shape, generator=rng) for name, value in start.items()}


def batch(texts, side, longest=8):
    """Padded on ``side``, to more than is needed, with a token that means something elsewhere."""
    places = [(0, longest - len(ids)) if side == "right" else (longest - len(ids), 0) for ids in texts]
    rows = [torch.tensor(ids) for ids in texts]
    return {
        "input_ids": torch.stack([pad(ids, at, value=6) for ids, at in zip(rows, places, strict=True)]),
        "attention_mask": torch.stack([pad(torch.ones_like(ids), at) for ids, at in zip(rows, places, strict=True)]),
    }


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_alone_and_in_a_padded_batch(language_folders, family, adapter):
    if adapter == "prefix_tuning" and family in NO_PREFIX:
        with pytest.raises(ValueError, match=r"Prefix tuning needs .* Use adapter='prompt_tuning' or 'lora'"):
            model_of(language_folders(family), family, adapter=adapter)
        return
    model = model_of(language_folders(family), family, adapter=adapter)
    params = params_of(model)
    for pooling in ("mean", "cls", "last"):
        model.pooling = pooling
        alone = torch.cat([model.features(params, batch([ids], "right", len(ids))) for ids in TEXTS])
        assert (alone[0] - alone[1]).abs().max() > 1e-3
        for side in ("right", "left"):
            together = model.features(params, batch(TEXTS, side))
            torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
            torch.testing.assert_close(
                model.frozen_features(batch(TEXTS, side)),
                torch.cat([model.frozen_features(batch([ids], "right", len(ids))) for ids in TEXTS]),
                rtol=0,
                atol=1e-5,
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_reaches_the_features(language_folders, family):
    """They are not those of the bare backbone, and every tensor has its say."""
    for adapter in ("prompt_tuning", "prefix_tuning", "lora"):
        if adapter == "prefix_tuning" and family in NO_PREFIX:
            continue
        model = model_of(language_folders(family), family, adapter=adapter)
        params, inputs = params_of(model), batch(TEXTS, "right")
        features = model.features(params, inputs)
        assert (features - model.frozen_features(inputs)).abs().max() > 1e-3
        for name, value in params.items():
            # Not all numbers alike: a layer norm takes a constant away again.
            noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
            moved = model.features({**params, name: value + noise}, inputs)
            assert (moved - features).abs().max() > 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_the_top_layer_leaves_the_rest_to_the_trunk(language_folders, family):
    settings = {"adapter": "lora", "lora_layers_to_transform": [1]}
    if family == "albert":
        with pytest.raises(ValueError, match="PEFT cannot put"):
            model_of(language_folders(family), family, **settings)
        return
    model = model_of(language_folders(family), family, **settings)
    assert model.trainable and all(".1." in name for name in model.trainable)
    params, inputs = params_of(model), batch(TEXTS, "right")
    found = model.features(params, inputs)
    assert model.trunk.depth == 1 and model.trunk.works and model.trunk.known.bytes > 0
    again, alone = (model.features(params, one) for one in (inputs, batch(TEXTS[:1], "right", len(TEXTS[0]))))
    assert torch.equal(again, found)
    torch.testing.assert_close(alone[0], found[0], rtol=0, atol=1e-5)
    model.trunk = None
    torch.testing.assert_close(model.features(params, inputs), found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "modernbert"])
def test_a_layer_that_is_not_there_is_named(language_folders, family):
    with pytest.raises(ValueError, match=r"lora_layers_to_transform=\[1, 2\] names 2, and the backbone .* 2 layers"):
        model_of(language_folders(family), family, adapter="lora", lora_layers_to_transform=[1, 2])


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_a_prompt_of_any_task_gives_features(language_folders, kind, task_type):
    config = tiny_config(language_folders("bert"))
    model = FewShotModel.build(config, kind(num_virtual_tokens=2, task_type=task_type))
    assert model.features(model.init_params(), batch(TEXTS, "right")).shape == (3, model.hidden_size)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_transformers_own(language_folders, family):
    model = model_of(language_folders(family), family, adapter="none")
    assert model.pooling == ("last" if family in DECODERS else "mean")
    plain = AutoModel.from_pretrained(language_folders(family), attn_implementation="eager").eval()
    for ids in TEXTS:
        with torch.no_grad():
            states = plain(torch.tensor([ids])).last_hidden_state[0]
        expected = states[-1] if family in DECODERS else states.mean(0)
        torch.testing.assert_close(model.features({}, batch([ids], "left"))[0], expected, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_without_padding_pads_with_the_end_of_text(language_folders):
    folder = language_folders("llama")
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    _, tokenizer = load_backbone(folder)
    assert tokenizer.pad_token == "[SEP]"
    encoder = model_of(folder, "llama", adapter="none").encoder()
    found = encoder(["play music", "lamp"])
    assert found["input_ids"].tolist() == [
        [len(SPECIAL) + WORDS.index(word) for word in ("play", "music")],
        [len(SPECIAL) + WORDS.index("lamp"), SPECIAL.index("[SEP]")],
    ]
