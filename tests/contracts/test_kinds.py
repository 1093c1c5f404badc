"""Every kind of adapter that PEFT has either keeps the contract or is refused with the reason when it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from tests.contracts import adapter as contract
from tests.contracts.adapter import Entry, Subject
from tests.contracts.families import FAMILIES

TASK = {"task_type": "FEATURE_EXTRACTION"}
#: Settings of each kind that fit 16 units.
WORKING: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 3, "target_r": 2, "total_step": 10},
    "ADAMSS": {"r": 4, "num_subspaces": 2, "subspace_rank": 1},
    "BEFT": {},
    "BOFT": {"boft_block_size": 4},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "DEFT": {"r": 2},
    "DELORA": {"r": 2},
    "FOURIERFT": {"n_frequency": 10},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 2, "gralora_k": 2},
    "HIRA": {"r": 2},
    "HRA": {"r": 2},
    "IA3": {},
    "LN_TUNING": {"target_modules": ["LayerNorm", "input_layernorm"]},
    "LOHA": {"r": 2},
    "LOKR": {"r": 2},
    "LORA": {"r": 2},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 4},
    "PEANUT": {"r": 2},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 2},
    "PVERA": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SUPERTUNING": {},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6, 7, 8]},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 8},
}
#: These know Llama and its like alone.
DECODERS_ONLY: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1},
    "SHADOW": {"r": 2, "update_hidden_size": 4},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "C3A": ({"block_size": 4}, "is not the derivative of the forward pass"),
    "CPT": ({"task_type": "CAUSAL_LM", "cpt_token_ids": [5]}, "labels of a language model's tokens"),
    "FROD": ({}, "sparse matrices"),
    "LILY": ({"r": 2}, "mean over the batch"),
    "MULTITASK_PROMPT_TUNING": ({"num_virtual_tokens": 3}, "number of a task"),
    "OSF": ({"target_modules": ["query"], "effective_rank": 4}, "hooks on the module's own parameters"),
    "POLY": ({"r": 2}, "number of a task"),
    "SHIRA": ({"r": 2}, "has no gradient"),
    "TINYLORA": ({"u": 4}, "one module that stands in several layers"),
    "UNILORA": ({"r": 2, "theta_d_length": 16}, "one module that stands in several layers"),
    "VBLORA": ({"r": 2, "num_vectors": 6, "vector_length": 4, "topk": 2}, "one module that stands in several layers"),
    "XLORA": ({"hidden_size": 16, "adapters": {"one": "nowhere"}}, "trained already"),
}
#: Of GLORA, factors of biases, which are zero here; of SHADOW, what the last layer hands on to none.
IDLE = ("glora_D", "layers.1.shadow_update")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    # Of BOFT, which has a faster way on CUDA.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
    # Of BEFT on a model without biases.
    pytest.mark.filterwarnings("ignore:Detected that the base layer has no bias:UserWarning"),
]


@pytest.fixture(scope="module")
def folders(bert_folder: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {"bert": bert_folder, "llama": FAMILIES["llama"].save(Path(tmp_path_factory.mktemp("llama")))}


def entry(kind: str, settings: dict[str, Any]) -> Entry:
    def config() -> peft.PeftConfig:
        return PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](**{**TASK, **settings})

    return Entry({"adapter": "lora"}, config, idle=IDLE)


def test_every_kind_is_in_one_table():
    tables = (WORKING, DECODERS_ONLY, REFUSED)
    assert sum(map(len, tables)) == len({*WORKING, *DECODERS_ONLY, *REFUSED})
    assert {*WORKING, *DECODERS_ONLY, *REFUSED} == {kind.value for kind in peft.PeftType}


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *((kind, "bert") for kind in WORKING),
        *((kind, "llama") for kind in DECODERS_ONLY),
        *(pytest.param(kind, "llama", marks=pytest.mark.full) for kind in WORKING),
    ],
)
def test_it_keeps_the_contract(folders, kind, family):
    subject = Subject(entry(kind, {**WORKING, **DECODERS_ONLY}[kind]), folders[family])
    contract.every_tensor_changes_the_features(subject)
    contract.frozen_features_are_the_bare_backbones(subject)
    contract.holding_is_for_a_while(subject)
    contract.same_seed_same_start(subject)
    contract.a_text_is_read_alone(subject)
    contract.second_derivatives_are_exact(subject)
    contract.plain_peft_loads_it(subject)
    if kind != "P_TUNING":
        contract.saved_and_loaded_it_is_the_same(subject)


@pytest.mark.parametrize("kind", REFUSED)
def test_it_is_refused_with_the_reason(bert_folder, kind):
    settings, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"PEFT's {kind} cannot be meta-learned.*{reason}.*Use adapter='lora'"):
        Subject(entry(kind, settings), bert_folder)


@pytest.mark.parametrize("kind", DECODERS_ONLY)
def test_what_knows_decoders_alone_says_so(bert_folder, kind):
    with pytest.raises(ValueError, match=f"PEFT cannot put PeftType.{kind} on the backbone .*model type 'bert'"):
        Subject(entry(kind, DECODERS_ONLY[kind]), bert_folder)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "changes the backbone's own weights"),
        ({"init_lora_weights": "olora"}, "changes the backbone's own weights"),
        ({"velora_config": {}}, "LORA with velora_config .*estimates its own gradient"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "LORA with layer_replication .*changes the backbone"),
    ],
)
def test_settings_of_lora_that_are_refused(bert_folder, settings, reason):
    with pytest.raises(ValueError, match=reason):
        Subject(entry("LORA", {"r": 2, "target_modules": ["query", "value"], **settings}), bert_folder)
