"""Addresses, Hugging Face's hub and torch.hub's folder, against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch

from natrain.models.published import PUBLISHED, SITE, find_published
from natrain.models.registry import pretrained_source
from natrain.models.weights import load_weights
from natrain.models.weights.fetch import local_place, locate
from natrain.training.build import load_initial_weights


class Server:
    """Serves a folder, notes the requests, and breaks every transfer once it has sent ``left`` bytes in all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.left, self.requests = folder, None, []
        outer = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *arguments) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                wanted = self.headers.get("Range", "")
                outer.requests.append((self.command, self.path, wanted))
                file = outer.folder / self.path.lstrip("/")
                if not file.is_file():
                    self.send_response(404)
                    # What the hub says of a missing file in a repository that exists.
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                content = file.read_bytes()
                first = int(wanted.removeprefix("bytes=").split("-")[0] or 0) if wanted else 0
                self.send_response(206 if wanted else 200)
                if wanted:
                    self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
                self.send_header("Content-Length", str(len(content) - first))
                self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", "1" * 40)
                self.end_headers()
                if with_body:
                    end = len(content) if outer.left is None else min(len(content), first + outer.left)
                    self.wfile.write(content[first:end])
                    if outer.left is not None:
                        outer.left -= end - first
                    if end < len(content):
                        self.close_connection = True

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    made = Server(tmp_path / "served")
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(autouse=True)
def hub_folder(tmp_path: Path) -> Iterator[Path]:
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield tmp_path / "hub" / "checkpoints"
    torch.hub.set_dir(before)


def digits() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("nat_digits", kernel="reference")


def test_an_address_is_downloaded_once(server: Server) -> None:
    torch.save(digits().state_dict(), server.folder / "mine.pth")
    address = f"{server.address}/mine.pth"
    weights = load_weights(address)
    assert weights.model_name == "nat_digits" and weights.source == address
    assert all(torch.equal(tensor, weights.state[name]) for name, tensor in digits().state_dict().items())
    asked = len(server.requests)
    model = timm.create_model("nat_digits")
    assert load_initial_weights(model, address) == []
    assert torch.equal(model.head.weight, digits().head.weight)
    assert len(server.requests) == asked, "the second use reads the local file"


def test_a_broken_download_continues_where_it_stopped(server: Server) -> None:
    content = os.urandom(300_000)
    (server.folder / "w.bin").write_bytes(content)
    address = f"{server.address}/w.bin"
    target = local_place(address)
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(content[:120_000])  # what an earlier, killed download left
    assert locate(address).read_bytes() == content
    assert ("GET", "/w.bin", "bytes=120000-") in server.requests
    assert not part.exists()


