"""What a model says, against the library's own forward pass, one text and one name at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fewshot_nlp.config import DEFAULT_BACKBONE, FewShotConfig
from fewshot_nlp.data.encode import encode_with_names
from fewshot_nlp.functional.call import call
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel, packaged_backbone
from fewshot_nlp.models.cache import FixedModel
from fewshot_nlp.models.model import PREFIX
from fewshot_nlp.models.pooling import right_padded
from fewshot_nlp.types import Batch
from tests.contracts.double import hessian_is_exact
from tests.languages import DECODERS, ENCODERS, bare_bert
from tests.tiny import tiny_config, tiny_network

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

TEXTS = ["play the music", "lamp on", "stop the red lamp on the warm timer"]
#: Names of one word and of several.
NAMES = ["music", "lamp light on", "set timer"]
MASKED = "{text} set {mask} off"
CAUSAL = "{text} set {label}"
#: Transformers insists on Qwen2's own tokenizer, which cannot be one of words.
FAMILIES = [*ENCODERS, *(family for family in DECODERS if family != "qwen2")]


def speaking(folder, **settings):
    return FewShotModel.build(tiny_config(folder, **{"head": "verbalizer", "adapter": "none", **settings}))


def params_of(model):
    rng = torch.Generator().manual_seed(1)
    start = model.init_params()
    return {name: value + 0.2 * torch.randn(value.shape, generator=rng) for name, value in start.items()}


def task(model, side="right", labels=(0, 1, 2)):
    """The texts and names as a learner gets them."""
    model.tokenizer.padding_side = side
    encoder = model.encoder()
    rows = encoder.collate(encode_with_names(encoder, TEXTS, NAMES))
    inputs, names = ({k: v[part] for k, v in rows.items()} for part in (slice(3), slice(3, None)))
    return Batch(inputs, torch.tensor(labels), 3, names)


def ids_of(batch):
    return [
        [row[kept].tolist() for row, kept in zip(part["input_ids"], part["attention_mask"].bool(), strict=True)]
        for part in (batch.inputs, batch.names)
    ]


def scores(model, params, batch):
    """``[texts, names]``."""
    if model.voice.scores_names:
        return model.features(params, batch.asked(batch.names).inputs)
    inputs = {name: torch.cat([rows, batch.names[name]]) for name, rows in batch.inputs.items()}
    features = model.features(params, inputs)
    return features[:3] @ features[3:].T


def one_by_one(model, params, texts, names):
    """The same by whole sequences of one text and one name, without a cache, through the model's own logits."""
    body = {name.removeprefix(PREFIX): value for name, value in params.items()}

    def logits(ids):
        inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        # A soft prompt's rows come first.
        return call(model.module, model.trainable, body, **inputs).logits[0, -len(ids) :]

    found = torch.zeros(len(texts), len(names))
    for i, text in enumerate(texts):
        for c, name in enumerate(names):
            if model.voice.scores_names:
                likely = logits([*text, *name])[len(text) - 1 : -1].log_softmax(-1)
                found[i, c] = sum(likely[k, token] for k, token in enumerate(name)) / len(name)
            else:
                found[i, c] = logits(text)[text.index(model.tokenizer.mask_token_id)][name].mean()
    return found


