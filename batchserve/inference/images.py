"""Images as inputs: decoded, resized and normalized as the Preprocessing of a model says, batch by batch."""

import base64
import binascii
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
import polars as pl
from PIL import Image, ImageOps, UnidentifiedImageError

from batchserve.allowance import IMAGE_PIXELS
from batchserve.domain import DType, InputTensor, Preprocessing, RowError
from batchserve.errors import InvalidInput
from batchserve.formats.schema import holds_bytes, numpy_type, shorten
from batchserve.inference.faults import InvalidValue
from batchserve.inference.resize import bilinear, nearest

__all__ = [
    "Images",
    "image_fault",
    "image_size",
    "images_of_array",
    "images_of_column",
    "sample_image",
    "tables",
    "thumbnail_of",
]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_SOURCES = {"rgb": (0, 1, 2), "bgr": (2, 1, 0), "gray": (0,)}
"""Channel of the decoded image for each channel of an order."""
_GAP = 2
"""A JPEG is decoded at 1/2, 1/4 or 1/8 of its size while that is this many times the size wanted, or more, as Pillow's
thumbnails are. Photographs are then within 2 of 255 of a full decode, and those of 12 megapixels take a sixth of its
time; with 1 instead of 2 it is 26 of 255, and a seventh."""
_UNKNOWN = 224
"""Height and width that stand in for an undecodable image, among images of any size."""
_DATA_URI = re.compile(r"\s*data:[^,]{0,200},", re.IGNORECASE)


class Images:
    """The images that fill one input. Decoded on access, so that memory holds those of one batch. An image that is
    missing, cannot be decoded, or has the wrong size for the model, is all zeros. `errors` has an entry for each image
    that was accessed and failed, except missing ones.
    """

    def __init__(self, tensor: InputTensor, source: "_Source", most_pixels: int) -> None:
        assert tensor.image is not None, "the input takes images"
        self.errors: list[RowError] = []
        self._tensor, self._spec = tensor, tensor.image
        self._source, self._most_pixels = source, most_pixels
        self._blank = source.missing.copy()
        self._shapes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._blank)

    @property
    def shapes(self) -> np.ndarray:
        """The shape that each record has in the input [records, axes]; read from the images where they may differ."""
        if self._shapes is None:
            self._shapes = self._find_shapes()
        return self._shapes

    def take(self, records: np.ndarray) -> np.ndarray:
        """The input for these records [records, ...], which must have the same shape."""
        shape = self.shapes[records[0]] if len(records) else self.shapes[:1].reshape(-1)
        batch = np.empty((len(records), *shape), numpy_type(self._tensor.dtype))
        with _decoding():
            for target, record in zip(batch, records.tolist(), strict=True):
                self._fill(target, record)
        return batch

    def check(self) -> list[RowError]:
        """The errors of all images, which are decoded one by one."""
        for record in range(len(self)):
            self.take(np.array([record]))
        return self.errors

    def _fill(self, target: np.ndarray, record: int) -> None:
        if self._blank[record]:
            target[...] = 0
            return
        with self._noting(record):
            pixels = _pixels(self._opened(record), self._spec, self._most_pixels)
            _require_size(self._tensor, pixels.shape[:2])
            if _shape(self._tensor, pixels.shape[:2]) != target.shape:
                raise InvalidValue("invalid-image", "the image has a different size than its header says")
            _normalize(pixels, self._spec, self._tensor.dtype, target)
        if self._blank[record]:
            target[...] = 0

    def _opened(self, record: int) -> Image.Image:
        image = self._source.open(record, self._most_pixels)
        _require_pixels(image.size, self._most_pixels)
        return image

    def _find_shapes(self) -> np.ndarray:
        if self._spec.size is not None:
            return np.tile(np.array(_shape(self._tensor, self._spec.size), np.int64), (len(self), 1))
        sizes: dict[int, tuple[int, int]] = {}
        with _decoding():
            for record in np.flatnonzero(~self._blank).tolist():
                with self._noting(record):
                    size = _upright_size(self._opened(record), self._spec)
                    _require_size(self._tensor, size)
                    sizes[record] = size
        # One that cannot be decoded may have any size.
        other = next(iter(sizes.values()), image_size(self._tensor, _UNKNOWN))
        shapes = [_shape(self._tensor, sizes.get(record, other)) for record in range(len(self))]
        return np.array(shapes, np.int64).reshape(len(self), len(self._tensor.shape) - 1)

    @contextmanager
    def _noting(self, record: int) -> Iterator[None]:
        """Records the error of an image that cannot be scored."""
        try:
            yield
        except InvalidValue as invalid:
            self._blank[record] = True
            self.errors.append(invalid.row_error(record, self._source.column))


