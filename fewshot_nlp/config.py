"""Flat settings of a model with Hugging Face's argument names, checked when they are built.

``FewShotConfig`` says what a model is and how it learns a task: it is saved beside every adapter as
``fewshot_config.json`` and is enough to build the learner again. Where tasks come from is ``data.config``.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewshot_nlp.checks import at_least, check_types, choice, from_mapping

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
CONFIG_NAME = "fewshot_config.json"

ADAPTERS = ("prompt_tuning", "p_tuning", "prefix_tuning", "lora", "ia3", "bitfit", "layernorm", "full", "none")
PROMPT_TUNING_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
POOLINGS = ("auto", "mean", "cls", "last", "pooler")
BATCH_NORMS = ("inductive", "transductive")
#: What a task asks for, and the name of the score of its answers, of which more is better.
TASKS = {"classification": "accuracy", "regression": "negative_mse"}
HEADS = ("prototype", "linear", "verbalizer")
HEAD_INITS = ("zero", "prototype", "names", "learned")
LABEL_TEXTS = ("name", "description")
DISTANCES = ("cosine", "euclidean")
#: Where the learned scale of the logits starts, by head. A language model's logits have one of their own.
HEAD_SCALES = {"prototype": 10.0, "linear": 10.0, "verbalizer": 1.0}
#: Where the class of each learner is: "module:Class", imported when it is asked for, or the class itself. A new learner
#: is a line here.
LEARNERS: dict[str, str | type] = {
    "maml": "fewshot_nlp.learners.maml:MAML",
    "fomaml": "fewshot_nlp.learners.fomaml:FOMAML",
    "anil": "fewshot_nlp.learners.anil:ANIL",
    "reptile": "fewshot_nlp.learners.reptile:Reptile",
    "protonet": "fewshot_nlp.learners.protonet:ProtoNet",
    "protomaml": "fewshot_nlp.learners.protomaml:ProtoMAML",
    "boil": "fewshot_nlp.learners.boil:BOIL",
    "cavia": "fewshot_nlp.learners.cavia:CAVIA",
    "meta_sgd": "fewshot_nlp.learners.meta_sgd:MetaSGD",
    "mamlpp": "fewshot_nlp.learners.mamlpp:MAMLPlusPlus",
    "imaml": "fewshot_nlp.learners.imaml:IMAML",
    "normalised_reptile": "fewshot_nlp.learners.normalised:NormalisedReptile",
    "matching": "fewshot_nlp.learners.matching:Matching",
    "relation": "fewshot_nlp.learners.relation:Relation",
    "relational": "fewshot_nlp.learners.relational:Relational",
    "snail": "fewshot_nlp.learners.snail:SNAIL",
    "leo": "fewshot_nlp.learners.leo:LEO",
    "hyper": "fewshot_nlp.learners.hyper:HyperMAML",
    "meta_lstm": "fewshot_nlp.learners.meta_lstm:MetaLSTM",
    "meta_transfer": "fewshot_nlp.learners.meta_transfer:MetaTransfer",
    "joint": "fewshot_nlp.learners.joint:Joint",
    "domain_adversarial": "fewshot_nlp.learners.domain_adversarial:DomainAdversarial",
    "memory": "fewshot_nlp.learners.memory:Memory",
}
INNER_RULES = ("sgd", "momentum", "adam", "meta_sgd", "step_rates")
FROZEN_DTYPES = ("float32", "bfloat16")
ESTIMATORS = ("exact", "first_order", "truncated", "implicit", "reptile")


@dataclass
class FewShotConfig:
    """What a meta-learned model is, and how it adapts to a task."""

    model_name_or_path: str = field(
        default=DEFAULT_BACKBONE, metadata={"help": "Backbone: a Hub id or a local folder that AutoModel can load."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the backbone."})
    task: str = field(
        default="classification",
        metadata={"help": f"What a task asks for, classes or one number an example: {', '.join(TASKS)}."},
    )
    pooling: str = field(
        default="auto",
        metadata={
            "help": f"From tokens or places to features: {', '.join(POOLINGS)}. auto is last for decoders, mean for "
            "other models of texts, and for images the backbone's own pooler, or else its class token."
        },
    )
    max_length: int = field(default=64, metadata={"help": "Longest text in tokens; longer ones are cut."})
    image_size: int | None = field(
        default=None, metadata={"help": "Width and height to make images; the backbone's own if not given."}
    )
    batch_norm: str | None = field(
        default=None,
        metadata={
            "help": "What batch norms normalise with: the running statistics of pre-training (inductive), or those of "
            "the batch at hand, queries among them (transductive); inductive where there are any, if not given."
        },
    )

    use_label_names: bool = field(
        default=False, metadata={"help": "Give the name of each class, in words, beside its support examples."}
    )
    label_name_weight: int = field(
        default=1, metadata={"help": "How many support examples the name of a class counts for, where it is used."}
    )
    names_in_training_alone: bool = field(
        default=False,
        metadata={
            "help": "Training tasks come with the names of their classes, and tasks to be answered later do without."
        },
    )
    learn_label_name_weight: bool = field(
        default=False,
        metadata={"help": "Learn how much a name counts for in a class mean; label_name_weight is where it starts."},
    )
    condition_on_names: bool = field(
        default=False,
        metadata={"help": "Scale and shift the features by what the names of a task's classes say together (FiLM)."},
    )
    label_texts: str = field(
        default="name",
        metadata={"help": f"What is read for the name of a class, its own or a sentence: {', '.join(LABEL_TEXTS)}."},
    )

    adapter: str = field(default="prompt_tuning", metadata={"help": f"What is trained: {', '.join(ADAPTERS)}."})
    num_virtual_tokens: int = field(default=8, metadata={"help": "Length of a soft prompt or prefix."})
    prompt_tuning_init: str | None = field(
        default=None,
        metadata={
            "help": f"Where a soft prompt starts: {', '.join(PROMPT_TUNING_INITS)}; at prompt_tuning_init_text where "
            "that is given, else at random."
        },
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "Start the soft prompt at these words' embeddings."}
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of LoRA."})
    lora_alpha: int = field(default=16, metadata={"help": "LoRA scaling: the update is multiplied by alpha / r."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that LoRA changes; by default the query and value projections."}
    )
    lora_layers_to_transform: list[int] | None = field(
        default=None, metadata={"help": "Layers that LoRA changes, counted from 0; all if not given."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "Rank-stabilised LoRA: the update is multiplied by alpha / sqrt(r)."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: LoRA turns the weights, and a learned magnitude scales them."}
    )

    layers_to_train: list[int] | None = field(
        default=None,
        metadata={"help": "Layers that adapter=full trains, counted from 0; the whole backbone if not given."},
    )

    center_features: bool = field(
        default=False,
        metadata={"help": "Subtract the mean feature of training examples from all features, and learn it further."},
    )
    whiten_features: float = field(
        default=0.0,
        metadata={
            "help": "Even out the directions in which (unit) features of one training class differ, by this share of "
            "their covariance, from 0 to less than 1, such as 0.05; found by the command, before training and after it."
        },
    )
    normalize_features: bool = field(
        default=False,
        metadata={
            "help": "Features of unit length, after the two above: in a class mean examples and names count alike."
        },
    )
    head: str = field(default="linear", metadata={"help": f"How features become logits: {', '.join(HEADS)}."})
    head_init: str = field(
        default="prototype",
        metadata={
            "help": f"Where a linear head starts on a new task: {', '.join(HEAD_INITS)}. Of regression it is learned."
        },
    )
    template: str | None = field(
        default=None,
        metadata={
            "help": "Words around a text for head=verbalizer, such as '{text} This is about {mask}.' for models of "
            "masked words, and '{text} This is about {label}' for models that go on with a text."
        },
    )
    verbalizer: dict[str, list[str]] | None = field(
        default=None, metadata={"help": "What head=verbalizer says for a label, by label; its name if not given."}
    )
    calibrate: bool = field(
        default=True,
        metadata={"help": "With head=verbalizer, take from a name's score what it has for all examples alike."},
    )
    distance: str = field(default="cosine", metadata={"help": f"Distance to prototypes: {', '.join(DISTANCES)}."})
    head_scale: float | None = field(
        default=None,
        metadata={
            "help": "Start of the learned scale of the logits; if not given, "
            + ", ".join(f"{scale:g} of head={head}" for head, scale in HEAD_SCALES.items())
            + "."
        },
    )

    learner: str = field(default="maml", metadata={"help": f"Meta-learning method: {', '.join(LEARNERS)}."})
    learner_kwargs: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of the method's own, by name, as its class documents them."}
    )
    inner_rule: str = field(
        default="sgd", metadata={"help": f"Update rule of the inner loop: {', '.join(INNER_RULES)}."}
    )
    inner_steps: int = field(default=1, metadata={"help": "Inner-loop steps on the support set."})
    inner_learning_rate: float = field(default=0.1, metadata={"help": "Inner step size of the adapter."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Inner step size of the head; inner_learning_rate if not given."}
    )
    inner_weight_decay: float = field(default=0.0, metadata={"help": "L2 decay of the fast weights in a step."})
    inner_max_grad_norm: float | None = field(
        default=None, metadata={"help": "Clip the inner gradient to this norm; not clipped if not given."}
    )
    estimator: str | None = field(
        default=None,
        metadata={"help": f"Meta-gradient of a gradient learner: {', '.join(ESTIMATORS)}; its own if not given."},
    )
    truncated_steps: int = field(
        default=1, metadata={"help": "Last inner steps that estimator=truncated differentiates exactly."}
    )
    step_loss_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Weights of the query loss after each inner step (multi-step loss of MAML++); by default the last "
            "step's alone counts."
        },
    )
    proximal: float = field(
        default=0.0, metadata={"help": "Pull of the inner loop towards its start; above 0 for estimator=implicit."}
    )
    conjugate_gradient_steps: int = field(
        default=5, metadata={"help": "Conjugate-gradient steps of estimator=implicit."}
    )

    frozen_dtype: str = field(
        default="float32",
        metadata={
            "help": f"In meta-gradients, products with frozen matrices are in: {', '.join(FROZEN_DTYPES)}. bfloat16 is "
            "faster on processors that compute in it, and changes the gradient by some hundredths."
        },
    )
    graph_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "Memory for the graphs of inner steps; what is beyond it runs again, which changes no gradient. "
            "By default 2 on a CPU, half of what a GPU has beside the weights."
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        if not self.model_name_or_path:
            raise ValueError(f"model_name_or_path={self.model_name_or_path!r} must be a Hub id or a folder.")
        choice("pooling", self.pooling, POOLINGS)
        choice("adapter", self.adapter, ADAPTERS)
        choice("head", self.head, HEADS)
        choice("head_init", self.head_init, HEAD_INITS)
        self._check_task()
        self._check_verbalizer()
        choice("distance", self.distance, DISTANCES)
        if not 0 <= self.whiten_features < 1:
            raise ValueError(
                f"whiten_features={self.whiten_features!r} is out of range. Use a share from 0 to less than 1, such as "
                f"0.05."
            )
        choice("learner", self.learner, LEARNERS)
        choice("inner_rule", self.inner_rule, INNER_RULES)
        at_least("max_length", self.max_length, 1)
        if self.image_size is not None:
            at_least("image_size", self.image_size, 1)
        if self.batch_norm is not None:
            choice("batch_norm", self.batch_norm, BATCH_NORMS)
        self._check_names()
        at_least("num_virtual_tokens", self.num_virtual_tokens, 1)
        at_least("lora_r", self.lora_r, 1)
        if self.layers_to_train is not None and (self.adapter != "full" or not self.layers_to_train):
            raise ValueError(
                f"layers_to_train={self.layers_to_train!r} says which layers adapter='full' trains, and adapter="
                f"{self.adapter!r}. Name at least one layer with adapter='full'; for LoRA use lora_layers_to_transform."
            )
        at_least("lora_alpha", self.lora_alpha, 1)
        self._check_adapter()
        if self.head_scale is not None:
            at_least("head_scale", self.head_scale, 0.0, float, above=True)
        at_least("inner_steps", self.inner_steps, 0)
        at_least("inner_learning_rate", self.inner_learning_rate, 0.0, float)
        if self.head_learning_rate is not None:
            at_least("head_learning_rate", self.head_learning_rate, 0.0, float)
        at_least("inner_weight_decay", self.inner_weight_decay, 0.0, float)
        if self.inner_max_grad_norm is not None:
            at_least("inner_max_grad_norm", self.inner_max_grad_norm, 0.0, float, above=True)
        if self.estimator is not None:
            choice("estimator", self.estimator, ESTIMATORS)
        at_least("truncated_steps", self.truncated_steps, 0)
        if self.step_loss_weights is not None:
            if not any(self.step_loss_weights):
                raise ValueError(
                    f"step_loss_weights={self.step_loss_weights!r} must be a list of weights, one an inner step, and "
                    f"not all of them 0."
                )
            for weight in self.step_loss_weights:
                at_least("step_loss_weights", weight, 0.0, float)
        at_least("proximal", self.proximal, 0.0, float)
        at_least("conjugate_gradient_steps", self.conjugate_gradient_steps, 1)
        choice("frozen_dtype", self.frozen_dtype, FROZEN_DTYPES)
        if self.frozen_dtype != "float32" and self.adapter == "full":
            raise ValueError(
                f"frozen_dtype={self.frozen_dtype!r} with adapter='full' changes nothing: no matrix is frozen. "
                f"Use adapter='lora', or bf16 for all of training."
            )
        if self.graph_memory_gb is not None:
            at_least("graph_memory_gb", self.graph_memory_gb, 0.0, float)

    @property
    def score(self) -> str:
        """What ``MetaGrad.accuracy`` holds: ``accuracy``, or for regression ``negative_mse``."""
        return TASKS[self.task]

    def _check_task(self) -> None:
        choice("task", self.task, TASKS)
        if self.task == "classification":
            if self.head_init == "learned":
                raise ValueError(
                    "head_init='learned' needs as many outputs in every task, and tasks differ in their classes. Use "
                    "head_init='prototype' or 'zero', or task='regression'."
                )
            return
        if self.head != "linear":
            raise ValueError(
                f"head={self.head!r} answers with classes, and task='regression' asks for numbers. Use head='linear'."
            )
        if self.use_label_names:
            raise ValueError("use_label_names names classes, and task='regression' has none. Leave it out.")
        # Its default tells classes apart, and gives way.
        self.head_init = "learned" if self.head_init == "prototype" else self.head_init
        if self.head_init != "learned":
            raise ValueError(
                f"head_init={self.head_init!r} is for classes: the one output of task='regression' starts where it was "
                f"meta-learned to. Use head_init='learned', or leave it out."
            )

    def _check_adapter(self) -> None:
        for name in ("use_rslora", "use_dora"):
            if getattr(self, name) and self.adapter != "lora":
                raise ValueError(f"{name} is a kind of LoRA, and adapter={self.adapter!r}. Use adapter='lora'.")
        start, text = self.prompt_tuning_init, self.prompt_tuning_init_text
        if start is None:
            return
        choice("prompt_tuning_init", start, PROMPT_TUNING_INITS)
        if self.adapter != "prompt_tuning":
            raise ValueError(
                f"prompt_tuning_init={start!r} starts a soft prompt, and adapter={self.adapter!r}. Use "
                f"adapter='prompt_tuning', or leave it out."
            )
        if (start == "TEXT") != (text is not None):
            raise ValueError(
                f"prompt_tuning_init={start!r} and prompt_tuning_init_text={text!r} contradict each other. Give both "
                f"'TEXT' and a text, or the other start alone."
            )

    def _check_verbalizer(self) -> None:
        if self.head != "verbalizer":
            for name in ("template", "verbalizer"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is read by head='verbalizer' alone, and head={self.head!r}. "
                        f"Set head, or leave {name} out."
                    )
            return
        if self.template is not None:
            slots = [self.template.count(slot) for slot in ("{text}", "{mask}", "{label}")]
            if slots not in ([1, 1, 0], [1, 0, 1]):
                raise ValueError(
                    f"template={self.template!r} must hold {{text}} once, and once {{mask}} for a model of masked "
                    f"words, or {{label}} for one that goes on with a text: '{{text}} This is about {{mask}}.'"
                )
        words = self.verbalizer
        if words is not None and (
            not isinstance(words, dict)
            or not all(isinstance(said, list) and said for said in words.values())
            or not all(isinstance(word, str) and word.strip() for said in words.values() for word in said)
        ):
            raise ValueError(
                f"verbalizer={words!r} must be lists of words by label, such as {{refund: [money, back]}}."
            )
        for name in ("learn_label_name_weight", "condition_on_names"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} reads names as texts, and head='verbalizer' speaks them. Leave {name} out, or use "
                    f"head='linear'."
                )
        for name in ("center_features", "whiten_features", "normalize_features"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} changes features, and head='verbalizer' answers by what names score. Leave {name} out, "
                    f"or use head='linear'."
                )
        # It speaks the names of classes, from where it starts: what was left at its default gives way.
        self.use_label_names = True
        self.head_init = "names" if self.head_init == "prototype" else self.head_init
        if self.head_init != "names":
            raise ValueError(
                f"head_init={self.head_init!r} is for head='linear': head='verbalizer' starts at the names of the "
                f"classes. Leave it out."
            )

    def _check_names(self) -> None:
        at_least("label_name_weight", self.label_name_weight, 1)
        choice("label_texts", self.label_texts, LABEL_TEXTS)
        reads = {
            "learn_label_name_weight": self.learn_label_name_weight,
            "condition_on_names": self.condition_on_names,
            "head_init": self.head_init == "names",
            "label_texts": self.label_texts != "name",
            "names_in_training_alone": self.names_in_training_alone,
        }
        for name, told in reads.items():
            if told and not self.use_label_names:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} reads the names of classes, which are not given. Set "
                    f"use_label_names, or leave {name} out."
                )
        if self.head_init == "names" and self.head == "prototype":
            raise ValueError(
                "head_init='names' with head='prototype' would read the names alone. Use head='linear', which goes on "
                "from them, or learn_label_name_weight, which mixes them with the examples."
            )
        if self.learn_label_name_weight and self.head == "linear" and self.head_init != "prototype":
            raise ValueError(
                f"learn_label_name_weight weighs names in class means, and head_init={self.head_init!r} has none. Use "
                f"head_init='prototype'."
            )

        if self.names_in_training_alone and (self.head_reads_names or self.condition_on_names):
            raise ValueError(
                "names_in_training_alone leaves nothing to read to learn_label_name_weight, head_init='names' and "
                "condition_on_names, once a task comes without names. Leave one or the other out."
            )

    @property
    def logit_scale(self) -> float:
        """Where the scale of the logits starts: ``head_scale``, or where that of this head does."""
        return HEAD_SCALES[self.head] if self.head_scale is None else self.head_scale

    @property
    def tells_names(self) -> bool:
        """Whether the names of the classes are given of the tasks that are to be answered."""
        return self.use_label_names and not self.names_in_training_alone

    @property
    def head_reads_names(self) -> bool:
        """Whether the head tells the names of classes from examples; otherwise they are examples like the others."""
        return self.learn_label_name_weight or self.head_init == "names"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any], source: str = CONFIG_NAME) -> FewShotConfig:
        return from_mapping(cls, settings, source)

    @classmethod
    def from_json_file(cls, path: str | Path) -> FewShotConfig:
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8"))["config"], str(path))
