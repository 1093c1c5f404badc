"""What the command line says of bad input."""

from __future__ import annotations

from fewshot_nlp.checks import printable
from fewshot_nlp.hub.info import without_tokens

#: Longest message; what is quoted in it may be of any length.
LIMIT = 2000


def refusal(error: BaseException) -> SystemExit:
    """The end of the program with one message: no access token in it, and nothing that a terminal would obey."""
    return SystemExit(f"error: {printable(without_tokens(str(error)), kept=chr(10), limit=LIMIT)}")
