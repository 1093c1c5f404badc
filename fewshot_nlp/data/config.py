"""Where tasks come from and what shape they have: flat settings, checked when they are built."""

from __future__ import annotations

from dataclasses import dataclass, field

from fewshot_nlp.checks import at_least, check_types, choice
from fewshot_nlp.data.splits import DEFAULT_FRACTIONS, check_fractions

#: What to do with an example that two splits share.
DUPLICATES = ("error", "drop", "keep")

_POSITIVE = ("min_examples", "clusters_per_class", "k_shot", "n_query", "eval_n_query")
_NOT_NEGATIVE = ("split_seed", "n_out_of_scope", "n_unlabelled", "eval_n_out_of_scope")


@dataclass
class EpisodeConfig:
    """Where tasks come from, and their shape."""

    dataset_name: str = field(
        default="home_intents",
        metadata={
            "help": "An embedded set (home_intents, glyphs), a Hub id, a csv, jsonl or parquet file, or a folder of "
            "such or of class folders of images."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a data set of the Hub."}
    )
    text_column_name: str | None = field(default=None, metadata={"help": "Column of texts; found if not given."})
    image_column_name: str | None = field(default=None, metadata={"help": "Column of images; found if not given."})
    label_column_name: str | None = field(default=None, metadata={"help": "Column of labels; found if not given."})
    split_file: str | None = field(
        default=None, metadata={"help": "JSON with lists of class names under train, validation and test."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of the class-disjoint splits where none are given."})
    split_fractions: list[float] = field(
        default_factory=lambda: list(DEFAULT_FRACTIONS),
        metadata={"help": "Shares of those for train, validation and test; 0 leaves a split out."},
    )
    min_examples: int = field(default=1, metadata={"help": "Leave out classes with fewer examples than this."})
    duplicates: str = field(
        default="error",
        metadata={
            "help": "What to do with a text or image that is in two splits, and with one, or a class, of a mixture "
            f"that is evaluated: {', '.join(DUPLICATES)}."
        },
    )
    mixture_dataset_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Further data sets whose training classes give training tasks, too; evaluation stays on "
            "dataset_name. One of too few classes for three splits gives all it has. The names of columns, split_seed, "
            "split_fractions, min_examples and duplicates are for all of them."
        },
    )
    mixture_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "How often a training task is of dataset_name, then of each of mixture_dataset_names, in "
            "proportion; equally often if not given."
        },
    )

    clusters_per_class: int = field(
        default=1,
        metadata={
            "help": "Divide each training class by k-means of the untrained backbone's features into this many, and "
            "draw training tasks among those: for data sets of few broad classes."
        },
    )

    n_way: int = field(default=5, metadata={"help": "Classes in an episode."})
    k_shot: int = field(default=1, metadata={"help": "Support examples a class in training episodes."})
    max_n_way: int | None = field(default=None, metadata={"help": "Draw the way of a training episode up to this."})
    max_k_shot: int | None = field(default=None, metadata={"help": "Draw the shot of a training episode up to this."})
    n_query: int = field(default=5, metadata={"help": "Query examples a class in training episodes."})
    n_out_of_scope: int = field(
        default=0,
        metadata={"help": "Further queries, of other classes, in a training episode; the loss leaves them out."},
    )
    n_unlabelled: int = field(
        default=0,
        metadata={
            "help": "Texts of the training classes of dataset_name, without labels, beside each training episode, "
            "where training is on other data sets; for learners that adapt to a domain."
        },
    )
    eval_n_way: int | None = field(default=None, metadata={"help": "Classes in an evaluation episode; default n_way."})
    eval_k_shots: list[int] = field(
        default_factory=lambda: [1, 5],
        metadata={"help": "Support examples a class in evaluation, one run each; 0 with use_label_names."},
    )
    eval_n_query: int = field(default=5, metadata={"help": "Query examples a class in evaluation."})
    eval_n_out_of_scope: int = field(
        default=0, metadata={"help": "Further queries, of other classes, in evaluation; the accuracy leaves them out."}
    )

    def __post_init__(self) -> None:
        check_types(self)
        for name in _POSITIVE:
            at_least(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            at_least(name, getattr(self, name), 0)
        at_least("n_way", self.n_way, 2)
        check_fractions(self.split_fractions)
        choice("duplicates", self.duplicates, DUPLICATES)
        self._check_mixture()
        if self.n_unlabelled and not (self.mixture_weights and self.mixture_weights[0] == 0):
            raise ValueError(
                f"n_unlabelled={self.n_unlabelled} takes texts of dataset_name for another domain than training's, "
                f"which is on {self.dataset_name!r}, too. Set mixture_dataset_names, and mixture_weights with 0 first."
            )
        for name, least in (("eval_n_way", 2), ("max_n_way", self.n_way), ("max_k_shot", self.k_shot)):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), least)
        if not self.eval_k_shots:
            raise ValueError(f"eval_k_shots={self.eval_k_shots!r} must be a list of shots, such as [1, 5].")
        for shot in self.eval_k_shots:
            at_least("eval_k_shots", shot, 0)

    @property
    def largest(self) -> tuple[int, int]:
        """Way and shot of the largest training episode."""
        return self.max_n_way or self.n_way, self.max_k_shot or self.k_shot

    def _check_mixture(self) -> None:
        names, weights = self.mixture_dataset_names, self.mixture_weights
        if names is not None and not all(names):
            raise ValueError(f"mixture_dataset_names={names!r} must be a list of data sets, such as [more.csv].")
        if weights is None:
            return
        if not names:
            raise ValueError(f"mixture_weights={weights!r} weighs nothing. Set mixture_dataset_names.")
        if len(weights) != 1 + len(names):
            raise ValueError(
                f"mixture_weights={weights!r} must be a list of {1 + len(names)} weights: of dataset_name, then of "
                f"each of the {len(names)} mixture_dataset_names."
            )
        for weight in weights:
            at_least("mixture_weights", weight, 0.0, float)
        if not any(weights):
            raise ValueError(f"mixture_weights={weights!r} must not be all zero. Give one data set a weight.")
