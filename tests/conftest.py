"""Fixtures of every package's tests, and how hypothesis draws: the same examples at every run.

``HYPOTHESIS_PROFILE=explore pytest`` looks for others.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from hypothesis import settings

from .training_runs import Killed

settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore")
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture
def kill_at(monkeypatch) -> Callable[[int], None]:
    """Makes a training die once, as it begins the step after the given one."""
    from transformers import Trainer

    pending: set[int] = set()
    original = Trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step in pending:
            pending.clear()
            raise Killed
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return pending.add
