"""The list of exhibits: complete, in the paper's order, and with commands that the experiments understand."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec

import pytest

from analysis.exhibits import EXHIBITS, MAIN, experiments
from analysis.paper import load_paper_numbers


def test_every_table_and_figure_with_numbers_of_the_paper_is_an_exhibit():
    assert {exhibit.id for exhibit in EXHIBITS} == set(load_paper_numbers().tables)
    assert [exhibit.name for exhibit in EXHIBITS] == [
        *("Table 1", "Table 2", "Table 3", "Table 4", "Figure 4", "Table 5", "Figure 5", "Figure 6", "Table 6"),
        "Automatic metrics",
    ]
    assert set(MAIN.values()) <= {exhibit.id for exhibit in EXHIBITS}


@pytest.mark.parametrize("experiment", [name for name in experiments() if find_spec(name) is not None])
def test_commands_compose(experiment):
    """Every module exists, and every override is a key and a value of the configuration."""
    from hydra import compose, initialize_config_module
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from moslora_core import launch

    config = import_module(f"{experiment}.config")
    launch.register(config.Config)
    lines = [
        line
        for exhibit in EXHIBITS
        if exhibit.experiment == experiment
        for scale in ("smoke", "small", "paper")
        for line in exhibit.commands(scale)
    ]
    assert lines
    arguments = set()
    for line in lines:
        module, *words = re.fullmatch(r"python -m (\S+) (.+)", line).expand(r"\1 \2").split()
        assert find_spec(module) is not None, module
        arguments.update(word for word in words if word != "-m")
    overrides = set()
    for override in OverridesParser.create().parse_overrides(sorted(arguments)):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [None]
        found = (override.input_line if value is None else f"{override.key_or_group}={value}" for value in values)
        overrides.update(found)
    with initialize_config_module(config.CONF_MODULE, version_base="1.3"):
        for override in sorted(overrides):
            compose("config", overrides=[override])
