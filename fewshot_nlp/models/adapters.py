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
from peft.tuners.lora.dora import DoraConv2dLayer, DoraLinearLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as PEFT_IA3_FEEDFORWARD
from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as PEFT_IA3_TARGETS
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_LORA_TARGETS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewshot_nlp.checks import first_line, shown
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.outer import drawing
from fewshot_nlp.models.backbone import cache_argument
from fewshot_nlp.models.dora import exact_forward
from fewshot_nlp.models.kinds import check_kind, check_trainable, check_wrapped, fingerprint
from fewshot_nlp.models.positions import check_length
from fewshot_nlp.models.reading import TRIED, fault_in_reading
from fewshot_nlp.models.safety import check_floats, refused_setting
from fewshot_nlp.models.targets import IA3_TARGETS, MAPS, first_map, in_layers, is_transposed, norms, unfreeze

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

#: Query and value projections where PEFT knows none, or names of old; of networks without, what carries most weights.
LORA_TARGETS = {
    "albert": ["query", "value"],
    "clip_vision_model": ["q_proj", "v_proj"],
    "convnext": ["pwconv1", "pwconv2"],
    "dinov2": ["q_proj", "v_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"],
    "fewshot_efficientnet_lite": ["_expand_conv", "_project_conv"],
    "mpnet": ["q", "v"],
    "resnet": ["convolution"],
    "umt5": ["q", "v"],
    "vit": ["q_proj", "v_proj"],
}


def lora_targets(module: nn.Module) -> list[str]:
    """Modules that LoRA changes by default in a backbone; ``ValueError`` where none are known."""
    kind = getattr(module.config, "model_type", "")
    targets = LORA_TARGETS.get(kind) or PEFT_LORA_TARGETS.get(kind)
    if not targets:
        maps = sorted({n.rsplit(".", 1)[-1] for n, m in module.named_modules() if isinstance(m, MAPS)})
        raise ValueError(
            f"No default LoRA modules are known for model type {kind!r}. "
            f"Set lora_target_modules to some of: {', '.join(maps)}."
        )
    return list(targets)


def peft_config_for(config: FewShotConfig, module: Any, tokenizer_source: str) -> peft.PeftConfig | None:
    """PEFT's settings for an adapter given by name; ``None`` for ``"full"`` and ``"none"``."""
    task = peft.TaskType.FEATURE_EXTRACTION
    tokens: dict[str, Any] = {"task_type": task, "num_virtual_tokens": config.num_virtual_tokens}
    if config.adapter == "prompt_tuning":
        if config.prompt_tuning_init_text is None:
            return peft.PromptTuningConfig(**tokens, prompt_tuning_init=config.prompt_tuning_init or "RANDOM")
        return peft.PromptTuningConfig(
            **tokens,
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text=config.prompt_tuning_init_text,
            tokenizer_name_or_path=tokenizer_source,
        )
    if config.adapter == "p_tuning":
        # Image models may have no such size, and no place for a prompt: fit_prompt says so.
        return peft.PromptEncoderConfig(**tokens, encoder_hidden_size=getattr(module.config, "hidden_size", 1))
    if config.adapter == "prefix_tuning":
        return peft.PrefixTuningConfig(**tokens)
    if config.adapter == "lora":
        targets, layers = config.lora_target_modules or lora_targets(module), config.lora_layers_to_transform
        found = None if layers is None else in_layers(module, targets, layers)
        return peft.LoraConfig(
            task_type=task,
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules=found or targets,
            layers_to_transform=None if found else layers,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
        )
    if config.adapter == "ia3":
        targets, feedforward = ia3_targets(module)
        return peft.IA3Config(task_type=task, target_modules=targets, feedforward_modules=feedforward)
    if config.adapter == "bitfit":
        # PEFT trains biases beside LoRA alone: here one of rank 1 in one layer, which stays at zero.
        return peft.LoraConfig(task_type=task, r=1, target_modules=[first_map(module)], bias="all")
    if config.adapter == "layernorm":
        return peft.LNTuningConfig(task_type=task, target_modules=norms(module))
    return None


