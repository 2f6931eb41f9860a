"""Images as inputs: decoded, resized and normalized by the server exactly as the model's metadata says."""

import base64
import io
import json
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import polars as pl
import pytest
from onnx import parser
from PIL import Image
from service import Api, decoded, problem, running

from batchserve.admission import admit
from batchserve.allowance import IMAGE_PIXELS
from batchserve.domain import Column, DType, InputTensor, ModelVersion, OutputTensor, Preprocessing, Signature
from batchserve.errors import ModelRefused, SchemaMismatch, ScoringFailed
from batchserve.inference.binding import bind
from batchserve.inference.images import images_of_array, images_of_column
from batchserve.inference.inputs import build_inputs, check_types
from batchserve.inference.kernels import Arrays
from batchserve.inference.run import run
from batchserve.inference.session import open_session
from batchserve.settings import Settings
from batchserve.worker.limits import chunk_limits

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def dots(height: int = 9, width: int = 12, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def smooth(height: int, width: int) -> Image.Image:
    """A picture like a photograph: waves of colour."""
    rows, columns = np.mgrid[0:height, 0:width] / 40
    waves = [np.sin(rows + shift) * np.cos(columns * (1 + shift)) for shift in (0, 0.5, 1)]
    return Image.fromarray(np.uint8(127 + 120 * np.stack(waves, axis=2)))


def saved(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


def tensor(
    spec: Preprocessing, shape: tuple[int | None, ...] = (None, 3, None, None), dtype: DType = "float32"
) -> InputTensor:
    return InputTensor("x", dtype, shape, (Column("image", "image"),), image=spec)


def prepared(data: bytes, target: InputTensor) -> np.ndarray:
    """The values that the model gets for one valid image."""
    images, missing = images_of_column(pl.Series("image", [data]), target)
    array = images.take(np.array([0]))
    assert not missing.any()
    assert not images.errors
    first: np.ndarray = array[0]
    return first


def channels_last(data: bytes, **spec: Any) -> np.ndarray:
    """The pixels that the model gets, in bytes."""
    gray = spec.get("order") == "gray"
    return prepared(data, tensor(Preprocessing(layout="nhwc", **spec), (None, None, None, 1 if gray else 3), "uint8"))


def model(
    shape: str = "N,3,H,W",
    dtype: str = "float",
    *,
    body: str = "flat = Flatten(x) values = Cast<to=1>(flat)",
    gives: str = "float[N,M] values",
    **image: Any,
) -> bytes:
    """A graph that returns its input, as one row for each image."""
    text = f'<ir_version: 8, opset_import: ["" : 17]> g ({dtype}[{shape}] x) => ({gives}) {{ {body} }}'
    graph = parser.parse_model(text)
    if "image" in image:
        image = image["image"]
    entry = graph.metadata_props.add()
    entry.key, entry.value = "batchserve.image", json.dumps(image)
    data: bytes = graph.SerializeToString()
    return data


def plain_model(shape: str) -> bytes:
    head = f'<ir_version: 8, opset_import: ["" : 17]> g (float[{shape}] x) => (float[N,M] values)'
    graph = parser.parse_model(f"{head} {{ values = Flatten(x) }}")
    data: bytes = graph.SerializeToString()
    return data


MEANS = partial(
    model,
    body="means = ReduceMean<axes=[2,3], keepdims=0>(x)",
    gives="float[N,3] means",
)
"""A graph that gives the mean of each channel."""


# --- the input of the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "flat"])
@pytest.mark.parametrize("order", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_pixels_are_scaled_and_normalized_and_laid_out(dtype: DType, order: Any, layout: Any, reverse: bool) -> None:
    image = dots()
    gray = order == "gray"
    pixels = np.asarray(image.convert("L"))[:, :, np.newaxis] if gray else np.asarray(image)
    pixels = pixels[:, :, ::-1] if order == "bgr" else pixels
    mean, std = (MEAN[:1], STD[:1]) if gray else (MEAN, STD)
    expected = (pixels.astype(np.float64) * (1 / 255) - mean) / std
    expected = expected[:, :, ::-1] if reverse else expected
    count = 1 if gray else 3
    shape: tuple[int | None, ...]
    match layout:
        case "nchw":
            expected, shape = np.moveaxis(expected, 2, 0), (None, count, None, None)
        case "nhwc":
            shape = (None, None, None, count)
        case _:
            expected, shape = expected.reshape(-1), (None, 9 * 12 * count)
    spec = Preprocessing(size=(9, 12), order=order, scale=1 / 255, mean=mean, std=std, reverse=reverse, layout=layout)
    got = prepared(saved(image), tensor(spec, shape, dtype))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected.astype(dtype))


def test_single_precision_is_that_of_training_code() -> None:
    """The formula of img2feat: bytes / 255 - mean, / std, and rounded once."""
    image = dots(32, 32)
    spec = Preprocessing(scale=1 / 255, mean=MEAN, std=STD)
    expected = (np.asarray(image) / 255 - MEAN) / STD
    np.testing.assert_array_equal(prepared(saved(image), tensor(spec)), np.moveaxis(expected, 2, 0).astype(np.float32))


def test_one_mean_and_one_std_count_for_all_channels() -> None:
    spec = Preprocessing(scale=1 / 127.5, mean=(1.0,), std=(0.5,))
    expected = (np.asarray(dots()) / 127.5 - 1) / 0.5
    np.testing.assert_allclose(prepared(saved(dots()), tensor(spec)), np.moveaxis(expected, 2, 0), atol=1e-6)


def test_a_graph_of_bytes_gets_the_bytes() -> None:
    np.testing.assert_array_equal(channels_last(saved(dots())), np.asarray(dots()))


def test_a_graph_of_signed_bytes_gets_whole_numbers() -> None:
    spec = Preprocessing(mean=(128.0,), layout="nhwc")
    got = prepared(saved(dots()), tensor(spec, (None, None, None, 3), "int8"))
    np.testing.assert_array_equal(got, np.asarray(dots()).astype(int) - 128)


def test_gray_images_fill_an_input_without_an_axis_of_channels() -> None:
    got = prepared(saved(dots()), tensor(Preprocessing(order="gray"), (None, None, None)))
    np.testing.assert_array_equal(got, np.asarray(dots().convert("L")))


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("size", [(5, 7), (30, 20)])
def test_images_are_stretched_with_each_filter(name: Any, size: tuple[int, int]) -> None:
    expected = dots().resize(size[::-1], FILTERS[name])
    got = channels_last(saved(dots()), resize="stretch", size=size, filter=name)
    np.testing.assert_array_equal(got, np.asarray(expected))


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    # torchvision: Resize(16) keeps the shortest side, the other is int(16 * long / short); CenterCrop(12) begins at
    # int(round((side - 12) / 2)), and halves go to the even number.
    [(40, 40, (16, 16), (2, 2)), (30, 50, (16, 26), (2, 7)), (51, 30, (27, 16), (8, 2)), (16, 17, (16, 17), (2, 2))],
)
def test_a_crop_has_the_shortest_side_and_the_centre_of_torchvision(
    height: int, width: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    image = dots(height, width)
    whole = np.asarray(image.resize(resized[::-1], Image.Resampling.BILINEAR))
    top, left = corner
    got = channels_last(saved(image), resize="crop", size=(12, 12), shortest=16)
    np.testing.assert_array_equal(got, whole[top : top + 12, left : left + 12])


def test_the_shortest_side_is_that_of_the_size_unless_it_is_named() -> None:
    expected = dots(20, 40).resize((24, 12), Image.Resampling.BILINEAR).crop((6, 0, 18, 12))
    np.testing.assert_array_equal(
        channels_last(saved(dots(20, 40)), resize="crop", size=(12, 12)), np.asarray(expected)
    )


def test_a_crop_beyond_the_image_is_black() -> None:
    got = channels_last(saved(dots(10, 10)), resize="crop", size=(5, 10), shortest=5)
    expected = np.zeros((5, 10, 3), np.uint8)
    # torchvision pads (10 - 5) // 2 = 2 on the left, and one more on the right.
    expected[:, 2:7] = np.asarray(dots(10, 10).resize((5, 5), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(got, expected)


def test_without_antialias_pixels_between_are_skipped() -> None:
    """The expected values are those of cv2.resize (OpenCV 5.0)."""
    row = np.array([[0, 10, 200, 30, 255, 60, 7]], np.uint8)
    image = Image.fromarray(np.repeat(row[:, :, np.newaxis], 3, axis=2))
    spec: dict[str, Any] = {"resize": "stretch", "antialias": False}
    assert channels_last(saved(image), size=(1, 3), **spec)[0, :, 0].tolist() == [7, 30, 42]
    assert channels_last(saved(image), size=(1, 10), **spec)[0, :, 0].tolist() == [
        0,
        5,
        58,
        191,
        90,
        109,
        245,
        109,
        36,
        7,
    ]
    assert channels_last(saved(image), size=(1, 3), filter="nearest", **spec)[0, :, 0].tolist() == [0, 200, 255]


@pytest.mark.torch
@pytest.mark.parametrize("name", ["bilinear", "nearest"])
@pytest.mark.parametrize("order", ["bgr", "gray"])
def test_without_antialias_images_are_resized_bit_for_bit_as_by_opencv(order: Any, name: Any) -> None:
    cv2 = pytest.importorskip("cv2")  # it is installed with img2feat
    interpolation = cv2.INTER_LINEAR if name == "bilinear" else cv2.INTER_NEAREST
    random = np.random.default_rng(0)
    for turn in range(100):
        height, width, *size = (int(side) for side in random.integers(1, 500 if turn % 4 == 0 else 70, 4))
        image = dots(height, width, seed=turn)
        size = size if turn % 3 else [224, 224]
        pixels = np.asarray(image.convert("L")) if order == "gray" else np.asarray(image)[:, :, ::-1]
        expected = cv2.resize(np.ascontiguousarray(pixels), size[::-1], interpolation=interpolation)
        got = channels_last(saved(image), resize="stretch", size=tuple(size), antialias=False, filter=name, order=order)
        np.testing.assert_array_equal(got.reshape(expected.shape), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1", "I;16", "CMYK"])
def test_images_of_every_mode_become_rgb_and_gray_as_in_pillow(mode: str) -> None:
    image = dots().convert("L" if mode == "I;16" else "RGB")
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 2) if mode == "I;16" else image.convert(mode)
    if mode == "RGBA":
        image.putalpha(100)
    options = {"transparency": bytes(range(256))} if mode == "P" else {}
    data = saved(image, "tiff" if mode == "CMYK" else "png", **options)
    if mode == "CMYK":
        data = saved(image, "jpeg")
    with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as read:
        warnings.simplefilter("ignore")  # of the transparency
        expected = {"rgb": read.convert("RGB"), "gray": read.convert("L")}
    np.testing.assert_array_equal(channels_last(data), np.asarray(expected["rgb"]))
    np.testing.assert_array_equal(channels_last(data, order="gray")[:, :, 0], np.asarray(expected["gray"]))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif"])
def test_each_format_is_decoded_as_pillow_does(kind: str) -> None:
    data = saved(smooth(40, 50), kind)
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(channels_last(data), np.asarray(image.convert("RGB")))


def test_the_first_frame_of_an_animation_is_decoded() -> None:
    data = saved(dots(seed=0), "gif", save_all=True, append_images=[dots(seed=1)])
    np.testing.assert_array_equal(channels_last(data), np.asarray(dots(seed=0).quantize().convert("RGB")))


def test_an_image_is_rotated_by_its_exif_orientation_only_if_the_model_declares_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # it was taken with the camera turned: the top of the scene is on the right
    data = saved(dots(), exif=exif)
    np.testing.assert_array_equal(channels_last(data), np.asarray(dots()))
    turned = dots().transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(channels_last(data, exif=True), np.asarray(turned))
    np.testing.assert_array_equal(
        channels_last(data, exif=True, resize="crop", size=(6, 6)),
        np.asarray(turned.resize((6, 8), Image.Resampling.BILINEAR).crop((0, 1, 6, 7))),
    )


def test_a_large_jpeg_is_decoded_smaller_where_the_model_allows_a_draft() -> None:
    data = saved(smooth(900, 1300), "jpeg", quality=90)
    got = channels_last(data, resize="stretch", size=(100, 100), draft=True)
    small, whole = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data))
    draft = small.draft(None, (200, 200))
    assert draft is not None
    assert small.size == (325, 225)  # a sixteenth of the work, and more than twice the required size
    reduced = small.resize((100, 100), Image.Resampling.BILINEAR, draft[1])
    np.testing.assert_array_equal(got, np.asarray(reduced))
    exact = np.asarray(whole.resize((100, 100), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(got - exact).max() <= 2


@pytest.mark.parametrize("chosen", ["bilinear", "bicubic", "lanczos", "box", "hamming"])
def test_a_large_jpeg_is_what_pillow_gives_unless_the_model_allows_a_draft(chosen: Any) -> None:
    data = saved(smooth(900, 1300), "jpeg", quality=90)
    whole = Image.open(io.BytesIO(data)).resize((100, 100), Image.Resampling[chosen.upper()])
    got = channels_last(data, resize="stretch", size=(100, 100), filter=chosen)
    np.testing.assert_array_equal(got, np.asarray(whole))


@pytest.mark.parametrize("spec", [{"antialias": False}, {"filter": "nearest"}, {"size": (500, 500)}])
def test_a_jpeg_is_decoded_whole_where_a_difference_would_be_visible(spec: dict[str, Any]) -> None:
    data = saved(smooth(900, 1300), "jpeg")
    chosen = {"resize": "stretch", "size": (100, 100), "draft": True, **spec}
    whole = np.asarray(Image.open(io.BytesIO(data)))[np.newaxis]
    target = tensor(Preprocessing(layout="nhwc", **chosen), (None, None, None, 3), "uint8")
    np.testing.assert_array_equal(channels_last(data, **chosen), images_of_array(whole, target).take(np.arange(1))[0])


def test_equal_images_in_every_wrapping_are_equal_inputs() -> None:
    data = saved(dots())
    text = base64.b64encode(data).decode()
    lines = "\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    target = tensor(Preprocessing(scale=1 / 255))
    columns = [
        pl.Series([data]),
        pl.Series([text]),
        pl.Series([lines]),
        pl.Series([f"data:image/png;base64,{text}"]),
        pl.Series([{"bytes": data, "path": "a.png"}]),
    ]
    inputs = [images_of_column(column, target)[0].take(np.array([0])) for column in columns]
    inputs.append(images_of_array(np.asarray(dots())[np.newaxis], target).take(np.array([0])))
    for array in inputs:
        np.testing.assert_array_equal(array, inputs[0])
    assert inputs[0].std() > 0


# --- invalid images --------------------------------------------------------------------------------------------------


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A small PNG whose header declares very many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def webp_bomb() -> bytes:
    """The header of a WebP file of 16,384 x 16,384 pixels, whose decoder would allocate 2 GiB at once."""
    canvas = bytes(4) + (16_383).to_bytes(3, "little") * 2
    body = b"WEBPVP8X" + struct.pack("<I", len(canvas)) + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


BROKEN = {
    "cut": (saved(dots(40, 40), "jpeg")[:-200], "invalid-image"),
    "damaged": (saved(dots(40, 40))[:100] + b"garbage" * 300, "invalid-image"),
    "text": (b"hello, I am no image", "invalid-image"),
    "empty": (b"", "invalid-image"),
    "bitmap": (saved(dots(), "bmp"), "invalid-image"),
    "bomb": (bomb(), "image-too-large"),
    "webp bomb": (webp_bomb(), "image-too-large"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_decoded_is_an_error_in_its_place(name: str) -> None:
    data, code = BROKEN[name]
    target = tensor(Preprocessing("stretch", (8, 8)))
    images, _ = images_of_column(pl.Series("photo", [saved(dots()), data, saved(dots())]), target)
    array = images.take(np.arange(3))
    assert [(error.record, error.code, error.column) for error in images.errors] == [(1, code, "photo")]
    assert not array[1].any()
    np.testing.assert_array_equal(array[0], array[2])
    assert array[0].any()


def test_damaged_images_are_never_more_than_row_errors() -> None:
    random = np.random.default_rng(0)
    whole = [saved(dots(20, 24), kind) for kind in ("png", "jpeg", "webp", "gif")]
    damaged: list[bytes] = []
    for number in range(300):
        data = bytearray(whole[number % 4])
        for place in random.integers(0, len(data), 3).tolist():
            data[place] = random.integers(256)
        damaged.append(bytes(data[: random.integers(len(data))] if number % 5 == 0 else data))
    target = tensor(Preprocessing("stretch", (8, 8), exif=True))
    images, _ = images_of_column(pl.Series(damaged), target, most_pixels=10**6)
    codes = {error.code for error in images.check()}
    assert 50 < len(images.errors) < 300
    assert codes <= {"invalid-image", "image-too-large"}


def test_the_limit_of_pixels_is_that_of_the_settings() -> None:
    assert Settings.model_fields["image_pixels"].default == IMAGE_PIXELS


def test_a_text_that_is_not_base64_is_an_error() -> None:
    images, _ = images_of_column(pl.Series(["not base64!", "data:image/png;base64,@@"]), tensor(Preprocessing()))
    images.take(np.arange(1))
    assert [error.code for error in images.check()] == ["invalid-image", "invalid-image"]


def test_a_line_is_not_resized_beyond_the_limit_of_pixels() -> None:
    target = tensor(Preprocessing("crop", (224, 224)))
    images, _ = images_of_column(pl.Series([saved(Image.new("RGB", (60_000, 1)))]), target, most_pixels=10**6)
    assert [error.code for error in images.check()] == ["image-too-large"]


def test_an_image_of_another_size_than_the_graph_takes_is_an_error() -> None:
    images, _ = images_of_column(pl.Series([saved(dots(9, 12))]), tensor(Preprocessing(size=(9, 13))))
    (error,) = images.check()
    assert error.code == "wrong-shape"
    assert "9 x 13" in error.message
    assert "9 x 12" in error.message


# --- binding and early checks ----------------------------------------------------------------------------------------

PHOTO = Signature((tensor(Preprocessing()),), ())
PHOTO_AND_AGE = Signature((*PHOTO.inputs, InputTensor("age", "float32", (None, 1), (Column("age", "float32"),))), ())
KINDS: dict[str, pl.DataType | None] = {
    "photo": pl.Binary(),
    "face": pl.Struct({"bytes": pl.Binary(), "path": pl.String()}),
    "id": pl.Int64(),
    "age": pl.Float64(),
    "text": None,
}


def bound(signature: Signature, *columns: str, rename: Any = None) -> str:
    files = {"photo", "face"}
    return bind(signature, columns, rename, holds_bytes=files.__contains__).sources["x"][0]


def test_the_column_of_the_images_is_found() -> None:
    assert bound(PHOTO, "photo", "image") == "image"
    assert bound(PHOTO, "photo", "image", rename={"image": "photo"}) == "photo"
    assert bound(PHOTO, "photo", "id", rename=["id"]) == "id"
    assert bound(PHOTO, "id", "photo") == "photo"
    assert bound(PHOTO_AND_AGE, "id", "face", "age") == "face"
    assert bound(PHOTO, "text") == "text"
    assert bound(PHOTO_AND_AGE, "age", "text") == "text"


@pytest.mark.parametrize("columns", [("photo", "face"), ("text", "id"), ()])
def test_several_columns_that_may_hold_the_images_are_refused(columns: tuple[str, ...]) -> None:
    with pytest.raises(SchemaMismatch, match="takes an image from each record"):
        bound(PHOTO, *columns)


@pytest.mark.parametrize(
    ("values", "said"),
    [([1, 2], "Int64"), (["a", "b"], "base64"), ([b"a", b"b"], "JPEG, PNG, WebP or GIF"), ([[1], [2]], "List")],
)
def test_a_column_without_any_image_is_refused_early(values: list[Any], said: str) -> None:
    frame = pl.DataFrame({"image": values})
    with pytest.raises(SchemaMismatch, match=said):
        check_types(PHOTO, bind(PHOTO, frame.columns), dict(frame.schema), frame)


def test_one_image_among_the_first_records_is_enough() -> None:
    frame = pl.DataFrame({"image": [None, b"no image", bomb(), b"nor this"]})
    check_types(PHOTO, bind(PHOTO, frame.columns), dict(frame.schema), frame)
    nothing = pl.DataFrame({"image": pl.Series([None, None], dtype=pl.Binary())})
    check_types(PHOTO, bind(PHOTO, nothing.columns), dict(nothing.schema), nothing)


def test_an_array_that_is_prepared_already_is_taken_as_it_is() -> None:
    ready = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    signature = Signature((tensor(Preprocessing(scale=1 / 255)),), ())
    inputs, failed, _ = build_inputs(signature, None, {signature.inputs[0].name: ready})
    np.testing.assert_array_equal(inputs["x"], ready)
    ready[1, 0, 0, 0] = np.nan
    _, failed, errors = build_inputs(signature, None, {signature.inputs[0].name: ready})
    assert failed.tolist() == [False, True]
    assert errors[0].code == "missing-value"


@pytest.mark.parametrize("shape", [(5,), (2, 8, 8, 2), (2, 8, 8, 3, 1)])
def test_bytes_that_are_not_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SchemaMismatch, match="expected images of uint8"):
        build_inputs(PHOTO, None, {PHOTO.inputs[0].name: np.zeros(shape, np.uint8)})


# --- running ---------------------------------------------------------------------------------------------------------


def signature_of(
    target: InputTensor, batch: int = 4, mode: Any = "rows", shape: tuple[int | None, ...] = (None, 3)
) -> Signature:
    return Signature((target,), (OutputTensor("means", "float32", shape),), mode=mode, batch=batch)


def means(data: bytes) -> list[float]:
    with Image.open(io.BytesIO(data)) as image:
        average: list[float] = np.asarray(image.convert("RGB")).astype(np.float32).mean(axis=(0, 1)).tolist()
    return average


@pytest.mark.parametrize("mode", ["rows", "fixed"])
def test_images_of_all_sizes_are_grouped_and_return_in_order(mode: str) -> None:
    sizes = [(8, 8), (5, 9), (8, 8), (9, 5), (5, 9), (8, 8), (8, 8), (8, 8), (8, 8)]
    data: list[bytes | None] = [saved(dots(*size, seed=seed)) for seed, size in enumerate(sizes)]
    good = [means(one) for one in data if one is not None]
    data[4], data[6] = None, b"no image"
    images, missing = images_of_column(pl.Series(data, dtype=pl.Binary()), tensor(Preprocessing()))
    ran = run(open_session(MEANS()), signature_of(tensor(Preprocessing()), mode=mode), {"x": images}, len(data))
    for record in (0, 1, 2, 3, 5, 7, 8):
        np.testing.assert_allclose(ran.outputs["means"][record], good[record], rtol=1e-5)
    assert [error.record for error in images.errors] == [6]
    assert missing.tolist() == [record == 4 for record in range(9)]
    assert not ran.errors
    assert ran.seconds > 0


def test_outputs_whose_size_follows_the_image_are_lists() -> None:
    data = [saved(dots(2, 3, seed=0)), saved(dots(4, 1, seed=1)), saved(dots(2, 3, seed=2))]
    images, _ = images_of_column(pl.Series(data), tensor(Preprocessing(), (None, 3, None, None)))
    session = open_session(model(body="y = ReduceMax<axes=[1], keepdims=0>(x)", gives="float[N,H,W] y"))
    signature = signature_of(tensor(Preprocessing()), shape=(None, None, None))
    ran = run(session, signature, {"x": images}, 3)
    for record, one in enumerate(data):
        expected = np.asarray(Image.open(io.BytesIO(one))).max(axis=2)
        assert ran.outputs["y"][record] == expected.tolist()


def test_records_that_make_the_model_fail_are_found_without_decoding_them_again() -> None:
    """The graph looks up the first pixel in a table of three entries."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,1,2,2] x) => (float[N,1] y) <float[3] table = {0.0, 1.0, 2.0}> {
            flat = Flatten(x)
            zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>()
            corner = Slice(flat, zero, one, one)
            index = Cast<to=7>(corner)
            y = Gather(table, index)
        }"""
    target = tensor(Preprocessing(order="gray"), (None, 1, 2, 2))
    shades = [0, 1, 2, 1, 200, 2, 0, 1, 1, 2, 0, 90]
    pixels = np.repeat(np.array(shades, np.uint8), 4).reshape(-1, 2, 2)
    taken: list[int] = []

    class Counted:
        """Images that record which of them were decoded."""

        images = images_of_array(pixels, target)
        shapes = images.shapes

        def take(self, records: np.ndarray) -> np.ndarray:
            taken.extend(records.tolist())
            return self.images.take(records)

    session = open_session(parser.parse_model(text).SerializeToString())
    signature = Signature((target,), (OutputTensor("y", "float32", (None, 1)),), batch=8)
    ran = run(session, signature, {"x": Counted()}, len(shades))
    assert [error.record for error in ran.errors] == [4, 11]
    good = [record for record in range(12) if record not in (4, 11)]
    assert ran.outputs["y"][good, 0].tolist() == [float(shades[record]) for record in good]
    assert taken == list(range(12))


def test_memory_holds_one_batch_of_decoded_images() -> None:
    data = saved(smooth(24, 24), "jpeg")
    target = tensor(Preprocessing("stretch", (224, 224), scale=1 / 255), (None, 3, 224, 224))
    session = open_session(MEANS("N,3,224,224"))
    images, _ = images_of_column(pl.Series([data] * 500), target)
    tracemalloc.start()
    try:
        ran = run(session, signature_of(target, batch=16), {"x": images}, 500)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(ran.outputs["means"]) == 500
    assert peak < 3 * 16 * 3 * 224 * 224 * 4


def test_a_batch_of_large_images_holds_fewer() -> None:
    """With free height and width, the batch was measured on smaller ones."""
    target = tensor(Preprocessing(), (None, 3, None, None))
    images = images_of_array(np.zeros((6, 1500, 1500, 3), np.uint8), target)
    held: list[int] = []

    class Noting:
        def run(self, inputs: Arrays) -> Arrays:
            held.append(inputs["x"].nbytes)
            return {"means": inputs["x"].mean(axis=(2, 3))}

        def close(self) -> None: ...

    ran = run(Noting(), signature_of(target, batch=64), {"x": images}, 6)
    assert len(ran.outputs["means"]) == 6
    assert max(held) <= 64 * 2**20


def test_a_model_that_scores_all_images_at_once_needs_them_of_one_size() -> None:
    target = tensor(Preprocessing())
    images, _ = images_of_column(pl.Series([saved(dots(3, 3)), saved(dots(4, 3))]), target)
    with pytest.raises(ScoringFailed, match="differ in size"):
        run(open_session(MEANS()), signature_of(target, mode="whole"), {"x": images}, 2)


# --- admission -------------------------------------------------------------------------------------------------------


def test_admission_reads_the_preprocessing() -> None:
    data = model("N,3,224,200", resize="stretch", scale=0.5, mean=[1, 2.5, 3], reverse=True, filter="bicubic")
    signature = admit(data).signature
    (target,) = signature.inputs
    assert target.columns == (Column("image", "image"),)
    assert target.image == Preprocessing(
        "stretch", (224, 200), scale=0.5, mean=(1.0, 2.5, 3.0), reverse=True, filter="bicubic"
    )


def test_the_sample_of_an_admitted_model_scores() -> None:
    for data in (MEANS(resize="stretch", size=[16, 16]), MEANS("N,3,20,30"), MEANS()):
        signature = admit(data).signature
        assert len(signature.sample) == 2
        frame = pl.DataFrame(list(signature.sample))
        check_types(signature, bind(signature, frame.columns), {"image": None}, frame)
        inputs, _, errors = build_inputs(signature, bind(signature, frame.columns), frame)
        ran = run(open_session(data), signature, inputs, 2)
        assert not errors
        assert ran.outputs["means"].round().tolist() == [[64.0] * 3, [128.0] * 3]


def test_recorded_samples_with_images_serve_as_probe() -> None:
    graph = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,8,8] x) => (float[N,3] means) '
        "{ means = ReduceMean<axes=[2,3], keepdims=0>(x) }"
    )
    record = {"image": base64.b64encode(saved(dots(8, 8))).decode()}
    for key, value in (("image", {}), ("sample", [record])):
        entry = graph.metadata_props.add()
        entry.key, entry.value = f"batchserve.{key}", json.dumps(value)
    assert admit(graph.SerializeToString()).signature.sample == (record,)


def test_a_graph_of_images_without_metadata_takes_arrays() -> None:
    (target,) = admit(plain_model("N,3,8,8")).signature.inputs
    assert target.image is None
    assert target.columns is None


def test_null_in_metadata_declares_nothing() -> None:
    (target,) = admit(model("N,3,8,8", image=None)).signature.inputs
    assert target.image is None


def test_the_batch_is_tuned_within_the_memory_of_a_probe() -> None:
    signature = admit(MEANS(resize="stretch", size=[300, 300])).signature
    assert signature.batch * 3 * 300 * 300 * 4 <= 64 * 2**20
    assert signature.records_per_second


def test_a_batch_that_needs_too_much_memory_is_not_chosen() -> None:
    """Like a network with large layers, this graph needs terabytes beyond 16 records."""
    greedy = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x) => (float[N,2] y) {
            rows = Shape<start=0, end=1>(x) few = Constant<value_ints=[16]>() none = Constant<value_ints=[0]>()
            beyond = Sub(rows, few) more = Max(beyond, none) tera = Constant<value_ints=[1099511627776]>()
            count = Mul(more, tera) zeros = ConstantOfShape(count) zero = ReduceSum<keepdims=0>(zeros)
            y = Add(x, zero)
        }"""
    )
    assert admit(greedy.SerializeToString()).signature.batch <= 16


@pytest.mark.parametrize(
    ("shape", "image", "said"),
    [
        ("N,3,8,8", {"sise": [8, 8]}, "unknown field 'sise'; known are antialias"),
        ("N,3,8,8", {"resize": "squeeze"}, "resize: .*'squeeze'"),
        ("N,3,8,8", {"size": [8]}, "size"),
        ("N,3,8,8", {"size": ["8", "8"]}, r"size\.0: .* integer"),
        ("N,3,8,8", {"scale": "1/255"}, "scale: .* number"),
        ("N,3,8,8", {"size": [0, 8]}, "1 to 65536, got 0, 8"),
        ("N,3,H,W", {"size": [2**62, 4]}, "1 to 65536"),
        ("N,3,H,W", {"resize": "crop", "size": [4, 4], "shortest": 10**40}, "1 to 65536"),
        ("N,3,8,8", {"scale": float("nan")}, "finite"),
        ("N,3,256,256", {"resize": "stretch", "size": [224, 224]}, r"\[N, 3, 224, 224\].*\[N, 3, 256, 256\]"),
        ("N,1,8,8", {}, r"\[N, 3, N, N\].*\[N, 1, 8, 8\]"),
        ("N,8,8,3", {}, "layout 'nchw'"),
        ("N,3,8,8", {"order": "gray"}, "order 'gray'"),
        ("N,3,8,8", {"layout": "flat", "size": [8, 8]}, "layout 'flat' is for"),
        ("N,192", {"layout": "flat"}, "with a size"),
        ("N,192", {"layout": "nchw"}, "4 axes"),
        ("N,3,H,W", {"resize": "stretch"}, "needs a size"),
        ("N,3,8,8", {"resize": "stretch", "shortest": 9}, "only for resize 'crop'"),
        ("N,3,8,8", {"filter": "bicubic", "antialias": False}, "bilinear or nearest"),
        ("N,3,8,8", {"mean": [0.5, 0.5]}, "mean must have 1 number or 3"),
        ("N,3,8,8", {"std": [1, 0, 1]}, "must not be 0"),
        ("N,3,8,8", {"std": [1e-320]}, "0 to inf, which float32 cannot hold"),
        ("N,3,8,8", {"scale": 1e308, "mean": [1e308]}, "which float32 cannot hold"),
        ("N,3,8,8", {"input": "y"}, "no input 'y'; it has 'x'"),
    ],
)
def test_invalid_preprocessing_is_refused(shape: str, image: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelRefused, match=f"batchserve.image: .*{said}"):
        admit(model(shape, image=image))


def test_pixels_that_an_integer_cannot_hold_are_refused() -> None:
    with pytest.raises(ModelRefused, match="-128 to 127, which uint8 cannot hold"):
        admit(model("N,3,8,8", "uint8", mean=[128]))


# --- whole jobs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service with a model of the mean colour of an image, and one that takes images of any size."""
    with running(tmp_path_factory.mktemp("images"), chunk_records=8, image_pixels=100_000) as api:
        api.register("means", MEANS(resize="stretch", size=[16, 16], scale=1 / 255))
        api.register("free", MEANS())
        yield api


PICTURES = [saved(dots(seed=seed), kind) for seed, kind in enumerate(["png", "jpeg", "webp", "gif"] * 5)]
NAMES = [f"p{number}" for number in range(len(PICTURES))]


def files(pictures: list[bytes | None]) -> dict[str, bytes]:
    """The same images in every format that can hold them."""
    texts = [None if one is None else base64.b64encode(one).decode() for one in pictures]
    uris = [None if text is None else f"data:image/png;base64,{text}" for text in texts]
    names = NAMES[: len(pictures)]
    binary = pl.DataFrame({"id": names, "image": pl.Series(pictures, dtype=pl.Binary())})
    written = {"csv": io.BytesIO(), "jsonl": io.BytesIO(), "parquet": io.BytesIO(), "arrow": io.BytesIO()}
    pl.DataFrame({"id": names, "image": texts}).write_csv(written["csv"])
    pl.DataFrame({"id": names, "image": uris}).write_ndjson(written["jsonl"])
    binary.write_parquet(written["parquet"])
    binary.write_ipc(written["arrow"])
    return {name: target.getvalue() for name, target in written.items()}


def answers(
    api: Api, job: dict[str, Any], columns: tuple[str, ...] = ("means_0", "means_1", "means_2")
) -> pl.DataFrame:
    return decoded(api.result(job, format="parquet").content, "parquet").select(columns)


@pytest.mark.slow
def test_equal_pictures_in_every_format_have_equal_answers(service: Api) -> None:
    given = files(list(PICTURES))
    jobs = {format: service.run(body, "means") for format, body in given.items()}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        for name, picture in zip(NAMES, PICTURES, strict=True):
            members.writestr(f"deep/{name}.img", picture)
    jobs["zip"] = service.run(archive.getvalue(), "means", format="jsonl")
    pixels = io.BytesIO()
    np.save(pixels, np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in PICTURES]))
    jobs["npy"] = service.run(pixels.getvalue(), "means", format="csv")
    expected = answers(service, jobs["parquet"])
    assert expected.height == 20
    assert expected.null_count().sum_horizontal()[0] == 0
    for format, job in jobs.items():
        assert job["state"] == "completed", (format, job)
        np.testing.assert_array_equal(answers(service, job).to_numpy(), expected.to_numpy(), format)
    small = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB").resize((16, 16), 2)) for one in PICTURES])
    np.testing.assert_allclose(expected.to_numpy(), small.mean(axis=(1, 2)) / 255, rtol=1e-4)


