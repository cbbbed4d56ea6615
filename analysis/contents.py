"""What a report has: the paper's tables and figures with our documents and verdicts, and what else was made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import rates_figure
from .claims import STATEMENTS
from .comparisons import build as compared
from .exhibits import EXHIBITS, MAIN, Exhibit, Given
from .figure5 import Figure
from .load import LeftOut, Run, load_runs
from .paper import PaperNumbers, PaperTable
from .study_plan import Progress, Study
from .study_view import study_runs
from .task_table import Document
from .verdict import Verdict, VerdictPage

SMOKE = "smoke"  # the scale of commands for what nobody has run


@dataclass(frozen=True)
class Part:
    """One document; ``base`` is the path of its files in the report without their suffix."""

    base: str
    document: Document | Figure


@dataclass(frozen=True)
class Found:
    """The runs of one experiment, and those that cannot be used."""

    experiment: str
    runs: Sequence[Run]
    left_out: Sequence[LeftOut]

    @property
    def scales(self) -> list[str]:
        return sorted({run.scale for run in self.runs})

    @property
    def unusable(self) -> list[str]:
        """Scales all of whose runs are left out."""
        return sorted({entry.scale for entry in self.left_out} - set(self.scales))

    def left_out_of(self, scale: str) -> list[LeftOut]:
        return [entry for entry in self.left_out if entry.scale == scale]


@dataclass(frozen=True)
class Section:
    """A table or figure of the paper, with what the runs say about it.

    Attributes:
        parts: empty where the runs are missing.
        verdicts: on the claims that it makes, with the page that each is from.
        commands: scale -> the lines that make its runs.
    """

    exhibit: Exhibit
    paper: PaperTable
    parts: Sequence[Part]
    verdicts: Sequence[tuple[VerdictPage, Verdict]]
    commands: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Contents:
    """``further`` has the comparisons, the pages of verdicts and the figures of the subspaces."""

    numbers: PaperNumbers
    found: Sequence[Found]
    sections: Sequence[Section]
    further: Sequence[Part] = field(default_factory=tuple)

    @property
    def parts(self) -> Iterator[Part]:
        """Every document, in the order of the report."""
        for section in self.sections:
            yield from section.parts
        yield from self.further

    @property
    def verdicts(self) -> list[tuple[VerdictPage, Verdict]]:
        return list(_verdicts(self.further))


def gather(
    runs_dir: Path,
    experiments: Sequence[str],
    numbers: PaperNumbers,
    scale: str | None = None,
    *,
    figures: bool = True,
    normalised: bool = False,
    comparisons: bool = True,
    subspaces: bool = False,
    studies: Sequence[Study] = (),
) -> Contents:
    """Reads the runs and makes every document of the report.

    Args:
        studies: whose runs alone are shown of their experiment and scale, each arm at its learning rate.
        experiments: whose tables and figures are made.
        scale: of the runs, None for all.

    The others are those of :func:`analysis.report.write_report`.
    """
    given, arms = {}, {}  # arms: the same without a study's variants, which would crowd out the methods themselves
    followed = [Progress(study, runs_dir) for study in studies if study.experiment in experiments]
    for experiment in experiments:
        runs, left_out = load_runs(runs_dir, experiment, scale) if runs_dir.is_dir() else ([], [])
        arms[experiment] = runs
        for progress in followed:
            if progress.study.experiment == experiment:
                arms[experiment], _ = study_runs(progress, arms[experiment], left_out, variants=False)
                runs, left_out = study_runs(progress, runs, left_out)
        given[experiment] = Given(runs_dir, runs, left_out, numbers, normalised)
    found = [Found(experiment, of.runs, of.left_out) for experiment, of in given.items()]
    further = []
    for progress in followed if figures else ():
        if scale in (None, progress.study.scale):
            further += _parts(progress.study.experiment, rates_figure.build(progress))
    for experiment, of in given.items():
        if comparisons and experiment in STATEMENTS:
            documents = compared(experiment, runs_dir, of.runs, of.left_out, numbers)
            further += _parts(experiment, documents)
        if subspaces:
            from .subspace_figures import build as inside  # it reads the weights of the adapters

            further += _parts(experiment, inside(experiment, runs_dir, arms[experiment], of.left_out, numbers))
    by_exhibit: dict[str, list[tuple[VerdictPage, Verdict]]] = {}
    for page, verdict in _verdicts(further):
        by_exhibit.setdefault(_exhibit_of(page, verdict), []).append((page, verdict))
    sections = []
    for exhibit in EXHIBITS:
        if exhibit.experiment not in (None, *experiments) or (exhibit.is_figure and not figures):
            continue
        of = given.get(exhibit.experiment) or Given(runs_dir, (), (), numbers)
        scales = [scale] if scale else [*(sorted({run.scale for run in of.runs}) or [SMOKE]), "paper"]
        sections.append(
            Section(
                exhibit,
                numbers.tables[exhibit.id],
                _parts(exhibit.experiment, exhibit.build(of)),
                by_exhibit.get(exhibit.id, []),
                {name: lines for name in dict.fromkeys(scales) if (lines := _commands(exhibit, name, followed))},
            )
        )
    return Contents(numbers, found, sections, further)


def _commands(exhibit: Exhibit, scale: str, followed: Iterable[Progress]) -> list[str]:
    """What makes an exhibit's runs at a scale: the study that is shown of it, or the experiment's own commands."""
    studies = [of.study for of in followed if (of.study.experiment, of.study.scale) == (exhibit.experiment, scale)]
    return [f"python -m analysis.study {study.path.as_posix()}" for study in studies] or exhibit.commands(scale)


def _parts(experiment: str | None, documents: Iterable[Document | Figure]) -> list[Part]:
    return [
        Part("/".join(name for name in (experiment, document.folder, document.name) if name), document)
        for document in documents
    ]


def _verdicts(parts: Iterable[Part]) -> Iterator[tuple[VerdictPage, Verdict]]:
    for part in parts:
        if isinstance(part.document, VerdictPage):
            yield from ((part.document, verdict) for verdict in part.document.verdicts)


def _exhibit_of(page: VerdictPage, verdict: Verdict) -> str:
    """The exhibit that makes a claim; the main table of the experiment for a question that the paper left open."""
    names = {exhibit.name: exhibit.id for exhibit in EXHIBITS}
    return names.get(verdict.statement.source, MAIN[page.experiment])
