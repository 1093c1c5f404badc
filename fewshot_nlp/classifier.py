"""``FewShotClassifier``: learn a classifier of texts or images from a handful of examples, scikit-learn's way."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from fewshot_nlp.config import DEFAULT_BACKBONE, FewShotConfig
from fewshot_nlp.data.columns import has_words, readable
from fewshot_nlp.data.encode import encode_with_names, labelled
from fewshot_nlp.data.examples import (
    check_classes,
    check_each_has_one,
    check_examples,
    check_label_texts,
    check_labels,
    check_pairs,
    listed,
)
from fewshot_nlp.hub.adapter import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.types import Batch


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """A classifier of texts, or of images, that learns from one or more examples a class.

    ::

        classifier = FewShotClassifier.from_pretrained("path/or/hub-id").fit(texts, labels)
        classifier.predict(["turn the heating up"])

    ``fit`` adapts the meta-learned adapter to the examples; it starts afresh each time and never changes the adapter.
    Without an adapter, new texts go to the nearest class mean of the frozen backbone (untrained prototypes). Where the
    backbone takes images, so does the classifier: Pillow images, or arrays of bytes ``[height, width]`` or ``[height,
    width, 3]``.

    Args:
        adapter: a meta-learned adapter: a folder, a Hub id, or a loaded ``FewShotAdapter``, whose model ``fit`` moves
            to ``device``. Folders and Hub ids are loaded by the first ``fit``, once.
        model_name_or_path: backbone to use without an adapter; by default a small sentence encoder. An adapter brings
            its own.
        revision: branch, tag or commit of whichever of the two is on the Hub.
        batch_size: texts or images at a time in ``predict``. Changes speed and memory, not the answers.
        device: such as ``"cpu"`` or ``"cuda:0"``; by default the GPU if there is one.
        label_texts: what is read for a label, by label, where names or descriptions of classes are read; by default the
            label itself, in words.
        classes: the labels to tell apart, some or all of which may have no example. Their names are read, and count as
            an example each for an adapter that was not trained to read them; by default the labels of ``fit``, whose
            names are read only by an adapter that was. Among images no name is read: each needs an example.
        config_overrides: settings of ``FewShotConfig`` by which ``fit`` is to go on otherwise than in training, such as
            ``{"inner_steps": 10}``; see ``FewShotAdapter.from_pretrained``.

    Attributes:
        classes_: the labels, sorted, ``[n_classes]``.
        learner_, params_, state_: the learner, its meta-parameters, and what it learned in ``fit``.
    """

    #: By which arguments it was loaded, the adapter, and how it is found again without a token.
    _loaded: tuple[tuple[Any, ...], FewShotAdapter, dict[str, Any]] | None = None

    def __init__(
        self,
        adapter: str | Path | FewShotAdapter | None = None,
        *,
        model_name_or_path: str | None = None,
        revision: str | None = None,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        label_texts: Mapping[str, str] | None = None,
        classes: Iterable[Any] | None = None,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self.adapter = adapter
        self.model_name_or_path = model_name_or_path
        self.revision = revision
        self.batch_size = batch_size
        self.device = device
        self.label_texts = label_texts
        self.classes = classes
        self.config_overrides = config_overrides

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        batch_size: int = 256,
        device: str | torch.device | None = None,
        label_texts: Mapping[str, str] | None = None,
        classes: Iterable[Any] | None = None,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> FewShotClassifier:
        """A classifier, not yet fitted, on the adapter that ``save_pretrained`` or ``push_to_hub`` left.

        The adapter is loaded here and shared with every ``clone``, as in cross-validation. Where a clone goes on by
        other ``config_overrides``, it is read again from the cache: no token is kept.

        Raises:
            FileNotFoundError, ValueError: as ``FewShotAdapter.from_pretrained``.
        """
        classifier = cls(
            path_or_repo,
            revision=revision,
            batch_size=batch_size,
            device=device,
            label_texts=label_texts,
            classes=classes,
            config_overrides=config_overrides,
        )
        adapter = FewShotAdapter.from_pretrained(
            path_or_repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            config_overrides=config_overrides,
        )
        classifier._loaded = (classifier._source(), adapter, {"cache_dir": cache_dir, "local_files_only": True})
        return classifier

    def fit(self, X: Iterable[Any], y: Iterable[Any]) -> FewShotClassifier:
        """Learn from the texts or images ``X`` with labels ``y``: strings, integers or booleans, any number a class.

        An adapter that was trained with ``use_label_names`` reads the labels, too: ``"lost_card"`` tells it something,
        ``"class 1"`` misleads it. ``label_texts`` says what to read instead; one that was trained on descriptions
        needs it.

        With ``classes`` it answers before any example is given, and better with each::

            classifier = FewShotClassifier(classes=["refund", "delivery"]).fit([], [])
            classifier.fit(["where is my parcel"], ["delivery"])

        Raises:
            ValueError: no texts, an empty text, images where the backbone takes texts or the other way, unequal
                lengths, a missing label, fewer than two classes, a class without an image where the backbone takes
                images, labels without words or descriptions for an adapter that reads them, or a bad argument of the
                constructor.
            FileNotFoundError, ImportError, OSError: the adapter or backbone cannot be loaded.
        """
        known = None if self.classes is None else check_classes(self.classes)
        check_label_texts(self.label_texts)
        remedy = "Pass at least 1, or the labels to tell apart by their names as classes."
        examples = listed(X, 1 if known is None else 0, remedy)
        classes, labels = check_labels(y, len(examples), known)
        _check_batch_size(self.batch_size)
        device = _check_device(self.device)
        adapter = self._load()
        learner = adapter.learner
        if learner.config.task != "classification":
            raise ValueError(
                f"The adapter was trained for task={learner.config.task!r}, and a classifier answers with classes. "
                f"Call adapter.learner.adapt and predict, or use an adapter of task='classification'."
            )
        encoder = learner.model.encoder()
        check_examples(examples, encoder.kind)
        if encoder.kind != "text":
            check_each_has_one(classes, labels, encoder.kind)
        with learner.model.turn:
            learner.model.to(device)
            params = {name: tensor.to(device) for name, tensor in adapter.params.items()}
            reads_names = encoder.kind == "text" and (learner.config.tells_names or known is not None)
            names = self._names(classes, learner.config) if reads_names else []
            inputs = encoder.collate(encode_with_names(encoder, examples, names))
            support = labelled(inputs, torch.from_numpy(labels), len(classes)).to(device)
            self.state_ = learner.adapt(params, support)
            self.learner_, self.params_, self.classes_ = learner, params, classes
            self._encoder, self._device = encoder, device
        return self

    def predict(self, X: Iterable[Any]) -> np.ndarray:
        """The most probable label of each text or image, ``[n]``; see ``predict_proba``."""
        check_is_fitted(self)
        with self.learner_.model.turn:
            return self.classes_[self.predict_proba(X).argmax(axis=1)]

    def predict_proba(self, X: Iterable[Any]) -> np.ndarray:
        """Probability of each class, float64 ``[n, n_classes]`` in the order of ``classes_``; rows sum to 1.

        A transductive learner, such as one on conv-4 (``learner_.transductive``), answers the examples of a call
        together: a row depends on all of ``X``.

        Raises:
            NotFittedError: before ``fit``.
            ValueError: no texts, an empty text, images where the backbone takes texts or the other way, or a learner
                that diverged in ``fit``.
        """
        check_is_fitted(self)
        examples = listed(X)
        with self.learner_.model.turn:
            check_examples(examples, self._encoder.kind)
            # Another classifier, on the same adapter, may have been fitted elsewhere.
            self.learner_.model.to(self._device)
            batch_size = _check_batch_size(self.batch_size)
            # A transductive learner reads the queries together, so they may not be parted.
            size = len(examples) if self.learner_.transductive else batch_size
            # Texts of like length side by side: little padding, whatever the order they came in.
            of_text = self._encoder.kind == "text"
            order = sorted(range(len(examples)), key=lambda i: len(examples[i]) if of_text else 0)
            logits = torch.empty(len(examples), len(self.classes_), dtype=torch.float64)
            for start in range(0, len(examples), size):
                rows = order[start : start + size]
                logits[rows] = self._logits([examples[row] for row in rows])
        probabilities = logits.softmax(dim=1)
        # Also where a largest logit is infinite.
        if probabilities.isnan().any():
            raise ValueError("The logits are not numbers: fit diverged. Use an adapter of a lower inner_learning_rate.")
        return probabilities.numpy()

    def _logits(self, examples: list[Any]) -> Tensor:
        unknown = torch.zeros(len(examples), dtype=torch.int64)
        query = Batch(self._encoder(examples), unknown, len(self.classes_)).to(self._device)
        with torch.no_grad():
            return self.learner_.predict(self.params_, self.state_, query).cpu().double()

    def _names(self, classes: np.ndarray, config: FewShotConfig) -> list[str]:
        """What is read for each class: what ``label_texts`` says, or the label in words."""
        if self.label_texts is None and config.label_texts == "description":
            raise ValueError(
                "This adapter was trained to read a sentence about each class (label_texts='description'). Pass "
                "label_texts={label: sentence}."
            )
        if self.label_texts is None:
            return _in_words(classes)
        lost = [label for label in classes.tolist() if not _says(self.label_texts.get(label))]
        if lost:
            raise ValueError(f"label_texts has no words for the label {lost[0]!r}. Give a text for every label.")
        for label in classes.tolist():
            check_pairs(f"label_texts[{label!r}]", self.label_texts[label])
        return [self.label_texts[label] for label in classes.tolist()]

    def _source(self) -> tuple[Any, ...]:
        """What ``_load`` loads: as long as it stays the same, once is enough."""
        # A copy: the mapping may be changed in place later.
        return self.adapter, self.model_name_or_path, self.revision, copy.deepcopy(self.config_overrides)

    def _load(self) -> FewShotAdapter:
        if self.adapter is not None and self.model_name_or_path is not None:
            raise ValueError(
                f"Both adapter={self.adapter!r} and model_name_or_path={self.model_name_or_path!r} are given. An "
                f"adapter brings its own backbone: give one of the two."
            )
        if self.config_overrides and (self.adapter is None or isinstance(self.adapter, FewShotAdapter)):
            raise ValueError(
                f"config_overrides={self.config_overrides!r} is for an adapter that is loaded here, a folder or a Hub "
                f"id. Give one, or FewShotAdapter.from_pretrained(..., config_overrides=...)."
            )
        if isinstance(self.adapter, FewShotAdapter):
            return self.adapter
        own = self._source()
        if self._loaded is None or self._loaded[0] != own:
            # The same adapter, by other settings, is on this machine already.
            cached = self._loaded[2] if self._loaded is not None and self._loaded[0][:-1] == own[:-1] else {}
            loaded = (
                _untrained(self.model_name_or_path or DEFAULT_BACKBONE, self.revision)
                if self.adapter is None
                else FewShotAdapter.from_pretrained(
                    self.adapter, revision=self.revision, config_overrides=self.config_overrides, **cached
                )
            )
            self._loaded = (own, loaded, cached)
        return self._loaded[1]

    def __sklearn_clone__(self) -> FewShotClassifier:
        twin = super().__sklearn_clone__()
        # A learner keeps nothing between calls, and threads take turns, so twins may share one.
        twin._loaded = self._loaded
        return twin

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


def _untrained(model_name_or_path: str, revision: str | None) -> FewShotAdapter:
    """Prototypes on the frozen backbone."""
    config = FewShotConfig(
        model_name_or_path=model_name_or_path,
        model_revision=revision,
        adapter="none",
        head="prototype",
        learner="protonet",
    )
    learner = build_learner(config)
    return FewShotAdapter(learner, learner.init_params())


def _check_batch_size(batch_size: Any) -> int:
    if not isinstance(batch_size, Integral) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} is out of range. Use an integer of at least 1.")
    return int(batch_size)


def _check_device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        checked = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known. Use 'cpu', 'cuda' or 'cuda:<number>'.") from error
    if checked.type == "cuda" and not (checked.index or 0) < torch.cuda.device_count():
        raise ValueError(f"device={device!r}: this machine has {torch.cuda.device_count()} CUDA devices. Use 'cpu'.")
    try:
        # A device without values would take away those of a shared adapter, too.
        torch.zeros(1, device=checked).item()
    except (RuntimeError, ImportError, AssertionError) as error:
        raise ValueError(f"device={device!r}: this machine cannot compute on it. Use 'cpu'.") from error
    return checked


def _says(text: Any) -> bool:
    """Whether ``text`` is one that has words."""
    return isinstance(text, str) and has_words(text)


def _in_words(classes: np.ndarray) -> list[str]:
    """What the classes are called in words; ``ValueError`` where a label is no word."""
    for label in classes.tolist():
        if not isinstance(label, str) or not has_words(label):
            raise ValueError(
                f"The label {label!r} has no words, and names of classes are read: classes says so, or this adapter "
                f"was trained to read them (use_label_names). Use names as labels, pass label_texts={{label: words}}, "
                f"or do without."
            )
    return [readable(label) for label in classes.tolist()]
