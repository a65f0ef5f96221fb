# type: ignore
# Triton's compiler evaluates annotations, so arguments have none, and its constants have no static types.
"""Triton kernels of the codes: each program handles one group of 2,048 elements.

A program takes the elements in four steps of 512 lanes, a quarter of each block in each step. Neighbouring lanes hold
neighbouring elements, so accesses to memory are coalesced. Elements that share a byte of `packed` are in the same lane.

Kernels compute with int64 if an element has 8 bytes, and with int32 otherwise. Smaller elements take the highest bits,
so that arithmetic wraps as it does in their own type. Products for fingerprints are modulo 2**64.
"""

from __future__ import annotations

from typing import Any

import triton
from triton import language as tl

from revfx.codes import format


GIVEN: Any = tl.constexpr(0)  # a prediction is a, a - b or a + b
DIFFERENCE: Any = tl.constexpr(1)
SUM: Any = tl.constexpr(2)
BLOCK: Any = tl.constexpr(format.BLOCK)
GROUP: Any = tl.constexpr(format.GROUP)
ROW: Any = tl.constexpr(format.ROW)
SAMPLE: Any = tl.constexpr(format.SAMPLE)
STEPS: Any = tl.constexpr(4)
LANES: Any = tl.constexpr(format.GROUP // 4)
QUARTER: Any = tl.constexpr(format.BLOCK // 4)
COUNT: Any = tl.constexpr(1 << 16)  # a unit of the number of escapes, above 16 bits that mark them
CHUNK: Any = tl.constexpr(128)  # escapes that a program moves at once
NUMBERS = ["step", "capacity"]  # arguments that kernels are not specialised for


@triton.jit
def places_of(lanes, j):
    """Return the places in the group of the elements of some lanes in step `j`."""
    return lanes // QUARTER * BLOCK + j * QUARTER + lanes % QUARTER


@triton.jit
def bytes_of(lanes, part, WIDTH: tl.constexpr):
    """Return the places in `packed` of byte number `part`, of `WIDTH // 2`, of each lane."""
    return lanes // QUARTER * (BLOCK * WIDTH // 8) + part * QUARTER + lanes % QUARTER


@triton.jit
def unused_bits(SIZE: tl.constexpr) -> tl.constexpr:
    """Return the number of bits below an element in the integer that holds it."""
    return 32 - 8 * SIZE if SIZE < 4 else 0


@triton.jit
def neighbours(SIZE: tl.constexpr) -> tl.constexpr:
    """Return the number of neighbouring elements that a thread loads, if there are enough threads."""
    return 2 if SIZE == 8 else 4


@triton.jit
def load(t_ptr, index, mask, SIZE: tl.constexpr):
    """Load elements as the integers that kernels compute with; zeros outside of the tensor."""
    bits = tl.load(t_ptr + index, mask=mask, other=0)
    if SIZE < 4:
        bits = bits.to(tl.int32) << unused_bits(SIZE)
    return bits


@triton.jit
def ordered(bits, SIZE: tl.constexpr):
    """Map bits to integers in the order of the numbers, and these to bits."""
    SIGN: tl.constexpr = 63 if SIZE == 8 else 31
    MAGNITUDE: tl.constexpr = (1 << SIGN) - (1 << unused_bits(SIZE))
    return bits ^ (bits >> SIGN & MAGNITUDE)


@triton.jit
def number_of(bits, FLOAT: tl.constexpr):
    """Return the floating-point numbers with these bits; as float32 if they have 16."""
    if FLOAT == "float16":
        number = (bits >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    elif FLOAT == "float64":
        number = bits.to(tl.float64, bitcast=True)
    else:
        number = bits.to(tl.float32, bitcast=True)
    return number


@triton.jit
def bits_of(number, FLOAT: tl.constexpr):
    """Return the bits of numbers that are rounded to `FLOAT`; every NaN gets the same bits."""
    if FLOAT == "float64":
        bits = number.to(tl.int64, bitcast=True)
        NAN: tl.constexpr = 0x7FF8000000000000
    elif FLOAT == "float32":
        bits = number.to(tl.int32, bitcast=True)
        NAN: tl.constexpr = 0x7FC00000
    elif FLOAT == "float16":
        bits = number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
        NAN: tl.constexpr = 0x7E000000
    else:
        bits = number.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + (bits >> 16 & 1) & -0x10000  # to nearest, ties to even
        NAN: tl.constexpr = 0x7FC00000
    return tl.where(number == number, bits, NAN)


@triton.jit
def load_prediction(
    a_ptr, b_ptr, index, mask, SIZE: tl.constexpr, KIND: tl.constexpr, FLOAT: tl.constexpr, OTHER: tl.constexpr
):
    """Load or compute the bits of predictions; zeros outside of the tensor."""
    bits = load(a_ptr, index, mask, SIZE)
    if KIND != GIVEN:
        OTHER_SIZE: tl.constexpr = 2 if OTHER == "float16" or OTHER == "bfloat16" else SIZE
        y, h = number_of(bits, FLOAT), number_of(load(b_ptr, index, mask, OTHER_SIZE), OTHER)
        if KIND == SUM:
            bits = bits_of(y + h, FLOAT)
        else:
            bits = bits_of(y - h, FLOAT)
    return bits


@triton.jit
def weight_of(word):
    """Return the weights of words of 32 bits by their places in the group."""
    w = (word % ROW + 1).to(tl.uint32) * 0x9E3779B1
    w = (w ^ w >> 15) * 0x85EBCA6B
    return (w ^ w >> 13).to(tl.uint64)


@triton.jit
def weigh(bits, place, SIZE: tl.constexpr):
    """Return elements times the weights of their words; over a word, these add up to the word times its weight."""
    if SIZE == 8:
        low, high = bits.to(tl.uint32).to(tl.uint64), (bits >> 32).to(tl.uint32).to(tl.uint64)
        product = low * weight_of(2 * place) + high * weight_of(2 * place + 1)
    else:
        PER_WORD: tl.constexpr = 4 // SIZE
        part = bits.to(tl.uint32) >> (PER_WORD - 1 - place % PER_WORD) * (8 * SIZE)
        product = part.to(tl.uint64) * weight_of(place // PER_WORD)
    return product


@triton.jit
def key_of(group, place, SIZE: tl.constexpr):
    """Return the keys of the rows in which elements of a group lie."""
    row = group * (GROUP * SIZE // 4 // ROW) + place // (4 * ROW // SIZE)
    k = (row + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    return (k ^ k >> 32) | 1


@triton.jit
def sums_of(bits, group, j, SIZE: tl.constexpr):
    """Return the terms of the fingerprint of step `j`, each the sum over some neighbours."""
    NEIGHBOURS: tl.constexpr = neighbours(SIZE)
    products = weigh(bits, places_of(tl.arange(0, LANES), j), SIZE)
    rows = places_of(tl.arange(0, LANES // NEIGHBOURS) * NEIGHBOURS, j)
    return tl.sum(products.reshape(LANES // NEIGHBOURS, NEIGHBOURS), 1) * key_of(group, rows, SIZE)


@triton.jit
def add_sum(words_ptr, total):
    """Add the sum of a group to the first word of the fingerprint."""
    tl.atomic_add(words_ptr, total.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def write_sample(words_ptr, t_ptr, begin, length, step):
    """Copy the elements of the sample that lie in the group. `t_ptr` points to its first element."""
    numbers = tl.arange(0, SAMPLE)
    place = numbers.to(tl.int64) * step - begin
    is_here = (place >= 0) & (place < length)
    sample_ptr = (words_ptr + 1).to(t_ptr.dtype, bitcast=True)
    tl.store(sample_ptr + numbers, tl.load(t_ptr + place, mask=is_here), mask=is_here)


@triton.jit
def write_escapes(values_ptr, places_ptr, x_ptr, escapes, counts, total, SIZE: tl.constexpr):
    """Write the first `total` escapes of a group. `escapes` has a bit for each element of some neighbouring lanes."""
    NEIGHBOURS: tl.constexpr = neighbours(SIZE)
    lanes = tl.arange(0, LANES // NEIGHBOURS) * NEIGHBOURS
    number = tl.cumsum(counts, 0) - counts
    for neighbour in tl.static_range(NEIGHBOURS):
        for j in tl.static_range(STEPS):
            is_escape = escapes >> neighbour * STEPS + j & 1
            is_stored = (is_escape == 1) & (number < total)
            tl.store(places_ptr + number, places_of(lanes + neighbour, j).to(tl.int16), mask=is_stored)
            number += is_escape

    # Threads then share the work evenly: neighbouring threads write neighbouring values.
    tl.debug_barrier()
    for start in range(0, total, CHUNK):
        index = start + tl.arange(0, CHUNK)
        mask = index < total
        place = tl.load(places_ptr + index, mask=mask, other=0)
        tl.store(values_ptr + index, tl.load(x_ptr + place, mask=mask), mask=mask)


@triton.jit
def apply_escapes(out_ptr, values_ptr, places_ptr, first, end, group, SIZE: tl.constexpr):
    """Write escapes over the elements of a group. Return the change of its sum."""
    changes = tl.zeros((CHUNK,), tl.uint64)
    for start in range(first, end, CHUNK):
        index = start + tl.arange(0, CHUNK)
        mask = index < end
        place = tl.load(places_ptr + index, mask=mask, other=0).to(tl.int32)
        value, before = load(values_ptr, index, mask, SIZE), load(out_ptr, place, mask, SIZE)
        changes += (weigh(value, place, SIZE) - weigh(before, place, SIZE)) * key_of(group, place, SIZE)
        tl.store(out_ptr + place, (value >> unused_bits(SIZE)).to(out_ptr.dtype.element_ty), mask=mask)
    return tl.sum(changes, 0)


@triton.jit(do_not_specialize=NUMBERS)
def encode_groups(
    x_ptr, a_ptr, b_ptr, packed_ptr, spans_ptr, values_ptr, places_ptr, count_ptr, words_ptr, n, step, capacity,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, FLOAT: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """Write the code of `x`. Its prediction is `a`, `a - b` or `a + b`.

    Args:
        count_ptr: the number of escapes, initially zero. Each group adds its own number, and so reserves their places.
        words_ptr: the fingerprint, initially zeros.
        step: the distance of elements of the sample.
        capacity: the length of `values` and `places`; further escapes are only counted.
        WIDTH: bits for each distance.
        SIZE: bytes of an element.
        KIND: GIVEN, DIFFERENCE or SUM.
        FLOAT, OTHER: the names of the dtypes of `a` and `b`, if the kernel computes the prediction. OTHER is the same
            as FLOAT, or has 16 bits if `a` is float32.
    """
    PARTS: tl.constexpr = WIDTH // 2 if WIDTH > 0 else 1
    NEIGHBOURS: tl.constexpr = neighbours(SIZE)
    UNUSED: tl.constexpr = unused_bits(SIZE)
    FIELD: tl.constexpr = (1 << WIDTH) - 1
    HALF: tl.constexpr = 1 << WIDTH >> 1 << UNUSED
    BEYOND: tl.constexpr = -(1 << WIDTH + UNUSED)
    group = tl.program_id(0).to(tl.int64)
    begin = group * GROUP
    length = tl.minimum(n - begin, GROUP).to(tl.int32)
    x_ptr += begin
    a_ptr += begin
    b_ptr += begin
    packed_ptr += group * (GROUP * WIDTH // 8)
    lanes = tl.arange(0, LANES)

    # Pack the distances, a byte of each lane at a time, and mark and count escapes.
    escapes = tl.zeros((LANES,), tl.int32)
    sums = tl.zeros((LANES // NEIGHBOURS,), tl.uint64)
    for part in tl.static_range(PARTS):
        packed = tl.zeros((LANES,), tl.int32)
        for field in tl.static_range(STEPS // PARTS):
            j = field * PARTS + part
            place = places_of(lanes, j)
            x = load(x_ptr, place, place < length, SIZE)
            p = load_prediction(a_ptr, b_ptr, place, place < length, SIZE, KIND, FLOAT, OTHER)
            distance = ordered(x, SIZE) - ordered(p, SIZE) + HALF
            packed |= (distance >> UNUSED & FIELD).to(tl.int32) << field * WIDTH
            escapes += tl.where((distance & BEYOND) != 0, (1 << lanes % NEIGHBOURS * STEPS + j) + COUNT, 0)
            sums += sums_of(x, group, j, SIZE)
        if WIDTH > 0:
            mask = places_of(lanes, part) < length
            tl.store(packed_ptr + bytes_of(lanes, part, WIDTH), packed.to(tl.uint8), mask=mask)
    add_sum(words_ptr, tl.sum(sums, 0))
    write_sample(words_ptr, x_ptr, begin, length, step)

    # Reserve places for the escapes of the group, as far as the capacity allows, and write them there.
    escapes = tl.sum(escapes.reshape(LANES // NEIGHBOURS, NEIGHBOURS), 1)
    counts = escapes // COUNT
    total = tl.sum(counts, 0)
    first = tl.atomic_add(count_ptr, total.to(tl.int64), sem="relaxed")
    values_ptr += first
    places_ptr += first
    first = tl.minimum(first, capacity)
    total = tl.minimum(total, capacity - first).to(tl.int32)
    tl.store(spans_ptr + 2 * group, first.to(tl.int32))
    tl.store(spans_ptr + 2 * group + 1, (first + total).to(tl.int32))
    if total > 0:
        write_escapes(values_ptr, places_ptr, x_ptr, escapes, counts, total, SIZE)


@triton.jit(do_not_specialize=NUMBERS)
def decode_groups(
    a_ptr, b_ptr, packed_ptr, spans_ptr, values_ptr, places_ptr, out_ptr, words_ptr, n, step,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr, FLOAT: tl.constexpr,
    OTHER: tl.constexpr,
):  # fmt: skip
    """Write the tensor with a code to `out`, which may be `a` or `b`, and its fingerprint; see `encode_groups`."""
    PARTS: tl.constexpr = WIDTH // 2 if WIDTH > 0 else 1
    NEIGHBOURS: tl.constexpr = neighbours(SIZE)
    UNUSED: tl.constexpr = unused_bits(SIZE)
    FIELD: tl.constexpr = (1 << WIDTH) - 1
    HALF: tl.constexpr = 1 << WIDTH >> 1
    group = tl.program_id(0).to(tl.int64)
    begin = group * GROUP
    length = tl.minimum(n - begin, GROUP).to(tl.int32)
    a_ptr += begin
    b_ptr += begin
    out_ptr += begin
    packed_ptr += group * (GROUP * WIDTH // 8)
    lanes = tl.arange(0, LANES)

    # Load everything before the first store, as `out` may be one of the operands.
    first = tl.load(spans_ptr + 2 * group)
    end = tl.load(spans_ptr + 2 * group + 1)
    packed = ()
    predictions = ()
    for part in tl.static_range(PARTS):
        if WIDTH > 0:
            mask = places_of(lanes, part) < length
            packed += (tl.load(packed_ptr + bytes_of(lanes, part, WIDTH), mask=mask, other=0),)
    for j in tl.static_range(STEPS):
        place = places_of(lanes, j)
        predictions += (load_prediction(a_ptr, b_ptr, place, place < length, SIZE, KIND, FLOAT, OTHER),)

    # Add the distances to the predictions.
    sums = tl.zeros((LANES // NEIGHBOURS,), tl.uint64)
    for j in tl.static_range(STEPS):
        place = places_of(lanes, j)
        x = ordered(predictions[j], SIZE)
        if WIDTH > 0:
            x += (packed[j % PARTS].to(tl.int32) >> j // PARTS * WIDTH & FIELD) - HALF << UNUSED
        x = tl.where(place < length, ordered(x, SIZE), 0)
        tl.store(out_ptr + place, (x >> UNUSED).to(out_ptr.dtype.element_ty), mask=place < length)
        sums += sums_of(x, group, j, SIZE)

    # Escapes overwrite elements that other threads wrote.
    tl.debug_barrier()
    change = apply_escapes(out_ptr, values_ptr, places_ptr, first, end, group, SIZE)
    tl.debug_barrier()
    add_sum(words_ptr, tl.sum(sums, 0) + change)
    write_sample(words_ptr, out_ptr, begin, length, step)


@triton.jit(do_not_specialize=NUMBERS)
def fingerprint_groups(t_ptr, words_ptr, n, step, SIZE: tl.constexpr):
    """Write the fingerprint of a tensor to `words`, which is initially zero."""
    group = tl.program_id(0).to(tl.int64)
    begin = group * GROUP
    length = tl.minimum(n - begin, GROUP).to(tl.int32)
    t_ptr += begin
    sums = tl.zeros((LANES // neighbours(SIZE),), tl.uint64)
    for j in tl.static_range(STEPS):
        place = places_of(tl.arange(0, LANES), j)
        sums += sums_of(load(t_ptr, place, place < length, SIZE), group, j, SIZE)
    add_sum(words_ptr, tl.sum(sums, 0))
    write_sample(words_ptr, t_ptr, begin, length, step)


@triton.jit
def pack_group_marks(marks_ptr, packed_ptr, n):
    """Write marks, bytes that are 0 or 1, as bits: the first one of eight is the lowest bit."""
    bytes = tl.program_id(0).to(tl.int64) * (GROUP // 8) + tl.arange(0, GROUP // 8)
    bits = tl.arange(0, 8)
    index = bytes[:, None] * 8 + bits[None, :]
    marks = tl.load(marks_ptr + index, mask=index < n, other=0).to(tl.int32)
    tl.store(packed_ptr + bytes, tl.sum(marks << bits[None, :], 1).to(tl.uint8), mask=bytes * 8 < n)


@triton.jit
def unpack_group_marks(packed_ptr, out_ptr, n):
    """Write the zeros and ones that `pack_group_marks` packed, as numbers of the dtype of `out`."""
    index = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    marks = tl.load(packed_ptr + index // 8, mask=index < n, other=0).to(tl.int32) >> (index % 8).to(tl.int32) & 1
    tl.store(out_ptr + index, marks.to(tl.float32).to(out_ptr.dtype.element_ty), mask=index < n)
