"""The two register tiles all products are made of, and the transposition between layouts.

They are Numba intrinsics: called like functions inside kernels, each a few lines of LLVM IR. All
take flat arrays and offsets in numbers, and trust them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .emit import I32, I64, Vectors, data_pointer, prefetch, smaller
from .host import DOT, ROWS, VECTORS, lanes

INT = types.int64
# Rows of a panel asked for in advance; arrays of row starts have as many entries to spare.
_AHEAD = 16


def make_outer_tile(
    vectors: int, *, by_column: bool = False, ask_next: bool = False
) -> Callable[..., None]:
    """Return ``c[m, v] (+)= sum over k of a(m, k) * b[k, v]`` for ROWS m and vectors*lanes v.

    a(m, k) is ``a[m*a_stride + k]``, or ``a[k*a_stride + m]`` if `by_column`. Each product enters
    its sum by one fused multiply-add, in ascending order of k: the bits of an entry depend on
    nothing but its own row and column.
    """

    @intrinsic
    def outer_tile(
        context, a, a_start, a_stride, b, b_start, b_stride, c, c_start, c_stride, depth, rows, add,
        later, later_start, later_step, later_rows, later_stride, later_lines,
    ):  # fmt: skip
        """Write `rows` <= ROWS rows of c.

        Meanwhile ask for what is needed later: for the j-th cache line's worth of depth,
        `later_lines` cache lines of each of `later_rows` rows, which begin at ``later[later_start
        + j*later_step]`` and are `later_stride` apart. With `by_column`, where memory is written
        and not read, `later_rows` is a flag instead: write past the caches.
        """
        signature = types.void(
            a, INT, INT, b, INT, INT, c, INT, INT, INT, INT, add, later, INT, INT, INT, INT, INT
        )

        def generate(context, builder, signature, args):
            (a_array, a_start, a_stride, b_array, b_start, b_stride, c_array, c_start, c_stride,
             depth, rows, add, later_array, later_start, later_step, later_rows, later_stride,
             later_lines) = args  # fmt: skip
            vec = Vectors(builder, c.dtype, lanes(c.dtype))
            pointer_a = builder.gep(data_pointer(context, builder, a, a_array), [a_start])
            pointer_b = builder.gep(data_pointer(context, builder, b, b_array), [b_start])
            pointer_c = builder.gep(data_pointer(context, builder, c, c_array), [c_start])
            pointer_later = data_pointer(context, builder, later, later_array)
            sums = [
                [cgutils.alloca_once(builder, vec.type) for _ in range(vectors)]
                for _ in range(ROWS)
            ]
            last = builder.sub(rows, I64(1))
            # Rows that are not there repeat the last one, so that nothing beyond it is read.
            clamped = [smaller(builder, I64(m), last) for m in range(ROWS)]
            places = [
                [builder.add(builder.mul(c_stride, m), I64(v * vec.lanes)) for v in range(vectors)]
                for m in clamped
            ]
            with builder.if_else(add) as (adding, fresh):
                with adding:
                    for m in range(ROWS):
                        for v in range(vectors):
                            builder.store(vec.load(pointer_c, places[m][v]), sums[m][v])
                with fresh:
                    for m in range(ROWS):
                        for v in range(vectors):
                            builder.store(vec.zero(), sums[m][v])
            if by_column:
                starts = [builder.gep(pointer_a, [row]) for row in clamped]
            else:
                starts = [builder.gep(pointer_a, [builder.mul(a_stride, row)]) for row in clamped]

            def step(k):
                row_b = builder.mul(k, b_stride)
                loaded = [
                    vec.load(pointer_b, builder.add(row_b, I64(v * vec.lanes)))
                    for v in range(vectors)
                ]
                at = builder.mul(k, a_stride) if by_column else k
                for m in range(ROWS):
                    factor = vec.broadcast(builder.load(builder.gep(starts[m], [at])))
                    for v in range(vectors):
                        total = vec.fma(factor, loaded[v], builder.load(sums[m][v]))
                        builder.store(total, sums[m][v])

            def write(*, past_caches):
                for m in range(ROWS):
                    with builder.if_then(builder.icmp_signed("<", I64(m), rows), likely=True):
                        for v in range(vectors):
                            value = builder.load(sums[m][v])
                            vec.store(value, pointer_c, places[m][v], stream=past_caches)

            if by_column:
                with cgutils.for_range(builder, depth) as loop:
                    step(loop.index)
                stream = builder.icmp_signed("!=", later_rows, I64(0))
                with builder.if_else(stream) as (streaming, caching):
                    with streaming:
                        write(past_caches=True)
                    with caching:
                        write(past_caches=False)
                return context.get_dummy_value()
            line = 64 // vec.bytes
            block = cgutils.alloca_once_value(builder, later_start)
            with cgutils.for_range_slice(builder, I64(0), depth, I64(line)) as (begin, _):
                row = cgutils.alloca_once(builder, I64)
                if ask_next:
                    line_number = builder.sdiv(begin, I64(line))
                    next_row = builder.mul(c_stride, builder.add(I64(ROWS), line_number))
                    for v in range(vectors):
                        prefetch(builder, pointer_c, builder.add(next_row, I64(v * vec.lanes)))
                    for m in range(ROWS):
                        at = builder.add(builder.mul(a_stride, I64(ROWS + m)), begin)
                        prefetch(builder, pointer_a, at)
                builder.store(builder.load(block), row)
                with cgutils.for_range(builder, later_rows):
                    with cgutils.for_range(builder, later_lines) as lines:
                        ahead = builder.mul(lines.index, I64(line))
                        prefetch(builder, pointer_later, builder.add(builder.load(row), ahead))
                    builder.store(builder.add(builder.load(row), later_stride), row)
                builder.store(builder.add(builder.load(block), later_step), block)
                end = smaller(builder, builder.add(begin, I64(line)), depth)
                with cgutils.for_range_slice(builder, begin, end, I64(1)) as (k, _):
                    step(k)
            write(past_caches=False)
            return context.get_dummy_value()

        return signature, generate

    return outer_tile


def make_dot_tile(half: str | None) -> Callable[..., None]:
    """Return ``c[m, n] = sum over k of x[m, k] * w[n, k]`` for DOT m and DOT n.

    `half` says what 16-bit weights hold: "float16", "bfloat16", or None for weights of the dtype
    of x. Lane l sums the k that leave l when divided by the lanes, then the lanes are added as a
    tree. `depth` must be a multiple of the lanes.
    """

    @intrinsic
    def dot_tile(
        context,
        x,
        x_start,
        x_stride,
        x_rows,
        w,
        w_start,
        w_stride,
        w_rows,
        c,
        c_start,
        c_stride,
        depth,
        ahead,
    ):
        """`x_rows`, `w_rows` <= DOT are there; `ahead` is where the next rows of w begin."""
        signature = types.void(x, INT, INT, INT, w, INT, INT, INT, c, INT, INT, INT, INT)

        def generate(context, builder, signature, args):
            (x_array, x_start, x_stride, x_rows, w_array, w_start, w_stride, w_rows, c_array,
             c_start, c_stride, depth, ahead) = args  # fmt: skip
            vec = Vectors(builder, c.dtype, lanes(c.dtype))
            pointer_x = builder.gep(data_pointer(context, builder, x, x_array), [x_start])
            pointer_w = builder.gep(data_pointer(context, builder, w, w_array), [w_start])
            pointer_c = builder.gep(data_pointer(context, builder, c, c_array), [c_start])

            def rows_of(pointer, stride, count) -> list[Any]:
                last = builder.sub(count, I64(1))
                found = [smaller(builder, I64(i), last) for i in range(DOT)]
                return [builder.gep(pointer, [builder.mul(stride, i)]) for i in found]

            starts_x = rows_of(pointer_x, x_stride, x_rows)
            starts_w = rows_of(pointer_w, w_stride, w_rows)
            sums = [
                [cgutils.alloca_once(builder, vec.type) for _ in range(DOT)] for _ in range(DOT)
            ]
            for row in sums:
                for cell in row:
                    builder.store(vec.zero(), cell)
            with cgutils.for_range_slice(builder, I64(0), depth, I64(vec.lanes)) as (k, _):
                loaded = [vec.load(start, k) for start in starts_x]
                for n in range(DOT):
                    prefetch(builder, starts_w[n], builder.add(k, ahead))
                    weights = _load_weights(vec, builder, starts_w[n], k, half)
                    for m in range(DOT):
                        total = vec.fma(loaded[m], weights, builder.load(sums[m][n]))
                        builder.store(total, sums[m][n])
            totals = vec.sums([builder.load(cell) for row in sums for cell in row])
            for m in range(DOT):
                for n in range(DOT):
                    there = builder.and_(
                        builder.icmp_signed("<", I64(m), x_rows),
                        builder.icmp_signed("<", I64(n), w_rows),
                    )
                    with builder.if_then(there, likely=True):
                        at = builder.add(builder.mul(c_stride, I64(m)), I64(n))
                        builder.store(totals[m * DOT + n], builder.gep(pointer_c, [at]))
            return context.get_dummy_value()

        return signature, generate

    return dot_tile


def _load_weights(vec: Vectors, builder, pointer, offset, half: str | None):
    """Load a vector of weights; those of 16 bits become float32, which is exact."""
    if half is None:
        return vec.load(pointer, offset)
    bits = ir.VectorType(ir.IntType(16), vec.lanes)
    address = builder.bitcast(builder.gep(pointer, [offset]), bits.as_pointer())
    loaded = builder.load(address)
    loaded.align = 2
    return widen(builder, loaded, vec.type, half)


def widen(builder, bits, wide, half: str):
    """Return the float32 values of a vector of 16-bit patterns."""
    count = bits.type.count
    if half == "float16":
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), count)), wide)
    words = ir.VectorType(I32, count)
    shift = ir.Constant(words, [16] * count)
    return builder.bitcast(builder.shl(builder.zext(bits, words), shift), wide)


@intrinsic
def transpose_tile(
    context,
    source,
    starts,
    first,
    column,
    target,
    to,
    to_stride,
    stream,
):
    """``target[to + j*to_stride + i] = source[starts[first + i] + column + j]``, lanes x lanes.

    With `stream` past the caches; rows of the target must then begin at whole registers.
    """
    signature = types.void(source, starts, INT, INT, target, INT, INT, stream)

    def generate(context, builder, signature, args):
        source_array, starts_array, first, column, target_array, to, to_stride, stream = args
        vec = Vectors(builder, target.dtype, lanes(target.dtype))
        pointer = data_pointer(context, builder, source, source_array)
        places = builder.gep(data_pointer(context, builder, starts, starts_array), [first])
        goal = builder.gep(data_pointer(context, builder, target, target_array), [to])
        rows = [
            vec.load(pointer, builder.add(builder.load(builder.gep(places, [I64(i)])), column))
            for i in range(vec.lanes)
        ]
        columns = vec.transpose(rows)
        with builder.if_else(stream) as (streaming, caching):
            for branch, past_caches in ((streaming, True), (caching, False)):
                with branch:
                    for j, row in enumerate(columns):
                        at = builder.mul(to_stride, I64(j))
                        vec.store(row, goal, at, stream=past_caches)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def copy_panels(
    context, source, starts, column, count, half, scales, first, scaled, target, to, panels, apart
):
    """Write ``target[to + p*apart + i*panel + n] = source[starts[i] + column + p*panel + n]``.

    For i < count rows and p < panels; a panel is VECTORS registers wide. Row i is multiplied by
    ``scales[first + i]`` if `scaled`; 16-bit numbers are converted, by `half` as in `widen_tile`.
    A row is read from its beginning to its end, as the processor expects it.
    """
    signature = types.void(
        source, starts, INT, INT, half, scales, INT, scaled, target, INT, INT, INT
    )

    def generate(context, builder, signature, args):
        (source_array, starts_array, column, count, half, scales_array, first, scaled,
         target_array, to, panels, apart) = args  # fmt: skip
        vec = Vectors(builder, target.dtype, lanes(target.dtype))
        pointer = builder.gep(data_pointer(context, builder, source, source_array), [column])
        places = data_pointer(context, builder, starts, starts_array)
        factors = builder.gep(data_pointer(context, builder, scales, scales_array), [first])
        goal = builder.gep(data_pointer(context, builder, target, target_array), [to])
        width = VECTORS * vec.lanes

        def copy(kind, *, scale):
            with cgutils.for_range(builder, count) as loop:
                row = builder.load(builder.gep(places, [loop.index]))
                # Rows may lie anywhere: no processor foresees the next ones.
                later = builder.load(builder.gep(places, [builder.add(loop.index, I64(_AHEAD))]))
                if scale:
                    factor = vec.broadcast(builder.load(builder.gep(factors, [loop.index])))
                begin = builder.mul(loop.index, I64(width))
                with cgutils.for_range(builder, panels) as inner:
                    past = builder.mul(inner.index, I64(width))
                    read, ask = builder.add(row, past), builder.add(later, past)
                    write = builder.add(begin, builder.mul(inner.index, apart))
                    for n in range(0, width, vec.lanes):
                        prefetch(builder, pointer, builder.add(ask, I64(n)))
                        value = _load_weights(
                            vec, builder, pointer, builder.add(read, I64(n)), kind
                        )
                        if scale:
                            value = builder.fmul(value, factor)
                        vec.store(value, goal, builder.add(write, I64(n)))

        if source.dtype == types.uint16:
            with builder.if_else(builder.icmp_signed(">", half, I64(1))) as (wide_range, ieee):
                with wide_range:
                    copy("bfloat16", scale=False)
                with ieee:
                    copy("float16", scale=False)
        else:
            with builder.if_else(scaled) as (by_row, plain):
                with by_row:
                    copy(None, scale=True)
                with plain:
                    copy(None, scale=False)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def widen_tile(
    context,
    source,
    start,
    target,
    to,
    half,
):
    """Convert as many 16-bit numbers as a register holds float32; `half` > 1 means bfloat16."""
    signature = types.void(source, INT, target, INT, half)

    def generate(context, builder, signature, args):
        source_array, start, target_array, to, half = args
        vec = Vectors(builder, target.dtype, lanes(target.dtype))
        pointer = data_pointer(context, builder, source, source_array)
        goal = data_pointer(context, builder, target, target_array)
        with builder.if_else(builder.icmp_signed(">", half, I64(1))) as (wide_range, ieee):
            with wide_range:
                vec.store(_load_weights(vec, builder, pointer, start, "bfloat16"), goal, to)
            with ieee:
                vec.store(_load_weights(vec, builder, pointer, start, "float16"), goal, to)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def widen_number(context, bits, half):
    """Return one 16-bit number as float32."""
    signature = types.float32(bits, half)

    def generate(context, builder, signature, args):
        pattern, half = args
        single = ir.VectorType(ir.IntType(16), 1)
        vector = builder.insert_element(ir.Constant(single, ir.Undefined), pattern, I32(0))
        wide = ir.VectorType(ir.FloatType(), 1)
        found = [
            builder.extract_element(widen(builder, vector, wide, name), I32(0))
            for name in ("bfloat16", "float16")
        ]
        return builder.select(builder.icmp_signed(">", half, I64(1)), *found)

    return signature, generate


@intrinsic
def ask_for(context, x, start, count):
    """Ask for the cache lines of ``x[start : start + count]``, which need not be there."""
    signature = types.void(x, INT, INT)

    def generate(context, builder, signature, args):
        array, start, count = args
        pointer = builder.gep(data_pointer(context, builder, x, array), [start])
        step = I64(64 // (x.dtype.bitwidth // 8))
        with cgutils.for_range_slice(builder, I64(0), count, step) as (k, _):
            prefetch(builder, pointer, k)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def largest(context, x, start, count):
    """Return the largest of `count` numbers, some times the lanes; NaN may be passed over."""
    signature = x.dtype(x, INT, INT)

    def generate(context, builder, signature, args):
        array, start, count = args
        vec = Vectors(builder, x.dtype, lanes(x.dtype))
        pointer = builder.gep(data_pointer(context, builder, x, array), [start])
        most = cgutils.alloca_once_value(builder, vec.load(pointer, I64(0)))
        with cgutils.for_range_slice(builder, I64(vec.lanes), count, I64(vec.lanes)) as (k, _):
            value, before = vec.load(pointer, k), builder.load(most)
            above = builder.fcmp_ordered(">", value, before)
            builder.store(builder.select(above, value, before), most)
        found, width = builder.load(most), vec.lanes
        while width > 1:
            width //= 2
            low = vec.shuffle(found, found, range(width))
            high = vec.shuffle(found, found, range(width, 2 * width))
            found = builder.select(builder.fcmp_ordered(">", high, low), high, low)
        return builder.extract_element(found, I32(0))

    return signature, generate
