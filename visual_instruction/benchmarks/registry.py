"""The benchmarks by the names that they have in the run record: files, kinds of answer, sizes.

Files are those of VLMEvalKit (``<LMUData>/<file>.tsv``), which the paper evaluates with. It does not say which splits
it used where the toolkit has several. Taken here are the ones whose answers are public: MMBench's development split in
version 1.0 (the test split is scored by a server), ScienceQA's test split (as LLaVA reports it) and TextVQA's
validation split. A number of the paper beside one of ours may therefore belong to another split.
"""

from __future__ import annotations

from dataclasses import dataclass

from moslora_core.errors import UserError

MULTIPLE_CHOICE, YES_NO, SHORT_ANSWER, JUDGED = "multiple_choice", "yes_no", "short_answer", "judged"

# Length limit of an answer in free form, as VLMEvalKit's wrapper of XTuner's models has it.
FREE_FORM_TOKENS = 512


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: name in the run record and in ``data.benchmarks``.
        title: name in the paper's tables.
        file: VLMEvalKit's name, that of its TSV file without the ending.
        kind: multiple_choice | yes_no | short_answer | judged. A short answer's file that has option columns is
            multiple choice; what is ``judged`` needs a language model to score it and is handed over.
        language: en | cn, of the questions.
        questions: size of the published set, without the rotations of circular evaluation.
        circular: the file repeats its questions with rotated options, to be answered right in every rotation.
        mme: scored in MME's points instead of accuracy.
    """

    name: str
    title: str
    file: str
    kind: str
    language: str = "en"
    questions: int | None = None
    circular: bool = False
    mme: bool = False


# MME's categories by the two parts of its score; a category is worth up to 200 points (accuracy, and accuracy over
# pictures whose two questions are both right, in percent each).
MME_PARTS: dict[str, tuple[str, ...]] = {
    "perception": (
        *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


def _smoke(kind: str, answer: str) -> Benchmark:
    return Benchmark(f"smoke_{kind}", kind.capitalize(), f"smoke_{kind}", answer)


# In the column order of the paper's Table 5, the generated ones last.
BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("mmbench_en", "MMBench EN", "MMBench_DEV_EN", MULTIPLE_CHOICE, questions=1164, circular=True),
        Benchmark("mmbench_cn", "MMBench CN", "MMBench_DEV_CN", MULTIPLE_CHOICE, "cn", questions=1164, circular=True),
        Benchmark("seed_bench", "SEED-Bench", "SEEDBench_IMG", MULTIPLE_CHOICE, questions=14233),
        Benchmark("ai2d", "AI2D", "AI2D_TEST", MULTIPLE_CHOICE, questions=3088),
        Benchmark("sciqa", "SciQA", "ScienceQA_TEST", MULTIPLE_CHOICE, questions=2017),
        Benchmark("textvqa", "TextVQA", "TextVQA_VAL", SHORT_ANSWER, questions=5000),
        Benchmark("mathvista", "MathVista", "MathVista_MINI", JUDGED, questions=1000),
        Benchmark("mmvet", "MM-Vet", "MMVet", JUDGED, questions=218),
        Benchmark("mme", "MME", "MME", YES_NO, questions=2374, mme=True),
        _smoke("colour", SHORT_ANSWER),
        _smoke("shape", SHORT_ANSWER),
        _smoke("count", SHORT_ANSWER),
        _smoke("existence", YES_NO),
        _smoke("position", SHORT_ANSWER),
        _smoke("background", SHORT_ANSWER),
    )
}


def find(name: str) -> Benchmark:
    """The benchmark of that name.

    Raises:
        UserError: there is none.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; expected one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
