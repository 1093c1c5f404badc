"""Tasks in one stack, where calls take longer than arithmetic: on an accelerator, or with a tiny network on a CPU, one
call serves all of them.

A stack is an episode whose tensors have the tasks in front: inputs ``[tasks, n, ...]``, labels ``[tasks, n]``, fast
weights ``[tasks, ...]``. What a learner makes of one task's tensors without differentiating goes through ``torch.vmap``
(features, heads, update rules); the engine differentiates the sum of the tasks' losses outside of it, which for the
fast weights of each task is the gradient of its own, and for the meta-parameters the sum of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewshot_nlp.functional.trunk import widened
from fewshot_nlp.learners.workers import weights
from fewshot_nlp.models.model import FewShotModel
from fewshot_nlp.models.pooling import right_padded
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, EpisodeSpec, Params

if TYPE_CHECKING:
    from fewshot_nlp.learners.scheduling import ScheduledLearner

#: Weights, embeddings aside, up to which a CPU takes longer to be told than to compute.
MOST_WEIGHTS = 50_000
#: How far the gradient of a stack may be from the sum of its tasks', relative to its norm, where this is tried: by the
#: rounding of products, in half precision if they are. What is not a stack's gradient is off by as much as itself.
TOLERANCE, HALF_TOLERANCE = 1e-2, 0.2


def is_stack(batch: Batch) -> bool:
    """Whether the tensors of ``batch`` have tasks in front."""
    return batch.labels.dim() > 1


def extent(batch: Batch) -> tuple[int, int]:
    """Texts and their tokens, padding included; or images, of length 1. Of a stack, those of all tasks."""
    mask = batch.inputs.get("attention_mask")
    return batch.labels.numel(), 1 if mask is None else mask.shape[-1]


def by_task(batch: Batch, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)``; where ``batch`` is a stack, of each task's part of all arguments, stacked again.

    Arguments are tensors, and mappings of tensors; what ``function`` knows beside them, all tasks share.
    """
    return torch.vmap(function)(*arguments) if is_stack(batch) else function(*arguments)


def spread(batch: Batch, values: Params) -> dict[str, Tensor]:
    """The same ``values`` for every task of a stack."""
    return {name: value.expand(len(batch.labels), *value.shape) for name, value in values.items()}


@torch.inference_mode(False)
def stacked(episodes: Sequence[Episode]) -> Episode:
    """The episodes, which are ``alike``, as one; the spec is the first one's.

    Those of fewer examples have further ones in front, which are of no class, so that no loss and no class mean sees
    them: what a head reads from behind, such as names of classes, stays where it was.
    """
    support, query = (_stack([getattr(episode, part) for episode in episodes]) for part in ("support", "query"))
    return Episode(episodes[0].spec, support, query)


def _stack(batches: Sequence[Batch]) -> Batch:
    inputs = [right_padded(each.inputs) if "attention_mask" in each.inputs else each.inputs for each in batches]
    if "attention_mask" in inputs[0]:
        longest = max(part["attention_mask"].shape[1] for part in inputs)
        inputs = [widened(part, longest) for part in inputs]
    most, labels = max(map(len, batches)), list[Tensor]()
    for place, batch in enumerate(batches):
        more = most - len(batch)
        inputs[place] = {n: torch.cat([t[:1].expand(more, *t.shape[1:]), t]) for n, t in inputs[place].items()}
        labels.append(torch.cat([torch.full_like(batch.labels[:1].expand(more), OUT_OF_SCOPE), batch.labels]))
    together = {name: torch.stack([part[name] for part in inputs]) for name in inputs[0]}
    return Batch(together, torch.stack(labels), batches[0].n_way)


def stacks(learner: ScheduledLearner, episodes: Sequence[Episode], most: int) -> Iterator[Sequence[Episode]]:
    """``episodes`` in their order, in parts of neighbours that are ``alike``, ``most`` at a time."""
    first = 0
    for place in range(1, len(episodes) + 1):
        full = place - first == most
        if place == len(episodes) or full or not alike(learner, episodes[first : place + 1]):
            yield episodes[first:place]
            first = place


def alike(learner: ScheduledLearner, episodes: Sequence[Episode]) -> bool:
    """Whether the first and the last of ``episodes`` can be in one stack, and all together no more than double their
    size: as many classes, and inputs that differ in length alone. As many examples, where there are none that a loss
    would not see, or where features depend on them."""
    equal = learner.config.task == "regression" or learner.model.transductive
    if _form(episodes[0], equal) != _form(episodes[-1], equal):
        return False
    filled, own = 0, 0
    for batches in ([each.support for each in episodes], [each.query for each in episodes]):
        sizes = [extent(batch) for batch in batches]
        filled += len(episodes) * math.prod(map(max, zip(*sizes, strict=True)))
        own += sum(map(math.prod, sizes))
    return filled <= 2 * own


