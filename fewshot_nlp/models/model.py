"""A backbone with its adapter, seen as a pure function from parameters and inputs to features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, wraps
from threading import RLock
from types import MappingProxyType
from typing import Any, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data.encode import Encoder, TextEncoder
from fewshot_nlp.data.images import ImageEncoder, ProcessorEncoder
from fewshot_nlp.data.templates import TemplateEncoder
from fewshot_nlp.functional.call import call, run, trainable, turn
from fewshot_nlp.functional.half import HalfFrozen
from fewshot_nlp.functional.trunk import find_trunk, widened
from fewshot_nlp.functional.twice import ClosedForms
from fewshot_nlp.models.adapters import bare_model, build_adapter, has_prefix, without_adapter
from fewshot_nlp.models.backbone import load_backbone, packaged_backbone
from fewshot_nlp.models.buckets import length_buckets
from fewshot_nlp.models.norm import is_transductive, set_batch_norm
from fewshot_nlp.models.packing import Packing, can_pack, packing_for
from fewshot_nlp.models.pooling import find_pooling, is_causal, pool, pool_image, right_padded
from fewshot_nlp.models.positions import position_limit
from fewshot_nlp.models.reading import sees_padding
from fewshot_nlp.models.verbalizer import TEMPLATES, find_voice
from fewshot_nlp.types import NAMES, Params, split_names

PREFIX = "model."
#: What transformers calls the token that stands for the whole image.
CLASS_TOKENS = ("cls_token", "class_embedding")
#: Name among a stack's inputs of what the trunk hands on.
HIDDEN = "trunk.hidden"
#: What a name of a class is taken to have, where memory and time are foretold.
NAME_TOKENS = 4
#: Tokens that every backbone takes: shorter texts are filled up to them where others have no padding.
SHORTEST = 4
#: What is left to a prompt and a name, where a model looks back so far and no farther.
LONGEST_NAME = 32


Method = TypeVar("Method", bound=Callable[..., Any])


def in_turn(method: Method) -> Method:
    """A method of a model during which no other thread uses its module."""

    @wraps(method)
    def alone(self: FewShotModel, *args: Any, **kwargs: Any) -> Any:
        with self.turn:
            return method(self, *args, **kwargs)

    return cast(Method, alone)


class FewShotModel:
    """Features of inputs under given parameters.

    The module's own values are where training starts; nothing but ``load_params`` and ``holding`` ever changes them.

    Attributes:
        module: the backbone, wrapped by PEFT unless the adapter is ``"full"`` or ``"none"``.
        tokenizer: the backbone's own, or its image processor; ``None`` for networks from scratch.
        config: the settings it was built from.
        trainable: names of the trained tensors, as PEFT and transformers name them.
        transductive: features of an input depend on the others of its batch.
        sees_padding: what it makes of a text depends on the padding behind, which texts are then read without.
        pooling: of tokens; what ``config.pooling`` says, or what fits the backbone.
        voice: how the language model in the backbone speaks of a text's class, where the head is a verbalizer.
        longest: text that it takes, in tokens; ``None`` where it takes any.
        trunk: the layers below the first trained one, if there are any.
        seed: of what starts at random.
        fixed: its features are those of parameters that it was given once.
    """

    fixed = False

    def __init__(self, module: nn.Module, tokenizer: Any, config: FewShotConfig, seed: int = 0) -> None:
        self.module: Any = module
        self.seed = seed
        self.tokenizer = tokenizer
        self.config = config
        self.trainable = trainable(module)
        self.transductive = is_transductive(module)
        # Asked now: it may take a pass, which within another would be in the way.
        self._causal = is_causal(module)
        self.pooling = find_pooling(config.pooling, module, self._causal)
        self._has_prefix = has_prefix(module)
        self.voice = find_voice(bare_model(module), tokenizer) if config.head == "verbalizer" else None
        # What goes on from a text needs its keys and values in every layer.
        goes_on = self.voice is not None and self.voice.scores_names
        self.longest = position_limit(bare_model(module))
        # A decoder never sees what stands behind.
        texts = module.main_input_name == "input_ids" and not self._causal
        self.sees_padding = texts and sees_padding(bare_model(module), getattr(tokenizer, "pad_token_id", None))
        whole = goes_on or self.sees_padding
        self.trunk = None if whole else find_trunk(module, self.trainable, not self.transductive, self.longest)
        self._half = HalfFrozen()
        self._frozen_dtype = "float32"
        self._of_tasks = False

    @classmethod
    def build(cls, config: FewShotConfig, peft_config: Any = None, seed: int = 0, **kwargs: Any) -> FewShotModel:
        """Load the backbone and put the adapter on it; ``kwargs`` go to ``from_pretrained``."""
        name = config.model_name_or_path
        speaks = config.head == "verbalizer"
        module, tokenizer = load_backbone(name, config.model_revision, seed, speaks, **kwargs)
        set_batch_norm(module, config.batch_norm)
        source = packaged_backbone(name) if config.model_revision is None else None
        adapted = build_adapter(module, config, peft_config, str(source or name), seed)
        model = cls(adapted, tokenizer, config, seed)
        if model.voice is not None:
            # Says what is wrong with a template now, and not when the first text comes.
            model.encoder()
            window = getattr(bare_model(adapted).config, "sliding_window", None)
            if model.voice.scores_names and window and window < config.max_length + LONGEST_NAME:
                raise ValueError(
                    f"max_length={config.max_length} is too long: the backbone {name!r} looks back {window} tokens, of "
                    f"which head='verbalizer' leaves {LONGEST_NAME} to prompts and names. Use a max_length of at most "
                    f"{max(window - LONGEST_NAME, 0)}, or head='linear'."
                )
        return model

    @property
    def turn(self) -> RLock:
        """What a thread holds while it uses the module."""
        return turn(self.module)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of features: that of the weights, and single precision at least."""
        return torch.promote_types(next(self.module.parameters()).dtype, torch.float32)

    @property
    def training(self) -> bool:
        """Whether any part of the module is in training mode, where dropout draws anew in every pass."""
        return any(part.training for part in self.module.modules())

    @cached_property
    def hidden_size(self) -> int:
        """Size of the features.

        Raises:
            ValueError: a vision backbone cannot take images of ``config.image_size``, or lacks ``config.pooling``.
        """
        if self.voice is not None:
            return int(self.voice.size)
        if self.module.main_input_name != "pixel_values":
            return int(self.module.config.hidden_size)
        # What configurations call it differs from one vision model to the next: two images tell.
        some = self.encoder()([Image.linear_gradient("L")] * 2)
        own = next(self.module.parameters())
        try:
            inputs = {name: value.to(own) for name, value in some.items()}
            features, again = self.frozen_features(inputs), self.frozen_features(inputs)
        except (RuntimeError, ValueError) as error:
            side = some["pixel_values"].shape[-1]
            raise ValueError(
                f"The backbone {self.config.model_name_or_path!r} makes no features of images of {side} by {side} "
                f"pixels: {str(error).splitlines()[0]} Change image_size or pooling."
            ) from error
        if not torch.equal(features, again):
            raise ValueError(
                f"The backbone {self.config.model_name_or_path!r} draws at random what it looks at: the same image has "
                f"other features each time. Use one that does not; of ViTMAE, a configuration with mask_ratio 0."
            )
        return features.shape[1]

    @property
    def template(self) -> str | None:
        """The words around a text, where the model speaks."""
        return (self.config.template or TEMPLATES[self.voice.slot]) if self.voice else None

    def encoder(self) -> Encoder:
        """How texts or images become this model's inputs.

        Raises:
            ValueError: it takes neither; or ``config.image_size`` is not that of a network from scratch.
        """
        shape, size = self.module.config, self.config.image_size
        if isinstance(self.tokenizer, BaseImageProcessor):
            return ProcessorEncoder(self.tokenizer, shape.num_channels, size)
        if self.voice is not None and self.template is not None:
            words = self.config.verbalizer or {}
            return TemplateEncoder(self.tokenizer, self.config.max_length, self.template, self.voice.slot, words)
        if self.tokenizer is not None:
            return TextEncoder(self.tokenizer, self.config.max_length)
        if not hasattr(shape, "image_size"):
            raise ValueError(
                f"The backbone {self.config.model_name_or_path!r} takes neither texts nor images, which pools hold. "
                f"Give its learner batches of your own, or use another backbone."
            )
        if size not in (None, shape.image_size):
            raise ValueError(
                f"image_size={size} is not the {shape.image_size} that the network "
                f"{self.config.model_name_or_path!r} is made for. Leave it out, or save a network of that size."
            )
        return ImageEncoder(shape.image_size, shape.num_channels)

    def any_texts(self, count: int, tokens: int) -> dict[str, Tensor]:
        """Inputs of the shape of ``count`` texts of ``tokens`` tokens, to count or to time by."""
        token = getattr(self.voice, "mask_token_id", 1)
        ids = torch.full((count, tokens), token, device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    @in_turn
    def twin(self) -> FewShotModel:
        """The same model for another thread: the module is its own, and all that it holds is shared."""
        return copy.deepcopy(self, {id(each): each for each in self.shared})

    @property
    def shared(self) -> list[Any]:
        """What twins have in common."""
        shared: list[Any] = [*self.module.parameters(), *self.module.buffers(), self.tokenizer, self.config, self._half]
        return shared + ([self.trunk.known, self.trunk.top] if self.trunk else [])

    @in_turn
    def to(self, device: torch.device | str) -> FewShotModel:
        """Move the module in place."""
        self.module.to(device)
        return self

    @in_turn
    def init_params(self) -> dict[str, Tensor]:
        """Copies of the trained tensors' own values, by name with the prefix ``model.``."""
        own = dict(self.module.named_parameters())
        return {PREFIX + name: own[name].detach().clone() for name in self.trainable}

    @in_turn
    def features(self, params: Params, inputs: dict[str, Tensor], frozen: Params = MappingProxyType({})) -> Tensor:
        """Pooled features ``[n, hidden_size]`` under the ``model.`` entries of ``params``; of texts that are asked
        about names, their scores ``[n, n_way]``.

        ``frozen``: other values for some of the tensors that are not trained, by the names of ``module``.
        """
        self._check_prefix()
        inputs, hidden = {n: t for n, t in inputs.items() if n != HIDDEN}, inputs.get(HIDDEN)
        body = {name.removeprefix(PREFIX): value for name, value in params.items() if name.startswith(PREFIX)}
        names, values = (*self.trainable, *frozen), {**body, **frozen}

        def below(part: dict[str, Tensor], packing: Packing | None = None) -> AbstractContextManager[None]:
            if self.trunk is not None and hidden is not None and not frozen:
                return self.trunk.starting(hidden)
            # Dropout draws anew in every pass, also below. All parts are asked, which takes a while: last of all.
            trunk = None if self.trunk is None or frozen or self._of_tasks or self.training else self.trunk
            lay = packing.pack if packing else None
            return trunk.skipped(part, self.precision, lay) if trunk else nullcontext()

        def read(part: dict[str, Tensor], packing: Packing | None) -> Tensor:
            with below(part, packing):
                return self._pool(call(self.module, names, values, **self._laid(part, packing)), part, packing)

        def speak(part: dict[str, Tensor], _: Packing | None) -> Tensor:
            def forward(**texts: Any) -> Any:
                with below(texts):
                    return self.module(**texts)

            voice = self.voice
            assert voice is not None
            return run(self.module, names, values, lambda: voice.read(forward, bare_model(self.module), part))

        return self._at_little_cost(read if self.voice is None else speak, inputs)

    def _check_prefix(self) -> None:
        """Where transformers checkpoints a layer, it leaves out the keys and values that it is given."""
        if self._has_prefix and any(
            getattr(p, "gradient_checkpointing", False) and p.training for p in self.module.modules()
        ):
            raise ValueError(
                "With gradient checkpointing transformers passes over the keys and values that prefix tuning gives "
                "each layer: the features would be those of no adapter. Turn it off, or use adapter='prompt_tuning' or "
                "'lora'."
            )

    @in_turn
    def read_ahead(self, inputs: dict[str, Tensor]) -> Tensor | None:
        """Run the trunk, if there is one, for what it does not know of ``inputs`` yet; what it hands on."""
        if self.trunk is None or self.voice is not None or self.training:
            return None
        bare = split_names(inputs)[0]
        return self.trunk.read(right_padded(bare) if "attention_mask" in bare else bare, self.precision)

    def ready(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs ``[tasks, n, ...]`` of a stack, padded behind, as ``features`` takes those of one task under
        ``torch.vmap``: with what the trunk hands on."""
        shape = next(iter(inputs.values())).shape[:2]
        if self.transductive:
            # A task's statistics are its own.
            tasks = [self.read_ahead({name: tensor[i] for name, tensor in inputs.items()}) for i in range(shape[0])]
            hidden = None if any(each is None for each in tasks) else torch.cat([t for t in tasks if t is not None])
        else:
            hidden = self.read_ahead({name: tensor.flatten(0, 1) for name, tensor in inputs.items()})
        return inputs if hidden is None else {**inputs, HIDDEN: hidden.unflatten(0, shape)}

    @contextmanager
    def of_tasks(self) -> Iterator[None]:
        """A block in which ``features`` are of one task of a stack, whose numbers cannot be looked at."""
        with self.turn:
            before, self._of_tasks = self._of_tasks, True
            try:
                with ClosedForms(hidden=True):
                    yield
            finally:
                self._of_tasks = before

    @in_turn
    @torch.no_grad()
    def frozen_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Pooled features ``[n, hidden_size]`` of the backbone without its adapter."""
        with without_adapter(self.module) as module:
            voice = self.voice
            if voice is not None:
                return self._at_little_cost(lambda part, _: voice.read_frozen(bare_model(module), part), inputs)
            return self._at_little_cost(
                lambda part, packing: self._pool(module(**self._laid(part, packing)), part, packing), inputs
            )

    def _at_little_cost(
        self, read: Callable[[dict[str, Tensor], Packing | None], Tensor], inputs: dict[str, Tensor]
    ) -> Tensor:
        """``read`` of ``inputs``, padded behind; where arithmetic is what costs time, with little of it on padding:
        several texts in a row, or in buckets of like length."""

        def at_once(part: dict[str, Tensor], packing: Packing | None = None) -> Tensor:
            features = read(part, packing)
            # Under autocast some backbones end in half precision, which is too coarse for a head.
            return features.to(torch.promote_types(features.dtype, torch.float32))

        if self._of_tasks or "attention_mask" not in inputs:
            return at_once(inputs)
        inputs, names = split_names(inputs)
        inputs, names = right_padded(inputs), right_padded(names) if names else {}
        mask, asked = inputs["attention_mask"], {f"{NAMES}{name}": rows for name, rows in names.items()}
        if not len(mask):
            return mask.new_zeros(0, len(names["input_ids"]) if names else self.hidden_size, dtype=self.dtype)
        # On an accelerator calls cost more than arithmetic; looking at the mask would wait for it.
        if mask.device.type != "cpu" and not self.sees_padding:
            return at_once({**inputs, **asked})
        if self._packs and (packing := packing_for(inputs)):
            return at_once(inputs, packing)
        if self.sees_padding:
            wide = widened(inputs, max(mask.shape[1], SHORTEST))
            mask = wide["attention_mask"]
            # What short texts are filled up with is the same wherever they stand.
            inputs = {name: tensor * mask for name, tensor in wide.items()}
        buckets = length_buckets(mask, SHORTEST if self.sees_padding else None)
        parts = [{name: tensor[rows, :longest] for name, tensor in inputs.items()} for rows, longest in buckets]
        pooled = [at_once({**part, **asked}) for part in parts]
        back = torch.cat([rows for rows, _ in buckets]).argsort()
        return torch.cat(pooled)[back]

    @contextmanager
    def frozen_in(self, dtype: str) -> Iterator[None]:
        """A block in which products with frozen matrices are in ``"float32"`` or ``"bfloat16"``."""
        with self.turn:
            before, self._frozen_dtype = self._frozen_dtype, dtype
            try:
                # One within another of the same is one.
                with self._half if dtype == "bfloat16" != before else nullcontext():
                    yield
            finally:
                self._frozen_dtype = before

    @cached_property
    def _packs(self) -> bool:
        # What is said of a text is read at its own end.
        return self.voice is None and can_pack(self.module)

    def _laid(self, inputs: dict[str, Tensor], packing: Packing | None) -> dict[str, Tensor]:
        """What the backbone is given for ``inputs``."""
        return packing.inputs(inputs, self.dtype, self._causal) if packing else inputs

    def _pool(self, output: Any, inputs: dict[str, Tensor], packing: Packing | None) -> Tensor:
        """Features ``[n, hidden_size]`` of what the backbone gave for ``inputs``."""
        if "attention_mask" not in inputs:
            return pool_image(output, self.config.pooling, self._special_tokens)
        mask, hidden = inputs["attention_mask"], output.last_hidden_state
        if packing:
            hidden = packing.unpack(hidden)
            mask = mask[:, : hidden.shape[1]]
        return pool(hidden, mask, self.pooling)

    @cached_property
    def _special_tokens(self) -> int:
        """Tokens in front of the patches of an image: those for the class, and registers."""
        own = [name for name, _ in self.module.named_parameters() if name.endswith(CLASS_TOKENS)]
        return len(own) and 1 + getattr(self.module.config, "num_register_tokens", 0)

    @property
    def precision(self) -> str:
        """A name of what products are in."""
        kind = self.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else ""
        return f"{self._frozen_dtype}{autocast}"

    @torch.no_grad()
    def load_params(self, params: Params) -> None:
        """Write the ``model.`` entries of ``params`` into the module."""
        own = dict(self.module.named_parameters())
        for name in self.trainable:
            own[name].copy_(params[PREFIX + name])

    @contextmanager
    def holding(self, params: Params) -> Iterator[nn.Module]:
        """The module with ``params`` written into it, for code that must read a real module, such as a saver."""
        with self.turn:
            own = self.init_params()
            self.load_params(params)
            try:
                yield self.module
            finally:
                self.load_params(own)
