"""Short trainings and searches: what trains, what their rows say, and their statistics."""

from __future__ import annotations

import math
import random

import pytest

from natrain.bench import jobs, models
from natrain.bench.jobs import Job
from natrain.bench.rows import read as read_rows
from natrain.bench.training import COLUMNS, comparison, paired_interval, read_training_plan, run_training
from natrain.cli import main
from natrain.cli.compose import compose_config
from natrain.cli.settings import config_folder

TRAINING, SEARCH = (config_folder() / "ablation" / f"{name}.yaml" for name in ("training", "search"))
# Two steps of the small model on the digits.
TINY = [
    "model=nat_digits", "data=digits", "recipe=digits", "global_batch=8", "data.workers=0", "trainer.accelerator=cpu",
    "trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.progress_bar=false", "schedule.warmup_epochs=0",
    "schedule.epochs=1", "schedule.cooldown_epochs=0", "trainer.log_every_steps=1",
]  # fmt: skip


def test_the_interval_holds_the_true_difference_about_95_times_in_100():
    """Five normal differences around 1: 2,000 samples; three standard errors are 1.5 %."""
    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        _, low, high = paired_interval([rng.gauss(1, 2) for _ in range(5)])
        inside += low <= 1 <= high
    assert 0.935 <= inside / 2000 <= 0.965
    # scipy.stats.ttest_1samp([1, 2, 4]).confidence_interval() says the same.
    assert paired_interval([1.0, 2.0, 4.0]) == pytest.approx((2.33333, -1.46125, 6.12791), abs=1e-3)
    assert paired_interval([1.0]) == (1.0, -math.inf, math.inf)


def test_comparison_pairs_by_seed():
    rows = [
        {"kernel": kernel, "seed": str(seed), "trial": "", "status": "ok", "top1": top1, "images_per_s": speed}
        for kernel, seed, top1, speed in [
            ("a", 0, 50, 100), ("a", 1, 60, 100), ("a", 2, 70, 100),
            ("b", 1, 61, 200), ("b", 0, 51, 200), ("b", 9, 1, 1),
        ]
    ]  # fmt: skip
    rows.append({**rows[3], "trial": "0", "seed": "2", "top1": 0})
    (line,) = comparison(rows, "a")
    assert line.startswith("b against a, 2 seeds: top-1 +1.00 points (95 %: +1.00 to +1.00), 2.00x the images/s")


@pytest.mark.slow
def test_trainings_of_two_kernels(tmp_path, capsys):
    words = [f"ablation={TRAINING}", "kernels=cpu,reference", "seeds=2", f"out={tmp_path}", *TINY]
    assert main(["ablate", *words]) == 0
    found = list(read_rows(tmp_path / "training.csv", COLUMNS))
    assert [(row["kernel"], row["seed"], row["status"]) for row in found] == [
        ("cpu", "0", "ok"), ("reference", "0", "ok"), ("cpu", "1", "ok"), ("reference", "1", "ok"),
    ]  # fmt: skip
    assert all(0 <= float(row["top1"]) <= 100 and float(row["seconds"]) > 0 for row in found)
    assert "reference against cpu, 2 seeds: top-1" in capsys.readouterr().out
    assert (tmp_path / "runs" / "cpu-0" / "metrics.csv").is_file()
    assert main(["ablate", *words]) == 0
    assert "4 trainings in all, 0 to run" in capsys.readouterr().out


@pytest.mark.slow
def test_optuna_searches_and_goes_on(tmp_path, capsys):
    pytest.importorskip("optuna")
    words = [f"ablation={SEARCH}", "kernels=cpu", f"out={tmp_path}", *TINY]
    assert main(["ablate", *words, "trials=2"]) == 0
    found = list(read_rows(tmp_path / "training.csv", COLUMNS))
    assert [row["trial"] for row in found] == ["0", "1"]
    rates = [float(row["settings"].partition("optim.lr=")[2].split()[0]) for row in found]
    assert len(set(rates)) == 2 and all(1e-4 <= rate <= 4e-3 for rate in rates)
    assert "best: top-1" in capsys.readouterr().out
    assert main(["ablate", *words, "trials=2"]) == 0
    assert "2 trials in all, 0 to run" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_training_is_a_row_and_jobs_run_on_submitit(tmp_path):
    pytest.importorskip("submitit")
    bad = ["kernels=cpu,naive", "seeds=1", "cluster=local", "parallel=2"]
    assert main(["ablate", f"ablation={TRAINING}", *bad, f"out={tmp_path}", *TINY]) == 1  # of naive
    found = {row["kernel"]: row for row in list(read_rows(tmp_path / "training.csv", COLUMNS))}
    assert found["cpu"]["status"] == "ok"
    assert found["naive"]["status"] == "failed" and "device cpu" in found["naive"]["reason"]
    assert list((tmp_path / "jobs").glob("*_submitted.pkl"))


