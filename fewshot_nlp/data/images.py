"""From images to tensors, with Pillow alone; and rotations, which make new classes of old ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, Image, concatenate_datasets
from PIL import Image as Pillow
from PIL import ImageOps
from torch import Tensor

from fewshot_nlp.checks import at_least, first_line

#: Pillow's names of the pictures that a network takes, by number of channels.
MODES = {1: "L", 3: "RGB"}
#: Memory for encoded images.
CACHE_BYTES = 2**28
#: Turns counter-clockwise, by the degrees that stand in a class's name.
TURNS = {
    90: Pillow.Transpose.ROTATE_90,
    180: Pillow.Transpose.ROTATE_180,
    270: Pillow.Transpose.ROTATE_270,
}


def checked_image(image: Any, place: str) -> Pillow.Image:
    """A Pillow image of 8 bits a value, upright, of what may also be an array ``[height, width]`` or ``[height, width,
    3]``.

    Raises:
        ValueError: it is neither, or cannot be told from its EXIF data which way up; ``place`` says which one it is.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise ValueError(
                f"{place} is an array of {image.dtype} and shape {list(image.shape)}. Give bytes (uint8) as [height, "
                f"width] or [height, width, 3]."
            )
        return Pillow.fromarray(image)
    if not isinstance(image, Pillow.Image):
        raise ValueError(f"{place} of type {type(image).__name__} is no Pillow image. Open it with PIL.Image.")
    if image.mode.startswith(("I", "F")):
        # Pillow would cut their values off at 255 without a word.
        raise ValueError(
            f"{place} is of mode {image.mode!r}, with more than 8 bits a value. Scale its values to 0 to 255, mode 'L'."
        )
    try:
        # As datasets does where it reads an image.
        return ImageOps.exif_transpose(image)
    except SyntaxError as error:
        raise ValueError(f"{place} has damaged EXIF data: {error}. Save it without.") from error


class ImageEncoder:
    """Resizes images to a square, whatever their shape, and scales their values to ``(value / 255 - mean) / std``.

    Args:
        size: width and height.
        num_channels: 1 for shades of grey, 3 for red, green and blue.
        mean, std: of the values between 0 and 1, as the backbone wants them; one of each, or one a channel.

    Raises:
        ValueError: a size, number of channels or deviation that cannot be.
    """

    kind = "image"

    def __init__(
        self,
        size: int = 28,
        num_channels: int = 1,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
    ) -> None:
        at_least("size", size, 1)
        if num_channels not in MODES:
            raise ValueError(f"num_channels={num_channels!r} is not known. Use 1 for grey or 3 for colour.")
        for value in std if isinstance(std, Sequence) else [std]:
            at_least("std", value, 0.0, float, above=True)
        self.size, self.num_channels = size, num_channels
        self.mean, self.std = (torch.tensor(each, dtype=torch.float32).reshape(-1, 1, 1) for each in (mean, std))

    @property
    def cache_size(self) -> int:
        return CACHE_BYTES // (self.num_channels * self.size**2)

    def __call__(self, images: Sequence[Pillow.Image]) -> dict[str, Tensor]:
        """``pixel_values`` ``[len(images), num_channels, size, size]``, float32."""
        return self.collate(self.encode(images))

    def encode(self, images: Sequence[Pillow.Image]) -> list[Tensor]:
        """Each image as bytes ``[num_channels, size, size]``."""
        if not isinstance(images, Sequence) or not images:
            raise ValueError(f"images={images!r} must be a list of one or more images.")
        mode = MODES[self.num_channels]
        return [self._encode(checked_image(image, f"images[{i}]").convert(mode)) for i, image in enumerate(images)]

    def _encode(self, image: Pillow.Image) -> Tensor:
        """Of an image of the right channels."""
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Pillow.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).reshape(self.size, self.size, self.num_channels).permute(2, 0, 1)

    def collate(self, encoded: Sequence[Tensor]) -> dict[str, Tensor]:
        """Encoded images as one batch."""
        # In place: a batch of large images is mostly memory to go through.
        pixels = torch.stack(list(encoded)).to(torch.float32, memory_format=torch.contiguous_format)
        return {"pixel_values": pixels.sub_(255 * self.mean).div_(255 * self.std)}


