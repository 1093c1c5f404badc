"""A saved adapter comes back to the bit, plain PEFT and transformers read it, and what is wrong with it is named."""

import json
import shutil

import peft
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from fewshot_nlp.config import CONFIG_NAME, FewShotConfig
from fewshot_nlp.hub import AdapterInfo, FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.types import Batch
from tests.tiny import random_episode, tiny_bert, tiny_config, tiny_network, tiny_tokenizer

SETTINGS = {
    "prompt_tuning": {"head_init": "zero"},
    "p_tuning": {},
    "prefix_tuning": {"learner": "reptile"},
    "lora": {"learner": "fomaml", "head_init": "zero", "distance": "euclidean"},
    "full": {"learner": "fomaml"},
    "none": {"learner": "protonet", "head": "prototype"},
}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}
ALWAYS = {"README.md", CONFIG_NAME, "fewshot_params.safetensors"}


def settings(folder, adapter="lora", **changes):
    return tiny_config(folder, **{"adapter": adapter, "num_virtual_tokens": 3, **SETTINGS[adapter], **changes})


def trained(config, peft_config=None, info=None, seed=1):
    """An adapter whose every tensor was moved away from its untrained start."""
    learner = build_learner(config, peft_config=peft_config)
    generator = torch.Generator().manual_seed(seed)
    params = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in learner.init_params().items()
    }
    return FewShotAdapter(learner, params, info)


def batch(tokenizer, texts, labels):
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    return Batch(inputs, torch.tensor(labels), 2)


def logits(adapter):
    learner, tokenizer = adapter.learner, adapter.learner.model.tokenizer
    support = batch(tokenizer, ["light on", "play music", "stop the music"], [0, 1, 1])
    query = batch(tokenizer, ["light off", "set the timer"], [0, 1])
    state = learner.adapt(adapter.params, support)
    return learner.predict(adapter.params, state, query).detach()


def same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("adapter", SETTINGS)
def test_round_trip_to_the_bit(bert_folder, tmp_path, adapter):
    info = AdapterInfo(["light", "music"], ["home_intents"], {"test": {}}, "run", ["en"])
    first = trained(settings(bert_folder, adapter), info=info)
    assert first.save_pretrained(tmp_path / "saved") is None
    second = FewShotAdapter.from_pretrained(tmp_path / "saved")
    same(first.params, second.params)
    assert torch.equal(logits(first), logits(second))
    assert second.config == first.config and second.info == info


def test_a_model_of_which_some_layers_were_trained_comes_back(bert_folder, tmp_path):
    first = trained(settings(bert_folder, "full", layers_to_train=[1]))
    first.save_pretrained(tmp_path)
    second = FewShotAdapter.from_pretrained(tmp_path)
    same(first.params, second.params)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize(("head", "scale"), [("verbalizer", 1.0), ("linear", 10.0)])
def test_the_scale_that_a_head_started_at_is_written_down(language_folders, tmp_path, head, scale):
    """As it ever was; an adapter answers by the scale that it learned, whatever is said of the start."""
    folder = language_folders("bert")
    first = trained(settings(folder, "lora", head=head, head_scale=None, learner="maml", head_init="prototype"))
    first.save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert manifest["config"]["head_scale"] == first.config.head_scale == scale
    for said in (10.0, None):
        manifest["config"]["head_scale"] = said
        (tmp_path / CONFIG_NAME).write_text(json.dumps(manifest))
        same(first.params, FewShotAdapter.from_pretrained(tmp_path).params)


@pytest.mark.parametrize("adapter", SETTINGS)
def test_saving_and_loading_leave_the_baseline_untrained(bert_folder, tmp_path, adapter):
    first = trained(settings(bert_folder, adapter))
    model, start = first.learner.model, first.learner.init_params()
    inputs = batch(model.tokenizer, ["play music"], [0]).inputs
    frozen = model.frozen_features(inputs)
    first.save_pretrained(tmp_path / "saved")
    second = FewShotAdapter.from_pretrained(tmp_path / "saved")
    for each in (first, second):
        same(start, each.learner.init_params())
        assert torch.equal(frozen, each.learner.model.frozen_features(inputs))


