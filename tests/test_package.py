"""What ``import fewshot_nlp`` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fewshot_nlp


def test_every_public_name_is_there():
    assert sorted(fewshot_nlp.__all__) == fewshot_nlp.__all__ == sorted(fewshot_nlp._HOMES)
    for name in fewshot_nlp.__all__:
        assert getattr(fewshot_nlp, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Nonsense"):
        fewshot_nlp.Nonsense  # noqa: B018


def test_importing_is_cheap():
    code = "import sys, fewshot_nlp; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
