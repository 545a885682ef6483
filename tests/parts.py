"""Parts of the machine that a test needs and a user may not have."""

from __future__ import annotations

import os

import pytest


def need(present: object, part: str) -> None:
    """Skip with the reason where a part is absent; in CI, which installs it, fail."""
    if not present:
        message = f"{part} is not on this machine"
        if os.environ.get("CI"):
            pytest.fail(f"{message}, and CI should have installed it")
        pytest.skip(message)
