"""Two finished runs of every subject, and the images of theirs that started from the same noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moslora_core import launch
from moslora_core.drawn_images import FACTS, DrawnImage, drawing_settings, read_drawn
from moslora_core.errors import UserError
from moslora_core.paths import is_file
from moslora_core.record import RunRecord, override_label

from ..config import EXPERIMENT

SIDES = ("first", "second")
_METHOD = ("method", "adapter", "training", "model")  # groups of the configuration that the runs of a method share
# Settings of drawing that say which images are drawn, not what is in them.
_NOT_COMPARED = ("images_per_prompt", "prompts")
_NAMED = 3  # so many missing images of a kind are named, the others counted

Key = tuple[int, int]  # index of the prompt, index of the image


@dataclass(frozen=True)
class SubjectRun:
    """A run and its images.

    Attributes:
        label: its overrides as its folder names them, without the subject; ``default`` for none.
        data_dir: the prepared data that it was trained on.
        settings: the groups of its configuration that make the method.
        drawing: the settings that its images were drawn with.
    """

    record: RunRecord
    method: str
    label: str
    data_dir: Path
    settings: Mapping[str, Any]
    drawing: Mapping[str, Any]
    images: Mapping[Key, DrawnImage]

    @property
    def name(self) -> str:
        """``moslora``, or with its overrides ``moslora (method.mixer_init=orthogonal)``."""
        return self.method if self.label == "default" else f"{self.method} ({self.label})"

    @property
    def path(self) -> Path:
        return self.record.path


Arm = dict[str, SubjectRun]  # subject -> its run, all of one method


def find_arms(
    first: Sequence[str],
    second: Sequence[str],
    runs_dir: Path,
    scale: str,
    subjects: Sequence[str] = (),
    seed: int = 0,
) -> tuple[Arm, Arm]:
    """The runs of two methods, one of each a subject.

    Args:
        first: a method as it was trained, ``("method=moslora", "method.mixer_init=orthogonal")``, or the folders of
            its runs, one a subject.
        second: the other method.
        subjects: their names; none stands for those of the folders.
        seed: of the runs, where they are not given as folders.

    Raises:
        UserError: runs or images that are missing, by subject and side; runs that are not comparable.
    """
    folders = [_folders(side, given, runs_dir, scale, subjects, seed) for side, given in _by_side(first, second)]
    names = list(dict.fromkeys([*subjects, *folders[0], *folders[1]]))
    _refuse([fault for name in names for fault in _absent(name, folders)])
    arms = [{name: _read_run(found[name], name, scale) for name in names} for found in folders]
    _refuse([fault for name in names for fault in _unpaired(name, arms[0][name], arms[1][name])])
    for side, arm in _by_side(*arms):
        _check_arm(side, list(arm.values()))
    one, other = (next(iter(arm.values())).name for arm in arms)
    if one == other:
        raise UserError(f"--first and --second are both {one}; expected two methods")
    for name in names:
        _check_pair(name, arms[0][name], arms[1][name])
    return arms[0], arms[1]


def _by_side(first: Any, second: Any) -> Iterator[tuple[str, Any]]:
    return zip(SIDES, (first, second), strict=True)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UserError(f"incomplete pair of runs: {'; '.join(faults)}")


# ------------------------------------------------------------------------------------------------------------- finding


def _folders(
    side: str, given: Sequence[str], runs_dir: Path, scale: str, subjects: Sequence[str], seed: int
) -> dict[str, Path]:
    """Subject -> folder of its run, which need not exist where a method names it."""
    if not given[0].startswith("method="):
        folders: dict[str, Path] = {}
        for folder in map(Path, given):
            if not (folder / "config.yaml").is_file():
                raise UserError(f"--{side} {folder}: no run there; expected method=<name>, or folders of runs")
            name = OmegaConf.select(_config(folder), "data.subject")
            if not isinstance(name, str):
                raise UserError(f"{folder}/config.yaml: data.subject must name a subject, found {name!r}")
            if name in folders:
                raise UserError(f"--{side}: {folders[name]} and {folder} are both of {name}; expected one a subject")
            folders[name] = folder
        return {name: folder for name, folder in folders.items() if not subjects or name in subjects}
    if not subjects:
        raise UserError(f"--{side} {given[0]}: which subjects? name them with --subjects, or give folders of runs")
    method, overrides = given[0].removeprefix("method="), given[1:]
    labels = {name: override_label([*overrides, f"data.subject={name}"]) for name in subjects}
    return {
        name: RunRecord.locate(runs_dir, EXPERIMENT, scale, method, label, seed).path for name, label in labels.items()
    }


def _absent(name: str, folders: Sequence[Mapping[str, Path]]) -> Iterator[str]:
    """What either run of a subject lacks of one that has drawn all its images."""
    for side, found in _by_side(*folders):
        if name not in found:
            yield f"{name}: no run of it in --{side}"
        elif not (found[name] / "config.yaml").is_file():
            yield f"{name}, --{side}: no run at {found[name]}"
        elif drawing_settings(RunRecord(found[name])) is None:
            yield f"{name}, --{side}: images of {found[name]} are not all drawn, by its {FACTS}; run generate"


def _config(folder: Path) -> DictConfig:
    path = folder / "config.yaml"
    config = launch.load_config(path)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return config


def _read_run(folder: Path, name: str, scale: str) -> SubjectRun:
    record, config = RunRecord(folder), _config(folder)
    found = {key: OmegaConf.select(config, key) for key in ("scale.name", "method.name", "data.subject", "data.dir")}
    if absent := [key for key, value in found.items() if not isinstance(value, str)]:
        raise UserError(f"{record.config_path}: {absent[0]} must be text, found {found[absent[0]]!r}")
    for key, expected in (("data.subject", name), ("scale.name", scale)):
        if found[key] != expected:
            raise UserError(f"{folder}: a run of {key}={found[key]}; expected {expected}")
    groups, drawing = OmegaConf.to_container(config), drawing_settings(record) or {}
    return SubjectRun(
        record=record,
        method=found["method.name"],
        label=_label(folder.parent.name, name),
        data_dir=Path(found["data.dir"]),
        settings={group: groups.get(group) for group in _METHOD},
        drawing={key: value for key, value in drawing.items() if key not in _NOT_COMPARED},
        images={image.key: image for image in read_drawn(record)},
    )


def _label(label: str, name: str) -> str:
    """A run's overrides without its subject; a label that was cut short is left as it is."""
    left = [override for override in label.split(",") if override != f"data.subject={name}"]
    return ",".join(left) or "default"


