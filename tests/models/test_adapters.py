"""Adapters that do not fit, files that are damaged, and what is chosen where nothing is said."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPTextConfig,
    NystromformerConfig,
    OpenAIGPTConfig,
    RoFormerConfig,
)

from fewshot_nlp.models import FewShotModel, load_backbone
from fewshot_nlp.models.adapters import (
    LORA_TARGETS,
    build_adapter,
    is_adapted,
    load_adapter,
    lora_targets,
    read_peft_config,
    save_adapter,
    without_adapter,
)
from fewshot_nlp.models.positions import position_limit
from tests.contracts.families import FAMILIES, text_configs
from tests.tiny import SPECIAL, WORDS, tiny_config, tiny_tokenizer

SIZES = {"vocab_size": len(SPECIAL + WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT_LIKE = {**SIZES, "intermediate_size": 32, "max_position_embeddings": 128}
ENCODERS = [name for name in text_configs() if name not in ("gpt2", "llama", "qwen2")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny random encoder of each family."""
    return {name: FAMILIES[name].save(tmp_path_factory.mktemp(name)) for name in ENCODERS}


def build(folder, peft_config=None, **settings):
    return FewShotModel.build(tiny_config(folder, **{"num_virtual_tokens": 3, **settings}), peft_config)


@pytest.mark.parametrize("name", ENCODERS)
def test_default_lora_modules(folders, name):
    module, _ = load_backbone(folders[name])
    targets = lora_targets(module)
    found = {full.rsplit(".", 1)[-1] for full, _ in module.named_modules()}
    assert set(targets) <= found
    known = {"deberta-v2": ["query_proj", "value_proj"], "t5": ["q", "v"], **LORA_TARGETS}
    assert targets == known.get(name, ["query", "value"])


def test_lora_on_an_unknown_architecture_names_the_choices(folders):
    module, _ = load_backbone(folders["bert"])
    module.config.model_type = "homemade"
    with pytest.raises(ValueError, match=r"model type 'homemade'.*lora_target_modules.*dense, key, query, value"):
        lora_targets(module)


def test_lora_modules_can_be_named(folders):
    model = build(folders["bert"], adapter="lora", lora_target_modules=["key"])
    assert model.trainable and all(".key.lora_" in name for name in model.trainable)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "lora", "lora_target_modules": ["nothing"]}, r"PEFT cannot put .*LORA.*'bert'.*nothing"),
        ({"adapter": "prompt_tuning", "num_virtual_tokens": 65}, "num_virtual_tokens=65 and max_length=64.*128 pos"),
        ({"adapter": "p_tuning", "max_length": 126}, "num_virtual_tokens=3 and max_length=126.*128 positions"),
        ({"adapter": "prefix_tuning", "max_length": 126}, "num_virtual_tokens=3 and max_length=126.*128 positions"),
        ({"adapter": "lora", "max_length": 129}, "max_length=129 exceeds the 128 positions.*Lower it to 128 or less"),
        ({"adapter": "full", "max_length": 129}, "max_length=129 exceeds the 128 positions"),
        ({"adapter": "none", "max_length": 129}, "max_length=129 exceeds the 128 positions"),
    ],
)
def test_an_adapter_that_does_not_fit(folders, settings, message):
    with pytest.raises(ValueError, match=message):
        build(folders["bert"], **settings)


