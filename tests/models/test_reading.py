"""What a backbone cannot read is one clear error before any training, and what the error offers works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    BartConfig,
    CanineConfig,
    ClapConfig,
    CLIPTextConfig,
    ConvBertConfig,
    FNetConfig,
    LongT5Config,
    Mamba2Config,
    MambaConfig,
    MobileBertConfig,
    NystromformerConfig,
    PreTrainedConfig,
    RwkvConfig,
    SiglipConfig,
    SiglipModel,
    SwitchTransformersConfig,
    T5GemmaConfig,
    ViltConfig,
    Wav2Vec2Config,
    WhisperConfig,
    XLMConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.stacking import refusal
from fewshot_nlp.models import FewShotModel, load_backbone
from fewshot_nlp.models.backbone import ATTENTION, _attention
from tests.contracts import backbone as contract
from tests.contracts.backbone import PROMPTS, Cell, settings
from tests.contracts.families import Family, save_text, text_configs
from tests.tiny import HIDDEN, PATCHES, SPECIAL, WORDS, random_batch, random_episode

VOCABULARY = len(SPECIAL + WORDS)
LAYERS = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": 2, "intermediate_size": 32}
ENDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
HALVES = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
CONVOLUTIONS = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2}
CONFIGS: dict[str, PreTrainedConfig] = {
    "bart": BartConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
        decoder_start_token_id=2, init_std=0.3, **ENDS,
    ),
    "canine": CanineConfig(**LAYERS, num_attention_heads=2, max_position_embeddings=128),
    "convbert": ConvBertConfig(**LAYERS, num_attention_heads=4, embedding_size=HIDDEN, max_position_embeddings=128),
    "mobilebert": MobileBertConfig(
        **LAYERS, num_attention_heads=2, embedding_size=HIDDEN, intra_bottleneck_size=HIDDEN,
        max_position_embeddings=128, true_hidden_size=HIDDEN,
    ),
    "nystromformer": NystromformerConfig(
        **LAYERS, num_attention_heads=2, max_position_embeddings=128, num_landmarks=4, segment_means_seq_len=4,
    ),
    "clap": ClapConfig(
        text_config={**LAYERS, "num_attention_heads": 2},
        audio_config={
            "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2],
            "spec_size": 32, "num_mel_bins": 8, "window_size": 2, "patch_stride": [4, 4],
        },
        projection_dim=8,
    ),
    "clip_text_model": CLIPTextConfig(**LAYERS, num_attention_heads=2, max_position_embeddings=128),
    "fnet": FNetConfig(**LAYERS),
    "longt5": LongT5Config(**HALVES),
    "mamba": MambaConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=4, num_hidden_layers=2),
    "mamba2": Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, state_size=4, num_hidden_layers=2, num_heads=4, head_dim=8,
        n_groups=1,
    ),
    "rwkv": RwkvConfig(**LAYERS, attention_hidden_size=HIDDEN),
    "siglip": SiglipConfig(
        text_config={**LAYERS, "num_attention_heads": 2, "max_position_embeddings": 128},
        vision_config={**PATCHES, "intermediate_size": 32},
    ),
    "switch_transformers": SwitchTransformersConfig(**HALVES, num_experts=2),
    "t5gemma": T5GemmaConfig(
        **{half: {**LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1} for half in ("encoder", "decoder")}
    ),
    "vilt": ViltConfig(**LAYERS, num_attention_heads=2, image_size=16, patch_size=8, num_channels=1),
    "wav2vec2": Wav2Vec2Config(
        **LAYERS, **CONVOLUTIONS, num_attention_heads=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    ),
    "whisper": WhisperConfig(
        vocab_size=VOCABULARY, d_model=HIDDEN, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=4, **ENDS,
    ),
    "xlm": XLMConfig(
        vocab_size=VOCABULARY, emb_dim=HIDDEN, n_layers=2, n_heads=2, max_position_embeddings=128, pad_index=0,
        bos_index=2, eos_index=3, init_std=0.3,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny random models by ``model_type``, made when they are asked for."""
    made: dict[str, str] = {}

    def folder(name: str) -> str:
        if name not in made:
            made[name] = save_text(CONFIGS[name], Path(tmp_path_factory.mktemp(name)))
        return made[name]

    return folder