@pytest.mark.parametrize("adapter", SETTINGS)
def test_files(bert_folder, tmp_path, adapter):
    curve = tmp_path / "curve.png"
    curve.write_bytes(b"png")
    info = AdapterInfo(results={"test": {}}, learning_curve=curve)
    trained(settings(bert_folder, adapter), info=info).save_pretrained(tmp_path / "saved")
    weights = {
        "full": {"config.json", "model.safetensors"},
        "none": set(),
    }.get(adapter, {"adapter_config.json", "adapter_model.safetensors"})
    found = {path.name for path in (tmp_path / "saved").iterdir()}
    assert found == ALWAYS | TOKENIZER_FILES | weights | {"results.json", "learning_curve.png"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["prompt_tuning", "p_tuning", "prefix_tuning", "lora"])
def test_plain_peft_reads_it(bert_folder, tmp_path, adapter):
    first = trained(settings(bert_folder, adapter))
    first.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    inputs = batch(tokenizer, ["play music", "the light off"], [0, 1]).inputs
    base = AutoModel.from_pretrained(bert_folder, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state[:, -length:]
    mask = inputs["attention_mask"][..., None].float()
    expected = first.learner.model.features(first.params, inputs)
    torch.testing.assert_close((hidden * mask).sum(1) / mask.sum(1), expected.detach(), rtol=1e-4, atol=1e-5)


def test_plain_transformers_reads_a_full_model(bert_folder, tmp_path):
    first = trained(settings(bert_folder, "full"))
    first.save_pretrained(tmp_path / "saved")
    own = dict(AutoModel.from_pretrained(tmp_path / "saved").named_parameters())
    for name, tensor in first.params.items():
        if name.startswith("model."):
            assert torch.equal(tensor, own[name.removeprefix("model.")]), name


@pytest.mark.parametrize("place", ["folder", "conv4"])
def test_the_card_tells_auto_model_of_a_network_of_ours(tmp_path, place):
    name = tiny_network(tmp_path / "network", "image") if place == "folder" else place
    learner = build_learner(FewShotConfig(model_name_or_path=name, adapter="full"))
    FewShotAdapter(learner, learner.init_params(), AdapterInfo(kind="image")).save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert "import fewshot_nlp.models  # AutoModel learns of the network" in card


def test_a_peft_config_object_comes_back(bert_folder, tmp_path):
    own = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["key"], task_type="FEATURE_EXTRACTION")
    first = trained(settings(bert_folder), own)
    first.save_pretrained(tmp_path)
    second = FewShotAdapter.from_pretrained(tmp_path)
    same(first.params, second.params)
    assert torch.equal(logits(first), logits(second))


def projected(bert_folder):
    own = peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8, task_type="FEATURE_EXTRACTION"
    )
    return trained(settings(bert_folder, "prefix_tuning"), own)


def test_a_prefix_with_projection_comes_back(bert_folder, tmp_path):
    """Its saved prefix is wider than the embedding that makes it, so PEFT's own file does not fit."""
    first = projected(bert_folder)
    first.save_pretrained(tmp_path)
    second = FewShotAdapter.from_pretrained(tmp_path)
    same(first.params, second.params)
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("kind", ["p_tuning", "prefix_projection"])
def test_an_adapter_that_peft_cannot_restore_is_refused_without_its_network(bert_folder, tmp_path, kind):
    first = projected(bert_folder) if kind == "prefix_projection" else trained(settings(bert_folder, "p_tuning"))
    first.save_pretrained(tmp_path)
    params = load_file(tmp_path / "fewshot_params.safetensors")
    head = {name: tensor for name, tensor in params.items() if name.startswith("head.")}
    save_file(head, tmp_path / "fewshot_params.safetensors")
    with pytest.raises(ValueError, match=r"lacks the prompt's own network .*PEFT.*adapter='prompt_tuning'"):
        FewShotAdapter.from_pretrained(tmp_path)


def test_results_of_an_earlier_save_are_not_taken_for_those_of_a_later(bert_folder, tmp_path):
    trained(settings(bert_folder), info=AdapterInfo(results={"test": {}})).save_pretrained(tmp_path)
    trained(settings(bert_folder), seed=2).save_pretrained(tmp_path)
    assert FewShotAdapter.from_pretrained(tmp_path).info.results is None


def test_a_prompt_that_started_at_a_text_comes_back(bert_folder, tmp_path):
    first = trained(settings(bert_folder, "prompt_tuning", prompt_tuning_init_text="lamp on"))
    first.save_pretrained(tmp_path)
    second = FewShotAdapter.from_pretrained(tmp_path)
    assert torch.equal(logits(first), logits(second))
    same(first.learner.init_params(), second.learner.init_params())