def test_a_job_is_what_one_would_type():
    command = Job("naive", 3, ("model=nat_cifar",), "/x/runs/naive-3").command()
    assert command[1:] == [
        "-m", "natrain", "train", "model=nat_cifar",
        "kernel=naive", "seed=3", "run_dir=/x/runs/naive-3", "resume=auto",
    ]  # fmt: skip


SPACE = """\
kind: training
kernels: [auto]
seeds: 1
trials: 4
settings: [model=nat_digits, data=digits, recipe=digits, optim.lr=1e-3]
search: {kernel: [cpu, reference], seed: [1, 2]}
"""


@pytest.fixture
def trained(monkeypatch) -> list[list[str]]:
    """The commands of trainings that were not run; each reaches an accuracy of its seed."""
    commands = []

    def run_job(job: Job) -> dict[str, str]:
        commands.append(job.command())
        return {"status": "ok", "top1": str(job.seed), "images_per_s": "1", "seconds": "1"}

    monkeypatch.setattr(jobs, "run_job", run_job)
    return commands


def test_a_searched_kernel_and_seed_are_those_that_train(tmp_path, trained, capsys):
    """Each is said once to `natrain train`, and the row and the best line say the same."""
    pytest.importorskip("optuna")
    path = tmp_path / "mine.yaml"
    path.write_text(SPACE)
    assert run_training(read_training_plan(path, []), tmp_path / "out", compose_config) == 0
    found = list(read_rows(tmp_path / "out" / "training.csv", COLUMNS))
    told = [[word for word in command if word.startswith(("kernel=", "seed="))] for command in trained]
    assert [[f"kernel={row['kernel']}", f"seed={row['seed']}"] for row in found] == told
    assert {row["seed"] for row in found} <= {"1", "2"} and len(found) == 4
    best = max(found, key=lambda row: float(row["top1"]))
    said = capsys.readouterr().out.rpartition("best: ")[2]
    assert f"seed={best['seed']}" in said and f"top-1 {float(best['top1']):.2f} %" in said


def test_a_typed_kernel_and_seed_of_a_search_are_those_that_train(tmp_path, trained):
    pytest.importorskip("optuna")
    path = tmp_path / "mine.yaml"
    path.write_text(SPACE.replace("{kernel: [cpu, reference], seed: [1, 2]}", "{optim.weight_decay: [0.1, 0.2]}"))
    plan = read_training_plan(path, ["kernel=reference", "seed=7", "trials=1"])
    assert run_training(plan, tmp_path / "out", compose_config) == 0
    (command,), (row,) = trained, list(read_rows(tmp_path / "out" / "training.csv", COLUMNS))
    assert [word for word in command if word.startswith(("kernel=", "seed="))] == ["kernel=reference", "seed=7"]
    assert (row["kernel"], row["seed"]) == ("reference", "7")
    assert row["settings"].startswith("model=nat_digits data=digits recipe=digits optim.lr=1e-3 optim.weight_decay=0.")


def test_what_is_searched_cannot_be_typed_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(SPACE)
    with pytest.raises(ValueError, match="seed='7' is not allowed.*no seed="):
        read_training_plan(path, ["seed=7"])


PAIRED = """\
kind: training
kernels: [cpu]
seeds: 1
settings: [model=nat_digits, data=digits, recipe=digits]
"""


@pytest.fixture
def ablate(tmp_path):
    """`natrain ablate` of a comparison of trainings, with further words."""
    (tmp_path / "mine.yaml").write_text(PAIRED)
    return lambda *words: main(["ablate", f"ablation={tmp_path}/mine.yaml", f"out={tmp_path}/out", *words])


def test_more_seeds_and_kernels_add_to_a_folder(tmp_path, trained, ablate, capsys):
    assert ablate() == 0
    assert ablate("seeds=2") == 0
    assert ablate("seeds=2", "kernels=cpu,reference") == 0
    said = capsys.readouterr().out
    assert "2 trainings in all, 1 to run, about" in said and "4 trainings in all, 2 to run, about" in said
    assert "1 left, about" in said
    found = [(row["kernel"], row["seed"]) for row in list(read_rows(tmp_path / "out" / "training.csv", COLUMNS))]
    assert found == [("cpu", "0"), ("cpu", "1"), ("reference", "0"), ("reference", "1")] and len(trained) == 4
    assert ablate("optim.lr=1e-4") == 2
    assert "same settings" in capsys.readouterr().err and len(trained) == 4