@pytest.mark.parametrize("adapter", ["none", "lora", "prompt_tuning", "full"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "longt5",
            r"\(LongT5Model\) makes no features of a text by itself: its decoder must be told .* Use .* BERT.* T5",
        ),
        (
            "switch_transformers",
            r"\(SwitchTransformersModel\) makes no .*: its decoder must be told .* Use .* BERT.* T5",
        ),
        ("t5gemma", r"\(T5GemmaModel\) makes no features .*: its decoder must be told .* Use .* BERT.* T5"),
        ("wav2vec2", r"\(Wav2Vec2Model\) makes no features .* it takes input_values, .* Use a backbone of texts alone"),
        ("whisper", r"\(WhisperModel\) makes no features .* it takes input_features, .* Use a backbone of texts alone"),
        ("vilt", r"\(ViltModel\) makes no features .* specify either pixel_values .* Use a backbone of texts alone"),
        ("clap", r"\(ClapModel\) makes no features .* it takes input_features beside tokens .* such as BERT"),
        (
            "siglip",
            r"\(SiglipModel\) .* several models.* vision_model \(SiglipVisionModel\), .*\.vision_model\.save",
        ),
    ],
)
def test_what_wants_more_than_a_text(folders, name, message, adapter):
    with pytest.raises(ValueError, match=message):
        FewShotModel.build(settings(folders(name), adapter))


@pytest.mark.parametrize(
    ("name", "takes"), [("clap", "input_features"), ("wav2vec2", "input_values"), ("whisper", "input_features")]
)
def test_a_backbone_of_sounds_does_not_speak(folders, name, takes):
    """Whisper's decoder is a causal language model to transformers; head='linear' would be refused as well."""
    with pytest.raises(ValueError, match=f"makes no features .* it takes {takes}.* Use a backbone of texts alone"):
        FewShotModel.build(settings(folders(name), "none", head="verbalizer", use_label_names=True))


def test_the_tower_that_the_error_names_is_a_backbone(folders, tmp_path):
    whole = AutoModel.from_pretrained(folders("siglip"))
    assert isinstance(whole, SiglipModel)
    whole.vision_model.save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4], image_std=[0.25]).save_pretrained(tmp_path)
    model = FewShotModel.build(FewShotConfig(model_name_or_path=str(tmp_path), adapter="none"))
    images = random_batch([2, 2], kind="image", dtype=torch.float32).inputs
    expected = whole.eval().vision_model(**images).pooler_output
    torch.testing.assert_close(model.frozen_features(images), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", PROMPTS)
def test_an_encoder_decoder_takes_no_prompt(folders, adapter):
    message = "BartModel, of model type 'bart', reads these in its encoder and in its decoder.* Use adapter='lora'"
    with pytest.raises(ValueError, match=message):
        build_learner(settings(folders("bart"), adapter))


@pytest.mark.parametrize("adapter", ["prompt_tuning", "p_tuning"])
def test_a_prompt_needs_a_table_of_tokens(folders, adapter):
    with pytest.raises(ValueError, match=r"CanineModel, of model type 'canine', has no table of these. Use .*'lora'"):
        build_learner(settings(folders("canine"), adapter))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["lora", "ia3", "bitfit", "layernorm", "full"])
def test_an_encoder_decoder_takes_what_is_offered(folders, adapter):
    cell = Cell(Family("bart", "text", save_text), adapter, folders("bart"))
    contract.meta_gradient_is_exact(cell, "maml")
    contract.a_text_is_read_alone(cell)


@pytest.mark.parametrize(
    ("name", "adapter"),
    [(name, adapter) for name in ("convbert", "fnet", "nystromformer") for adapter in ("full", "prompt_tuning")]
    + [("canine", "full"), ("canine", "layernorm")],
)
def test_what_sees_its_padding_is_given_none(folders, name, adapter):
    """Convolutions and Fourier transforms over tokens know no mask: only texts of one length go together."""
    cell = Cell(Family(name, "text", save_text), adapter, folders(name))
    assert cell.model.sees_padding
    contract.a_text_is_read_alone(cell)
    # In float64 CANINE's mask is not a number.
    if name != "canine":
        contract.meta_gradient_is_exact(cell, "maml")
    short = {n: t[:, :2] for n, t in cell.inputs.items()}
    params = cell.params(cell.learner("protonet"))
    assert cell.model.features(params, short).isfinite().all()
    assert "texts of one length together" in cell.learner("maml").describe(cell.episode().support)
    assert refusal(cell.learner("maml")) == "its backbone sees the padding that makes texts equally long"


