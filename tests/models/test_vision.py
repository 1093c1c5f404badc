"""Vision backbones: what transformers makes of the same images, at any pooling, with either kind of batch norm."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from transformers import AutoModel, CLIPModel, CvtConfig, CvtModel, ViTModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.textnet.image_processing_pil_textnet import TextNetImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data import ProcessorEncoder
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel, load_backbone
from fewshot_nlp.models.norm import BatchStatistics, batch_norms
from fewshot_nlp.models.scratch import ResNet12Config, ResNet12Model
from tests.tiny import HIDDEN, TINY_VISION, random_batch, tiny_config, tiny_vit

TOKENS, MAPS = ("vit", "dinov2", "clip_vision_model"), ("resnet", "convnext")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """Folders of tiny vision backbones by kind."""
    return {kind: build(tmp_path_factory.mktemp(kind)) for kind, build in TINY_VISION.items()}


@pytest.fixture(scope="module")
def images():
    return random_batch([3, 2], kind="image", dtype=torch.float32).inputs


def model_of(folder, **settings):
    return FewShotModel.build(FewShotConfig(model_name_or_path=folder, **{"adapter": "none", **settings}))


def plain(folder, images):
    """Outputs of transformers' own model and attention."""
    module = AutoModel.from_pretrained(folder)
    module = getattr(module, "vision_model", module).eval()
    with torch.no_grad():
        return module(**images)


@pytest.mark.parametrize("kind", TINY_VISION)
def test_features_are_transformers_own(vision, images, kind):
    model, output = model_of(vision[kind]), plain(vision[kind], images)
    assert model.module.config.model_type == kind and model.hidden_size == HIDDEN and not model.transductive
    torch.testing.assert_close(model.features({}, images), output.pooler_output.flatten(1), rtol=1e-5, atol=1e-5)
    mean = model_of(vision[kind], pooling="mean").features({}, images)
    hidden = output.last_hidden_state
    expected = hidden[:, 1:].mean(1) if kind in TOKENS else hidden.flatten(2).mean(2)
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-5)
    if kind in TOKENS:
        found = model_of(vision[kind], pooling="cls").features({}, images)
        torch.testing.assert_close(found, hidden[:, 0], rtol=1e-5, atol=1e-5)


def test_a_class_token_beside_a_map_of_places(images, tmp_path):
    """CvT's: what stands first in the map is a channel."""
    stages = {"patch_sizes": [3] * 3, "patch_stride": [2] * 3, "patch_padding": [1] * 3, "num_heads": [1] * 3}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CvtModel(
            CvtConfig(num_channels=1, **stages, embed_dim=[4, 8, HIDDEN], depth=[1, 2, 3], initializer_range=0.3)
        ).save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.4], image_std=[0.25]).save_pretrained(tmp_path)
    output = plain(str(tmp_path), images)
    expected = {"cls": output.cls_token_value[:, 0], "mean": output.last_hidden_state.mean((2, 3))}
    for pooling in ("auto", "cls", "mean"):
        model = model_of(str(tmp_path), pooling=pooling)
        found = model.features({}, images)
        torch.testing.assert_close(found, expected[pooling.replace("auto", "cls")], rtol=1e-5, atol=1e-5)
        assert found.std(dim=0).min() > 1e-3 and model.hidden_size == HIDDEN


def test_what_a_backbone_lacks_is_an_error_when_it_is_built(vision):
    for kind, settings, message in (
        ("resnet", {"pooling": "cls"}, "by 16 pixels: pooling='cls' needs a class token"),
        ("vit", {"image_size": 24}, r"images of 24 by 24 pixels: Input image size \(24\*24\) doesn't match"),
    ):
        config = tiny_config(vision[kind], learner="protonet", head="prototype", **settings)
        with pytest.raises(ValueError, match=message):
            build_learner(config)


def test_convolutions_take_images_of_any_size(vision):
    model = model_of(vision["resnet"], image_size=40)
    assert model.encoder()([Image.new("RGB", (30, 20))])["pixel_values"].shape == (1, 1, 40, 40)
    assert model.hidden_size == HIDDEN


