import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natrain.data.sampler import EvalSampler, TrainSampler


def optimiser_steps(count, micro_batch, world_size, accumulation, epoch, seed=3):
    """The images of each optimiser step, over all ranks and accumulated micro batches."""
    global_batch = micro_batch * world_size * accumulation
    share = micro_batch * accumulation
    ranks = []
    for rank in range(world_size):
        sampler = TrainSampler(
            range(count),
            micro_batch=micro_batch,
            global_batch=global_batch,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )
        sampler.set_epoch(epoch)
        places = list(sampler)
        assert len(places) == len(sampler)
        assert {place[0] for place in places} <= {epoch}
        ranks.append([index for _, index in places])
    return [
        [index for rank in ranks for index in rank[step * share : (step + 1) * share]]
        for step in range(count // global_batch)
    ]


@pytest.mark.parametrize(("micro_batch", "world_size", "accumulation"), [(6, 2, 1), (4, 3, 1), (3, 2, 2), (1, 1, 12)])
def test_optimiser_steps_see_the_same_images_however_they_are_shared(micro_batch, world_size, accumulation):
    for epoch in (0, 4):
        one = optimiser_steps(101, 12, 1, 1, epoch)
        shared = optimiser_steps(101, micro_batch, world_size, accumulation, epoch)
        assert len(one) == 8
        assert [sorted(step) for step in shared] == [sorted(step) for step in one]


def test_micro_batches_of_the_ranks_are_pieces_of_one_order():
    one = [index for step in optimiser_steps(24, 8, 1, 1, epoch=1) for index in step]
    first = TrainSampler(range(24), micro_batch=4, global_batch=8, seed=3, rank=0, world_size=2)
    second = TrainSampler(range(24), micro_batch=4, global_batch=8, seed=3, rank=1, world_size=2)
    for sampler in (first, second):
        sampler.set_epoch(1)
    assert [index for _, index in first] == one[0:4] + one[8:12] + one[16:20]
    assert [index for _, index in second] == one[4:8] + one[12:16] + one[20:24]


def test_every_epoch_reads_each_image_at_most_once_in_another_order():
    epochs = [[index for step in optimiser_steps(50, 7, 1, 1, epoch) for index in step] for epoch in range(3)]
    for order in epochs:
        assert len(order) == len(set(order)) == 49
        assert order != sorted(order)
    assert len({tuple(order) for order in epochs}) == 3
    other_seed = optimiser_steps(50, 7, 1, 1, epoch=0, seed=4)
    assert [index for step in other_seed for index in step] != epochs[0]


@settings(deadline=None)
@given(count=st.integers(1, 60), world_size=st.integers(1, 9))
def test_evaluation_reads_each_image_exactly_once_over_all_ranks(count, world_size):
    samplers = [EvalSampler(range(count), rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(share) for share in shares]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_global_batch_beyond_the_data_set_says_how_many_images_there_are():
    with pytest.raises(ValueError, match=r"global_batch=1024 .*at most .*\(200\).*global_batch=200 or less"):
        TrainSampler(range(200), micro_batch=1024, global_batch=1024, seed=0)


def test_a_global_batch_the_ranks_cannot_share_proposes_one_they_can():
    with pytest.raises(ValueError, match=r"global_batch=30 .*multiple of micro_batch \* devices \(8 \* 2\).*=16"):
        TrainSampler(range(200), micro_batch=8, global_batch=30, seed=0, world_size=2)