def ia3_targets(module: nn.Module) -> tuple[list[str], list[str]]:
    """Modules that IA3 scales by default, and which of them by their inputs; ``ValueError`` if none are known."""
    kind = getattr(module.config, "model_type", "")
    if kind in PEFT_IA3_TARGETS:
        return list(PEFT_IA3_TARGETS[kind]), list(PEFT_IA3_FEEDFORWARD[kind])
    if kind in IA3_TARGETS:
        outputs, inputs = IA3_TARGETS[kind]
        return [*outputs, *inputs], list(inputs)
    raise ValueError(
        f"No default IA3 modules are known for model type {kind!r}. Give a peft.IA3Config with target_modules and "
        f"feedforward_modules, or use adapter='lora' with lora_target_modules."
    )


def _kind(module: Any) -> str:
    return f"{type(module).__name__}, of model type {module.config.model_type!r}"


def fit_prompt(module: Any, settings: Any) -> None:
    """Set the sizes of a prompt to the backbone's; ``ValueError`` where the backbone cannot take it."""
    if module.main_input_name != "input_ids":
        raise ValueError(
            f"A soft prompt or prefix stands before the tokens of a text, and model type {module.config.model_type!r} "
            f"takes {module.main_input_name}. Use adapter='lora', 'ia3', 'bitfit', 'layernorm' or 'full'."
        )
    if "decoder_input_ids" in inspect.signature(module.forward).parameters:
        raise ValueError(
            f"A soft prompt or prefix stands before the tokens of a text, and {_kind(module)}, reads these in its "
            f"encoder and in its decoder, of which PEFT reaches one. Use adapter='lora', 'ia3', 'bitfit', 'layernorm' "
            f"or 'full'."
        )
    prefix = settings.peft_type == peft.PeftType.PREFIX_TUNING
    heads = getattr(module.config, "num_attention_heads", None)
    # What a model without attention goes on from is a state.
    if prefix and (cache_argument(module) is None or heads is None):
        raise ValueError(
            f"Prefix tuning needs a backbone that takes keys and values of earlier tokens; {_kind(module)}, does not, "
            f"and would ignore the prefix. Use adapter='prompt_tuning' or 'lora'."
        )
    # Whatever task it was made for, features are what is asked of it, and a prompt without a task is one PEFT refuses.
    settings.task_type = peft.TaskType.FEATURE_EXTRACTION
    # Left to itself, PEFT keeps the sizes of another backbone, and knows few names of these settings.
    try:
        settings.token_dim = module.config.hidden_size if prefix else module.get_input_embeddings().embedding_dim
    except NotImplementedError as error:
        raise ValueError(
            f"A soft prompt stands before the embeddings of a text's tokens, and {_kind(module)}, has no table of "
            f"these. Use adapter='lora', 'bitfit', 'layernorm' or 'full'."
        ) from error
    settings.num_layers = module.config.num_hidden_layers
    # Nothing but a prefix is made for heads, and PEFT wants their number of every prompt.
    settings.num_attention_heads = 1 if heads is None else heads


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
    if config.adapter != "none" or peft_config is not None:
        check_trainable(module)
    source = tokenizer_source or module.name_or_path
    settings: Any = copy.deepcopy(peft_config) or peft_config_for(config, module, source)
    if settings is not None:
        check_kind(settings)
    is_prompt = settings is not None and settings.is_prompt_learning
    if is_prompt:
        fit_prompt(module, settings)
    check_length(module, config.max_length, settings.num_virtual_tokens if is_prompt else 0)
    if settings is None:
        return unfreeze(module, config) if config.adapter == "full" else module.requires_grad_(False)
    settings.inference_mode = False
    if hasattr(settings, "fan_in_fan_out"):
        settings.fan_in_fan_out = is_transposed(module)
    if module.main_input_name == "pixel_values":
        # Any task of PEFT's passes on what texts have, which some vision models refuse.
        settings.task_type = None
    starts_at_text = getattr(settings, "prompt_tuning_init_text", None) is not None
    if starts_at_text:
        settings.tokenizer_name_or_path = source
    own = list(module.parameters())
    before = fingerprint(own)
    try:
        with drawing({}, seed), warnings.catch_warnings():
            # PEFT 0.21 asks transformers for a name that transformers 5 is about to drop.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            # It expects linear layers where it is told to train the scales of others.
            warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)
            wrapped = peft.get_peft_model(module, settings)
    except Exception as error:  # some forty kinds of adapters raise what they like
        raise ValueError(
            f"PEFT cannot put {settings.peft_type} on the backbone {module.name_or_path!r} "
            f"(model type {getattr(module.config, 'model_type', 'unknown')!r}): {error}. Use another pair."
        ) from error
    if starts_at_text:
        settings.tokenizer_name_or_path = module.name_or_path
    if is_prompt:
        result = "logits" if config.head == "verbalizer" else "last_hidden_state"
        fault = fault_in_reading(wrapped, min(TRIED, config.max_length), result)
        if fault is not None:
            prefix = settings.peft_type == peft.PeftType.PREFIX_TUNING
            given, other = ("keys and values", "'prompt_tuning', ") if prefix else ("embeddings", "")
            raise ValueError(
                f"{_kind(module)}, does not read a text behind the {given} of PEFT's {settings.peft_type.value} "
                f"({first_line(fault)}). Use adapter={other}'lora', 'bitfit', 'layernorm' or 'full'."
            ) from fault
    if config.adapter == "bitfit" and getattr(settings, "bias", None) == "all":
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name.endswith(".bias"))
    for part in wrapped.modules():
        part.__class__ = EXACT_DORA.get(type(part), type(part))
    check_wrapped(wrapped, str(settings.peft_type.value), own, before)
    return wrapped.eval()


