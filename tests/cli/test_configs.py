"""Every shipped yaml composes, and trains two steps on a CPU."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from PIL import Image

from natrain.cli import main
from natrain.cli.compose import compose_config
from natrain.cli.settings import config_folder, read_schema
from tests.data.helpers import write_folder

CHOICES = [
    (path.parent.name, path.stem)
    for path in sorted(config_folder().glob("*/*.yaml"))
    if path.parent.name in read_schema().groups  # configs/ablation is read by `natrain ablate`
]
# What makes two steps cheap, whatever the yaml says: few small images, a small model.
SMALL = [
    "name=run",
    "global_batch=4",
    "data.workers=0",
    "trainer.accelerator=cpu",
    "trainer.max_steps=2",
    "trainer.limit_val_batches=1",
    "trainer.progress_bar=false",
    "schedule.cooldown_epochs=0",
]


def write_cifar10(root: Path) -> Path:
    """Ten training and ten test images in the Hugging Face layout."""
    import pyarrow
    import pyarrow.parquet

    root.mkdir()
    for split in ("train", "test"):
        images = []
        for index in range(10):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (25 * index, 0, 99)).save(file, "PNG")
            images.append({"bytes": file.getvalue(), "path": f"{index}.png"})
        table = pyarrow.table({"image": images, "label": list(range(10))})
        pyarrow.parquet.write_table(table, root / f"{split}.parquet")
    return root


def settings_for(data: str, folder: Path) -> list[str]:
    if data == "digits":
        return ["model=nat_digits", "data=digits"]
    if data == "cifar10":
        return ["model=nat_cifar", "data=cifar10", f"data.root={write_cifar10(folder / 'images')}"]
    assert data == "imagefolder", f"say here how to train two steps on data={data}"
    root = write_folder(folder / "images")
    return ["model=nat_cifar", "data=imagefolder", f"data.root={root}", "data.img_size=32"]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes(group, choice):
    typed = [f"{group}={choice}"] if group == "data" else ["data=digits", f"{group}={choice}"]
    composed = compose_config(["model=nat_digits", *typed])
    file = yaml.safe_load((config_folder() / group / f"{choice}.yaml").read_text())
    assert file, "a yaml that sets nothing is no choice"
    assert set(composed) == {key.partition(".")[0] for key in read_schema().settings}


# tests/training/test_recipes.py trains with the recipes.
@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] != "recipe"])
def test_every_choice_trains_two_steps(group, choice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = settings_for(choice if group == "data" else "digits", tmp_path)
    words += [] if group == "data" else [f"{group}={choice}"]
    assert main(["train", *words, *SMALL]) == 0
    header, *rows = (tmp_path / "runs/run/metrics.csv").read_text().splitlines()
    assert "step" in header.split(",")
    assert rows
    assert (tmp_path / "runs/run/checkpoints/last.ckpt").is_file()
