"""Several texts in a row: what is made of each is what is made of it alone."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, BertConfig, ElectraConfig, GPT2Config, LlamaConfig, MistralConfig

from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.backbone import ATTENTION
from fewshot_nlp.models.packing import PACKED, can_pack, packing_for
from tests.learners.test_meta_gradients import assert_equal
from tests.models.test_cache_and_buckets import mask_of
from tests.tiny import HIDDEN, random_batch, random_episode, tiny_config

SMALL = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SHAPES = {
    "bert": (BertConfig(vocab_size=19, **SMALL), "value"),
    "electra": (ElectraConfig(vocab_size=19, embedding_size=8, **SMALL), "value"),
    "gpt2": (GPT2Config(vocab_size=19, n_embd=HIDDEN, n_layer=2, n_head=2), "c_attn"),
    "llama": (LlamaConfig(vocab_size=19, num_key_value_heads=1, **SMALL), "v_proj"),
}
LENGTHS = [3, 11, 4, 5, 2, 3, 9, 7, 4]


def texts(lengths):
    mask = mask_of(lengths)
    ids = torch.randint(5, 19, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def packing_of(lengths):
    return packing_for(texts(lengths))


def module_of(name, lowest=0, **settings):
    """With LoRA from the layer ``lowest`` on."""
    config, target = SHAPES[name]
    config = type(config)(**{**config.to_dict(), **settings})
    torch.manual_seed(0)
    module = AutoModel.from_config(config, attn_implementation=ATTENTION).double().eval().requires_grad_(False)
    targets = [n for n, _ in module.named_modules() if n.endswith(target) and (lowest == 0 or ".1." in f".{n}")]
    lora = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
    with warnings.catch_warnings():
        # PEFT's own, about what it asks of transformers.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(module, lora).eval()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40))
def test_every_token_has_a_place_of_its_own(lengths):
    packing = packing_of(lengths)
    if packing is None:
        return
    rows, capacity = packing.source.shape
    assert sum(lengths) <= rows * capacity < len(lengths) * max(lengths)
    assert int((packing.text >= 0).sum()) == sum(lengths)
    numbers = torch.arange(len(lengths) * max(lengths)).view(len(lengths), -1)
    back = packing.unpack(packing.pack(numbers))
    for i, length in enumerate(lengths):
        assert torch.equal(back[i, :length], numbers[i, :length])
        assert packing.positions[packing.text == i].tolist() == list(range(length))
        # In one row, in one piece.
        assert len({place // capacity for place in packing.target[i, :length].tolist()}) == 1


def test_texts_are_packed_only_where_it_saves_something():
    assert packing_of([7] * 50) is None
    assert packing_of([12, 14]) is None
    assert packing_of([5]) is None
    packing = packing_of([5] * 50 + [100])
    assert packing is not None and packing.source.numel() < 0.1 * 51 * 100


def test_what_is_not_plain_text_is_not_packed():
    inputs = texts(LENGTHS)
    assert packing_for(inputs) is not None
    assert packing_for({**inputs, "position_ids": torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1) + 1}) is None
    inputs["attention_mask"][1, 3] = 0
    assert packing_for(inputs) is None, "a hole"
    inputs["attention_mask"][1] = 0
    assert packing_for(inputs) is None, "a text without tokens"


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in SHAPES), ("llama", {"is_causal": False}), ("bert", {"is_decoder": True})],
)
def test_features_are_those_of_each_text_alone(name, settings, pooling):
    model = FewShotModel(module_of(name, **settings), None, tiny_config("unused", adapter="lora", pooling=pooling))
    inputs, params = texts(LENGTHS), model.init_params()
    assert model._packs and packing_for(inputs) is not None
    alone = [model.features(params, {n: t[i : i + 1, :k] for n, t in inputs.items()}) for i, k in enumerate(LENGTHS)]
    # With more padding than the longest needs, too.
    wide = {n: torch.nn.functional.pad(t, (0, 2)) for n, t in inputs.items()}
    for each in (inputs, wide):
        torch.testing.assert_close(model.features(params, each), torch.cat(alone), rtol=1e-10, atol=1e-12)
    frozen = torch.cat([model.frozen_features({n: t[i : i + 1, :k] for n, t in inputs.items()})
                        for i, k in enumerate(LENGTHS)])  # fmt: skip
    torch.testing.assert_close(model.frozen_features(inputs), frozen, rtol=1e-10, atol=1e-12)
    assert (frozen - torch.cat(alone)).abs().max() > 1e-4


@pytest.mark.parametrize("lowest", [0, 1])
@pytest.mark.parametrize("name", SHAPES)
def test_meta_gradients_are_those_of_a_row_for_each(name, lowest, monkeypatch):
    """Also above a trunk, whose texts are kept one by one."""

    def grads():
        learner = build_learner(config, FewShotModel(module_of(name, lowest), None, config))
        assert (learner.model.trunk is None) == (lowest == 0)
        params = {key: value.double() for key, value in learner.init_params().items()}
        return learner.meta_grad(params, [random_episode([2, 3, 4], seed=3)]).grads

    config = tiny_config("unused", learner="maml", adapter="lora", inner_steps=2, inner_learning_rate=0.1)
    packed = []
    monkeypatch.setattr(
        "fewshot_nlp.models.model.packing_for", lambda inputs: packed.append(packing_for(inputs)) or packed[-1]
    )
    found = grads()
    assert any(each is not None for each in packed)
    monkeypatch.setattr("fewshot_nlp.models.model.packing_for", lambda inputs: None)
    assert_equal(found, grads())


@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning", "p_tuning"])
def test_texts_behind_a_prompt_are_not_packed(bert_folder, adapter):
    assert not FewShotModel.build(tiny_config(bert_folder, adapter=adapter))._packs


def test_other_backbones_are_not_packed():
    """A window of attention would be lost, and attention of another kind may read the mask in another way."""
    assert set(SHAPES) == PACKED
    shape = MistralConfig(vocab_size=19, num_key_value_heads=1, sliding_window=4, **SMALL)
    assert not can_pack(AutoModel.from_config(shape, attn_implementation=ATTENTION))
    assert not can_pack(AutoModel.from_config(SHAPES["bert"][0], attn_implementation="sdpa"))


def test_the_number_of_a_batchs_other_texts_changes_nothing(bert_folder):
    model = FewShotModel.build(tiny_config(bert_folder))
    batch = random_batch([20, 20], length=30)
    params = model.init_params()
    some = {name: tensor[:7] for name, tensor in batch.inputs.items()}
    torch.testing.assert_close(model.features(params, batch.inputs)[:7], model.features(params, some))
