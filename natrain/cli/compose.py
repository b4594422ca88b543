"""From the command line to one resolved configuration, composed once with Hydra's compose API."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from natrain.cli.settings import Schema, Setting, config_folder, read_schema
from natrain.errors import invalid, nearest
from natrain.models.weights.fetch import is_remote

# Settings that change where and how fast a run goes, but not what is learned: the run keeps its name.
FREE = frozenset(
    {"name", "run_dir", "overwrite", "resume", "micro_batch", "data.workers", "data.val_batch", "logger"}
    | {f"trainer.{key}" for key in ("accelerator", "devices", "num_nodes", "log_every_steps", "progress_bar")}
)
# Made absolute, since the frozen file may be read from another folder.
PATHS = ("checkpoint", "data.root", "data.labels")


def is_free(key: str) -> bool:
    """True where ``key`` or the section that holds it is in FREE."""
    return key in FREE or key.split(".")[0] in FREE


def compose_config(overrides: list[str], config_dir: Path | None = None) -> DictConfig:
    """Compose the configuration of one run: every interpolation resolved, the run's name filled in.

    Args:
        overrides: ``key=value`` words as typed; ``model=NAME`` is short for ``model.name=NAME``.
        config_dir: a folder of the user's own ``data/``, ``recipe/``, ... yaml files.

    Raises:
        ValueError: an unknown key or choice (with the nearest valid one), a value of the wrong kind, no model, no data.
    """
    if config_dir is not None and not config_dir.is_dir():
        raise invalid(
            "--config-dir", str(config_dir), "a folder with data/, recipe/, ... inside", "--config-dir ./configs"
        )
    schema = read_schema(config_dir)
    words = [_checked(word, schema) for word in overrides]
    search = [f"hydra.searchpath=['file://{config_dir.resolve()}']"] if config_dir is not None else []
    return _completed(_compose([*search, *words]), schema, words)


def override_config(config: DictConfig, overrides: list[str]) -> DictConfig:
    """Settings on top of a frozen configuration; a new name moves the run folder with it.

    Raises:
        ValueError: as ``compose_config``; also a group choice, which only composing can honour.
    """
    schema = read_schema()
    defaults = _compose([])
    OmegaConf.set_struct(defaults, False)  # model.args may hold any key
    config = OmegaConf.merge(defaults, config)  # a file of an older version lacks the settings added since
    for word in overrides:
        override = OverridesParser.create().parse_override(_checked(word, schema))
        key = override.key_or_group
        if key in schema.groups:
            fix = f"natrain train {word} without --config"
            raise invalid(key, override.value(), "no group choice on top of a frozen configuration", fix)
        OmegaConf.update(config, key, override.value(), force_add=True)
    keys = typed_keys(overrides)
    if "name" in keys and "run_dir" not in keys:
        config.run_dir = str(Path(config.run_dir).parent / str(config.name))
    return _completed(config, schema, overrides)


def _compose(words: list[str]) -> DictConfig:
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            return compose("train", overrides=words)
    except HydraException as error:
        raise ValueError(str(error)) from error


def leaves(config: DictConfig | dict, prefix: str = "") -> dict[str, object]:
    """The configuration flattened to dotted keys; a list counts as one value."""
    container = OmegaConf.to_container(config, resolve=False) if isinstance(config, DictConfig) else config
    flat: dict[str, object] = {}
    for key, value in container.items():
        if isinstance(value, dict) and value:
            flat |= leaves(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def typed_keys(overrides: list[str]) -> set[str]:
    """The dotted keys that the command line sets; ``model`` and ``data`` count as their names."""
    keys = {word.partition("=")[0].lstrip("+~") for word in overrides}
    return {f"{key}.name" if key in ("model", "data") else key for key in keys}


def _checked(word: str, schema: Schema) -> str:
    """One override, its key and choice known to be valid, in the form Hydra wants."""
    key, equals, value = word.partition("=")
    key = key.lstrip("+")
    if not equals or key.startswith(("-", "~")):
        raise invalid("setting", word, "key=value", "natrain train model=nat_tiny data=imagefolder data.root=DIR")
    if key == "model":
        key = "model.name"
    if key in schema.groups:
        choices = schema.groups[key]
        if value not in choices and value != "null":
            fix = nearest(value, choices) or next(iter(choices), "null")
            raise invalid(key, value, f"one of {', '.join(choices)}", f"{key}={fix}")
        return f"{key}={value}"
    setting = _setting(key, schema)
    return f"{'' if setting.key == key else '++'}{key}={_quoted(key, value, setting.is_text)}"


def _setting(key: str, schema: Schema) -> Setting:
    """The setting that ``key`` names; keys below an open mapping (``model.args``) belong to it."""
    for name, setting in schema.settings.items():
        if key == name or (setting.default == {} and key.startswith(f"{name}.")):
            return setting
    known = list(schema.settings)
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    section = [name for name in known if name.startswith(f"{key}.")]
    if section:
        raise invalid(
            key, "...", f"one of {', '.join(section)}", f"{section[0]}={schema.settings[section[0]].default_text}"
        )
    best = nearest(key, same_leaf) or (same_leaf or [None])[0] or nearest(key, [*known, *schema.groups, "model"])
    if best is None:
        leaf = nearest(key.rpartition(".")[2], {name.rpartition(".")[2]: name for name in known})
        best = next((name for name in known if leaf and name.endswith(leaf)), None)
    raise ValueError(
        f"unknown setting {key!r}"
        + (f": did you mean {best!r}?" if best else ".")
        + " `natrain train --help` lists all settings."
    )


def _quoted(key: str, value: str, is_text: bool) -> str:
    """``value``, in quotes where Hydra's grammar would not read it as the one value the user means (``a=b.ckpt``).

    So where a text looks like a number: ``name=2024_05_01`` is no 20240501, ``data.root=1e3`` no 1000.0.
    """
    try:
        override = OverridesParser.create().parse_override(f"{key}={value}")
        if not override.is_sweep_override() and not (is_text and isinstance(override.value(), (bool, int, float))):
            return value
    except HydraException:
        if value.startswith(("[", "{")):
            raise invalid(key, value, "a list [a, b] or a mapping {a: b}", f"{key}='[1, 2]'") from None
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _completed(config: DictConfig, schema: Schema, words: list[str]) -> DictConfig:
    """Check the values, fill in the run's name, resolve."""
    OmegaConf.set_struct(config, False)
    for key, value in leaves(config).items():
        _check_value(key, value, _setting(key, schema))
    if OmegaConf.is_missing(config.model, "name"):
        raise invalid("model", None, "the name of a model", "model=nat_tiny (`natrain models` lists them)")
    if config.data.name is None:
        choices = ", ".join(schema.groups["data"])
        raise invalid("data", None, f"one of {choices}", "data=imagefolder data.root=DIR")
    config.name = default_name(config, words) if config.name is None else str(config.name)
    try:
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ValueError(str(error)) from error
    for key in PATHS:
        if (value := OmegaConf.select(config, key)) is not None:
            if not is_remote(str(value)):
                OmegaConf.update(config, key, str(Path(str(value)).expanduser().absolute()))
    for key in ("run_dir", "resume"):  # zsh, and bash in places, leaves ~ behind = as it is
        if isinstance(config[key], str):
            config[key] = os.path.expanduser(config[key])
    return config


