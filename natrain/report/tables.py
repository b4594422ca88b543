"""The tables of a page as Weights & Biases'."""

from __future__ import annotations

import importlib.util
import netrc
import os
from pathlib import Path

from natrain.errors import invalid
from natrain.report.blocks import Page


def check_wandb(argument: str, project: str) -> None:
    """Whether tables can be logged; asked before anything is measured.

    Args:
        argument: what the caller typed ``project`` after, for the error.

    Raises:
        ValueError: wandb is not installed, or has no key and is not offline.
    """
    if not project:
        raise invalid(argument, project, "the name of a project", f"{argument}=natrain")
    if importlib.util.find_spec("wandb") is None:
        raise invalid(argument, project, "nothing where wandb is not installed", "pip install wandb")
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun") or os.environ.get("WANDB_API_KEY"):
        return
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    if not any("wandb" in host for host in hosts):
        allowed = "nothing without a key of Weights & Biases, unless WANDB_MODE=offline"
        raise invalid(argument, project, allowed, "wandb login, or WANDB_MODE=offline before the command")


def log_tables(page: Page, project: str, folder: Path) -> None:
    """Log every table of ``page``; WANDB_MODE=offline keeps them in ``folder``."""
    import wandb

    with wandb.init(project=project, name=page.title, dir=str(folder), job_type="report") as run:
        for table in page.tables:
            cells = [list(row) for row in table.rows]
            run.log({table.name: wandb.Table(columns=list(table.columns), data=cells, allow_mixed_types=True)})
