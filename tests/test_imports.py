"""Imports point one way, and each heavy dependency has one door.

``checks <- types, config <- data, functional <- models <- learners <- evaluation, hub <- training, classifier <- cli``
"""

import ast
import sys
from pathlib import Path

import pytest

import fewshot_nlp

PACKAGE = Path(fewshot_nlp.__file__).parent
#: Rooms by floor, from the ground up. A room knows the floors below it and, on its own floor, only itself.
FLOORS = (
    {"checks"},
    {"types", "config"},
    {"data", "functional"},
    {"models"},
    {"learners"},
    {"evaluation", "hub"},
    {"training", "classifier"},
    {"cli"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
DOORS = {"peft": ("models/adapters.py",), "accelerate": ("training/", "cli/")}


def imported_names(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    """Every module that ``tree`` may import, as an absolute dotted name; those inside functions too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            names += [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            names += [
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
    return names


def wrong_arrows(path: str, source: str) -> list[str]:
    """What the module at ``path``, relative to the package, imports and may not."""
    parts = Path(path).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(["fewshot_nlp", *(parts[:-1] if is_package else parts)])
    room = parts[0]
    if room == "__init__":
        allowed_below = len(FLOORS)
    elif room in FLOOR:
        allowed_below = FLOOR[room]
    else:
        return [f"{path} is in no room of the floor plan"]
    wrong = []
    for name in imported_names(ast.parse(source), module, is_package):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "fewshot_nlp" and target in FLOOR and target != room and FLOOR[target] >= allowed_below:
            wrong.append(f"{path} imports {name}: {room} may not know {target}")
        if top in DOORS and not path.startswith(DOORS[top]):
            wrong.append(f"{path} imports {name}: only {' and '.join(DOORS[top])} may")
        if room == "functional":
            own = top == "fewshot_nlp" and target in ("types", "config", "functional")
            if not own and top != "torch" and top not in sys.stdlib_module_names:
                wrong.append(f"{path} imports {name}: functional knows torch alone")
        if top in ("recipes", "tests", "data_scripts"):
            wrong.append(f"{path} imports {name}: it is not part of the package")
    return wrong


MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES)
def test_imports_point_one_way(path):
    assert wrong_arrows(path, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_every_room_is_read():
    rooms = {Path(path).with_suffix("").parts[0] for path in MODULES}
    assert rooms - {"__init__"} == set(FLOOR)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data/pool.py", "from fewshot_nlp.models.model import FewShotModel"),
        ("data/pool.py", "from fewshot_nlp import models"),
        ("data/pool.py", "from ..functional import inner"),
        ("data/__init__.py", "from ..learners.maml import MAML"),
        ("types.py", "from fewshot_nlp.config import FewShotConfig"),
        ("config.py", "import fewshot_nlp.data.pool"),
        ("hub/card.py", "from fewshot_nlp.evaluation.tables import results_table"),
        ("learners/maml.py", "def adapt():\n    from fewshot_nlp.training.trainer import FewShotTrainer"),
        ("models/model.py", "import importlib\nimportlib.import_module('fewshot_nlp.learners')"),
        ("classifier.py", "from fewshot_nlp.training.trainer import FewShotTrainer"),
        ("training/trainer.py", "from fewshot_nlp.cli import parser"),
        ("models/model.py", "import peft"),
        ("hub/adapter.py", "from peft import PeftModel"),
        ("evaluation/evaluator.py", "from accelerate.utils import gather_object"),
        ("functional/inner.py", "import numpy as np"),
        ("functional/call.py", "from transformers import AutoModel"),
        ("functional/call.py", "from fewshot_nlp.data.encode import TextEncoder"),
        ("cli/train.py", "import recipes.prompt_maml"),
        ("helpers.py", "import math"),
    ],
)
def test_a_wrong_arrow_is_seen(path, source):
    assert len(wrong_arrows(path, source)) >= 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("functional/inner.py", "import math\nfrom torch.func import grad\nfrom fewshot_nlp.types import Batch"),
        ("functional/inner.py", "from .call import call"),
        ("models/adapters.py", "import peft\nfrom ..functional.call import call"),
        (
            "training/trainer.py",
            "from accelerate import Accelerator\nfrom fewshot_nlp.hub.adapter import FewShotAdapter",
        ),
        ("data/__init__.py", "from .pool import Pool\nfrom fewshot_nlp.config import EpisodeConfig"),
        ("cli/train.py", "from fewshot_nlp import __version__\nfrom fewshot_nlp.evaluation import evaluate"),
        ("__init__.py", "from fewshot_nlp.classifier import FewShotClassifier"),
    ],
)
def test_a_right_arrow_is_let_through(path, source):
    assert wrong_arrows(path, source) == []
