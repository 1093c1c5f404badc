"""Adapters through PEFT, and the only door to it: build, save, load."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_LORA_TARGETS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewshot_nlp.config import FewShotConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

#: What transformers calls a table with a row for each position.
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")

#: Query and value projections where PEFT knows none.
LORA_TARGETS = {
    "albert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "mpnet": ["q", "v"],
}


def lora_targets(module: nn.Module) -> list[str]:
    """Modules that LoRA changes by default in a backbone; ``ValueError`` where none are known."""
    kind = getattr(module.config, "model_type", "")
    targets = PEFT_LORA_TARGETS.get(kind) or LORA_TARGETS.get(kind)
    if not targets:
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in module.named_modules() if isinstance(m, nn.Linear)})
        raise ValueError(
            f"No default LoRA modules are known for model type {kind!r}. "
            f"Set lora_target_modules to some of: {', '.join(linears)}."
        )
    return list(targets)


def peft_config_for(config: FewShotConfig, module: Any, tokenizer_source: str) -> peft.PeftConfig | None:
    """PEFT's settings for an adapter given by name; ``None`` for ``"full"`` and ``"none"``."""
    task = peft.TaskType.FEATURE_EXTRACTION
    tokens: dict[str, Any] = {"task_type": task, "num_virtual_tokens": config.num_virtual_tokens}
    if config.adapter == "prompt_tuning":
        if config.prompt_tuning_init_text is None:
            return peft.PromptTuningConfig(**tokens)
        return peft.PromptTuningConfig(
            **tokens,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=config.prompt_tuning_init_text,
            tokenizer_name_or_path=tokenizer_source,
        )
    if config.adapter == "p_tuning":
        return peft.PromptEncoderConfig(**tokens, encoder_hidden_size=module.config.hidden_size)
    if config.adapter == "prefix_tuning":
        return peft.PrefixTuningConfig(**tokens)
    if config.adapter == "lora":
        return peft.LoraConfig(
            task_type=task,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=config.lora_target_modules or lora_targets(module),
            layers_to_transform=config.lora_layers_to_transform,
        )
    return None


def position_limit(module: nn.Module) -> int | None:
    """Longest input, in tokens, that the backbone's table of positions holds.

    ``None`` where it has none: relative and rotary positions go on beyond any length, whatever ``config.json`` says.
    """
    limits = []
    for name, part in module.named_modules():
        table = getattr(part, "weight", None)
        if name.rsplit(".", 1)[-1] in POSITION_TABLES and isinstance(table, Tensor):
            # RoBERTa and its kin number positions from behind the padding index.
            padding = getattr(part, "padding_idx", None)
            limits.append(table.shape[0] - (0 if padding is None else padding + 1))
    # BART, Nystromformer and others leave rows of the table unused.
    stated = getattr(module.config, "max_position_embeddings", None) or 0
    return min([*limits, stated] if stated > 0 else limits) if limits else None


def check_length(module: Any, max_length: int, num_virtual_tokens: int = 0) -> None:
    """Raise ``ValueError`` where texts of ``max_length`` tokens, behind a prompt, outrun the backbone's positions."""
    limit = position_limit(module)
    if limit is None or num_virtual_tokens + max_length <= limit:
        return
    place = f"the {limit} positions of the backbone {module.name_or_path!r}"
    if num_virtual_tokens:
        raise ValueError(
            f"num_virtual_tokens={num_virtual_tokens} and max_length={max_length} together exceed {place}. "
            f"Lower their sum to {limit} or less."
        )
    raise ValueError(f"max_length={max_length} exceeds {place}. Lower it to {limit} or less.")


def fit_prompt(module: Any, settings: Any) -> None:
    """Set the sizes of a prompt to the backbone's; ``ValueError`` where the backbone cannot take it."""
    prefix = settings.peft_type == peft.PeftType.PREFIX_TUNING
    # Left to itself, PEFT keeps the sizes of another backbone, and knows few names of these settings.
    settings.token_dim = module.config.hidden_size if prefix else module.get_input_embeddings().embedding_dim
    settings.num_layers = module.config.num_hidden_layers
    settings.num_attention_heads = module.config.num_attention_heads
    if prefix and "past_key_values" not in inspect.signature(module.forward).parameters:
        raise ValueError(
            f"Prefix tuning needs a backbone that takes past_key_values; model type {module.config.model_type!r} does "
            f"not, and would ignore the prefix. Use adapter='prompt_tuning' or 'lora'."
        )


