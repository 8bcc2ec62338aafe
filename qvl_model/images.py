"""Images as people have them, as RGB: the one loader of the command line, of training and of calibration.

It gives what ``transformers.image_utils.load_image`` gives, EXIF rotation included, but for two kinds: 16-bit greyscale
is scaled to 8 bits, where that makes it white, and transparency is put on white, where that shows the colours under it.
"""

import io
import os
import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

__all__ = ["MAX_ASPECT", "MAX_PIXELS", "load_image"]

MAX_PIXELS = 178_956_970  # PIL's own limit: 512 MB as RGB
MAX_ASPECT = 200  # of the longer to the shorter side: the limit of the image processors
ORIENTATION = 0x0112  # the EXIF tag
ADDRESSES = ("http://", "https://", "ftp://", "file://", "data:")


def load_image(
    source: str | os.PathLike | bytes | Image.Image, folder: str | os.PathLike = "", *, decode: bool = True
) -> Image.Image:
    """An image in RGB, upright; of an animation the first frame.

    Args:
        source: a file, the bytes of one, or an image of PIL.
        folder: where relative paths start.
        decode: False reads the header only; the result has the size of the image and no content.
    Raises: ValueError, naming the file, for what is no image that can be read, and for images of more than
        ``MAX_PIXELS`` pixels or with one side more than ``MAX_ASPECT`` times the other.
    Example:
        >>> image = load_image("photo.jpg")
    """
    if isinstance(source, Image.Image):
        return _upright(source, "from memory", decode)
    file: io.BytesIO | Path
    if isinstance(source, bytes):
        name, file = "from bytes", io.BytesIO(source)
    else:
        name = _short(os.fspath(source))
        file = _checked(source, folder, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return _upright(image, name, decode)
    except Image.DecompressionBombError as error:
        raise ValueError(f"image {name} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller") from error
    except (OSError, SyntaxError, ValueError, OverflowError) as error:
        if str(error).startswith(f"image {name} "):
            raise
        reason = "it is no image, or of an unknown kind" if "cannot identify" in str(error) else str(error)
        raise ValueError(f"image {name} cannot be read: {' '.join(reason.split())}") from error


def _short(path: str) -> str:
    """A path as it may be printed."""
    text = path.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 300 else f"{text[:150]}...{text[-100:]}"


def _checked(source: str | os.PathLike, folder: str | os.PathLike, name: str) -> Path:
    if os.fspath(source).lower().startswith(ADDRESSES):
        raise ValueError(f"image {name} is an address, and nothing is fetched; save it and give the file")
    file = Path(folder, source)
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError as error:
        raise ValueError(f"image {name} does not exist") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte, or characters that no file name has
        reason = error.strerror if isinstance(error, OSError) else "no file has such a name"
        raise ValueError(f"image {name} cannot be read: {reason}") from error
    if not stat.S_ISREG(mode):
        raise ValueError(
            f"image {name} is {'a directory' if stat.S_ISDIR(mode) else 'no regular file'}; give an image file"
        )
    return file


def _upright(image: Image.Image, name: str, decode: bool) -> Image.Image:
    """Raises: ValueError for sizes beyond the limits."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"image {name} is {width} x {height}, more than {MAX_PIXELS // 10**6} million pixels; make it smaller"
        )
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"image {name} is {width} x {height}: one side is more than {MAX_ASPECT} times the other; crop it"
        )
    if not decode:
        here = image.format != "PNG" or "exif" in image.info  # a PNG without it would be read to its end
        turned = here and image.getexif().get(ORIENTATION) in (5, 6, 7, 8)
        return Image.new("1", (height, width) if turned else (width, height))
    return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16 and its like, and I, as which older versions of PIL open PNGs of 16 bits
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