def test_an_archive_a_form_and_single_images_have_equal_answers(service: Api) -> None:
    """The archive has a folder, a member that is not an image, and one that is damaged."""
    pictures = PICTURES[:9]
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("deep/", b"")
        for name, picture in zip(NAMES, pictures, strict=False):
            members.writestr(f"deep/{name}", picture)
        members.writestr("notes.txt", b"hello")
        members.writestr("deep/damaged", pictures[0])
    data = bytearray(archive.getvalue())
    data[data.index(b"deep/damaged") + 40] ^= 1
    job = service.run(bytes(data), "means")
    assert (job["rows"], job["chunks"]["total"]) == ({"total": 11, "ok": 9, "failed": 2}, 2)
    result = decoded(service.result(job).content, "jsonl")
    assert result.columns == ["file", "means_0", "means_1", "means_2"]
    assert result["file"].to_list() == [f"deep/{name}" for name in NAMES[:9]] + ["notes.txt", "deep/damaged"]
    assert result["means_0"].is_null().arg_true().to_list() == [9, 10]
    assert [(error["record"], error["code"]) for error in service.errors(job)] == [
        (9, "invalid-image"),
        (10, "invalid-image"),
    ]
    assert "'deep/damaged' is damaged in the archive: its checksum is wrong" in service.errors(job)[1]["message"]

    form = [("file", (name, picture)) for name, picture in zip(NAMES, pictures, strict=False)]
    answer = service.http.post("/v1/predict?model=means", files=form, headers={"prefer": "wait=30"})
    rows = decoded(service.result(answer.json()).content, "jsonl")
    assert rows["file"].to_list() == NAMES[:9]
    assert rows.drop("file").equals(result.drop("file").head(9))
    for number in (0, 1):
        alone = decoded(service.result(service.run(pictures[number], "means")).content, "jsonl")
        assert alone.equals(rows.drop("file").slice(number, 1))


