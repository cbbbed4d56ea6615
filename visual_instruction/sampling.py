"""The order of training items: batches of one modality and of similar lengths, the same again after a resume."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler
from transformers import TrainerCallback

from moslora_core.errors import UserError


class GroupedByModalityAndLength(Sampler[int]):
    """Every item once an epoch, in runs of ``batch_size`` items that all have an image or all have none.

    As LLaVA's and XTuner's samplers do: items of each modality are shuffled, sorted by length within mega-batches of
    many batches, cut into batches, and the batches shuffled. What does not fill a batch of its modality comes last, as
    the only mixed run. The longest batch comes first, so that one too large for memory fails at once.

    The order depends on ``seed`` and the epoch alone: a resumed training sees what the stopped one would have seen.
    """

    def __init__(
        self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, seed: int, mega_batches: int = 50
    ):
        """
        Args:
            lengths: (items,) in any unit that grows with the cost of an item.
            has_image: (items,).
            batch_size: items of one optimiser step over all processes (per device x processes x accumulation): Trainer
                gives consecutive items to the processes and steps.
            mega_batches: batches that lengths are sorted within; more of them group better and shuffle less.
        """
        if len(lengths) != len(has_image):
            raise UserError(f"lengths and has_image must be of one length, found {len(lengths)} and {len(has_image)}")
        if batch_size < 1:
            raise UserError(f"batch_size must be positive, found {batch_size}")
        self.lengths, self.has_image = np.asarray(lengths), np.asarray(has_image, dtype=bool)
        self.batch_size, self.seed, self.mega_batches = batch_size, seed, mega_batches
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        batches, rest = [], []
        for image in (True, False):
            shuffled = random.permutation(np.flatnonzero(self.has_image == image))
            whole = len(shuffled) // self.batch_size * self.batch_size
            batches += self._batches(shuffled[:whole])
            rest.append(shuffled[whole:])
        ordered = [batches[i] for i in random.permutation(len(batches))]
        if ordered:
            longest = max(range(len(ordered)), key=lambda i: self.lengths[ordered[i]].sum())
            ordered[0], ordered[longest] = ordered[longest], ordered[0]
        return iter(np.concatenate([*ordered, *rest]).tolist())

    def _batches(self, items: np.ndarray) -> list[np.ndarray]:
        size = self.batch_size * self.mega_batches
        batches = []
        for start in range(0, len(items), size):
            mega = items[start : start + size]
            longest_first = mega[np.argsort(-self.lengths[mega], kind="stable")]
            batches += np.split(longest_first, len(mega) // self.batch_size)
        return batches


class FollowEpochs(TrainerCallback):
    """Tells a sampler the epoch. accelerate does so too, but not for several processes that resume within an epoch."""

    def __init__(self, sampler: GroupedByModalityAndLength):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(math.floor(state.epoch or 0))  # exact: a finished epoch is a whole number there
