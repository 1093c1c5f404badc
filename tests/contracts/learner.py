"""What every learner must do, whatever its method: one function a promise.

A learner joins by one line in the table of ``test_learners.py``. All numbers are float64, so that "the same" can be
tight.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.data import TextEncoder
from fewshot_nlp.data.encode import labelled
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import BaseLearner
from fewshot_nlp.learners.imaml import IMAML
from fewshot_nlp.types import Batch
from tests.contracts.subject import COUNTS, TURN, Entry, Subject, differ, rows, same, tensors
from tests.pretend import DEVICE, Accelerator


def one_logit_a_class(subject: Subject) -> None:
    query = rows(subject.first.query, [0, 1, 2])
    logits = subject.answer(query=query)
    assert logits.shape == (3, query.n_way)
    assert logits.isfinite().all()


def support_set_matters(subject: Subject) -> None:
    """Other examples of the same classes change the answers."""
    other = replace(subject.batch(subject.counts, seed=7), names=subject.first.support.names)
    differ(subject.answer(), subject.answer(support=other))


def query_matters(subject: Subject) -> None:
    logits = subject.answer()
    differ(logits[0], logits[-1])


def support_order_does_not_matter(subject: Subject) -> None:
    support = subject.first.support
    backwards = rows(support, list(range(len(support)))[::-1])
    same(subject.answer(support=backwards), subject.answer())


def permuted_labels_permute_logits(subject: Subject) -> None:
    support, turn = subject.first.support, torch.tensor(TURN[len(subject.counts)])
    names = support.names and {name: rows[turn.argsort()] for name, rows in support.names.items()}
    turned = subject.answer(support=replace(support, labels=turn[support.labels], names=names))
    same(turned[:, turn], subject.answer())


def names_matter(subject: Subject) -> None:
    """Names that change places change the answers; so do other names."""
    names, other = subject.first.support.names, subject.second.support.names
    assert names is not None and other is not None
    turned = {name: rows[TURN[len(subject.counts)]] for name, rows in names.items()}
    for each in (turned, other):
        differ(subject.answer(support=replace(subject.first.support, names=each)), subject.answer())


def other_queries_do_not_matter(subject: Subject) -> None:
    """Nor does their order, for a transductive learner either."""
    query = subject.first.query
    together = subject.answer()
    backwards = list(range(len(query)))[::-1]
    same(subject.answer(query=rows(query, backwards))[backwards], together)
    if not subject.learner.transductive:
        alone = [subject.answer(query=rows(query, [i])) for i in range(len(query))]
        same(torch.cat(alone), together)


def query_labels_are_not_read(subject: Subject) -> None:
    query = subject.first.query
    same(subject.answer(query=replace(query, labels=torch.zeros_like(query.labels))), subject.answer())


def padding_does_not_matter(subject: Subject) -> None:
    """Neither how much of it there is, nor which token it is."""

    if subject.kind not in ("text", "cloze", "phrase"):
        return

    def padded(batch: Batch) -> Batch:
        return replace(batch, inputs=longer(batch.inputs), names=batch.names and longer(batch.names))

    def longer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {name: pad(tensor, (0, 3)) for name, tensor in inputs.items()}
        found["input_ids"] = found["input_ids"].where(found["attention_mask"].bool(), torch.tensor(5))
        return found

    # From a second learner, so that nothing can be remembered from the first call.
    found = subject.answer(padded(subject.first.support), padded(subject.first.query), subject.build())
    same(found, subject.answer())


def adapt_writes_nothing(subject: Subject) -> None:
    """Not to the parameters, nor to the support set, nor to the module."""
    learner, support = subject.learner, subject.first.support
    given = {name: value.clone().requires_grad_() for name, value in subject.params.items()}
    own = learner.init_params()
    inputs = {name: value.clone() for name, value in support.inputs.items()}
    state = learner.adapt(given, support)
    learner.predict(given, state, subject.first.query)
    for name, value in given.items():
        assert torch.equal(value, subject.params[name]), f"{name} was written to"
        assert value.requires_grad and value.is_leaf and value.grad is None, f"{name} was changed"
    fresh = {name: value.clone() for name, value in subject.params.items()}
    learner.adapt(fresh, support)
    assert not any(value.requires_grad for value in fresh.values()), "a parameter was made to require gradients"
    assert all(torch.equal(value, own[name]) for name, value in learner.init_params().items()), "the module changed"
    assert all(torch.equal(value, inputs[name]) for name, value in support.inputs.items()), "the support set changed"


def adapt_returns_no_graph(subject: Subject) -> None:
    given = {name: value.clone().requires_grad_() for name, value in subject.params.items()}
    state = subject.learner.adapt(given, subject.first.support)
    assert not any(tensor.requires_grad for tensor in tensors(state)), "the state carries a graph"


def calls_leave_no_trace(subject: Subject) -> None:
    """Another task in between changes nothing."""
    learner, query = subject.learner, subject.first.query
    state = learner.adapt(subject.params, subject.first.support)
    before = learner.predict(subject.params, state, query)
    other = learner.adapt(subject.params, subject.second.support)
    learner.predict(subject.params, other, subject.second.query)
    same(learner.predict(subject.params, state, query), before)
    same(subject.answer(), before)


def fixed_parameters_change_nothing(subject: Subject) -> None:
    """``fixed`` answers as the learner does, task after task."""
    learner = subject.learner.fixed(subject.params)
    for episode in (subject.first, subject.second, subject.first):
        state = learner.adapt(subject.params, episode.support)
        found = learner.predict(subject.params, state, episode.query)
        same(found, subject.answer(episode.support, episode.query))


def same_seed_same_numbers(subject: Subject) -> None:
    """Two learners built alike start and answer alike, to the bit, whatever the global generator holds."""
    starts, answers = [], []
    for seed in (11, 12):
        torch.manual_seed(seed)
        twin = subject.build()
        starts.append(twin.init_params())
        answers.append(subject.answer(learner=twin))
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert torch.equal(answers[0], answers[1])


def works_in_every_grad_mode(subject: Subject) -> None:
    """Also on tensors that were made in inference mode."""
    expected = subject.answer()
    with torch.no_grad():
        same(subject.answer(), expected)
    with torch.inference_mode():
        episode, params = subject.episode(seed=0), subject.params
        made_here = {name: value.clone() for name, value in params.items()}
        for each in (params, made_here):
            state = subject.learner.adapt(each, episode.support)
            same(subject.learner.predict(each, state, episode.query), expected)


def wrong_names_are_refused(subject: Subject) -> None:
    """A parameter that is missing, and one that nobody would read."""
    last = list(subject.params)[-1]
    for wrong in (
        {name: value for name, value in subject.params.items() if name != last},
        {**subject.params, "head.unknown": torch.zeros(1)},
        {**subject.params, "model.unknown": torch.zeros(1)},
    ):
        with pytest.raises((KeyError, ValueError), match=f"unknown|{last}"):
            subject.learner.adapt(wrong, subject.first.support)
        with pytest.raises((KeyError, ValueError), match=f"unknown|{last}"):
            subject.learner.meta_grad(wrong, [subject.first])


def meta_gradients_add_up(subject: Subject) -> None:
    """Two tasks at once are the sum of each alone; loss, accuracy and logits are those of ``predict``."""
    learner, params = subject.learner, {name: value.clone() for name, value in subject.params.items()}
    both = learner.meta_grad(params, [subject.first, subject.second])
    parts = [learner.meta_grad(params, [episode]) for episode in (subject.first, subject.second)]
    assert both.grads.keys() == params.keys()
    assert both.episodes == 2
    for name in params:
        assert torch.equal(params[name], subject.params[name]) and not params[name].requires_grad
        assert not both.grads[name].requires_grad
        same(both.grads[name], parts[0].grads[name] + parts[1].grads[name])
    assert sum(grad.norm() for grad in both.grads.values()) > 1e-6
    loss = accuracy = torch.zeros(())
    for episode, logits in zip((subject.first, subject.second), both.logits, strict=True):
        same(logits, subject.answer(episode.support, episode.query))
        labels = episode.query.labels
        loss = loss + subject.entry.loss(logits, labels)
        right = (logits.argmax(1) == labels).double().mean()
        accuracy = -loss if subject.entry.task == "regression" else accuracy + right
    same(both.loss.double(), loss)
    torch.testing.assert_close(both.accuracy.double(), accuracy, rtol=1e-6, atol=0)
    with torch.no_grad():
        again = learner.meta_grad(params, [subject.first, subject.second])
    assert all(torch.equal(again.grads[name], both.grads[name]) for name in params)


def every_parameter_matters(subject: Subject) -> None:
    """Moving any one of them changes the answers; a parameter that does not is dead weight, unless it is data."""
    expected = subject.answer()
    silent = subject.entry.silent
    for name, value in subject.params.items():
        if name in subject.learner.remembered or (silent is not None and name.startswith(silent)):
            continue
        # Not all numbers alike: a layer norm takes a constant away again.
        step = 0.5 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        moved = {**subject.params, name: value + step}
        state = subject.learner.adapt(moved, subject.first.support)
        differ(subject.learner.predict(moved, state, subject.first.query), expected)


def loss_falls(subject: Subject) -> None:
    """A few outer steps of Adam from the learner's own untrained start, on two tasks that ask for their own support
    set: a random network need not generalise."""
    start = {name: value.double() for name, value in subject.learner.init_params().items()}
    episodes = [replace(episode, query=episode.support) for episode in (subject.first, subject.second)]
    losses = []
    optimiser = torch.optim.Adam(start.values(), lr=0.005)
    for _ in range(6):
        part = subject.learner.meta_grad(start, episodes)
        losses.append(float(part.loss))
        for name, value in start.items():
            value.grad = part.grads[name]
        optimiser.step()

    assert losses[-1] < losses[0] - 1e-3, f"the loss went {losses}"


def meta_gradient_is_the_slope(subject: Subject) -> None:
    """Central difference of the query loss along a random direction; data get no gradient."""
    learner, params, episode = subject.learner, subject.params, subject.first
    rng = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(v.shape, generator=rng, dtype=torch.float64) for n, v in params.items()}
    direction |= {name: torch.zeros_like(params[name]) for name in learner.remembered}
    step = 1e-7

    def loss_at(distance: float) -> Tensor:
        return learner.meta_grad({n: v + distance * direction[n] for n, v in params.items()}, [episode]).loss

    slope = (loss_at(step) - loss_at(-step)) / (2 * step)
    grads = learner.meta_grad(params, [episode]).grads
    assert not any(grads[name].any() for name in learner.remembered)
    expected = sum(((grads[n] * direction[n]).sum() for n in grads), torch.zeros(()))
    torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-7)


def an_accelerator_changes_nothing(subject: Subject) -> None:
    """Where tasks of unlike sizes go in one stack, and where all must be in one place; nor is anything looked at before
    the end, which would wait for it: but by conjugate gradients and by models that speak."""
    moved, episodes = subject.build(), [subject.first, subject.second]
    model = getattr(moved, "model", None) or moved.features.model
    with Accelerator() as accelerator:
        model.to(DEVICE)
        params = {name: value.to(DEVICE) for name, value in subject.params.items()}
        there = [episode.to(DEVICE) for episode in episodes]
        logits = moved.predict(params, moved.adapt(params, there[0].support), there[0].query)
        if subject.entry.trained:
            # Once more than is counted: whether tasks can be stacked is tried, and seen.
            moved.meta_grad(params, there)
            accelerator.waits.clear()
            found = moved.meta_grad(params, there)
            waits = +accelerator.waits
    assert logits.device == DEVICE
    same(logits.cpu().detach(), subject.answer())
    if subject.entry.trained:
        expected = subject.learner.meta_grad(subject.params, episodes)
        pairs = [(found.grads[name], grad) for name, grad in expected.grads.items()]
        for one, other in [*pairs, *zip(found.logits, expected.logits, strict=True), (found.loss, expected.loss)]:
            assert one.device == DEVICE
            same(one.cpu(), other)
        looks = isinstance(moved, IMAML) or model.voice is not None
        assert not waits or looks, waits


TEXTS = ["light on", "play music", "stop the music", "lamp off", "set the timer"]
LABELS = ["light", "music", "music", "light", "timer"]
NEW = ["red lamp", "play the timer", "warm music on"]


def saved_and_loaded_it_is_the_same(subject: Subject) -> None:
    """To the bit, in float32, through a folder."""
    learner: BaseLearner = subject.entry.build(subject.folder)  # type: ignore[assignment]
    adapter = FewShotAdapter(learner, {name: value.float() for name, value in subject.params.items()})
    episode = subject.episode(seed=0, dtype=torch.float32)

    def logits(each: FewShotAdapter) -> Tensor:
        state = each.learner.adapt(each.params, episode.support)
        return each.learner.predict(each.params, state, episode.query).detach()

    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        loaded = FewShotAdapter.from_pretrained(folder)
        assert type(loaded.learner) is type(learner)
        assert torch.equal(logits(loaded), logits(adapter))
        if subject.kind == "text" and subject.entry.task == "classification":
            _classifier_answers_alike(folder, adapter)


def _classifier_answers_alike(folder: str, adapter: FewShotAdapter) -> None:
    """``FewShotClassifier`` on raw texts, and the learner on the same, encoded."""
    classes = sorted(set(LABELS))
    encoder = TextEncoder(adapter.learner.model.tokenizer, adapter.config.max_length)
    labels = torch.tensor([classes.index(label) for label in LABELS])
    names = classes if adapter.config.use_label_names else []
    support = labelled(encoder([*TEXTS, *names]), labels, len(classes))
    query = Batch(encoder(NEW), torch.zeros(len(NEW), dtype=torch.int64), len(classes))
    state = adapter.learner.adapt(adapter.params, support)
    expected = adapter.learner.predict(adapter.params, state, query).detach().double().softmax(dim=1)
    classifier = FewShotClassifier.from_pretrained(folder, device="cpu").fit(TEXTS, LABELS)
    assert classifier.classes_.tolist() == classes
    torch.testing.assert_close(torch.from_numpy(classifier.predict_proba(NEW)), expected, rtol=0, atol=1e-6)


Check = Callable[[Subject], None]

#: Over every shape of the support set.
EACH_SHAPE: tuple[Check, ...] = (
    one_logit_a_class,
    support_set_matters,
    query_matters,
    support_order_does_not_matter,
    permuted_labels_permute_logits,
    names_matter,
    other_queries_do_not_matter,
    query_labels_are_not_read,
    padding_does_not_matter,
    adapt_writes_nothing,
    calls_leave_no_trace,
    meta_gradients_add_up,
    meta_gradient_is_the_slope,
    loss_falls,
)
#: Where the shape cannot matter.
ONCE: tuple[Check, ...] = (
    adapt_returns_no_graph,
    every_parameter_matters,
    fixed_parameters_change_nothing,
    same_seed_same_numbers,
    works_in_every_grad_mode,
    wrong_names_are_refused,
    saved_and_loaded_it_is_the_same,
    an_accelerator_changes_nothing,
)
CHECKS = EACH_SHAPE + ONCE
#: Over every shape of the first kind of inputs alone, and one shape of the others: these take the most time.
COSTLY = (meta_gradients_add_up, meta_gradient_is_the_slope, loss_falls)


#: Nothing to ask of a learner that was never trained.
NEED_PARAMETERS = (
    meta_gradients_add_up,
    loss_falls,
    every_parameter_matters,
    fixed_parameters_change_nothing,
    wrong_names_are_refused,
)


def applies(check: Check, entry: Entry) -> bool:
    """Whether the learner makes the promise at all."""
    if check is names_matter:
        return entry.names
    if check in NEED_PARAMETERS:
        return entry.trained
    if check is meta_gradient_is_the_slope:
        return entry.trained and entry.exact
    if check is permuted_labels_permute_logits:
        return entry.task == "classification"
    if check is saved_and_loaded_it_is_the_same:
        return entry.trained and entry.saved
    return check is not support_order_does_not_matter or not entry.ordered


def contract(entry: Entry, kind: str = "text") -> list[tuple[Check, str]]:
    """The checks that a learner of the table must pass on a kind of inputs, each with the name of a support set's
    shape."""
    checks = [(check, shape) for check in EACH_SHAPE for shape in COUNTS] + [(check, "unequal") for check in ONCE]
    if kind != entry.kinds[0]:
        checks = [(check, shape) for check, shape in checks if check not in COSTLY or shape == "unequal"]
    return [(check, shape) for check, shape in checks if applies(check, entry)]