@dataclass(frozen=True, slots=True)
class _Source:
    """The source of images. `open(record, most_pixels)` reads the header of one, and raises InvalidValue."""

    open: Callable[[int, int], Image.Image]
    missing: np.ndarray
    column: str
    """The name of the column or of the array."""


def images_of_column(
    series: pl.Series, tensor: InputTensor, most_pixels: int = IMAGE_PIXELS
) -> tuple[Images, np.ndarray]:
    """The images of a column, and a mask of the records that have none.

    The column holds bytes, texts with base64 or data URIs, or structs with a field `bytes`.
    """
    values = _files(series)
    missing = values.is_null().to_numpy()
    source = _Source(lambda record, most: _opened(_encoded(values[record]), most), missing, series.name)
    return Images(tensor, source, most_pixels), missing


def images_of_array(
    array: np.ndarray, tensor: InputTensor, most_pixels: int = IMAGE_PIXELS, name: str | None = None
) -> Images:
    """The images of an uint8 array [N, H, W, C] or [N, H, W], as they would be decoded: C is 1 (gray), 3 (RGB) or 4
    (RGBA). `name`: of the array, where it is not that of the input."""
    pixels = array[..., 0] if array.ndim == 4 and array.shape[3] == 1 else array
    source = _Source(
        lambda record, _: Image.fromarray(pixels[record]), np.zeros(len(pixels), bool), name or tensor.name
    )
    return Images(tensor, source, most_pixels)


def image_fault(kind: pl.DataType | None, values: pl.Series) -> str | None:
    """Why a column of this type, or with these first values, holds no images; None when it may hold some."""
    if kind is not None and not (holds_bytes(kind) or isinstance(kind, pl.String | pl.Null)):
        return f"expected images (bytes, or texts with base64), got {kind}"
    given = _files(values).drop_nulls()
    first: str | None = None
    with _decoding():
        for value in given:
            try:
                _opened(_encoded(value), IMAGE_PIXELS)
            except InvalidValue as invalid:
                if invalid.code == "image-too-large":
                    return None
                first = first or f"{invalid.message}: {shorten(value)}"
            else:
                return None
    return first


def image_size(tensor: InputTensor, guess: int) -> tuple[int, int]:
    """Height and width of images that an input takes, with `guess` for a size that it leaves open."""
    assert tensor.image is not None, "the input takes images"
    height, width = tensor.image.size or _open_size(tensor)
    return height or guess, width or guess


def sample_image(tensor: InputTensor, shade: int) -> str:
    """A small gray image that an input takes, as a data URI."""
    assert tensor.image is not None, "the input takes images"
    height, width = (16, 16) if tensor.image.resize else image_size(tensor, _UNKNOWN)
    file = BytesIO()
    Image.new("L", (width, height), shade).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def thumbnail_of(values: pl.Series | np.ndarray, side: int, most_pixels: int) -> bytes:
    """The first image of a column or array as a small JPEG, upright and in its proportions. Raises InvalidInput."""
    with _decoding():
        try:
            if isinstance(values, np.ndarray):
                with _reading():
                    is_gray = values.ndim == 4 and values.shape[3] == 1
                    image = Image.fromarray(values[0, ..., 0] if is_gray else values[0])
            else:
                image = _opened(_encoded(_files(values)[0]), most_pixels)
            _require_pixels(image.size, most_pixels)
            with _reading():
                image.draft(None, (side, side))
                image.thumbnail((side, side))
                with suppress(Exception):  # invalid EXIF is ignored
                    ImageOps.exif_transpose(image, in_place=True)
                file = BytesIO()
                image.convert("L" if image.mode in ("1", "L") else "RGB").save(file, "JPEG", quality=80)
        except InvalidValue as invalid:
            raise InvalidInput(invalid.message) from invalid
    return file.getvalue()


# --- decoding --------------------------------------------------------------------------------------------------------


@contextmanager
def _decoding() -> Iterator[None]:
    """Pillow without its warnings and without its own limit, which `_opened` replaces."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _files(series: pl.Series) -> pl.Series:
    return series.struct.field("bytes") if holds_bytes(series.dtype) and series.dtype != pl.Binary() else series


def _encoded(value: Any) -> bytes:
    """The bytes of an image file. Raises InvalidValue."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise InvalidValue("invalid-image", f"expected an image, got {shorten(value)}")
    text = value[found.end() :] if (found := _DATA_URI.match(value)) else value
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidValue("invalid-image", "expected an image as base64 or a data URI, got another text") from error


