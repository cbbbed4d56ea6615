"""The configuration that a run was started with, as its record has it."""

from __future__ import annotations

from moslora_core import launch
from moslora_core.errors import UserError
from moslora_core.record import RunRecord

from .config import Config


def recorded_config(record: RunRecord) -> Config:
    """The recorded configuration of a run.

    Raises:
        UserError: no run, or a configuration of another experiment.
    """
    path = record.config_path
    if not path.is_file():
        raise UserError(f"{record.path}: has no {path.name}; expected the folder of a run")
    try:
        return launch.instantiate(Config, launch.load_config(path))
    except UserError as error:
        raise UserError(f"{path} is no configuration of visual_instruction: {error}") from None
