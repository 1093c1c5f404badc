"""What of a path goes on a public page: not whose machine it was, nor what else lies there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

#: A word of a shell command, with the quoted parts in it.
_WORDS = re.compile(r"""(?:[^\s'"\\]|\\.|'[^']*'|"(?:[^"\\]|\\.)*")+""", re.DOTALL)
_PATH_WORDS = re.compile(r"([\w.-]*=)?([/~].*)", re.DOTALL)
#: What stands for the folders that are left out.
ELSEWHERE = ".../"


def public_path(path: str) -> str:
    """``path`` as a stranger may read it.

    An absolute path becomes relative inside the current folder, and elsewhere ``.../`` and its last part.
    """
    if not path.startswith(("/", "~")):
        return path
    full, here = Path(path).expanduser() if path.startswith("~/") else Path(path), Path.cwd()
    # A container's current folder may be the root, below which everything is.
    if full.is_relative_to(here) and here != here.parent:
        return str(full.relative_to(here))
    return f"{ELSEWHERE}{full.name}" if full.name else path


def with_public_paths(command: str) -> str:
    """``command`` with ``public_path`` of every word, or value of ``NAME=``, that is one; the rest to the letter."""

    def shorten(match: re.Match[str]) -> str:
        found = _PATH_WORDS.fullmatch("".join(shlex.split(match[0])))
        return shlex.quote(f"{found[1] or ''}{public_path(found[2])}") if found else match[0]

    return _WORDS.sub(shorten, command)
