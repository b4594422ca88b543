"""Checkpoint files: whole or not there, free of code, and of the model they are loaded into."""

from __future__ import annotations

import os
import pickle
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

from natrain.errors import Stopped
from natrain.training import load_for_inference, train
from natrain.training.build import load_initial_weights
from natrain.training.checkpoint import AtomicCheckpointIO, load_state, read_checkpoint, write_atomically

MakeConfig = Callable[..., DictConfig]
QUICK = {"trainer.max_steps": 2, "trainer.limit_val_batches": 1, "ema.enabled": True}


class RunsCode:
    """A pickle that creates a file when it is loaded as a pickle."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, make_config: MakeConfig, form: str) -> None:
    bad, proof = tmp_path / "bad.ckpt", tmp_path / "ran"
    content = {"state_dict": {}, "payload": RunsCode(proof)}
    if form == "torch":
        torch.save(content, bad)
    else:
        bad.write_bytes(pickle.dumps(content))
    for use in (
        lambda: read_checkpoint(bad),
        lambda: load_for_inference(bad),
        lambda: AtomicCheckpointIO().load_checkpoint(bad),
        lambda: train(make_config({"checkpoint": str(bad)}, "initial")),
        lambda: train(make_config({"resume": str(bad)}, "resumed")),
    ):
        with pytest.raises(ValueError, match=r"(checkpoint|resume)=.*bad\.ckpt.*would run code"):
            use()
    assert not proof.exists()
    torch.load(bad, weights_only=False) if form == "torch" else pickle.loads(bad.read_bytes())
    assert proof.exists(), "the file does run code where nothing refuses it"


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "cut.ckpt"
    if content is None:
        torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
        content = path.read_bytes()[:-500]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint=.*cut\.ckpt"):
        read_checkpoint(path)


def test_a_missing_file_and_a_bare_tensor_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="existing checkpoint file"):
        read_checkpoint(tmp_path / "none.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "tensor.pt")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file) -> None:
        file.write(b"new, but only hal")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_one_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(Stopped, match=r"last.ckpt cannot be written \(File too large\).*resume=auto"):
            AtomicCheckpointIO().save_checkpoint({"step": 2, "weights": torch.zeros(1 << 20)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_another_model_is_one_error_with_all_names(tmp_path: Path) -> None:
    ours = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(5), "stem.weight": torch.zeros(1)}
    with pytest.raises(ValueError) as caught:
        load_state(ours, state, argument="checkpoint", path="x.ckpt", says="nat_tiny (1000 classes)")
    text = str(caught.value)
    for part in (
        "the file says it holds nat_tiny (1000 classes)",
        "2 missing from the file: 1.weight, 1.bias",
        "1 not in the model: stem.weight",
        "1 of another shape: 0.bias [5], model [4]",
        "Try: model=nat_tiny",
    ):
        assert part in text
    many = {f"extra{number}": torch.zeros(1) for number in range(40)} | ours.state_dict()
    with pytest.raises(ValueError, match="extra5 and 34 more"):
        load_state(ours, many, argument="checkpoint", path="x.ckpt", says="a model")


def test_what_a_run_writes_is_plain_and_complete(make_config: MakeConfig) -> None:
    cfg = make_config(QUICK)
    result = train(cfg)
    folder = Path(result.run_dir) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    parameters = checkpoint["hyper_parameters"]
    assert parameters["model_name"] == "nat_digits" and len(parameters["class_names"]) == 10
    assert parameters["input"]["img_size"] == [8, 8] and parameters["input"]["in_chans"] == 1
    assert parameters["config"]["optim"]["lr"] == cfg.optim.lr
    assert {"optimizer_states", "ema_state_dict", "epoch", "global_step", "best"} <= checkpoint.keys()


def test_inference_gives_back_the_trained_model(make_config: MakeConfig) -> None:
    result = train(make_config({**QUICK, "model.args": {"drop_path_rate": 0.3}}))
    checkpoint = torch.load(result.checkpoint, weights_only=True)
    for weights, key, prefix in (("raw", "state_dict", "model."), ("ema", "ema_state_dict", "")):
        loaded = load_for_inference(result.checkpoint, weights)
        assert not loaded.model.training and loaded.model_name == "nat_digits"
        assert loaded.class_names == checkpoint["hyper_parameters"]["class_names"]
        for name, tensor in loaded.model.state_dict().items():
            assert torch.equal(tensor, checkpoint[key][prefix + name])
        assert loaded.model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    best = load_for_inference(result.checkpoint)
    chosen = load_for_inference(result.checkpoint, checkpoint["evaluation"]["weights"])
    assert torch.equal(best.model.head.weight, chosen.model.head.weight)


def test_a_file_without_a_model_cannot_predict(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="weights of a NAT.*holds nothing"):
        load_for_inference(tmp_path / "bare.pt")


@pytest.mark.parametrize("form", ["bare", "state_dict", "safetensors", "ours"])
def test_initial_weights_of_every_form(tmp_path: Path, form: str) -> None:
    trained = timm.create_model("nat_digits")
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    state = trained.state_dict()
    if form == "safetensors":
        save_file(state, path)
    elif form == "ours":
        torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save(state if form == "bare" else {"state_dict": state}, path)
    model = timm.create_model("nat_digits")
    assert load_initial_weights(model, str(path)) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_initial_weights_with_other_classes_keep_all_but_the_head(tmp_path: Path) -> None:
    trained = timm.create_model("nat_digits", num_classes=21)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    model = timm.create_model("nat_digits", num_classes=10)
    head = model.head.weight.clone()
    assert sorted(load_initial_weights(model, str(tmp_path / "w.pt"))) == ["head.bias", "head.weight"]
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.patch_embed.proj[0].weight, trained.patch_embed.proj[0].weight)


def test_initial_weights_start_a_run_at_epoch_0(make_config: MakeConfig) -> None:
    first = train(make_config(QUICK, "first"))
    second = make_config(
        {**QUICK, "checkpoint": first.checkpoint, "optim.lr": 0.0, "schedule.warmup_lr": 0.0}, "second"
    )
    second.schedule.min_lr = 0.0
    result = train(second)
    loaded = load_for_inference(first.checkpoint)
    for name, tensor in load_for_inference(result.checkpoint, "raw").model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name])
    assert torch.load(result.checkpoint, weights_only=True)["global_step"] == 2