def build_adapter(
    module: Any,
    config: FewShotConfig,
    peft_config: peft.PeftConfig | None = None,
    tokenizer_source: str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Wrap a frozen backbone in the adapter that ``config`` names, or in the one ``peft_config`` describes.

    Args:
        module: backbone; its ``name_or_path`` is what the adapter records as its base.
        config: its ``adapter`` decides, unless ``peft_config`` is given.
        peft_config: any PEFT configuration object; it is copied, so that it can serve another backbone too.
        tokenizer_source: where a soft prompt that starts at a text finds its tokenizer; the backbone if not given.
        seed: of the random start; the global generator is left as it was.

    Raises:
        ValueError: the adapter does not fit the backbone.
    """
    source = tokenizer_source or module.name_or_path
    settings: Any = copy.deepcopy(peft_config) or peft_config_for(config, module, source)
    is_prompt = settings is not None and settings.is_prompt_learning
    if is_prompt:
        fit_prompt(module, settings)
    check_length(module, config.max_length, settings.num_virtual_tokens if is_prompt else 0)
    if settings is None:
        return module.requires_grad_(config.adapter == "full")
    settings.inference_mode = False
    starts_at_text = getattr(settings, "prompt_tuning_init_text", None) is not None
    if starts_at_text:
        settings.tokenizer_name_or_path = source
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # PEFT 0.21 asks transformers for a name that transformers 5 is about to drop.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            # torch.manual_seed would seed accelerators too, which this fork does not put back.
            torch.default_generator.manual_seed(seed)
            wrapped = peft.get_peft_model(module, settings)
    except (ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"PEFT cannot put {settings.peft_type} on the backbone {module.name_or_path!r} "
            f"(model type {getattr(module.config, 'model_type', 'unknown')!r}): {error}. Use another pair."
        ) from error
    if starts_at_text:
        settings.tokenizer_name_or_path = module.name_or_path
    return wrapped.eval()


def bare_model(module: nn.Module) -> Any:
    """The transformers model inside an adapter that is left on, or the module itself where there is none."""
    return module.get_base_model() if isinstance(module, peft.PeftModel) else module


def is_adapted(module: nn.Module) -> bool:
    """Whether a PEFT adapter is around the backbone."""
    return isinstance(module, peft.PeftModel)


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[nn.Module]:
    """The backbone as it was before the adapter."""
    if not isinstance(module, peft.PeftModel):
        yield module
    elif module.active_peft_config.is_prompt_learning:
        # Prompts are added in front of an untouched backbone; PEFT's own switch expects a generating model here.
        yield module.get_base_model()
    else:
        with warnings.catch_warnings():
            # PEFT warns that trained biases stay in place; here training never writes into the module.
            warnings.filterwarnings(
                "ignore", message="Careful, disabling adapter layers with bias", category=UserWarning
            )
            with module.disable_adapter():
                yield module


def peft_restores(module: nn.Module) -> bool:
    """Whether PEFT's own files bring back every trained tensor.

    P-tuning and prefix projection are saved as the prompts that their network makes; the network itself is lost.
    """
    if not isinstance(module, peft.PeftModel):
        return False
    settings = module.active_peft_config
    return settings.peft_type != peft.PeftType.P_TUNING and not getattr(settings, "prefix_projection", False)


def save_adapter(module: nn.Module, folder: str | Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does, with the module's own values."""
    if not isinstance(module, peft.PeftModel):
        raise ValueError(f"{type(module).__name__} carries no PEFT adapter to save. Save the whole model instead.")
    # "auto" would ask the Hub whether the vocabulary changed.
    module.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT's own card: the caller writes a better one.
    (Path(folder) / "README.md").unlink(missing_ok=True)


def read_peft_config(folder: str | Path) -> peft.PeftConfig:
    """Read ``adapter_config.json``; ``ValueError`` if it is missing or not PEFT's."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        return peft.PeftConfig.from_peft_type(**settings)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {folder} holds no PEFT adapter.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a PEFT configuration: {error}. Save the adapter again.") from error


def load_adapter(module: nn.Module, folder: str | Path) -> None:
    """Write the weights of a saved adapter into ``module``, which must carry the same kind of adapter.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or not finite; the file is damaged.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Save or download the adapter again.") from error
    check_tensors(saved, peft.get_peft_model_state_dict(module, save_embedding_layers=False), str(path), module)
    peft.set_peft_model_state_dict(module, saved)


def check_tensors(saved: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str, module: nn.Module) -> None:
    """Raise ``ValueError`` unless ``saved`` has exactly the names and shapes of ``expected``, and is finite."""
    remedy = f"They belong to another backbone or adapter than {getattr(module, 'name_or_path', None) or 'this one'!r}."
    if saved.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
        raise ValueError(f"{source}: missing tensors {missing[:3]}, unknown tensors {unknown[:3]}. {remedy}")
    for name, tensor in saved.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)} instead of {list(expected[name].shape)}"
            raise ValueError(f"{source}: {name} has shape {shapes}. {remedy}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} holds values that are not finite. Train or download it again.")
