import numpy as np
import pytest
import torch
from PIL import Image

from natrain.data.rng import seed_augmentation
from natrain.data.transforms import build_eval_transform, build_train_transform
from tests.data.helpers import AUGMENT, COLOUR, GREY, PLAIN


def noise(width, height, channels=3, seed=0):
    shape = (height, width, channels) if channels == 3 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8))


def normalised(pixels, input):
    """The definition: 0..255 to 0..1, minus mean, over std, channels first."""
    pixels = np.asarray(pixels, dtype=np.float64) / 255
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(((pixels - input["mean"]) / input["std"]).transpose(2, 0, 1)).float()


def test_eval_of_an_image_of_the_right_size_only_normalises():
    for input, channels in ((dict(COLOUR, crop_pct=1.0), 3), (GREY, 1)):
        image = noise(*input["img_size"], channels)
        torch.testing.assert_close(build_eval_transform(input)(image), normalised(image, input))


def test_eval_crops_the_centre_that_crop_pct_leaves():
    image = noise(40, 40)  # 32 / 0.8 = 40: nothing to resize, four pixels fall away on each side
    expected = normalised(np.asarray(image)[4:36, 4:36], COLOUR)
    torch.testing.assert_close(build_eval_transform(dict(COLOUR, crop_pct=0.8))(image), expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (333, 20), (32, 32), (101, 97)])
@pytest.mark.parametrize("img_size", [32, (32, 32), (20, 48)])
def test_any_image_comes_out_in_the_models_size(size, img_size):
    input = dict(COLOUR, img_size=img_size)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert build_eval_transform(input)(noise(*size)).shape == (3, height, width)
    train = build_train_transform(input, AUGMENT, small_side=None, hflip=0.5)
    assert train(noise(*size)).shape == (3, height, width)


def test_eval_takes_images_of_any_mode():
    for mode in ("L", "CMYK", "P", "RGBA", "1", "I;16"):
        assert build_eval_transform(COLOUR)(Image.new(mode, (50, 40))).shape == (3, 32, 32)
        assert build_eval_transform(GREY)(Image.new(mode, (50, 40))).shape == (1, 8, 8)


def test_small_images_are_shifted_by_at_most_an_eighth_over_black_and_never_mirrored():
    image = noise(8, 8, channels=1)
    padded = np.pad(np.asarray(image), 1)
    shifts = [normalised(padded[y : y + 8, x : x + 8], GREY) for y in range(3) for x in range(3)]
    train = build_train_transform(GREY, dict(PLAIN, hflip=None), small_side=8, hflip=0.0)
    seen = set()
    for seed in range(100):
        seed_augmentation(seed)
        result = train(image)
        (matching,) = [number for number, shift in enumerate(shifts) if torch.allclose(result, shift, atol=1e-5)]
        seen.add(matching)
    assert seen == set(range(9))


def test_flip_probability_follows_the_data_set_unless_set():
    image = noise(8, 8, channels=1)
    centred = [normalised(np.asarray(image), GREY), normalised(np.asarray(image)[:, ::-1], GREY)]

    def mirrored(augment, hflip):
        # RandomResizedCrop of the whole square is the identity, so that only the flip is left.
        train = build_train_transform(GREY, dict(augment, scale=[1, 1], ratio=[1, 1]), small_side=8, hflip=hflip)
        count = 0
        for seed in range(200):
            seed_augmentation(seed)
            result = train(image)
            assert any(torch.allclose(result, option, atol=1e-5) for option in centred)
            count += torch.allclose(result, centred[1], atol=1e-5)
        return count

    assert mirrored(dict(PLAIN, hflip=None), hflip=0.0) == 0
    assert mirrored(dict(PLAIN, hflip=1.0), hflip=0.0) == 200
    assert 70 < mirrored(dict(PLAIN, hflip=None), hflip=0.5) < 130  # within 4.2 standard deviations


def test_small_images_can_feed_a_larger_model():
    train = build_train_transform(dict(COLOUR, img_size=48), PLAIN, small_side=32, hflip=0.5)
    assert train(noise(32, 32)).shape == (3, 48, 48)


def test_random_erasing_covers_a_rectangle_with_noise():
    image = Image.new("RGB", (32, 32), (128, 102, 77))
    plain, erased = (
        build_train_transform(COLOUR, dict(PLAIN, random_erasing=share), small_side=32, hflip=0.0)(image)
        for share in (0.0, 1.0)
    )
    assert plain[:, 8:24, 8:24].std(dim=(1, 2)).max() < 1e-4
    assert erased.std() > 0.1


def test_randaugment_survives_posterizing_to_no_bits():
    augment = dict(PLAIN, rand_augment="rand-m10-n12-p1-inc1")
    train = build_train_transform(COLOUR, augment, small_side=32, hflip=0.0)
    names = [operation.name for operation in train.transforms[1].transforms[0].ops]
    assert "PosterizeIncreasing" in names
    (posterize,) = [op for op in train.transforms[1].transforms[0].ops if op.name == "PosterizeIncreasing"]
    assert np.asarray(posterize(noise(5, 4))).max() == 0
    for seed in range(30):
        seed_augmentation(seed)
        assert train(noise(32, 32)).shape == (3, 32, 32)


def test_grey_input_averages_a_colour_mean():
    input = dict(GREY, mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3))
    image = noise(8, 8, channels=1)
    torch.testing.assert_close(
        build_eval_transform(input)(image), normalised(image, dict(mean=(0.3,), std=(0.2,))), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("img_size", 0),
        ("img_size", (32, 32, 3)),
        ("img_size", 32.5),
        ("in_chans", 2),
        ("mean", (0.5, 0.5)),
        ("mean", (float("nan"),) * 3),
        ("mean", (123.7, 116.3, 103.5)),
        ("std", (0.0, 0.2, 0.2)),
        ("crop_pct", 0.0),
        ("crop_pct", float("nan")),
        ("crop_pct", 1.5),
        ("interpolation", "cubic"),
    ],
)
def test_an_input_out_of_range_names_the_setting(key, value):
    with pytest.raises(ValueError, match=rf"^data\.{key}=.*Try: data\.{key}="):
        build_eval_transform(dict(COLOUR, **{key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hflip", 1.5),
        ("hflip", float("nan")),
        ("random_erasing", -0.1),
        ("color_jitter", 3.0),
        ("scale", [0.5, 0.1]),
        ("scale", [0.0, 1.0]),
        ("scale", [0.1, float("nan")]),
        ("ratio", [-1.0, 1.0]),
        ("ratio", [1.0]),
        ("train_interpolation", "any"),
        ("rand_augment", "rand-x9"),
        ("rand_augment", "strong"),
    ],
)
def test_an_augmentation_out_of_range_names_the_setting(key, value):
    with pytest.raises(ValueError, match=rf"^augment\.{key}=.*Try: augment\.{key}="):
        build_train_transform(COLOUR, dict(AUGMENT, **{key: value}), small_side=None, hflip=0.5)