@pytest.mark.parametrize("name", ["means", "free"])
@pytest.mark.parametrize("format", ["csv", "jsonl", "parquet", "arrow"])
def test_a_value_that_is_not_an_image_is_a_row_error_in_its_place(service: Api, format: str, name: str) -> None:
    pictures: list[bytes | None] = list(PICTURES[:12])
    pictures[2:10:2] = [BROKEN["cut"][0], b"hello", bomb(400, 300), None]
    job = service.run(files(pictures)[format], name, key="id")
    assert job["state"] == "completed"
    assert job["rows"] == {"total": 12, "ok": 8, "failed": 4}
    errors = service.errors(job)
    assert [(error["record"], error["code"], error["column"]) for error in errors] == [
        (2, "invalid-image", "image"),
        (4, "invalid-image", "image"),
        (6, "image-too-large", "image"),
        (8, "missing-value", "image"),
    ]
    assert errors[0]["key"] == "p2"
    result = decoded(service.result(job, format="parquet").content, "parquet")
    assert result["id"].to_list() == NAMES[:12]
    assert result["means_0"].is_null().arg_true().to_list() == [2, 4, 6, 8]


def test_many_small_images_are_cut_into_chunks_for_all_processes() -> None:
    signature = admit(MEANS(resize="stretch", size=[16, 16])).signature
    model = ModelVersion(1, "means", 1, "0" * 64, 1, signature)
    limits = chunk_limits(Settings(), model, "zip")
    assert (signature.records_per_second or 0) > 10_000
    assert limits.records == 256
    assert limits.bytes == Settings().chunk_bytes


