"""A learner tied to meta-learned parameters: what is saved, loaded and pushed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, ModelCard
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from fewshot_nlp import __version__
from fewshot_nlp.checks import first_line
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.hub.card import model_card
from fewshot_nlp.hub.files import (
    OWN_PATTERNS,
    PARAMS_NAME,
    READ_PATTERNS,
    check_repository,
    check_token,
    publish_paths,
    read_tensors,
    replaced_files,
    resolve_folder,
)
from fewshot_nlp.hub.info import CURVE_NAME, AdapterInfo, read_manifest, write_manifest
from fewshot_nlp.hub.paths import ELSEWHERE
from fewshot_nlp.learners import BaseLearner, build_learner
from fewshot_nlp.models.adapters import (
    ADAPTER_CONFIG,
    bare_model,
    check_tensors,
    is_adapted,
    load_adapter,
    peft_restores,
    read_peft_config,
    save_adapter,
)
from fewshot_nlp.models.backbone import read_module, reader
from fewshot_nlp.models.model import PREFIX, FewShotModel
from fewshot_nlp.models.safety import NO_CODE, UNREADABLE, check_inside, check_model_folder
from fewshot_nlp.types import Params

#: What a trained adapter may be told to do otherwise: settings on which no tensor's name or shape depends. A scale that
#: was learned for one distance leaves the answers of another right, and their probabilities more or less sure.
ANSWERING = (
    "inner_steps", "inner_weight_decay", "inner_max_grad_norm", "use_label_names", "label_name_weight",
    "names_in_training_alone", "label_texts", "normalize_features", "distance", "max_length", "frozen_dtype",
    "graph_memory_gb",
)  # fmt: skip


class FewShotAdapter:
    """A learner and the meta-parameters it was trained to.

    huggingface_hub's ``ModelHubMixin`` is not its base: that writes a ``config.json``, which beside a PEFT adapter
    makes ``AutoModel`` fail, and would load pickled weights.

    Attributes:
        learner: how a task is learned. Its module keeps its own, untrained values.
        params: meta-parameters by name.
        info: what is known of the training.

    Raises:
        ValueError: where ``params`` lack a tensor that ``learner`` needs, or have another shape, an unknown name, or a
            value that is not finite.
    """

    def __init__(self, learner: BaseLearner, params: Params, info: AdapterInfo | None = None) -> None:
        check_tensors(params, learner.init_params(), "params", learner.model.module)
        self.learner = learner
        self.params = {name: tensor.detach() for name, tensor in params.items()}
        self.info = AdapterInfo() if info is None else info

    @property
    def config(self) -> FewShotConfig:
        """Settings of the learner."""
        return self.learner.config

    def __sklearn_clone__(self) -> FewShotAdapter:
        """Itself: nothing is ever fitted in it, and a backbone is large."""
        return self

    def save_pretrained(
        self, save_directory: str | Path, *, push_to_hub: bool = False, repo_id: str | None = None, **kwargs: Any
    ) -> CommitInfo | None:
        """Save to a folder, which ``from_pretrained`` reads and, but for the head, plain PEFT and transformers too.

        Written are ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format (for ``adapter="full"``
        the backbone's ``config.json`` and ``model.safetensors`` instead), ``fewshot_params.safetensors`` with the
        other meta-parameters, the tokenizer, ``fewshot_config.json``, ``README.md``, and ``results.json`` and
        ``learning_curve.png`` where ``info`` has them. All or nothing: a save that fails leaves what was there.

        Args:
            save_directory: made if it does not exist; files of other names in it stay.
            push_to_hub: also push, to ``repo_id`` or else to a repository named like the folder.
            **kwargs: for ``push_to_hub``.

        Returns:
            The commit where it was pushed, else ``None``.

        Raises:
            ValueError: where the folder is a file, cannot be written or holds another model.
        """
        if not push_to_hub and (repo_id is not None or kwargs):
            named = ", ".join(["repo_id"] * (repo_id is not None) + list(kwargs))
            raise ValueError(f"{named} has a meaning only with push_to_hub=True. Set that, or leave it out.")
        self._save(save_directory)
        if not push_to_hub:
            return None
        return self.push_to_hub(repo_id or Path(save_directory).resolve().name, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload few-shot adapter",
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload to the Hub what ``save_pretrained`` writes, making the repository if there is none.

        Of a backbone in a local folder, the path is shortened; whoever loads the adapter says where theirs is.

        Args:
            repo_id: ``"user/name"``, or ``"name"`` in the token's own namespace.
            private: of a repository that is made; the namespace's default if not given.
            token: access token; the one that ``hf auth login`` stored if not given.
            commit_message: first line of the commit.
            revision: branch to push to, made if it does not exist; ``main`` if not given.
            create_pr: open a pull request instead of pushing.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refused, for example for want of write access.
            ValueError: the repository holds another model, or the token cannot be sent.
        """
        check_token(token)
        api = HfApi(token=token, library_name="fewshot_nlp", library_version=__version__)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "adapter"
            self._save(folder)
            publish_paths(folder, self.config.model_name_or_path)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            # The examples on the card name the repository, whose full name is known only now.
            self._card(repo_id).save(folder / "README.md")
            if revision is not None and not create_pr and not revision.startswith("refs/pr/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            check_repository(api, repo_id, revision)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                delete_patterns=OWN_PATTERNS,
            )

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        device: torch.device | str | None = None,
        model_name_or_path: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> FewShotAdapter:
        """Load from a folder or from the Hub. Only JSON and safetensors are read.

        Args:
            path_or_repo: folder, or Hub id.
            revision: branch, tag or commit of the repository.
            token, cache_dir, local_files_only, force_download: as in ``huggingface_hub.snapshot_download``; the first
                three hold for the backbone as well.
            device: where to put backbone and parameters; the CPU if not given.
            model_name_or_path: backbone to use instead of the recorded one, for example because its folder moved.
            config_overrides: settings of ``FewShotConfig`` by which tasks are answered otherwise than in training, such
                as ``{"inner_steps": 10}``: those of ``ANSWERING``, with which the trained tensors still fit.

        Raises:
            FileNotFoundError: there is no such folder, repository or revision, or it may not be read.
            ValueError: it is not a few-shot adapter, is damaged, was written by a later version, or does not fit the
                backbone.
            OSError: the backbone cannot be loaded.
        """
        folder = resolve_folder(
            path_or_repo,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        check_inside(folder, READ_PATTERNS)
        config, info = read_manifest(folder)
        if model_name_or_path is None and config.model_name_or_path.startswith(ELSEWHERE):
            raise OSError(
                f"The backbone of {str(path_or_repo)!r} is a folder of its author's, {config.model_name_or_path!r}, "
                "and not on the Hub. Say where it is: from_pretrained(..., model_name_or_path=...)."
            )
        if model_name_or_path is not None:
            config = replace(config, model_name_or_path=model_name_or_path, model_revision=None)
        if config_overrides is not None:
            # What was measured was measured with other settings.
            config, info = _overridden(config, config_overrides), replace(info, results={})
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only or None}
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        peft_config = None
        if config.adapter not in ("full", "none") or (folder / ADAPTER_CONFIG).is_file():
            peft_config = _peft_config(folder, config)
        model = FewShotModel.build(config, peft_config, **given)
        learner = build_learner(config, model)
        try:
            params = _read_params(folder, learner)
        except ValueError as error:
            if not config_overrides:
                raise
            raise ValueError(f"{error} It was asked for config_overrides={config_overrides!r}.") from error
        if device is not None:
            model.to(device)
            params = {name: tensor.to(device) for name, tensor in params.items()}
        return cls(learner, params, info)

    def _card(self, repo_id: str | None = None) -> ModelCard:
        backbone = bare_model(self.learner.model.module)
        # Such a network may be in a folder or on the Hub, too.
        own = type(backbone).__module__.startswith("fewshot_nlp.")
        loader = reader(backbone.config).__name__
        return model_card(self.config, self.info, repo_id=repo_id, loader=loader, own_network=own)

    def _save(self, save_directory: str | Path) -> None:
        model = self.learner.model
        backbone: Any = model.module
        with replaced_files(save_directory) as folder:
            rest = {name: tensor for name, tensor in self.params.items() if not name.startswith(PREFIX)}
            with model.holding(self.params):
                if is_adapted(backbone):
                    save_adapter(backbone, folder)
                    rest = rest if peft_restores(backbone) else self.params
                elif model.trainable:
                    backbone.save_pretrained(folder)
            tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in rest.items()}
            save_file(tensors, folder / PARAMS_NAME, metadata={"format": "pt"})
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(folder)
            if self.info.learning_curve is not None:
                (folder / CURVE_NAME).write_bytes(_curve(self.info.learning_curve))
            self._card().save(folder / "README.md")
            write_manifest(folder, self.config, self.info)


