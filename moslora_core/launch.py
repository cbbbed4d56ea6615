"""Command lines of the experiments: Hydra's configuration, one-line errors, the place of a run.

``run(main, ...)`` is the whole of an experiment's ``__main__``. Hydra composes and sweeps; what is added here is that
a mistake of the user ends in one line on stderr and exit status 2, that ``--dry-run`` reads as ``dry_run=true``, and
that ``--rerun=<run folder>`` starts from the configuration that a run recorded, complete, instead of the defaults:

    python -m commonsense_reasoning.train --rerun=runs/commonsense_reasoning/smoke/lora/default/seed-0 runs_dir=again
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import hydra
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from .errors import UserError
from .methods import METHODS
from .record import override_label, read_yaml
from .typed import shown

_RERUN = "--rerun="
# What conf/config.yaml sets: a recorded configuration has no settings of Hydra.
_WITHOUT_OUTPUT = (
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra/job_logging=stdout",
    "hydra/hydra_logging=none",
)

# Overrides that say where or how a run is executed, or that have a folder level of their own: not part of its name.
_NOT_IN_LABEL = (
    *("method", "scale", "seed", "runs_dir", "dry_run", "on_finished", "run_name"),
    "training.keep_steps",  # the copies change nothing of what is trained
)


def register(schema: type) -> None:
    """Registers an experiment's dataclass schema and the shared ``method`` group with Hydra."""
    store = ConfigStore.instance()
    store.store(name="schema", node=schema)
    for name, method in METHODS.items():
        store.store(group="method", name=name, node=method)


def run(
    main: Callable[[Any], None],
    schema: type,
    config_module: str,
    *,
    not_in_label: Sequence[str] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Composes ``config_module``'s ``config`` from the command line and calls ``main`` with a ``schema`` instance.

    Args:
        not_in_label: keys, or whole groups such as ``evaluation``, that do not name a run.

    Exits with status 2 after one line on stderr for a :class:`UserError` or a wrong key, value or option.
    """
    given = [_flag(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    register(schema)
    try:
        folder, arguments = _rerun(given)
        _check(config_module, folder, arguments)
    except UserError as error:
        fail(error)
    if folder is not None:
        arguments = [f"--config-path={folder}", "--config-name=config", *arguments, *_WITHOUT_OUTPUT]
    sys.argv[1:] = arguments

    def task(config: DictConfig) -> None:
        # Hydra's console handler hides nothing, but third-party loggers at INFO drown the progress of a run.
        for name in ("httpx", "datasets", "filelock", "lm_eval", "absl"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            if config.run_name is None:
                config.run_name = _label(HydraConfig.get().overrides.task, not_in_label)
            main(instantiate(schema, config))
        except UserError as error:
            fail(error)

    hydra.main(version_base="1.3", config_path=f"pkg://{config_module}", config_name="config")(task)()
    end_process()


def world_size() -> int:
    """Number of processes that the launcher (torchrun, deepspeed, accelerate) started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def end_process() -> None:
    """Ends one of several processes whose work is all done, without finalising its interpreter; else does nothing.

    The threads of gloo drop the tensors of the last collective when they get to it, and take the interpreter's lock
    for that. Where the interpreter is already being finalised the process aborts ("terminate called without an active
    exception"), and the launcher reports a finished run as failed. It is rare, and more frequent on a busy machine.
    """
    if world_size() == 1:
        return
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def instantiate(schema: type, config: DictConfig) -> Any:
    """``config`` as an instance of ``schema``; a key or type that the schema lacks is a UserError."""
    try:
        # As plain values: a key that Hydra's + has added to a node of the schema would come through.
        given = OmegaConf.to_container(config)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None


def fail(error: UserError) -> None:
    """Ends the process as every command of the project ends on bad input."""
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)


def dump(config: Any) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def load_config(path: Path) -> DictConfig:
    """A configuration that :func:`dump` wrote.

    Raises:
        UserError: no such file, or another one.
    """
    found = read_yaml(path, lambda text: OmegaConf.load(io.StringIO(text)))
    if not isinstance(found, DictConfig):
        raise UserError(f"{path} is damaged: expected a configuration, found {shown(OmegaConf.to_container(found))}")
    return found


