"""Meta-gradients against a second computation, written out by hand, in float64.

The oracle shares nothing with the package but the backbone: it follows the papers' equations with ``torch.func``,
whose ``grad`` treats adapter and head as independent variables of the support loss.
"""

from __future__ import annotations

import higher
import pytest
import torch
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy, normalize

from fewshot_nlp.learners import build_learner
from tests.tiny import HIDDEN, random_episode, tiny_config

EPISODE_COUNTS = [1, 3, 2]


class ByTheBook:
    """Finn et al. 2017, Raghu et al. 2020, Nichol et al. 2018, Triantafillou et al. 2020, line by line."""

    def __init__(self, learner, episode):
        self.learner, self.config = learner, learner.config
        self.support, self.query = episode.support, episode.query

    def pooled(self, body, batch):
        names = {name.removeprefix("model."): value for name, value in body.items()}
        hidden = functional_call(self.learner.model.module, names, kwargs=batch.inputs).last_hidden_state
        mask = batch.inputs["attention_mask"]
        hidden = hidden[:, hidden.shape[1] - mask.shape[1] :]
        return sum(hidden[:, t] * mask[:, t, None] for t in range(mask.shape[1])) / mask.sum(1, keepdim=True)

    def features(self, body, batch):
        found = self.pooled(body, batch)
        return normalize(found, dim=1) if self.config.distance == "cosine" else found

    def prototypes(self, body):
        found = self.pooled(body, self.support)
        means = torch.stack([found[self.support.labels == c].mean(0) for c in range(self.support.n_way)])
        if self.config.distance == "cosine":
            return normalize(means, dim=1), torch.zeros(len(means), dtype=means.dtype)
        return 2 * means, -(means**2).sum(1)

    def loss(self, theta, body, head, batch):
        weight, bias = head
        logits = torch.exp(theta["head.log_scale"]) * (self.features(body, batch) @ weight.T + bias)
        return cross_entropy(logits, batch.labels)

    def start(self, theta, body):
        if self.config.head_init == "prototype":
            return self.prototypes(body)
        return torch.zeros(self.support.n_way, HIDDEN).double(), torch.zeros(self.support.n_way).double()

    def adapt(self, theta, second_order=True, fast_body=True):
        body = {name: value for name, value in theta.items() if name.startswith("model.")}
        head = self.start(theta, body)
        alpha, beta = self.config.inner_learning_rate, self.config.head_learning_rate
        for _ in range(self.config.inner_steps):
            by_body, by_head = grad(lambda b, h: self.loss(theta, b, h, self.support), argnums=(0, 1))(body, head)
            if not second_order:
                by_body = {name: value.detach() for name, value in by_body.items()}
                by_head = tuple(value.detach() for value in by_head)
            if fast_body:
                body = {name: value - alpha * by_body[name] for name, value in body.items()}
            head = tuple(value - beta * by_head[i] for i, value in enumerate(head))
        return body, head

    def meta_gradient(self, theta, **options):
        return grad(lambda t: self.loss(t, *self.adapt(t, **options), self.query))(theta)


def learner_and_params(folder, **settings):
    config = tiny_config(folder, **{"head_learning_rate": 0.3, **settings})
    learner = build_learner(config)
    learner.model.module.double()
    rng = torch.Generator().manual_seed(1)
    # Away from LoRA's zero start, where half of the gradients vanish.
    return learner, {
        name: value.double() + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
        for name, value in learner.init_params().items()
    }


def assert_equal(found, expected, tolerance=1e-9):
    assert found.keys() == expected.keys()
    norm = torch.sqrt(sum(value.square().sum() for value in expected.values()))
    assert norm > 1e-4
    error = torch.sqrt(sum((found[name] - value).square().sum() for name, value in expected.items()))
    assert error / norm < tolerance


SETTINGS = [
    pytest.param({"head_init": init, "distance": distance, "adapter": adapter}, id=f"{adapter}-{init}-{distance}")
    for adapter in ("lora", "prompt_tuning")
    for init, distance in (("prototype", "cosine"), ("prototype", "euclidean"), ("zero", "cosine"))
]
ORDERS = {"maml": {}, "fomaml": {"second_order": False}, "anil": {"fast_body": False}}