def default_name(config: DictConfig, words: list[str]) -> str:
    """``MODEL-DATA-HASH``: the hash covers the settings typed, less those that do not change what is learned."""
    typed = {key.lstrip("+"): value for key, _, value in (word.partition("=") for word in words)}
    relevant = sorted(f"{key}={value}" for key, value in typed.items() if not is_free(key))
    digest = hashlib.sha256("\n".join(relevant).encode()).hexdigest()[:8]
    model = "".join(character if character.isalnum() or character in "._-" else "_" for character in config.model.name)
    return f"{model}-{config.data.name}-{digest}"


def _check_value(key: str, value: object, setting: Setting) -> None:
    """The value's kind against the default's, its word against the choices; training checks ranges."""
    if key != setting.key or value == "???" or (isinstance(value, str) and "${" in value):
        return
    if value is None:
        if not setting.is_nullable and setting.default != "???":
            raise invalid(key, value, f"a value ({setting.comment})", f"{key}={setting.default_text}")
        return
    if value == "":
        raise invalid(key, value, f"a value ({setting.comment})", f"{key}=... or leave {key} out")
    if setting.choices:
        if setting.is_closed and str(value) not in setting.choices:
            best = nearest(str(value), setting.choices) or setting.choices[0]
            raise invalid(key, value, f"one of {', '.join(setting.choices)}", f"{key}={best}")
        return
    kinds = {bool: (bool,), int: (int,), float: (int, float), list: (list,), dict: (dict,)}
    allowed = kinds.get(type(setting.default))
    if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
        name = {bool: "true or false", int: "a whole number", float: "a number", list: "a list", dict: "a mapping"}
        raise invalid(key, value, name[type(setting.default)], f"{key}={setting.default_text}")
