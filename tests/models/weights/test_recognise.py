"""Which variant a file holds, what stands beside it, and every way in which a file can be wrong."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import natrain.models
from natrain.models.weights import export_weights, load_into, load_weights, save_weights
from natrain.models.weights.describe import describe
from natrain.models.weights.recognise import compare, named_in, recognise
from natrain.training import load_for_inference
from natrain.training.build import load_initial_weights
from tests.models.weights.huggingface import Backbone
from tests.models.weights.original import Hierarchical, Isotropic, randomise

TWINS = [{"nat_mini", "dinat_mini"}, {"nat_tiny", "dinat_tiny"}, {"nat_base", "dinat_base"}]
TWINS += [{"nat_isotropic_small", "dinat_isotropic_small"}, {"nat_isotropic_base", "dinat_isotropic_base"}]


def state_of(variant: str, **args) -> dict[str, torch.Tensor]:
    """Names and shapes; the tensors take no memory."""
    with torch.device("meta"):
        return timm.create_model(variant, **args).state_dict()


@pytest.mark.parametrize("variant", natrain.models.list_models())
def test_every_variant_is_recognised_by_names_and_shapes(variant: str) -> None:
    state = state_of(variant, num_classes=5)
    fitting = {name for name in natrain.models.list_models() if not compare(state, name).problems}
    twins = next((twins for twins in TWINS if variant in twins), {variant})
    # Without its table of offsets ViT-rpb has an isotropic model's tensors: the table is what tells them apart.
    assert {name for name in fitting if not compare(state, name).missing} == twins
    if len(twins) == 1:
        assert recognise(state, "x.pth", None, None).variant == variant
    else:
        with pytest.raises(ValueError, match=rf"{' and '.join(sorted(twins))} have the same tensors.*--model"):
            recognise(state, "x.pth", None, None)
        for name in twins:
            assert recognise(state, "x.pth", name, None).variant == name
            assert recognise(state, "x.pth", None, name).variant == name
            assert recognise(state, f"runs/{name}_in1k_224.pth", None, None).variant == name
            assert recognise(state, f"shi-labs/{name.replace('_', '-')}-in1k", None, None).variant == name


def test_names_inside_names() -> None:
    assert named_in("dinat_mini_in1k_224.pth") == "dinat_mini"
    assert named_in("maskrcnn_dinat_s_small.pth") == "dinat_s_small"
    assert named_in("nat_isotropic_small_in1k_224.pth") == "nat_isotropic_small"
    assert named_in("donat_minimal.pth") is None


def test_sizes_that_are_arguments(tmp_path: Path) -> None:
    fit = compare(state_of("dinat_large", kernel_size=11, num_classes=21841), "dinat_large")
    assert fit.args == {"kernel_size": 11, "num_classes": 21841} and not fit.problems
    fit = compare(state_of("nat_cifar", kernel_size=[7, 5, 3], in_chans=1), "nat_cifar")
    assert fit.args == {"kernel_size": [7, 5, 3], "in_chans": 1}
    fit = compare(state_of("vitrpb_small", img_size=(96, 128)), "vitrpb_small")
    assert fit.args == {"img_size": [96, 128]}
    torch.save(timm.create_model("vitrpb_small", img_size=(96, 128)).state_dict(), tmp_path / "w.pth")
    assert load_weights(tmp_path / "w.pth").create_model().map_size == (6, 8)


def small(**changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {**timm.create_model("nat_digits").state_dict(), **changes}


def test_a_detector_keeps_the_norms_of_its_stages(tmp_path: Path) -> None:
    """The backbone of a whole detector: norm0 to norm3 have no place in a classifier, are listed and kept."""
    plan = [(1, 1, 1), (1, 2, 1, 2), (1, 2) * 3, (1,) * 5]
    backbone = randomise(Hierarchical("levels", 64, 2, plan, 3, is_detector=True))
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    state["neck.conv.weight"] = torch.zeros(4, 4)
    torch.save({"state_dict": state, "meta": {"epoch": 36}}, tmp_path / "maskrcnn_dinat_mini.pth")
    weights = load_weights(tmp_path / "maskrcnn_dinat_mini.pth")
    assert weights.model_name == "dinat_mini" and weights.num_classes == 0
    assert weights.missing == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    norms = [f"norm{stage}.{part}" for stage in range(4) for part in ("weight", "bias")]
    assert list(weights.beside) == [*norms, "neck.conv.weight"]
    report = "\n".join(weights.report())
    assert "not in the model, kept aside: norm2.weight [256]" in report and "neck.conv.weight [4, 4]" in report
    assert "not in the file: norm.weight, norm.bias, head.weight, head.bias" in report
    save_weights(weights, tmp_path / "backbone.safetensors")
    again = load_weights(tmp_path / "backbone.safetensors")
    assert all(torch.equal(again.beside[name], backbone.state_dict()[name]) for name in norms)
    model = again.create_model(img_size=None, na_padding="natten014", kernel="reference", dilations=plan)
    x = torch.randn(1, 3, 72, 104)
    with torch.no_grad():
        expected, _ = backbone.double()(x.double())
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        for stage, (one, other) in enumerate(zip(maps, expected, strict=True)):
            weight, bias = (again.beside[f"norm{stage}.{part}"] for part in ("weight", "bias"))
            got = torch.nn.functional.layer_norm(one, one.shape[-1:], weight, bias).double()
            assert (got - other).norm() <= 1e-4 * other.norm()
    fresh = load_initial_weights(timm.create_model("dinat_mini"), str(tmp_path / "backbone.safetensors"))
    assert sorted(fresh) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def test_huggingface_backbone(tmp_path: Path) -> None:
    """Hugging Face's DinatBackbone has a norm per stage and neither final norm nor classifier."""
    tree = randomise(Backbone(64, 2, [(1, 8, 1), (1, 4, 1, 4), (1, 2) * 3, (1,) * 5], 3, False, 7))
    state = {name: tensor for name, tensor in tree.state_dict().items() if not name.startswith("layernorm.")}
    norms = {f"hidden_states_norms.stage{stage}.weight": torch.full((32 * 2**stage,), stage) for stage in range(1, 5)}
    save_file({f"model.encoder.{name}": t for name, t in {**state, **norms}.items()}, tmp_path / "model.safetensors")
    weights = load_weights(tmp_path / "model.safetensors", model="dinat_mini")
    assert weights.layout == "hf" and weights.num_classes == 0
    assert {name: tensor[0].item() for name, tensor in weights.beside.items()} == {
        f"norm{stage}.weight": stage + 1 for stage in range(4)
    }
    model = weights.create_model(img_size=None, na_padding="natten014", kernel="reference")
    x = torch.randn(1, 3, 72, 104)
    with torch.no_grad():
        _, expected = tree.double()(x.double())
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
    for one, other in zip(maps, expected, strict=True):
        assert (one.double() - other).norm() <= 1e-4 * other.norm()