def differences(config: Any, path: Path, ignore: Sequence[str] = ()) -> list[str]:
    """Settings in which ``config`` differs from one that :func:`dump` wrote to ``path``, as ``key was x, is y``.

    Args:
        ignore: keys, or whole groups such as ``evaluation``, that are not compared.
    """
    was = _flat(OmegaConf.to_container(load_config(path)))
    now = _flat(OmegaConf.to_container(OmegaConf.structured(config), resolve=True))
    return [
        f"{key} was {was.get(key)}, is {now.get(key)}"
        for key in sorted(was.keys() | now.keys())
        if was.get(key) != now.get(key) and not {key, key.split(".", 1)[0]} & set(ignore)
    ]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {key: value}
    return {name: entry for k, v in value.items() for name, entry in _flat(v, f"{key}.{k}" if key else str(k)).items()}


def _flag(argument: str) -> str:
    return "dry_run=true" if argument == "--dry-run" else argument


def _rerun(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The folder that ``--rerun`` names, and the other arguments."""
    folder = None
    for argument in arguments:
        if argument.startswith(_RERUN):
            folder = Path(argument.removeprefix(_RERUN)).resolve()
            if not (folder / "config.yaml").is_file():
                raise UserError(f"{argument}: no config.yaml in that folder; expected a run folder")
            load_config(folder / "config.yaml")  # Hydra's own reading of a damaged one ends in a traceback
    return folder, [argument for argument in arguments if not argument.startswith(_RERUN)]


def _check(config_module: str, folder: Path | None, arguments: Sequence[str]) -> None:
    """Composes beforehand to turn Hydra's multi-line report of a bad override into one line.

    Of a sweep, each value is tried with the first ones of the others. Hydra's own options are Hydra's to check.
    """
    if any(argument.startswith("-") and argument not in ("-m", "--multirun") for argument in arguments):
        return
    overrides = [argument for argument in arguments if not argument.startswith(("-", "hydra"))]
    sweeps = "-m" in arguments or "--multirun" in arguments
    GlobalHydra.instance().clear()
    initialize = (
        initialize_config_module(config_module, version_base="1.3")
        if folder is None
        else initialize_config_dir(str(folder), version_base="1.3")
    )
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        values = [
            [f"{o.get_key_element()}={value}" for value in o.sweep_string_iterator()]
            if o.is_sweep_override()
            else [raw]
            for raw, o in zip(overrides, parsed, strict=True)
        ]
        first = [entry[0] for entry in values]
        with initialize:
            for number, entry in enumerate(values):
                for value in entry[1:] if sweeps else ():
                    compose("config", overrides=[*first[:number], value, *first[number + 1 :]])
            config = compose("config", overrides=first if sweeps else overrides)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(_one_line(error)) from None
    except (OSError, TypeError, ValueError) as error:  # what is no name of a file, given where Hydra looks for one
        reason = getattr(error, "strerror", None) or _one_line(error)
        raise UserError(f"{shown(overrides)}: an override that names no setting or choice ({reason})") from None
    if sweeps:
        _check_writable(Path(config.runs_dir))


def _check_writable(runs_dir: Path) -> None:
    """Of a sweep, Hydra itself writes there (multirun.yaml), before the first run looks at the folder."""
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=runs_dir).close()
    except OSError as error:
        raise UserError(f"cannot write runs_dir={runs_dir}: {error.strerror}; expected a writable folder") from None


def _one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's messages in a line, with the cause that names the key in front."""
    cause = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    lines += [line.strip() for line in str(cause).splitlines()] if cause is not None else []
    dropped = (
        "full_key:",
        "object_type=",
        "reference_type=",
        "Set the environment",
        "Config search path",
        "provider=",
    )
    seen: dict[str, None] = {}
    for line in lines:
        if line and not line.startswith(dropped):
            seen.setdefault(line.replace("\t", " "))
    return "; ".join(seen)


def _label(overrides: Iterable[str], not_in_label: Sequence[str]) -> str:
    def named(override: str) -> bool:
        key = override.lstrip("+~").split("=", 1)[0].split("@", 1)[0]
        skipped = (*_NOT_IN_LABEL, *not_in_label)
        return key not in skipped and key.split(".", 1)[0] not in ("hydra", *not_in_label)

    last = {override.split("=", 1)[0]: override for override in overrides if named(override)}  # of a key, it counts
    return override_label(last.values())
