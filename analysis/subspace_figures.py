"""Figures of what the mixer does inside: heat maps of M, its course over the training, spectra, shares, angles, and
what the adapter is worth without some of its subspaces.

One group of figures per experiment, scale and setting (base model and its quantisation), from the adapters beside the
run records (:mod:`analysis.subspace`) or the numbers that were read out of them (:mod:`analysis.subspace_files`). A
figure whose numbers are not there says what would make them. Curves of the latter: :mod:`analysis.knock_out_figure`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from moslora_core.methods import KAIMING_SCALE
from moslora_core.record import override_label

from . import knock_out_figure
from .aggregate import Setting, Summary
from .figure5 import Figure, looks_of
from .load import LeftOut, Run
from .paper import PaperNumbers
from .subspace import (
    MOST_RANKS,
    Angles,
    Group,
    Matrix,
    ModuleNumbers,
    Place,
    Trace,
    angle_members,
    by_setting,
    chance_angles,
    drawn_groups,
    groups_of,
    mean_spectrum,
    over_modules,
    over_seeds,
    place_of,
)
from .subspace_files import COMMAND, angles_between, load_traces
from .subspace_plots import (
    Block,
    Chart,
    Curve,
    Dot,
    DotPanel,
    Moment,
    Series,
    Square,
    draw_angles,
    draw_dots,
    draw_lines,
    draw_mixers,
)
from .tables import ONE_SEED, Grid, bullets, csv_text, heading, markdown_table, significant
from .task_table import commits_fact

MOST_LAYERS = 8  # rows of a heat map; more do not fit a page
KEEP = "train with training.keep_steps=<n> to keep the adapter's start and its copies along the training"
# Quantity -> the name on its axis and in tables.
NAMES = {
    "distance": "|M - M₀| / |M₀|",
    "rank": "effective rank of M",
    "condition": "condition number",
    "scale": "|MA| / |A|",
    "mixed_share": "mixed share",
    "update_rank": "effective rank of ΔW",
    "cosine": "cosine of D and X",
    "diagonal": "|D|² / |ΔW|²",
    "mixed": "|X|² / |ΔW|²",
    "cross": "2 <D, X> / |ΔW|²",
}
COURSE = ("distance", "rank", "condition", "scale", "mixed_share", "update_rank")
DOTTED = ("mixed_share", "cosine", "scale")
SETTING_FIELDS = ("scale", "base", "quantization")


# What |MA| / |A| is near for these mixers.
_SCALES = {KAIMING_SCALE: "Kaiming", 1.0: "orthogonal"}
_PARTS = (
    "The update ΔW = Σ m_ij B_i A_j has a diagonal part D, its r terms with i = j, which LoRA has too, and a mixed "
    "part X, its r² - r terms with i ≠ j. Mixed share: |X|² / (|D|² + |X|²), in squared Frobenius norms."
)
_SHARES = (
    _PARTS,
    "The terms are not orthogonal: |ΔW|² = |D|² + |X|² + 2 <D, X>. Where the cosine of D and X is positive the two "
    "parts reinforce one another, where it is negative they cancel.",
    "|MA| / |A| is what mixing does to the size of A: 1 for an orthogonal mixer, about 1/√3 at a Kaiming start.",
    "Dots are means over the layers and the seeds; lines reach from the lowest to the highest layer of any seed.",
)
_EQUAL = "Equal terms: 1 - 1/r, which r² terms of one size in independent directions would give."
_COURSE = (
    "Means over the adapted modules (of condition numbers the median) and over the seeds; bands are ± one sample "
    "standard deviation of the seeds. M₀ is the mixer before the training.",
    _PARTS,
    "An update is zero at the start and has no share or rank there. LoRA appears by its update alone.",
)
_SPECTRA = (
    "Singular values, largest first, of the mixers M and of the trained updates ΔW: means by index over the adapted"
    " modules and over the seeds; bands are ± one sample standard deviation of the seeds."
)
_MIXERS = (
    "|m_ij| in every adapted module. Row i of a square is the column B_i, in the output, column j the row A_j, in "
    "the input. A row of squares is a layer.",
    "One seed, and no mean over seeds: the number of a subspace means something within its run alone.",
)
_ANGLES = (
    "Principal angles between the trained updates of two runs in degrees, mean over the angles of a module and over"
    " the modules; the numbers beside the squares are seeds. Below the diagonal: between the column spaces of ΔW, "
    "in the output. Above it: between the row spaces, in the input.",
    "Runs of one seed start from the same A unless a setting changes that; their input spaces begin alike.",
)


def build(
    experiment: str, runs_dir: Path, runs: Sequence[Run], left_out: Sequence[LeftOut], numbers: PaperNumbers
) -> list[Figure]:
    """The figures of every scale and setting, in a stable order.

    Args:
        runs_dir: where the adapters of the runs are.
        left_out, numbers: not used; the tables name the runs that are left out, and the paper has no such figure.
    """
    figures = [
        figure
        for scale, setting, members in by_setting(runs)
        for figure in _Part(experiment, scale, setting, members, runs_dir).figures()
    ]
    return figures + knock_out_figure.build(experiment, runs_dir, runs, left_out, numbers)


class _Part:
    """The figures of one scale and setting."""

    def __init__(self, experiment: str, scale: str, setting: Setting | None, runs: Sequence[Run], runs_dir: Path):
        self.scale, self.setting, self.runs, self.runs_dir = scale, setting, runs, runs_dir
        traces, self.absent = load_traces(runs, runs_dir)
        self.groups = groups_of(traces)
        drawn = drawn_groups(self.groups)
        looks = looks_of([group.row for group in drawn])
        self.drawn = {group.key: look for group, look in zip(drawn, looks, strict=True)}

    def figures(self) -> list[Figure]:
        if not self.groups:
            return [self._shares()]
        heat_maps = [self._mixers(group) for group in self.groups if group.has_mixers and group.key in self.drawn]
        return [self._shares(), *heat_maps, self._course(), self._spectra(), self._angles()]

    # what they have in common

    def _figure(
        self, name: str, title: str, facts: Sequence[str], csv: str, pictures: Mapping[str, bytes], table: str = ""
    ) -> Figure:
        setting = [] if self.setting is None else [self.setting.base]
        if self.setting is not None and self.setting.quantization != "none":
            setting.append(self.setting.quantization)
        title = f"{title}: scale {self.scale}"
        if setting:
            title += f", base model {setting[0]}" + "".join(f", {name.upper()}" for name in setting[1:])
        left_out = [f"Left out: {entry}." for entry in self.absent] if name == "shares" else []
        facts = [*facts, *left_out, *([commits_fact(self.runs)] if name == "shares" else [])]
        return Figure(
            folder=f"{self.scale}/subspaces",
            name="-".join([name, *(override_label([part]) for part in setting)]),
            title=title,
            markdown="\n".join(part for part in [heading(2, title), bullets(facts), table] if part),
            csv=csv,
            pictures=dict(pictures),
        )

    def _line(self, group: Group, **values: object) -> dict[str, object]:
        setting = self.setting or Setting("")
        head = {"scale": self.scale, "base": setting.base, "quantization": setting.quantization}
        return head | {"method": group.row.method, "label": group.row.label} | values

    def _label(self, group: Group) -> str:
        return group.row.name + (ONE_SEED if len(group.traces) == 1 else "")

    def _seed_notes(self, groups: Iterable[Group]) -> list[str]:
        hidden = [group.row.name for group in self.groups if group.key not in self.drawn]
        notes = [f"Not drawn, but in the data: {', '.join(hidden)}."] if hidden else []
        return notes + ([f"{ONE_SEED} one seed."] if any(len(group.traces) == 1 for group in groups) else [])

    # the figures

    def _mixers(self, group: Group) -> Figure:
        """|M| of the first seed, at the start where it was kept, and at the end."""
        trace = next((trace for trace in group.traces if trace.start), group.traces[0])
        trace = trace if trace.has_mixers else next(trace for trace in group.traces if trace.has_mixers)
        last = max(trace.steps)
        moments = {"start": (0, trace.start), "end": (last, trace.end)}
        moments = {name: (step, mixers) for name, (step, mixers) in moments.items() if mixers}
        lines = [
            self._line(group, seed=trace.run.seed, moment=name, step=step, module=module, i=i)
            | {f"j{j}": _number(weight) for j, weight in enumerate(row)}
            for name, (step, mixers) in moments.items()
            for module, mixer in mixers.items()
            for i, row in enumerate(mixer)
        ]
        drawn = [
            Moment(f"{name.capitalize()} (step {step})", _blocks(mixers)) for name, (step, mixers) in moments.items()
        ]
        facts = [f"{group.row.name}, seed {trace.run.seed}.", *_MIXERS]
        pooled = sorted({trace.last[m].r for m, matrix in trace.end.items() if trace.last[m].r > len(matrix)})
        if pooled:
            blocks = ", ".join(f"{math.ceil(r / MOST_RANKS)} x {math.ceil(r / MOST_RANKS)} at r = {r}" for r in pooled)
            facts.append(f"Pixels are means over blocks of weights: {blocks}.")
        if "start" not in moments:
            facts.append(f"The start was not kept; {KEEP}.")
        layers = {(p.stack, p.layer) for p in map(place_of, trace.end)}
        shown = {(block.name, layer) for block in drawn[-1].blocks for layer in block.layers}
        if len(shown) < len(layers):
            facts.append(f"{len(shown)} of {len(layers)} layers are drawn, evenly spaced; the data have all of them.")
        largest = max(len(mixer) for mixer in trace.end.values())
        fields = (*SETTING_FIELDS, "method", "label", "seed", "moment", "step", "module", "i")
        fields += tuple(f"j{j}" for j in range(largest))
        label = [] if group.row.label == "default" else [group.row.label]
        own = "-".join(override_label([part]) for part in [group.row.method, *label])
        return self._figure(
            *(f"mixers-{own}", f"Mixers of {group.row.name}", facts),
            csv_text(fields, lines),
            draw_mixers(drawn, "$|m_{ij}|$"),
        )

    def _course(self) -> Figure:
        """Mixers and updates over the steps whose adapters were kept."""
        lines, curves = [], defaultdict(list)
        kept = [group for group in self.groups if any(len(trace.steps) > 1 for trace in group.traces)]
        for group in kept:
            traces = [trace for trace in group.traces if len(trace.steps) > 1]
            for quantity in COURSE:
                points = []
                for step in sorted({step for trace in traces for step in trace.steps}):
                    at = [over_modules(trace.steps[step], quantity) for trace in traces if step in trace.steps]
                    if (summary := over_seeds(at)) is None:
                        continue
                    lines.append(self._line(group, step=step, quantity=quantity, **_summary(summary)))
                    if math.isfinite(summary.mean):
                        points.append((step, *_band(summary)))
                if points and group.key in self.drawn:
                    curves[quantity].append(Curve(self._label(group), *self.drawn[group.key], points))
        guides = {"scale": _SCALES}
        charts = [
            Chart("step", NAMES[quantity], curves[quantity], quantity == "condition", 0, guides.get(quantity, {}))
            for quantity in COURSE
            if curves[quantity]
        ]
        facts = [*_COURSE, *self._seed_notes(kept)]
        fields = (*SETTING_FIELDS, "method", "label", "step", "quantity", "mean", "sd", "n")
        pictures = draw_lines(charts, 3) if charts else {}
        facts = facts if charts else [f"Not drawn: no run has copies of its adapter; {KEEP}."]
        return self._figure("course", "Mixers over the training", facts, csv_text(fields, lines), pictures)

    def _spectra(self) -> Figure:
        """Singular values of M at both ends, and of the update at the end."""
        lines, mixers, updates = [], [], []
        for group in self.groups:
            ends = {"start": [t.steps[0] for t in group.traces if t.start], "end": [t.last for t in group.traces]}
            for moment, adapters in ends.items():
                spectra = [mean_spectrum(n.mixer_values for n in modules.values()) for modules in adapters]
                points = self._spectrum_lines(group, lines, moment, "M", spectra)
                if points and group.key in self.drawn:
                    mixers.append(Curve(self._label(group), *self.drawn[group.key], points, moment == "start"))
            spectra = [mean_spectrum(n.update_values for n in modules.values()) for modules in ends["end"]]
            points = self._spectrum_lines(group, lines, "end", "update", spectra)
            if points and group.key in self.drawn:
                updates.append(Curve(self._label(group), *self.drawn[group.key], points))
        charts = [Chart("index i", "σᵢ(M)", mixers)] if mixers else []
        charts += [Chart("index i", "σᵢ(ΔW) / σ₁(ΔW)", updates)] if updates else []
        starts = any(trace.start for group in self.groups for trace in group.traces)
        dashed = "Dashed: at the start." if starts else f"The start was not kept; {KEEP}."
        facts = [_SPECTRA, *([dashed] if mixers else []), *self._seed_notes(self.groups)]
        fields = (*SETTING_FIELDS, "method", "label", "moment", "matrix", "index", "mean", "sd", "n")
        pictures = draw_lines(charts, 2) if charts else {}
        return self._figure("spectra", "Spectra of mixers and updates", facts, csv_text(fields, lines), pictures)

    def _spectrum_lines(
        self,
        group: Group,
        lines: list[dict[str, object]],
        moment: str,
        matrix: str,
        spectra: Sequence[Sequence[float]],
    ) -> list[tuple[float, float, float, float]]:
        points = []
        for index in range(max(map(len, spectra), default=0)):
            summary = over_seeds(spectrum[index] for spectrum in spectra if len(spectrum) > index)
            lines.append(self._line(group, moment=moment, matrix=matrix, index=index + 1, **_summary(summary)))
            points.append((index + 1, *_band(summary)))
        return points

    def _shares(self) -> Figure:
        """How the update divides into diagonal and mixed subspaces, by kind of module and over all modules."""
        mixed = [group for group in self.groups if group.has_mixers]
        rows: dict[str, list[str]] = defaultdict(list)  # stack -> kinds of module
        for place in sorted({place_of(m) for g in mixed for t in g.traces for m in t.end}, key=_place_order):
            stack, kind = _dot_name(place)
            if kind not in rows[stack]:
                rows[stack].append(kind)
        panels = []
        for quantity in DOTTED:
            series = [
                Series(self._label(group), *self.drawn[group.key], _dots(group.traces, quantity))
                for group in mixed
                if group.key in self.drawn
            ]
            panels.append(DotPanel(NAMES[quantity], series, self._guides(quantity, mixed)))
        lines = [
            self._line(group, seed=trace.run.seed, module=module, **_module_line(module, found))
            for group in self.groups
            for trace in group.traces
            for module, found in trace.last.items()
        ]
        facts = [*_SHARES, *([_EQUAL] if panels[0].guides else []), *self._seed_notes(mixed)]
        if not mixed:
            diagonal = "no run has a mixer; LoRA's update is diagonal throughout"
            facts = [f"Not drawn: {diagonal if self.groups else 'no run has an adapter that can be read'}."]
        fields = (
            *(*SETTING_FIELDS, "method", "label", "seed", "module", "stack", "layer", "kind", "r"),
            *("distance", "rank", "condition", "scale_of_A", "update_rank", "diagonal", "mixed", "cross"),
            *("mixed_share", "cosine"),
        )
        pictures = draw_dots(panels, rows) if any(panel.series for panel in panels) else {}
        title = "What the mixers do to the update"
        return self._figure("shares", title, facts, csv_text(fields, lines), pictures, self._table())

    def _guides(self, quantity: str, groups: Sequence[Group]) -> dict[float, str]:
        if quantity == "mixed_share":
            ranks = {n.r for g in groups for t in g.traces for n in t.last.values() if n.rank is not None}
            return {1 - 1 / ranks.pop(): "equal terms"} if len(ranks) == 1 else {}
        return _SCALES if quantity == "scale" else {0.0: "orthogonal"}

    def _table(self) -> str:
        """One line a group: the trained adapters over all modules and seeds."""
        if not self.groups:
            return ""
        columns = (
            "distance",
            "rank",
            "condition",
            "scale",
            "diagonal",
            "mixed",
            "cross",
            "mixed_share",
            "update_rank",
        )
        cells = [
            [
                *(self._label(group), str(len(group.traces))),
                *(_cell(over_seeds(over_modules(t.last, quantity) for t in group.traces)) for quantity in columns),
            ]
            for group in self.groups
        ]
        return markdown_table(Grid(["Method", "n", *(NAMES[quantity] for quantity in columns)], cells))

    def _angles(self) -> Figure:
        """Mean principal angles between the trained updates of all pairs of runs."""
        members = angle_members(self.groups)
        traces = [trace for _, of in members for trace in of]
        group_of = [group for group, of in members for _ in of]
        found = angles_between(traces, self.runs_dir)
        lines = [
            self._line(group_of[i], seed=traces[i].run.seed)
            | {"other_method": group_of[j].row.method, "other_label": group_of[j].row.label}
            | {"other_seed": traces[j].run.seed, "columns": _number(a.columns), "rows": _number(a.rows)}
            for (i, j), a in found.items()
        ]
        square = Square(
            runs=[str(trace.run.seed) for trace in traces],
            groups=[(group.row.name, len(of)) for group, of in members],
            below={pair: angles.columns for pair, angles in found.items() if angles.columns is not None},
            above={pair: angles.rows for pair, angles in found.items() if angles.rows is not None},
        )
        fields = (
            *SETTING_FIELDS,
            "method",
            "label",
            "seed",
            "other_method",
            "other_label",
            "other_seed",
            "columns",
            "rows",
        )
        facts = self._angle_facts(traces, found, sum(len(group.traces) for group in self.groups))
        pictures = draw_angles(square) if square.below else {}
        return self._figure("angles", "Angles between updates", facts, csv_text(fields, lines), pictures)

    def _angle_facts(self, traces: Sequence[Trace], found: Mapping[tuple[int, int], Angles], every: int) -> list[str]:
        missing = len(traces) * (len(traces) - 1) // 2 - len(found)
        absent = [f"{missing} pairs were not measured; where the adapters are: {COMMAND}."] if missing else []
        if not any(angles.columns is not None for angles in found.values()):
            return absent or ["Not drawn: there are no two runs whose adapters share a module."]
        chance = chance_angles(traces)
        apart = f"{chance.columns:.0f}° (output) and {chance.rows:.0f}° (input)"
        facts = [*_ANGLES, f"Spaces in random directions would be about {apart} apart.", *absent]
        if len(traces) < every:
            facts.append(f"{len(traces)} of {every} runs, alike by group.")
        return facts


# ------------------------------------------------------------------------------------------------------------- pieces


def _blocks(mixers: Mapping[str, Matrix]) -> list[Block]:
    """A block a stack, of at most MOST_LAYERS layers."""
    places = {module: place_of(module) for module in mixers}
    blocks = []
    for stack in sorted({place.stack for place in places.values()}):
        here = {module: place for module, place in places.items() if place.stack == stack}
        layers = sorted({place.layer for place in here.values()})
        if len(layers) > MOST_LAYERS:
            layers = [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]
        kinds = sorted({place.kind for place in here.values()}, key=_kind_order)
        matrices = {
            (_layer_name(place.layer), _short(place.kind)): mixers[module]
            for module, place in here.items()
            if place.layer in layers
        }
        blocks.append(
            Block(_words(stack), [_layer_name(layer) for layer in layers], [_short(k) for k in kinds], matrices)
        )
    return blocks


KIND_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")


def _kind_order(kind: str) -> tuple:
    return KIND_ORDER.index(kind) if kind in KIND_ORDER else len(KIND_ORDER), kind


def _place_order(place: Place) -> tuple:
    return place.stack, _kind_order(place.kind)


def _short(kind: str) -> str:
    return kind.removesuffix("_proj")


def _layer_name(layer: Sequence[int]) -> str:
    return ".".join(map(str, layer))


def _words(stack: str) -> str:
    return stack.replace("_", " ").capitalize()


def _dot_name(place: Place) -> tuple[str, str]:
    return _words(place.stack), _short(place.kind)


def _dots(traces: Sequence[Trace], quantity: str) -> dict[tuple[str, str], Dot]:
    """Stack and kind of module -> mean and range over its layers and the seeds."""
    values = defaultdict(list)
    for trace in traces:
        for module, numbers in trace.last.items():
            if (value := over_modules({module: numbers}, quantity)) is not None:
                values[_dot_name(place_of(module))].append(value)
    return {name: Dot(sum(of) / len(of), min(of), max(of)) for name, of in values.items()}


def _module_line(module: str, found: ModuleNumbers) -> dict[str, object]:
    place = place_of(module)
    quantities = (
        "distance",
        "rank",
        "condition",
        "update_rank",
        "diagonal",
        "mixed",
        "cross",
        "mixed_share",
        "cosine",
    )
    return (
        {"stack": place.stack, "layer": _layer_name(place.layer), "kind": place.kind, "r": found.r}
        | {name: _number(getattr(found, name)) for name in quantities}
        | {"scale_of_A": _number(found.scale)}
    )


def _number(value: float | None) -> str:
    """Six digits: what the last ones are depends on the machine's linear algebra."""
    return "" if value is None else f"{round(value, 9) + 0.0:.6g}"


def _summary(summary: Summary) -> dict[str, object]:
    return {"mean": _number(summary.mean), "sd": _number(summary.sd), "n": summary.n}


def _band(summary: Summary) -> tuple[float, float, float]:
    deviation = summary.sd or 0.0
    return summary.mean, summary.mean - deviation, summary.mean + deviation


def _cell(summary: Summary | None) -> str:
    if summary is None:
        return "-"
    if math.isinf(summary.mean):
        return "∞"
    sign = "-" if summary.mean < 0 else ""
    deviation = "" if summary.sd is None else f" ± {summary.sd:.2g}"
    return f"{sign}{significant(abs(summary.mean))}{deviation}"