def test_failed_trainings_are_run_again_when_asked(tmp_path, trained, ablate, monkeypatch, capsys):
    """All failed: exit code 1, and again the second time, which runs nothing."""
    works = jobs.run_job
    monkeypatch.setattr(jobs, "run_job", lambda job: {"status": "failed", "reason": "no"})
    assert ablate() == 1 and ablate() == 1
    assert "1 trainings in all, 0 to run" in capsys.readouterr().out
    monkeypatch.setattr(jobs, "run_job", works)
    assert ablate("--retry-failed") == 0
    assert [row["status"] for row in list(read_rows(tmp_path / "out" / "training.csv", COLUMNS))] == ["failed", "ok"]
    assert ablate("--retry-failed") == 0 and len(trained) == 1


def test_a_time_limit_stops_between_trainings(trained, ablate, capsys):
    """One training is guessed to take longer than a second."""
    assert ablate("--time-limit", "1") == 3
    assert not trained and "1 are left, run it again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lrr=1"], "optim.lr"),
        (["optim.lr=-1"], "optim.lr"),
        (["data=imagefolder"], "data.root"),
        (["data=cifar10", "model=nat_cifar", "data.root=/no/such/folder"], "/no/such/folder"),
        (["global_batch=100000"], "global_batch"),
        (["--only", "dtype=fp16"], "--only=['dtype=fp16'] is not allowed: expected no such option where kind is trai"),
        (["--arms", "cpu"], "kernels=cpu,reference"),
        (["--threads", "2"], "OMP_NUM_THREADS=2"),
        (["--chunk", "3"], "parallel=4"),
        (["devices=2"], "trainer.devices=4"),
        (["device=cpu", "trainer.accelerator=auto"], "device='cpu' is not allowed"),
        (["cluster=local", "--time-limit", "5"], "cluster_options.timeout_min=60"),
        (["cluster=local", "cluster_options.timeout_mn=60"], "timeout_min"),
        (["cluster=slurm"], "cluster='slurm' is not allowed: expected a machine of SLURM, with srun"),
        (["baseline=reference"], "baseline=cpu"),
        (["trials=3"], "seeds=5"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_training(words, message, trained, ablate, capsys):
    assert ablate(*words) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not trained


def test_the_device_that_is_asked_for_trains(tmp_path, trained, ablate):
    assert ablate("device=cpu") == 0
    assert "trainer.accelerator=cpu" in trained[0]
    assert "trainer.accelerator=cpu" in list(read_rows(tmp_path / "out" / "training.csv", COLUMNS))[0]["settings"]


def test_options_of_a_cluster_are_typed(tmp_path):
    plan = read_training_plan(TRAINING, ["cluster=local", "cluster_options.timeout_min=60", "cluster_options.nodes=1"])
    assert plan.cluster.executor(tmp_path)._executor.parameters["timeout_min"] == 60


def test_a_setting_that_a_search_may_choose_is_checked_first(tmp_path, trained, capsys):
    pytest.importorskip("optuna")
    path = tmp_path / "mine.yaml"
    path.write_text(SPACE.replace("seed: [1, 2]", "optim.lrr: [1, 2]"))
    assert main(["ablate", f"ablation={path}", f"out={tmp_path}/out"]) == 2
    assert "did you mean 'optim.lr'?" in capsys.readouterr().err and not trained
    path.write_text(SPACE.replace("seed: [1, 2]", "augment.mixup: [0.1, -2.0]"))
    assert main(["ablate", f"ablation={path}", f"out={tmp_path}/out"]) == 2
    assert "augment.mixup=-2.0 is not allowed" in capsys.readouterr().err and not trained


def test_more_trials_are_not_the_first_ones_again(tmp_path, trained):
    pytest.importorskip("optuna")
    path = tmp_path / "mine.yaml"
    path.write_text(
        SPACE.replace("{kernel: [cpu, reference], seed: [1, 2]}", "{optim.weight_decay: {low: 0, high: 1.0}}")
    )
    for trials in (1, 2, 3):
        words = [f"ablation={path}", f"out={tmp_path}/out", f"trials={trials}"]
        assert main(["ablate", *words]) == 0
    found = list(read_rows(tmp_path / "out" / "training.csv", COLUMNS))
    assert [row["run"] for row in found] == ["trial-0", "trial-1", "trial-2"]
    assert len({row["settings"] for row in found}) == 3


def test_estimates_follow_the_work():
    """Seconds for the small model on a CPU; a larger batch, more runs or a training step take longer."""
    setting = {"model": "nat_digits", "precision": "fp32", "compile": 0, "batch": 4, "img_size": ""}

    def estimate(runs=10, mode="inference", device="cpu", **changes) -> float:
        return models._estimate_s({**setting, **changes}, {"cpu": [mode]}, runs, device)

    assert 0.5 < estimate() < 2 and estimate(mode="training") > estimate()
    assert estimate(batch=512) > 2 * estimate() and estimate(runs=200) > 1.1 * estimate()
    assert 5 < estimate(model="nat_tiny", batch=128, device="cuda") < 60 < estimate(compile=1, device="cuda")


def test_a_killed_trial_is_trained_again_where_it_was(tmp_path, trained, monkeypatch):
    """Killed in the second of three trainings: the same settings in the same folder, and no trial is left running."""
    optuna = pytest.importorskip("optuna")
    path, works = tmp_path / "mine.yaml", jobs.run_job
    path.write_text(SPACE)

    def run_job(job):
        if len(trained) == 1:
            trained.append(job.command())
            raise KeyboardInterrupt
        return works(job)

    monkeypatch.setattr(jobs, "run_job", run_job)
    words = ["ablate", f"ablation={path}", f"out={tmp_path}/out", "trials=3"]
    assert main(words) == 130
    assert main(words) == 0
    assert len(trained) == 4 and trained[1] == trained[2]
    found = list(read_rows(tmp_path / "out" / "training.csv", COLUMNS))
    assert [row["run"] for row in found] == ["trial-0", "trial-1", "trial-3"]
    (name,) = optuna.get_all_study_names(f"sqlite:///{tmp_path}/out/optuna.db")
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path}/out/optuna.db")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert main([*words[:-1], "trials=4"]) == 0 and len(trained) == 5
    assert main([*words[:-1], "trials=4"]) == 0 and len(trained) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["kernel=reference"], "kernel='reference' is not allowed.*kernels=reference"),
        (["+seed=7"], "seed='7' is not allowed.*seeds=5"),
        (["run_dir=/x"], "out=DIR"),
        (["resume=none"], "out=DIR"),
        (["seeds=0"], "seeds=3"),
        (["kernels=niave"], "naive"),
        (["cluster=lsf"], "cluster=slurm"),
        (["seeds"], "seeds=5"),
        (["seeds=[1"], r"setting='seeds=\[1' .* as yaml has it"),
        (["kernels="], "'' is not allowed"),
        (["=4"], "seeds=5"),
    ],
)
def test_bad_training_plans(words, message):
    with pytest.raises(ValueError, match=message):
        read_training_plan(TRAINING, words)