@pytest.mark.parametrize("adapter", ["prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize(("name", "longest"), [("bert", 28), ("roberta", 29)])
def test_the_longest_prompt_that_is_let_through_works(folders, name, longest, adapter):
    model = build(folders[name], adapter=adapter, num_virtual_tokens=longest, max_length=100)
    inputs = {key: torch.ones(1, 100, dtype=torch.int64) for key in ("input_ids", "attention_mask")}
    assert model.features(model.init_params(), inputs).isfinite().all()
    with pytest.raises(ValueError, match=f"num_virtual_tokens={longest + 1} and max_length=100"):
        build(folders[name], adapter=adapter, num_virtual_tokens=longest + 1, max_length=100)


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize(("name", "longest"), [("bert", 128), ("roberta", 129), ("mpnet", 128)])
def test_the_longest_text_that_is_let_through_works(folders, name, longest, adapter):
    model = build(folders[name], adapter=adapter, max_length=longest)
    inputs = {key: torch.ones(1, longest, dtype=torch.int64) for key in ("input_ids", "attention_mask")}
    assert model.features(model.init_params(), inputs).isfinite().all()
    with pytest.raises(ValueError, match=f"max_length={longest + 1} exceeds the {longest} positions"):
        build(folders[name], adapter=adapter, max_length=longest + 1)


def test_rotary_positions_have_no_limit(folders):
    model = build(folders["modernbert"], adapter="lora", max_length=200)
    inputs = {key: torch.ones(1, 200, dtype=torch.int64) for key in ("input_ids", "attention_mask")}
    assert model.features(model.init_params(), inputs).isfinite().all()


def test_position_limits(folders):
    found = {name: position_limit(load_backbone(folder)[0]) for name, folder in folders.items()}
    # RoBERTa and MPNet lose positions to the padding index: 0 here in the one, 1 in the other.
    assert found == {
        "albert": 128,
        "bert": 128,
        # Its positions are distances, and those beyond the last count as the last.
        "deberta-v2": None,
        "distilbert": 128,
        "electra": 128,
        "modernbert": None,
        "mpnet": 128,
        "roberta": 129,
        "t5": None,
        "umt5": None,
    }


@pytest.mark.parametrize(
    "config",
    [
        NystromformerConfig(**BERT_LIKE, num_landmarks=8, segment_means_seq_len=8, conv_kernel_size=3),
        RoFormerConfig(**BERT_LIKE, embedding_size=8),
        CLIPTextConfig(**BERT_LIKE, eos_token_id=3),
        OpenAIGPTConfig(vocab_size=SIZES["vocab_size"], n_positions=128, n_embd=16, n_layer=1, n_head=2),
    ],
    ids=lambda config: config.model_type,
)
def test_position_limit_is_where_the_table_ends(config):
    """Under other names, and with rows that no position uses."""
    module = AutoModel.from_config(config).eval()
    limit = position_limit(module)
    assert limit == 128
    with torch.no_grad():
        module(input_ids=torch.ones(1, limit, dtype=torch.int64))
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            module(input_ids=torch.ones(1, limit + 1, dtype=torch.int64))


def test_a_peft_config_object_serves_two_backbones_and_stays_as_it_was(folders, tmp_path):
    wide = BertModel(BertConfig(**{**BERT_LIKE, "hidden_size": 32}))
    wide.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, inference_mode=True)
    before = settings.to_dict()
    for folder, size in ((folders["bert"], 16), (str(tmp_path), 32)):
        (prompt,) = build(folder, settings).init_params().values()
        assert prompt.shape == (4, size)
    assert settings.to_dict() == before


def test_full_and_none_take_no_wrapper(folders):
    for adapter, trained in (("full", True), ("none", False)):
        module, _ = load_backbone(folders["bert"])
        built = build_adapter(module, tiny_config(folders["bert"], adapter=adapter))
        assert built is module and not is_adapted(built)
        assert {parameter.requires_grad for parameter in built.parameters()} == {trained}
        with without_adapter(built) as bare:
            assert bare is module
        with pytest.raises(ValueError, match="BertModel carries no PEFT adapter to save"):
            save_adapter(built, "nowhere")


def test_a_prompt_starts_at_the_embeddings_of_its_text(folders):
    model = build(folders["bert"], adapter="prompt_tuning", prompt_tuning_init_text="play red music")
    (prompt,) = model.init_params().values()
    # As PEFT reads a text: with the special tokens around it, cut to the length of the prompt.
    ids = model.tokenizer("play red music")["input_ids"][:3]
    assert model.tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "play", "red"]
    words = load_backbone(folders["bert"])[0].get_input_embeddings().weight
    assert torch.equal(prompt, words[ids])