# ----------------------------------------------------------------------------------------------------------- comparing


def _unpaired(name: str, first: SubjectRun, second: SubjectRun) -> Iterator[str]:
    """Images that one run of a subject has and the other lacks, or that are not there as files."""
    for side, run, other in zip(SIDES, (first, second), (second, first), strict=True):
        if not run.images:
            yield f"{name}, --{side}: {run.path} has no images"
        elif absent := sorted(other.images.keys() - run.images.keys()):
            yield f"{name}, --{side}: {run.path} lacks {_some(absent)}, which {other.path} has"
        if gone := [key for key, image in run.images.items() if not is_file(run.path / image.file)]:
            yield f"{name}, --{side}: {run.path} lacks the file of {_some(gone)}"


def _some(keys: Sequence[Key]) -> str:
    named = ", ".join(f"prompt {prompt} image {index}" for prompt, index in keys[:_NAMED])
    return named + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")


def _check_arm(side: str, runs: Sequence[SubjectRun]) -> None:
    one, *others = runs
    for other in others:
        if differing := [group for group in _METHOD if one.settings[group] != other.settings[group]]:
            raise UserError(
                f"--{side}: {one.path} and {other.path} differ in their settings of {' and '.join(differing)}; "
                "expected one method for all subjects"
            )


def _check_pair(name: str, first: SubjectRun, second: SubjectRun) -> None:
    """Refuses runs whose images cannot be compared: drawn in another way, or from another prompt or other noise."""

    def same(what: str, one: object, other: object) -> None:
        if one != other:
            raise UserError(
                f"{name}{what} is {one!r} in {first.path} and {other!r} in {second.path}; expected the same"
            )

    for key in sorted(first.drawing.keys() | second.drawing.keys()):
        same(f": drawn with {key}, which", first.drawing.get(key), second.drawing.get(key))
    for key, image in first.images.items():
        for what in ("prompt", "class_prompt", "noise_seed"):
            same(f", {_some([key])}: {what}", getattr(image, what), getattr(second.images[key], what))
