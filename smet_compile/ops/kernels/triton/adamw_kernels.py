"""Defines the kernel of "triton_adamw" that moves the weights.

A program takes a piece of one parameter: one block, however large; consecutive entries or small blocks; or the single
weights of some groups.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_step as at
from smet_compile.ops.kernels.triton.adamw_step import (
    LANES,
    SPAN,
    block_key,
    entries_from,
    inverse_of,
    is_finite,
    load_moments,
    magnitudes,
    next_moments,
    pointer,
    rates_at,
    rates_at_matrix,
    rates_of,
    scalars,
    scale_of,
    scale_pointers,
    store_step,
    tensors,
)

_SCAN = tl.constexpr(4 * LANES.value)
"""Entries that are checked at a time for a gradient that is not finite."""


@triton.jit
def _all_finite(grad_pointer, size):
    """Tells whether a block's gradient is finite; it is read from memory here, and from the cache afterwards."""
    zero = tl.zeros((_SCAN,), tl.float32)
    for start in range(0, size, _SCAN):
        lane = start + tl.arange(0, _SCAN)
        grad = tl.load(grad_pointer + lane, mask=lane < size, other=0.0).to(tl.float32)
        zero = tl.fma(grad, 0.0, zero)  # not a number from the first that is not finite
    return tl.max((zero != 0.0).to(tl.int32)) == 0