def test_a_job_gives_the_same_bytes_again(service: Api) -> None:
    body = files(list(PICTURES))["parquet"]
    first, second = (service.run(body, "means") for _ in range(2))
    assert first["chunks"]["total"] > 1
    assert first["result"]["sha256"] == second["result"]["sha256"]


def test_images_are_copied_to_the_result_only_when_they_are_named(service: Api) -> None:
    body = files(list(PICTURES[:3]))["parquet"]
    every = service.run(body, "means", passthrough="all")
    assert decoded(service.result(every).content, "parquet").columns[:2] == ["id", "means_0"]
    named = {
        format: service.run(body, "means", passthrough='["image"]', format=format) for format in ("parquet", "csv")
    }
    assert decoded(service.result(named["parquet"]).content, "parquet")["image"].to_list() == PICTURES[:3]
    texts = decoded(service.result(named["csv"]).content, "csv")["image"].to_list()
    assert [base64.b64decode(text) for text in texts] == PICTURES[:3]
    converted = decoded(service.result(named["parquet"], format="jsonl").content, "jsonl")["image"].to_list()
    assert converted == texts


def test_a_picture_may_be_the_key_of_the_errors(service: Api) -> None:
    job = service.run(files([PICTURES[0], b"hello"])["parquet"], "means", key="image", format="csv")
    assert [(error["record"], error["key"]) for error in service.errors(job)] == [(1, "aGVsbG8=")]


