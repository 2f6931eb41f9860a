"""Resizing as cv2 does, without antialiasing.

Bit for bit what cv2.resize gives for bytes (OpenCV 4 and 5 on x86): it takes the two nearest pixels of each axis,
however much the image shrinks, with weights in units of 1/2048, and drops bits in between.
"""

from functools import lru_cache

import numpy as np

__all__ = ["bilinear", "nearest"]

_ONE = 2048


def nearest(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """cv2.INTER_NEAREST of bytes [rows, columns] or [rows, columns, channels]."""
    rows, columns = (
        np.minimum((np.arange(wanted) * (1 / (wanted / there))).astype(np.intp), there - 1)
        for there, wanted in zip(pixels.shape, (height, width), strict=False)
    )
    resized: np.ndarray = pixels[rows[:, np.newaxis], columns]
    return resized


def bilinear(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """cv2.INTER_LINEAR of bytes [rows, columns] or [rows, columns, channels]."""
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    rows, upper, lower, up, down = _row_weights(pixels.shape[0], height)
    left, right, weights = _column_weights(pixels.shape[1], width, channels)
    flat = pixels.reshape(len(pixels), -1)
    flat = flat if len(rows) == len(flat) else flat[rows]
    across = flat.take(left, axis=1) * weights[0]
    across += flat.take(right, axis=1) * weights[1]
    across >>= 4
    result = across.take(upper, axis=0)
    result *= up
    result >>= 16
    other = across.take(lower, axis=0)
    other *= down
    other >>= 16
    result += other
    result += 2
    result >>= 2
    resized: np.ndarray = result.astype(np.uint8).reshape(height, width, *pixels.shape[2:])
    return resized


@lru_cache(maxsize=256)
def _row_weights(there: int, wanted: int) -> tuple[np.ndarray, ...]:
    """The rows that are needed, which of these are above and below each row wanted, and the weights of both."""
    first, fraction = _places(there, wanted)
    above, below = np.clip(first, 0, there - 1), np.clip(first + 1, 0, there - 1)
    rows, places = np.unique(np.concatenate([above, below]), return_inverse=True)
    weights = _weights(fraction)[:, :, np.newaxis]
    return rows, places[:wanted], places[wanted:], weights[0], weights[1]


@lru_cache(maxsize=256)
def _column_weights(there: int, wanted: int, channels: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each value of a row wanted, in all channels, the places of the values left and right of it, and weights."""
    first, fraction = _places(there, wanted)
    outside = (first < 0) | (first >= there - 1)
    first = np.clip(first, 0, there - 1)
    weights = _weights(np.where(outside, np.float32(0), fraction))
    left, right = (
        (place[:, np.newaxis] * channels + np.arange(channels)).reshape(-1)
        for place in (first, np.minimum(first + 1, there - 1))
    )
    return left, right, np.repeat(weights, channels, axis=1)


def _places(there: int, wanted: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixel left of the centre of each one wanted, and how far behind it that lies."""
    centres = ((np.arange(wanted) + 0.5) * (1 / (wanted / there)) - 0.5).astype(np.float32)
    first = np.floor(centres)
    return first.astype(np.intp), centres - first


def _weights(fraction: np.ndarray) -> np.ndarray:
    return np.rint(np.stack([1 - fraction, fraction]) * np.float32(_ONE)).astype(np.int32)
