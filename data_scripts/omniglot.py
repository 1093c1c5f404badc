"""Build Omniglot (Lake et al. 2015) as a data set with splits by alphabet, from the two "small" background zips.

    python data_scripts/omniglot.py --data_dir ../shared/data/omniglot

The folder holds images_background_small1.zip and images_background_small2.zip of github.com/brendenlake/omniglot (MIT).
They overlap: a character of an alphabet counts once. That leaves 242 characters of 8 alphabets, 20 drawings each; the
1,623 characters of the papers need the large zips. Drawings are made 28×28, grey, ink white (1) on black (0). Whole
alphabets go to one split, so that a test character has no sibling in training; Greek and Latin, which share letters, go
together:

    train       Greek, Japanese (katakana), Korean, Latin    137 characters (57 %)
    validation  Early Aramaic, Tagalog                        39 characters (16 %)
    test        Balinese, Sanskrit                            66 characters (27 %)

Each character turned by 90, 180 and 270 degrees is three more classes, of training alone: test characters stand
upright. Some papers (Snell et al. 2017) turn test characters as well: --rotations all. Prints what it wrote, and where;
by default that is in Hugging Face's cache, where recipes/benchmarks/omniglot.py looks for it. load_pools reads the
folder.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image, ImageOps

from fewshot_nlp.data import with_rotations
from fewshot_nlp.data.cache import cache_root, save_splits

ZIPS = ("images_background_small1.zip", "images_background_small2.zip")
ALPHABETS = {
    "train": ("Greek", "Japanese_(katakana)", "Korean", "Latin"),
    "validation": ("Early_Aramaic", "Tagalog"),
    "test": ("Balinese", "Sanskrit"),
}
#: The splits that are turned.
ROTATIONS: dict[str, tuple[str, ...]] = {"none": (), "train": ("train",), "all": tuple(ALPHABETS)}


def drawings(zips: Sequence[Path], size: int) -> dict[str, list[Image.Image]]:
    """The drawings of each ``alphabet/character``, in the order of their file names; each once, from the first zip."""
    found: dict[str, dict[str, Image.Image]] = {}
    for path in zips:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                if not name.endswith(".png"):
                    continue
                alphabet, character, file = name.split("/")[-3:]
                drawn = found.setdefault(f"{alphabet}/{character}", {})
                if file not in drawn:
                    # One bit a pixel, ink 0, becomes grey, ink 255, whose thin strokes survive being made smaller.
                    image = ImageOps.invert(Image.open(io.BytesIO(archive.read(name))).convert("L"))
                    drawn[file] = image.resize((size, size), Image.Resampling.BILINEAR)
    return {name: [drawn[file] for file in sorted(drawn)] for name, drawn in sorted(found.items())}


def build(zips: Sequence[Path], size: int = 28, rotations: str = "train") -> DatasetDict:
    """Columns ``image`` and ``label``, in splits by alphabet."""
    found = drawings(zips, size)
    splits = {}
    for split, alphabets in ALPHABETS.items():
        names = [name for name in found if name.split("/")[0] in alphabets]
        features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
        rows = [(image, label) for label, name in enumerate(names) for image in found[name]]
        columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
        dataset = Dataset.from_dict(columns, features=features)
        splits[split] = with_rotations(dataset) if split in ROTATIONS[rotations] else dataset
    return DatasetDict(splits)


def cached(rotations: str = "train") -> Path:
    """Where the data set is kept, unless somebody says otherwise."""
    return cache_root() / f"omniglot-{rotations}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of the two zips")
    parser.add_argument("--size", type=int, default=28, help="width and height of a drawing (default: 28)")
    parser.add_argument("--rotations", choices=ROTATIONS, default="train", help="splits to turn (default: train)")
    parser.add_argument("--output_dir", type=Path, help="folder to write to (default: in Hugging Face's cache)")
    options = parser.parse_args(arguments)
    zips = [options.data_dir / name for name in ZIPS]
    for path in zips:
        if not path.is_file():
            raise SystemExit(f"error: {path} does not exist. Name the folder that holds {' and '.join(ZIPS)}.")
    splits = build(zips, options.size, options.rotations)
    folder = options.output_dir or cached(options.rotations)
    try:
        save_splits(splits, folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for split, dataset in splits.items():
        print(f"{split}: {dataset.features['label'].num_classes} classes, {dataset.num_rows:,} drawings")
    print(f"Written to {folder}")


if __name__ == "__main__":
    main()
