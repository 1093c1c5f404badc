"""Every adapter keeps the contract. To add one: a line in ``ADAPTERS``."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partialmethod

import peft
import pytest
import torch

from fewshot_nlp.config import ADAPTERS as NAMES
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.adapters import is_adapted, peft_restores
from tests.contracts import adapter as contract
from tests.contracts.adapter import CHECKS, FILE_CHECKS, Entry, Subject

TASK = {"task_type": peft.TaskType.FEATURE_EXTRACTION}
#: Features are not read from BERT's pooler, and a softmax over keys cancels what their bias adds.
IDLE = ("pooler", "key.bias")

ADAPTERS = {
    "prompt_tuning": Entry({"adapter": "prompt_tuning"}),
    "prompt_tuning from a text": Entry({"adapter": "prompt_tuning", "prompt_tuning_init_text": "play the music"}),
    "prompt_tuning from words": Entry({"adapter": "prompt_tuning", "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prompt_tuning, cls": Entry({"adapter": "prompt_tuning", "pooling": "cls"}),
    "p_tuning": Entry({"adapter": "p_tuning"}),
    "prefix_tuning": Entry({"adapter": "prefix_tuning"}),
    "lora": Entry({"adapter": "lora"}, neutral=True),
    "lora on one layer": Entry(
        {"adapter": "lora"}, lambda: peft.LoraConfig(**TASK, r=2, layers_to_transform=[1]), neutral=True
    ),
    "lora and biases": Entry(
        {"adapter": "lora"}, lambda: peft.LoraConfig(**TASK, r=2, target_modules=["value"], bias="lora_only"), True
    ),
    "rank-stabilised lora": Entry({"adapter": "lora", "use_rslora": True}, neutral=True),
    "dora": Entry({"adapter": "lora", "use_dora": True}, neutral=True),
    "ia3": Entry({"adapter": "ia3"}, neutral=True),
    "bitfit": Entry({"adapter": "bitfit"}, neutral=True, idle=IDLE),
    "layernorm": Entry({"adapter": "layernorm"}, neutral=True),
    "full": Entry({"adapter": "full"}, neutral=True, idle=IDLE),
    "prefix with projection": Entry(
        peft_config=lambda: peft.PrefixTuningConfig(**TASK, num_virtual_tokens=3, prefix_projection=True)
    ),
}


@cache
def subject(name: str, folder: str) -> Subject:
    """Loaded once: no check may leave a trace."""
    return Subject(ADAPTERS[name], folder)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", ADAPTERS)
def test_contract(bert_folder, name, check):
    check(subject(name, bert_folder))


SAVED = [name for name in ADAPTERS if name not in ("p_tuning", "full", "prefix with projection")]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("check", FILE_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", SAVED)
def test_file_contract(bert_folder, name, check):
    check(subject(name, bert_folder))


def test_what_peft_can_restore_is_known(bert_folder):
    """The others lose their network on the way, or are no adapter: the hub saves them whole."""
    modules = {name: subject(name, bert_folder).model.module for name in ADAPTERS}
    assert [name for name, module in modules.items() if peft_restores(module)] == SAVED
    assert [name for name, module in modules.items() if not is_adapted(module)] == ["full"]


def test_every_adapter_is_in_the_table():
    assert {entry.settings.get("adapter") for entry in ADAPTERS.values()} >= set(NAMES) - {"none"}


def fused_attention(monkeypatch, model):
    model.module.set_attn_implementation("sdpa")


def adapter_left_on(monkeypatch, model):
    monkeypatch.setattr(FewShotModel, "frozen_features", lambda self, x: self.features(self.init_params(), x).detach())


def virtual_rows_pooled(monkeypatch, model):
    monkeypatch.setattr("fewshot_nlp.models.model.pool", lambda hidden, mask, pooling: hidden.mean(dim=1))


def global_generator(monkeypatch, model):
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())


def module_never_written(monkeypatch, model):
    monkeypatch.setattr(FewShotModel, "holding", lambda self, params: nullcontext(self.module))


def prompt_unread(monkeypatch, model):
    monkeypatch.setattr(FewShotModel, "features", lambda self, params, x: self.frozen_features(x))


@pytest.mark.parametrize(
    ("flaw", "check"),
    [
        (fused_attention, contract.second_derivatives_are_exact),
        (adapter_left_on, contract.frozen_features_are_the_bare_backbones),
        (virtual_rows_pooled, contract.a_text_is_read_alone),
        (global_generator, contract.same_seed_same_start),
        (module_never_written, contract.holding_is_for_a_while),
        (module_never_written, contract.saved_and_loaded_it_is_the_same),
        (module_never_written, contract.plain_peft_loads_it),
        (prompt_unread, contract.starts_as_it_says),
        (prompt_unread, contract.every_tensor_changes_the_features),
    ],
    ids=lambda value: value.__name__,
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_flaw_is_found(bert_folder, monkeypatch, flaw, check):
    monkeypatch.setattr(Subject, "build", partialmethod(flawed, Subject.build, monkeypatch, flaw))
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(Subject(Entry({"adapter": "prompt_tuning"}), bert_folder))


def flawed(subject, build, monkeypatch, flaw):
    model = build(subject)
    flaw(monkeypatch, model)
    return model