def _opened(data: bytes, most_pixels: int) -> Image.Image:
    """An image with its header read and nothing decoded. Raises InvalidValue."""
    if size := _webp_size(data):
        _require_pixels(size, most_pixels)  # before its decoder takes the memory of all pixels
    with _reading():
        return Image.open(BytesIO(data), formats=_FORMATS)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height as the first chunk of a WebP file gives them; None for other files.
    https://developers.google.com/speed/webp/docs/riff_container"""
    match data[:4], data[8:16]:
        case b"RIFF", b"WEBPVP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        case b"RIFF", b"WEBPVP8L":
            bits = int.from_bytes(data[21:25], "little")
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"RIFF", b"WEBPVP8 ":
            return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _require_pixels(size: tuple[int, int], most: int) -> None:
    width, height = size
    if width * height > most:
        raise InvalidValue(
            "image-too-large", f"the image has {width} x {height} pixels, and at most {most:,} are decoded"
        )


@contextmanager
def _reading() -> Iterator[None]:
    """Turns any exception of Pillow for damaged bytes into InvalidValue."""
    try:
        yield
    except (MemoryError, InvalidValue):
        raise
    except Exception as error:  # its parsers raise OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        if isinstance(error, UnidentifiedImageError):
            raise InvalidValue("invalid-image", "expected a JPEG, PNG, WebP or GIF image") from error
        raise InvalidValue("invalid-image", f"the image cannot be decoded: {str(error)[:200]}") from error


def _pixels(image: Image.Image, spec: Preprocessing, most_pixels: int) -> np.ndarray:
    """The image [height, width, channels] in bytes, resized; RGB, or gray. Raises InvalidValue."""
    size = _resized_size(spec, *_upright_size(image, spec)) if spec.resize else None
    if size is not None:
        _require_pixels(size[::-1], most_pixels)  # resizing the shortest side makes a thin line very long
    with _reading():
        box = _drafted(image, spec, size) if size else None
        image.load()
        if spec.exif:
            with suppress(Exception):  # invalid EXIF is ignored
                ImageOps.exif_transpose(image, in_place=True)
        image.info.pop("transparency", None)  # alpha is dropped, not blended
        mode = "L" if spec.order == "gray" else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if size is not None and spec.antialias:
            image = _resize(image, size, _FILTERS[spec.filter], box)
        pixels = np.asarray(image)
    if size is not None and not spec.antialias and size != pixels.shape[:2]:
        pixels = (nearest if spec.filter == "nearest" else bilinear)(pixels, *size)
    if spec.resize == "crop" and spec.size is not None:
        pixels = _centre(pixels, spec.size)
    return pixels if pixels.ndim == 3 else pixels[:, :, np.newaxis]


def _upright_size(image: Image.Image, spec: Preprocessing) -> tuple[int, int]:
    """Height and width, as they are after the image was turned."""
    width, height = image.size
    if spec.exif:
        with suppress(Exception):  # as above
            if image.getexif().get(_ORIENTATION) in _SIDEWAYS:
                return width, height
    return height, width


_ORIENTATION = 0x0112
"""The tag of EXIF."""
_SIDEWAYS = (5, 6, 7, 8)


def _drafted(image: Image.Image, spec: Preprocessing, size: tuple[int, int]) -> tuple[float, ...] | None:
    """Selects a reduced JPEG decode where the model allows it; returns the box of the image in it."""
    if (
        not spec.draft
        or not spec.antialias
        or spec.filter == "nearest"
        or spec.exif
        or image.format not in ("JPEG", "MPO")
    ):
        return None
    height, width = size
    drafted = image.draft(None, (_GAP * width, _GAP * height))
    return drafted[1] if drafted else None


def _resized_size(spec: Preprocessing, height: int, width: int) -> tuple[int, int]:
    """Height and width to which an image is resized; of a crop as torchvision's Resize(shortest) rounds them."""
    assert spec.size is not None, "admission wants a size beside a resize"
    if spec.resize == "stretch":
        return spec.size
    short = spec.shortest or min(spec.size)
    long = int(short * max(height, width) / min(height, width))
    return (short, long) if height <= width else (long, short)


