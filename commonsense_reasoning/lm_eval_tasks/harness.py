"""The seam to lm-eval: loading tasks, the model wrapper, running items of a task. Only ``evaluate`` imports it."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lm_eval.tasks
import torch
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn.utils.rnn import pad_sequence

from moslora_core.errors import UserError
from moslora_core.evaluations import assert_evaluating

from .beam_search import ending_early
from .likelihoods import continuation_likelihoods
from .prefill import read_prompts

TASKS_DIR = Path(__file__).parent

# lm-eval's own task for each benchmark, and its folder. They ask otherwise (the options' texts are scored, BoolQ comes
# with its passage), so their numbers stand beside others' harness numbers, not beside the paper's.
HARNESS_TASKS = {
    "ARC-Easy": ("arc_easy", "arc"),
    "openbookqa": ("openbookqa", "openbookqa"),
    "social_i_qa": ("social_iqa", "siqa"),
    "ARC-Challenge": ("arc_challenge", "arc"),
    "winogrande": ("winogrande", "winogrande"),
    "piqa": ("piqa", "piqa"),
    "boolq": ("boolq", "super_glue/boolq"),
    "hellaswag": ("hellaswag", "hellaswag"),
}

# What lm-eval warns of on every use that is as intended here: a model in memory, data by way of the metadata.
_EXPECTED = (
    "`pretrained` model kwarg is not of type `str`",
    "Passed an already-initialized model through `pretrained`",
    "Custom kwargs can be passed to `--metadata`",
)


class _Unexpected(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(text in record.getMessage() for text in _EXPECTED)


@contextmanager
def without_expected_warnings() -> Iterator[None]:
    """Drops the warnings that name nothing wrong; every other message of lm-eval stays."""
    loggers = [logging.getLogger(f"lm_eval.{name}") for name in ("models.huggingface", "api.task")]
    unexpected = _Unexpected()
    for logger in loggers:
        logger.addFilter(unexpected)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(unexpected)


class CausalLM(HFLM):
    """lm-eval's wrapper of a transformers model, with a generation that does not depend on the batch.

    lm-eval stops generating by looking for the end token's text in as many rows as there are prompts. Under beam
    search the rows are hypotheses, so that rule ends a search early, depending on what else is in the batch. Here
    transformers' own rule ends it: at the end token, for every hypothesis. Stop texts are cut off afterwards, by
    lm-eval.

    Nothing is computed twice that rows have in common, and no text is tokenised twice: requests are taken whole, their
    texts at once. The answers are those of each request alone.
    """

    _tokenised: Mapping[str, list[int]] = MappingProxyType({})

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        self._tokenise(request.args[0] for request in requests)
        return super().generate_until(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        self._tokenise(text for context, label in pairs for text in (context.rstrip(), context + label))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or not sys.stderr.isatty())

    def _tokenise(self, texts: Iterable[str]) -> None:
        """Tokenises all that is going to be asked for in one call: text by text it takes as long as a small model."""
        start = self.tokenizer.bos_token
        unique = list(dict.fromkeys(text for text in texts if not (start and text.startswith(start))))
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        found = self.tokenizer(unique, **special)["input_ids"] if unique else []
        self._tokenised = dict(zip(unique, found, strict=True))

    def tok_encode(self, string: str, *arguments: Any, **settings: Any) -> list[int]:
        if not arguments and not settings and string in self._tokenised:
            return self._tokenised[string]
        return super().tok_encode(string, *arguments, **settings)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [torch.tensor(self._tokenised[text]) for text in strings if text in self._tokenised]
        if len(rows) < len(strings) or max(map(len, rows)) > (left_truncate_len or math.inf):
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **settings)
        ids, mask = (
            pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=padding_side)
            for tensors, value in ((rows, self.tokenizer.pad_token_id), ([torch.ones_like(row) for row in rows], 0))
        )
        return ids, mask

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        return continuation_likelihoods(self.model, pairs, self.batch_size, self.max_length)

    def _model_generate(self, context, max_length: int, stop: list[str], **generation_kwargs: Any) -> torch.Tensor:
        generation_kwargs.pop("temperature", None)  # lm-eval's 0.0 for "no sampling", which do_sample says
        mask, beams = generation_kwargs.pop("attention_mask"), generation_kwargs.get("num_beams", 1)
        with ending_early(self.model):
            return self.model.generate(
                **read_prompts(self.model, context, mask, beams),
                max_length=max_length,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self._end_tokens(),
                **generation_kwargs,
            )

    def _end_tokens(self) -> list[int]:
        """The tokenizer's end token, which training teaches, and those of the base (chat models have several)."""
        configured = self.model.generation_config.eos_token_id
        known = configured if isinstance(configured, list) else [configured]
        return sorted({self.tokenizer.eos_token_id, *(token for token in known if token is not None)})


def wrap(model, tokenizer, batch_size: int) -> CausalLM:
    """The model as lm-eval takes it, on the device where it is."""
    with without_expected_warnings():
        # Log-probabilities in bfloat16 would tie, and a tie falls to the first label.
        return CausalLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def load_tasks(mode: str, protocol: str, names: Sequence[str], data_dir: str, split: str = "test") -> dict[str, Task]:
    """This package's tasks of one protocol, by our names. Only the named ones need prepared data."""
    metadata = {"data_dir": data_dir, "split": split}
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False, metadata=metadata)
    specs = {name: f"llm_adapters_{mode}_{protocol}_{name}" for name in names}
    with without_expected_warnings():
        loaded = manager.load(list(specs.values()))["tasks"]
    return {name: loaded[spec] for name, spec in specs.items()}


def load_harness_tasks(names: Sequence[str]) -> dict[str, Task]:
    """lm-eval's own tasks, by our names.

    Raises:
        UserError: their data is neither cached nor reachable.
    """
    shipped = Path(lm_eval.tasks.__file__).parent
    # The named folders alone: indexing all of lm-eval's tasks takes most of a minute.
    folders = sorted({str(shipped / HARNESS_TASKS[name][1]) for name in names})
    manager = TaskManager(include_path=folders, include_defaults=False)
    try:
        loaded = manager.load([HARNESS_TASKS[name][0] for name in names])["tasks"]
    # datasets and its clients report a missing network in a dozen ways; all of them mean the same here.
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            "evaluation.mode=harness downloads lm-eval's own data from the Hugging Face hub, which failed: "
            f"{reason}; the modes generate and loglikelihood read data.dir"
        ) from None
    return {name: loaded[HARNESS_TASKS[name][0]] for name in names}


def run_items(lm: CausalLM, task: Task, indices: Sequence[int]) -> list[dict[str, Any]]:
    """lm-eval's per-item samples of the items at ``indices`` (ascending) of ``task``, in that order."""
    assert_evaluating(lm.model)
    name = task.config.task
    results = evaluator.evaluate(
        lm=lm,
        task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
        samples={name: list(indices)},
        bootstrap_iters=0,  # standard errors are ours: these are pieces of a task
        log_samples=True,
    )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    if [sample["doc_id"] for sample in samples] != list(indices):
        raise RuntimeError(f"lm-eval returned other items of {name} than the {len(indices)} it was asked for")
    return samples
