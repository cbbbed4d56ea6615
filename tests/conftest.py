"""Fixtures of every package's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .training_runs import Killed


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
