"""Bytes of a text eight or sixty-four at a time: what compiled functions are made of. Only for modules that compile."""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types

__all__ = [
    "double_bits",
    "double_of",
    "equal_mask",
    "high_mask",
    "high_product",
    "leading_zeros",
    "load",
    "number_of",
    "ones",
    "store",
    "trailing_zeros",
]

_BYTE, _WORD = ir.IntType(8), ir.IntType(64)
_BLOCK = ir.VectorType(_BYTE, 64)


def _intrinsic(function: Callable[..., Any]) -> Any:
    """Compiled functions call it with values, not with types as it is written: mypy cannot know."""
    return extending.intrinsic(function)


def _pointer(context: Any, builder: Any, signature: Any, arguments: Any, kind: ir.Type) -> Any:
    """To the bytes of the array, the first argument, from the index on that is the second."""
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), ir.PointerType(kind))


@_intrinsic
def load(_typing: Any, text: Any, at: Any) -> Any:
    """The 8 bytes of an array from an index on, the first as the lowest. Nothing checks that they are there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.load(_pointer(context, builder, signature, arguments, _WORD))
        word.align = 1
        return word

    return types.uint64(text, at), generate


@_intrinsic
def store(_typing: Any, text: Any, at: Any, _word: Any) -> Any:
    """Writes 8 bytes. Nothing checks that there is room."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        stored = builder.store(arguments[2], _pointer(context, builder, signature, arguments, _WORD))
        stored.align = 1
        return context.get_dummy_value()

    return types.void(text, at, types.uint64), generate


def _mask(relation: str, context: Any, builder: Any, signature: Any, arguments: Any, wanted: Any) -> Any:
    """A bit for each of 64 bytes: one comparison of AVX-512, two of AVX2, four of SSE2 or NEON."""
    block = builder.load(_pointer(context, builder, signature, arguments, _BLOCK))
    block.align = 1
    first = builder.insert_element(ir.Constant(_BLOCK, ir.Undefined), wanted, ir.Constant(ir.IntType(32), 0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), 64), [0] * 64)
    every = builder.shuffle_vector(first, ir.Constant(_BLOCK, ir.Undefined), places)
    compare = builder.icmp_signed if relation == "<" else builder.icmp_unsigned
    return builder.bitcast(compare(relation, block, every), _WORD)


@_intrinsic
def equal_mask(_typing: Any, text: Any, at: Any, _wanted: Any) -> Any:
    """Which of the 64 bytes from an index on equal one byte, the first as the lowest bit."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _mask("==", context, builder, signature, arguments, arguments[2])

    return types.uint64(text, at, types.uint8), generate


@_intrinsic
def high_mask(_typing: Any, text: Any, at: Any) -> Any:
    """Which of the 64 bytes from an index on are not ASCII."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _mask("<", context, builder, signature, arguments, ir.Constant(_BYTE, 0))

    return types.uint64(text, at), generate


@_intrinsic
def trailing_zeros(_typing: Any, _word: Any) -> Any:
    """64 for 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@_intrinsic
def leading_zeros(_typing: Any, _word: Any) -> Any:
    """64 for 0."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctlz(arguments[0], ir.Constant(ir.IntType(1), 0))

    return types.uint64(types.uint64), generate


@_intrinsic
def ones(_typing: Any, _word: Any) -> Any:
    """How many bits are set."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@_intrinsic
def high_product(_typing: Any, _one: Any, _other: Any) -> Any:
    """The upper half of a product of 128 bits."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(factor, wide) for factor in arguments))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, 64)), _WORD)

    return types.uint64(types.uint64, types.uint64), generate


@_intrinsic
def double_of(_typing: Any, _word: Any) -> Any:
    """The float64 of these bits."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float64))

    return types.float64(types.uint64), generate


@_intrinsic
def double_bits(_typing: Any, _number: Any) -> Any:
    """The bits of a float64."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint64))

    return types.uint64(types.float64), generate


@njit(inline="always")
def number_of(digits: Any) -> Any:
    """The number of 8 digits, each a byte from 0 to 9, the first as the lowest."""
    digits = digits * np.uint64(10) + (digits >> np.uint64(8))
    low, high = np.uint64(0x000000FF000000FF), np.uint64(16)
    upper = (digits & low) * np.uint64(0x000F424000000064)
    return (upper + ((digits >> high) & low) * np.uint64(0x0000271000000001)) >> np.uint64(32)