def test_weights_in_several_files(tmp_path: Path) -> None:
    state = small()
    parts = {"a.safetensors": list(state)[:20], "b.safetensors": list(state)[20:]}
    for file, names in parts.items():
        save_file({name: state[name] for name in names}, tmp_path / file)
    index = {"weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    loaded = load_weights(tmp_path).state
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ValueError, match=r"b\.safetensors.*existing checkpoint file"):
        load_weights(tmp_path)


def test_a_head_beside_the_network_does_not_become_its_head(tmp_path: Path) -> None:
    state = {f"net.{name}": t for name, t in timm.create_model("nat_digits", num_classes=0).state_dict().items()}
    torch.save({**state, "head.weight": torch.ones(7, 64), "head.bias": torch.ones(7)}, tmp_path / "w.pth")
    weights = load_weights(tmp_path / "w.pth")
    assert list(weights.beside) == ["beside.head.weight", "beside.head.bias"] and weights.num_classes == 0
    save_weights(weights, tmp_path / "w.safetensors")
    again = load_weights(tmp_path / "w.safetensors")
    assert again.num_classes == 0 and again.beside.keys() == weights.beside.keys()


def test_hyperparameters_of_somebody_elses_module(tmp_path: Path) -> None:
    told = {"model_name": "my_net", "lr": 1e-3}
    content = {"state_dict": small(), "hyper_parameters": told, "pytorch-lightning_version": "2.6.4"}
    torch.save(content, tmp_path / "w.ckpt")
    weights = load_weights(tmp_path / "w.ckpt")
    assert weights.model_name == "nat_digits" and weights.layout == "lightning"
    assert load_for_inference(tmp_path / "w.ckpt").model_name == "nat_digits"


