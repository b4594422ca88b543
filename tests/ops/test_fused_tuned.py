"""Plans that were measured on the GPU at hand: kept, found again there and only there, taken in place of the choice."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import natrain
from natrain.bench import layers, plans
from natrain.bench.case import Case
from natrain.bench.environment import environment
from natrain.cli import main
from natrain.ops import fused, fused_tuned
from natrain.ops.fused_plan import Device
from natrain.ops.precision import tf32_products
from tests.ops.oracle import dense_attention

HERE = Device(tuned_as="a GPU")
WORDS = {"shape": "20x19", "batch": 2, "heads": 2, "head_dim": 32, "kernel_size": 5, "dtype": "fp16", "rpb": True}
LINE = {"shape": "200", "batch": 2, "heads": 2, "head_dim": 32, "kernel_size": 5, "dtype": "fp16"}
TWO_PASSES = ("forward", "backward_q", "backward_kv")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NATRAIN_CACHE", str(tmp_path))
    fused.forget_plans()
    yield tmp_path
    fused.forget_plans()


def stored(case: Case, kernel: str, plan, device=HERE) -> dict:
    asked = plans._Question.of(case, kernel)
    own = fused.device_for(case.problem("cuda", (9, 0)), device)
    path = fused_tuned.store(kernel, asked.space, asked.demands, own, plan, 0.1)
    fused.forget_plans()
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("case", "kernel"),
    [(case, kernel) for case in (Case.of(WORDS), layers.LAYERS[0].case(torch.bfloat16, True)) for kernel in TWO_PASSES]
    + [(Case.of(LINE), "backward_qkv")],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_stored_plan_is_taken_on_its_gpu_alone(case, kernel):
    chosen, *_, other = plans.plans(case, HERE, 5, kernel)
    assert other != chosen
    content = stored(case, kernel, other)
    assert content["device"].startswith(f"a GPU, {case.dtype}") and content["plan"] == fused_tuned.choice_of(other)
    for device, expected in ((HERE, other), (Device(), chosen), (Device(tuned_as="another"), replace(chosen))):
        assert plans.plans(case, device, 1, kernel)[0] == expected, device
        if kernel == "backward_qkv":  # whichever it is, the way in one pass stays
            problem = case.problem("cuda", (9, 0))
            (part,) = fused.backward_parts(problem, fused._constants(problem, "int"), device)
            assert part.plan == expected
    for problem in (
        case.with_batch(3),
        replace(case, dtype={torch.float16: torch.bfloat16}.get(case.dtype, torch.float16)),
    ):
        assert plans.plans(problem, HERE, 1, kernel)[0] == plans.plans(problem, Device(), 1, kernel)[0]


NO_TILE = json.dumps({"plan": dict.fromkeys(fused_tuned._CHOICE)})


@pytest.mark.parametrize("text", ["", "{", "[]", '{"plan": 3}', '{"plan": {"row_tile": [1, 1, 16]}}', NO_TILE])
def test_a_file_that_holds_no_plan_is_passed_over(text, own_cache):
    case = Case.of(WORDS)
    chosen, other = plans.plans(case, HERE, 1)
    stored(case, "forward", other)
    (path,) = (own_cache / "plans").glob("*.json")
    path.write_text(text)
    assert plans.plans(case, HERE, 1)[0] == chosen


def test_a_plan_that_is_no_longer_legal_is_passed_over():
    case = Case.of(WORDS)
    chosen, other = plans.plans(case, HERE, 1)
    stored(case, "forward", replace(other, stages=9))
    assert plans.plans(case, HERE, 1)[0] == chosen


def test_other_sources_have_plans_of_their_own(monkeypatch):
    case = Case.of(WORDS)
    chosen, other = plans.plans(case, HERE, 1)
    stored(case, "forward", other)
    monkeypatch.setattr(fused_tuned, "_sources", lambda: "changed")
    assert plans.plans(case, HERE, 1)[0] == chosen


@pytest.fixture
def a_gpu(monkeypatch):
    """Times of the plans of a GPU that is not there: later ones by cost are faster, by less than 1 % the next one."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: "a GPU")
    monkeypatch.setattr(fused, "device_of", lambda index: HERE)
    monkeypatch.setattr(plans, "compile_all", lambda wanted, arch: None)

    def timed(kernel, case, found):
        factors = {"forward": 0.5, "backward_q": 0.995, "backward_kv": 2.0, "backward_qkv": 0.7}
        yield from ((1.0 if index == 0 else factors[kernel], plan) for index, plan in enumerate(found))

    monkeypatch.setattr(plans, "timed", timed)


