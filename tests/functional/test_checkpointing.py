"""Gradient checkpointing under fast weights: what is computed again is computed with the same weights."""

import warnings

import pytest
import torch
from torch.func import functional_call
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig

from fewshot_nlp.functional.call import call, trainable

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
SMALL = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS = {
    "bert": BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "gpt2": GPT2Config(
        vocab_size=12, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    ),
    "llama": LlamaConfig(**SMALL, use_cache=False),
}  # fmt: skip


def build(shape, checkpointing):
    torch.manual_seed(0)
    config = CONFIGS[shape]
    config._attn_implementation = "eager"
    module = AutoModel.from_config(config).double().train()
    for name, value in module.named_parameters():
        value.requires_grad_("pooler" not in name)
    if checkpointing:
        with warnings.catch_warnings():
            # transformers is renaming it.
            warnings.simplefilter("ignore", FutureWarning)
            module.gradient_checkpointing_enable()
    return module


def meta_gradient(module, forward):
    """Of two steps of gradient descent, in one graph."""
    theta = {name: dict(module.named_parameters())[name].detach().requires_grad_() for name in trainable(module)}
    fast = theta
    for _ in range(2):
        loss = forward(fast).last_hidden_state.square().mean()
        grads = torch.autograd.grad(loss, [*fast.values()], create_graph=True, materialize_grads=True)
        fast = {name: value - 0.3 * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
    loss = forward(fast).last_hidden_state[:, 1].pow(3).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [*theta.values()], materialize_grads=True)])


def ours(module):
    return meta_gradient(module, lambda params: call(module, trainable(module), params, input_ids=IDS))


@pytest.mark.parametrize("shape", CONFIGS)
def test_the_gradient_is_that_without_checkpointing(shape):
    expected = ours(build(shape, False))
    torch.testing.assert_close(ours(build(shape, True)), expected, rtol=1e-9, atol=1e-12)


def test_transformers_own_checkpointing_sees_other_weights():
    expected = ours(build("bert", False))
    module = build("bert", True)
    wrong = meta_gradient(module, lambda params: functional_call(module, params, kwargs={"input_ids": IDS}))
    assert (wrong - expected).norm() > 0.01 * expected.norm(), "if this is mended, call() need not care any more"


def test_layers_are_run_again_and_the_module_is_left_as_it_was():
    module, runs = build("bert", True), []
    function = module.encoder.layer[0]._gradient_checkpointing_func
    module.encoder.layer[0].attention.register_forward_hook(lambda *_: runs.append(1))
    theta = {name: dict(module.named_parameters())[name].detach().requires_grad_() for name in trainable(module)}
    loss = call(module, trainable(module), theta, input_ids=IDS).last_hidden_state.square().mean()
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2
    assert all(value.grad is None for value in module.parameters())
    assert module.encoder.layer[0]._gradient_checkpointing_func is function
