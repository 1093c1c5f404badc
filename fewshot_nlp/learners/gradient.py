"""Learning a task by gradient steps: one learner with three independent choices.

*fast*: which weights a task may change; *rule*: how a step changes them; *estimator*: how the meta-gradient passes
back through the steps. MAML, first-order MAML, ANIL and Reptile are cells of that table, one file each.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.networks import PREFIX as NETWORKS
from fewshot_nlp.functional.outer import Carry, Link, adapt, gradient, leaves
from fewshot_nlp.functional.rules import Point, Slots, Updates, build_rule
from fewshot_nlp.learners.estimators import ESTIMATORS
from fewshot_nlp.learners.scheduling import ScheduledLearner
from fewshot_nlp.learners.stacking import by_task, is_stack, spread
from fewshot_nlp.models.model import PREFIX, FewShotModel
from fewshot_nlp.types import Batch, Episode, MetaGrad, Params, State

HEAD = "head."
#: Names in a carry's slots: the support features, for learners that never change them; where the head started.
FEATURES = "features"
START = "start."


class GradientLearner(ScheduledLearner):
    """``inner_steps`` of the inner rule on the support loss, from the meta-parameters.

    The state of a task holds the adapted tensors under their own names, and the head's state.
    """

    tasks: ClassVar[tuple[str, ...]] = ("classification", "regression")

    def __init__(self, config: FewShotConfig, model: FewShotModel) -> None:
        super().__init__(config, model)
        if not self.fast_body and not self.head.fast:
            raise ValueError(
                f"learner={config.learner!r} adapts the head alone, and head={config.head!r} has no weights to adapt. "
                f"Use head='linear', or learner='protonet'."
            )
        if self.fast_body and not self._body(super().init_params()):
            raise ValueError(
                f"learner={config.learner!r} adapts the adapter, and adapter={config.adapter!r} has none. "
                f"Use adapter='prompt_tuning', 'lora' or 'full', or learner='protonet'."
            )
        config = self.config
        if self.estimator_name == "implicit" and not config.proximal:
            raise ValueError("estimator='implicit' needs proximal above 0, which makes the inner problem well posed.")
        rate = config.inner_learning_rate
        #: Step sizes of the inner loop, by what names begin with.
        self.rates = {PREFIX: rate, HEAD: rate, NETWORKS: rate}
        if config.head_learning_rate is not None:
            self.rates[HEAD] = config.head_learning_rate
        self.rule = build_rule(
            config.inner_rule,
            self.rates,
            steps=config.inner_steps,
            weight_decay=config.inner_weight_decay,
            max_grad_norm=config.inner_max_grad_norm,
        )
        self._check_estimator()

    def _check_estimator(self) -> None:
        """Reptile moves the start of what a task changes towards its end, and nothing else has an end to move to; what
        looks at the end of the loop alone learns nothing of the way there."""
        estimator, config = self.estimator_name, self.config
        if estimator in ("reptile", "implicit") and self.rule.learned({PREFIX: torch.zeros(1)}):
            raise ValueError(
                f"estimator={estimator!r} cannot train the rates of inner_rule={config.inner_rule!r}. Use 'sgd', "
                f"'momentum' or 'adam', or estimator='exact'."
            )
        if estimator != "reptile":
            return
        params = super().init_params()
        if not self._body(params).keys() & params.keys():
            raise ValueError(
                f"estimator='reptile' trains nothing with learner={config.learner!r}, whose inner loop changes "
                f"no meta-parameter. Use learner='reptile', or estimator='exact'."
            )
        for name in ("condition_on_names", "learn_label_name_weight"):
            if getattr(config, name):
                raise ValueError(
                    f"estimator='reptile' cannot train {name}, which no inner step changes. Leave it out, or use "
                    f"estimator='exact'."
                )

    def _check_step_loss_weights(self) -> None:
        weights, steps = self.config.step_loss_weights, max(self.config.inner_steps, 1)
        if weights is None:
            return
        if len(weights) != steps:
            raise ValueError(
                f"step_loss_weights has {len(weights)} weights, and there are {steps} inner steps. Give one a step."
            )
        if self.estimator_name in ("implicit", "reptile"):
            raise ValueError(
                f"estimator={self.estimator_name!r} looks at the end of the inner loop alone, step_loss_weights at its "
                f"steps. Use estimator='exact', 'first_order' or 'truncated'."
            )

    def init_params(self) -> dict[str, Tensor]:
        params = super().init_params()
        # The head's state for some task tells which tensors it has.
        labels = torch.arange(2, device=self.model.device)
        size = len(labels) if self.asks else self.model.hidden_size
        some = torch.zeros(2, size, device=self.model.device, dtype=self.model.dtype)
        head = self.head.start(params, some, labels, 2) if self.head.fast else {}
        # A tensor whose shape follows the number of classes can have no rates of that shape: one number stands for it.
        shown = {name: value if name in params else value.new_zeros(()) for name, value in head.items()}
        return {**params, **self.rule.learned({**self._body(params), **shown})}

    def _body(self, params: Params) -> dict[str, Tensor]:
        """The fast weights that change the features, at their start; they follow from ``params`` alone."""
        return {n: v for n, v in params.items() if n.startswith(PREFIX)} if self.fast_body else {}

    def links(self, support: Batch, exact_steps: int | None = None, apart: bool = False) -> list[Link]:
        """A task's adaptation: the start with the first step, then one link a step.

        Where the first step moves the head alone, the second one sees the same features, and is in the first link, too,
        unless steps are to be ``apart``.

        Args:
            support: the task.
            exact_steps: how many of the last steps have their inner gradient differentiated; all if not given.
            apart: one link for each step.
        """
        steps = max(self.config.inner_steps, 1)
        constant = 0 if exact_steps is None else steps - exact_steps
        # Dropout draws anew in each step, and a multi-step loss looks at the end of each.
        apart = apart or self.model.training or self.config.step_loss_weights is not None
        first = min(steps, 2) if self._head_first and not apart else 1
        spans = [range(first), *(range(k, k + 1) for k in range(first, steps))]
        if self.config.inner_steps == 0 or not support.teaches:
            # The start alone.
            spans = [range(0)] * len(spans)
        return [partial(self._link, support, span, constant) for span in spans]

    @property
    def _head_first(self) -> bool:
        """Whether the first step leaves the features as they are, though a task may change them: a blind head's."""
        # A head from outside need not say whether it is blind.
        return self.fast_body and self.rule.rests and getattr(self.head, "blind", False)

    def _link(
        self, support: Batch, span: range, constant: int, params: Params, carry: Carry | None, record: bool
    ) -> Carry:
        """The steps in ``span``; the inner gradients of those before ``constant`` are not differentiated."""
        if carry is None:
            fast, features = self._start(params, support)
            slots = by_task(support, self.rule.init, fast)
            # What later steps need of the start: all that does not stand in params.
            kept = {f"{START}{n}": v for n, v in fast.items() if v is not params.get(n)} if self.config.proximal else {}
            if not self.fast_body:
                kept[FEATURES] = features
        elif not span:
            return carry
        else:
            fast = carry.fast
            kept = {n: v for n, v in carry.slots.items() if n.startswith((START, FEATURES))}
            slots = {n: v for n, v in carry.slots.items() if n not in kept}
            features = kept[FEATURES] if FEATURES in kept else self._features(params, fast, support)
        for k in span:
            exact, blind = record and k >= constant, k == 0 and getattr(self.head, "blind", False)
            grads, loss = self._inner_gradient(params, fast, features, support, create_graph=exact, blind=blind)
            if self.config.proximal and k:
                start = {n: kept[f"{START}{n}"] if f"{START}{n}" in kept else params[n] for n in fast}
                grads = {n: grad + self.config.proximal * (fast[n] - start[n]) for n, grad in grads.items()}
            loss = loss if exact else loss.detach()
            updates, slots = by_task(support, partial(self._step, params, k), grads, slots, fast, loss)
            # What rests stays the very tensor that the features were made under.
            rests = k == 0 and self._head_first
            fast = {n: v if rests and not n.startswith(HEAD) else v + updates[n] for n, v in fast.items()}
        return Carry(fast, {**slots, **kept})

    def _step(
        self, params: Params, k: int, grads: Updates, slots: Slots, fast: Params, loss: Tensor
    ) -> tuple[Updates, Slots]:
        return self.rule.update(grads, slots, Point(fast, k, params, loss))

    def _features(self, params: Params, fast: Params, batch: Batch) -> Tensor:
        """Features of a batch under fast weights; of each task's under its own."""
        return by_task(batch, lambda fast, inputs: self.features({**params, **fast}, inputs), fast, batch.inputs)

    def _start(self, params: Params, support: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Fast weights before the first step, and the support features that a head's start is made of."""
        body = self._body(params)
        if is_stack(support):
            body = spread(support, body)
        features = self._features(params, body, support)
        head = self._head_state(params, features, support) if self.head.fast else {}
        # A start that follows from no parameter, such as zero, is differentiated too.
        made = {name: value.requires_grad_() for name, value in head.items()}
        return {**body, **made}, features

    def _head_state(self, params: Params, features: Tensor, support: Batch) -> dict[str, Tensor]:
        """What the head makes of support features."""
        labels, n_way = support.labels, support.n_way
        return by_task(support, lambda f, own: self.head.start(params, f, own, n_way), features, labels)

    def _inner_gradient(
        self, params: Params, fast: Params, features: Tensor, support: Batch, create_graph: bool, blind: bool = False
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradient of the support loss with respect to ``fast``, under which ``features`` were made; and the loss.

        ``blind``: the loss is the same whatever the features, so that nothing goes back through them.
        """
        # The head may have been made from these very features. A view parts the loss's direct path from that one, so
        # that the first step needs no second forward pass.
        seen = features.view_as(features)
        state = fast if self.head.fast else self._head_state(params, seen, support)
        losses = by_task(
            support,
            lambda state, seen, labels: self.loss(self.head.logits(params, state, seen), labels),
            state, seen, support.labels,
        )  # fmt: skip
        # No task's fast weights are in another's loss.
        loss = losses.sum()
        body = {name: value for name, value in fast.items() if not name.startswith(HEAD)}
        own = {name: value for name, value in fast.items() if name not in body}
        options: dict[str, Any] = {"create_graph": create_graph, "retain_graph": True}
        if not body or blind:
            grads = [*map(torch.zeros_like, body.values()), *gradient(loss, [*own.values()], **options)]
        else:
            pull, *of_head = gradient(loss, [seen, *own.values()], **options)
            # Back through the backbone: the vector-Jacobian product of the features with the head's pull.
            grads = [*gradient(features, [*body.values()], pull, **options), *of_head]
        return dict(zip([*body, *own], grads, strict=True)), losses

    def _adapt(self, params: Params, support: Batch) -> State:
        carry: Carry | None = None
        for link in self.links(support):
            carry = link(params, carry, True)
        assert carry is not None
        return self._state(params, carry, support)

    def _adapted(self, params: Params, support: Batch) -> State:
        carry = adapt(self.links(support), params)
        with torch.no_grad():
            return {name: value.detach() for name, value in self._state(params, carry, support).items()}

    def first_divergence(self, params: Params, support: Batch) -> int | None:
        """The first inner step, from 1, whose loss or gradient is not finite; ``None`` where there is none.

        What is not finite makes the weights that the step leaves not finite, and those are looked at.
        """
        with torch.inference_mode(False), torch.enable_grad(), self.model.frozen_in(self.config.frozen_dtype):
            theta = {**params, **self._told(leaves(params), support.recordable())}
            carry: Carry | None = None
            for step, link in enumerate(self.links(self._known(support), apart=True), start=1):
                carry = adapt([link], theta, carry)
                if not all(bool(torch.isfinite(value).all()) for value in carry.fast.values()):
                    return step
        return None

    def _state(self, params: Params, carry: Carry, support: Batch) -> State:
        """What ``predict`` needs: the fast weights, and the state of a head that follows from them."""
        if self.head.fast:
            return carry.fast
        features = self._features(params, carry.fast, support)
        return {**carry.fast, **self._head_state(params, features, support)}

    def _episode_grad(self, params: Params, episode: Episode) -> MetaGrad:
        try:
            return ESTIMATORS[self.estimator_name](self, params, episode)
        except RuntimeError as error:
            if "derivative for" not in str(error) or "not implemented" not in str(error):
                raise
            raise NotImplementedError(
                f"An exact meta-gradient of this backbone is impossible: {str(error).splitlines()[0]} Load the "
                f"backbone with attn_implementation='eager' or by load_backbone, or use estimator='first_order'."
            ) from error

    def displacement(self, params: Params, state: Params) -> dict[str, Tensor]:
        """What Reptile averages over tasks: for each meta-parameter that the task changed, the start minus the end."""
        return {name: value - state[name] for name, value in params.items() if name in state}

    @property
    def own_gradient(self) -> bool:
        return type(self)._episode_grad is not GradientLearner._episode_grad

    def _query_loss(self, episode: Episode, params: Params, carry: Carry) -> tuple[Tensor, Tensor]:
        return self._answered(params, self._state(params, carry, episode.support), episode.query)

    def _answered(self, params: Params, state: State, query: Batch) -> tuple[Tensor, Tensor]:
        def answer(state: State, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.predict(params, state, replace(query, inputs=inputs, labels=labels))
            return self.loss(logits, labels), logits

        losses, logits = by_task(query, answer, state, query.inputs, query.labels)
        return losses.sum(), logits