def test_a_download_that_breaks_leaves_a_part_and_no_file(server: Server, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    content = os.urandom(300_000)
    (server.folder / "w.bin").write_bytes(content)
    address = f"{server.address}/w.bin"
    target = local_place(address)
    server.left = 35_000
    with pytest.raises(ValueError, match=rf"checkpoint=.*w\.bin.*can download.*put it at {target}"):
        locate(address)
    assert not target.exists()
    done = target.with_name("w.bin.part").stat().st_size
    assert done == 30_000
    server.left = None
    assert locate(address).read_bytes() == content
    assert server.requests[-1] == ("GET", "/w.bin", f"bytes={done}-")


def test_a_file_that_changed_since_its_first_use_is_refused(server: Server) -> None:
    (server.folder / "w.bin").write_bytes(b"first")
    address = f"{server.address}/w.bin"
    path = locate(address)
    record = path.with_name("w.bin.sha256")
    assert record.read_text().split()[0] == hashlib.sha256(b"first").hexdigest()
    path.write_bytes(b"tampered")
    with pytest.raises(ValueError, match=r"sha256 .* expected .*delete .*w\.bin and its \.sha256"):
        locate(address)
    path.unlink()
    record.unlink()
    assert locate(address).read_bytes() == b"first"


def test_a_sum_in_the_name_is_checked_at_the_first_use(server: Server) -> None:
    good = hashlib.sha256(b"weights").hexdigest()[:8]
    for name in (f"w-{good}.pth", "w-00000000.pth"):
        (server.folder / name).write_bytes(b"weights")
    assert locate(f"{server.address}/w-{good}.pth").read_bytes() == b"weights"
    with pytest.raises(ValueError, match="expected 00000000"):
        locate(f"{server.address}/w-00000000.pth")


def test_without_network_one_error_says_where_to_put_the_file(hub_folder: Path, monkeypatch, capfd) -> None:
    def no_network(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", no_network)
    place = hub_folder / "dinat_mini_in1k_224.pth"
    with pytest.raises(ValueError, match=rf"pretrained=.*Name or service not known.*put it at {place}"):
        timm.create_model("dinat_mini", pretrained=True)
    assert capfd.readouterr().err == "" and not list(hub_folder.glob("*.part"))
    # The file put there by hand is used, and its sum is remembered.
    state = timm.create_model("dinat_mini").state_dict()
    torch.save(state, place)
    model = timm.create_model("dinat_mini", pretrained=True)
    assert torch.equal(model.head.weight, state["head.weight"])
    assert place.with_name(f"{place.name}.sha256").is_file()


HUB_CODE = """
from natrain.models.weights import load_weights
w = load_weights("hf-hub:somebody/digits")
print(w.model_name, w.layout, w.class_names[2], len(w.state))
try:
    load_weights("hf-hub:somebody/none")
except ValueError as error:
    print(error)
"""


def test_a_name_on_the_hub(server: Server, tmp_path: Path) -> None:
    """In a process of its own, since the hub's library reads its address when it is imported; then without the hub."""
    folder = server.folder / "somebody" / "digits" / "resolve" / "main"
    folder.mkdir(parents=True)
    torch.save(digits().state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps({"architecture": "nat_digits", "label_names": list("ABCDEFGHIJ")}))
    files = [{"rfilename": name} for name in ("README.md", "config.json", "pytorch_model.bin")]
    about = {"id": "somebody/digits", "sha": "1" * 40, "siblings": files}
    (server.folder / "api" / "models" / "somebody").mkdir(parents=True)
    (server.folder / "api" / "models" / "somebody" / "digits").write_text(json.dumps(about))
    environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "hf")}
    for is_offline in ("0", "1"):
        environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": is_offline}
        done = subprocess.run([sys.executable, "-c", HUB_CODE], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first == f"nat_digits timm C {len(digits().state_dict())}"
        assert "hf-hub:somebody/none" in second and "then checkpoint=FOLDER" in second
    asked = [path for _, path, _ in server.requests]
    assert not any("README" in path or "safetensors" in path for path in asked), "what is not needed is not asked for"


def test_processes_that_start_together_download_once(server: Server) -> None:
    (server.folder / "w.bin").write_bytes(os.urandom(300_000))
    address = f"{server.address}/w.bin"
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(locate, [address] * 4))
    assert len(set(found)) == 1
    assert [command for command, _, _ in server.requests].count("GET") == 1


@pytest.mark.parametrize(
    ("tag", "message"),
    [("in1kk", "Try: model=dinat_mini.in1k"), ("in22k_ft_in1k", "pretrained tag of dinat_mini: one of in1k")],
)
def test_an_unknown_tag_suggests_the_nearest(tag: str, message: str) -> None:
    for ask in (
        lambda: timm.create_model(f"dinat_mini.{tag}"),
        lambda: timm.create_model("dinat_mini", pretrained_cfg=tag),
        lambda: pretrained_source(f"dinat_mini.{tag}"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_published_files_are_known_by_their_names() -> None:
    names = [file.place.rsplit("/")[-1] for tags in PUBLISHED.values() for file in tags.values()]
    assert len(names) == len(set(names)) == 26
    assert find_published("/home/me/dinat_large_in22k_in1k_384_11x11.pth") == ("dinat_large", "in22k_ft_in1k_384_k11")
    assert find_published(SITE + "nat/checkpoints/CLS/nat_mini.pth") == ("nat_mini", "in1k")
    assert find_published("nat_mini_of_mine.pth") is None
    for variant, tags in PUBLISHED.items():
        for tag in tags:
            cfg = timm.models.get_pretrained_cfg(f"{variant}.{tag}")
            assert cfg.license == "mit" and bool(cfg.url) != bool(cfg.file)


def test_a_tag_brings_what_its_weights_were_trained_with() -> None:
    with torch.device("meta"):
        at_384 = timm.create_model("dinat_large.in22k_ft_in1k_384")
        k11 = timm.create_model("dinat_large.in22k_ft_in1k_384_k11")
        own = timm.create_model("dinat_large.in22k_ft_in1k_384", dilations=1)
        in22k = timm.create_model("dinat_s_large.in22k", num_classes=21841)
    plan = [[block.attn.window.dilation[0] for block in stage.blocks] for stage in at_384.levels]
    assert plan == [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]
    assert at_384.pretrained_cfg["input_size"] == (3, 384, 384) and at_384.pretrained_cfg["crop_pct"] == 1.0
    assert sum(parameter.numel() for parameter in k11.parameters()) == 201_144_250
    assert k11.levels[0].blocks[1].attn.window.dilation == (8, 8)
    assert own.levels[0].blocks[1].attn.window.dilation == (1, 1), "what the caller says wins"
    assert in22k.pretrained_cfg["num_classes"] == 21841
