"""The order of samples: a pure function of the seed and of how many samples were consumed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from mindspeed_mm.data.record_index import Int64Array


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> Int64Array:
    """Every sample number once, in the random order of this epoch.

    Returns:
        [num_samples] int64.
    """
    # torch's CPU generator looks at the low 32 bits only, so both numbers are hashed into them; with a sum, epoch 1 of
    # one seed would be epoch 0 of the next.
    mixed = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=4).digest(), "little")
    return torch.randperm(num_samples, generator=torch.Generator().manual_seed(mixed)).numpy()


class BaseRandomBatchSampler:
    """Endless sample numbers of one replica, one list per micro-batch.

    There is one order for all replicas; each global micro-batch takes the next `micro_batch_size * dp_size` samples of
    it, and each replica its slice. So which samples an optimizer step sees depends on the seed and on
    `consumed_samples` alone: not on the number of replicas, the micro-batch size or the workers, and all of them may
    change at a resume.

    An epoch holds every sample once. The next epoch follows inside the same global micro-batch, so no batch is ever
    incomplete and nothing is left out at the end of an epoch (MindSpeed-MM leaves out
    `num_samples % (micro_batch_size * dp_size)` samples, after which its replicas part ways).

    Args:
        shuffle: random order, another one in every epoch; else the order of the files.
        consumed_samples: over all replicas, since the first step of training.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        shuffle: bool = True,
        consumed_samples: int = 0,
    ) -> None:
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed
        self.shuffle = shuffle
        self.consumed_samples = consumed_samples
        self._orders: dict[int, Int64Array] = {}

    def __iter__(self) -> Iterator[list[int]]:
        consumed = self.consumed_samples
        while True:
            yield self.micro_batch_at(consumed)
            consumed += self.micro_batch_size * self.dp_size

    def micro_batch_at(self, consumed_samples: int) -> list[int]:
        """This replica's samples of the global micro-batch that follows on so many consumed samples."""
        start = consumed_samples + self.dp_rank * self.micro_batch_size
        return [self.sample_at(position) for position in range(start, start + self.micro_batch_size)]

    def sample_at(self, position: int) -> int:
        """The sample at this position of the endless order that strings the epochs together."""
        epoch, place = divmod(position, self.num_samples)
        if not self.shuffle:
            return place
        if epoch not in self._orders:
            # Positions grow, but for an error message one of the epoch before may still be asked for.
            self._orders = {number: order for number, order in self._orders.items() if number == epoch - 1}
            self._orders[epoch] = epoch_order(self.num_samples, seed=self.seed, epoch=epoch)
        return int(self._orders[epoch][place])


def evaluation_micro_batches(
    num_samples: int, *, micro_batch_size: int, dp_rank: int, dp_size: int, num_micro_batches: int
) -> list[list[int]]:
    """One pass over a set in file order: this replica's micro-batches, in whole iterations.

    Every replica gets the same number of micro-batches, because they step together, and it is a multiple of
    `num_micro_batches`, because schedules may ask for that. Samples that do not fill the last global micro-batch are
    dealt evenly; micro-batches without a sample are empty lists.
    """
    step = micro_batch_size * dp_size
    batches = []
    for start in range(0, num_samples, step):
        size = min(step, num_samples - start)
        share, more = divmod(size, dp_size)
        first = start + dp_rank * share + min(dp_rank, more)
        batches.append(list(range(first, first + share + (dp_rank < more))))
    return batches + [[] for _ in range(-len(batches) % num_micro_batches)]
