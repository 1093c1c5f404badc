"""Checks of settings: the type that a field declares, and a folder that can be written."""

from __future__ import annotations

import tempfile
import types
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_type(name: str, value: Any, hint: Any) -> Any:
    """Return ``value`` if it is of type ``hint``, an ``int`` for a ``float`` converted; else raise ``ValueError``.

    ``hint`` may be ``bool``, ``int``, ``float``, ``str``, a list of one of them, ``dict``, or any ``| None``.
    """
    if get_origin(hint) in (Union, types.UnionType):
        if value is None:
            return None
        hint = next(option for option in get_args(hint) if option is not type(None))
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name}={value!r} must be a list, such as [{value!r}].")
        return [check_type(name, item, get_args(hint)[0]) for item in value]
    if get_origin(hint) is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ValueError(f"{name}={value!r} must be settings by name, such as {{size: 64}}.")
        return value
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        remedy = " In YAML, write 1.0e-4 rather than 1e-4." if hint is float and isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} must be of type {hint.__name__}, not {type(value).__name__}.{remedy}")
    return value


def check_types(settings: Any) -> None:
    """``check_type`` for every field of a dataclass instance, in place."""
    hints = get_type_hints(type(settings))
    for field in fields(settings):
        setattr(settings, field.name, check_type(field.name, getattr(settings, field.name), hints[field.name]))


def check_writable(folder: str) -> None:
    """Raise ``ValueError`` unless files can be written in ``folder``, or in the nearest parent that exists."""
    if not folder:
        raise ValueError("output_dir is empty. Give the folder that the run may write to.")
    path = Path(folder).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={folder!r} cannot be written: {path}: {error.strerror}. Give a folder that you may write to."
        ) from error
