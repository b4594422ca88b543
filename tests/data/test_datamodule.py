import lightning
import pytest
import torch
from omegaconf import OmegaConf

from natrain.data import build_eval_transform
from natrain.data.datamodule import DATASETS, default_workers
from tests.data.helpers import AUGMENT, COLOUR, build, write_folder


def test_what_a_trainer_needs_to_know_is_there_before_anything_is_decoded(tmp_path):
    datamodule = build("imagefolder", write_folder(tmp_path, train=5, val=3))
    for path in tmp_path.glob("*/*/*.jpg"):
        path.unlink()
    assert datamodule.class_names == ["cat", "dog"]
    assert (datamodule.num_classes, datamodule.num_train, datamodule.num_val) == (2, 10, 6)


def test_batches_have_the_promised_shapes_and_types(tmp_path):
    datamodule = build("imagefolder", write_folder(tmp_path, train=5, val=5))
    loader = datamodule.train_loader()
    batches = list(loader)
    assert len(loader) == len(batches) == 2
    for images, targets in batches:
        assert (images.shape, images.dtype) == ((4, 3, 32, 32), torch.float32)
        assert (targets.shape, targets.dtype) == ((4,), torch.int64)
    loader = datamodule.val_loader()
    batches = list(loader)
    assert [len(images) for images, *_ in batches] == [8, 2]
    assert len(loader) == 2
    assert {index.dtype for *_, index in batches} == {torch.int64}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_evaluate_each_image_once_as_one_process_does(world_size, tmp_path):
    root = write_folder(tmp_path, train=1, val=5)
    datamodule = build("imagefolder", root, val_batch=2)
    transform = build_eval_transform(COLOUR)
    seen = []
    for rank in range(world_size):
        for images, targets, indices in datamodule.val_loader(rank, world_size):
            for image, target, index in zip(images, targets.tolist(), indices.tolist(), strict=True):
                seen.append(index)
                assert target == datamodule.splits.val.targets[index]
                assert torch.equal(image, transform(datamodule.splits.val.load(index, "RGB")))
    assert sorted(seen) == list(range(10))


def test_grey_input_from_colour_files(tmp_path):
    datamodule = build(
        "imagefolder", write_folder(tmp_path), input=dict(COLOUR, in_chans=1), augment=dict(AUGMENT, rand_augment=None)
    )
    assert next(iter(datamodule.train_loader()))[0].shape == (4, 1, 32, 32)
    assert next(iter(datamodule.val_loader()))[0].shape == (6, 1, 32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(name="digitz"), r"data='digitz'.*digits \| cifar10 \| imagefolder.*Try: data=digits"),
        (dict(name=None), r"data=None.*digits \| cifar10 \| imagefolder"),
        (dict(bad_image_limit=1.5), "data.bad_image_limit=1.5"),
        (dict(bad_image_limit=float("nan")), "data.bad_image_limit=nan"),
        (dict(workers=-1), "data.workers=-1"),
        (dict(val_batch=0), "data.val_batch=0"),
        (dict(num_classes=1000), "data.num_classes=1000 .*expected 10, as in the data.*data.num_classes=null"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**(dict(name="digits") | settings))


def test_configs_of_all_data_sets_are_known(repository):
    files = {path.stem: OmegaConf.load(path) for path in (repository / "configs" / "data").glob("*.yaml")}
    assert set(files) == set(DATASETS)
    assert all(config.name == stem for stem, config in files.items())


def test_omegaconf_sections_are_taken_as_they_are():
    from natrain.data import build_datamodule
    from tests.data.helpers import GREY

    datamodule = build_datamodule(
        OmegaConf.create({"name": "digits", "root": None, "workers": 0, "bad_image_limit": 0.001}),
        OmegaConf.create(AUGMENT),
        input=OmegaConf.create(GREY),
        micro_batch=10,
        seed=0,
    )
    assert next(iter(datamodule.train_loader()))[0].shape == (10, 1, 8, 8)


def test_default_workers_leave_a_core_for_training_and_share_the_rest(monkeypatch):
    for cores, ranks, expected in ((1, 1, 0), (2, 1, 1), (16, 4, 3), (128, 1, 16), (4, 8, 0)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        assert default_workers(ranks) == expected


class Recorder(lightning.LightningModule):
    """Notes what Lightning hands over."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained: list[torch.Tensor] = []
        self.evaluated: list[int] = []

    def training_step(self, batch):
        images, targets = batch
        self.trained.append(images.sum())
        return self.weight * targets.float().mean()

    def validation_step(self, batch, batch_idx):
        self.evaluated += batch[2].tolist()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 1])
def test_lightning_advances_the_epoch_and_keeps_the_samplers(tmp_path, workers):
    datamodule = build("imagefolder", write_folder(tmp_path), workers=workers)
    module = Recorder()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, datamodule=datamodule)
    loader = build("imagefolder", tmp_path).train_loader()
    expected = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        expected += [images.sum() for images, _ in loader]
    assert torch.equal(torch.stack(module.trained), torch.stack(expected))
    assert sorted(module.evaluated) == sorted(2 * list(range(6)))
