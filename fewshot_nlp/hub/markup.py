"""Text of strangers on a page in Markdown: on its own line, without markup, and no longer than a page can bear."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from fewshot_nlp.checks import printable

#: Names longer than this, and lists longer than that, would bury the page; all of them are in fewshot_config.json.
MAX_NAME_LENGTH, MAX_NAMES = 80, 60


def plain(text: str, limit: int | None = MAX_NAME_LENGTH) -> str:
    """``text`` on one line, safe inside a Markdown table: control characters shown, markup escaped, long text cut."""
    # A longer text is cut before its characters are looked at, and after some have become escapes.
    shown = printable(text, limit=limit)
    if limit is not None and len(shown) > limit:
        shown = shown[: limit - 1] + "…"
    # The last of them would become links: https://, www. and name@host.
    return re.sub(r"([\\`*_{}\[\]|~$@]|(?<=:)//|(?<=www)\.)", r"\\\1", html.escape(shown, quote=False), flags=re.I)


def listed(values: Sequence[Any], limit: int = MAX_NAME_LENGTH) -> str:
    """The first of many, by commas, and how many more there are."""
    shown = ", ".join(plain(str(value), limit=limit) for value in values[:MAX_NAMES])
    more = len(values) - MAX_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def code_block(text: str) -> str:
    """A fenced block that no run of backticks in ``text`` can close."""
    shown = "".join(char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"{fence}bash\n{shown}\n{fence}"
