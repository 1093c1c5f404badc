"""Training settings with the names and meanings of transformers' ``TrainingArguments``.

The class stands alone instead of inheriting: a setting that this trainer would ignore is not accepted at all.
What transformers' callbacks read from their ``args`` is here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from fewshot_nlp.checks import at_least, check_types, choice
from fewshot_nlp.training.checks import check_writable

OPTIMIZERS = ("adamw", "sgd")
SCHEDULERS = ("linear", "cosine", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt")
EVAL_STRATEGIES = ("no", "steps")
SAVE_STRATEGIES = ("no", "steps", "best")

_POSITIVE = ("max_steps", "meta_batch_size", "gradient_accumulation_steps", "eval_steps", "eval_episodes",
             "save_steps", "logging_steps", "max_skipped_steps", "baseline_steps", "ddp_timeout")  # fmt: skip
_NOT_NEGATIVE = ("seed", "warmup_steps", "eval_delay", "test_episodes", "baseline_episodes")
_RATES = ("learning_rate", "weight_decay", "adam_epsilon", "max_grad_norm", "early_stopping_threshold",
          "baseline_learning_rate")  # fmt: skip


def _help(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class FewShotTrainingArguments:
    """How a learner is meta-trained, validated, saved and shared.

    A *step* is one step of the outer optimiser. It uses ``meta_batch_size * gradient_accumulation_steps`` episodes,
    whatever the number of processes.

    Raises:
        ValueError: on construction, for a value of the wrong type or out of range, for settings that contradict each
            other, and for an ``output_dir`` that cannot be written.
    """

    output_dir: str = _help("Where everything that the run makes is written.", "output")
    overwrite_output_dir: bool = _help(
        "Replace what an earlier run left in output_dir; without it such a folder is an error. A YAML file's holds for "
        "that file's output_dir: another one on the command line needs it there, too.",
        False,
    )
    seed: int = _help("Seed of the initial parameters and of the training episodes.", 0)

    max_steps: int = _help("Steps of the outer optimiser.", 200)
    meta_batch_size: int = _help("Episodes in a micro-round, over all processes.", 4)
    gradient_accumulation_steps: int = _help("Micro-rounds in one optimiser step.", 1)
    optim: str = _help(f"Outer optimiser: {', '.join(OPTIMIZERS)}.", "adamw")
    learning_rate: float = _help("Step size of the outer optimiser at its highest.", 1e-3)
    weight_decay: float = _help("Decoupled weight decay (AdamW) or L2 penalty (SGD) of what is a matrix.", 0.0)
    adam_beta1: float = _help("First-moment decay of AdamW.", 0.9)
    adam_beta2: float = _help("Second-moment decay of AdamW.", 0.999)
    adam_epsilon: float = _help("Epsilon of AdamW.", 1e-8)
    max_grad_norm: float = _help("Clip the meta-gradient to this norm; 0 does not clip.", 1.0)
    lr_scheduler_type: str = _help(f"Shape of the learning rate: {', '.join(SCHEDULERS)}.", "linear")
    warmup_steps: int = _help("Steps over which the learning rate rises to learning_rate.", 0)
    max_skipped_steps: int = _help(
        "Save and stop after this many steps in a row whose loss or gradient is not a finite number.", 10
    )
    weight_interpolation: float = _help(
        "What is validated and kept is the start plus this share of what training changed; 1 is all of it, and less "
        "forgets less of the backbone (WiSE-FT).",
        1.0,
    )
    bf16: bool = _help("Run the backbone under bfloat16 autocast.", False)
    use_cpu: bool = _help("Train on the CPU even where there is an accelerator.", False)
    ddp_timeout: int = _help("Seconds after which a process gives up waiting for the others.", 1800)
    cpu_threads: int | None = _help("CPU threads a process; default: the cores, shared among its processes.", None)

    eval_strategy: str = _help(f"When to validate: {', '.join(EVAL_STRATEGIES)}.", "steps")
    eval_steps: int = _help("Steps between two validations.", 50)
    eval_delay: int = _help("Do not validate before this step.", 0)
    eval_on_start: bool = _help("Validate the untrained start, too; it may be the best.", False)
    eval_episodes: int = _help("Validation episodes for each number of shots.", 50)
    test_episodes: int = _help("Test episodes for each number of shots; 0 leaves the test out.", 600)
    baseline_episodes: int = _help(
        "Test episodes, of test_episodes, on which the fine-tuning baseline runs as well; it is slow. 0 leaves it out.",
        100,
    )
    baseline_steps: int = _help("Steps of Adam of the fine-tuning baseline.", 10)
    baseline_learning_rate: float = _help("Its step size of the adapter.", 1e-3)

    save_strategy: str = _help(
        f"When to save a checkpoint: {', '.join(SAVE_STRATEGIES)}. With no, nothing is written before the end.", "steps"
    )
    save_steps: int = _help("Steps between two checkpoints.", 50)
    save_total_limit: int | None = _help("Keep this many checkpoints; the best and the newest are always kept.", None)
    load_best_model_at_end: bool = _help("End with the parameters of the best validation.", False)
    metric_for_best_model: str = _help("Validation metric that says which checkpoint is best.", "accuracy")
    greater_is_better: bool | None = _help("Whether more of that metric is better; told from its name if unset.", None)
    early_stopping_patience: int | None = _help("Stop after this many validations without a new best.", None)
    early_stopping_threshold: float = _help("How much better a new best must be to count.", 0.0)
    resume_from_checkpoint: str | None = _help(
        "A checkpoint folder to go on from; `true` for the newest sound one in output_dir; `auto` for the same, or a "
        "new run where there is none, so that one command serves however often it is killed.",
        None,
    )

    logging_strategy: str = _help(f"When to log: {', '.join(EVAL_STRATEGIES)}.", "steps")
    logging_steps: int = _help("Steps between two log lines.", 10)
    logging_first_step: bool = _help("Log the first step as well.", False)
    disable_tqdm: bool = _help("Print log lines instead of a progress bar.", False)
    report_to: list[str] = field(
        default_factory=lambda: ["none"],
        metadata={"help": "Experiment trackers that Accelerate knows, such as tensorboard, or none."},
    )
    run_name: str | None = _help("Name of the run for the trackers; the name of output_dir if unset.", None)

    push_to_hub: bool = _help("Push the result to the Hub at the end.", False)
    hub_model_id: str | None = _help("Repository to push to; the name of output_dir if unset.", None)
    hub_private_repo: bool | None = _help("Make that repository private, if it does not exist yet.", None)
    hub_token: str | None = field(
        default=None, repr=False, metadata={"help": "Token for the Hub; the one of `hf auth login` if unset."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):
            self.report_to = [self.report_to]
        if isinstance(self.resume_from_checkpoint, bool):
            self.resume_from_checkpoint = "true" if self.resume_from_checkpoint else None
        if self.optim == "adamw_torch":  # transformers' name for it
            self.optim = "adamw"
        check_types(self)
        for name in _POSITIVE:
            at_least(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            at_least(name, getattr(self, name), 0)
        for name in _RATES:
            at_least(name, getattr(self, name), 0.0, float)
        for name in ("save_total_limit", "early_stopping_patience", "cpu_threads"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range. Use a value from 0 to below 1.")
        if not 0 < self.weight_interpolation <= 1:
            raise ValueError(
                f"weight_interpolation={self.weight_interpolation!r} is out of range. Use a share above 0 and up to 1."
            )
        choice("optim", self.optim, OPTIMIZERS)
        choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULERS)
        choice("eval_strategy", self.eval_strategy, EVAL_STRATEGIES)
        choice("save_strategy", self.save_strategy, SAVE_STRATEGIES)
        choice("logging_strategy", self.logging_strategy, EVAL_STRATEGIES)
        if self.greater_is_better is None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")
        self._check_agreement()
        check_writable(self.output_dir)

    def _check_agreement(self) -> None:
        """Settings that need one another."""
        needs_validation = {
            "load_best_model_at_end": self.load_best_model_at_end,
            "early_stopping_patience": self.early_stopping_patience is not None,
            "save_strategy='best'": self.save_strategy == "best",
        }
        for name, wanted in needs_validation.items():
            if wanted and self.eval_strategy == "no":
                raise ValueError(
                    f"{name} needs validation, but eval_strategy='no'. Set eval_strategy: steps, or leave {name} out."
                )
        if self.load_best_model_at_end and self.save_strategy == "no":
            raise ValueError(
                "load_best_model_at_end needs checkpoints, but save_strategy='no'. Set it to best or steps."
            )
        if self.baseline_episodes > self.test_episodes:
            self.baseline_episodes = self.test_episodes

    @property
    def episodes_per_step(self) -> int:
        """Episodes behind one optimiser step, over all processes."""
        return self.meta_batch_size * self.gradient_accumulation_steps

    @property
    def trackers(self) -> list[str]:
        """``report_to`` without the word for nothing."""
        return [name for name in self.report_to if name != "none"]

    def to_dict(self) -> dict[str, Any]:
        """All settings except the token, as JSON takes them."""
        settings = asdict(self)
        del settings["hub_token"]
        return settings

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """As ``to_dict``, with every value a number, a truth value or a string, as trackers want them."""
        plain = (bool, int, float, str)
        return {name: value if isinstance(value, plain) else str(value) for name, value in self.to_dict().items()}
