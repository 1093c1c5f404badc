"""Settings from a recipe's YAML, another YAML and the command line; each wins over the one before.

All settings are the fields of three dataclasses, so that a key is spelt the same in YAML, on the command line and in
Python.
"""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from fewshot_nlp.checks import check_types, nearest, shown
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.training.arguments import FewShotTrainingArguments


class Settings(NamedTuple):
    """Everything that a run is told."""

    config: FewShotConfig
    episodes: EpisodeConfig
    args: FewShotTrainingArguments


#: Of a settings file.
MAX_BYTES = 100_000
USAGE = "%(prog)s [--config FILE] [--NAME VALUE ...]"
CLASSES: tuple[Any, ...] = (FewShotConfig, EpisodeConfig, FewShotTrainingArguments)


def names_of(classes: Sequence[Any]) -> tuple[str, ...]:
    """The settings of ``classes``."""
    return tuple(field.name for cls in classes for field in fields(cls))


NAMES = names_of(CLASSES)


def parse(argv: Sequence[str], recipe: str | Path | None = None, usage: str = USAGE, about: str = "") -> Settings:
    """``parse_into`` the three classes that every run has."""
    return Settings(*parse_into(CLASSES, argv, recipe, usage, about))


def parse_into(
    classes: Sequence[Any],
    argv: Sequence[str],
    recipe: str | Path | None = None,
    usage: str = USAGE,
    about: str = "",
) -> list[Any]:
    """Settings of ``classes`` from the YAML file ``recipe``, then ``--config FILE``, then the rest of ``argv``.

    ``none`` or ``null`` on the command line unsets a setting that may be unset. ``overwrite_output_dir`` is leave to
    replace one folder: where a later source names another ``output_dir``, it must be given there again.

    ``usage`` and ``about`` are what ``--help`` says of the command before its settings.

    Raises:
        ValueError: an unknown key or argument, with the nearest known one; a value of the wrong type or out of range.
        FileNotFoundError: a YAML file that does not exist.
        SystemExit: after ``--help``.
    """
    known = names_of(classes)
    parser = _Parser(
        tuple(classes),
        usage=usage,
        description=f"{about} Every setting may stand in a YAML file or on the command line, which wins.".strip(),
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="A YAML file whose settings win over the recipe's own.")
    given, unset = _without_unset(argv, classes)
    # A value that is there already takes the place of the default, and so tells what was given.
    chosen, _ = parser.parse_known_args(given, Namespace(output_dir=None))
    sources = [read_yaml(path, known) for path in (recipe, chosen.config) if path is not None]
    if chosen.output_dir is not None:
        sources.append({"output_dir": chosen.output_dir})
    values: dict[str, Any] = {}
    for source in sources:
        if source.get("output_dir", values.get("output_dir")) != values.get("output_dir"):
            values.pop("overwrite_output_dir", None)
        values |= source
    # argparse converts defaults that are strings, so the 1e-4 that YAML takes for one becomes a number here.
    parser.set_defaults(**(values | dict.fromkeys(unset)))
    *settings, _, rest = parser.parse_args_into_dataclasses(
        args=given, return_remaining_strings=True, look_for_args_file=False
    )
    for argument in rest:
        name = argument.split("=")[0].lstrip("-").replace("-", "_") if argument.startswith("-") else None
        _refuse(name, argument, known)
    for part in settings:
        check_types(part)
    return settings


def read_yaml(path: str | Path, known: Sequence[str] = NAMES) -> dict[str, Any]:
    """The settings in a YAML file; every key is one of ``known``.

    Raises:
        ValueError: not a mapping, an unknown key, or a key that stands twice.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no settings file {str(path)!r}. Give the path of a YAML file.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes, and settings at most {MAX_BYTES:,}. Is it one?")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Settings)
    except yaml.MarkedYAMLError as error:
        # Its own words, and whoever prints it, quote the line, which may hold a token.
        raise ValueError(f"{path} is not valid YAML: {_problem(error)}. Repair that line.") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        # From bytes that are no text, tags that do not fit, and endless brackets.
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines, not a {type(content).__name__}.")
    for key in content:
        if key not in known:
            raise ValueError(f"{path} has an unknown key {shown(key)}.{_nearest(str(key), known)}")
    return content


def _problem(error: yaml.MarkedYAMLError) -> str:
    """What is wrong and where, without what stands there."""
    words = ", ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark

    def public(quoted: re.Match[str]) -> str:
        # A sign, a kind of token such as <scalar>, and the name of a setting are.
        return quoted[0] if len(quoted[2]) < 3 or quoted[2][0] == "<" or quoted[2] in NAMES else "..."

    said = re.sub(r"(['\"])(.*?)\1", public, words)
    return said if mark is None else f"{said}, line {mark.line + 1}, column {mark.column + 1}"


class _Settings(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, by which a few lines can say more than memory holds, and with an error in
    place of the last of two equal keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not read; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, KeyError, AttributeError):
            # From values that look like dates or numbers and are none.
            problem = f"the value is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key, count in Counter(key for key in keys if isinstance(key, Hashable)).items():
            if count > 1:
                problem = f"the key {shown(key)} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_mapping(node, deep)


class _Parser(HfArgumentParser):
    """Errors are raised as ``ValueError`` instead of a page of usage; a setting that is an object is given as JSON."""

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        if get_origin(kwargs.get("type")) is dict:
            kwargs["type"] = _json_object
        return super().add_argument(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("the JSON object has too many brackets") from error
    if not isinstance(found, dict):
        raise ValueError(f"{shown(text)} is no JSON object")
    return found


def _without_unset(argv: Sequence[str], classes: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Take ``--name none`` out of ``argv`` where ``name`` may be unset. The rest, and the names that end unset."""
    optional = {name for cls in classes for name, hint in get_type_hints(cls).items() if "None" in str(hint)}
    groups: list[tuple[str, list[str]]] = []
    for token in argv:
        if token.startswith("--") or not groups:
            groups.append((token.partition("=")[0].removeprefix("--").replace("-", "_"), []))
        groups[-1][1].append(token)
    unset = [name in optional and _is_unset(tokens) for name, tokens in groups]
    # What is said last counts.
    ends = {name: empty for (name, _), empty in zip(groups, unset, strict=True)}
    given = [group for group, empty in zip(groups, unset, strict=True) if not empty and not ends[group[0]]]
    return [token for _, tokens in given for token in tokens], [name for name, empty in ends.items() if empty]


def _is_unset(tokens: list[str]) -> bool:
    """Whether ``tokens`` are ``--name none`` or ``--name=none``."""
    value = tokens[0].partition("=")[2]
    return [value.lower(), *(token.lower() for token in tokens[1:])] in (["", "none"], ["", "null"], ["none"], ["null"])


def _refuse(name: str | None, argument: str, known: Sequence[str]) -> NoReturn:
    if name is None:
        raise ValueError(f"Unexpected argument {shown(argument)}. Settings are given as --NAME VALUE.")
    # Without its value, which may be a token.
    raise ValueError(f"Unknown argument {shown(argument.partition('=')[0])}.{_nearest(name, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    return nearest(name.replace("-", "_"), known) or " See --help for all settings."
