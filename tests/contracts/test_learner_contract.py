"""The contract itself: a learner from outside the package joins by one line, and every check can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import one_hot

from fewshot_nlp.config import LEARNERS
from fewshot_nlp.functional.call import check_names
from fewshot_nlp.learners import BaseLearner, build_learner
from fewshot_nlp.learners.maml import MAML
from fewshot_nlp.learners.protonet import ProtoNet
from fewshot_nlp.models.heads import BIAS, WEIGHT
from tests.contracts import learner as contract
from tests.contracts.learner import CHECKS
from tests.contracts.subject import COUNTS, Entry, Subject, rows
from tests.tiny import tiny_config


class Ridge(BaseLearner):
    """Ridge regression on the support features in closed form: R2-D2, Bertinetto et al., ICLR 2019."""

    def _adapt(self, params, support):
        features = torch.nn.functional.normalize(self.model.features(params, support.inputs), dim=-1)
        gram = features @ features.T + 0.1 * torch.eye(len(support)).to(features)
        targets = one_hot(support.labels, support.n_way).to(features.dtype)
        weight = torch.linalg.solve(gram, targets).T @ features
        return {WEIGHT: weight, BIAS: weight.new_zeros(support.n_way)}


NEWCOMER = Entry(lambda folder: build_learner(tiny_config(folder, learner="ridge")))


@pytest.mark.parametrize(
    ("check", "shape"),
    [pytest.param(check, shape, id=f"{check.__name__}-{shape}") for check, shape in contract.contract(NEWCOMER)],
)
def test_a_learner_from_outside_keeps_the_contract(bert_folder, monkeypatch, check, shape):
    monkeypatch.setitem(LEARNERS, "ridge", Ridge)
    check(Subject(NEWCOMER, bert_folder, COUNTS[shape]))


class WrongShape(ProtoNet):
    def predict(self, params, state, query):
        return super().predict(params, state, query)[:-1]


class IgnoresSupport(ProtoNet):
    def _adapt(self, params, support):
        state = super()._adapt(params, support)
        return {name: torch.sin(torch.arange(value.numel()).double()).view_as(value) for name, value in state.items()}


class IgnoresQuery(ProtoNet):
    def predict(self, params, state, query):
        logits = super().predict(params, state, query)
        return logits.mean(dim=0, keepdim=True).expand_as(logits)


class TrustsTheSecond(ProtoNet):
    def _adapt(self, params, support):
        return super()._adapt(params, rows(support, [1, *range(len(support))]))


class FavoursAClass(ProtoNet):
    def predict(self, params, state, query):
        return super().predict(params, state, query) + torch.arange(query.n_way)


class DropsNames(ProtoNet):
    def _known(self, support):
        return super()._known(replace(support, names=None))


class LeaksQueries(ProtoNet):
    def predict(self, params, state, query):
        logits = super().predict(params, state, query)
        return logits - logits.mean(dim=0)


class Cheats(ProtoNet):
    def predict(self, params, state, query):
        return super().predict(params, state, query) + one_hot(query.labels, query.n_way)


class ReadsPadding(ProtoNet):
    def predict(self, params, state, query):
        return super().predict(params, state, query) * query.inputs["input_ids"].double().mean(dim=1, keepdim=True)


class Writes(ProtoNet):
    def adapt(self, params, support):
        with torch.no_grad():
            params["head.log_scale"].add_(0.1)
        return super().adapt(params, support)


class Remembers(ProtoNet):
    before = 0.0

    def _adapt(self, params, support):
        state = super()._adapt(params, support)
        mixed = {name: value + self.before for name, value in state.items()}
        self.before = state[WEIGHT].detach().mean(dim=0)
        return mixed


class Averages(ProtoNet):
    def meta_grad(self, params, episodes):
        total = super().meta_grad(params, episodes)
        total.grads = {name: grad / len(episodes) for name, grad in total.grads.items()}
        return total


class CutsTheGraph(ProtoNet):
    def _adapt(self, params, support):
        return {name: value.detach() for name, value in super()._adapt(params, support).items()}


class Climbs(ProtoNet):
    def meta_grad(self, params, episodes):
        total = super().meta_grad(params, episodes)
        total.grads = {name: -grad for name, grad in total.grads.items()}
        return total


class KeepsTheGraph(ProtoNet):
    def adapt(self, params, support):
        check_names(params, self.names)
        return self._adapt(params, support)


class CarriesDeadWeight(ProtoNet):
    def init_params(self):
        return {**super().init_params(), "head.dead": torch.zeros(3)}


class FixesTheStart(ProtoNet):
    def fixed(self, params):
        return super().fixed(self.init_params())


class StartsByChance(ProtoNet):
    def init_params(self):
        return {name: value + 0.1 * torch.randn(value.shape) for name, value in super().init_params().items()}


class NeedsGradMode(MAML):
    def adapt(self, params, support):
        check_names(params, self.names)
        theta = {name: value.clone().requires_grad_() for name, value in params.items()}
        return {name: value.detach() for name, value in self._adapt(theta, support).items()}


class TakesAnyName(ProtoNet):
    def adapt(self, params, support):
        start = self.init_params()
        return super().adapt({name: params.get(name, value) for name, value in start.items()}, support)


class HidesState(ProtoNet):
    made = 0

    def __init__(self, config, model):
        super().__init__(config, model)
        HidesState.made += 1
        self.hidden = 1 + HidesState.made / 10

    def predict(self, params, state, query):
        return self.hidden * super().predict(params, state, query)


class StaysAtHome(ProtoNet):
    def predict(self, params, state, query):
        return super().predict(params, state, query) + torch.zeros(query.n_way)


BROKEN = {
    contract.one_logit_a_class: WrongShape,
    contract.support_set_matters: IgnoresSupport,
    contract.query_matters: IgnoresQuery,
    contract.support_order_does_not_matter: TrustsTheSecond,
    contract.permuted_labels_permute_logits: FavoursAClass,
    contract.names_matter: DropsNames,
    contract.other_queries_do_not_matter: LeaksQueries,
    contract.query_labels_are_not_read: Cheats,
    contract.padding_does_not_matter: ReadsPadding,
    contract.adapt_writes_nothing: Writes,
    contract.calls_leave_no_trace: Remembers,
    contract.meta_gradients_add_up: Averages,
    contract.meta_gradient_is_the_slope: CutsTheGraph,
    contract.loss_falls: Climbs,
    contract.adapt_returns_no_graph: KeepsTheGraph,
    contract.every_parameter_matters: CarriesDeadWeight,
    contract.fixed_parameters_change_nothing: FixesTheStart,
    contract.same_seed_same_numbers: StartsByChance,
    contract.works_in_every_grad_mode: NeedsGradMode,
    contract.wrong_names_are_refused: TakesAnyName,
    contract.saved_and_loaded_it_is_the_same: HidesState,
    contract.an_accelerator_changes_nothing: StaysAtHome,
}


@pytest.mark.parametrize(("check", "learner"), BROKEN.items(), ids=[kind.__name__ for kind in BROKEN.values()])
def test_a_broken_learner_fails(bert_folder, monkeypatch, check, learner):
    name = "maml" if issubclass(learner, MAML) else "protonet"
    named = check is contract.names_matter
    settings = tiny_config(bert_folder, learner=name, head="prototype", use_label_names=named)
    monkeypatch.setitem(LEARNERS, name, learner)
    subject = Subject(Entry(lambda folder: build_learner(settings), names=named), bert_folder, COUNTS["unequal"])
    # A check may fail by what it says, or by what the broken learner raises.
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check(subject)


def test_every_check_is_known_to_fail():
    assert BROKEN.keys() == set(CHECKS)
    told = Entry(NEWCOMER.build, names=True)
    assert {check for check, _ in contract.contract(told)} == set(CHECKS)