def test_a_published_file_is_described_by_its_name(tmp_path: Path) -> None:
    told = describe({}, tmp_path / "x", "/data/dinat_large_in22k_in1k_384.pth")
    assert told.hint == "dinat_large" and told.licence == "mit"
    assert told.model_args == {"dilations": ((1, 13), (1, 6), (1, 3), (1,))}
    assert told.input["img_size"] == [384, 384] and told.input["crop_pct"] == 1.0
    # The first and the last synset of ILSVRC 2012 in their sorted order: tench and toilet tissue.
    assert (told.class_names[0], told.class_names[999], len(told.class_names)) == ("n01440764", "n15075141", 1000)
    assert len(describe({}, tmp_path / "x", "dinat_s_large_in22k_224.pth").class_names) == 21841
    assert describe({}, tmp_path / "x", "mine.pth").class_names is None


def test_what_a_model_leaves_out_is_logged(tmp_path: Path, caplog) -> None:
    torch.save({**small(), "norm1.weight": torch.ones(7), "epoch": 3}, tmp_path / "w.pth")
    expected = "w.pth: not in the model, left out: {}norm1.weight [7], epoch"
    load_initial_weights(timm.create_model("nat_digits"), str(tmp_path / "w.pth"))
    load_for_inference(tmp_path / "w.pth")
    assert [record.message.endswith(expected.format("")) for record in caplog.records] == [True, True]
    load_into(timm.create_model("nat_digits", num_classes=0), load_weights(tmp_path / "w.pth"))
    assert caplog.records[-1].message.endswith(expected.format("head.weight [10, 64], head.bias [10], "))
    caplog.clear()
    torch.save(small(), tmp_path / "w.pth")
    load_initial_weights(timm.create_model("nat_digits"), str(tmp_path / "w.pth"))
    load_for_inference(tmp_path / "w.pth")
    assert not caplog.records


