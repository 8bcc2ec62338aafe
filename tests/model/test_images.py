"""The loader of images: what people have, what is refused, and that it equals transformers' own."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image as stock_load_image

from qvl_model import digits
from qvl_model.images import MAX_ASPECT, MAX_PIXELS, load_image


def _random(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif.tobytes()}


KINDS = {
    "RGB": lambda path: Image.fromarray(_random(20, 30, 3)).save(path / "a.png"),
    "greyscale": lambda path: Image.fromarray(_random(20, 30)).save(path / "a.png"),
    "palette": lambda path: Image.fromarray(_random(20, 30, 3)).quantize(16).save(path / "a.png"),
    "bits": lambda path: Image.fromarray(_random(20, 30) > 99).save(path / "a.png"),
    "CMYK": lambda path: Image.fromarray(_random(20, 30, 4), "CMYK").save(path / "a.jpg"),
    "animation": lambda path: Image.fromarray(_random(20, 30)).save(
        path / "a.gif", save_all=True, append_images=[Image.new("L", (30, 20))]
    ),
    **{
        f"orientation {i}": lambda path, i=i: Image.fromarray(_random(20, 30, 3)).save(path / "a.jpg", **_rotated(i))
        for i in range(1, 9)
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_as_transformers_loads_it(tmp_path, kind):
    KINDS[kind](tmp_path)
    (file,) = tmp_path.iterdir()
    expected = np.asarray(stock_load_image(str(file)))
    for source in (file, str(file), file.read_bytes(), Image.open(file)):
        found = load_image(source)
        assert found.mode == "RGB" and np.array_equal(np.asarray(found), expected)
        assert load_image(source, decode=False).size == found.size
    assert np.array_equal(np.asarray(load_image(file.name, tmp_path)), expected)


def test_a_photo_that_lies_on_its_side_is_turned(tmp_path):
    upright = Image.open(digits.SAMPLE).convert("RGB")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", **_rotated(6))
    assert np.array_equal(np.asarray(load_image(tmp_path / "a.png")), np.asarray(upright))


def test_16_bit_greyscale_is_scaled(tmp_path):
    wide = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    for name in ("a.png", "a.tif"):
        Image.fromarray(wide).save(tmp_path / name)
        found = np.asarray(load_image(tmp_path / name))
        assert found.shape == (24, 32, 3) and np.array_equal(found[..., 0], (wide // 257).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_put_on_white(tmp_path, mode):
    colours = np.concatenate([_random(20, 30, 3), np.full((20, 30, 1), 255, np.uint8)], 2)
    colours[:, :15] = (0, 0, 0, 0)  # black underneath
    image = Image.fromarray(colours, "RGBA")
    if mode == "P":
        image = image.quantize(32)
    elif mode == "PA":
        image = image.convert("P").convert("PA")
        image.putalpha(Image.fromarray(colours[..., 3]))
    else:
        image = image.convert(mode)
    file = tmp_path / ("a.tif" if mode == "PA" else "a.png")
    if mode == "PA":
        found = np.asarray(load_image(image))
    else:
        image.save(file)
        found = np.asarray(load_image(file))
    assert (found[:, :15] == 255).all() and (found[:, 15:] != 255).any()


def _png_of_size(width, height):
    """The header of an image, without its pixels."""
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, "png")
    header = bytearray(stream.getvalue())
    header[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    return bytes(header)


def test_what_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes(digits.SAMPLE.read_bytes()[:300])
    (tmp_path / "thin.png").write_bytes(_png_of_size(MAX_ASPECT * 8 + 8, 8))
    (tmp_path / "large.png").write_bytes(_png_of_size(20000, 20000))
    (tmp_path / "larger.png").write_bytes(_png_of_size(MAX_PIXELS // 10000 + 1, 10000))
    os.mkfifo(tmp_path / "pipe.png")
    for source, message in (
        ("none.png", "image none.png does not exist"),
        ("text.png", "image text.png cannot be read: it is no image"),
        ("empty.png", "image empty.png cannot be read"),
        ("cut.png", "image cut.png cannot be read"),
        ("thin.png", "image thin.png is 1608 x 8: one side is more than 200 times the other"),
        ("large.png", "image large.png has more than 178 million pixels"),
        ("larger.png", "image larger.png has more than 178 million pixels"),
        ("pipe.png", "image pipe.png is no regular file"),
        (".", "image . is a directory"),
        ("a" * 5000, "cannot be read: File name too long"),
        ("a\udc80b", "cannot be read: no file has such a name|does not exist"),
        ("a\0b", "no file has such a name"),
        ("https://example.com/a.png", "is an address, and nothing is fetched"),
        ("data:image/png;base64,AAAA", "is an address"),
        (b"no image", "image from bytes cannot be read"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_image(source, tmp_path)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
        str(error.value).encode()  # printable
