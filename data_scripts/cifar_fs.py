"""Build CIFAR-FS (Bertinetto et al., ICLR 2019, arXiv:1805.08136): the classes of CIFAR-100 (Krizhevsky 2009) in 64
for training, 16 for validation and 20 for test.

    python data_scripts/cifar_fs.py --data_dir ../shared/data/cifar100

The folder holds cifar100_60.npz (``x``, bytes ``[100, 60, 32, 32, 3]``: 60 images of each class) and split_1.json with
the names of the classes in the order of ``x`` under "classes", and those of each split under "train", "validation" and
"test". Nothing in the archive is unpickled. Prints what it wrote, and where; by default that is in Hugging Face's
cache, where recipes/benchmarks/images.py looks for it. load_pools reads the folder.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features
from PIL import Image

from fewshot_nlp.data.cache import cache_root, save_splits
from fewshot_nlp.data.splits import SPLITS

ARCHIVE, LISTS = "cifar100_60.npz", "split_1.json"


def build(pixels: np.ndarray, classes: list[str], splits: dict[str, list[str]]) -> DatasetDict:
    """Columns ``image`` and ``label``, in splits by class, from bytes ``[len(classes), images, height, width, 3]``."""
    if pixels.dtype != np.uint8 or pixels.ndim != 5 or len(pixels) != len(classes):
        raise SystemExit(
            f"error: x is {pixels.dtype} of shape {list(pixels.shape)}, and {LISTS} names {len(classes)} classes. Give "
            f"bytes as [classes, images, height, width, 3]."
        )
    found = {}
    for split in SPLITS:
        names = sorted(splits[split])
        features = Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
        rows = [(Image.fromarray(image), i) for i, name in enumerate(names) for image in pixels[classes.index(name)]]
        columns = {"image": [image for image, _ in rows], "label": [label for _, label in rows]}
        found[split] = Dataset.from_dict(columns, features=features)
    return DatasetDict(found)


def cached() -> Path:
    """Where the data set is kept, unless somebody says otherwise."""
    return cache_root() / "cifar_fs"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_dir", type=Path, required=True, help=f"folder of {ARCHIVE} and {LISTS}")
    parser.add_argument("--output_dir", type=Path, help="folder to write to (default: in Hugging Face's cache)")
    options = parser.parse_args(arguments)
    for name in (ARCHIVE, LISTS):
        if not (options.data_dir / name).is_file():
            raise SystemExit(f"error: {options.data_dir / name} does not exist. Name the folder that holds it.")
    with np.load(options.data_dir / ARCHIVE, allow_pickle=False) as archive:
        pixels = archive["x"]
    lists = json.loads((options.data_dir / LISTS).read_text(encoding="utf-8"))
    splits = build(pixels, lists["classes"], lists)
    folder = options.output_dir or cached()
    try:
        save_splits(splits, folder)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    for split, dataset in splits.items():
        print(f"{split}: {dataset.features['label'].num_classes} classes, {dataset.num_rows:,} images")
    print(f"Written to {folder}")


if __name__ == "__main__":
    main()