def test_whether_blocks_walk_is_kept_too():
    """Of a plan that would walk both are timed."""
    case = Case.of({**WORDS, "shape": "200x334", "batch": 1, "heads": 4, "kernel_size": 7})
    chosen, *others = plans.plans(case, HERE, 9, "backward_q")
    still = next(
        plan for plan in others if fused_tuned.choice_of(plan) == fused_tuned.choice_of(chosen) | {"walks": False}
    )
    assert chosen.walk is not None and still.walk is None
    for plan in (still, chosen):
        stored(case, "backward_q", plan)
        assert plans.plans(case, HERE, 1, "backward_q")[0] == plan


def test_three_terms_of_float32_have_plans_of_their_own():
    problem = Case.of({**WORDS, "dtype": "fp32"}).problem("cuda", (9, 0))
    with tf32_products(True):
        rounded = fused.device_for(problem, HERE)
    with tf32_products(False):
        assert fused.device_for(problem, HERE) != rounded
    assert fused.device_for(problem, Device()) == Device()


def test_tuning_keeps_what_is_faster(a_gpu, own_cache):
    case = Case.of(WORDS)
    before = {kernel: plans.plans(case, HERE, 1, kernel) for kernel in TWO_PASSES}
    found = list(plans.tune([case], most=3))
    assert [(x.kernel, x.before_ms, x.after_ms) for x in found] == [
        ("forward", 1.0, 0.5),
        ("backward_q", 1.0, 1.0),
        ("backward_kv", 1.0, 1.0),
    ]
    after = {kernel: plans.plans(case, HERE, 1, kernel)[0] for kernel in TWO_PASSES}
    assert after["forward"] == before["forward"][1]
    assert all(after[kernel] == before[kernel][0] for kernel in ("backward_q", "backward_kv"))
    assert len(list((own_cache / "plans").iterdir())) == 3


@pytest.mark.parametrize("change", [{"rpb": True}, {"head_dim": 136}, {"shape": "20x10"}], ids=str)
def test_one_pass_is_refused_where_it_cannot_be(change):
    case = Case.of({**LINE, **change})
    with pytest.raises(ValueError, match="kernel=.*backward_qkv of na.*one line.*backward_q or backward_kv"):
        plans.plans(case, HERE, 1, "backward_qkv")


def test_a_backward_of_one_pass_is_tuned_as_one(a_gpu):
    found = [(x.kernel, x.after_ms) for x in plans.tune([Case.of(LINE)], most=3)]
    assert found == [("forward", 0.5), ("backward_qkv", 0.7)] and fused_tuned.count() == 2
    with fused.taking("backward_kv", plans.plans(Case.of(LINE), HERE, 0, "backward_kv")[0]):
        assert plans.kernels_of(Case.of(LINE), HERE) == TWO_PASSES


def test_the_command_tunes_the_layers_of_a_model(a_gpu, capsys):
    assert main(["kernels", "tune", "model=nat_mini", "batch=8"]) == 0
    output = capsys.readouterr().out
    assert (
        output.startswith("4 problems on a GPU")
        and "na2d 56x56 b8 n2 d32 k7 rpb=1 bf16 forward 1.0000 0.5000" in output
    )
    assert main(["kernels", "list"]) == 0
    assert "0 compiled kernels" in (listed := capsys.readouterr().out) and "12 tuned plans" in listed
    assert main(["kernels", "clear"]) == 0
    assert "12 tuned plans" in capsys.readouterr().out and fused_tuned.count() == 0


