"""Optuna chooses the settings of trainings; its study lies beside their rows, so that the same command goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from natrain.bench.jobs import Cluster, Job, Record, run_jobs
from natrain.errors import invalid

_RUN = "run"  # attribute of a trial: the folder of the trial that it repeats


def check_space(search: Mapping[str, Any]) -> None:
    """Raises: ValueError: a space that is neither a list nor a range, or a range that holds nothing."""
    for key, space in search.items():
        if not (isinstance(space, list) and space) and not _is_range(space):
            allowed = "a list of values, or {low: , high: } with log: true (low above 0) or step: above 0"
            raise invalid(f"search.{key}", space, allowed, "[0.0, 0.2]")


def _is_range(space: Any) -> bool:
    if not isinstance(space, dict) or not {"low", "high"} <= set(space) <= {"low", "high", "log", "step"}:
        return False
    low, high, step, log = space["low"], space["high"], space.get("step"), space.get("log", False)
    if not all(type(value) in (int, float) for value in (low, high, *([] if step is None else [step]))):
        return False
    return (
        low <= high and isinstance(log, bool) and (not log or (low > 0 and step is None)) and (step is None or step > 0)
    )


def examples(search: Mapping[str, Any]) -> Iterator[list[str]]:
    """Words that hold every value of a list and both ends of a range at least once."""
    values = {key: space if isinstance(space, list) else [space["low"], space["high"]] for key, space in search.items()}
    for index in range(max(map(len, values.values()), default=0)):
        yield [f"{key}={own[index % len(own)]}" for key, own in values.items()]


def run_search(
    name: str,
    search: Mapping[str, Any],
    trials: int,
    job_of: Callable[[Sequence[str], str, int], Job],
    cluster: Cluster,
    out: Path,
    found: Mapping[str, Mapping[str, str]],
    record: Record,
    has_time: Callable[[], bool],
) -> bool:
    """Train until so many trials have a row, print the best.

    Args:
        name: the study's.
        job_of: (words, folder, number) -> the training of a trial.
        found: rows that count already, by the name of their run folder. Trials that lack one, since they were killed or
            are to be run again, are trained with the same settings where they stopped.
        record: called with each job and its result.
        has_time: asked before each training.

    Returns:
        Whether all were trained, not stopped by ``has_time``.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = f"sqlite:///{(out / 'optuna.db').resolve()}"
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    # Another seed each time: a sampler that starts anew would propose again what it proposed at first.
    study.sampler = optuna.samplers.TPESampler(seed=len(study.trials))
    _redo(study, found)
    left = trials - len(found)
    while left > 0:
        if not has_time():
            return False
        width = min(left, cluster.parallel if cluster.name else 1)
        asked = [study.ask() for _ in range(width)]
        jobs = []
        for trial in asked:
            chosen = [f"{key}={_suggest(trial, key, space)}" for key, space in search.items()]
            folder = out / "runs" / _run(trial)
            jobs.append(job_of(chosen, str(folder.resolve()), trial.number))
        for trial, (job, result) in zip(asked, run_jobs(cluster, jobs, out), strict=True):
            record(job, result)
            _tell(study, trial.number, result)
        left -= width
    if any(trial.state == optuna.trial.TrialState.COMPLETE for trial in study.trials):
        best = study.best_trial
        words = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"best: top-1 {best.value:.2f} %, trial {best.number}: {words}")
    return True


def _run(trial: Any) -> str:
    return trial.user_attrs.get(_RUN, f"trial-{trial.number}")


def _redo(study: Any, found: Mapping[str, Mapping[str, str]]) -> None:
    """Ends what a killed process left running, and asks again for whatever of the study has no row."""
    import optuna

    latest = {_run(trial): trial for trial in study.trials}
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            _tell(study, trial.number, found.get(_run(trial), {}))
    for run, trial in latest.items():
        if run not in found and trial.state != optuna.trial.TrialState.WAITING and trial.params:
            study.enqueue_trial(trial.params, user_attrs={_RUN: run})


def _tell(study: Any, number: int, result: Mapping[str, Any]) -> None:
    import optuna

    if result.get("top1"):
        study.tell(number, float(result["top1"]))
    else:
        study.tell(number, state=optuna.trial.TrialState.FAIL)


def _suggest(trial: Any, key: str, space: Any) -> Any:
    if isinstance(space, list):
        return trial.suggest_categorical(key, space)
    is_whole = all(isinstance(space.get(name, 1), int) for name in ("low", "high", "step"))
    return (trial.suggest_int if is_whole else trial.suggest_float)(key, **space)
