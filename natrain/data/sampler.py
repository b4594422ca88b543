"""Which rank reads which sample when.

Both samplers derive from ``DistributedSampler`` because that is how Lightning recognises a sampler that already
shards, and leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Dataset, DistributedSampler

from natrain.data.rng import derive_seed
from natrain.errors import invalid

_PERMUTATION_STREAM = -1  # sample indices start at 0: the order never shares a seed with a sample's augmentation


class TrainSampler(DistributedSampler):
    """One permutation per epoch, f(seed, epoch), cut into global batches and each of these into the ranks' shares.

    The images of optimiser step ``t`` are ``permutation[t * global_batch : (t + 1) * global_batch]`` whatever the
    number of ranks, the micro batch and the accumulation. The images left over at the end of an epoch (fewer than
    ``global_batch``; others every epoch) are not read. Yields ``(epoch, index)``: the epoch has to reach the workers,
    which outlive it.

    Args:
        dataset: anything with a length.
        micro_batch: images per rank and forward pass.
        global_batch: images per optimiser step over all ranks; a multiple of ``micro_batch * world_size``.
        seed: of the run.

    Raises:
        ValueError: a data set smaller than one global batch, or a global batch that the ranks cannot share.
    """

    def __init__(
        self, dataset: Dataset, *, micro_batch: int, global_batch: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed, drop_last=True)
        self.micro_batch = micro_batch
        if global_batch % (micro_batch * world_size):
            raise invalid(
                "global_batch",
                global_batch,
                f"a multiple of micro_batch * devices ({micro_batch} * {world_size})",
                f"global_batch={max(1, global_batch // (micro_batch * world_size)) * micro_batch * world_size}",
            )
        steps = len(dataset) // global_batch
        if steps == 0:
            raise invalid(
                "global_batch",
                global_batch,
                f"at most the number of training images ({len(dataset)})",
                f"global_batch={len(dataset)} or less",
            )
        self.total_size = steps * global_batch
        self.num_samples = self.total_size // world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch, _PERMUTATION_STREAM))
        permutation = torch.randperm(len(self.dataset), generator=generator)[: self.total_size]
        shares = permutation.view(-1, self.num_replicas, self.micro_batch)
        epoch = self.epoch
        return ((epoch, index) for index in shares[:, self.rank].flatten().tolist())


class EvalSampler(DistributedSampler):
    """Every sample exactly once over all ranks: ranks may differ by one sample, nothing is repeated to even them."""

    def __init__(self, dataset: Dataset, *, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(dataset, num_replicas=world_size, rank=rank, shuffle=False)
        self.num_samples = len(range(rank, len(dataset), world_size))
        self.total_size = len(dataset)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))
