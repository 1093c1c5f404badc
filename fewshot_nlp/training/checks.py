"""Checks of settings: a folder that can be written."""

from __future__ import annotations

import tempfile
from pathlib import Path


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
