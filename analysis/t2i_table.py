"""Subject-driven generation in numbers: how far images show the subject and follow the prompt, by method.

Numbers are averaged over the images of a prompt, the prompts, the subjects, then the seeds. What the subjects' real
images score themselves stands in a row of its own: what a method would reach that draws them. Below, every method
against LoRA on the same subjects and seeds. The paper has no such numbers, and says so in its block.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from moslora_core.record import Training, bounds

from .aggregate import Summary
from .load import LeftOut, Run
from .paper import PaperNumbers
from .paper_block import paper_block
from .statistics import RESAMPLES, Estimate, Interval, estimate
from .subject_driven import REAL, Arm, Average, arms_of, average, differences, subject_of
from .tables import FEWER_TASKS, MISSING, ONE_SEED, Block, Grid, Page, mean_sd, significant
from .task_table import (
    CSV_FIELDS,
    GIB,
    MEMORY_KINDS,
    Columns,
    Document,
    by_scale_and_protocol,
    commits_fact,
    distinct,
    document,
    either,
    run_notes,
    with_tasks,
)

PAPER = "automatic_metrics"
LORA = "lora"
TITLES = {
    "subject_shape": "Shape",
    "subject_colour": "Colour",
    "subject_core": "Core",
    "background": "Background",
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
}
NAME_OF_REAL = "real images"
DIFFERENT = 1e-6  # scores of the same real images by the same models agree to this
_AT = CSV_FIELDS.index("column")
FIELDS = (*CSV_FIELDS[:_AT], "subject", *CSV_FIELDS[_AT:], "subjects")


@dataclass(frozen=True)
class _Unit:
    """How the values of a metric are written: shares in percent, similarities as they are."""

    name: str
    factor: float
    decimals: int

    def difference(self, value: float) -> str:
        text = f"{self.factor * value:+.{self.decimals}f}"
        return text if float(text) else text[1:]

    def interval(self, found: Interval | None) -> str:
        return MISSING if found is None else " to ".join(f"{self.factor * end:.{self.decimals}f}" for end in found)

    def signed(self, found: Interval | None) -> str:
        return MISSING if found is None else " to ".join(map(self.difference, found))


@dataclass(frozen=True)
class _Row:
    """An arm's averages, by task; ``arm`` is None for the real images."""

    name: str
    arm: Arm | None
    tasks: Mapping[str, Average | None]

    @property
    def seeds(self) -> int:
        """Over how many seeds the row is; 0 where nothing was averaged."""
        return max((len(found.by_seed) for found in self.tasks.values() if found is not None), default=0)

    @property
    def subjects(self) -> int:
        return max((len(found.by_subject) for found in self.tasks.values() if found is not None), default=0)


@dataclass(frozen=True)
class _Difference:
    """One task of an arm minus LoRA's, over the seeds and subjects that both have."""

    first: Average
    second: Average
    average: Average

    @property
    def over_seeds(self) -> Estimate:
        return estimate(list(self.average.by_seed.values()))


@dataclass(frozen=True)
class _Comparison:
    """An arm against LoRA, by task."""

    first: Arm
    second: Arm
    tasks: Mapping[str, _Difference]


@dataclass(frozen=True)
class _Layout:
    """What the table is about."""

    subjects: tuple[str, ...]
    tasks: tuple[str, ...]
    units: Mapping[str, _Unit]

    def title(self, task: str) -> str:
        return TITLES.get(task, task.replace("_", " ").capitalize())


def build(runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers) -> list[Document]:
    """A document per scale and evaluation protocol, in a stable order."""
    return [
        _document(scale, protocol, group, left_out, numbers) for scale, protocol, group in by_scale_and_protocol(runs)
    ]


