"""What every learner shares: parameters, prediction, and the gradient of the query loss through adaptation."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fewshot_nlp.checks import from_mapping
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.call import check_names
from fewshot_nlp.functional.networks import Networks
from fewshot_nlp.functional.outer import drawing, gradient, leaves
from fewshot_nlp.learners import centring, metadata
from fewshot_nlp.models.cache import FixedModel
from fewshot_nlp.models.heads import Head, build_head
from fewshot_nlp.models.model import FewShotModel
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, MetaGrad, Params, State, split_names

if TYPE_CHECKING:
    from typing_extensions import Self


def episode_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the queries whose class is in the episode; where labels are floats, the mean squared
    error of the one logit."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if labels.is_floating_point():
        return (logits[:, 0] - labels).square().mean()
    return cross_entropy(logits, labels, ignore_index=OUT_OF_SCOPE)


def episode_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers among the queries whose class is in the episode."""
    # No class is out of scope, so that what is right is known. Picking out what is known would wait for a GPU.
    return (logits.argmax(dim=-1) == labels).sum() / (labels != OUT_OF_SCOPE).sum()


def episode_score(logits: Tensor, labels: Tensor) -> Tensor:
    """What ``config.score`` names: the accuracy, or where labels are floats, the negative mean squared error."""
    return -episode_loss(logits, labels) if labels.is_floating_point() else episode_accuracy(logits, labels)


@dataclass
class NoOptions:
    """A method without settings of its own."""


