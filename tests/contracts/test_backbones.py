"""Every backbone with every adapter under every kind of learner: it keeps the contract, or is refused and says why."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
from transformers import AlbertConfig, DebertaV2Config

from fewshot_nlp.config import ADAPTERS
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import load_backbone
from fewshot_nlp.models.adapters import lora_targets
from tests.contracts import backbone as contract
from tests.contracts.backbone import LEARNERS, REFUSED, SHELF, SUPPORTED, Cell, cell, settings, takes
from tests.contracts.families import FAMILIES, save_text, text_configs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
CHECKS = (
    contract.meta_gradient_is_exact,
    contract.nothing_is_left_behind,
    contract.saved_and_loaded_it_answers_the_same,
)


@pytest.fixture(scope="session")
def family_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny random model of each family."""
    return {name: family.save(Path(tmp_path_factory.mktemp(name))) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize(("family", "adapter"), SUPPORTED)
def test_contract(family_folders, family, adapter, learner, check):
    if not takes(adapter, learner):
        with pytest.raises(ValueError, match=f"learner='{learner}' adapts the adapter, and adapter='none' has none"):
            build_learner(settings(family_folders[family], adapter, learner))
        return
    check(cell(family, adapter, family_folders[family]), learner)


@pytest.mark.parametrize(("family", "adapter"), SUPPORTED)
def test_plain_libraries_read_it(family_folders, family, adapter):
    contract.plain_libraries_read_it(cell(family, adapter, family_folders[family]))


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        pytest.param(family, adapter, marks=[] if adapter == "lora" else [pytest.mark.full])
        for family, adapter in SUPPORTED
        if adapter != "none"
    ],
)
def test_an_accelerator_changes_nothing(family_folders, family, adapter):
    contract.an_accelerator_changes_nothing(cell(family, adapter, family_folders[family]))


@pytest.mark.parametrize(("family", "adapter"), [each for each in SUPPORTED if FAMILIES[each[0]].kind == "text"])
def test_a_text_is_read_alone(family_folders, family, adapter):
    contract.a_text_is_read_alone(cell(family, adapter, family_folders[family]))


#: Two layers that stand for four, each run twice (by default all of Albert's are one); and a convolution beside the
#: first layer.
VARIANTS = {
    "albert of two groups": lambda: AlbertConfig(
        **text_configs()["albert"].to_diff_dict() | {"num_hidden_layers": 4, "num_hidden_groups": 2}
    ),
    "deberta-v2 with a convolution": lambda: DebertaV2Config(
        **text_configs()["deberta-v2"].to_diff_dict() | {"conv_kernel_size": 3}
    ),
}


@pytest.mark.parametrize("name", [*(name for name in FAMILIES if name != "albert"), *VARIANTS])
def test_the_trunk_changes_nothing(family_folders, tmp_path, name):
    family = FAMILIES[name.split(" ")[0]]
    folder = save_text(VARIANTS[name](), tmp_path) if name in VARIANTS else family_folders[name]
    targets = "|".join(lora_targets(load_backbone(folder)[0]))
    # The second of the outermost list of layers: blocks, or the stages that hold them.
    config = peft.LoraConfig(
        r=2, target_modules=rf"[a-z_.]*\.?(layers?|h|stages|albert_layer_groups|block)\.1\..*\.({targets})"
    )
    contract.the_trunk_changes_nothing(Cell(family, "lora", folder, config))


@pytest.mark.parametrize(("family", "adapter"), REFUSED)
def test_what_cannot_be_is_refused_with_a_remedy(family_folders, family, adapter):
    with pytest.raises(ValueError, match=REFUSED[family, adapter]):
        build_learner(settings(family_folders[family], adapter))


def test_every_adapter_is_on_the_shelf():
    assert {each["adapter"] for each in SHELF.values()} == set(ADAPTERS)