def _read_params(folder: Path, learner: BaseLearner) -> dict[str, Tensor]:
    """The saved parameters, checked against the learner's own, on the CPU. The learner's module is left untrained."""
    model, start = learner.model, learner.init_params()
    params = read_tensors(folder / PARAMS_NAME, "it holds the head of the learner")
    if is_adapted(model.module) and not peft_restores(model.module):
        lost = sorted(start.keys() - params.keys())
        if lost:
            raise ValueError(
                f"{folder / PARAMS_NAME} lacks the prompt's own network ({lost[0]}), and PEFT's files hold only the "
                "prompts that it made. Save the adapter again with FewShotAdapter.save_pretrained, or train one with "
                "adapter='prompt_tuning' or 'prefix_tuning', which PEFT restores."
            )
    elif is_adapted(model.module):
        with model.holding(start) as module:
            load_adapter(module, folder)
            params = {**model.init_params(), **params}
    elif model.trainable:
        # Where some layers alone were trained, the others are the backbone's own.
        frozen = {f"{PREFIX}{name}" for name, _ in model.module.named_parameters()} - start.keys()
        whole = _read_backbone(folder, model.module)
        params = {**{name: tensor for name, tensor in whole.items() if name not in frozen}, **params}
    check_tensors(params, start, str(folder), model.module)
    return {name: params[name].to(start[name].dtype) for name in start}