def test_saving_again_replaces_another_kind(bert_folder, tmp_path):
    trained(settings(bert_folder, "full")).save_pretrained(tmp_path)
    second = trained(settings(bert_folder, "lora"))
    second.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "model.safetensors").exists()
    assert torch.equal(logits(second), logits(FewShotAdapter.from_pretrained(tmp_path)))


def test_a_save_that_breaks_off_changes_nothing(bert_folder, tmp_path, monkeypatch):
    first = trained(settings(bert_folder))
    first.save_pretrained(tmp_path)
    other = trained(settings(bert_folder), seed=2)
    start = other.learner.init_params()

    def fail(folder):
        raise OSError("No space left on device")

    monkeypatch.setattr(other.learner.model.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        other.save_pretrained(tmp_path)
    same(start, other.learner.init_params())
    same(first.params, FewShotAdapter.from_pretrained(tmp_path).params)
    assert not list(tmp_path.glob(".saving-*"))


def test_a_backbone_that_moved(bert_folder, tmp_path):
    first = trained(settings(tiny_bert(tmp_path / "here")))
    first.save_pretrained(tmp_path / "saved")
    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(OSError, match="Cannot load the backbone"):
        FewShotAdapter.from_pretrained(tmp_path / "saved")
    second = FewShotAdapter.from_pretrained(tmp_path / "saved", model_name_or_path=str(tmp_path / "there"))
    assert torch.equal(logits(first), logits(second))


@pytest.mark.parametrize("adapter", ["prompt_tuning", "lora", "full"])
def test_another_backbone_is_refused(bert_folder, tmp_path, adapter):
    trained(settings(bert_folder, adapter)).save_pretrained(tmp_path / "saved")
    wide = tmp_path / "wide"
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=19)).save_pretrained(
        wide
    )
    tiny_tokenizer().save_pretrained(wide)
    with pytest.raises(ValueError, match=r"has shape \[.*\] instead of \[.*32.*wide"):
        FewShotAdapter.from_pretrained(tmp_path / "saved", model_name_or_path=str(wide))


def test_parameters_must_fit_the_learner(bert_folder):
    first = trained(settings(bert_folder))
    name = next(iter(first.params))
    with pytest.raises(ValueError, match="params: missing tensors"):
        FewShotAdapter(first.learner, {})
    with pytest.raises(ValueError, match=r"unknown tensors \['head.other'\]"):
        FewShotAdapter(first.learner, {**first.params, "head.other": torch.ones(1)})
    with pytest.raises(ValueError, match="has shape"):
        FewShotAdapter(first.learner, {**first.params, name: torch.ones(1)})
    with pytest.raises(ValueError, match="not finite"):
        FewShotAdapter(first.learner, {**first.params, name: first.params[name] * float("nan")})


@pytest.fixture
def saved(bert_folder, tmp_path):
    trained(settings(bert_folder)).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "fewshot_params.safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.double() * float("nan"), "not finite"),
        (lambda tensor: tensor * float("inf"), "not finite"),
        (lambda tensor: tensor.new_ones(5), r"has shape \[5\] instead of"),
        (lambda tensor: None, "missing tensors"),
    ],
    ids=["nan", "inf", "shape", "missing"],
)
def test_wrong_tensors_are_refused(saved, file, change, message):
    tensors = load_file(saved / file)
    name = sorted(tensors)[0]
    changed = change(tensors.pop(name))
    save_file(tensors | ({} if changed is None else {name: changed.contiguous()}), saved / file)
    with pytest.raises(ValueError, match=message) as caught:
        FewShotAdapter.from_pretrained(saved)
    assert name in str(caught.value)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "fewshot_params.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("content", [None, b"{"], ids=["missing", "damaged"])
def test_missing_and_damaged_files_are_named(saved, file, content):
    (saved / file).unlink() if content is None else (saved / file).write_bytes(content)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")):
        FewShotAdapter.from_pretrained(saved)


@pytest.mark.parametrize("damage", ["missing", "cut", "lacking"])
def test_a_damaged_backbone_is_refused(bert_folder, tmp_path, damage):
    trained(settings(bert_folder, "full")).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        tensors = load_file(file)
        del tensors["embeddings.word_embeddings.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"The backbone in .* (cannot be read|lacks the tensors)"):
        FewShotAdapter.from_pretrained(tmp_path)


def test_remote_code_is_refused(bert_folder, tmp_path):
    trained(settings(bert_folder, "prompt_tuning", prompt_tuning_init_text="lamp on")).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "tokenizer_kwargs": {"trust_remote_code": True}}), encoding="utf-8")
    with pytest.raises(ValueError, match="asks for trust_remote_code"):
        FewShotAdapter.from_pretrained(tmp_path)


