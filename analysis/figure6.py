"""Figure 6 of the paper: samples of a subject, prompt by prompt, as LoRA and MoSLoRA draw them from the same noise.

A contact sheet per scale and subject: a row a prompt, the real images in the first column. The images are those of the
run records; what is missing is named with the command that makes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from moslora_core.drawn_images import DrawnImage, read_drawn, references, verified
from moslora_core.errors import UserError
from moslora_core.record import RunRecord, override_label

from .contact_sheet import SheetRow, draw, shrink
from .figure5 import Figure
from .load import LeftOut, Run
from .paper import PaperNumbers
from .paper_block import paper_block
from .subject_driven import SUBJECT, Arm, any_subject, arms_of
from .tables import MISSING, Grid, bullets, csv_text, heading, markdown_table
from .task_table import commits_fact

if TYPE_CHECKING:
    from PIL import Image

PAPER = "figure6"
EXPERIMENT = "subject_driven_t2i"
TITLES = {"lora": "LoRA", "moslora": "MoSLoRA"}  # the paper's two
REFERENCE = "Real image"
MOST_COLUMNS = 4  # beside the real images
MOST_ROWS = 6
CSV_FIELDS = (
    *("scale", "subject", "row", "prompt_index", "prompt", "column", "method", "label", "seed", "noise_seed"),
    *("file", "sha256", "missing"),
)


@dataclass(frozen=True)
class _Column:
    """A method with one set of overrides, and its run of the sheet's subject; None where there is none."""

    method: str
    label: str
    run: Run | None
    root: Path

    @property
    def title(self) -> str:
        """``MoSLoRA (orthogonal)``."""
        parts = [] if self.label == "default" else [part.removeprefix("method.") for part in self.label.split(",")]
        notes = ", ".join(part.removeprefix("mixer_init=") for part in parts)
        return TITLES[self.method] + (f" ({notes})" if notes else "")

    @property
    def record(self) -> RunRecord:
        assert self.run is not None
        return RunRecord(self.root / self.run.path)

    @cached_property
    def drawn(self) -> dict[tuple[int, int], DrawnImage] | str:
        """(prompt, number) -> image; or why there are none."""
        if self.run is None:
            return "no run"
        try:
            found = read_drawn(self.record)
        except UserError as error:
            return " ".join(str(error).replace(f"{self.record.path}/", "").split())
        return {image.key: image for image in found} if found else "its images are not there"

    @property
    def images(self) -> dict[tuple[int, int], DrawnImage]:
        return self.drawn if isinstance(self.drawn, dict) else {}


@dataclass(frozen=True)
class _Cell:
    """An image of the sheet, or why it is missing."""

    file: str
    image: Image.Image | None = None
    sha256: str = ""
    noise_seed: int | None = None
    missing: str = ""


@dataclass(frozen=True)
class _Row:
    """A prompt: the real image, then one of every column."""

    prompt_index: int
    prompt: str
    cells: Sequence[_Cell]

    @property
    def noise_seeds(self) -> set[int]:
        return {cell.noise_seed for cell in self.cells if cell.noise_seed is not None}


@dataclass(frozen=True)
class _Sheet:
    """Everything about one subject at one scale."""

    scale: str
    subject: str
    columns: Sequence[_Column]
    rows: Sequence[_Row]
    prompts: int  # that there are


def build(
    runs_dir: Path,
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    numbers: PaperNumbers,
    prompts: Sequence[int] | None = None,
) -> list[Figure]:
    """A figure per scale and subject, in a stable order.

    Args:
        runs_dir: where the images of the runs are.
        left_out: not used; the table names the runs that are left out.
        prompts: indices of the prompts to show; a few of all, evenly spaced, by default.
    """
    by_scale: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_scale[run.scale].append(run)
    figures = []
    for scale, group in sorted(by_scale.items()):
        arms, _ = arms_of(group, any_subject)
        shown, others = _chosen(arms)
        for subject in sorted({subject for arm in shown for subject in arm.subjects}):
            columns = _columns(shown, subject, runs_dir)
            used = [column.run for column in columns if column.run is not None]
            figures.append(_figure(_sheet(scale, subject, columns, prompts), used, others, numbers))
    return figures


# ------------------------------------------------------------------------------------------------------ what is shown


