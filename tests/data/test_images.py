import io

import numpy as np
import pytest
from PIL import Image

from natrain.data.images import UnreadableImage, convert_mode, decode

RED = (200, 40, 20)
LUMA = round(0.299 * 200 + 0.587 * 40 + 0.114 * 20)  # ITU-R 601-2, as PIL converts


def encoded(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    stream.seek(0)
    return stream


def variants():
    red = Image.new("RGB", (7, 5), RED)
    yield "rgb", encoded(red), RED
    yield "rgba", encoded(Image.new("RGBA", (7, 5), (*RED, 10))), RED
    yield "palette", encoded(red.quantize(4)), RED
    yield "palette with transparency", encoded(red.quantize(4), transparency=b"\x00\x80\xff\x10"), RED
    yield "grey", encoded(Image.new("L", (7, 5), 77)), (77,) * 3
    yield "grey with alpha", encoded(Image.new("LA", (7, 5), (77, 3))), (77,) * 3
    yield "one bit", encoded(Image.new("1", (7, 5), 1)), (255,) * 3
    yield "16 bit grey", encoded(Image.fromarray(np.full((5, 7), 77 * 256, np.uint16))), (77,) * 3
    yield "grey jpeg", encoded(Image.new("L", (7, 5), 77), "JPEG", quality=100), (77,) * 3
    # Without black, a colour is 255 less its ink.
    yield "cmyk jpeg", encoded(Image.new("CMYK", (7, 5), (55, 215, 235, 0)), "JPEG", quality=100), RED


@pytest.mark.parametrize(("stream", "colour"), [pytest.param(*rest, id=name) for name, *rest in variants()])
def test_every_mode_becomes_colour_or_grey(stream, colour):
    pixels = np.asarray(decode(stream, "RGB"))
    assert pixels.shape == (5, 7, 3)
    assert np.abs(pixels.astype(int) - colour).max() <= 2  # JPEG rounds
    stream.seek(0)
    grey = np.asarray(decode(stream, "L"))
    assert grey.shape == (5, 7)
    assert abs(int(grey[0, 0]) - (LUMA if colour == RED else colour[0])) <= 2


@pytest.mark.parametrize("block", [b"MM\0*\xff\xff\xff\xff", b"junk", b"II*\0\x08\0\0\0\xff\xff"])
def test_broken_exif_is_no_obstacle_and_no_warning(block, recwarn):
    image = decode(encoded(Image.new("RGB", (7, 5), RED), "JPEG", exif=b"Exif\0\0" + block), "RGB")
    assert image.size == (7, 5)
    assert not recwarn.list


def test_exif_orientation_is_not_applied_as_in_the_published_evaluations():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(encoded(Image.new("RGB", (7, 5), RED), "JPEG", exif=exif), "RGB").size == (7, 5)


@pytest.mark.parametrize("keep", [0, 10, 200, 0.5, 0.95])
def test_a_cut_file_is_unreadable_with_the_reason(keep):
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    content = encoded(Image.fromarray(pixels), "JPEG").getvalue()
    length = keep if isinstance(keep, int) else int(keep * len(content))
    with pytest.raises(UnreadableImage, match="Error: "):
        decode(io.BytesIO(content[:length]), "RGB")


def test_an_image_in_the_right_mode_is_not_copied():
    image = Image.new("L", (3, 3))
    assert convert_mode(image, "L") is image
