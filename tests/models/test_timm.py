"""timm's interface, method by method, on one tiny model of each family."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_model_input_config, group_parameters, load_checkpoint
from timm.optim import param_groups_weight_decay

import natrain

KERNEL = {"kernel": "reference"}
FAMILIES = {
    "nat": ("nat_mini", dict(dim=8, depths=(2, 1, 2, 1), kernel_size=3, **KERNEL), (83, 117)),
    "dinat_s": ("dinat_s_tiny", dict(dim=12, depths=(2, 1, 2, 1), kernel_size=3, dilations=1, **KERNEL), (83, 117)),
    "isotropic": ("dinat_isotropic_small", dict(dim=24, depth=4, kernel_size=3, **KERNEL), (97, 131)),
    "vitrpb": ("vitrpb_small", dict(dim=24, depth=4, img_size=(52, 70)), (52, 70)),
}
# Map sizes after each unit, from the papers: stride 4 then halved, or patches of 16; odd sides are rounded up.
MAPS = {
    "nat": [(8, 21, 30), (16, 11, 15), (32, 6, 8), (64, 3, 4)],
    "dinat_s": [(12, 21, 30), (24, 11, 15), (48, 6, 8), (96, 3, 4)],
    "isotropic": [(24, 7, 9)] * 4,
    "vitrpb": [(24, 4, 5)] * 4,
}


def create(family: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    name, arguments, _ = FAMILIES[family]
    return timm.create_model(name, **{**arguments, "num_classes": 7, "drop_path_rate": 0.0, **kwargs})


def images(family: str, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, *FAMILIES[family][2], generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


def test_forward_is_features_then_head(family: str) -> None:
    model, x = create(family).eval(), images(family)
    features = model.forward_features(x)
    channels, height, width = MAPS[family][-1]
    assert features.shape == (2, height, width, channels)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((1, 2)))
    torch.testing.assert_close(model.forward_head(features), model.get_classifier()(pooled))
    torch.testing.assert_close(model(x), model.forward_head(features))
    assert model.num_features == model.head_hidden_size == channels


def test_in_chans_and_num_classes(family: str) -> None:
    model = create(family, in_chans=1, num_classes=0)
    assert model(images(family, 1)).shape == (2, model.num_features)
    assert model.in_chans == 1 and model.num_classes == 0


def test_reset_classifier(family: str) -> None:
    model, x = create(family).eval(), images(family)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3 and not model.head.training
    model.reset_classifier(3, "max")
    torch.testing.assert_close(
        model.forward_head(model.forward_features(x), True), model.forward_features(x).amax((1, 2))
    )
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))


def test_forward_intermediates(family: str) -> None:
    model, x = create(family).eval(), images(family)
    last, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[1:]) for m in maps] == MAPS[family]
    torch.testing.assert_close(last, model.forward_features(x))
    torch.testing.assert_close(model.norm(maps[-1].permute(0, 2, 3, 1)), last)
    (normed,) = model.forward_intermediates(x, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(normed, last)
    chosen = model.forward_intermediates(x, indices=[0, 2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(chosen, [maps[0], maps[2]])
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


def test_features_only(family: str) -> None:
    x = images(family)
    full = create(family).eval().forward_intermediates(x, intermediates_only=True)
    backbone = create(family, features_only=True).eval()
    count = 3 if family in ("isotropic", "vitrpb") else 4
    torch.testing.assert_close(backbone(x), full[-count:])
    assert backbone.feature_info.channels() == [m.shape[1] for m in full[-count:]]
    reductions = [16] * 3 if count == 3 else [4, 8, 16, 32]
    assert backbone.feature_info.reduction() == reductions

    pruned = create(family, features_only=True, out_indices=(0, 1))
    maps = pruned(x)
    torch.testing.assert_close(maps, full[:2])
    sum(m.sum() for m in maps).backward()
    assert [n for n, p in pruned.named_parameters() if p.grad is None] == []


def test_no_weight_decay_holds_every_bias_of_positions(family: str) -> None:
    model = create(family)
    spared = model.no_weight_decay()
    assert spared == {n for n, _ in model.named_parameters() if n.split(".")[-1] == "rpb"} and len(spared) >= 4
    decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)[1]["params"]
    assert not {id(p) for n, p in model.named_parameters() if "rpb" in n} & {id(p) for p in decayed}


def test_group_matcher_goes_from_stem_to_head(family: str) -> None:
    model = create(family)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(layers) == {n for n, _ in model.named_parameters()}
    blocks = 4 if family in ("isotropic", "vitrpb") else 6
    assert max(layers.values()) == blocks + 1
    assert layers["patch_embed.norm.weight"] == 0 and layers["norm.weight"] == blocks
    assert layers["head.weight"] == blocks + 1
    if blocks == 6:
        trunk = model.trunk_name
        assert layers[f"{trunk}.0.downsample.reduction.weight"] == layers[f"{trunk}.0.blocks.1.attn.rpb"] == 2
        assert layers[f"{trunk}.1.blocks.0.attn.rpb"] == 3
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert len(set(coarse.values())) >= 5


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_gradient_checkpointing_gives_equal_gradients(family: str, drop: float) -> None:
    x = images(family)

    def gradients(enable: bool) -> list[torch.Tensor]:
        model = create(family, drop_path_rate=drop, proj_drop_rate=drop).train()
        model.set_grad_checkpointing(enable)
        saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).square().sum()
        loss.backward()
        kept.append(saved)
        return [p.grad for p in model.parameters()]

    kept: list[int] = []
    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, again, rtol=0, atol=0)
    assert kept[1] < kept[0] / 2


def test_data_config_and_metadata() -> None:
    model = create("nat", img_size=96)
    assert model.pretrained_cfg["architecture"] == "nat_mini" and model.pretrained_cfg["classifier"] == "head"
    assert get_model_input_config(model)["input_size"] == (3, 96, 96)
    config = resolve_model_data_config(model)
    assert config["crop_pct"] == 0.875 and config["interpolation"] == "bicubic"
    assert config["mean"] == (0.485, 0.456, 0.406) and config["std"] == (0.229, 0.224, 0.225)
    fixed = get_model_input_config(create("vitrpb"))
    assert fixed["input_size"] == (3, 52, 70) and fixed["fixed_input_size"]
    assert model.get_submodule(model.pretrained_cfg["first_conv"]).in_channels == 3
    for name in natrain.models.list_models():
        assert timm.is_model(name) and timm.models.is_model_pretrained(name) is (name != "nat_cifar")


def test_kernel_choice_can_differ_by_stage() -> None:
    kernels = ["reference", "auto", "auto", "reference"]
    model, x = create("nat", kernel=kernels).eval(), images("nat")
    assert [[b.attn.kernel for b in stage.blocks] for stage in model.levels] == [
        [kernel] * depth for kernel, depth in zip(kernels, (2, 1, 2, 1), strict=True)
    ]
    torch.testing.assert_close(model(x), create("nat").eval()(x), rtol=1e-5, atol=1e-5)
    assert create("isotropic", kernel=["reference"]).layers[3].attn.kernel == "reference"


def test_kernel_size_and_dilations_can_differ_by_stage() -> None:
    model = create("nat", kernel_size=[3, 5, 3, 3], dilations=[[1, 4], 2, [1, 2], 1])
    windows = [
        [(b.attn.window.kernel_size[0], b.attn.window.dilation[0]) for b in stage.blocks] for stage in model.levels
    ]
    assert windows == [[(3, 1), (3, 4)], [(5, 2)], [(3, 1), (3, 2)], [(3, 1)]]


@pytest.mark.parametrize("policy", ["shrink", "natten014"])
def test_images_too_small_for_a_window(policy: str) -> None:
    x = torch.randn(1, 3, 40, 57)
    with pytest.raises(ValueError, match=r"image size \(H, W\)=\(40, 57\).*at least 65 pixels.*na_padding='shrink'"):
        create("nat")(x)
    with pytest.raises(ValueError, match=r"img_size=96"):
        create("nat", img_size=40)
    padded = create("nat", na_padding=policy)
    assert padded(x).isfinite().all()
    assert {block.attn.na_padding for stage in padded.levels for block in stage.blocks} == {policy}


def test_too_small_images_name_dilations_that_work() -> None:
    model = create("nat", dilations=[(1, 8), 4, 2, 1])
    with pytest.raises(ValueError, match=r"stage 1 has 17 and needs 3 \* 8.*dilations=\[5, 3, 1, 1\] at most"):
        model(torch.zeros(1, 3, 68, 80))
    assert create("nat", dilations=[5, 3, 1, 1])(torch.zeros(1, 3, 68, 80)).shape == (1, 7)


def test_pretrained_says_where_no_weights_are_published() -> None:
    with pytest.raises(ValueError, match="pretrained=True.*no weights are published.*pretrained_cfg_overlay"):
        timm.create_model("nat_cifar", pretrained=True)


def test_pretrained_loads_a_local_file(tmp_path, family: str) -> None:
    source, x = create(family).eval(), images(family)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.1)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 7}
    loaded = create(family, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    torch.testing.assert_close(loaded(x), source(x))
    other_head = create(family, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3).eval()
    torch.testing.assert_close(other_head.forward_features(x), source.forward_features(x))
    fresh = create(family)
    load_checkpoint(fresh, str(tmp_path / "weights.pth"))
    torch.testing.assert_close(fresh.eval()(x), source(x))


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("nat", dict(drop_path=0.1), "drop_path=0.1.*Try: drop_path_rate"),
        ("nat", dict(kernel=["reference"] * 3), "kernel=.*each of the 4 stages"),
        ("nat", dict(kernel="refernce"), 'kernel.*Try: kernel="reference"'),
        ("nat", dict(kernel_size=[3, 3]), "kernel_size=.*each of the 4 stages"),
        ("nat", dict(kernel_size=3.0), "kernel_size=3.0"),
        ("nat", dict(dilations=[1, 1, 1]), "dilations=.*each of the 4 stages"),
        ("nat", dict(dilations=[1, (1, 2), 1, 1]), "dilations=.*depths"),
        ("nat", dict(dilations=0), "dilations=0"),
        ("nat", dict(dilations=[(), 1, 1, 1]), "dilations="),
        ("nat", dict(drop_path_rate=float("nan")), r"drop_path_rate=nan .*\[0, 1\)"),
        ("dinat_s", dict(attn_drop_rate=-0.1), "attn_drop_rate=-0.1"),
        ("isotropic", dict(proj_drop_rate=1.0), "proj_drop_rate=1.0"),
        ("vitrpb", dict(drop_rate=2), "drop_rate=2"),
        ("nat", dict(na_padding="zeros"), "na_padding='zeros'"),
        ("isotropic", dict(dilations=(1, 0)), "dilations="),
        ("isotropic", dict(img_size=32), "image size.*at least 81 pixels"),
        ("vitrpb", dict(kernel="reference"), "kernel='reference'.*'auto'"),
        ("nat", dict(dilations=2.5), "dilations=2.5"),
        ("nat", dict(dilations=[1, 2.5, 1, 1]), r"dilations=\[1, 2.5, 1, 1\]"),
        ("isotropic", dict(dilations=True), "dilations=True"),
        ("nat", dict(depths=3), "depths=3.*each stage"),
        ("nat", dict(depths=(1, 0)), r"depths=\(1, 0\)"),
        ("isotropic", dict(depth=2.5), "depth=2.5"),
        ("nat", dict(dim="32"), "dim='32'.*Try: dim=64"),
        ("vitrpb", dict(heads=1.5), "heads=1.5"),
        ("dinat_s", dict(mlp_ratio=-1), "mlp_ratio=-1"),
        ("nat", dict(mlp_ratio="3"), "mlp_ratio='3'"),
        ("nat", dict(layer_scale="small"), "layer_scale='small'"),
        ("isotropic", dict(in_chans=0), "in_chans=0"),
        ("nat", dict(num_classes=2.5), "num_classes=2.5"),
        ("vitrpb", dict(num_classes=-1), "num_classes=-1"),
        ("nat", dict(global_pool="mean"), "global_pool='mean'.*catavgmax"),
        ("nat", dict(img_size=(64,)), r"img_size=\(64,\).*\[height, width\]"),
        ("isotropic", dict(img_size="64"), "img_size='64'"),
        ("vitrpb", dict(img_size=(64, 64, 3)), r"img_size=\(64, 64, 3\)"),
    ],
)
def test_bad_arguments(family: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(family, **arguments)


def test_bad_images(family: str) -> None:
    model = create(family)
    with pytest.raises(ValueError, match=r"images.shape=.*\[B, 3, H, W\].*in_chans=1"):
        model(images(family, 1))
    with pytest.raises(ValueError, match=r"images\[None\]"):
        model(images(family)[0])


def test_vitrpb_belongs_to_one_size() -> None:
    with pytest.raises(ValueError, match=r"image size \(H, W\)=\(97, 70\).*img_size=\(97, 70\)"):
        create("vitrpb")(torch.zeros(1, 3, 97, 70))