class _ExactDora(DoraLinearLayer):
    forward: Any = exact_forward


class _ExactConvDora(DoraConv2dLayer):
    forward: Any = exact_forward


EXACT_DORA: dict[type[nn.Module], type[nn.Module]] = {
    DoraLinearLayer: _ExactDora,
    DoraConv2dLayer: _ExactConvDora,
}


def bare_model(module: nn.Module) -> Any:
    """The transformers model inside an adapter that is left on, or the module itself where there is none."""
    return module.get_base_model() if isinstance(module, peft.PeftModel) else module


def is_adapted(module: nn.Module) -> bool:
    """Whether a PEFT adapter is around the backbone."""
    return isinstance(module, peft.PeftModel)


def has_prefix(module: nn.Module) -> bool:
    """Whether the adapter gives every layer keys and values of tokens before the text."""
    # Older releases of PEFT know one of them.
    return isinstance(module, peft.PeftModel) and module.active_peft_config.peft_type in ("PREFIX_TUNING", "CARTRIDGE")


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
            # Switched on again, PEFT would train all of the adapter, BitFit's idle LoRA too.
            flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
            try:
                with module.disable_adapter():
                    yield module
            finally:
                for parameter, flag in flags:
                    parameter.requires_grad_(flag)


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
        if not isinstance(settings, dict):
            raise TypeError(f"it holds {shown(settings)}")
        if refusal := refused_setting(settings):
            raise ValueError(refusal)
        with warnings.catch_warnings():
            # Settings that contradict each other are the file's author's affair.
            warnings.simplefilter("ignore")
            return peft.PeftConfig.from_peft_type(**settings)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: {folder} holds no PEFT adapter.") from error
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RecursionError) as error:
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
    """Raise ``ValueError`` unless ``saved`` has the names and shapes of ``expected``, and finite floats where that has
    floats; some adapters keep indices beside them."""
    remedy = f"They belong to another backbone or adapter than {getattr(module, 'name_or_path', None) or 'this one'!r}."
    if saved.keys() != expected.keys():
        missing, unknown = sorted(expected.keys() - saved.keys()), sorted(saved.keys() - expected.keys())
        raise ValueError(f"{source}: missing tensors {missing[:3]}, unknown tensors {unknown[:3]}. {remedy}")
    for name, tensor in saved.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)} instead of {list(expected[name].shape)}"
            raise ValueError(f"{source}: {name} has shape {shapes}. {remedy}")
    check_floats({n: v for n, v in saved.items() if expected[n].is_floating_point() or v.is_floating_point()}, source)