def test_what_padding_is_depends_on_the_checkpoint(folders):
    """MobileBERT reads the neighbours of a token; of padding it reads nothing, if that is what it has learned."""
    module, tokenizer = load_backbone(folders("mobilebert"))
    config = FewShotConfig(adapter="none")
    assert not FewShotModel(module, tokenizer, config).sees_padding
    module.embeddings.word_embeddings.weight[tokenizer.pad_token_id] = 1.0
    assert FewShotModel(module, tokenizer, config).sees_padding


@pytest.mark.parametrize("name", [*text_configs(), "bart", "clip_text_model", "mamba"])
def test_what_does_not_is_padded(name, folders, tmp_path):
    folder = folders(name) if name in CONFIGS else save_text(text_configs()[name], tmp_path)
    assert not FewShotModel.build(settings(folder, "none")).sees_padding


@pytest.mark.parametrize("adapter", ["prompt_tuning", "p_tuning"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_prompt_needs_no_attention(folders, name, adapter):
    """PEFT asks for a number of heads, of which nothing but a prefix is made."""
    cell = Cell(Family(name, "text", save_text), adapter, folders(name))
    contract.meta_gradient_is_exact(cell, "maml")
    contract.a_text_is_read_alone(cell)
    contract.saved_and_loaded_it_answers_the_same(cell, "protonet")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fnet", "FNetModel, of model type 'fnet', does not, and would ignore the prefix. Use adapter='prompt_tuning'"),
        (
            "mamba",
            "MambaModel, of model type 'mamba', does not, and would ignore the prefix. Use adapter='prompt",
        ),
        # Its state has the name that others' keys and values have.
        ("mamba2", "Mamba2Model, of model type 'mamba2', does not, and would ignore the prefix"),
        (
            "xlm",
            r"XLMModel, .* 'xlm', does not read .* keys and values .*\(AssertionError\). Use adapter='prompt_",
        ),
    ],
)
def test_a_prefix_needs_keys_and_values(folders, name, message):
    with pytest.raises(ValueError, match=message):
        FewShotModel.build(settings(folders(name), "prefix_tuning"))
    FewShotModel.build(settings(folders(name), "prompt_tuning"))


def test_a_text_that_cannot_stand_behind_a_prompt(folders):
    with pytest.raises(ValueError, match=r"CLIPTextModel, .* does not read .* embeddings .* Use adapter='lora'"):
        FewShotModel.build(settings(folders("clip_text_model"), "prompt_tuning"))
    FewShotModel.build(settings(folders("clip_text_model"), "layernorm"))


@pytest.mark.parametrize("adapter", ["prompt_tuning", "lora", "full", "peft"])
def test_a_backbone_without_gradients(folders, adapter):
    own = peft.LoraConfig(target_modules=["key"]) if adapter == "peft" else None
    config = settings(folders("rwkv"), "none" if own else adapter, "protonet")
    with pytest.raises(ValueError, match=r"model type 'rwkv', cannot be meta-learned: .* in place.* Use adapter='none"):
        FewShotModel.build(config, own)
    # As it is, it can be learned on.
    learner = build_learner(settings(folders("rwkv"), "none", "protonet"))
    grads = learner.meta_grad(learner.init_params(), [random_episode([1, 2], dtype=torch.float32)]).grads
    assert all(grad.isfinite().all() for grad in grads.values())


def test_a_short_window_is_no_fault(folders, tmp_path):
    """Fewer positions than the text that is tried has."""
    CONFIGS["bart"].max_position_embeddings, before = 6, CONFIGS["bart"].max_position_embeddings
    try:
        folder = save_text(CONFIGS["bart"], tmp_path)
    finally:
        CONFIGS["bart"].max_position_embeddings = before
    assert load_backbone(folder)[0].config.max_position_embeddings == 6


def test_an_attention_that_is_told_more_than_ours_knows_stays_the_models_own(tmp_path, monkeypatch):
    """T5's is told of distances; here ours is made deaf to them."""
    folder = save_text(text_configs()["t5"], tmp_path)
    heard, _ = load_backbone(folder)
    assert heard.config._attn_implementation == ATTENTION
    ids = torch.arange(4, 12)[None]
    expected = heard(ids).last_hidden_state

    def deaf(*args: Any, position_bias: Any = None, **kwargs: Any) -> Any:
        return _attention(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, ATTENTION, deaf)
    module, _ = load_backbone(folder)
    assert module.config._attn_implementation == "eager"
    torch.testing.assert_close(module(ids).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
