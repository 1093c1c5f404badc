"""What is particular to one adapter: where it starts, what it trains, and which settings contradict it."""

import warnings

import peft
import pytest
import torch
from transformers import AutoModel

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.models import FewShotModel, load_backbone
from fewshot_nlp.models.adapters import ia3_targets, save_adapter
from fewshot_nlp.models.targets import IA3_TARGETS
from tests.contracts.families import FAMILIES
from tests.tiny import TINY_VISION, random_batch, tiny_config, tiny_network


def build(folder, **settings):
    return FewShotModel.build(tiny_config(folder, **{"num_virtual_tokens": 3, **settings}))


def moved(model):
    rng = torch.Generator().manual_seed(1)
    return {name: v + 0.2 * torch.randn(v.shape, generator=rng) for name, v in model.init_params().items()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adapter": "ia3", "use_dora": True}, "use_dora is a kind of LoRA, and adapter='ia3'. Use adapter='lora'"),
        ({"use_rslora": True}, "use_rslora is a kind of LoRA, and adapter='prompt_tuning'"),
        ({"adapter": "lora", "prompt_tuning_init": "RANDOM"}, "starts a soft prompt, and adapter='lora'"),
        (
            {"prompt_tuning_init": "random"},
            "prompt_tuning_init='random' is not known. Use one of: RANDOM",
        ),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init='TEXT' and prompt_tuning_init_text=None contradict"),
        ({"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": "lamp"}, "'RANDOM' and .*'lamp' contradict"),
    ],
)
def test_settings_that_contradict_the_adapter(settings, message):
    with pytest.raises(ValueError, match=message):
        FewShotConfig(**settings)


def test_a_prompt_that_starts_at_words_is_made_of_their_embeddings(bert_folder):
    (prompt,) = build(bert_folder, adapter="prompt_tuning", prompt_tuning_init="SAMPLE_VOCAB").init_params().values()
    words = load_backbone(bert_folder)[0].get_input_embeddings().weight
    assert all((row == words).all(dim=1).any() for row in prompt)


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(bert_folder):
    """Kalajdzievski 2023: alpha / sqrt(r) in place of alpha / r."""
    inputs = random_batch([2, 2]).inputs
    stabilised = build(bert_folder, adapter="lora", lora_r=4, lora_alpha=2, use_rslora=True)
    plain = build(bert_folder, adapter="lora", lora_r=4, lora_alpha=4)
    params = moved(plain)
    torch.testing.assert_close(stabilised.features(params, inputs), plain.features(params, inputs))


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_dora_is_a_direction_and_a_magnitude(tmp_path, name):
    """``m (V + ΔV) / |V + ΔV|`` in every target, written into a plain backbone by hand."""
    folder, family = FAMILIES[name].save(tmp_path), FAMILIES[name]
    model = build(folder, adapter="lora", use_dora=True)
    params, inputs = moved(model), random_batch([2, 2], kind=family.kind, dtype=torch.float32).inputs
    bare, _ = load_backbone(folder)
    with torch.no_grad():
        for path in {name.split(".lora_")[0].removeprefix("model.base_model.model.") for name in params}:
            own = {n.split(".lora_")[1]: v for n, v in params.items() if f".{path}.lora_" in n}
            a, b = own["A.default.weight"], own["B.default.weight"]
            weight = bare.get_submodule(path).weight
            turned = torch.einsum("or,ri->oi", b.flatten(1), a.flatten(1)) * 16 / 2
            turned = turned.T if name == "gpt2" else turned.view(weight.shape)
            outputs = 1 if name == "gpt2" else 0
            others = [d for d in range(weight.ndim) if d != outputs]
            v = weight + turned
            magnitude = own["magnitude_vector.default.weight"].view([-1 if d == outputs else 1 for d in range(v.ndim)])
            weight.copy_(magnitude * v / torch.linalg.vector_norm(v, dim=others, keepdim=True))
    expected = FewShotModel(bare, model.tokenizer, model.config).features({}, inputs)
    torch.testing.assert_close(model.features(params, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "gpt2", "qwen2", "vit", "resnet"])
def test_bitfit_trains_every_bias_and_nothing_else(tmp_path, name):
    folder = FAMILIES[name].save(tmp_path)
    model, (bare, _) = build(folder, adapter="bitfit"), load_backbone(folder)
    found = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in model.trainable}
    assert found == {n for n, _ in bare.named_parameters() if n.endswith(".bias")}


def test_merged_by_peft_bitfit_is_the_backbone_with_other_biases(bert_folder, tmp_path):
    """The LoRA of rank 1 that carries it stays at zero."""
    model = build(bert_folder, adapter="bitfit")
    params = moved(model)
    with model.holding(params) as module:
        save_adapter(module, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(bert_folder), tmp_path).merge_and_unload()
    changed = {n.removeprefix("model.base_model.model.").replace(".base_layer", ""): v for n, v in params.items()}
    for name, value in AutoModel.from_pretrained(bert_folder).named_parameters():
        assert torch.equal(merged.get_parameter(name), changed.get(name, value)), name


@pytest.mark.parametrize(("name", "count"), [("bert", 5), ("llama", 5), ("modernbert", 5), ("resnet", 6), ("vit", 5)])
def test_layernorm_trains_every_norm_and_nothing_else(tmp_path, name, count):
    """Layer, RMS and batch norms; ModernBERT's first block has one less."""
    model = build(FAMILIES[name].save(tmp_path), adapter="layernorm")
    assert {n.rsplit(".", 1)[-1] for n in model.trainable} <= {"weight", "bias"}
    layers = {n.rsplit(".", 1)[0] for n in model.trainable}
    assert len(layers) == count and all(".ln_tuning_layers." in layer for layer in layers)


@pytest.mark.parametrize("name", IA3_TARGETS)
def test_the_table_of_ia3_knows_its_models(tmp_path, name):
    module, _ = load_backbone(FAMILIES[name].save(tmp_path))
    names = [full for full, _ in module.named_modules()]
    outputs, inputs = IA3_TARGETS[name]
    for target in (*outputs, *inputs):
        assert any(full.endswith(f".{target}") for full in names), target
    targets, feedforward = ia3_targets(module)
    assert set(feedforward) <= set(targets)
    assert (targets, feedforward) == ([*outputs, *inputs], inputs)
    assert set(TINY_VISION) <= set(IA3_TARGETS)


@pytest.mark.parametrize(
    ("kind", "adapter", "message"),
    [
        ("vector", "ia3", "No default IA3 modules are known for model type 'fewshot_mlp'. Give a peft.IA3Config"),
        ("vector", "layernorm", "trains the scales of normalisation layers, and MLPModel has none. Use adapter='lora'"),
        ("vector", "prompt_tuning", "before the tokens of a text, and model type 'fewshot_mlp' takes values"),
    ],
)
def test_networks_that_lack_what_an_adapter_trains(tmp_path, kind, adapter, message):
    config = FewShotConfig(model_name_or_path=tiny_network(tmp_path, kind), adapter=adapter)
    with pytest.raises(ValueError, match=message):
        FewShotModel.build(config)