def test_labels_of_huggingface(tmp_path: Path) -> None:
    def names(labels: list[str]) -> list[str] | None:
        config = {"model_type": "dinat", "id2label": {str(index): label for index, label in enumerate(labels)}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        return describe({}, tmp_path, "x").class_names

    assert names(["LABEL_0", "LABEL_1"]) is None
    assert names([f"class {index}" for index in range(11)])[10] == "class 10", "in the order of numbers, not of text"
    assert names([f"class {index}" for index in range(1000)])[10] == "class 10"
    published = [ImageNetInfo("imagenet-1k").index_to_description(index) for index in range(1000)]
    assert published[0] == "tench, Tinca tinca"
    found = names([*published[:-1], "toilet roll"])
    assert (found[0], found[999]) == ("n01440764", "n15075141")


def test_what_is_no_tensor_is_listed(tmp_path: Path) -> None:
    torch.save({**small(), "epoch": 3}, tmp_path / "w.pth")
    weights = load_weights(tmp_path / "w.pth")
    assert weights.not_tensors == ["epoch"] and "not in the model, no tensor: epoch" in weights.report()


def test_averaged_weights_are_preferred_and_can_be_refused(tmp_path: Path) -> None:
    state = {"state_dict": small(), "state_dict_ema": small(**{"head.bias": torch.ones(10)})}
    torch.save(state, tmp_path / "w.pth")
    for weights, value in (("best", 1.0), ("ema", 1.0), ("raw", 0.0)):
        loaded = load_weights(tmp_path / "w.pth", weights=weights)
        assert loaded.state["head.bias"][0] == value
        assert any("ema" in step for step in loaded.steps) is (value == 1.0)
    torch.save(small(), tmp_path / "raw.pth")
    with pytest.raises(ValueError, match="weights='ema'.*no averaged weights"):
        load_weights(tmp_path / "raw.pth", weights="ema")
    with pytest.raises(ValueError, match="weights='mean'.*best, raw, ema"):
        load_weights(tmp_path / "raw.pth", weights="mean")


@pytest.mark.parametrize(
    "beside",
    [
        {"evaluation": 0.8},
        {"evaluation": {"weights": None}},
        {"metadata": "by night"},
        {"metadata": {"natrain": {}}},
        {"model_ema": {}},
        {7: torch.zeros(3)},
    ],
    ids=str,
)
def test_foreign_entries_under_our_names(beside: dict, tmp_path: Path) -> None:
    state = {"state_dict": small(), **beside} if 7 not in beside else {**small(), **beside}
    torch.save(state, tmp_path / "w.pth")
    weights = load_weights(tmp_path / "w.pth")
    assert weights.model_name == "nat_digits" and torch.equal(weights.state["norm.bias"], small()["norm.bias"])
    assert list(weights.beside) == (["7"] if 7 in beside else [])


@pytest.mark.parametrize("text", ["[1, 2]", "// settings", '{"architecture": "UNet"}', '{"architecture": ["conv"]}'])
def test_somebody_elses_config_beside_a_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    torch.save(small(), tmp_path / "w.pth")
    assert load_weights(tmp_path / "w.pth").layout == "official"
    (tmp_path / "config.json").write_text('{"architecture": "nat_digits", "label_names": ["a"]}')
    assert load_weights(tmp_path / "w.pth").layout == "timm"


def test_tensors_that_share_memory_are_kept_each_by_itself(tmp_path: Path) -> None:
    """Detectors tie the heads of their decoders, and torch.save keeps the tie."""
    tied = torch.arange(6.0)
    torch.save({**small(), "decoder.0.bias": tied, "decoder.1.bias": tied, "decoder.all": tied[2:]}, tmp_path / "w.pth")
    weights = load_weights(tmp_path / "w.pth")
    save_weights(weights, tmp_path / "w.safetensors")
    export_weights(weights, "timm", tmp_path / "folder")
    for written in ("w.safetensors", "folder"):
        beside = load_weights(tmp_path / written).beside
        assert beside.keys() == weights.beside.keys() and all(torch.equal(beside[k], weights.beside[k]) for k in beside)


def test_several_models_in_a_file_need_a_prefix(tmp_path: Path) -> None:
    both = {f"student.{k}": v for k, v in small().items()} | {f"teacher.{k}": v + 1 for k, v in small().items()}
    torch.save(both, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"several, under \['student.', 'teacher.'\].*--prefix 'student.'"):
        load_weights(tmp_path / "two.pth")
    weights = load_weights(tmp_path / "two.pth", prefix="teacher.")
    assert torch.equal(weights.state["head.bias"], small()["head.bias"] + 1)
    assert len(weights.beside) == len(small())


def bad(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.pth"
    if kind == "pickle":

        class RunsCode:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"model": small(), "extra": RunsCode()}, path)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(os.mkdir))
    elif kind == "truncated":
        torch.save(small(), path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "truncated safetensors":
        path = tmp_path / "bad.safetensors"
        save_file(small(), path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "foreign":
        torch.save({"layer1.0.conv1.weight": torch.zeros(2, 3)}, path)
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
    elif kind == "absent":
        path = tmp_path / "absent.pth"
    elif kind == "config":
        save_file(small(), tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{broken")
        path = tmp_path
    elif kind == "index":
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../elsewhere.safetensors"}}')
        path = tmp_path
    elif kind == "missing block":
        torch.save({k: v for k, v in small().items() if "levels.1.blocks.0.mlp" not in k}, path)
    elif kind == "shape":
        torch.save(small(**{"levels.0.blocks.0.mlp.fc1.weight": torch.zeros(65, 32)}), path)
    elif kind == "surplus":
        torch.save(small(**{"levels.0.blocks.0.attn.extra": torch.zeros(3)}), path)
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("pickle", r"bad\.pth.*would run code"),
        ("bare pickle", r"bad\.pth.*would run code"),
        ("truncated", r"bad\.pth.*cannot be read"),
        ("truncated safetensors", r"bad\.safetensors.*cannot be read"),
        ("foreign", r"bad\.pth.*weights of a NAT.*holds layer1\.0\.conv1\.weight \[2, 3\]"),
        ("text", r"bad\.pth.*"),
        ("folder", r"a folder with model\.safetensors or"),
        ("absent", r"absent\.pth.*existing file or folder, an address"),
        ("config", r"config\.json.*a JSON file"),
        ("index", r"index\.json.*files beside it"),
        ("missing block", r"compared with nat_digits: levels\.1\.blocks\.0\.mlp\.fc1\.weight \[128, 64\] is missing"),
        (
            "shape",
            r"compared with nat_digits: levels.0.blocks.0.mlp.fc1.weight is \[65, 32\], nat_digits has \[64, 32\]",
        ),
        ("surplus", r"compared with nat_digits: levels\.0\.blocks\.0\.attn\.extra \[3\] is not in nat_digits"),
    ],
)
def test_bad_files_are_clear_errors_and_nothing_is_written(kind: str, message: str, tmp_path: Path, capsys) -> None:
    from natrain.cli import main

    path = bad(tmp_path, kind)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["import", str(path), "--out", str(tmp_path / "out.safetensors")]) == 2
    assert capsys.readouterr().err.strip() == f"natrain: error: {caught.value}"
    assert sorted(tmp_path.rglob("*")) == before, "neither an output nor a temporary file, and no code ran"


def test_an_interrupted_import_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    torch.save(small(), tmp_path / "w.pth")
    weights = load_weights(tmp_path / "w.pth")
    (tmp_path / "out.safetensors").write_bytes(b"older")

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        save_weights(weights, tmp_path / "out.safetensors")
    assert (tmp_path / "out.safetensors").read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "w.pth"]