def test_pickled_weights_are_never_read(saved):
    (saved / "adapter_model.safetensors").rename(saved / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        FewShotAdapter.from_pretrained(saved)


def test_push_settings_without_push(saved):
    adapter = FewShotAdapter.from_pretrained(saved)
    with pytest.raises(ValueError, match="repo_id, private has a meaning only with push_to_hub=True"):
        adapter.save_pretrained(saved, repo_id="me/x", private=True)


def test_the_learning_curve_stays_with_the_adapter(bert_folder, tmp_path):
    curve = tmp_path / "curve.png"
    Image.new("L", (2, 2)).save(curve)
    trained(settings(bert_folder), info=AdapterInfo(learning_curve=curve)).save_pretrained(tmp_path / "a")
    adapter = FewShotAdapter.from_pretrained(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    adapter.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "learning_curve.png").read_bytes() == curve.read_bytes()
    assert "](learning_curve.png)" in (tmp_path / "b" / "README.md").read_text()


def test_a_missing_curve_is_named(bert_folder, tmp_path):
    adapter = trained(settings(bert_folder), info=AdapterInfo(learning_curve=tmp_path / "none.png"))
    with pytest.raises(ValueError, match=r"learning_curve=.*none.png.* is not a file"):
        adapter.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_curve_already_in_place_stays(bert_folder, tmp_path):
    (tmp_path / "learning_curve.png").write_bytes(b"png")
    adapter = trained(settings(bert_folder), info=AdapterInfo(learning_curve=tmp_path / "learning_curve.png"))
    adapter.save_pretrained(tmp_path)
    assert (tmp_path / "learning_curve.png").read_bytes() == b"png"


@pytest.mark.parametrize(
    ("built", "otherwise"),
    [
        ({"learner": "maml", "inner_steps": 1}, {"inner_steps": 3, "normalize_features": True}),
        ({"learner": "protonet", "head": "prototype"}, {"distance": "euclidean", "normalize_features": True}),
    ],
)
def test_tasks_may_be_answered_otherwise_than_in_training(built, otherwise, bert_folder, tmp_path):
    learner = build_learner(tiny_config(bert_folder, **built))
    FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path)
    found = FewShotAdapter.from_pretrained(tmp_path, config_overrides=otherwise)
    assert otherwise.items() <= found.learner.config.to_dict().items()
    as_trained = FewShotAdapter.from_pretrained(tmp_path).config
    assert all(getattr(as_trained, name) != value for name, value in otherwise.items())
    other = build_learner(tiny_config(bert_folder, **{**built, **otherwise}))
    episode = random_episode([2, 1])
    ours, theirs = (
        each.predict(params, each.adapt(params, episode.support), episode.query)
        for each, params in ((found.learner, found.params), (other, learner.init_params()))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"inner_stepz": 3}, "'inner_stepz', which a trained adapter cannot change. Use inner_steps"),
     ({"inner_steps": -1}, "inner_steps=-1"), (["inner_steps"], "must be a mapping"),
     ({"lora_alpha": 64}, "'lora_alpha', which"), ({"model_name_or_path": "x"}, "'model_name_or_path', which")],
)  # fmt: skip
def test_overrides_that_do_not_fit_are_named(bert_folder, tmp_path, overrides, said):
    learner = build_learner(tiny_config(bert_folder, learner="maml"))
    FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        FewShotAdapter.from_pretrained(tmp_path, config_overrides=overrides)


def test_steps_that_were_not_trained_are_named(bert_folder, tmp_path):
    learner = build_learner(tiny_config(bert_folder, learner="maml", inner_rule="step_rates", inner_steps=2))
    FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"It was asked for config_overrides=\{'inner_steps': 3\}"):
        FewShotAdapter.from_pretrained(tmp_path, config_overrides={"inner_steps": 3})


def test_figures_of_other_settings_are_not_saved(bert_folder, tmp_path):
    learner = build_learner(tiny_config(bert_folder, learner="maml"))
    FewShotAdapter(learner, learner.init_params(), AdapterInfo(results={"test": {}})).save_pretrained(tmp_path)
    assert FewShotAdapter.from_pretrained(tmp_path).info.results
    assert not FewShotAdapter.from_pretrained(tmp_path, config_overrides={"inner_steps": 3}).info.results