def _read_backbone(folder: Path, own: Any) -> dict[str, Tensor]:
    """Parameters of a backbone like ``own`` that was trained as a whole. Its ``config.json`` may name an attention that
    transformers would fetch and run, so that of ``own`` stands in its place."""
    try:
        # Through transformers, which knows how each architecture names its tensors in a file.
        check_model_folder(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **NO_CODE)
        attention = own.config._attn_implementation
        attend = {} if attention is None else {"attn_implementation": attention}
        module, missing = read_module(str(folder), config, type(own), local_files_only=True, **attend, **NO_CODE)
    except UNREADABLE as error:
        raise ValueError(
            f"The backbone in {folder} cannot be read: {first_line(error)} Save or download the adapter again."
        ) from error
    if missing:
        raise ValueError(
            f"The backbone in {folder} lacks the tensors {missing[:3]}. Save or download the adapter again."
        )
    return {PREFIX + name: parameter.detach() for name, parameter in module.named_parameters()}


def _peft_config(folder: Path, config: FewShotConfig) -> Any:
    settings = read_peft_config(folder)
    settings.base_model_name_or_path = config.model_name_or_path
    return settings


def _curve(given: str | Path | bytes) -> bytes:
    if isinstance(given, bytes):
        return given
    if not Path(given).is_file():
        raise ValueError(f"learning_curve={str(given)!r} is not a file. Draw it before saving, or leave it out.")
    return Path(given).read_bytes()


def _overridden(config: FewShotConfig, overrides: Mapping[str, Any]) -> FewShotConfig:
    """``config`` with ``overrides``, which may touch nothing that was trained."""
    if not isinstance(overrides, Mapping):
        raise ValueError(
            f"config_overrides={overrides!r} must be a mapping of settings, such as {{'inner_steps': 10}}."
        )
    for name in overrides:
        if name not in ANSWERING:
            raise ValueError(
                f"config_overrides has {name!r}, which a trained adapter cannot change. Use {', '.join(ANSWERING)}."
            )
    return FewShotConfig.from_dict({**config.to_dict(), **overrides}, "config_overrides")
