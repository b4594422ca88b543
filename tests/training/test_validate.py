"""Every number of a run has a declared range, and the first wrong one is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from natrain.training import train, validate
from natrain.training.validate import CHOICES, NUMBERS, PAIRS, check_values

MakeConfig = Callable[..., DictConfig]


def numeric_leaves(node: dict, prefix: str = "") -> dict[str, object]:
    leaves = {}
    for key, value in node.items():
        if isinstance(value, dict):
            leaves |= numeric_leaves(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float, list)) and not isinstance(value, bool):
            leaves[f"{prefix}{key}"] = value
    return leaves


def test_every_shipped_number_has_a_range_that_admits_it(repository: Path) -> None:
    plain = OmegaConf.to_container(OmegaConf.load(repository / "configs" / "train.yaml"))
    del plain["defaults"]
    leaves = numeric_leaves(plain)
    assert len(leaves) > 20
    assert set(leaves) <= NUMBERS.keys()
    for key, value in leaves.items():
        for item in value if isinstance(value, list) else [value]:
            assert NUMBERS[key].admits(item), key
    for key in NUMBERS | CHOICES:
        node = plain
        for part in key.split("."):
            node = node[part]  # a range for a key that does not exist would check nothing


@pytest.mark.parametrize("key", sorted(NUMBERS))
def test_what_is_typed_to_mend_a_wrong_value_is_right(make_config: MakeConfig, key: str) -> None:
    cfg = make_config()
    OmegaConf.update(cfg, key, math.nan)
    with pytest.raises(ValueError) as caught:
        check_values(cfg)
    proposed = OmegaConf.from_dotlist([str(caught.value).partition("Try: ")[2]])
    check_values(OmegaConf.merge(cfg, proposed))
    assert not [key for key in PAIRS if isinstance(OmegaConf.select(proposed, key), float)]


def test_the_small_run_is_valid(make_config: MakeConfig) -> None:
    validate(make_config())


@pytest.mark.parametrize("key", sorted(NUMBERS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(make_config: MakeConfig, key: str, value: float) -> None:
    cfg = make_config()
    OmegaConf.update(cfg, key, [value, 0.5] if key in PAIRS else value)
    with pytest.raises(ValueError) as caught:
        validate(cfg)
    text = str(caught.value)
    assert text.startswith(f"{key}=") and str(value) in text
    assert "expected" in text and f"Try: {key}=" in text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optim.lr", -1e-3, r"optim.lr=-0.001 .*finite number >= 0.*Try: optim.lr=0.001"),
        ("optim.betas", [0.9, 1.0], r"optim.betas=\[0.9, 1.0\].*>= 0 and < 1"),
        ("optim.betas", [0.9], "optim.betas.*2 numbers"),
        ("optim.clip_grad_norm", 0, "> 0.*or null"),
        ("global_batch", 0, "whole number >= 1"),
        ("global_batch", 12.5, "whole number"),
        ("trainer.devices", "all", "trainer.devices='all'.*whole number >= 1, or auto"),
        ("augment.label_smoothing", 1.0, ">= 0 and < 1"),
        ("augment.hflip", 1.5, ">= 0 and <= 1"),
        ("schedule.warmup_epochs", 3, r"at most schedule.epochs \(2\)"),
        ("schedule.name", "cosin", "cosine | linear | constant.*Try: schedule.name=cosine"),
        ("precision", "fp8", "Try: precision=fp"),
        ("precision", "fp16", "fp32 or bf16 on a CPU.*Try: precision=bf16"),
        ("model.args", {"drop_path_rate": math.nan}, "model.args.drop_path_rate=nan"),
        ("model.args", {"block": {"scale": math.inf}}, "model.args.block.scale=inf"),
        ("micro_batch", 100, r"a divisor of global_batch / devices = 360 / 1 = 360.*Try: micro_batch=90"),
        ("micro_batch", 400, "Try: micro_batch=360"),
        ("micro_batch", 36.0, "micro_batch=36.0 .*whole number >= 1"),
        ("micro_batch", [36, 72], r"micro_batch=\[36, 72\].*whole number >= 1"),
        ("data.img_size", 8.0, "data.img_size=8.0 .*whole number >= 1"),
        ("trainer.max_steps", 1e3, "trainer.max_steps=1000.0 .*whole number >= 1"),
        ("data.crop_pct", [0.9], r"data.crop_pct=\[0.9\].*finite number > 0"),
        ("augment.scale", 0.5, r"augment.scale=0.5 .*2 numbers.*Try: augment.scale=\[0.08,1\]"),
        ("augment.ratio", [0.5, 0], r"Try: augment.ratio=\[0.75,1.33\]"),
        ("data.split_seed", 10**19, "data.split_seed=1[0]+ .*whole number"),
    ],
)
def test_a_wrong_value_says_what_to_type(make_config: MakeConfig, key: str, value: object, message: str) -> None:
    cfg = make_config()
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(ValueError, match=message):
        validate(cfg)


def test_settings_that_exclude_each_other(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="cooldown_epochs=2.*0 with schedule.name=constant"):
        validate(make_config({"schedule.name": "constant", "schedule.cooldown_epochs": 2}))
    with pytest.raises(ValueError, match="micro_batch=45.*even number with mixup or cutmix"):
        validate(make_config({"augment.cutmix": 1.0, "micro_batch": 45}))


def test_nothing_is_written_before_the_settings_are_known_to_be_right(make_config: MakeConfig) -> None:
    cfg = make_config({"optim.lr": math.nan})
    with pytest.raises(ValueError, match="optim.lr=nan"):
        train(cfg)
    assert not Path(cfg.run_dir).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.name": "nat_digit"}, "model='nat_digit'.*Try: model=nat_digits"),
        ({"model.args": {"num_classes": 7}}, "model.args.num_classes=7.*10, the number of classes in the data"),
        ({"model.args": {"img_size": 9}, "data.img_size": 8}, "model.args.img_size=9.*8, as data.img_size says"),
        ({"data.mean": [0.1, 0.2]}, r"data.mean=\[0.1, 0.2\].*1 or 1 numbers"),
        ({"global_batch": 2000}, "global_batch=2000.*1437 training images"),
        ({"optim.name": "adamv"}, "optim.name='adamv'"),
    ],
)
def test_settings_that_the_data_and_the_model_contradict(make_config: MakeConfig, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(make_config(changes))