def test_what_npy_and_npz_cannot_hold_is_refused_before_it_is_queued(service: Api) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        members.writestr("a.png", PICTURES[0])
    for options, column in (({"format": "npy"}, "file"), ({"format": "npz", "key": "image"}, "image")):
        params = {"model": "means", **options}
        answer = service.http.post("/v1/predict", content=archive.getvalue(), params=params)
        assert f"cannot hold column '{column}'" in problem(answer, 422, "schema-mismatch")["detail"]
    job = service.run(archive.getvalue(), "means", format="npy", passthrough="none")
    assert np.load(io.BytesIO(service.result(job).content)).shape == (1, 3)


def test_an_invalid_image_changes_no_prediction_of_a_model_that_scores_all_at_once(service: Api) -> None:
    body = "means = ReduceMean<axes=[2,3], keepdims=0>(x) all = ReduceMean<axes=[0]>(means) values = Sub(means, all)"
    service.register("centred", model(body=body, gives="float[N,3] values", resize="stretch", size=[4, 4]))
    good: list[bytes | None] = [PICTURES[0], PICTURES[1], PICTURES[2]]
    faulty = service.run(files([PICTURES[0], b"hello", PICTURES[1], None, PICTURES[2]])["parquet"], "centred")
    assert faulty["rows"] == {"total": 5, "ok": 3, "failed": 2}
    columns = ("values_0", "values_1", "values_2")
    expected = answers(service, service.run(files(good)["parquet"], "centred"), columns)
    got = answers(service, faulty, columns)
    assert got.drop_nulls().equals(expected)
    assert got["values_0"].is_null().arg_true().to_list() == [1, 3]