def test_a_pooler_without_weights_is_left_out(tmp_path, images):
    """Checkpoints of classifiers have none, and transformers would make one up."""
    folder = tiny_vit(tmp_path)
    bare = ViTModel.from_pretrained(folder, add_pooling_layer=False)
    bare.save_pretrained(folder)
    found = model_of(folder).features({}, images)
    torch.testing.assert_close(found, bare(**images).last_hidden_state[:, 0].detach(), rtol=1e-5, atol=1e-5)
    learner = build_learner(tiny_config(folder, adapter="full", learner="protonet", head="prototype"))
    FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path / "saved")
    loaded = FewShotAdapter.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.learner.model.features(loaded.params, images), found, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="pooling='pooler' is not there"):
        _ = model_of(folder, pooling="pooler").hidden_size


def test_of_clip_the_images_half_is_loaded(vision, caplog):
    module, processor = load_backbone(vision["clip_vision_model"])
    own = CLIPModel.from_pretrained(vision["clip_vision_model"]).vision_model.state_dict()
    assert own.keys() == module.state_dict().keys()
    assert all(torch.equal(value, own[name]) for name, value in module.state_dict().items())
    assert isinstance(processor, ViTImageProcessorPil)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", TINY_VISION)
def test_plain_peft_loads_lora_on_attention_and_convolutions(vision, images, kind, tmp_path):
    learner = build_learner(tiny_config(vision[kind], learner="protonet", head="prototype"))
    rng = torch.Generator().manual_seed(0)
    params = {n: v + 0.2 * torch.randn(v.shape, generator=rng) for n, v in learner.init_params().items()}
    FewShotAdapter(learner, params).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(vision[kind])
    loaded = peft.PeftModel.from_pretrained(getattr(base, "vision_model", base), str(tmp_path)).eval()
    with torch.no_grad():
        found = loaded(**images).pooler_output.flatten(1)
    expected = learner.model.features(params, images).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (expected - learner.model.frozen_features(images)).abs().max() > 1e-3


PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 20, "width": 20}),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20}),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 20}),
    "bit": BitImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 20, "width": 20}),
    "efficientnet": EfficientNetImageProcessorPil(size={"height": 20, "width": 20}, image_std=[0.4, 0.5, 0.6]),
    "bare": ViTImageProcessorPil(size={"height": 20, "width": 20}, do_normalize=False, rescale_factor=1 / 128),
    "bytes": ViTImageProcessorPil(size={"height": 20, "width": 20}, do_normalize=False, do_rescale=False),
}


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=list(PROCESSORS))
def test_pixels_are_the_processors_own(processor):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((32, 32), (50, 41))]
    encoder = ProcessorEncoder(processor)
    found = encoder(pictures)["pixel_values"]
    assert found.shape == (2, 3, 20, 20) and {each.dtype for each in encoder.encode(pictures)} == {torch.uint8}
    expected = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert ProcessorEncoder(processor, size=12)(pictures)["pixel_values"].shape == (2, 3, 12, 12)
    grey = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8))
    assert torch.equal(*(encoder([each])["pixel_values"] for each in (grey, grey.convert("RGB"))))


OTHER_PROCESSORS = {
    "offset": EfficientNetImageProcessorPil(size={"height": 20, "width": 20}, rescale_offset=True),
    "no square": TextNetImageProcessorPil(size={"shortest_edge": 20}),
    "other channels": ViTImageProcessorPil(size={"height": 20, "width": 20}, image_mean=[0.5], image_std=[0.5, 1.0]),
}


@pytest.mark.parametrize("processor", OTHER_PROCESSORS.values(), ids=list(OTHER_PROCESSORS))
def test_a_processor_that_does_something_else_is_refused(processor):
    """Its images would be other ones than those that the backbone was trained on, without a word."""
    with pytest.raises(ValueError, match=f"The image processor {type(processor).__name__} (does|cannot)"):
        ProcessorEncoder(processor)


