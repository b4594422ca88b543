"""How a global batch is spread, and what a launcher decides."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from natrain.training.plan import device_count, global_rank, split_batch

LAUNCHED = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)


def trainer(devices: int | str = 1, num_nodes: int = 1):
    return OmegaConf.create({"accelerator": "cpu", "devices": devices, "num_nodes": num_nodes})


@pytest.mark.parametrize("global_batch", [1, 6, 64, 1024])
@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [None, 1, 2, 16])
def test_passes_times_images_times_devices_is_the_global_batch(
    global_batch: int, world: int, micro: int | None
) -> None:
    fits = global_batch % world == 0 and (micro is None or (global_batch // world) % micro == 0)
    if fits:
        images, passes = split_batch(global_batch, micro, world)
        assert images * passes * world == global_batch
        assert micro in (None, images)
    else:
        with pytest.raises(ValueError, match="Try: (global_batch|micro_batch)=") as caught:
            split_batch(global_batch, micro, world)
        key, value = str(caught.value).rpartition("Try: ")[2].split("=")
        proposal = {"global_batch": global_batch, "micro_batch": micro, key: int(value)}
        if key == "micro_batch":  # what is proposed works
            split_batch(proposal["global_batch"], proposal["micro_batch"], world)
        else:
            assert proposal["global_batch"] % world == 0


def test_a_process_on_its_own() -> None:
    assert device_count(trainer("auto")) == (1, 1)
    assert device_count(trainer(3)) == (3, 1)
    assert global_rank() == 0
    with pytest.raises(ValueError, match="trainer.num_nodes=2.*torchrun"):
        device_count(trainer(1, 2))


@pytest.mark.parametrize("devices", [1, 4, "auto"])
def test_torchrun_decides(monkeypatch: pytest.MonkeyPatch, devices: int | str) -> None:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert device_count(trainer(devices)) == (4, 2)
    assert global_rank() == 5
    with pytest.raises(ValueError, match="trainer.devices=3.*4, as the launcher started"):
        device_count(trainer(3))


def test_srun_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_NTASKS": "16", "SLURM_PROCID": "9", "SLURM_JOB_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    assert device_count(trainer()) == (8, 2)
    assert global_rank() == 9


def test_one_task_of_a_job_is_a_process_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert device_count(trainer(2)) == (2, 1)


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cfg = trainer()
    cfg.accelerator = "gpu"
    with pytest.raises(ValueError, match="trainer.accelerator='gpu'.*cpu or auto"):
        device_count(cfg)