def _chosen(arms: Iterable[Arm]) -> tuple[list[Arm], list[Arm]]:
    """The arms of the columns, and the trained ones that there is no room for.

    LoRA and MoSLoRA as the paper compares them: apart from the mixer, with the same settings.
    """
    trained = [arm for arm in arms if not arm.is_reference]
    plain = [arm for arm in trained if arm.method in TITLES and _is_plain(arm.label)]
    shown = plain[:MOST_COLUMNS]
    absent = [method for method in TITLES if not any(arm.method == method for arm in shown)]
    shown += [Arm(method, "default", {}) for method in absent] if shown else []
    shown.sort(key=lambda arm: list(TITLES).index(arm.method))
    return shown, [arm for arm in trained if arm not in shown]


def _is_plain(label: str) -> bool:
    return label == "default" or all(part.startswith("method.") for part in label.split(","))


def _columns(arms: Sequence[Arm], subject: str, root: Path) -> list[_Column]:
    """The runs of a subject, of the first seed that all arms have of it, else of the first of each."""
    seeds = [{seed for seed, of in arm.runs if of == subject} for arm in arms]
    common = set.intersection(*(of for of in seeds if of))
    return [
        _Column(arm.method, arm.label, arm.runs[min(common or of), subject] if of else None, root)
        for arm, of in zip(arms, seeds, strict=True)
    ]


def _sheet(scale: str, subject: str, columns: Sequence[_Column], prompts: Sequence[int] | None) -> _Sheet:
    known = sorted({prompt for column in columns for prompt, _ in column.images})
    shown = _spread(known, MOST_ROWS) if prompts is None else list(prompts)
    real = _reals(columns)
    rows = []
    for number, prompt in enumerate(shown):
        drawn = [column.images.get((prompt, 0)) for column in columns]
        text = next((image.prompt for image in drawn if image is not None), f"prompt {prompt}")
        cells = [_drawn_cell(column, image, prompt) for column, image in zip(columns, drawn, strict=True)]
        rows.append(_Row(prompt, text, [_real_cell(real, number, columns), *cells]))
    return _Sheet(scale, subject, columns, rows, len(known))


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, evenly spaced, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(number * (len(values) - 1) / (most - 1))] for number in range(most)]


def _reals(columns: Iterable[_Column]) -> list[Path]:
    """Copies of the subject's real images in the first record that has them."""
    records = (column.record for column in columns if column.run is not None)
    return next((found for record in records if (found := references(record))), [])


def _real_cell(real: Sequence[Path], number: int, columns: Sequence[_Column]) -> _Cell:
    if not real:
        return _Cell("", missing="no copies of the real images in the records")
    path = real[number % len(real)]
    file = path.relative_to(columns[0].root).as_posix()
    return _read(path, file)


def _drawn_cell(column: _Column, image: DrawnImage | None, prompt: int) -> _Cell:
    if image is None:
        return _Cell("", missing=column.drawn if isinstance(column.drawn, str) else f"prompt {prompt} was not drawn")
    file = f"{column.run.path}/{image.file}" if column.run is not None else image.file
    try:
        path = verified(column.record, image)
    except UserError as error:
        reason = " ".join(str(error).replace(f"{column.record.path}/", "").split())
        return _Cell(file, sha256=image.sha256, missing=reason)
    return _read(path, file, image.sha256, image.noise_seed)


def _read(path: Path, file: str, sha256: str = "", noise_seed: int | None = None) -> _Cell:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return _Cell(file, shrink(image), sha256, noise_seed)
    except (OSError, UnidentifiedImageError, SyntaxError):
        return _Cell(file, sha256=sha256, missing=f"{path.name} is no image")


# ---------------------------------------------------------------------------------------------------------- the figure


def _figure(sheet: _Sheet, runs: Sequence[Run], others: Sequence[Arm], numbers: PaperNumbers) -> Figure:
    title = f"Figure 6, samples: scale {sheet.scale}, subject {sheet.subject}"
    names = [REFERENCE, *(column.title for column in sheet.columns)]
    drawable = any(cell.image is not None for row in sheet.rows for cell in row.cells[1:])
    rows = [SheetRow(row.prompt, [cell.image for cell in row.cells]) for row in sheet.rows]
    facts = [*(_caption(sheet) if drawable else ["Not drawn: no image is there."]), *_missing(sheet)]
    if others:
        facts.append(f"Not shown: {', '.join(arm.name for arm in others)}.")
    return Figure(
        folder=f"{sheet.scale}/samples",
        name=f"figure6-{override_label([sheet.subject])}",
        title=title,
        markdown=_markdown(title, [*facts, commits_fact(runs)], sheet, names, numbers),
        csv=csv_text(CSV_FIELDS, _csv_lines(sheet, names)),
        pictures=draw(names, rows) if drawable else {},
    )


