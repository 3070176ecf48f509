"""Gives every rank of a data-parallel replica the micro-batches that one of them loads.

One rank per replica runs the loader. Others receive what their stage needs: token ids, labels, positions and segment
boundaries everywhere, pixels only where patches are embedded. Sends are not waited for when they are posted: a stage
may be several micro-batches behind, and a collective here would tie the stages of the pipeline together and deadlock
1F1B.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mindspeed_mm.ops.batch import Batch

if TYPE_CHECKING:
    from mindspeed_mm.data.loader import BatchLoader
    from mindspeed_mm.platform.groups import Ranks


class BatchRelay:
    """The micro-batches of one rank, in order, for each of its model chunks.

    Args:
        ranks: where this process stands; the first rank of its replica loads.
        group: a group over the ranks of the replica that carries CPU tensors.
        source: the loader on the first rank, None elsewhere.
        pixel_ranks: global ranks whose stage embeds patches.
        patch_dim: values per patch.
        num_chunks: model chunks on this rank; each asks for every micro-batch once.
    """

    def __init__(
        self,
        ranks: Ranks,
        group: dist.ProcessGroup,
        source: BatchLoader | None,
        *,
        pixel_ranks: frozenset[int],
        patch_dim: int,
        num_chunks: int = 1,
    ) -> None:
        self.rank = ranks.rank
        self.loader, *self.receivers = ranks.replica_ranks(ranks.dp_rank)
        self.group = group
        self.source = source
        self.pixel_ranks = pixel_ranks
        self.patch_dim = patch_dim
        self._queues: list[deque[Batch]] = [deque() for _ in range(num_chunks)]
        self._sends: list[tuple[dist.Work, torch.Tensor]] = []

    def iterators(self) -> list[Iterator[Batch]]:
        """One endless iterator per model chunk."""
        return [self._iterate(chunk) for chunk in range(len(self._queues))]

    def restart(self) -> None:
        """Begin again at the first sample of the loader."""
        self.flush()
        for queue in self._queues:
            queue.clear()
        if self.source is not None:
            self.source.restart()

    def flush(self) -> None:
        """Wait until everything sent so far has arrived; call it between iterations."""
        for work, _ in self._sends:
            work.wait()
        self._sends.clear()

    def _iterate(self, chunk: int) -> Iterator[Batch]:
        queue = self._queues[chunk]
        while True:
            if not queue:
                batch = self._load_and_send() if self.source is not None else self._receive()
                for other in self._queues:
                    other.append(batch)
            yield queue.popleft()

    def _load_and_send(self) -> Batch:
        assert self.source is not None
        batch = next(self.source)
        if self.receivers:
            payload = batch.to_payload()
            size = torch.tensor([payload.numel()])
            for rank in self.receivers:
                self._send(size, rank)
                self._send(payload, rank)
                if rank in self.pixel_ranks and batch.pixel_values is not None:
                    self._send(batch.pixel_values, rank)
        return batch if self.loader in self.pixel_ranks else batch.without_pixels()

    def _send(self, tensor: torch.Tensor, rank: int) -> None:
        # The tensor is kept until the send is done: gloo reads it when the receiver is ready.
        tensor = tensor.contiguous()
        work = dist.isend(tensor, dst=rank, group=self.group)
        assert work is not None, "the loader sends to ranks of its own group"
        self._sends.append((work, tensor))

    def _receive(self) -> Batch:
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, src=self.loader, group=self.group)
        payload = torch.empty(int(size), dtype=torch.int64)
        dist.recv(payload, src=self.loader, group=self.group)
        batch = Batch.from_payload(payload)
        if self.rank not in self.pixel_ranks or batch.num_patches == 0:
            return batch
        pixels = torch.empty(batch.num_patches, self.patch_dim)
        dist.recv(pixels, src=self.loader, group=self.group)
        return Batch.from_payload(payload, pixels)