def _form(episode: Episode, equal: bool) -> list[Any]:
    return [
        (
            batch.n_way,
            len(batch) if equal else 0,
            batch.labels.dtype,
            batch.names is None,
            batch.teaches,
            _shapes(batch),
        )
        for batch in (episode.support, episode.query)
    ]


def _shapes(batch: Batch) -> dict[str, Any]:
    texts = "attention_mask" in batch.inputs
    return {name: (tensor.dtype, None if texts else tensor.shape[1:]) for name, tensor in batch.inputs.items()}


def pays(model: FewShotModel) -> bool:
    """Whether calls of ``model`` take longer than what they compute."""
    if model.device.type != "cpu":
        return True
    # A convolution uses its few weights in every place of an image.
    folds = any(isinstance(part, nn.Conv1d | nn.Conv2d | nn.Conv3d) for part in model.module.modules())
    return not folds and weights(model.module) <= MOST_WEIGHTS


def refusal(learner: ScheduledLearner) -> str | None:
    """Why tasks of ``learner`` cannot be in one stack, whatever the backbone; ``None`` where they can."""
    model = learner.model
    if learner.own_gradient:
        return "its gradient is more than its estimator's"
    if model.voice is not None or learner.config.condition_on_names or learner.reads_names:
        return "it reads the names of each task's classes"
    if model.sees_padding:
        return "its backbone sees the padding that makes texts equally long"
    if learner.estimator_name == "implicit":
        return "conjugate gradients end where each task's do"
    if model.training:
        return "dropout draws from each task's own seed"
    if any(getattr(part, "gradient_checkpointing", False) for part in model.module.modules()):
        return "gradient checkpointing runs layers again outside of the stack"
    return None


@torch.inference_mode(False)
def trial(learner: ScheduledLearner, like: Batch) -> str | None:
    """What is wrong with the gradient of a stack of two tasks; ``None`` where it is the sum of theirs.

    Neither is a backbone known to be one that ``torch.vmap`` takes, nor would each that it gets wrong raise. The tasks
    are random, and of ``like`` have the kind of input alone: the answer must not depend on the data at hand.
    """
    draw = torch.Generator().manual_seed(0)
    spec = EpisodeSpec("train", 0, "trial", ("0", "1"), (), ())
    sizes = (4, 4) if learner.config.task == "regression" or learner.model.transductive else (4, 3)
    tasks = [Episode(spec, *(_random_batch(learner, like, draw, size) for _ in range(2))) for size in sizes]
    start = learner.init_params()
    # Where adapters start, some have no gradient.
    params = {n: v + 0.02 * torch.randn(v.shape, generator=draw).to(v) for n, v in start.items()}
    try:
        found = learner._stack_grad(params, tasks)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"{type(error).__name__} says: {' '.join(str(error).split())[:200]}"
    own = [learner._told_grad(params, task) for task in tasks]
    half = torch.is_autocast_enabled(learner.model.device.type) or learner.config.frozen_dtype != "float32"
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    wanted = {name: own[0].grads[name] + own[1].grads[name] for name in params}
    size = _norm(*wanted.values())
    pairs = [(name, found.grads[name], value, 0.01 * size) for name, value in wanted.items()]
    pairs += [("answers", one, part.logits[0], 0.0) for one, part in zip(found.logits, own, strict=True)]
    for name, one, other, floor in pairs:
        off, of = _norm(one - other), _norm(other) + floor
        # Also where one is not a number.
        if not off <= tolerance * of:
            return f"{name} would be off by {off:.0e} of {of:.0e}"
    return None


def _random_batch(learner: ScheduledLearner, like: Batch, draw: torch.Generator, size: int) -> Batch:
    """So many examples of two classes, and the names of these, where the learner is to know them."""
    model = learner.model

    def inputs(count: int) -> dict[str, Tensor]:
        if "attention_mask" not in like.inputs:
            return {n: torch.randn(count, *t.shape[1:], generator=draw).to(t) for n, t in like.inputs.items()}
        length = min(6, learner.config.max_length)
        texts = model.any_texts(count, length)
        vocabulary = int(model.module.config.vocab_size)
        # The first two are padding in most vocabularies, the embedding of which has no gradient.
        texts["input_ids"] = torch.randint(2, vocabulary, (count, length), generator=draw).to(model.device)
        texts["attention_mask"][1, 4:] = 0
        return texts

    if learner.config.task == "regression":
        return Batch(inputs(size), torch.randn(size, generator=draw).to(model.device, model.dtype), 1)
    names = inputs(2) if learner.config.use_label_names else None
    return Batch(inputs(size), torch.arange(size, device=model.device) % 2, 2, names)


def _norm(*tensors: Tensor) -> float:
    # Not every accelerator has double precision.
    return math.sqrt(sum(float(value.cpu().double().square().sum()) for value in tensors))
