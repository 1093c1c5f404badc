"""The model card: metadata that the Hub reads, and a page that says what was measured and how to use it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from fewshot_nlp.checks import printable
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.hub.info import CURVE_NAME, AdapterInfo
from fewshot_nlp.hub.markup import code_block, listed, plain
from fewshot_nlp.hub.measured import measured_on_test, results_section
from fewshot_nlp.learners import learner_class
from fewshot_nlp.models.backbone import OWN_BACKBONES

ADAPTER_NAMES = {
    "prompt_tuning": "A soft prompt (prompt tuning)",
    "p_tuning": "A soft prompt (P-tuning)",
    "prefix_tuning": "A prefix (prefix tuning)",
    "lora": "A LoRA adapter",
    "ia3": "An IA3 adapter (scaled activations)",
    "bitfit": "Biases (BitFit)",
    "layernorm": "Scales and shifts of normalisation layers",
    "full": "An encoder (all weights trained)",
    "none": "A few-shot head (backbone unchanged)",
}
#: The same where a line has room for a few words.
SHORT_ADAPTER_NAMES = {
    "prompt_tuning": "soft prompt",
    "p_tuning": "soft prompt (P-tuning)",
    "prefix_tuning": "prefix",
    "lora": "LoRA",
    "ia3": "IA3",
    "bitfit": "biases",
    "layernorm": "normalisation layers",
    "full": "all weights",
    "none": "head alone",
}


def model_card(
    config: FewShotConfig,
    info: AdapterInfo,
    *,
    repo_id: str | None = None,
    loader: str = "AutoModel",
    own_network: bool = False,
) -> ModelCard:
    """The card of a meta-learned adapter.

    Args:
        config: the settings of the learner.
        info: data sets, classes, results and command; what is not known is not mentioned.
        repo_id: where the adapter is on the Hub, for the examples; a placeholder path without it.
        loader: the class of transformers that loads such a backbone.
        own_network: whether the backbone is a network of this package, which transformers alone does not know.

    Raises:
        ValueError: where ``info.results`` does not have the form of ``results.json``.
    """
    test = measured_on_test(info)
    data = _metadata(config, info, test)
    source = repo_id or "path/to/this/folder"
    sections = [
        f"# {plain(_model_name(config))}",
        _summary(config, info),
        "## Results",
        results_section(info, test),
        "## How to use",
        _usage(config, info, source, loader, own_network),
        *_training(config, info),
        "## Limits",
        _limits(config, info, test),
    ]
    body = "\n\n".join(sections)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def method_name(config: FewShotConfig) -> str:
    """Method and adapter for a line or a title: ``MAML, soft prompt``."""
    learner = learner_class(config.learner)
    # Of "MAML ([Finn et al. 2017](...)) with exact second-order gradients" what comes before the paper.
    method = learner.title.partition(" ([")[0] or learner.__name__
    if method.split()[0].islower():
        method = method[0].upper() + method[1:]
    adapter = "DoRA" if config.adapter == "lora" and config.use_dora else SHORT_ADAPTER_NAMES[config.adapter]
    return f"{method}, {adapter}"


def hub_id(name: str) -> bool:
    """Whether ``name`` can be a Hub id; a local path cannot, and does not belong on a public page."""
    if name in OWN_BACKBONES:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).expanduser().exists()


def _metadata(config: FewShotConfig, info: AdapterInfo, test: Mapping[str, Any]) -> ModelCardData:
    base = config.model_name_or_path
    tags = ["few-shot", "meta-learning", config.learner]
    if config.adapter not in ("full", "none"):
        tags += ["peft", config.adapter.replace("_", "-")]
    known: dict[str, Any] = {}
    if hub_id(base):
        known = {"base_model": base, "base_model_relation": "finetune" if config.adapter == "full" else "adapter"}
    evaluations = _evaluations(info, test)
    return ModelCardData(
        library_name="fewshot_nlp",
        pipeline_tag=f"{info.kind}-classification" if config.task == "classification" else None,
        tags=tags,
        datasets=[printable(name) for name in info.hub_datasets] or None,
        language=[printable(name) for name in info.language] or None,
        license=info.license and printable(info.license),
        metrics=["accuracy"] if evaluations else None,
        model_name=_model_name(config) if evaluations else None,
        eval_results=evaluations or None,
        **known,
    )


def _model_name(config: FewShotConfig) -> str:
    backbone = re.sub(r"[^\w.-]+", "-", config.model_name_or_path.rstrip("/").split("/")[-1])
    return f"{config.learner}-{config.adapter.replace('_', '-')}-{backbone}"


def _evaluations(info: AdapterInfo, test: Mapping[str, Any]) -> list[EvalResult]:
    """One ``EvalResult`` a number of shots; none where the data set that was measured on is not known."""
    protocol = (info.results or {}).get("protocol") or {}
    dataset = protocol.get("dataset") or (info.datasets[0] if len(info.datasets) == 1 else None)
    if not isinstance(dataset, str):
        return []
    on_hub = protocol.get("hub_id") or (dataset if dataset in info.hub_datasets else None)
    config_name = protocol.get("dataset_config_name")
    way = f"{protocol['n_way']}-way " if "n_way" in protocol else ""
    found = []
    for shots, entry in test.items():
        arguments = {key: entry[key] for key in ("episodes", "ci95") if entry.get(key) is not None}
        found.append(
            EvalResult(
                task_type=f"{info.kind}-classification",
                task_name=f"few-shot {info.kind} classification",
                dataset_type=printable(on_hub or "local"),
                dataset_name=printable(dataset if on_hub else Path(dataset).name),
                dataset_config=config_name and printable(config_name),
                dataset_split=printable(protocol.get("split") or "test"),
                metric_type="accuracy",
                metric_name=printable(f"accuracy, {way}{shots}"),
                metric_value=entry["accuracy"],
                metric_args=arguments or None,
            )
        )
    return found


def _summary(config: FewShotConfig, info: AdapterInfo) -> str:
    method = learner_class(config.learner).title or f"`{config.learner}`"
    asked = (
        f"a class teach it a new {info.kind} classification task"
        if config.task == "classification"
        else "teach it a new regression task"
    )
    text = (
        f"{ADAPTER_NAMES[config.adapter]} for {_backbone(config)}, meta-learned with {method} so "
        f"that a handful of examples {asked}."
    )
    if info.learning_curve is not None:
        text += f"\n\n![Accuracy against training steps]({CURVE_NAME})"
    return text


def _backbone(config: FewShotConfig) -> str:
    name = config.model_name_or_path
    if hub_id(name):
        return f"[{plain(name)}](https://huggingface.co/{name})"
    return f"a backbone that is not on the Hub ({plain(Path(name).name)})"


_LABELS = {
    "name": "`labels` are names of your own, and are read: use words, such as `lost_card`. One example a class is "
    "enough.",
    "description": "`labels` are your own; a sentence about each of them is read: pass `label_texts={label: sentence}` "
    "to `from_pretrained`. One example a class is enough.",
}


def _usage(config: FewShotConfig, info: AdapterInfo, source: str, auto: str, own_network: bool) -> str:
    if config.task == "regression":
        return (
            "```python\n"
            "from fewshot_nlp import FewShotAdapter\n\n"
            f'adapter = FewShotAdapter.from_pretrained("{source}")\n'
            "state = adapter.learner.adapt(adapter.params, support)  # a Batch whose labels are numbers\n"
            "adapter.learner.predict(adapter.params, state, query)[:, 0]\n```"
        )
    parts = [
        "```python\n"
        "from fewshot_nlp import FewShotClassifier\n\n"
        f'classifier = FewShotClassifier.from_pretrained("{source}").fit({info.kind}s, labels)\n'
        f"classifier.predict(new_{info.kind}s)\n```",
        _LABELS[config.label_texts]
        if config.tells_names
        else "`labels` are strings or numbers of your own; one example a class is enough.",
    ]
    name = config.model_name_or_path
    base = name if name in OWN_BACKBONES or hub_id(name) else "path/to/the/backbone"
    if config.adapter == "full":
        own = "\nimport fewshot_nlp.models  # AutoModel learns of the network\n" if own_network else ""
        parts.append(
            "The encoder alone, without the few-shot learner:\n\n```python\n"
            f'from transformers import {auto}\n{own}\nmodel = {auto}.from_pretrained("{source}")\n```'
        )
    elif config.adapter != "none":
        loader, load = f"transformers import {auto}", f'{auto}.from_pretrained("{base}")'
        if info.kind == "image":
            # AutoModel knows nothing of our networks, and loads both halves of CLIP.
            loader, load = "fewshot_nlp.models import load_backbone", f'load_backbone("{base}")[0]'
        imports = "\n".join(f"from {each}" for each in sorted(["peft import PeftModel", loader]))
        parts.append(
            "The adapter alone, with plain PEFT:\n\n```python\n"
            f'{imports}\n\nmodel = PeftModel.from_pretrained({load}, "{source}")\n```'
        )
    return "\n\n".join(parts)


def _use_of_names(config: FewShotConfig) -> str:
    uses = ["the start of the head"] if config.head_init == "names" else []
    uses += ["examples of a learned weight"] if config.learn_label_name_weight else []
    uses += ["what the features are conditioned on"] if config.condition_on_names else []
    return ", and ".join(["support examples, too", *uses])


def _training(config: FewShotConfig, info: AdapterInfo) -> list[str]:
    lines = [
        f"- inner loop: {config.inner_rule}, steps: {config.inner_steps}, step size: {config.inner_learning_rate}"
        if config.learner != "protonet"
        else "- inner loop: none, class prototypes",
        f"- head: {config.head}"
        + (f"; batch norm: {config.batch_norm}" if config.batch_norm else "")
        + (f"; pooling: {config.pooling}; texts of up to {config.max_length} tokens" if info.kind == "text" else ""),
    ]
    if config.use_label_names:
        known = "in training alone" if config.names_in_training_alone else "examples in the baselines"
        lines.append(f"- the {config.label_texts}s of the classes are {_use_of_names(config)}; {known}")
    if info.datasets:
        named = [name if name in info.hub_datasets else Path(name).name for name in info.datasets]
        lines.insert(0, f"- data: {listed(named)}")
    if info.label_names:
        lines.append(f"- {len(info.label_names)} classes seen in training: {listed(info.label_names)}")
    if info.versions:
        lines.append(f"- versions: {listed([f'{name} {number}' for name, number in info.versions.items()])}")
    text = "\n".join(lines)
    if info.command:
        text += f"\n\nMade by:\n\n{code_block(info.command)}"
    return ["## Training", text]


def _limits(config: FewShotConfig, info: AdapterInfo, test: Mapping[str, Any]) -> str:
    lines = [f"- Texts longer than {config.max_length} tokens are cut."] if info.kind == "text" else []
    if config.task == "classification":
        lines.append(f"- Every {info.kind} is given one of the classes of the examples, also where none of them fits.")
    protocol = (info.results or {}).get("protocol") or {}
    if config.batch_norm == "transductive" or protocol.get("transductive"):
        lines.append(
            f"- Transductive: the {info.kind}s of one call of `predict` are answered together, and the answer to one "
            "depends on the others beside it."
        )
    if test:
        lines.append("- The results hold for tasks of the shape above on that data; measure on your own before use.")
    else:
        lines.append("- How well it does is not known; measure on your own data before use.")
    if not info.license:
        lines.append("- No licence is stated for the adapter; those of the backbone and of the data apply to them.")
    return "\n".join(lines)