def _document(
    scale: str, protocol: str, runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers
) -> Document:
    tasks = _tasks(runs, protocol)
    runs, left_out = with_tasks(runs, left_out, scale, protocol, tasks)
    arms, unusable = arms_of(runs, lambda run: subject_of(run, protocol))
    left_out = sorted([*left_out, *unusable], key=lambda entry: entry.path)
    runs = [run for run in runs if run.path not in {entry.path for entry in unusable}]
    layout = _Layout(
        subjects=tuple(sorted({subject for arm in arms for subject in arm.subjects})),
        tasks=tasks,
        units=_units(runs, protocol, tasks),
    )
    rows = [_row(arm, protocol, layout) for arm in arms]
    real, disagreeing = _real(runs, protocol, layout)
    shown = [*rows, *([real] if any(real.tasks.values()) else [])]
    compared = [_Comparison(*pair, _differences(*pair, protocol, layout)) for pair in _pairs(arms)]
    compared = [comparison for comparison in compared if comparison.tasks]
    paper = numbers.tables[PAPER]
    page = Page(
        label=f"tab:subjects-{scale}-{protocol}",
        measured=Block(
            title=f"Subject-driven generation: scale {scale}, evaluation protocol {protocol}",
            grid=_grid(shown, layout, _memory(arms)),
            facts=_facts(runs, rows, protocol, layout, _memory(arms)),
            notes=[*_notes(rows, layout), *disagreeing, *_run_notes(runs, protocol, layout)],
        ),
        further=[_against_lora(compared, layout)] if compared else [],
        left_out=[f"{entry.path}: {entry.reason}" for entry in left_out],
        paper=paper_block(paper, numbers.sources),
    )
    lines = [line for row in shown for line in _csv_lines(row, layout)]
    lines += [line for comparison in compared for line in _difference_lines(comparison, layout)]
    return document("metrics", scale, protocol, page, paper, lines, FIELDS)


# ------------------------------------------------------------------------------------------------------ the numbers


def _tasks(runs: Iterable[Run], protocol: str) -> tuple[str, ...]:
    found = {task for run in runs for task in run.evaluations[protocol].tasks}
    known = list(TITLES)
    return tuple(sorted(found, key=lambda task: (known.index(task) if task in TITLES else len(known), task)))


def _units(runs: Sequence[Run], protocol: str, tasks: Sequence[str]) -> dict[str, _Unit]:
    units = {}
    for task, metrics in distinct(runs, protocol, tasks, lambda result: result.metric).items():
        similar = any(bounds(metric)[0] < 0 for metric in metrics)
        units[task] = _Unit("cosine", 1, 3) if similar else _Unit("percent", 100, 1)
    return units


def _value(run: Run, protocol: str, task: str) -> float | None:
    result = run.evaluations[protocol].tasks.get(task)
    return None if result is None else result.value


def _row(arm: Arm, protocol: str, layout: _Layout) -> _Row:
    tasks = {
        task: average(arm.values(lambda run, task=task: _value(run, protocol, task)), layout.subjects)
        for task in layout.tasks
    }
    return _Row(arm.name, arm, tasks)