def _resize(
    image: Image.Image, size: tuple[int, int], resampling: Image.Resampling, box: tuple[float, ...] | None
) -> Image.Image:
    height, width = size
    if image.size == (width, height):
        return image
    return image.resize((width, height), resampling, (box[0], box[1], box[2], box[3]) if box else None)


def _centre(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The crop of torchvision's CenterCrop, with its rounding, and black beyond the image."""
    for axis, want in enumerate(size):
        have = pixels.shape[axis]
        if have < want:
            before = (want - have) // 2
            sides = [(0, 0)] * pixels.ndim
            sides[axis] = before, want - have - before
            pixels = np.pad(pixels, sides)
        else:
            first = round((have - want) / 2)
            pixels = pixels[first : first + want] if axis == 0 else pixels[:, first : first + want]
    return pixels


# --- from pixels to the input ----------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def tables(spec: Preprocessing, dtype: DType) -> tuple[tuple[int, np.ndarray | None], ...]:
    """For each channel of the input: its channel in the decoded image, and the model's value for each of 0 to 255;
    None: unchanged.

    The values are computed in double precision and rounded once, to the dtype of the input; to a whole number for an
    integer. Raises OverflowError when one does not fit.
    """
    sources = _SOURCES[spec.order]
    mean, std = (_each(given, len(sources), blank) for given, blank in ((spec.mean, 0.0), (spec.std, 1.0)))
    channels = [(source, _table(spec.scale, mean[place], std[place], dtype)) for place, source in enumerate(sources)]
    return tuple(channels[::-1] if spec.reverse else channels)


def _each(given: tuple[float, ...], channels: int, blank: float) -> tuple[float, ...]:
    return given * channels if len(given) == 1 else given or (blank,) * channels


def _table(scale: float, mean: float, std: float, dtype: DType) -> np.ndarray | None:
    pixels = np.arange(256, dtype=np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # infinite values then do not fit
        values = (pixels * scale - mean) / std
    target = numpy_type(dtype)
    if target.kind == "f":
        with np.errstate(over="ignore"):
            table = values.astype(target)
        fits = np.isfinite(table).all()
    else:
        values = np.rint(values)
        bounds = np.iinfo(target)
        fits = bool((values >= bounds.min).all() and (values <= bounds.max).all())
        table = values.astype(target) if fits else values
    if not fits:
        raise OverflowError(f"pixels become {values.min():g} to {values.max():g}, which {dtype} cannot hold")
    return None if target == np.uint8 and (values == pixels).all() else table


def _normalize(pixels: np.ndarray, spec: Preprocessing, dtype: DType, target: np.ndarray) -> None:
    """Writes one image [height, width, channels] of bytes into its place in the input."""
    if spec.layout == "nchw":
        planes = target.reshape(-1, *pixels.shape[:2])
    else:
        planes = np.moveaxis(target.reshape(*pixels.shape[:2], -1), 2, 0)
    for plane, (source, table) in zip(planes, tables(spec, dtype), strict=True):
        plane[...] = pixels[:, :, source] if table is None else table.take(pixels[:, :, source])


def _shape(tensor: InputTensor, size: tuple[int, int]) -> tuple[int, ...]:
    """The shape of one record that holds an image of this size."""
    assert tensor.image is not None, "the input takes images"
    height, width = size
    channels = len(_SOURCES[tensor.image.order])
    if tensor.image.layout == "flat":
        return (height * width * channels,)
    if len(tensor.shape) == 3:
        return height, width
    return (channels, height, width) if tensor.image.layout == "nchw" else (height, width, channels)


def _open_size(tensor: InputTensor) -> tuple[int | None, int | None]:
    """Height and width of the input, None where it takes any."""
    assert tensor.image is not None, "the input takes images"
    if tensor.image.layout == "flat":
        return None, None
    first = 2 if tensor.image.layout == "nchw" and len(tensor.shape) == 4 else 1
    return tensor.shape[first], tensor.shape[first + 1]


def _require_size(tensor: InputTensor, size: tuple[int, ...]) -> None:
    assert tensor.image is not None, "the input takes images"
    wanted = tensor.image.size or _open_size(tensor)
    if any(want not in (None, got) for want, got in zip(wanted, size, strict=True)):
        expected, got = (" x ".join("any" if each is None else str(each) for each in sides) for sides in (wanted, size))
        message = f"expected an image of {expected} pixels (height x width), got one of {got}"
        raise InvalidValue("wrong-shape", message)