class ProcessorEncoder(ImageEncoder):
    """What a transformers image processor does to images, in two steps: bytes of the right size, then their scale.

    Args:
        processor: of Pillow's backend (``AutoImageProcessor.from_pretrained(..., backend="pil")``).
        num_channels: of the backbone.
        size: width and height, in place of the processor's.

    Raises:
        ValueError: a processor that leaves images of unlike shapes, or does something else to them.
    """

    def __init__(self, processor: Any, num_channels: int = 3, size: int | None = None) -> None:
        self._sizes = _sizes(processor, size)
        normalised = processor.do_normalize
        scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
        mean, std = (processor.image_mean, processor.image_std) if normalised else (0.0, 1.0)
        mean, std = ([value / scale for value in _listed(each)] for each in (mean, std))
        # EfficientNet's divides by the deviations once more.
        self._again = {"include_top": False} if getattr(processor, "include_top", False) else {}
        if self._again:
            std = [value * more for value, more in zip(std * 3, _listed(processor.image_std), strict=False)]
        self.processor = processor
        super().__init__(_side(self._sizes), num_channels, mean, std)
        self._check()

    def _encode(self, image: Pillow.Image) -> Tensor:
        bytes_alone = {"do_rescale": False, "do_normalize": False, **self._again}
        return self._processed(image, **bytes_alone)

    def _processed(self, image: Pillow.Image, **options: bool) -> Tensor:
        options |= {"do_convert_rgb": False}
        return self.processor(image, **self._sizes, **options, return_tensors="pt")["pixel_values"][0]

    def _check(self) -> None:
        """Raise ``ValueError`` where the processor itself makes something else of an image."""
        picture = Pillow.linear_gradient("L").resize((self.size, 2 * self.size)).convert(MODES[self.num_channels])
        name = type(self.processor).__name__
        try:
            wanted, found = self._processed(picture), self([picture])["pixel_values"][0]
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The image processor {name} cannot read an image of num_channels={self.num_channels}: "
                f"{first_line(error)} Use one of as many channels as its backbone."
            ) from error
        square = wanted.shape[-2:] == found.shape[-2:] == (self.size, self.size)
        if not (square and torch.allclose(wanted.to(found), found, rtol=1e-4, atol=1e-4)):
            raise ValueError(
                f"The image processor {name} does something else to an image than make it a square and scale its "
                f"values. Use a ViTImageProcessor with the backbone's size, image_mean and image_std, saved beside it."
            )


def _listed(value: float | Iterable[float]) -> list[float]:
    return list(value) if isinstance(value, Iterable) else [value]


def _sizes(processor: Any, size: int | None) -> dict[str, dict[str, int]]:
    """``size`` and ``crop_size`` of the processor, made to come out at ``size``."""
    found = {"size": dict(processor.size or {})}
    if getattr(processor, "do_center_crop", False):
        found["crop_size"] = dict(processor.crop_size)
    if size is not None:
        found = {name: dict.fromkeys(edges, size) for name, edges in found.items()}
    return found


def _side(sizes: dict[str, dict[str, int]]) -> int:
    """Width and height of what comes out."""
    last = set(sizes.get("crop_size", sizes["size"]).values())
    if len(last) != 1:
        raise ValueError(f"The image processor leaves no squares: {sizes}. Set image_size.")
    return last.pop()


def with_rotations(dataset: Dataset, image_column: str = "image", label_column: str = "label") -> Dataset:
    """``dataset`` four times over: as it is, and turned by 90, 180 and 270 degrees, each turn of a class a class.

    That is how Omniglot is augmented (Santoro et al. 2016; Vinyals et al. 2016). The class ``Greek/alpha`` turned by 90
    degrees is ``Greek/alpha, 90 degrees``. Turn the splits one by one, after they were made, so that no character is in
    two of them; published figures turn the test classes too, or do not, from paper to paper.

    Raises:
        ValueError: columns of another type than ``Image`` and ``ClassLabel``.
    """
    for column, kind in ((image_column, Image), (label_column, ClassLabel)):
        if not isinstance(dataset.features.get(column), kind):
            raise ValueError(f"The column {column!r} is {dataset.features.get(column)}. Cast it to {kind.__name__}.")
    names = dataset.features[label_column].names
    turned = [f"{name}, {degrees} degrees" for degrees in TURNS for name in names]
    features = Features({**dataset.features, label_column: ClassLabel(names=[*names, *turned])})

    def turn(batch: dict[str, list], i: int, how: Pillow.Transpose) -> dict[str, list]:
        images = [image.transpose(how) for image in batch[image_column]]
        return {image_column: images, label_column: [label + (i + 1) * len(names) for label in batch[label_column]]}

    parts = [
        dataset.map(turn, batched=True, fn_kwargs={"i": i, "how": how}, features=features, keep_in_memory=True)
        for i, how in enumerate(TURNS.values())
    ]
    return concatenate_datasets([dataset.cast(features, keep_in_memory=True), *parts])