def _real(runs: Iterable[Run], protocol: str, layout: _Layout) -> tuple[_Row, list[str]]:
    """The row of the real images, which every run of a subject should have scored alike, and where they did not."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        subject = subject_of(run, protocol)
        for task in layout.tasks:
            result = run.evaluations[protocol].tasks.get(task)
            if subject is not None and result is not None and REAL in (result.breakdown or {}):
                found[task][subject].append(result.breakdown[REAL].value)
    notes = [
        f"Warning: the real images of {subject} have different scores in {layout.title(task)}, from {min(values):.3f} "
        f"to {max(values):.3f}: not all runs were compared with the same images."
        for task, by_subject in found.items()
        for subject, values in by_subject.items()
        if max(values) - min(values) > DIFFERENT
    ]
    tasks = {
        task: average({(0, subject): statistics.fmean(of) for subject, of in found[task].items()}, layout.subjects)
        for task in layout.tasks
    }
    return _Row(NAME_OF_REAL, None, tasks), notes


def _pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    """Every trained arm with LoRA of the same settings, those of the method itself aside; else with LoRA as it is."""
    members = {(arm.method, arm.label): arm for arm in arms if not arm.is_reference}
    pairs = []
    for arm in members.values():
        parts = [] if "~" in arm.label else [part for part in arm.label.split(",") if not part.startswith("method.")]
        plain = ",".join(parts) or "default"
        candidates = [members.get((LORA, of)) for of in (plain, "default")]
        reference = next((found for found in candidates if found is not None and found is not arm), None)
        if reference is not None:
            pairs.append((arm, reference))
    return pairs


def _differences(first: Arm, second: Arm, protocol: str, layout: _Layout) -> dict[str, _Difference]:
    found = {}
    for task in layout.tasks:
        one, other = (arm.values(lambda run, task=task: _value(run, protocol, task)) for arm in (first, second))
        paired = differences(one, other)
        averages = [
            average({key: values[key] for key in paired}, sorted({subject for _, subject in paired}))
            for values in (one, other, paired)
        ]
        if None not in averages:
            found[task] = _Difference(*averages)
    return found


# ------------------------------------------------------------------------------------------------------------ tables


def _memory(arms: Iterable[Arm]) -> tuple[str, ...]:
    """Kinds of memory that the trainings measured."""
    trainings = [run.training for arm in arms for run in arm.runs.values() if run.training is not None]
    return tuple(sorted({training.peak_memory_kind for training in trainings}))


def _grid(rows: Sequence[_Row], layout: _Layout, memory: Sequence[str]) -> Grid:
    headers = [
        *("Method", "n", "Subjects", "Params (M)", "Train (s)"),
        *(f"Peak GiB ({kind})" for kind in memory),
        *(f"{layout.title(task)}{' (%)' * (layout.units[task].name == 'percent')}" for task in layout.tasks),
    ]
    return Grid(headers, [_cells(row, layout, memory) for row in rows])


def _cells(row: _Row, layout: _Layout, memory: Sequence[str]) -> list[str]:
    n = f"{row.seeds}{ONE_SEED if row.seeds == 1 else ''}"
    fewer = FEWER_TASKS if _fewer(row, layout) else ""
    return [
        *(row.name, MISSING if row.arm is None else n, f"{row.subjects}{fewer}"),
        *_cost_cells(row.arm, layout, memory),
        *(_cell(row.tasks[task], layout.units[task]) for task in layout.tasks),
    ]


def _fewer(row: _Row, layout: _Layout) -> bool:
    return row.subjects < len(layout.subjects)


def _cell(found: Average | None, unit: _Unit) -> str:
    """``0.712 ± 0.004 (0.655 to 0.771)``: mean and deviation over the seeds, interval over the subjects."""
    if found is None:
        return MISSING
    mean = mean_sd(found.summary, unit.decimals, unit.factor)
    return mean if found.interval is None else f"{mean} ({unit.interval(found.interval)})"


def _cost_cells(arm: Arm | None, layout: _Layout, memory: Sequence[str]) -> list[str]:
    """Parameters, seconds of a training and its peaks of memory, which are averaged as the metrics are."""
    costs = _costs(arm, layout, memory)
    seconds = costs.pop("seconds")
    decimals = 0 if seconds is not None and seconds.mean >= 1000 else 1
    peaks = [mean_sd(costs[f"memory_{kind}"], 2, 1 / GIB) for kind in memory]
    return [_parameters_cell(arm), mean_sd(seconds, decimals), *peaks]


def _parameters(arm: Arm | None) -> list[int]:
    trainings = [] if arm is None else [run.training for run in arm.runs.values() if run.training is not None]
    return sorted({training.trainable_parameters for training in trainings})


def _parameters_cell(arm: Arm | None) -> str:
    return " or ".join(significant(count / 1e6) for count in _parameters(arm)) or MISSING


def _costs(arm: Arm | None, layout: _Layout, memory: Sequence[str]) -> dict[str, Summary | None]:
    def cost(of: Callable[[Training], float | None]) -> Summary | None:
        if arm is None:
            return None
        found = average(arm.values(lambda run: None if run.training is None else of(run.training)), layout.subjects)
        return None if found is None else found.summary

    peaks = {
        f"memory_{kind}": cost(lambda t, kind=kind: t.peak_memory_bytes if t.peak_memory_kind == kind else None)
        for kind in memory
    }
    return {"seconds": cost(lambda training: training.seconds), **peaks}


def _against_lora(compared: Sequence[_Comparison], layout: _Layout) -> Block:
    headers = [
        *("First - second", "Metric", "n", "Subjects", "First", "Second", "Difference"),
        *("95% over seeds", "95% over subjects", "Subjects ahead"),
    ]
    rows, begins = [], []
    for comparison in compared:
        begins += [len(rows)] if rows else []
        for task, difference in comparison.tasks.items():
            unit, of = layout.units[task], difference.average
            sides = [
                mean_sd(Summary(side.summary.mean, None, 1), unit.decimals, unit.factor)
                for side in (difference.first, difference.second)
            ]
            rows.append(
                [
                    *(f"{comparison.first.name} - {comparison.second.name}", layout.title(task)),
                    f"{len(of.by_seed)}{ONE_SEED if len(of.by_seed) == 1 else ''}",
                    *(str(len(of.by_subject)), *sides, unit.difference(of.summary.mean)),
                    *(unit.signed(difference.over_seeds.interval), unit.signed(of.interval)),
                    f"{sum(value > 0 for value in of.by_subject.values())} of {len(of.by_subject)}",
                ]
            )
    return Block(
        title="Against LoRA, on the same subjects, prompts, noise and seeds",
        grid=Grid(headers, rows, left=2, groups=begins),
        facts=[
            "Differences of accuracies are in points. 95% over seeds: t interval of the seeds' differences, for "
            f"another training. 95% over subjects: bootstrap of {RESAMPLES} resamples of the subjects, for other "
            "subjects; a handful of them makes it too narrow. Subjects ahead: where the first is better on average."
        ],
        notes=_one_seed(len(found.average.by_seed) for of in compared for found in of.tasks.values()),
    )


# -------------------------------------------------------------------------------------------------- what they stand on


def _facts(
    runs: Sequence[Run], rows: Sequence[_Row], protocol: str, layout: _Layout, memory: Sequence[str]
) -> list[str]:
    count = distinct(runs, protocol, layout.tasks, lambda result: result.n)
    images = sorted({n for found in count.values() for n in found})
    kinds = [MEMORY_KINDS.get(kind, kind) for kind in memory]
    return [
        _metrics_fact(runs, protocol, layout),
        f"Subjects: {', '.join(layout.subjects) or 'none'}; images of each: {either(images)}.",
        f"Seeds per row (n): {either(sorted({row.seeds for row in rows}))}. Averaged over the images of a prompt, the "
        "prompts, the subjects, then the seeds. Cells are the mean ± the sample standard deviation over the seeds, in "
        f"brackets the 95% interval over the subjects (bootstrap, {RESAMPLES} resamples; too narrow for a handful).",
        *_models_fact(runs, protocol),
        f"Peak memory: {', '.join(kinds) or 'not measured'}. Seconds and memory are of one training.",
        commits_fact(runs),
    ]


def _metrics_fact(runs: Sequence[Run], protocol: str, layout: _Layout) -> str:
    titles: dict[str, list[str]] = defaultdict(list)
    for task, metrics in distinct(runs, protocol, layout.tasks, lambda result: result.metric).items():
        titles[either(metrics)].append(layout.title(task))
    named = "; ".join(f"{', '.join(of)}: {metric}" for metric, of in titles.items())
    return f"Metrics: {named or 'none'}."


def _models_fact(runs: Sequence[Run], protocol: str) -> list[str]:
    settings = [run.evaluations[protocol].settings for run in runs]
    lines = []
    for key, title in (("dino", "DINO"), ("clip", "CLIP")):
        if found := sorted({str(entry[key][0]) for entry in settings if isinstance(entry.get(key), list)}):
            lines.append(f"{title}: {either(found)}")
    return [f"Models: {'; '.join(lines)}."] if lines else []


def _one_seed(counts: Iterable[int]) -> list[str]:
    return [f"{ONE_SEED} one seed, so no standard deviation and no interval over seeds."] if 1 in [*counts] else []


def _notes(rows: Sequence[_Row], layout: _Layout) -> list[str]:
    notes = _one_seed(row.seeds for row in rows)
    for row in rows:
        if _fewer(row, layout):
            absent = sorted(
                set(layout.subjects) - {s for found in row.tasks.values() if found for s in found.by_subject}
            )
            notes.append(
                f"{FEWER_TASKS} {row.name}: over {row.subjects} of {len(layout.subjects)} subjects (without "
                f"{', '.join(absent)}) and not comparable with an average over all {len(layout.subjects)}."
            )
        elif row.arm is not None and row.seeds < len(row.arm.seeds):
            notes.append(f"{row.name}: over the {row.seeds} of {len(row.arm.seeds)} seeds that have all subjects.")
        if len(_parameters(row.arm)) > 1:
            notes.append(f"Warning: {row.name}: the runs differ in their trainable parameters.")
    return notes


def _run_notes(runs: Sequence[Run], protocol: str, layout: _Layout) -> list[str]:
    """What makes the runs less comparable; that they are of different subjects is no warning."""
    titles = {task: layout.title(task) for task in layout.tasks}
    return run_notes(
        [_without_subject(run, protocol) for run in runs], protocol, Columns(layout.tasks, layout.tasks, titles, ())
    )


def _without_subject(run: Run, protocol: str) -> Run:
    evaluation = run.evaluations[protocol]
    settings = {key: value for key, value in evaluation.settings.items() if key not in ("subject", "batch_size")}
    drawing = settings.get("drawing")
    if isinstance(drawing, dict):
        settings |= {f"drawing.{key}": value for key, value in drawing.items() if key != "subject"}
        del settings["drawing"]
    return replace(run, evaluations={**run.evaluations, protocol: replace(evaluation, settings=settings)})


# ----------------------------------------------------------------------------------------------------------- as CSV


def _csv_lines(row: _Row, layout: _Layout) -> list[dict[str, object]]:
    """A line for each number of the row, and one for each subject's part in it."""
    head = {"method": "real_images" if row.arm is None else row.arm.method, "provenance": "MEASURED"}
    head["label"] = "default" if row.arm is None else row.arm.label
    lines = [
        head | {"column": "parameters", "unit": "parameters", "value": count, "n": row.seeds}
        for count in _parameters(row.arm)
    ]
    memory = _memory([row.arm]) if row.arm is not None else ()
    for name, cost in _costs(row.arm, layout, memory).items():
        if cost is not None:
            unit, factor = ("seconds", 1) if name == "seconds" else ("GiB", 1 / GIB)
            lines.append(head | {"column": name, "unit": unit} | _numbers(cost, factor))
    for task in layout.tasks:
        if (found := row.tasks[task]) is not None:
            of = head | {"column": task, "unit": layout.units[task].name}
            lines += _average_lines(of, found, layout.units[task].factor, row.arm is not None)
    return lines