def test_another_variant_is_named(tmp_path: Path) -> None:
    torch.save(timm.create_model("nat_cifar").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"compared with nat_digits: .*; it fits nat_cifar\. Try: model=nat_cifar"):
        load_weights(tmp_path / "w.pth", model="nat_digits")
    with pytest.raises(ValueError, match="model='nat_digts'.*Try: model=nat_digits"):
        load_weights(tmp_path / "w.pth", model="nat_digts")
    with pytest.raises(ValueError, match=r"compared with nat_digits.*it fits nat_cifar"):
        load_initial_weights(timm.create_model("nat_digits"), str(tmp_path / "w.pth"))


def test_other_arguments_of_the_same_variant_are_named() -> None:
    with pytest.raises(ValueError, match=r"gamma1 \[32\] is missing.*fits nat_digits without them") as caught:
        timm.create_model("nat_digits", pretrained=True, layer_scale=1e-5)
    assert "Try: the arguments of the model" in str(caught.value)


def test_another_kernel_size_needs_surgery(tmp_path: Path) -> None:
    torch.save(timm.create_model("nat_cifar", kernel_size=7, img_size=112).state_dict(), tmp_path / "w.pth")
    weights = load_weights(tmp_path / "w.pth")
    assert weights.model_args == {"kernel_size": 7}
    model = timm.create_model("nat_cifar")
    before = model.head.weight.clone()
    for load in (
        lambda: load_initial_weights(model, str(tmp_path / "w.pth")),
        lambda: load_into(model, weights),
    ):
        with pytest.raises(ValueError, match=r"rpb is \[2, 13, 13\], the model has \[2, 9, 9\].*natrain surgery"):
            load()
    assert torch.equal(model.head.weight, before), "nothing was copied"


def test_grey_weights_of_colour_weights(tmp_path: Path) -> None:
    state = timm.create_model("nat_cifar").state_dict()
    torch.save(state, tmp_path / "w.pth")
    model = timm.create_model("nat_cifar", in_chans=1)
    load_initial_weights(model, str(tmp_path / "w.pth"))
    stem = "patch_embed.proj.0.weight"
    torch.testing.assert_close(model.state_dict()[stem], state[stem].sum(1, keepdim=True))


def test_vitrpb_without_its_table_is_read_when_it_is_named(tmp_path: Path) -> None:
    state = randomise(Isotropic(384, 12, (0,) * 12)).state_dict()
    bare = {name: tensor for name, tensor in state.items() if not name.endswith("index")}
    torch.save(bare, tmp_path / "w.pth")
    model = load_weights(tmp_path / "w.pth", model="vitrpb_small").create_model()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
