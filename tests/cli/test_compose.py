"""Composing: sugar, quoting, suggestions, kinds of values, names of runs."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from natrain.cli.compose import compose_config, leaves, override_config
from natrain.cli.frozen import load_frozen
from natrain.cli.settings import config_folder, read_schema, settings_text

BASE = ["model=nat_tiny", "data=imagefolder", "data.root=images"]


def test_model_is_short_for_its_name():
    config = compose_config([*BASE, "model.args.drop_path_rate=0.1", "optim.lr=5e-4"])
    assert config.model.name == "nat_tiny"
    assert config.model.args == {"drop_path_rate": 0.1}
    assert config.optim.lr == 5e-4
    assert config.data.name == "imagefolder"


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [
        ("sede=1", "seed"),
        ("globalbatch=8", "global_batch"),
        ("optim.learning_rat=1", "optim.lr"),
        ("optim.wieght_decay=1", "optim.weight_decay"),
        ("lr=1", "optim.lr"),
        ("epochs=3", "schedule.epochs"),
        ("data.rot=x", "data.root"),
        ("modle=nat_tiny", "model"),
        ("data=imagefoldr", "data=imagefolder"),
        ("logger=wandv", "logger=wandb"),
        ("precision=bf61", "precision=bf16"),
        ("schedule.name=cosin", "schedule.name=cosine"),
        ("logger.wandb.enable=true", "logger.wandb.enabled"),
    ],
)
def test_misspelt_names_suggest_the_nearest(typed, suggested):
    with pytest.raises(ValueError) as error:
        compose_config([*BASE, typed])
    assert suggested in str(error.value)
    assert typed.partition("=")[0] in str(error.value)


@pytest.mark.parametrize(
    ("typed", "allowed"),
    [
        ("optim.lr=fast", "a number"),
        ("schedule.epochs=1.5", "a whole number"),
        ("schedule.epochs=true", "a whole number"),
        ("compile=1", "true or false"),
        ("optim.betas=0.9", "a list"),
        ("seed=null", "a value"),
        ("optim=adamw", "optim.name"),
        ("--resume=auto", "key=value"),
        ("resume", "key=value"),
        ("~optim", "key=value"),
        ("optim.betas=[0.9", "a list"),
    ],
)
def test_values_of_the_wrong_kind(typed, allowed):
    with pytest.raises(ValueError, match=allowed):
        compose_config([*BASE, typed])


def test_null_where_the_comment_allows_it():
    assert compose_config([*BASE, "optim.clip_grad_norm=null"]).optim.clip_grad_norm is None


@pytest.mark.parametrize("needed", range(2))
def test_model_and_data_are_needed(needed):
    key = BASE[needed].partition("=")[0]
    with pytest.raises(ValueError, match=f"^{key}=None .*Try: {key}="):
        compose_config([word for word in BASE if not word.startswith(key)])


@pytest.mark.parametrize("path", ["/a=b/x.ckpt", "/with space/(1)", "/a,b", "/it's", "/plain"])
def test_paths_are_taken_as_typed(path):
    assert compose_config([*BASE, f"data.root={path}"]).data.root == path


@pytest.mark.parametrize("text", ["2024_05_01", "1e3", "007", "true", "1.10", "2024"])
def test_texts_that_look_like_numbers_stay_as_typed(text, tmp_path):
    config = compose_config([*BASE, f"name={text}", f"data.root={text}", "trainer.max_steps=1_000"])
    assert (config.name, config.run_dir) == (text, f"runs/{text}")
    assert config.data.root.endswith(f"/{text}")
    assert config.trainer.max_steps == 1000
    frozen = tmp_path / "config.yaml"
    OmegaConf.save(config, frozen)
    assert override_config(load_frozen(frozen), []) == config
    assert override_config(load_frozen(frozen), [f"name={text}_b"]).run_dir == f"runs/{text}_b"


@pytest.mark.parametrize("key", ["name", "data.root", "checkpoint", "run_dir"])
def test_an_empty_text_is_no_value(key):
    """``name=$UNSET`` would be the folder of all runs, ``data.root=$UNSET`` wherever one stands."""
    with pytest.raises(ValueError, match=f"^{key}='' "):
        compose_config([*BASE, f"{key}="])


def test_an_interpolation_of_nothing_is_one_error():
    with pytest.raises(ValueError, match="nothing"):
        compose_config([*BASE, "data.root=/data/${nothing}"])


@pytest.mark.parametrize("key", ["data.root", "run_dir", "resume"])
def test_home_is_expanded(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = compose_config([*BASE, f"{key}=~/images"])
    assert OmegaConf.select(config, key) == "/home/someone/images"


def test_the_run_is_named_after_what_is_learned():
    first = compose_config([*BASE, "optim.lr=1e-4", "seed=2"])
    assert first.name.startswith("nat_tiny-imagefolder-")
    assert first.run_dir == f"runs/{first.name}"
    assert compose_config([*BASE, "seed=2", "resume=auto", "optim.lr=1e-4", "trainer.devices=2"]).name == first.name
    assert compose_config([*BASE, "seed=3", "optim.lr=1e-4"]).name != first.name
    assert compose_config([*BASE, "name=2024"]).name == "2024"


def test_config_dir_adds_choices(tmp_path):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\n# Mine.\noptim:\n  lr: 0.5\n")
    assert compose_config([*BASE, "recipe=mine"], tmp_path).optim.lr == 0.5
    (tmp_path / "recipe" / "mine.yaml").write_text("# @package _global_\noptim:\n  lrr: 0.5\n")
    with pytest.raises(ValueError, match="optim.lr"):
        compose_config([*BASE, "recipe=mine"], tmp_path)
    with pytest.raises(ValueError, match="--config-dir"):
        compose_config(BASE, tmp_path / "absent")


def test_the_defaults_shown_are_those_composed():
    composed = leaves(compose_config(["model=nat_tiny", "data=digits"]))
    for key, setting in read_schema().settings.items():
        if not key.startswith(("data.", "model.", "name", "run_dir")):
            assert composed[key] == setting.default, key


def test_every_setting_has_a_meaning():
    schema = read_schema()
    without = [key for key, setting in schema.settings.items() if not setting.comment]
    assert not without
    assert len(schema.settings) > 60
    text = settings_text(schema)
    for key in schema.settings:
        assert f" {key}=" in text
    for group, choices in schema.groups.items():
        for path in (config_folder() / group).glob("*.yaml"):
            assert choices[path.stem], f"{path} needs a first comment line that says what it is"
