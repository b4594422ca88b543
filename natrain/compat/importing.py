"""``import natten`` for code that knows nothing of natrain: module trees, the import hook, the package's metadata."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from natrain.errors import invalid

NAME = "natten"
# The releases of NATTEN by their public interface: first release of each, newest first, and the module that has it.
INTERFACES = (
    ((0, 21, 5), "v021"),
    ((0, 20, 0), "v020"),
    ((0, 17, 0), "v017"),
    ((0, 15, 0), "v015"),
    ((0, 14, 0), "v014"),
)
# What a short version number means, where its line of releases changed its interface.
NEWEST = {"0.21": (0, 21, 7)}


def interface_of(version: str) -> ModuleType:
    """The module with the interface that a version of NATTEN had.

    Raises:
        ValueError: no such version, or one before 0.14.
    """
    try:
        parts = NEWEST.get(version) or tuple(int(part) for part in version.split(".")[:3])
        first_two = parts[:2]
    except (AttributeError, ValueError):
        parts = first_two = ()
    for first, module in INTERFACES:
        if (0, 14) <= first_two < (0, 22) and (*parts, 0)[:3] >= first:
            return importlib.import_module(f"natrain.compat.{module}")
    raise invalid("version", version, "a version of NATTEN from 0.14 to 0.21", 'version="0.17"')


def build_tree(name: str, interface: ModuleType) -> dict[str, ModuleType]:
    """The package ``name`` and its modules, with the names that ``interface.LAYOUT`` lists for each."""
    tree: dict[str, ModuleType] = {}
    for path in sorted(interface.LAYOUT):
        full = f"{name}.{path}" if path else name
        module = ModuleType(full, interface.__doc__)
        members: dict[str, Any] = interface.LAYOUT[path]
        module.__dict__.update(members, __all__=sorted(members))
        if any(other.startswith(f"{path}." if path else "") and other != path for other in interface.LAYOUT):
            module.__path__ = []
        tree[full] = module
        parent, _, child = full.rpartition(".")
        if parent in tree:
            setattr(tree[parent], child, module)
    tree[name].__version__ = interface.VERSION
    return tree


class _Distribution(importlib.metadata.Distribution):
    """Metadata for code that asks ``importlib.metadata.version("natten")`` before it imports."""

    def __init__(self, version: str) -> None:
        self._version = version

    def read_text(self, filename: str) -> str | None:
        summary = "Summary: natrain's stand-in for NATTEN (natrain.compat)"
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {self._version}\n{summary}\n",
            "top_level.txt": f"{NAME}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{NAME} is natrain's stand-in and has no files")


class Finder(importlib.metadata.DistributionFinder, Loader):
    """Finds ``natten`` and its modules in one tree; everything else is left to the finders behind it."""

    def __init__(self, interface: ModuleType) -> None:
        self.interface = interface
        self.tree = build_tree(NAME, interface)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname not in self.tree:
            return None
        is_package = hasattr(self.tree[fullname], "__path__")
        return ModuleSpec(fullname, self, origin="natrain.compat", is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.tree[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """The tree is complete when it is built."""

    def find_distributions(self, context: Any = importlib.metadata.DistributionFinder.Context()):  # noqa: B008
        if context.name is None or context.name.lower() == NAME:
            yield _Distribution(self.interface.VERSION)


def installed() -> Finder | None:
    """The finder that answers for ``natten`` in this process."""
    return next((finder for finder in sys.meta_path if isinstance(finder, Finder)), None)


def put_in_place(interface: ModuleType) -> None:
    """Make ``import natten`` give ``interface`` from here on.

    Raises:
        ValueError: the real NATTEN, or another version of the stand-in, is imported already.
    """
    current = installed()
    if current is not None and current.interface is interface:
        return
    if NAME in sys.modules:
        loaded = getattr(sys.modules[NAME], "__version__", "an unknown version")
        raise invalid(
            "version",
            interface.VERSION,
            f"a call before the first `import natten` (this process has {loaded} of it)",
            "natrain.compat.install() at the top of the program",
        )
    if current is not None:
        sys.meta_path.remove(current)
    sys.meta_path.insert(0, Finder(interface))
    importlib.invalidate_caches()