def test_the_adapter_records_the_public_name_of_its_base(folders, tmp_path):
    module, _ = load_backbone(folders["bert"])
    module.name_or_path = "someone/bert"
    config = tiny_config(folders["bert"], adapter="prompt_tuning", prompt_tuning_init_text="play", num_virtual_tokens=1)
    save_adapter(build_adapter(module, config, tokenizer_source=folders["bert"]), tmp_path)
    saved = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(saved)["base_model_name_or_path"] == "someone/bert"
    assert folders["bert"] not in saved
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


@pytest.fixture
def saved(folders, tmp_path):
    """A folder with a LoRA adapter, and a model to load it into."""
    model = build(folders["bert"], adapter="lora")
    save_adapter(model.module, tmp_path)
    return tmp_path, model


def rewritten(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    change(tensors, name)
    save_file(tensors, path)
    return name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "missing tensors"),
        (lambda tensors, name: tensors.update(other=torch.ones(1)), r"unknown tensors \['other'\]"),
        (lambda tensors, name: tensors.update({name: torch.ones(3, 5)}), r"has shape \[3, 5\] instead of \[2, 16\]"),
        (lambda tensors, name: tensors[name][0].fill_(float("nan")), "not finite"),
        (lambda tensors, name: tensors[name][0, :1].fill_(float("-inf")), "not finite"),
    ],
    ids=["missing", "unknown", "shape", "nan", "infinite"],
)
def test_wrong_tensors(saved, change, message):
    folder, model = saved
    before = model.init_params()
    rewritten(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model.module, folder)
    assert "adapter_model.safetensors" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.init_params().items())


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"], ids=["missing", "empty", "damaged"])
def test_damaged_weights(saved, content):
    folder, model = saved
    path = folder / "adapter_model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read.*again"):
        load_adapter(model.module, folder)


def test_another_kind_of_adapter(folders, saved):
    folder, _ = saved
    with pytest.raises(ValueError, match=r"missing tensors .*prompt_embeddings.*another backbone or adapter"):
        load_adapter(build(folders["bert"], adapter="prompt_tuning").module, folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "adapter_config.json is missing"),
        ("{", "adapter_config.json is not a PEFT configuration"),
        ('{"peft_type": "NONSENSE"}', "adapter_config.json is not a PEFT configuration"),
        ('{"r": 8}', "adapter_config.json is not a PEFT configuration"),
        ('{"peft_type": "LORA", "r": -1, "lora_alpha": 1}', "PEFT cannot put"),
        ("[]", "adapter_config.json is not a PEFT configuration"),
    ],
)
def test_a_wrong_adapter_config(folders, saved, content, message):
    folder, _ = saved
    path = folder / "adapter_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message):
        build(folders["bert"], read_peft_config(folder))


def test_reading_the_config_of_an_adapter(saved):
    settings = read_peft_config(saved[0])
    assert isinstance(settings, peft.LoraConfig)
    assert settings.r == 2


def test_full_fine_tuning_of_some_layers(bert_folder):
    """What is below them is a trunk, and nothing else changes: saving and reloading are those of a whole model."""
    model = FewShotModel.build(tiny_config(bert_folder, adapter="full", layers_to_train=[1]))
    own = dict(model.module.named_parameters())
    assert set(model.trainable) == {name for name in own if name.startswith("encoder.layer.1.")}
    assert model.trunk is not None and model.trunk.depth == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "full", "layers_to_train": [2]}, r"names 2, and the backbone .* has 2 layers"),
        ({"adapter": "full", "layers_to_train": [-1]}, "names -1"),
        ({"adapter": "full", "layers_to_train": []}, "Name at least one layer"),
        ({"adapter": "lora", "layers_to_train": [1]}, "for LoRA use lora_layers_to_transform"),
    ],
)
def test_layers_that_cannot_be_trained_are_refused(bert_folder, settings, message):
    with pytest.raises(ValueError, match=message):
        FewShotModel.build(tiny_config(bert_folder, **settings))
