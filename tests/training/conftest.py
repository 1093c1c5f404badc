"""Every test here starts without Accelerate's state."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def starts_anew(fresh_accelerator):
    """What ``fresh_accelerator`` does, unasked."""