class TestBatchNorm:
    def test_transductive_is_the_batch_normalised(self, vision, images):
        """The first layer by hand: convolution, then each channel to mean 0 and variance 1 over batch and places."""
        module = model_of(vision["resnet"], batch_norm="transductive").module
        stem = module.embedder.embedder
        with torch.no_grad():
            mapped = stem.convolution(images["pixel_values"])
            found = stem.normalization(mapped)
        mean, variance = mapped.mean((0, 2, 3), keepdim=True), mapped.var((0, 2, 3), correction=0, keepdim=True)
        scaled = (mapped - mean) / (variance + stem.normalization.eps).sqrt()
        expected = scaled * stem.normalization.weight[:, None, None] + stem.normalization.bias[:, None, None]
        torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("mode", ["inductive", "transductive"])
    def test_it_is_what_it_says_and_changes_no_buffer(self, vision, mode):
        learner = build_learner(tiny_config(vision["resnet"], adapter="full", learner="maml", batch_norm=mode))
        assert learner.transductive == (mode == "transductive")
        before = {name: value.clone() for name, value in learner.model.module.state_dict().items()}
        batch = random_batch([2, 2], kind="image", dtype=torch.float32)
        params = learner.init_params()
        together = learner.model.features(params, batch.inputs)
        alone = learner.model.features(params, {"pixel_values": batch.inputs["pixel_values"][:2]})
        assert torch.allclose(alone, together[:2], atol=1e-5) == (mode == "inductive")
        learner.adapt(params, batch)
        after = learner.model.module.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(value, before[name]) for name, value in after.items())

    def test_one_image_in_one_place_has_no_statistics(self, vision):
        """torch would say that more values are expected "when training"."""
        model = model_of(vision["resnet"], batch_norm="transductive", image_size=8)
        images = model.encoder()([Image.linear_gradient("L"), Image.radial_gradient("L")])
        assert model.features({}, images).std(dim=0).max() > 0
        with pytest.raises(ValueError, match=r"One image has no statistics .* Give 2 images or more"):
            model.features({}, {name: value[:1] for name, value in images.items()})

    def test_the_choice_is_saved_with_the_adapter(self, vision, tmp_path):
        learner = build_learner(tiny_config(vision["resnet"], learner="protonet", batch_norm="transductive"))
        FewShotAdapter(learner, learner.init_params()).save_pretrained(tmp_path)
        loaded = FewShotAdapter.from_pretrained(tmp_path).learner
        assert loaded.transductive
        assert all(isinstance(norm, BatchStatistics) for _, norm in batch_norms(loaded.model.module))

    @pytest.mark.parametrize(
        ("kind", "mode", "message"),
        [
            ("vit", "transductive", "ViTModel has none: it answers every input alone"),
            ("convnext", "inductive", "ConvNextModel has none"),
            ("conv4", "inductive", "needs running statistics, and Conv4Model keeps none"),
        ],
    )
    def test_where_there_is_no_choice_it_is_an_error(self, vision, kind, mode, message):
        with pytest.raises(ValueError, match=message):
            model_of(vision.get(kind, kind), batch_norm=mode)
        with pytest.raises(ValueError, match="batch_norm='both' is not known"):
            FewShotConfig(batch_norm="both")


class TestResNet12:
    def test_it_has_the_papers_weights_and_sizes(self):
        """12.4 million weights at the widths of Lee et al., and all 5 × 5 places of the last block as features."""
        model = ResNet12Model(ResNet12Config())
        widths, before, expected = [64, 160, 320, 640], 3, 0
        for width in widths:
            expected += 9 * (before * width + 2 * width * width) + before * width + 8 * width
            before = width
        assert sum(value.numel() for value in model.parameters()) == expected == 12_424_320
        with torch.no_grad():
            assert model(torch.zeros(2, 3, 84, 84)).pooler_output.shape == (2, 640 * 25)
        assert model_of("resnet12", pooling="mean", adapter="full").hidden_size == 640

    def test_a_block_is_three_convolutions_beside_one(self):
        config = ResNet12Config(num_channels=1, image_size=16, hidden_sizes=[3, 4, 5, 6], norm="group")
        block = ResNet12Model(config).blocks[1]
        features = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        convolutions, norms = block.layers[0::3], block.layers[1::3]
        path = features
        for i, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
            path = norm(torch.conv2d(path, convolution.weight, padding=1))
            path = path.where(path > 0, 0.1 * path) if i < 2 else path
        total = path + block.shortcut[1](torch.conv2d(features, block.shortcut[0].weight))
        active = total.where(total > 0, 0.1 * total)
        expected = active.unfold(2, 2, 2).unfold(3, 2, 2).amax((4, 5))
        torch.testing.assert_close(block(features), expected)

    def test_bad_shapes_are_errors(self):
        with pytest.raises(ValueError, match="must be four numbers of filters"):
            ResNet12Config(hidden_sizes=[64, 128])
        with pytest.raises(ValueError, match="image_size=8 is out of range"):
            ResNet12Config(image_size=8)


def test_a_network_from_scratch_has_its_own_size():
    with pytest.raises(ValueError, match="image_size=32 is not the 28 that the network 'conv4' is made for"):
        _ = model_of("conv4", image_size=32).hidden_size