@pytest.mark.parametrize("adapter", ["none", "prompt_tuning"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_language_models_own(language_folders, family, adapter):
    template = CAUSAL if family in DECODERS else MASKED
    model = speaking(language_folders(family), adapter=adapter, template=template, num_virtual_tokens=2)
    params = params_of(model)
    expected = one_by_one(model, params, *ids_of(task(model))).detach()
    for side in ("right", "left"):
        found = scores(model, params, task(model, side)).detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    if adapter == "none":
        kind = AutoModelForCausalLM if family in DECODERS else AutoModelForMaskedLM
        plain = kind.from_pretrained(language_folders(family)).eval()
        text, name = (part[1] for part in ids_of(task(model)))
        with torch.no_grad():
            if family in DECODERS:
                ids = torch.tensor([[*text, *name]])
                loss = plain(ids, labels=torch.tensor([[-100] * len(text) + name])).loss
                torch.testing.assert_close(expected[1, 1], -loss, rtol=1e-4, atol=1e-5)
            else:
                at = text.index(model.tokenizer.mask_token_id)
                logits = plain(torch.tensor([text])).logits[0, at]
                torch.testing.assert_close(expected[1, 1], logits[name].mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize("adapter", ["prefix_tuning", "lora"])
def test_scores_under_adapters_inside_the_layers(language_folders, family, adapter):
    model = speaking(language_folders(family), adapter=adapter, template=CAUSAL, num_virtual_tokens=2)
    params = params_of(model)
    expected = one_by_one(model, params, *ids_of(task(model))).detach()
    torch.testing.assert_close(scores(model, params, task(model)).detach(), expected, rtol=1e-4, atol=1e-5)
    bare = one_by_one(model, model.init_params(), *ids_of(task(model))).detach()
    assert (expected - bare).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
# transformers is renaming it.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_long_names_are_refused_where_checkpointing_keeps_nothing_to_go_on_from(language_folders, family):
    model = speaking(language_folders(family), adapter="lora", template=CAUSAL)
    model.module.get_base_model().gradient_checkpointing_enable()
    model.module.train()
    with pytest.raises(ValueError, match=r"keeps no keys and values of a text, .* Turn it off"):
        scores(model, params_of(model), task(model))


@pytest.mark.parametrize(("family", "template"), [("bert", MASKED), ("gpt2", CAUSAL)])
@pytest.mark.parametrize("adapter", ["prompt_tuning", "lora", "full"])
def test_scores_are_twice_differentiable(language_folders, family, template, adapter):
    """A Hessian-vector product against central differences of the gradient, in float64; Llama's norm is in float32."""
    model = speaking(language_folders(family), adapter=adapter, template=template, num_virtual_tokens=2)
    model.module.double()
    params = {name: value.double().requires_grad_() for name, value in params_of(model).items()}
    batch = task(model)
    loss = torch.nn.functional.cross_entropy
    hessian_is_exact(lambda at: loss(scores(model, at, batch), batch.labels), params, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_likelihoods_of_names_do_not_tie(language_folders):
    """In bfloat16 likelihoods far below one are a sixteenth apart, and the first of the names would be the answer."""
    model = speaking(language_folders("gpt2"), template=CAUSAL)
    params, batch = params_of(model), task(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(model, params, batch)
    assert not torch.equal(found, found.bfloat16().float())


def test_training_the_embeddings_changes_the_words_too(language_folders):
    """The words of a name are rows of a matrix that is tied to the input's."""
    model = speaking(language_folders("bert"), adapter="full", template=MASKED)
    params, batch = params_of(model), task(model)
    words = model.features(params, batch.names)
    (name,) = (name for name in params if name.endswith("word_embeddings.weight"))
    assert not torch.allclose(model.features({**params, name: params[name] + 1}, batch.names), words)


def test_a_name_is_the_mean_of_its_words(language_folders):
    model = speaking(language_folders("bert"), template=MASKED, verbalizer={"Music": ["music", "play stop"]})
    output = model.module.get_output_embeddings()
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("music", "play", "stop")]
    encoder = model.encoder()
    (found,) = model.features({}, encoder.collate(encoder.encode_names(["music"])))
    torch.testing.assert_close(found, torch.cat([output.weight[ids].mean(0), output.bias[ids].mean()[None]]))


def test_the_trunk_and_a_fixed_model_change_nothing(language_folders):
    for family, template in (("bert", MASKED), ("llama", CAUSAL)):
        settings = {"adapter": "lora", "template": template, "lora_layers_to_transform": [1]}
        model = speaking(language_folders(family), **settings)
        params, batch = params_of(model), task(model)
        expected = one_by_one(model, params, *ids_of(batch)).detach()
        assert (model.trunk is None) == (family == "llama")
        for _ in range(2):
            torch.testing.assert_close(scores(model, params, batch).detach(), expected, rtol=1e-4, atol=1e-5)
        fixed = FixedModel(model, params)
        torch.testing.assert_close(scores(fixed, {}, batch), expected, rtol=1e-4, atol=1e-5)


def test_frozen_features_have_no_adapter(language_folders):
    for family, template in (("bert", MASKED), ("llama", CAUSAL)):
        bare = speaking(language_folders(family), template=template)
        for adapter in ("prompt_tuning", "lora"):
            model = speaking(language_folders(family), adapter=adapter, template=template)
            inputs = task(model).inputs
            torch.testing.assert_close(model.frozen_features(inputs), bare.frozen_features(inputs))
            assert model.frozen_features(inputs).shape == (3, model.hidden_size)


class TestWrongPairs:
    def test_a_checkpoint_without_its_head(self, tmp_path):
        with pytest.raises(ValueError, match=r"does not have \('cls.predictions.* Use head='linear' with head_init='n"):
            speaking(bare_bert(tmp_path))

    def test_a_network_that_is_no_language_model(self, tmp_path):
        with pytest.raises(ValueError, match=r"speaks through the head .* \(no model of language"):
            FewShotModel.build(FewShotConfig(model_name_or_path="conv4", adapter="full", head="verbalizer"))
        with pytest.raises(ValueError, match=r"which .efficientnet_lite0. does not have"):
            FewShotModel.build(
                FewShotConfig(model_name_or_path="efficientnet_lite0", adapter="none", head="verbalizer")
            )
        with pytest.raises(ValueError, match=r"which .* does not have \(a fewshot_conv4"):
            FewShotModel.build(
                FewShotConfig(model_name_or_path=tiny_network(tmp_path, "image"), adapter="full", head="verbalizer")
            )

    @pytest.mark.offline
    @pytest.mark.skipif(packaged_backbone(DEFAULT_BACKBONE) is None, reason="needs the offline extra")
    def test_the_default_backbone(self):
        with pytest.raises(ValueError, match=r"does not have .* Use head='linear' with head_init='names'"):
            build_learner(FewShotConfig(head="verbalizer"))

    @pytest.mark.parametrize(
        ("family", "template", "message"),
        [
            ("bert", CAUSAL, r"has no \{mask\}, and the model fills in masked words"),
            ("llama", MASKED, r"has no \{label\}, and the model goes on with a text"),
            ("llama", "{label} {text}", r"must end with \{label\}, behind \{text\}"),
            ("llama", "{text} {label} on", r"must end with \{label\}, behind \{text\}"),
        ],
    )
    def test_a_template_of_the_other_kind(self, language_folders, family, template, message):
        with pytest.raises(ValueError, match=message):
            speaking(language_folders(family), template=template)

    def test_a_template_that_leaves_no_room(self, language_folders):
        with pytest.raises(ValueError, match=r"max_length=5 leaves no room for a text beside the 5 tokens"):
            speaking(language_folders("bert"), template=MASKED, max_length=5)

    def test_two_phrases_for_a_model_that_says_one(self, language_folders):
        with pytest.raises(ValueError, match="scores one phrase a label"):
            speaking(language_folders("llama"), template=CAUSAL, verbalizer={"music": ["music", "play"]})

    def test_a_head_and_a_model_of_different_settings(self, language_folders):
        silent = FewShotModel.build(tiny_config(language_folders("bert"), adapter="none"))
        with pytest.raises(ValueError, match="head='verbalizer' does not fit the model, which was built with head='l"):
            build_learner(tiny_config(language_folders("bert"), head="verbalizer", learner="protonet"), silent)

    def test_a_learner_with_a_start_of_its_own(self, language_folders):
        with pytest.raises(ValueError, match="learner='snail' starts in its own way"):
            build_learner(tiny_config(language_folders("bert"), head="verbalizer", learner="snail"))
        with pytest.raises(ValueError, match="head='verbalizer' contradicts learner='matching'"):
            build_learner(tiny_config(language_folders("bert"), head="verbalizer", learner="matching"))


def test_the_template_is_never_cut(language_folders):
    model = speaking(language_folders("bert"), template=MASKED, max_length=8)
    words = AutoTokenizer.from_pretrained(language_folders("bert"))
    (ids,) = model.encoder().encode(["play the music on the red lamp"])
    assert words.convert_ids_to_tokens(ids) == ["[CLS]", "play", "the", "music", "set", "[MASK]", "off", "[SEP]"]


def test_a_blank_in_a_text_is_not_read(language_folders):
    encoder = speaking(language_folders("bert"), template=MASKED).encoder()
    assert encoder.encode(["play [MASK] music"]) == encoder.encode(["play music"])


def test_left_padding_is_made_right_padding(language_folders):
    model = speaking(language_folders("llama"), template=CAUSAL)
    left, right = task(model, "left").inputs, task(model, "right").inputs
    found = right_padded(left)
    assert torch.equal(found["attention_mask"], right["attention_mask"])
