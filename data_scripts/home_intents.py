"""Build the home_intents data set, show what is in it, and write it to a folder if asked.

    pip install -e ".[offline]"
    python data_scripts/home_intents.py
    python data_scripts/home_intents.py --language de --output_dir home_intents_de

Prints one line a class (sentences, intent, readable name, an example) under each split, then the totals:

    test: 14 classes, 2440 sentences
       200  HassPauseTimer               pause a timer: "pause the timer for cake"
    ...
    39 classes, 7204 sentences

The folder is one that datasets.load_from_disk and fewshot_nlp.data.load_pools read. Recipes need no folder: they take
--dataset_name home_intents, which builds the same set once and keeps it in Hugging Face's cache.
"""

from __future__ import annotations

import argparse
from collections import Counter

from datasets import DatasetDict

from fewshot_nlp.data import home_intents


def table(splits: DatasetDict) -> str:
    """One line a class and split, and the totals."""
    lines = []
    for split, dataset in splits.items():
        labels = dataset[:]["label"]
        counts = Counter(labels)
        lines.append(f"{split}: {len(counts)} classes, {len(labels)} sentences")
        for label in sorted(counts):
            first = dataset[labels.index(label)]
            intent = dataset.features["label"].int2str(label)
            lines.append(f'  {counts[label]:4}  {intent:27}  {first["label_name"]}: "{first["text"]}"')
    classes = sum(len(set(dataset[:]["label"])) for dataset in splits.values())
    lines.append(f"{classes} classes, {sum(splits.num_rows.values())} sentences")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--language", default="en", help="a language of home_assistant_intents (default: en)")
    parser.add_argument("--output_dir", help="folder to write the data set to (default: none)")
    options = parser.parse_args(arguments)
    splits = home_intents(options.language)
    print(table(splits))
    if options.output_dir:
        splits.save_to_disk(options.output_dir)
        print(f"Written to {options.output_dir}")


if __name__ == "__main__":
    main()
