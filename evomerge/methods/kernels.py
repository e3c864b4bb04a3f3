"""Compiled loops over the entries of CPU tensors: the same arithmetic as the plain torch code, in one pass.

Imported by ``evomerge.methods.fused`` alone, which says when they are used. They give the plain code's numbers to the
bit: nothing is reordered, and a product and a sum are one rounding exactly where torch makes them one (``fma``).
Loops go by blocks of SIZE entries whose sums are parts of one array: so the compiler can use vector instructions.
"""

# pyright: reportCallIssue=false
# (The signature of an intrinsic has the compiler's argument, which callers leave out.)

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, types  # pyright: ignore[reportPrivateImportUsage]
from numba.core import config
from numba.extending import intrinsic, overload

from evomerge.hashing import cache_folder

SIZE = 512  # entries of a block: six sums of them fit into half the fastest cache; a multiple of 32, the bits of a word
DOWN = 4096  # what a vote for - adds where votes for + add 1: exact in float32 for fewer experts than that


def compiled(function: Any = None, **options: Any) -> Any:
    """``function`` as machine code, made at its first call for a combination of types and kept on disk.

    Under EVOMERGE_CACHE (or ~/.cache/evomerge), in a folder of all loops' source: numba looks at the one file that a
    function stands in, not at those it imports from, so that a change there would leave stale machine code in use.
    Where nothing can be written, or no more, it is compiled once a process.

    Args:
        options: more of numba's, such as ``fastmath``. Without a function this is a decorator that has them.
    """
    if function is None:
        return partial(compiled, **options)
    folder = cache_folder() / "loops" / _sources_hash()
    before = config.CACHE_DIR  # pyright: ignore[reportAttributeAccessIssue]
    options = {"error_model": "numpy", "nogil": True, **options}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.CACHE_DIR = str(folder)  # pyright: ignore[reportAttributeAccessIssue]
        made: Any = numba.njit(function, cache=os.access(folder, os.W_OK), **options)
        made._cache = _Optional(made._cache)
        return made
    except OSError:
        return numba.njit(function, **options)
    finally:
        config.CACHE_DIR = before  # pyright: ignore[reportAttributeAccessIssue]


class _Optional:
    """numba's cache of one function, going without where the folder cannot be read or written: a full disk."""

    def __init__(self, files: Any):
        self._files = files

    def load_overload(self, signature: Any, context: Any) -> Any:
        try:
            return self._files.load_overload(signature, context)
        except OSError:
            return None  # as of what is not kept

    def save_overload(self, signature: Any, result: Any) -> None:
        with suppress(OSError):
            self._files.save_overload(signature, result)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)


@cache
def _sources_hash() -> str:
    """Of the files that hold compiled loops."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*kernels.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """An address as a pointer to what the array ``like`` holds."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), generate


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c with one rounding."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fma(*args)

    return c(c, c, c), generate


