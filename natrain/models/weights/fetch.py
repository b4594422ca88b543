"""From what a user names (a path, an address, ``hf-hub:NAME``) to a file or folder on this machine.

Downloads continue where they stopped. The sha256 of a file is written beside it when it arrives (or when it is first
used, if somebody put it there) and compared at every later use.
"""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

import torch

from natrain.errors import invalid
from natrain.models.published import find_published
from natrain.models.weights.files import FOLDER_FILES, INDICES, read_json, write_atomically

logger = logging.getLogger("natrain.models")
HUB = "hf-hub:"
HUB_TIMEOUT_S = 10
DESCRIPTIONS = ("config.json", "preprocessor_config.json")
BLOCK = 1 << 20


def is_remote(source: str) -> bool:
    """True for an address or a name on Hugging Face's hub, which is no path."""
    return source.startswith((HUB, "http://", "https://"))


def locate(source: str | Path, argument: str = "checkpoint") -> Path:
    """The local file or folder of ``source``, downloaded if it has to be.

    Args:
        source: a path, an ``http(s)://`` address, or ``hf-hub:OWNER/NAME`` (``@REVISION`` may follow).
        argument: the setting that named it, for errors.

    Raises:
        ValueError: no such path; a download that fails (says where to put the file); a file that changed since its
            first use.
    """
    source = str(source)
    if source.startswith(HUB):
        return _from_hub(source, argument)
    if is_remote(source):
        return _from_address(source, argument)
    path = Path(source).expanduser()
    if not path.exists():
        raise invalid(
            argument,
            source,
            "an existing file or folder, an address (https://...), or hf-hub:OWNER/NAME",
            f"{argument}=runs/NAME/checkpoints/best.ckpt",
        )
    return path


def local_place(address: str) -> Path:
    """Where the file of an address lies once downloaded: torch.hub's folder.

    The published files keep their names, so that those whom the official code downloaded are found.
    """
    name = PurePosixPath(urlsplit(address).path).name or "weights"
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if find_published(address) is None:
        folder /= f"natrain-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
    return folder / name


def _from_address(address: str, argument: str) -> Path:
    from filelock import FileLock

    target = local_place(address)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Of several processes that start together, one downloads.
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_file():
            _download(address, target, argument)
        _check_sum(target, address, argument)
    return target


def _download(address: str, target: Path, argument: str) -> None:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import logging as hub_logging

    part = target.with_name(f"{target.name}.part")
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it warns at every retry; one error says it all
    try:
        with open(part, "ab") as file:
            done = file.tell()
            if done:
                logger.info("continuing the download of %s after %.1f MB", address, done / 1e6)
            http_get(address, file, resume_size=done, displayed_filename=target.name)
    except Exception as error:  # httpx, requests or the hub's own, by its version
        if part.stat().st_size == 0:
            part.unlink()
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        raise invalid(
            argument,
            address,
            f"a file that this machine can download ({reason})",
            f"download it elsewhere and put it at {target}",
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
    part.replace(target)


def _check_sum(path: Path, address: str, argument: str) -> None:
    """Compare with the sum of the first use, and with the one that torch.hub's rule put in its name."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    found = digest.hexdigest()
    record = path.with_name(f"{path.name}.sha256")
    named = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    expected = record.read_text().split()[0] if record.is_file() else named[1] if named else found
    if not found.startswith(expected):
        raise invalid(
            argument,
            address,
            f"the file of its first use; {path} has sha256 {found}, expected {expected}",
            f"delete {path} and its .sha256 to download it again",
        )
    if not record.is_file():
        write_atomically(record, lambda out: out.write(f"{found}  {path.name}\n".encode()))


def _from_hub(source: str, argument: str) -> Path:
    """The hub library's folder of one revision: weights and what describes them; from its cache without network."""
    from huggingface_hub import HfApi, hf_hub_download

    name, _, revision = source[len(HUB) :].partition("@")
    options = {"repo_id": name, "revision": revision or None}
    try:
        listed = HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT_S).siblings
        there = {entry.rfilename for entry in listed}
        weights = next((file for file in FOLDER_FILES if file in there), None)
        if weights is None:
            raise LookupError(f"it holds none of {', '.join(FOLDER_FILES)}")
        path = Path(hf_hub_download(filename=weights, **options))
        parts = read_json(path, argument).get("weight_map", {}).values() if weights in INDICES else ()
        for file in [*sorted(set(parts)), *(file for file in DESCRIPTIONS if file in there)]:
            hf_hub_download(filename=file, **options)
        return path.parent
    except Exception as error:  # no network, no such repository, no permission: each library version names it anew
        for file in FOLDER_FILES:
            cached = _cached(file, options)
            if cached is not None:
                logger.info("%s from the cache, as the hub cannot be asked", source)
                return cached.parent
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
        raise invalid(
            argument,
            source,
            f"a model on Hugging Face's hub that this machine can download ({reason})",
            f"download config.json and model.safetensors elsewhere into a folder, then {argument}=FOLDER",
        ) from None


def _cached(file: str, options: dict[str, str | None]) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(filename=file, **options)
    except ValueError:  # a name that the hub does not allow
        return None
    return Path(found) if isinstance(found, str) else None