def test_one_kernel_of_a_yaml_stands_for_a_list(tmp_path):
    (tmp_path / "mine.yaml").write_text("kind: training\nkernels: cpu\nsettings: [model=nat_digits]\n")
    assert read_training_plan(tmp_path / "mine.yaml", []).kernels == ("cpu",)


def test_a_kernel_named_twice_trains_once():
    assert read_training_plan(TRAINING, ["kernels=cpu,reference,cpu"]).kernels == ("cpu", "reference")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kernels: []", r"kernels=\[\] .* a list of names"),
        ("kernels: [{kernel: cpu, commit: HEAD}]", "kernels=.*commit.* a list of names"),
        ("settings: null", "settings=None is not allowed"),
        ("settings: [model]", "settings=.* each key=value"),
        ("settings: [{model: nat_digits}]", "settings=.* each key=value"),
        ("search: [optim.lr]", "search=.* names with their values"),
        ("search: {optim.lr: 0.1}", "search.optim.lr=0.1"),
        ("search: {optim.lr: {low: 1, high: 0}}", "search.optim.lr=.* a list of values"),
        ("search: {optim.lr: {low: 0, high: 1, log: true}}", "search.optim.lr=.*low above 0"),
        ("search: {optim.lr: {low: a, high: b}}", "search.optim.lr=.* a list of values"),
        ("search: {optim.lr: {low: 0, high: 1, step: 0}}", "search.optim.lr=.*step: above 0"),
        ("cluster_options: 60", "cluster_options=60 .* names with their values"),
    ],
)
def test_a_yaml_of_trainings_with_a_wrong_value(tmp_path, line, message):
    lines = {"kernels": "kernels: cpu", "settings": "settings: [model=nat_digits]", "trials": "trials: 2"}
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(["kind: training", *{**lines, line.partition(":")[0]: line}.values()]))
    with pytest.raises(ValueError, match=message):
        read_training_plan(path, [])