@intrinsic
def float_of(typing: Any, bits: Any) -> Any:
    """The float32 with these 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), generate


@intrinsic
def spread(typing: Any, word: Any, yes: Any, no: Any, out: Any, start: Any) -> Any:
    """out[start + k] = yes where bit k of a uint32 is 1, else no, for the 32 bits: in vectors, which a loop is not."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = ir.IntType(32)
        first = ir.Constant(ir.VectorType(lane, 32), [0] * 32)

        def splat(value: Any) -> Any:
            none = ir.Constant(ir.VectorType(value.type, 32), ir.Undefined)
            return builder.shuffle_vector(builder.insert_element(none, value, lane(0)), none, first)

        bits = builder.and_(splat(args[0]), ir.Constant(first.type, [1 << k for k in range(32)]))
        values = builder.select(builder.icmp_unsigned("!=", bits, first), splat(args[1]), splat(args[2]))
        array = context.make_array(signature.args[3])(context, builder, args[3])
        place = builder.bitcast(builder.gep(array.data, [args[4]]), values.type.as_pointer())
        builder.store(values, place, align=out.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(word, yes, no, out, types.intp), generate


def widened(value):
    """A stored number in the arithmetic type; bfloat16 is stored as uint16 here."""
    raise NotImplementedError


@overload(widened, inline="always")
def _widened(value):
    if value == types.uint16:
        return lambda value: float_of(np.uint32(value) << np.uint32(16))
    return lambda value: value


@compiled
def merge_thinned(base, experts, weights, lows, highs, masks, factors, elect, mean, normalize, scale, out):
    """out = theta_0 + scale x what the thinned tau_t merge to: their weighted sum, or with ``elect`` TIES' election.

    Args:
        base: (n,) uint16 for bfloat16, float32 or float64.
        experts: (T,) addresses of as many entries of base's type, contiguous.
        weights: (T,) of the type of ``out``, as are the next ones.
        lows, highs: (T,) what is smaller or larger in magnitude becomes 0; 0 and infinity cut nothing.
        masks: (T,) addresses of uint32 words: bit k of word j says whether entry 32 j + k is kept. 0 for no mask.
        factors: (T,) what the thinned task vector is multiplied by, before the weight.
        mean, normalize: what an elected sum is divided by: the number, or the weights, of the experts that agree.
        out: (n,) float32 or float64.
    """
    a_word = np.empty(0, np.uint32)
    counted = not normalize and len(experts) < DOWN
    # Rows of SIZE: theta_0; total, positive, share and positive share of an election, or the total; the thinned tau_t.
    rows = np.empty(6 * SIZE, out.dtype)
    for start in range(0, len(base), SIZE):
        n = min(SIZE, len(base) - start)
        theta_0 = base[start : start + n]
        for i in range(n):
            rows[i] = widened(theta_0[i])
        for t in range(len(experts)):
            expert = carray(pointer(experts[t] + start * base.itemsize, base), n)
            if masks[t] != 0:
                words = carray(pointer(masks[t] + start // 8, a_word), (n + 31) // 32)
                _keep_masked(expert, words, factors[t], rows)
            else:
                _cut(expert, lows[t], highs[t], factors[t], rows)
            if elect:
                _vote(n, t == 0, weights[t], normalize, counted, rows)
            else:
                _add(n, t == 0, weights[t], rows)
        if elect:
            if counted:
                _unpack_counts(n, rows)
            _write_elected(n, mean, normalize, scale, rows, out[start : start + n])
        else:
            merged = out[start : start + n]
            for i in range(n):
                merged[i] = rows[SIZE + i] * scale + rows[i]


@compiled
def _keep_masked(expert, words, factor, rows):
    for j in range(len(words)):
        spread(words[j], factor, rows.dtype.type(0) * factor, rows, 5 * SIZE + 32 * j)
    for i in range(len(expert)):
        rows[5 * SIZE + i] *= widened(expert[i]) - rows[i]


@compiled
def _cut(expert, low, high, factor, rows):
    zero = rows.dtype.type(0)
    if high == np.inf:
        for i in range(len(expert)):
            tau = widened(expert[i]) - rows[i]
            rows[5 * SIZE + i] = (zero if abs(tau) < low else tau) * factor
    else:
        for i in range(len(expert)):
            tau = widened(expert[i]) - rows[i]
            larger = zero if abs(tau) <= high else tau
            rows[5 * SIZE + i] = ((zero if abs(tau) < low else tau) - larger) * factor


@compiled
def _add(n, first, weight, rows):
    if first:
        for i in range(n):
            rows[SIZE + i] = rows[5 * SIZE + i] * weight
    else:
        for i in range(n):
            rows[SIZE + i] = fma(rows[5 * SIZE + i], weight, rows[SIZE + i])


@compiled
def _vote(n, first, weight, normalize, counted, rows):
    if counted:
        _count_votes(n, first, weight, rows)
    else:
        if first:
            rows[SIZE : 5 * SIZE] = 0
        _add_votes(n, weight, weight if normalize else rows.dtype.type(1), rows)


@compiled
def _add_votes(n, weight, counted, rows):
    zero = rows.dtype.type(0)
    for i in range(n):
        scaled = rows[5 * SIZE + i] * weight
        rows[SIZE + i] += scaled
        rows[2 * SIZE + i] += zero if scaled < zero else scaled
        rows[3 * SIZE + i] += counted if scaled > zero else (-counted if scaled < zero else zero)
        rows[4 * SIZE + i] += counted if scaled > zero else zero


@compiled
def _count_votes(n, first, weight, rows):
    """As ``_add_votes`` with a vote each: the share's row gets the number for + and DOWN times that for -."""
    zero, up, down = rows.dtype.type(0), rows.dtype.type(1), rows.dtype.type(DOWN)
    if first:
        for i in range(n):
            scaled = rows[5 * SIZE + i] * weight
            rows[SIZE + i] = scaled + zero
            rows[2 * SIZE + i] = (zero if scaled < zero else scaled) + zero
            rows[3 * SIZE + i] = up if scaled > zero else (down if scaled < zero else zero)
    else:
        for i in range(n):
            scaled = rows[5 * SIZE + i] * weight
            rows[SIZE + i] += scaled
            rows[2 * SIZE + i] += zero if scaled < zero else scaled
            rows[3 * SIZE + i] += up if scaled > zero else (down if scaled < zero else zero)


@compiled
def _unpack_counts(n, rows):
    down, part = rows.dtype.type(DOWN), rows.dtype.type(1 / DOWN)
    for i in range(n):
        negative = np.floor(rows[3 * SIZE + i] * part)
        positive = rows[3 * SIZE + i] - down * negative
        rows[3 * SIZE + i] = positive - negative
        rows[4 * SIZE + i] = positive


@compiled
def _write_elected(n, mean, normalize, scale, rows, merged):
    zero, one, tiny = rows.dtype.type(0), rows.dtype.type(1), rows.dtype.type(1e-8)
    for i in range(n):
        positive = rows[2 * SIZE + i]
        negative = rows[SIZE + i] - positive
        # zero x the difference: no number, but NaN where infinities meet, as in torch.lerp.
        value = (positive if rows[SIZE + i] >= zero else negative) + zero * (positive - negative)
        if normalize or mean:
            share = rows[4 * SIZE + i] if rows[SIZE + i] >= zero else rows[4 * SIZE + i] - rows[3 * SIZE + i]
            small = abs(share) < tiny if normalize else share < one
            value /= one if small else share
        merged[i] = value * scale + rows[i]


@compiled
def sum_experts(experts, like, weights, out):
    """out = sum w_t theta_t.

    Args:
        experts: (T,) addresses, T >= 1, of as many numbers of the type of ``like`` as ``out`` has.
        weights: (T,) of the type of ``out``, float32 or float64.
    """
    for start in range(0, len(out), SIZE):
        n = min(SIZE, len(out) - start)
        merged = out[start : start + n]
        for t in range(len(experts)):
            expert = carray(pointer(experts[t] + start * like.itemsize, like), n)
            weight = weights[t]
            if t == 0:
                for i in range(n):
                    merged[i] = widened(expert[i]) * weight
            else:
                for i in range(n):
                    merged[i] = fma(widened(expert[i]), weight, merged[i])


@compiled
def sum_task_vectors(base, experts, weights, out):
    """out = theta_0 + sum w_t (theta_t - theta_0); as above, ``base`` of the experts' type."""
    for start in range(0, len(out), SIZE):
        n = min(SIZE, len(out) - start)
        theta_0, merged = base[start : start + n], out[start : start + n]
        for t in range(len(experts)):
            expert = carray(pointer(experts[t] + start * base.itemsize, base), n)
            weight = weights[t]
            if t == 0:
                for i in range(n):
                    merged[i] = (widened(expert[i]) - widened(theta_0[i])) * weight
            else:
                for i in range(n):
                    merged[i] = fma(widened(expert[i]) - widened(theta_0[i]), weight, merged[i])
        for i in range(n):
            merged[i] += widened(theta_0[i])


@compiled
def merge_task_vectors(bases, experts, counts, weights, outs, stored, wide):
    """``sum_task_vectors`` of many tensors: K of them, and T experts.

    Args:
        bases: (K,) addresses of contiguous entries of the type of ``stored``.
        experts: (K, T) of as many; 0 for an expert that is to leave no trace.
        counts: (K,) how many entries.
        weights: (K, T) of the type of ``wide``.
        outs: (K,) addresses of entries of the type of ``wide``.
        stored, wide: arrays whose types count.
    """
    addresses, numbers = np.empty(experts.shape[1], np.int64), np.empty(experts.shape[1], wide.dtype)
    for k in range(len(bases)):
        base, out = carray(pointer(bases[k], stored), counts[k]), carray(pointer(outs[k], wide), counts[k])
        chosen = 0
        for t in range(experts.shape[1]):
            if experts[k, t] != 0:
                addresses[chosen], numbers[chosen] = experts[k, t], weights[k, t]
                chosen += 1
        if chosen > 0:
            sum_task_vectors(base, addresses[:chosen], numbers[:chosen], out)
        else:
            for i in range(len(out)):
                out[i] = widened(base[i])


@compiled
def count_digits(bits, shift, first, prefix, offset, histogram):
    """histogram[d] += how many of ``bits`` have the 16-bit digit d at ``shift``, and ``prefix`` above it.

    Args:
        bits: (n,) int32 or int64.
        first: the digit is the uppermost one: there is no prefix, and ``offset`` is added to it.
        histogram: (65536,) int64.
    """
    if first:
        for i in range(len(bits)):
            histogram[(bits[i] >> shift) + offset] += 1
    else:
        for i in range(len(bits)):
            if bits[i] >> (shift + 16) == prefix:
                histogram[(bits[i] >> shift) & 0xFFFF] += 1


@compiled
def _draw(state, words):
    """words = the next ones of SFC64, as NumPy has it; ``state`` is moved on."""
    a, b, c, counter = state[0], state[1], state[2], state[3]
    for i in range(len(words)):
        word = a + b + counter
        counter += np.uint64(1)
        a = b ^ (b >> np.uint64(11))
        b = c + (c << np.uint64(3))
        c = (c << np.uint64(24) | c >> np.uint64(40)) + word
        words[i] = word
    state[0], state[1], state[2], state[3] = a, b, c, counter


@compiled
def draw_uniform(state, out):
    """out = the uniform numbers of a stream: 2**-24 x the upper 24 bits of each half of its words, lower half first.

    Args:
        state: (4,) uint64, the generator's, as NumPy has it; it is moved on.
        out: (n,) float32.
    """
    unit = np.float32(2.0**-24)
    words = np.empty(SIZE // 2, np.uint64)
    halves = words.view(np.uint32)
    for start in range(0, len(out), SIZE):
        part = out[start : start + SIZE]
        _draw(state, words[: (len(part) + 1) // 2])
        for i in range(len(part)):
            part[i] = np.float32(halves[i] >> np.uint32(8)) * unit


@compiled
def draw_below(seeds, warm_up, limit, planes, size, offset, out):
    """Bit k of word j of ``out``: is number 64 (offset + j) + k of the blocks, drawn in bit planes, below a limit?

    Args:
        seeds: (blocks, 3) uint64, as ``random.plane_seeds`` gives them.
        warm_up: words that are left out.
        limit: uint64, below 2**planes, in units of 2**-planes.
        size: words in a plane, 64 numbers each.
        out: uint64 words, which end in the last block.
    """
    one = np.uint64(1)
    state, plane, undecided = np.empty(4, np.uint64), np.empty(size, np.uint64), np.empty(size, np.uint64)
    done = 0
    for block in range(len(seeds)):
        state[:3] = seeds[block]
        state[3] = one
        _draw(state, plane[:warm_up])
        first = max(0, offset - block * size)
        below = out[done : done + size - first]
        digits, equal = plane[first : first + len(below)], undecided[: len(below)]
        done += len(below)
        below[:] = 0
        equal[:] = ~np.uint64(0)
        for k in range(planes - 1, -1, -1):
            if limit & ((one << np.uint64(k + 1)) - one) == 0:
                break
            _draw(state, plane)
            if _compare(digits, limit >> np.uint64(k) & one, equal, below):
                break


@compiled
def _compare(digits, digit, equal, below):
    """One plane of numbers against one binary digit of the limit; are all decided now?"""
    left = np.uint64(0)
    if digit:
        for j in range(len(below)):
            below[j] |= equal[j] & ~digits[j]
            equal[j] &= digits[j]
            left |= equal[j]
    else:
        for j in range(len(below)):
            equal[j] &= ~digits[j]
            left |= equal[j]
    return left == 0