def _average_lines(
    head: Mapping[str, object], found: Average, factor: float, seeded: bool = True
) -> list[dict[str, object]]:
    low, high = (None, None) if found.interval is None else (factor * end for end in found.interval)
    count = {"subjects": len(found.by_subject)} | ({} if low is None else {"low": low, "high": high})
    lines = [dict(head) | _numbers(found.summary, factor, seeded) | count]
    for subject, value in found.by_subject.items():
        n = {"n": len(found.by_seed)} if seeded else {}
        lines.append(dict(head) | {"subject": subject, "value": factor * value, "subjects": 1} | n)
    return lines


def _numbers(found: Summary, factor: float, seeded: bool = True) -> dict[str, object]:
    numbers = {"value": factor * found.mean} | ({"n": found.n} if seeded else {})
    return numbers | ({} if found.sd is None else {"sd": factor * found.sd})


def _difference_lines(comparison: _Comparison, layout: _Layout) -> list[dict[str, object]]:
    """As the lines of rows, with LoRA's name in the column: ``dino - lora``."""
    first, second = comparison.first, comparison.second
    other = second.method if second.label == "default" else f"{second.method} ({second.label})"
    lines = []
    for task, difference in comparison.tasks.items():
        unit = layout.units[task]
        head = {"method": first.method, "label": first.label, "provenance": "MEASURED", "unit": unit.name}
        lines += _average_lines(head | {"column": f"{task} - {other}"}, difference.average, unit.factor)
    return lines