@triton.jit
def _update_block(
    row,
    grad_address,
    rates,
    block,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates a block, however large, LANES entries at a time.

    Its moments are computed once for their scales, and again for their codes.
    """
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    size = tl.load(row + at.BLOCK_SIZE).to(tl.int32)
    if ALIGNED:
        size = size // 16 * 16
    first = block.to(tl.int64) * size
    values, exp_avg, exp_avg_sq = tensors(row, first, DTYPES, ALIGNED)
    grad_pointer = entries_from(grad_address, first, DTYPES[1], ALIGNED)
    if not _all_finite(grad_pointer, size):
        tl.atomic_add(pointer(row, at.NUM_SKIPPED, tl.int64), 1)
    else:
        betas, eps, key = scalars(row)
        block_position = tl.load(pointer(row, at.POSITIONS, INDEX) + block)
        key = block_key(key, block_position)
        generation = tl.load(pointer(row, at.GENERATION, GENERATION) + block).to(tl.int32)
        rate = rates_at(rates_of(row, rates), generation)
        old_scales = 0.0, 0.0
        inverses = 0.0, 0.0
        if CODED:
            pointers = scale_pointers(row, block_position)
            old_scales = tl.load(pointers[0]), tl.load(pointers[1])
            largest_m = tl.zeros((LANES,), tl.float32)
            largest_v = tl.zeros((LANES,), tl.float32)
            for start in range(0, size, LANES):
                lane = start + tl.arange(0, LANES)
                mask = lane < size
                grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
                moments = load_moments(exp_avg, exp_avg_sq, lane, mask, old_scales)
                size_m, size_v = magnitudes(next_moments(moments, grad, mask, betas))
                largest_m = tl.maximum(largest_m, size_m)
                largest_v = tl.maximum(largest_v, size_v)
            new_scales = scale_of(tl.max(largest_m)), scale_of(tl.max(largest_v))
            tl.store(pointers[0], new_scales[0])
            tl.store(pointers[1], new_scales[1])
            inverses = inverse_of(new_scales[0]), inverse_of(new_scales[1])
        for start in range(0, size, LANES):
            lane = start + tl.arange(0, LANES)
            mask = lane < size
            grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
            moments = load_moments(exp_avg, exp_avg_sq, lane, mask, old_scales)
            weight = tl.load(values + lane, mask=mask, other=0.0).to(tl.float32)
            moments = next_moments(moments, grad, mask, betas)
            store_step(
                values, exp_avg, exp_avg_sq, lane, mask, mask, weight, moments, rate, eps, inverses, key,
                lane.to(tl.uint32), STOCHASTIC,
            )  # fmt: skip


@triton.jit
def _live(grad, mask, lane, size, SINGLE: tl.constexpr):
    """Finds the lanes in ``mask`` of blocks (of ``size`` entries) whose gradient is finite."""
    finite = is_finite(grad)
    if not SINGLE:
        broken = (mask & ~finite).to(tl.int32)
        if tl.max(broken) > 0:
            for block in range(0, tl.max(tl.where(mask, lane, 0)) // size + 1):
                mine = lane // size == block
                broken = tl.where(mine, tl.max(tl.where(mine, broken, 0)), broken)
        finite = broken == 0
    return mask & finite


@triton.jit
def _count_skipped(row, count, num_live, size):
    """Counts skipped blocks, given the number of entries and, in each lane, how many of them were updated."""
    skipped = (count - tl.sum(num_live)) // size
    if skipped > 0:
        tl.atomic_add(pointer(row, at.NUM_SKIPPED, tl.int64), skipped.to(tl.int64))


@triton.jit
def _pointers(row, grad_address, first, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns pointers to entry ``first`` of values, moments and gradient."""
    values, exp_avg, exp_avg_sq = tensors(row, first, DTYPES, ALIGNED)
    return values, exp_avg, exp_avg_sq, entries_from(grad_address, first, DTYPES[1], ALIGNED)


@triton.jit
def _update_lanes(
    row, tensors_and_grad, numbers, rate, lane, mask, key, place, size, group, STOCHASTIC: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """Updates the entries ``lane``, of blocks of ``size`` entries, all in one group. SINGLE: ``size`` is 1.

    Returns which of them it updated.
    """
    values, exp_avg, exp_avg_sq, grad_pointer = tensors_and_grad
    betas, eps = numbers
    CODED: tl.constexpr = exp_avg.dtype.element_ty == tl.uint8
    scales = 0.0, 0.0
    if CODED:
        to_m, to_v = scale_pointers(row, group)
        scales = tl.load(to_m), tl.load(to_v)
    grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
    moments = load_moments(exp_avg, exp_avg_sq, lane, mask, scales)
    weight = tl.load(values + lane, mask=mask, other=0.0).to(tl.float32)
    live = _live(grad, mask, lane, size, SINGLE)
    moments = next_moments(moments, grad, live, betas)
    if CODED:
        some = tl.max(live.to(tl.int32)) > 0
        mask = mask & some
        size_m, size_v = magnitudes(moments)
        scales = scale_of(tl.max(size_m)), scale_of(tl.max(size_v))
        tl.store(to_m, scales[0], mask=some)
        tl.store(to_v, scales[1], mask=some)
        scales = inverse_of(scales[0]), inverse_of(scales[1])
    store_step(
        values, exp_avg, exp_avg_sq, lane, mask, live, weight, moments, rate, eps, scales, key, place, STOCHASTIC,
    )  # fmt: skip
    return live.to(tl.int32)


@triton.jit
def _end_of_span(row, span, INDEX: tl.constexpr):
    """Returns the number of single weights before the end of a span."""
    group = tl.minimum((span + 1) * (SPAN // LANES), tl.load(row + at.NUM_GROUPS))
    return tl.load(pointer(row, at.GROUP_STARTS, INDEX) + group).to(tl.int64)


@triton.jit
def _places_from(row, places, first, ALIGNED: tl.constexpr):
    """Returns a pointer to the place of entry ``first`` of a parameter."""
    here = places.to(tl.pointer_type(tl.uint16)) + tl.load(row + at.PLACES_START) + first
    if ALIGNED:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def _update_entries(
    row, grad_address, rates, all_places, spans, piece, DTYPES: tl.constexpr, INDEX: tl.constexpr,
    GENERATION: tl.constexpr, STOCHASTIC: tl.constexpr, PLACES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates consecutive entries of a plain parameter or of single weights, LANES at a time.

    PLACES: 0 where a piece lies in one span; 1 where it may reach into the next; 2 for single weights with noise, of
    which ``all_places`` and ``spans`` say where they lie.
    """
    LISTED: tl.constexpr = PLACES == 2
    first = piece.to(tl.int64) * at.ENTRIES_OF_A_PIECE
    count = tl.minimum(at.ENTRIES_OF_A_PIECE, tl.load(row + at.NUMEL) - first).to(tl.int32)
    if ALIGNED:
        count = count // 16 * 16
    everything = _pointers(row, grad_address, first, DTYPES, ALIGNED)
    betas, eps, key_of_step = scalars(row)
    rates = rates_of(row, rates)
    generation = tl.load(row + at.GENERATION)
    generations = entries_from(generation, first, GENERATION, ALIGNED)
    places = _places_from(row, all_places, first, ALIGNED)
    first_place = tl.load(row + at.FIRST_PLACE) + first
    span, end = first_place // SPAN, first + count
    if LISTED:
        span = tl.load(spans + tl.load(row + at.SPANS_START) + piece)
        end = _end_of_span(row, span, INDEX)
    key = block_key(key_of_step, span)
    next_key = key
    if PLACES == 1:
        next_key = block_key(key_of_step, span + 1) ^ SPAN  # for places that are counted on from the span before
    num_live = tl.zeros((LANES,), tl.int32)
    for start in range(0, count, LANES):
        lane = start + tl.arange(0, LANES)
        mask = lane < count
        if LISTED:
            keys = key + tl.zeros_like(lane).to(tl.uint32)
            place = tl.load(places + lane, mask=mask, other=0).to(tl.int32)
            while end < first + tl.minimum(start + LANES, count):
                span += 1
                key = block_key(key_of_step, span)
                keys = tl.where(lane >= (end - first).to(tl.int32), key, keys)
                end = _end_of_span(row, span, INDEX)
        else:
            place = (first_place % SPAN).to(tl.int32) + lane
            keys = key
            if PLACES == 1:
                keys = tl.where(place < SPAN, key, next_key)
        has_age = mask & (LISTED or generation != 0)
        rate = rates_at(rates, tl.load(generations + lane, mask=has_age, other=0).to(tl.int32))
        num_live += _update_lanes(
            row, everything, (betas, eps), rate, lane, mask, keys, place.to(tl.uint32), 1, (first + start) // LANES,
            STOCHASTIC, True,
        )  # fmt: skip
    _count_skipped(row, count, num_live, 1)


@triton.jit
def _update_blocks(
    row, grad_address, rates, first, count, group, DTYPES: tl.constexpr, INDEX: tl.constexpr, GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates ``count`` ≤ LANES consecutive entries, of whole blocks."""
    if ALIGNED:
        count = count // 16 * 16
    lane = tl.arange(0, LANES)
    mask = lane < count
    size = tl.load(row + at.BLOCK_SIZE).to(tl.int32)
    number, place = first // size + lane // size, lane % size
    betas, eps, key = scalars(row)
    if STOCHASTIC:
        key = block_key(key, tl.load(pointer(row, at.POSITIONS, INDEX) + number, mask=mask, other=0))
    generation = tl.load(pointer(row, at.GENERATION, GENERATION) + number, mask=mask, other=0)
    rate = rates_at(rates_of(row, rates), generation.to(tl.int32))
    everything = _pointers(row, grad_address, first, DTYPES, ALIGNED)
    live = _update_lanes(
        row, everything, (betas, eps), rate, lane, mask, key, place.to(tl.uint32), size, group, STOCHASTIC, False
    )
    _count_skipped(row, count, live, size)


@triton.jit
def _update_groups_of_weights(
    row, grad_address, rates, all_places, piece, DTYPES: tl.constexpr, INDEX: tl.constexpr, GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Updates the single weights of GROUPS groups, some of each at a time, with 8-bit moments.

    Their moments are computed once for their scales, and again for their codes.
    """
    WIDTH: tl.constexpr = LANES // at.GROUPS
    first_group = piece * at.GROUPS
    group = first_group + tl.arange(0, at.GROUPS)
    exists = group < tl.load(row + at.NUM_GROUPS)
    starts = pointer(row, at.GROUP_STARTS, INDEX)
    first = tl.load(starts + first_group).to(tl.int64)
    begin = tl.load(starts + group, mask=exists, other=0)
    count = (tl.load(starts + group + 1, mask=exists, other=0) - begin).to(tl.int32)[:, None]
    entry = (begin - first)[:, None] + tl.arange(0, WIDTH)[None, :].to(tl.int64)  # one address for lanes side by side
    left = count - tl.arange(0, WIDTH)[None, :]
    values, exp_avg, exp_avg_sq = tensors(row, first, DTYPES, False)
    grad_pointer = entries_from(grad_address, first, DTYPES[1], False)
    betas, eps, key = scalars(row)
    to_m, to_v = scale_pointers(row, group)
    scales = tl.load(to_m, mask=exists, other=0.0)[:, None], tl.load(to_v, mask=exists, other=0.0)[:, None]
    most = tl.max(count)
    largest_m = tl.zeros((at.GROUPS, WIDTH), tl.float32)
    largest_v = tl.zeros((at.GROUPS, WIDTH), tl.float32)
    num_live = tl.zeros((at.GROUPS, WIDTH), tl.int32)
    for start in range(0, most, WIDTH):
        mask = start < left
        grad = tl.load(grad_pointer + start + entry, mask=mask, other=0.0).to(tl.float32)
        live = mask & is_finite(grad)
        moments = load_moments(exp_avg + start, exp_avg_sq + start, entry, mask, scales)
        size_m, size_v = magnitudes(next_moments(moments, grad, live, betas))
        largest_m = tl.maximum(largest_m, size_m)
        largest_v = tl.maximum(largest_v, size_v)
        num_live += live.to(tl.int32)
    live_of_group = tl.sum(num_live, axis=1)
    _count_skipped(row, tl.sum(count), live_of_group, 1)
    some = live_of_group > 0
    new_m, new_v = scale_of(tl.max(largest_m, axis=1)), scale_of(tl.max(largest_v, axis=1))
    tl.store(to_m, new_m, mask=some)
    tl.store(to_v, new_v, mask=some)
    inverses = inverse_of(new_m)[:, None], inverse_of(new_v)[:, None]
    keys = block_key(key, group // (SPAN // LANES))[:, None]
    left = tl.where(some[:, None], left, 0)
    rates = rates_of(row, rates)
    generations = pointer(row, at.GENERATION, GENERATION) + first
    places = _places_from(row, all_places, first, False)
    for start in range(0, most, WIDTH):
        mask = start < left
        grad = tl.load(grad_pointer + start + entry, mask=mask, other=0.0).to(tl.float32)
        live = mask & is_finite(grad)
        moments = load_moments(exp_avg + start, exp_avg_sq + start, entry, mask, scales)
        weight = tl.load(values + start + entry, mask=mask, other=0.0).to(tl.float32)
        moments = next_moments(moments, grad, live, betas)
        rate = rates_at_matrix(rates, tl.load(generations + start + entry, mask=mask, other=0).to(tl.int32))
        place = entry.to(tl.uint32)
        if STOCHASTIC:
            place = tl.load(places + start + entry, mask=mask, other=0).to(tl.uint32)
        store_step(
            values + start, exp_avg + start, exp_avg_sq + start, entry, mask, live, weight, moments, rate, eps,
            inverses, keys, place, STOCHASTIC,
        )  # fmt: skip


@triton.jit
def update(
    table,
    step_table,
    rates,
    places,
    spans,
    work,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    KINDS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CROSS: tl.constexpr,
):
    """Updates one piece of one parameter.

    Args:
        table: a ``Row`` for each parameter. step_table: a ``StepRow``. rates: fp32, step sizes and bias corrections.
        places, spans: where single weights lie (``places.Places``).
        work: (programs, 2) int32, the parameter and the number of the piece.
        DTYPES: dtypes of values, gradients and moments. INDEX, GENERATION: dtypes of the lists. KINDS: whether there
            are pieces of each kind. CROSS: whether a piece of a plain parameter may reach from a span into the next.
    """
    program = tl.program_id(0).to(tl.int64)
    parameter = tl.load(work + 2 * program)
    row = table + parameter * at.NUM_COLUMNS
    grad = tl.load(step_table + parameter * at.NUM_STEP_COLUMNS + at.GRAD)
    piece = tl.load(work + 2 * program + 1)
    kind = tl.load(row + at.KIND)
    aligned = (tl.load(row + at.ALIGNED) != 0) & (grad % 16 == 0)
    if KINDS[at.BLOCK] and kind == at.BLOCK:
        if aligned and tl.load(row + at.BLOCK_SIZE) % 16 == 0:
            _update_block(row, grad, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True)
        else:
            _update_block(row, grad, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False)
    elif KINDS[at.GROUPS_OF_WEIGHTS] and kind == at.GROUPS_OF_WEIGHTS:
        _update_groups_of_weights(row, grad, rates, places, piece, DTYPES, INDEX, GENERATION, STOCHASTIC)
    elif KINDS[at.ENTRIES] and kind == at.ENTRIES:
        if aligned and tl.load(row + at.NUMEL) % 16 == 0:
            _update_entries(row, grad, rates, places, spans, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, CROSS, True)
        else:
            _update_entries(row, grad, rates, places, spans, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, CROSS, False)
    elif KINDS[at.WEIGHTS] and kind == at.WEIGHTS:
        if aligned and tl.load(row + at.NUMEL) % 16 == 0:
            _update_entries(row, grad, rates, places, spans, piece, DTYPES, INDEX, GENERATION, True, 2, True)
        else:
            _update_entries(row, grad, rates, places, spans, piece, DTYPES, INDEX, GENERATION, True, 2, False)
    elif KINDS[at.BLOCKS] or KINDS[at.GROUP_OF_RUNS]:
        length = tl.load(row + at.ENTRIES_AT_ONCE)
        first = piece.to(tl.int64) * length
        end = tl.minimum(first + length, tl.load(row + at.NUMEL))
        if KINDS[at.GROUP_OF_RUNS] and kind == at.GROUP_OF_RUNS:
            starts = pointer(row, at.GROUP_STARTS, INDEX) + piece
            first = tl.load(starts).to(tl.int64) * tl.load(row + at.BLOCK_SIZE)
            end = tl.load(starts + 1).to(tl.int64) * tl.load(row + at.BLOCK_SIZE)
        count = (end - first).to(tl.int32)
        aligned = aligned and (first % 16 == 0 and count % 16 == 0)
        if aligned:
            _update_blocks(row, grad, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True)
        else:
            _update_blocks(row, grad, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False)
