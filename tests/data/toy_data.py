"""Small data sets in memory: made-up sentences, enough to sample from."""

from datasets import ClassLabel, Dataset, Features, Value

from fewshot_nlp.data import Pool

CLASSES = ["apple", "banana", "cherry", "date", "elder", "fig", "grape", "honey"]


def make_dataset(classes=CLASSES, per_class=12, column="label", start=0):
    """``per_class`` distinct sentences of each class, classes taking turns."""
    rows = [(f"{name} sentence number {start + i}", name) for i in range(per_class) for name in classes]
    features = Features({"text": Value("string"), column: ClassLabel(names=list(CLASSES))})
    texts, labels = zip(*rows, strict=True)
    return Dataset.from_dict({"text": list(texts), column: list(labels)}, features=features)


def make_pool(sizes, split="train", name="toy"):
    """A pool whose classes have the given sizes."""
    texts, rows_by_class = [], {}
    for class_name, size in sizes.items():
        rows_by_class[class_name] = tuple(range(len(texts), len(texts) + size))
        texts += [f"{class_name} {i}" for i in range(size)]
    return Pool(name, split, rows_by_class, Dataset.from_dict({"text": texts}))