def _caption(sheet: _Sheet) -> list[str]:
    seeds = {column.title: column.run.seed for column in sheet.columns if column.run is not None}
    one_seed = len(set(seeds.values())) == 1
    named = (
        f"Runs of seed {min(seeds.values())}."
        if one_seed
        else f"Warning: runs of different seeds: {', '.join(f'{name} {seed}' for name, seed in seeds.items())}."
    )
    differing = [row.prompt_index for row in sheet.rows if len(row.noise_seeds) > 1]
    noise = (
        "The images of a row start from the same noise."
        if not differing
        else f"Warning: the images of prompts {', '.join(map(str, differing))} start from different noise; draw them "
        "with the same generation.seed."
    )
    return [
        f"{len(sheet.rows)} of {sheet.prompts} prompts, the first image of each. {noise} {named} The real images are "
        "what the training saw, in no relation to the prompts; all are cut to squares."
    ]


def _missing(sheet: _Sheet) -> list[str]:
    """What is missing, and the command that makes it."""
    lines = []
    for number, column in enumerate(sheet.columns, start=1):
        if column.run is None:
            commands = [_command(stage, sheet, column) for stage in ("train", "generate", "evaluate")]
            lines.append(f"Missing: {column.title} of {sheet.subject}. To make it: {' && '.join(commands)}")
        elif isinstance(column.drawn, str):
            lines.append(
                f"Missing, {column.run.path}: {column.drawn}. To make it: {_command('generate', sheet, column)}"
            )
        elif reasons := [cell.missing for row in sheet.rows if (cell := row.cells[number]).missing]:
            more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
            command = f"{_command('generate', sheet, column)} on_finished=overwrite"
            lines.append(f"Missing, {column.run.path}: {reasons[0]}{more}. To make it: {command}")
    if any(row.cells[0].missing for row in sheet.rows):
        column = next(column for column in sheet.columns if column.run is not None)
        command = f"{_command('evaluate', sheet, column)} on_finished=overwrite"
        lines.append(f"Missing: the real images of {sheet.subject}. To copy them into the record: {command}")
    return lines


def _command(stage: str, sheet: _Sheet, column: _Column) -> str:
    """The command line of one stage of a column's run, as a reader would type it."""
    seeds = [other.run.seed for other in sheet.columns if other.run is not None]
    seed = column.run.seed if column.run is not None else min(seeds, default=0)
    given = [] if column.label == "default" else column.label.split(",")
    words = [f"scale={sheet.scale}", f"method={column.method}", *given, f"{SUBJECT}={sheet.subject}", f"seed={seed}"]
    return f"python -m {EXPERIMENT}.{stage} {' '.join(words)}"


def _csv_lines(sheet: _Sheet, names: Sequence[str]) -> list[dict[str, object]]:
    """A line for every place of the sheet."""
    lines = []
    for number, row in enumerate(sheet.rows):
        for name, column, cell in zip(names, [None, *sheet.columns], row.cells, strict=True):
            line: dict[str, object] = {"scale": sheet.scale, "subject": sheet.subject, "row": number, "column": name}
            line |= {"prompt_index": row.prompt_index, "prompt": row.prompt, "file": cell.file}
            line |= {"sha256": cell.sha256, "missing": cell.missing}
            if column is not None:
                line |= {"method": column.method, "label": column.label}
                line |= {} if column.run is None else {"seed": column.run.seed}
            lines.append(line | ({} if cell.noise_seed is None else {"noise_seed": cell.noise_seed}))
    return lines


def _markdown(title: str, facts: Sequence[str], sheet: _Sheet, names: Sequence[str], numbers: PaperNumbers) -> str:
    cells = [[row.prompt, str(row.prompt_index), *(_mark(cell) for cell in row.cells)] for row in sheet.rows]
    paper = paper_block(numbers.tables[PAPER], numbers.sources)
    parts = [heading(2, title), bullets(facts)]
    parts += [markdown_table(Grid(["Prompt", "Number", *names], cells))] if cells else []
    return "\n".join(part for part in [*parts, heading(3, paper.title), bullets(paper.notes)] if part)


def _mark(cell: _Cell) -> str:
    return MISSING if cell.image is None else Path(cell.file).name
