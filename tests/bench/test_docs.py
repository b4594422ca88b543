"""The commands of docs/ablation.md run, and its tables name what there is."""

from __future__ import annotations

import re

import pytest
import yaml

from natrain.bench.peers import PEERS
from natrain.bench.plan import make_plan
from natrain.cli.settings import config_folder
from tests.test_readme import bash


@pytest.fixture(scope="module")
def text(repository) -> str:
    return (repository / "docs" / "ablation.md").read_text(encoding="utf-8")


def test_every_ablation_and_peer_is_named(text):
    named = set(re.findall(r"`([\w.-]+)`", text))
    assert {path.stem for path in (config_folder() / "ablation").glob("*.yaml")} <= named
    assert set(PEERS) <= named


def test_the_yaml_is_a_plan(text):
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.S)
    plan = make_plan("docs", yaml.safe_load(block), block, {})
    assert len(plan.cases) == 12 and plan.arms[2].commit == "HEAD~3" and plan.baseline == "naive"


@pytest.mark.slow
def test_the_commands_run_in_order(text, repository, tmp_path):
    (tmp_path / "configs").symlink_to(repository / "configs")
    said = ""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in filter(str.strip, block.splitlines()):
            device = " device=cpu" if "natrain bench" in line or "natrain ablate" in line else ""
            said += bash(line + device, tmp_path)
    assert "of the floor" in said and "problems are left, run it again" in said
    assert (tmp_path / "runs" / "ablations" / "mine" / "report.html").is_file()
    assert list((tmp_path / "runs" / "ablations").glob("models-*/models.csv"))