def test_the_command_tunes_the_problems_of_an_ablation(a_gpu, capsys, monkeypatch):
    """And those of other sources or another GPU are none."""
    assert main(["kernels", "tune", "ablation=nat_layers", "dtype=fp16"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("14 problems on a GPU") and "na2d 14x14 b128 n8 d32 k7 dilation=2 rpb=1 fp16" in output
    assert fused_tuned.count_usable("a GPU") == fused_tuned.count() == 42
    assert fused_tuned.count_usable("a") == fused_tuned.count_usable("another GPU") == 0
    assert environment("cpu")["tuned_plans"] == 0
    monkeypatch.setattr(fused_tuned, "_sources", lambda: "changed")
    assert fused_tuned.count_usable("a GPU") == 0


@pytest.mark.parametrize(
    "words, argument, fix",
    [
        (["model=nat_tiny"], "device='cpu'", "natrain kernels build"),
        ([], "model=None", "natrain kernels tune model=nat_tiny"),
        (["modle=nat_tiny"], "setting='modle=nat_tiny'", "model=nat_tiny"),
        (["model=nat_tiny", "arch=90"], "setting='arch=90'", "one of model, dtype, batch, img_size"),
        (["shape=8x8", "heads=2"], "head_dim=None", "head_dim=32"),
        (["shape=8x8", "heads"], "setting='heads'", "heads=..."),
        (["shape=8x8", "heads=2", "head_dim=8", "kernel_size=3", "dtype=fp64"], "dtype torch.float64", "dtype=bf16"),
        (["shape=8x8", "heads=2", "head_dim=4", "kernel_size=3", "dtype=fp16"], "head_dim 4", "head_dim=32"),
        (["model=vitrpb_small"], "model='vitrpb_small'", "model=nat_tiny"),
        (["ablation=nat_layer"], "ablation='nat_layer'", "ablation=nat_layers"),
        (["ablation=nat_layers", "dtype=fp64"], "ablation='nat_layers'", "problems of the fused kernels"),
        (["ablation=nat_layers", "rpbs=true"], "setting='rpbs'", "rpb=..."),
        (["ablation"], "setting='ablation'", "ablation=nat_layers"),
        (["ablation=nat_layers", "tf32=false"], "tf32=False", "tf32=true"),
        (["ablation=training"], "ablation='training'", "ablation=nat_layers"),
    ],
)
def test_one_clear_error(words, argument, fix, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["kernels", "tune", *words]) != 0
    message = capsys.readouterr().err
    assert argument in message and fix in message and message.count("\n") <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_tuned_problem_is_still_right(dtype):
    """Every kernel tuned on the device at hand, float32 as TF32, then called as anybody calls it."""
    case = Case.of({**WORDS, "dtype": dtype})
    q, k, v = (torch.randn(case.shape, dtype=case.dtype, device="cuda") for _ in range(3))
    rpb = torch.randn(case.heads, *case.window.rpb_shape, device="cuda")
    with tf32_products(True):
        found = list(plans.tune([case], most=3))
        out = natrain.na2d(q, k, v, 5, rpb=rpb, kernel="fused")
    assert [x.kernel for x in found] == list(TWO_PASSES) and all(0 < x.after_ms <= x.before_ms for x in found)
    assert fused_tuned.count() == 3
    window = {"kernel_size": (5, 5), "dilation": (1, 1), "stride": (1, 1), "is_causal": (False, False)}
    expected, _ = dense_attention(*(x.double().cpu() for x in (q, k, v, rpb)), window, 32**-0.5)
    torch.testing.assert_close(out.double().cpu(), expected, atol=4e-3, rtol=4e-3)
