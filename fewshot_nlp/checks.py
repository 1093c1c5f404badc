"""Checks that need to know nothing else: the type and range of a setting, and text that somebody else wrote."""

from __future__ import annotations

import difflib
import types
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

#: Longest value that an error shows.
SHOWN = 200
#: Characters that hide: control characters, half of a pair, line ends of other alphabets. Format characters (Cf) join
#: emoji and Persian words, too.
_CONTROL = ("Cc", "Cs", "Zl", "Zp")
#: They turn the order of what is read around: text may then say another thing than it shows.
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def printable(text: str, kept: str = "", limit: int | None = None) -> str:
    """``text`` with all characters that a terminal or a page would obey, and not show, as escapes such as ``\\u001b``.

    Args:
        text: from anywhere.
        kept: characters that stay, such as line ends.
        limit: longest result; what is longer is cut.
    """
    if limit is not None and len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(
        char if char in kept or unicodedata.category(char) not in (*_CONTROL, "Cf") else f"\\u{ord(char):04x}"
        for char in text
    )


def shown(value: Any) -> str:
    """``repr`` of ``value`` for an error: on one line, and cut where it is long."""
    return printable(repr(value), limit=SHOWN)


def first_line(error: BaseException) -> str:
    """What ``error`` says first, or its kind where it says nothing."""
    return printable((str(error).splitlines() or [""])[0]) or type(error).__name__


def check_link(path: Path, folder: Path) -> Path:
    """Where ``path``, which is in ``folder``, leads; ``ValueError`` where that is out of it.

    A link may lead to another place in the folder, and in the Hub's cache to the files of the same repository.
    """
    real, home = path.resolve(), folder.resolve()
    homes = [home, *(each.parents[0] / "blobs" for each in home.parents if each.name == "snapshots")]
    if not any(real.is_relative_to(each) for each in homes):
        raise ValueError(f"{path} is a link out of its folder, to {real}. Put the file itself there.")
    return real


def nearest(name: str, known: Collection[str]) -> str:
    """`` Did you mean 'x'?`` for the one of ``known`` that is like ``name``; nothing where none is."""
    # The comparison takes the product of both lengths.
    near = difflib.get_close_matches(name[:SHOWN], known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def hidden_character(text: str) -> str | None:
    """The first character that has no business in a name: a control character, or one that turns the order around."""
    if text.isascii() and text.isprintable():
        return None
    return next((char for char in text if char in _TURNING or unicodedata.category(char) in _CONTROL), None)


def check_type(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` if it is of type ``hint``, an ``int`` for a ``float`` converted; else raise ``ValueError``.

    ``hint`` may be ``bool``, ``int``, ``float``, ``str``, a list of one of them, ``dict``, or any ``| None``. What is
    called a token is not shown.
    """
    seen = "***" if name.endswith("token") else shown(value)
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name}={seen} must be a list, such as [{seen}].")
        return [check_type(name, item, get_args(hint)[0]) for item in value]
    if get_origin(hint) is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name}={seen} must be settings by name, such as {{size: 64}}.")
        return value
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name}={seen} is out of range. Use a smaller number.") from None
    if type(value) is not hint:
        remedy = " In YAML, write 1.0e-4 rather than 1e-4." if hint is float and isinstance(value, str) else ""
        raise ValueError(f"{name}={seen} must be of type {hint.__name__}, not {type(value).__name__}.{remedy}")
    return value


def check_types(settings: Any) -> None:
    """``check_type`` for every field of a dataclass instance, in place."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        setattr(settings, field.name, check_type(field.name, getattr(settings, field.name), hints[field.name]))


def choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name}={shown(value)} is not known. Use one of: {', '.join(allowed)}.")


def at_least(name: str, value: Any, low: float, kind: type[int] | type[float] = int, above: bool = False) -> None:
    """Raise unless ``value`` is a finite ``kind`` of at least (or strictly above) ``low``."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        hint = " In YAML, write 1.0e-4 rather than 1e-4." if isinstance(value, str) else ""
        raise ValueError(f"{name}={shown(value)} must be of type {kind.__name__}, not {type(value).__name__}.{hint}")
    number: float = value
    if not low <= number < float("inf") or (above and number == low):
        limit = f"above {low}" if above else f"of at least {low}"
        raise ValueError(f"{name}={shown(value)} is out of range. Use a value {limit}.")


def from_mapping(cls: type, mapping: dict[str, Any], source: str) -> Any:
    """Build a settings class from ``mapping``; an unknown key is an error that names the nearest known one."""
    if not isinstance(mapping, dict):
        raise ValueError(f"{source} must hold an object of settings, not {type(mapping).__name__}.")
    known = {f.name for f in fields(cls)}
    for key in mapping:
        if key not in known:
            raise ValueError(f"{source} has an unknown key {shown(key)}.{nearest(str(key), known)}")
    return cls(**mapping)