def test_an_input_without_any_picture_is_refused_before_it_is_queued(service: Api) -> None:
    body = pl.DataFrame({"image": ["aGVsbG8=", "d29ybGQ="]}).write_csv()
    answer = service.http.post("/v1/predict", content=body, params={"model": "means"})
    assert "JPEG, PNG, WebP or GIF" in problem(answer, 422, "schema-mismatch")["detail"]


@pytest.mark.parametrize("model", ["means", "free"])
def test_a_table_without_records_gives_a_result_without_rows(service: Api, model: str) -> None:
    job = service.run(b"image\n", model)
    assert (job["state"], job["rows"]["total"]) == ("completed", 0), job["error"]
    assert service.result(job).content.startswith(b"means_0,means_1,means_2\n")


def test_a_table_without_images_is_refused_with_what_an_image_is(service: Api) -> None:
    answer = service.http.post("/v1/predict", content=b"a,b\n1,2\n", params={"model": "means"})
    body = problem(answer, 422, "schema-mismatch")
    assert body["detail"].startswith(
        "input 'x' takes an image from each record. The input has 'a', 'b'. Send files of images, "
    )
    assert "an array (npy, npz) of uint8 [N, height, width, 3], or pass columns" in body["detail"]
    assert "as bytes, base64 or a data URI in a column" in body["errors"][0]["message"]


def test_an_online_prediction_equals_that_of_the_job(service: Api) -> None:
    text = base64.b64encode(PICTURES[0]).decode()
    job = service.run(files([PICTURES[0]])["parquet"], "means")
    answer = service.http.post("/v1/models/means/predict", json=[{"image": text}, {"image": "aGVsbG8="}]).json()
    assert answer["prediction"][0] == pytest.approx(answers(service, job).row(0, named=True))
    assert answer["prediction"][1]["means_0"] is None
    assert [(error["record"], error["code"]) for error in answer["errors"]] == [(1, "invalid-image")]
    checked = service.http.post("/v1/models/means/validate", json=[{"image": text}, {"image": "aGVsbG8="}]).json()
    assert [(error["record"], error["code"]) for error in checked["errors"]] == [(1, "invalid-image")]
