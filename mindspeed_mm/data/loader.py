"""Loaders: endless micro-batches of one replica, prepared by worker processes."""

from __future__ import annotations

import logging
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mindspeed_mm.config.data import DataConfig, DataloaderParameters
from mindspeed_mm.config.qwen2vl import Qwen2VLConfig
from mindspeed_mm.config.run import TrainingConfig
from mindspeed_mm.data.build import build_collator_for, build_preparer, check_data_config, open_records
from mindspeed_mm.data.collate import Qwen2VLCollator
from mindspeed_mm.data.describe import describe_example
from mindspeed_mm.data.prepare import Note, SamplePreparer
from mindspeed_mm.data.sampler import BaseRandomBatchSampler, evaluation_micro_batches
from mindspeed_mm.errors import DataError
from mindspeed_mm.ops.batch import Batch

logger = logging.getLogger(__name__)

WORKER_TIMEOUT_S = 300
DEFAULT_PREFETCH_FACTOR = 2


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What a worker hands back."""

    batch: Batch | None
    notes: tuple[Note, ...]
    error: str | None
    """Why there is no batch. As text, because exceptions lose their form between processes."""

    def pin_memory(self) -> MicroBatch:
        """The same in page-locked memory; torch's DataLoader calls this by name."""
        return self if self.batch is None else replace(self, batch=self.batch.pin_memory())


class MicroBatchDataset(Dataset[MicroBatch]):
    """Lists of record numbers to micro-batches; an empty list gives a filler from which nothing is learned."""

    def __init__(self, preparer: SamplePreparer, collator: Qwen2VLCollator) -> None:
        self.preparer = preparer
        self.collator = collator

    def __len__(self) -> int:
        return len(self.preparer)

    def __getitems__(self, numbers: list[int]) -> MicroBatch:
        """Called by torch's DataLoader with what its batch sampler gives."""
        notes: list[Note] = []
        if not numbers:
            return MicroBatch(self.collator.filler(self.preparer.template.tokenizer.special.im_end), (), None)
        try:
            samples = [self.preparer.prepare(number, notes) for number in numbers]
            return MicroBatch(self.collator(samples), tuple(notes), None)
        except DataError as error:
            return MicroBatch(None, tuple(notes), str(error))
        except Exception:
            # A defect of ours or of a library: the reader needs the trace, and only text brings it out of a worker.
            names = ", ".join(self.preparer.records.name_of(number) for number in numbers)
            return MicroBatch(None, tuple(notes), f"unexpected error while preparing {names}\n{traceback.format_exc()}")


def _as_it_is(micro_batch: Any) -> Any:
    return micro_batch