class BaseLearner(ABC):
    """A learner made of a model and a head; a method adds ``_adapt``, and what else it needs.

    Attributes:
        model: features under given parameters.
        head: how features become logits.
        networks: the method's own modules.
        config: the settings all were built from.
        options: the method's own settings.
        transductive: the answer to a query may depend on the others beside it: by the method, or by the model.

    Raises:
        ValueError: settings that contradict the method, or ``learner_kwargs`` that it does not know.
    """

    #: The method in words, with a link to its paper, as Markdown.
    title: ClassVar[str] = ""
    #: Whether the answer to one query may depend on the others beside it.
    reads_queries: ClassVar[bool] = False
    #: Whether a task may change the adapter, and with it the features, or its head alone.
    fast_body: ClassVar[bool] = True
    #: What it can learn: "classification", "regression".
    tasks: ClassVar[tuple[str, ...]] = ("classification",)
    #: Whether a task may change the head of a regression, which is meta-learned; those of classes know it themselves.
    fast_head: ClassVar[bool] = True
    #: Whether the method answers through ``head``, or in its own way.
    uses_head: ClassVar[bool] = True
    #: Whether a task's classifier is what the head starts: only then can the head tell names from examples.
    starts_head: ClassVar[bool] = True
    #: Whether the method reads ``support.names`` itself. For others the names become support examples.
    reads_names: ClassVar[bool] = False
    #: Whether the layers below the first trained one compute as they were loaded, so that what they give can be kept.
    keeps_trunk: ClassVar[bool] = True
    #: Whether the method reads ``episode.unlabelled`` when it is trained.
    reads_unlabelled: ClassVar[bool] = False
    #: Settings of ``FewShotConfig`` that make the method what it is.
    implied: ClassVar[Mapping[str, Any]] = {}
    #: Names of meta-parameters that are data: the method writes them by ``remember``, and no gradient changes them.
    remembered: ClassVar[frozenset[str]] = frozenset()
    #: Dataclass of the settings of the method's own, which ``config.learner_kwargs`` gives; it checks them itself.
    Options: ClassVar[type] = NoOptions

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        if config.task not in self.tasks:
            raise ValueError(
                f"learner={config.learner!r} is not defined for task={config.task!r}: it needs classes. Use a learner "
                f"that adapts by gradient steps, such as learner='maml', or task='classification'."
            )
        self.config: FewShotConfig = _with_implied(config, self.implied)
        self.options: Any = from_mapping(
            self.Options, config.learner_kwargs or {}, f"learner_kwargs of learner={config.learner!r}"
        )
        self.model = model
        self.transductive = self.reads_queries or model.transductive
        if (self.config.head == "verbalizer") != (model.voice is not None):
            raise ValueError(
                f"head={self.config.head!r} does not fit the model, which was built with head={model.config.head!r}. "
                f"Build both from one configuration."
            )
        # What is saved says what "auto" and a default were.
        scale = self.config.logit_scale
        self.config = replace(self.config, pooling=model.pooling, template=model.template, head_scale=scale)
        #: Whether texts are asked about the names of a task's classes, and features are scores of these.
        self.asks = model.voice is not None and model.voice.scores_names
        self.head: Head = build_head(self.config, model.hidden_size, self.fast_head, self.asks)
        self.networks = Networks(self.build_networks, model.seed)
        self._check_step_loss_weights()
        self._check_whitening()
        if self.config.head_reads_names and (self.reads_names or not (self.uses_head and self.starts_head)):
            raise ValueError(
                f"learn_label_name_weight, head_init='names' and head='verbalizer' are of the head's start, and "
                f"learner={config.learner!r} starts in its own way. Leave them out: names are examples then, or what "
                f"it reads."
            )
        if self.config.condition_on_names and self.reads_names:
            raise ValueError(
                f"condition_on_names would tell learner={config.learner!r} what it reads itself: the names of the "
                f"classes. Leave it out."
            )

    def build_networks(self) -> dict[str, nn.Module]:
        """The method's own modules by name, with random starts; called once, by the constructor."""
        return {}

    def __reduce__(self) -> tuple[type[BaseLearner], tuple[FewShotConfig, FewShotModel]]:
        # Settings and model are all there is to a learner; update rules are closures, which pickle cannot write.
        return type(self), (self.config, self.model)

    def _check_step_loss_weights(self) -> None:
        if self.config.step_loss_weights is not None:
            raise ValueError(
                f"step_loss_weights={self.config.step_loss_weights} weigh inner steps, and learner="
                f"{self.config.learner!r} has none. Leave them out, or use one with an inner loop, such as 'maml'."
            )

    def _check_whitening(self) -> None:
        told = self.config.condition_on_names
        by_head = self.config.task == "classification" and self.uses_head and not self.fast_body and not told
        if self.config.whiten_features and (not by_head or self.networks.init_params()):
            raise ValueError(
                f"whiten_features={self.config.whiten_features} is found anew once training is over, when learner="
                f"{self.config.learner!r}{' with condition_on_names' if told else ''} has learned more on top of the "
                f"features than a head. Leave it out, or use learner='protonet' or 'anil'."
            )

    def init_params(self) -> dict[str, Tensor]:
        own = {**(self.head.init_params() if self.uses_head else {}), **self.networks.init_params()}
        if self.config.condition_on_names:
            own |= metadata.init_params(self.model.hidden_size)
        own |= centring.init_params(self.config, self.model.hidden_size)
        own = {name: value.to(self.model.device, self.model.dtype) for name, value in own.items()}
        return {**self.model.init_params(), **own}

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the meta-parameters."""
        return frozenset(self.init_params())

    def features(self, params: Params, inputs: dict[str, Tensor]) -> Tensor:
        """Features ``[n, hidden_size]`` of inputs; a method may put something of its own on top of these."""
        features = self.bare_features(params, inputs)
        features = centring.prepared(self.config, params, features)
        return metadata.modulate(params, features) if self.config.condition_on_names else features

    def bare_features(self, params: Params, inputs: dict[str, Tensor]) -> Tensor:
        """The model's features, before the names of a task scale and shift them."""
        return self.model.features(params, inputs)

    @abstractmethod
    def _adapt(self, params: Params, support: Batch) -> State:
        """State of the task, as a differentiable function of ``params``."""

    def adapt(self, params: Params, support: Batch) -> State:
        check_names(params, self.names)
        known = self._known(support)
        # Gradient checkpointing calls the module in the backward pass, too.
        with self.model.turn:
            with torch.inference_mode(False), torch.no_grad():
                told = self._told(params, support.recordable())
            # What queries are asked about is known from the support set alone.
            return {**told, **self._adapted({**params, **told}, known), **known.names_asked}

    def _told(self, params: Params, support: Batch) -> dict[str, Tensor]:
        """The meta-parameters that the names of a task's classes change, at its start; a function of ``params``."""
        if not self.config.condition_on_names or support.names is None:
            return {}
        return metadata.start(params, self.bare_features(params, support.names))

    def _adapted(self, params: Params, support: Batch) -> State:
        """State of the task from its start, without a graph."""
        with torch.inference_mode(False), torch.enable_grad():
            state = self._adapt(leaves(params), support)
        return {name: value.detach() for name, value in state.items()}

    def predict(self, params: Params, state: State, query: Batch) -> Tensor:
        if self.asks and not query.names_asked:
            query = query.asked(split_names(state)[1])
        return self.head.logits(params, state, self.features({**params, **state}, query.inputs))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the method trains: a mean over the examples in scope, from ``[n, n_way]`` and ``[n]``."""
        return episode_loss(logits, labels)

    def _known(self, support: Batch) -> Batch:
        """What the method learns a task from: tensors that autograd can record; names as examples, or as they are."""
        support, config = support.recordable(), self.config
        if support.labels.is_floating_point() != (config.task == "regression"):
            raise ValueError(
                f"Labels of {support.labels.dtype} do not fit a learner of task={config.task!r}. Give it int64 labels "
                f"for classification, floats for regression, or set task."
            )
        if support.names is None and (config.head_reads_names or config.condition_on_names):
            raise ValueError(
                "The support set comes without the names of its classes, which this learner reads. Make it with "
                "EpisodeReader(..., use_label_names=True), or give Batch its names."
            )
        if self.reads_names:
            return support
        if self.asks and support.names is not None:
            return replace(support.asked(support.names), names=None)
        with torch.inference_mode(False):
            known = support.with_names_as_examples(1 if config.head_reads_names else config.label_name_weight)
            if config.head != "verbalizer":
                return known
            # The words for a class are where its weights start, and nothing to learn from.
            beyond = torch.full_like(known.labels[len(support) :], OUT_OF_SCOPE)
            return replace(known, labels=torch.cat([support.labels, beyond]))

    def remember(self, params: Params, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        """What the entries ``remembered`` become once ``episodes`` are finished, in this order; writes to nothing."""
        return {}

    def fixed(self, params: Params) -> BaseLearner:
        """This learner for many tasks under the same ``params``: the same answers, and where no task changes the
        features, each distinct text goes through the backbone once."""
        if self.fast_body or self.model.transductive:
            return self
        return self._on(FixedModel(self.model, params))

    def _on(self, model: FewShotModel) -> Self:
        """This learner, all that was set on it from outside included, on another model."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, model=model)
        return other

    def meta_grad(self, params: Params, episodes: Sequence[Episode]) -> MetaGrad:
        """Sum of the episodes' gradients."""
        check_names(params, self.names)
        if not episodes:
            zero = next(iter(params.values())).new_zeros(())
            return MetaGrad({name: torch.zeros_like(value) for name, value in params.items()}, zero, zero, 0)
        with self.model.frozen_in(self.config.frozen_dtype):
            parts = [self._told_grad(params, episode) for episode in episodes]
        return sum(parts[1:], parts[0])

    @torch.inference_mode(False)
    def twin(self) -> Self:
        """The same learner for another thread: its modules are its own, and all that they hold is shared."""
        with self.model.turn:
            return self._twin()

    def _twin(self) -> Self:
        twin = object.__new__(type(self))
        # A rule may be made of the learner's own methods.
        memo: dict[int, Any] = {id(self): twin, **{id(each): each for each in [*self.model.shared, self.config]}}
        memo |= {id(value): value for network in self.networks.modules.values() for value in network.parameters()}
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def read_ahead(self, episodes: Sequence[Episode]) -> None:
        """Run what of the backbone no task changes, before the ``episodes`` go side by side.

        That is on all cores, as wherever else: with another number of them products may differ in the last bit, and
        what is kept must not depend on which came first.
        """
        for episode in episodes if self.keeps_trunk else ():
            for inputs in (episode.support.inputs, episode.support.names, episode.query.inputs):
                if inputs is not None:
                    self.model.read_ahead(inputs)

    def _told_grad(self, params: Params, episode: Episode) -> MetaGrad:
        """The gradient at the task's start, drawn back to ``params``."""
        known = replace(episode, support=self._known(episode.support), query=episode.query.recordable())
        if self.asks and episode.support.names is not None:
            known = replace(known, query=known.query.asked(episode.support.names))
        # Dropout draws what follows from the episode alone.
        draws = drawing(params, episode.spec.index) if self.model.training else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), draws:
            theta = leaves(params)
            told = self._told(theta, episode.support.recordable())
            part = self._episode_grad({**params, **{name: value.detach() for name, value in told.items()}}, known)
            if told:
                pulls = [part.grads[name] for name in told]
                drawn = gradient(list(told.values()), list(theta.values()), pulls)
                direct = {name: grad for name, grad in part.grads.items() if name not in told}
                part.grads = {
                    n: more + direct[n] if n in direct else more for n, more in zip(theta, drawn, strict=True)
                }
        return part

    def _episode_grad(self, params: Params, episode: Episode) -> MetaGrad:
        with torch.inference_mode(False), torch.enable_grad():
            theta = leaves(params)
            loss, logits = self._objective(theta, episode)
            grads = gradient(loss, list(theta.values()))
        return self._part(dict(zip(theta, grads, strict=True)), logits.detach(), episode.query.labels)

    def _objective(self, params: Params, episode: Episode) -> tuple[Tensor, Tensor]:
        """What the gradient is of, and the answers to the queries."""
        logits = self.predict(params, self._adapt(params, episode.support), episode.query)
        return self.loss(logits, episode.query.labels), logits

    def _part(self, grads: dict[str, Tensor], logits: Tensor, labels: Tensor) -> MetaGrad:
        return MetaGrad(grads, self.loss(logits, labels), episode_score(logits, labels), 1, [logits])


def _with_implied(config: FewShotConfig, implied: Mapping[str, Any]) -> FewShotConfig:
    """``config`` with what the method implies in place of what was left at its default."""
    defaults = {each.name: each.default for each in fields(FewShotConfig)}
    if config.task == "regression":
        # There is one head of a regression, and a method says nothing about it.
        implied = {name: value for name, value in implied.items() if name not in ("head", "head_init")}
    for name, value in implied.items():
        given = getattr(config, name)
        if given not in (value, defaults[name]):
            raise ValueError(
                f"{name}={given!r} contradicts learner={config.learner!r}, which is {name}={value!r}. Leave {name} "
                f"out, or use another learner."
            )
    return replace(config, **implied)
