"""Starting one process per device from a single one, the way torchrun does."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from omegaconf import DictConfig

from natrain.training.plan import device_count, launched_world

Result = TypeVar("Result")


def launch(function: Callable[[dict[str, Any]], Result], plain: dict[str, Any], trainer: DictConfig) -> Result:
    """Call ``function(plain)`` in one process per device and return what rank 0 returned.

    A single device, and a process that torchrun or srun started, call it here. The processes get the configuration
    as it is now, so that yaml files edited meanwhile change nothing.

    Args:
        function: importable by name from another process.
        plain: its argument.
        trainer: ``accelerator``, ``devices``, ``num_nodes``.

    Raises:
        ValueError, RuntimeError: what the first failing rank raised.
    """
    devices, nodes = device_count(trainer)
    if devices * nodes == 1 or launched_world() is not None:
        return function(plain)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    try:
        return elastic_launch(settings, _rank)(function, plain)[0]
    except ChildFailedError as error:
        raise _first_failure(error) from None
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None


def _rank(function: Callable[[dict[str, Any]], Result], plain: dict[str, Any]) -> Result:
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["LOCAL_WORLD_SIZE"])))
    return function(plain)


def _first_failure(error: Any) -> BaseException:
    """The exception to raise here for the rank that failed first; its traceback was printed by that rank."""
    rank, failure = error.get_first_failure()
    if failure.exitcode == 143:
        return SystemExit(143)
    text = failure.error_file_data.get("message", failure.message) if failure.error_file_data else failure.message
    text = str(text["message"] if isinstance(text, dict) else text)  # nested by a rank that raised, plain if it died
    kind, _, message = text.partition(": ")
    if kind == "ValueError":
        return ValueError(message)
    return RuntimeError(f"rank {rank} failed: {text}")


def cluster_environment() -> ClusterEnvironment:
    """Where Lightning reads ranks from; named, because inside a SLURM job it would prefer SLURM's to torchrun's."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    if launched_world() is not None:
        # Lightning's requeueing would save in the middle of an epoch and prefer that file to ours.
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()