class BatchLoader(Iterator[Batch]):
    """Endless micro-batches of one replica. Its state is one number: `consumed_samples`.

    Worker processes start at the first `next`. Records that were dropped or cut are counted in `counts` and logged: the
    first of every reason, then at every tenfold.

    Args:
        numbers_from: from a count of consumed samples, the record numbers of the micro-batches that follow, endlessly.
        step: samples that one micro-batch consumes over all replicas.
        num_iterations: optimizer-step-sized parts of one pass, for evaluation; None when training.
    Raises:
        DataError (from `next`): a record cannot be used; the text names it and the reason.
    """

    def __init__(
        self,
        dataset: MicroBatchDataset,
        numbers_from: Callable[[int], Iterator[list[int]]],
        *,
        step: int,
        loading: DataloaderParameters,
        training: TrainingConfig,
        consumed_samples: int = 0,
        num_iterations: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.num_iterations = num_iterations
        self.consumed_samples = consumed_samples
        """Over all replicas, up to the last batch that was handed out."""
        self.counts: Counter[str] = Counter()
        """How many records were dropped or cut, by reason, on this replica."""
        self._numbers_from = numbers_from
        self._step = step
        self._loading = loading
        self._training = training
        self._iterator: Iterator[MicroBatch] | None = None

    def __iter__(self) -> BatchLoader:
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            self._iterator = iter(self._make_torch_loader())
        failure: str | None
        try:
            prepared = next(self._iterator)
        except RuntimeError as error:
            failure = f"a data worker failed at {self._work_in_progress()}: {error}"
        else:
            self._count(prepared.notes)
            failure = prepared.error
        if failure is not None or prepared.batch is None:
            # Raised out here, where nothing refers to torch's iterator any more, so that its workers end at once.
            self.close()
            raise DataError(failure)
        self.consumed_samples += self._step
        return prepared.batch

    def restart(self, consumed_samples: int = 0) -> None:
        """Go on after so many consumed samples; batches that were prepared ahead are thrown away."""
        self.close()
        self.consumed_samples = consumed_samples

    def close(self) -> None:
        """End the workers; the next `next` starts them again where this loader stands."""
        self._iterator = None

    def _make_torch_loader(self) -> DataLoader[MicroBatch]:
        workers = self._training.num_workers
        parallel: dict[str, Any] = {}
        if workers:
            parallel = {
                "timeout": WORKER_TIMEOUT_S,
                "prefetch_factor": self._loading.prefetch_factor or DEFAULT_PREFETCH_FACTOR,
            }
        return DataLoader(
            self.dataset,
            batch_sampler=self._numbers_from(self.consumed_samples),
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=self._loading.pin_memory and torch.accelerator.is_available(),
            # Its own generator: torch would draw the workers' seeds from the global one and so change training.
            generator=torch.Generator().manual_seed(self._training.seed),
            **parallel,
        )

    def _work_in_progress(self) -> str:
        """What the workers were at: one that died or hangs cannot say it, but the order is known."""
        numbers = next(self._numbers_from(self.consumed_samples))
        names = ", ".join(self.dataset.preparer.records.name_of(number) for number in numbers) or "a filler"
        ahead = self._training.num_workers * (self._loading.prefetch_factor or DEFAULT_PREFETCH_FACTOR)
        return f"{names}, or at one of the next {ahead} micro-batches" if ahead else names

    def _count(self, notes: Sequence[Note]) -> None:
        for note in notes:
            self.counts[note.reason] += 1
            count = self.counts[note.reason]
            if count == 10 ** (len(str(count)) - 1):
                logger.warning(
                    "data: %d records so far were %s; this one is %s (%s)", count, note.reason, note.name, note.detail
                )


def build_train_loader(
    data: DataConfig,
    model: Qwen2VLConfig,
    training: TrainingConfig,
    *,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int,
) -> BatchLoader:
    """The training batches of one replica, from where `consumed_samples` (over all replicas) says.

    Only the replica's loading rank builds one. Logs one decoded example on the first replica.

    Raises:
        ConfigError: settings that are not implemented, or a checkpoint directory that does not fit.
        DataError: a record file cannot be indexed, or the first sample cannot be used.
    """
    check_data_config(data)
    records = open_records(data, part="train", seed=training.seed)
    assert records is not None, "training data are always set"
    preparer = build_preparer(data, model, training, records)
    loading = data.dataloader_param

    def numbers_from(consumed: int) -> Iterator[list[int]]:
        return iter(
            BaseRandomBatchSampler(
                len(records),
                micro_batch_size=training.micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
                seed=training.seed,
                shuffle=loading.shuffle,
                consumed_samples=consumed,
            )
        )

    if dp_rank == 0:
        sample = preparer.prepare(next(numbers_from(consumed_samples))[0], [])
        logger.info("%d training records. %s", len(records), describe_example(sample, preparer.template.tokenizer))
    return BatchLoader(
        MicroBatchDataset(preparer, build_collator_for(data, model, preparer)),
        numbers_from,
        step=training.micro_batch_size * dp_size,
        loading=loading,
        training=training,
        consumed_samples=consumed_samples,
    )


def build_valid_loader(
    data: DataConfig, model: Qwen2VLConfig, training: TrainingConfig, *, dp_rank: int, dp_size: int
) -> BatchLoader | None:
    """The evaluation batches of one replica; None when neither `val_dataset` nor `val_rate` is set.

    One pass over the whole set, in file order, takes `num_iterations` times `training.num_micro_batches(dp_size)`
    batches; then the pass starts again. `restart()` starts it for the next evaluation. Micro-batches that no sample is
    left for are fillers without a learned token, so a mean must weigh batches by their learned tokens (or leave
    fillers out).

    Raises:
        ConfigError, DataError: as `build_train_loader`.
    """
    check_data_config(data)
    records = open_records(data, part="valid", seed=training.seed)
    if records is None:
        return None
    preparer = build_preparer(data, model, training, records)
    micro_batches = evaluation_micro_batches(
        len(records),
        micro_batch_size=training.micro_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        num_micro_batches=training.num_micro_batches(dp_size),
    )
    step = training.micro_batch_size * dp_size

    def numbers_from(consumed: int) -> Iterator[list[int]]:
        first = consumed // step % len(micro_batches)
        return chain(micro_batches[first:], chain.from_iterable(repeat(micro_batches)))

    return BatchLoader(
        MicroBatchDataset(preparer, build_collator_for(data, model, preparer)),
        numbers_from,
        step=step,
        loading=data.dataloader_param,
        training=training,
        num_iterations=math.ceil(len(records) / training.global_batch_size),
    )