@pytest.mark.parametrize("method", ORDERS)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("steps", [1, 3])
def test_gradient_is_the_papers(bert_folder, method, settings, steps):
    learner, params = learner_and_params(
        bert_folder, learner=method, inner_steps=steps, num_virtual_tokens=3, head_scale=2.0, **settings
    )
    episodes = [random_episode(EPISODE_COUNTS, seed=seed) for seed in (0, 1)]
    found = learner.meta_grad(params, episodes)
    parts = [ByTheBook(learner, episode).meta_gradient(params, **ORDERS[method]) for episode in episodes]
    assert_equal(found.grads, {name: parts[0][name] + parts[1][name] for name in parts[0]})
    assert found.episodes == 2


@pytest.mark.parametrize("adapter", ["lora", "prompt_tuning"])
def test_reptile_is_start_minus_adapted(bert_folder, adapter):
    learner, params = learner_and_params(bert_folder, learner="reptile", adapter=adapter, head_init="zero")
    episode = random_episode(EPISODE_COUNTS)
    body, _ = ByTheBook(learner, episode).adapt(params)
    expected = {name: params[name] - value for name, value in body.items()}
    expected["head.log_scale"] = torch.zeros((), dtype=torch.float64)
    assert_equal(learner.meta_grad(params, [episode]).grads, expected)


def test_orders_differ(bert_folder):
    """First order is an approximation: equal gradients would mean that one of them is not what it says."""
    episode = random_episode(EPISODE_COUNTS)
    exact, params = learner_and_params(bert_folder, learner="maml")
    first, _ = learner_and_params(bert_folder, learner="fomaml")
    a, b = exact.meta_grad(params, [episode]).grads, first.meta_grad(params, [episode]).grads
    difference = sum((a[name] - b[name]).norm() for name in a) / sum(a[name].norm() for name in a)
    assert difference > 1e-3


def test_maml_equals_higher_on_a_full_model(bert_folder):
    """Every weight of the backbone adapted, as higher (Grefenstette et al. 2019) does it, under a fixed read-out."""
    learner, params = learner_and_params(bert_folder, learner="maml", adapter="full", head_init="zero")
    learner.head.start = lambda params, features, labels, n_way: {}
    learner.head.logits = lambda params, state, features: 2.0 * features[:, :3]
    episode = random_episode(EPISODE_COUNTS)
    module = learner.model.module
    learner.model.load_params(params)

    def loss(model, batch):
        mask = batch.inputs["attention_mask"][..., None]
        pooled = (model(**batch.inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
        return cross_entropy(2.0 * pooled[:, :3], batch.labels)

    optimiser = torch.optim.SGD(module.parameters(), lr=learner.config.inner_learning_rate)
    with higher.innerloop_ctx(module, optimiser, copy_initial_weights=False) as (fast, inner):
        for _ in range(learner.config.inner_steps):
            inner.step(loss(fast, episode.support))
        loss(fast, episode.query).backward()
    # The pooler takes no part: no gradient there is a zero here.
    expected = {
        f"model.{name}": torch.zeros_like(value) if value.grad is None else value.grad
        for name, value in module.named_parameters()
    }
    found = learner.meta_grad(params, [episode]).grads
    assert found.pop("head.log_scale") == 0
    assert_equal(found, expected)


def test_finite_differences(bert_folder):
    """The meta-gradient is the slope of the query loss after adaptation."""
    learner, params = learner_and_params(bert_folder, learner="maml")
    episode = random_episode(EPISODE_COUNTS)
    rng = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(v.shape, generator=rng, dtype=torch.float64) for n, v in params.items()}
    step = 1e-6

    def loss_at(distance):
        moved = {name: value + distance * direction[name] for name, value in params.items()}
        return learner.meta_grad(moved, [episode]).loss

    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    grads = learner.meta_grad(params, [episode]).grads
    torch.testing.assert_close(slope, sum((grads[n] * direction[n]).sum() for n in grads), rtol=1e-6, atol=1e-9)
