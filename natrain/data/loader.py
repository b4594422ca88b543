"""Reading samples in batches, and what happens to images that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from natrain.data.images import Images, UnreadableImage
from natrain.data.rng import derive_seed, preserved_rng, seed_augmentation
from natrain.data.transforms import Transform
from natrain.errors import invalid

logger = logging.getLogger("natrain.data")

_ATTEMPTS = 10  # images tried for one place in a batch; only a set that is mostly broken needs so many


class Failure(NamedTuple):
    """One image that could not be read, and why."""

    name: str
    reason: str


class Sample(NamedTuple):
    """``image`` is None where nothing could be read; ``failures`` lists what was tried in vain."""

    image: torch.Tensor | None
    target: int
    index: int
    failures: list[Failure]


class TrainImages(Dataset):
    """Augmented samples, each a function of (seed, epoch, index). Takes what ``TrainSampler`` yields.

    An unreadable image is replaced by another one, chosen by (seed, epoch, index) too. Its failure travels with the
    batch, because a count kept in a worker never reaches the training process.
    """

    def __init__(self, images: Images, transform: Transform, mode: str, seed: int) -> None:
        self.images = images
        self.transform = transform
        self.mode = mode
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images.targets)

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[Sample]:
        with preserved_rng():
            return [self._draw(epoch, index) for epoch, index in places]

    def _draw(self, epoch: int, index: int) -> Sample:
        seed = derive_seed(self.seed, epoch, index)
        failures: list[Failure] = []
        for _ in range(_ATTEMPTS):
            try:
                image = self.images.load(index, self.mode)
            except UnreadableImage as error:
                failures.append(Failure(self.images.name(index), str(error)))
                index = derive_seed(self.seed, epoch, index) % len(self)
            else:
                seed_augmentation(seed)
                return Sample(self.transform(image), int(self.images.targets[index]), index, failures)
        return Sample(None, -1, index, failures)


class EvalImages(Dataset):
    """Samples as evaluation sees them. Takes what ``EvalSampler`` yields."""

    def __init__(self, images: Images, transform: Transform, mode: str) -> None:
        self.images = images
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.images.targets)

    def __getitem__(self, index: int) -> Sample:
        target = int(self.images.targets[index])
        try:
            image = self.images.load(index, self.mode)
        except UnreadableImage as error:
            return Sample(None, target, index, [Failure(self.images.name(index), str(error))])
        return Sample(self.transform(image), target, index, [])


class Batch(NamedTuple):
    """images float32 [B, C, H, W] (None where a sample has none), targets and indices int64 [B]."""

    images: torch.Tensor | None
    targets: torch.Tensor
    indices: torch.Tensor
    failures: list[Failure]


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; in a worker straight into shared memory."""
    images = [sample.image for sample in samples]
    return Batch(
        None if any(image is None for image in images) else default_collate(images),
        torch.tensor([sample.target for sample in samples]),
        torch.tensor([sample.index for sample in samples]),
        [failure for sample in samples for failure in sample.failures],
    )


class UnreadableImages:
    """Counts images that training could not read, names each once, stops above a share of the images read.

    The share is taken over at least one epoch's reads of this rank, so that a bad image among the first ones does not
    count for more than it is; and one image alone stops nothing unless the limit is 0.

    Args:
        limit: share of the images read, 0 to 1 (``data.bad_image_limit``).
        epoch_reads: images this rank reads in an epoch.
    """

    def __init__(self, limit: float, epoch_reads: int) -> None:
        self.limit = limit
        self.epoch_reads = epoch_reads
        self.reads = 0
        self.failed_reads = 0
        self.names: set[str] = set()

    def record(self, reads: int, failures: Sequence[Failure]) -> None:
        """Account for one batch.

        Raises:
            ValueError: more failures than the limit allows.
        """
        self.reads += reads
        self.failed_reads += len(failures)
        for failure in failures:
            if failure.name not in self.names:
                self.names.add(failure.name)
                logger.warning(
                    "cannot read %s (%s); another image takes its place. Unreadable so far: %d",
                    failure.name,
                    failure.reason,
                    len(self.names),
                )
        tolerated = self.limit * max(self.reads, self.epoch_reads)
        if self.failed_reads > tolerated and (self.limit == 0 or len(self.names) > 1):
            name, reason = failures[-1] if failures else (next(iter(self.names)), "named above")
            raise invalid(
                "data.bad_image_limit",
                self.limit,
                f"a share above that of the unreadable images: {self.failed_reads} of {self.reads} reads failed in "
                f"{len(self.names)} different images, the last {name} ({reason})",
                "removing the images named in the warnings, or "
                f"data.bad_image_limit={min(1.0, 2 * self.failed_reads / self.reads):.2g}",
            )


class TrainLoader(DataLoader):
    """Yields ``(images, targets)``; accounts for unreadable images in the process that trains."""

    def __init__(self, dataset: TrainImages, *, unreadable: UnreadableImages, **settings) -> None:
        super().__init__(dataset, collate_fn=collate, **settings)
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in super().__iter__():
            self.unreadable.record(len(batch.targets), batch.failures)
            if batch.images is None:
                raise invalid(
                    "data.root",
                    batch.failures[-1].name,
                    f"readable images; {_ATTEMPTS} in a row are not ({batch.failures[-1].reason})",
                    "data.root=DIR with intact images",
                )
            yield batch.images, batch.targets


class EvalLoader(DataLoader):
    """Yields ``(images, targets, indices)``. An unreadable image is an error: fewer images give another accuracy."""

    def __init__(self, dataset: EvalImages, **settings) -> None:
        super().__init__(dataset, collate_fn=collate, **settings)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for batch in super().__iter__():
            if batch.failures:
                name, reason = batch.failures[0]
                raise invalid(
                    "data.root",
                    name,
                    f"a readable validation image ({reason}): accuracy is counted over every image",
                    f"restoring the file, or rm '{name}', which makes it another validation set",
                )
            yield batch.images, batch.targets, batch.indices
