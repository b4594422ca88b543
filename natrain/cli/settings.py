"""The table of settings, read from the comments of the yaml files: one source for help, checks and suggestions."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

import natrain

_LINE = re.compile(r"^(?P<indent> *)(?P<key>[A-Za-z_]\w*):(?P<value>[^#]*)(?:#\s*(?P<comment>.*))?$")
_CHOICES = re.compile(r"^(?P<words>[\w.-]+(?: \| [\w.-]+)+)(?:: |$)|^(?P<placeholder>[A-Z]+): ")


@dataclass(frozen=True)
class Setting:
    """One leaf of the configuration: ``key`` is dotted, ``choices`` the words and PLACEHOLDERS its comment lists."""

    key: str
    default: object
    comment: str
    choices: tuple[str, ...]

    @property
    def is_closed(self) -> bool:
        """True where only the listed words are allowed."""
        return bool(self.choices) and not any(word.isupper() for word in self.choices)

    @property
    def is_text(self) -> bool:
        """True for names, paths and words, also where they look like numbers."""
        return isinstance(self.default, str) or bool({"NAME", "DIR", "FILE", "PATH"} & set(self.choices))

    @property
    def default_text(self) -> str:
        """The default as one types it."""
        return json.dumps(self.default).strip('"').replace(" ", "")

    @property
    def is_nullable(self) -> bool:
        return self.default is None or "null:" in self.comment


@dataclass(frozen=True)
class Schema:
    """All settings by key, the titles of sections, and the group choices with their one-line meanings."""

    settings: dict[str, Setting]
    titles: dict[str, str]
    groups: dict[str, dict[str, str]]


def config_folder() -> Path:
    """The folder of yaml files: beside the package in a clone, inside it in a wheel."""
    package = Path(natrain.__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_schema(extra: Path | None = None) -> Schema:
    """Read train.yaml and every group file; ``extra`` is a user's folder, which may add group choices."""
    root = config_folder()
    settings, titles = _read_file(root / "train.yaml", "")
    groups: dict[str, dict[str, str]] = {}
    for default in OmegaConf.load(root / "train.yaml").defaults:
        if default == "_self_":
            continue
        ((group, chosen),) = default.items()
        groups[group] = {}
        if chosen is not None:
            assert _is_global(root / group / f"{chosen}.yaml")
            for key, setting in _read_file(root / group / f"{chosen}.yaml", "")[0].items():
                settings[key] = replace(settings[key], default=setting.default)
        for folder in filter(None, (root, extra)):
            for path in sorted((folder / group).glob("*.yaml")):
                groups[group][path.stem] = _first_comment(path)
                if folder == root:
                    own, _ = _read_file(path, "" if _is_global(path) else f"{group}.")
                    settings |= {key: setting for key, setting in own.items() if key not in settings}
    return Schema(settings, titles, groups)


def _is_global(path: Path) -> bool:
    return "@package _global_" in path.read_text(encoding="utf-8")


def _first_comment(path: Path) -> str:
    """The first comment line of a yaml file, its one-line meaning."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""


def _read_file(path: Path, prefix: str) -> tuple[dict[str, Setting], dict[str, str]]:
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    settings: dict[str, Setting] = {}
    titles: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _LINE.match(line)
        if match is None or match["key"] == "defaults":
            continue
        indent = len(match["indent"])
        parents = [parent for parent in parents if parent[0] < indent]
        path_of_key = [name for _, name in parents] + [match["key"]]
        key = prefix + ".".join(path_of_key)
        comment = match["comment"] or ""
        if not match["value"].strip():
            parents.append((indent, match["key"]))
            titles[key] = comment
            continue
        value = values
        for name in path_of_key:
            value = value[name]
        settings[key] = Setting(key, value, comment, _choices(comment))
    return settings, titles


def _choices(comment: str) -> tuple[str, ...]:
    match = _CHOICES.match(comment)
    if match is None:
        return ()
    return tuple(match["words"].split(" | ")) if match["words"] else (match["placeholder"],)


def settings_text(schema: Schema) -> str:
    """The groups with their choices and all settings with default and meaning, for ``--help``."""
    lines = ["groups (group=choice; settings typed beside it win):"]
    width = max(len(name) for choices in schema.groups.values() for name in choices)
    for group, choices in schema.groups.items():
        lines.append(f"  {group}")
        lines += [f"    {name:{width}}  {meaning}" for name, meaning in choices.items()]
    lines += ["", "settings (key=default  meaning):"]
    section = ""
    for setting in schema.settings.values():
        head = setting.key.partition(".")[0] if "." in setting.key else ""
        if head != section:
            section = head
            lines.append(f"  {head}: {schema.titles.get(head, '')}")
        shown = f"{setting.key}={setting.default_text}"
        lines.append(f"    {shown:43} {setting.comment}")
    return "\n".join(lines)
