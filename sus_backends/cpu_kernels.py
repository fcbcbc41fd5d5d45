"""The CPU backend's kernels, compiled by numba: attention's exact forward with the draw, and the sparse backward.

Two parts. First a small vector language: 16 lanes of float32, explicit operations on them, and one matrix product. Each
operation has a meaning in NumPy (which is what runs under NUMBA_DISABLE_JIT=1) and an emission of LLVM's vector
instructions, which LLVM turns into those of any CPU. Then the kernels, written in that language.

The layout that the forward rests on: **a lane is a query row**. 16 rows stand side by side, and every loop runs over
keys or over the head dim. So maxima, sums and the draw's running total need nothing across lanes, and both matrix
products take the scalars of K and V as they lie in memory. In the backward a lane is a key or an element of the head
dim: the rows that keep a tile come from anywhere, and are taken as they lie in memory.

One file, because numba's cache of compiled code looks at changes of a function's own file only (and, see
sus_backends/cpu.py, of reference.py).

Dims: B batch, H query heads, K key/value heads, G = H / K, T query rows, N keys, D head dim. Arrays are
flat; where they are views of tensors they come with strides (batch, head, position) in elements. bfloat16 comes as
uint16.

Deliberately missing: threads (sus_backends/cpu.py runs these functions on several; they release the GIL, and share the
work through a counter), the backward of single keys (sus_backends/cpu_poisson.py), and all samplers but tiles and
poisson.
"""

import math
import operator

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_jitable, register_model

from sus_backends.reference import TILE, UNIT, UNIT_BITS, absorb, tiles_of

# ---------------------------------------------------------------------------------------------
# The vector language.
# ---------------------------------------------------------------------------------------------

LANES = 16
INTERPRETED = bool(numba.config.DISABLE_JIT)
# The matrix product's register tile, in rows and in vectors of LANES: 16 of 32 registers of 16 floats, or 8 of 16
# registers of 8. An FMA waits for the one before it; so many sums at once fill the time, and make much of each load.
HEIGHT, WIDE = (8, 2) if llvmlite.binding.get_host_cpu_features().get("avx512f") else (4, 1)

F32, I32, I64, BIT = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(1)


class Vector(types.Type):
    def __init__(self, name, element):
        super().__init__(f"{name}x{LANES}")
        self.ir = ir.VectorType(element, LANES)


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.ir)


floats, ints, mask = Vector("f32", F32), Vector("i32", I32), Vector("bit", BIT)


def emission(function, typing, *lowered):
    """Decorates emit(builder, context, argument types, arguments): what numba compiles `function` to.

    typing: argument types -> (result, *argument types that emit wants), or None where this doesn't apply.
    lowered: the types to register it for, if other emissions of the same function exist.
    """

    def register(emit):
        class Template(AbstractTemplate):
            key = function

            def generic(self, args, kws):
                found = typing(*args)
                return signature(*found) if found else None

        def lower(context, builder, sig, args):
            value = emit(builder, context, sig.args, args)
            return context.get_dummy_value() if value is None else value

        infer_global(function)(Template)
        lower_builtin(function, *(lowered or [types.VarArg(types.Any)]))(lower)
        return emit

    return register


def intrinsic(builder, name, result, *args):
    function = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def constant(vector, value):
    return ir.Constant(vector.ir, [value] * LANES)


def broadcast(builder, vector, scalar):
    undefined = ir.Constant(vector.ir, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))


# Memory. A float32 array gives floats, a uint16 array floats widened from bfloat16, an int32 array ints.


def load(a, i):
    x = a[i : i + LANES]
    assert 0 <= i and len(x) == LANES, "out of bounds"
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x.copy()


def load_first(a, i, n):
    """The first n lanes; zeros in the others."""
    assert 0 <= i and i + n <= len(a), "out of bounds"
    x = np.zeros(LANES, a.dtype)
    x[:n] = a[i : i + n]
    return load(x, 0)


def store(a, i, x):
    store_first(a, i, x, LANES)


def store_first(a, i, x, n):
    """Store the first n lanes; rounded to bfloat16, ties to even, where a is uint16."""
    assert 0 <= i and i + n <= len(a), "out of bounds"
    if a.dtype == np.uint16:
        bits = x.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)
    a[i : i + n] = x[:n]


def prefetch(a, i):
    """Element i will be read soon. It need not exist."""


def _vector_of(array):
    return {types.float32: floats, types.uint16: floats, types.int32: ints}.get(getattr(array, "dtype", None))


def _address(builder, context, array_type, array, i):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [i])


def _first(builder, n):
    """A mask of the first n lanes."""
    lanes = ir.Constant(ints.ir, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, ints, builder.trunc(n, I32)))


def _load(builder, context, array_type, array, i, n=None):
    bf16 = array_type.dtype == types.uint16
    memory = ir.VectorType(ir.IntType(16), LANES) if bf16 else _vector_of(array_type).ir
    p = builder.bitcast(_address(builder, context, array_type, array, i), memory.as_pointer())
    align = 2 if bf16 else 4
    if n is None:
        x = builder.load(p)
        x.align = align
    else:
        suffix = f"v{LANES}{'i16' if bf16 else 'i32' if memory == ints.ir else 'f32'}"
        x = intrinsic(builder, f"llvm.masked.load.{suffix}.p0", memory, p, I32(align), _first(builder, n),
                      ir.Constant(memory, [0] * LANES))  # fmt: skip
    if bf16:
        x = builder.bitcast(builder.shl(builder.zext(x, ints.ir), constant(ints, 16)), floats.ir)
    return x


def _store(builder, context, array_type, array, i, x, n=None):
    align = 4
    if array_type.dtype == types.uint16:
        align, bits = 2, builder.bitcast(x, ints.ir)
        odd = builder.and_(builder.lshr(bits, constant(ints, 16)), constant(ints, 1))
        rounded = builder.lshr(builder.add(builder.add(bits, constant(ints, 0x7FFF)), odd), constant(ints, 16))
        rounded = builder.select(builder.fcmp_unordered("uno", x, x), constant(ints, 0x7FC0), rounded)
        x = builder.trunc(rounded, ir.VectorType(ir.IntType(16), LANES))
    p = builder.bitcast(_address(builder, context, array_type, array, i), x.type.as_pointer())
    if n is None:
        builder.store(x, p).align = align
    else:
        suffix = f"v{LANES}{'i16' if align == 2 else 'i32' if x.type == ints.ir else 'f32'}"
        intrinsic(builder, f"llvm.masked.store.{suffix}.p0", ir.VoidType(), x, p, I32(align), _first(builder, n))


@emission(load, lambda a, i: _vector_of(a) and (_vector_of(a), a, types.int64))
def _(builder, context, given, args):
    return _load(builder, context, given[0], *args)


@emission(load_first, lambda a, i, n: _vector_of(a) and (_vector_of(a), a, types.int64, types.int64))
def _(builder, context, given, args):
    return _load(builder, context, given[0], *args)


@emission(store, lambda a, i, x: _vector_of(a) == x and (types.void, a, types.int64, x))
def _(builder, context, given, args):
    _store(builder, context, given[0], *args)


@emission(store_first, lambda a, i, x, n: _vector_of(a) == x and (types.void, a, types.int64, x, types.int64))
def _(builder, context, given, args):
    _store(builder, context, given[0], *args)


@emission(prefetch, lambda a, i: (types.void, a, types.int64))
def _(builder, context, given, args):
    p = builder.bitcast(_address(builder, context, given[0], *args), ir.IntType(8).as_pointer())
    intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), p, I32(0), I32(3), I32(1))


# Arithmetic, lane by lane: + - * < of floats, + * & ^ < of ints, and these.


def splat(x):
    """All lanes the float32 or int32 x."""
    return np.full(LANES, x)


def fma(a, b, c):
    """a * b + c, rounded once."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def where(m, a, b):
    return np.where(m, a, b)


def maximum(a, b):
    """The larger; b where one of them is NaN."""
    return np.where(a > b, a, b)


def minimum(a, b):
    """The smaller; b where one of them is NaN."""
    return np.where(a < b, a, b)


def ceil_to_ints(x):
    """x in [0, 2^31), rounded up."""
    return np.ceil(x).astype(np.int32)


def to_floats(x):
    return x.astype(np.float32)


def bits_as_ints(x):
    return x.view(np.int32)


def bits_as_floats(x):
    return x.view(np.float32)


def shift_left(x, n):
    return x << n


def shift_right(x, n):
    """Of the bits: zeros come in."""
    return (x.view(np.uint32) >> np.uint32(n)).view(np.int32)


def lanes():
    """0, 1, 2, ..."""
    return np.arange(LANES, dtype=np.int32)


def total(x):
    """The sum over the lanes, float32, in a fixed order."""
    while len(x) > 1:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x[0]


def bitmap(m):
    """An int whose bit i is lane i of the mask."""
    return sum(1 << i for i in range(LANES) if m[i])


def lowest(bits):
    """The index of the lowest bit set, of an int > 0."""
    return (bits & -bits).bit_length() - 1


for function, emit_floats, emit_ints in (
    (operator.add, "fadd", "add"), (operator.sub, "fsub", "sub"), (operator.mul, "fmul", "mul"),
    (operator.truediv, "fdiv", None), (operator.and_, None, "and_"), (operator.xor, None, "xor"),
):  # fmt: skip
    for vector, method in ((floats, emit_floats), (ints, emit_ints)):
        if method:

            @emission(function, lambda a, b, vector=vector: a == b == vector and (vector, a, b), vector, vector)
            def _(builder, context, given, args, method=method):
                return getattr(builder, method)(*args)


@emission(operator.lt, lambda a, b: a == b == floats and (mask, a, b), floats, floats)
def _(builder, context, given, args):
    return builder.fcmp_ordered("<", *args)


@emission(operator.lt, lambda a, b: a == b == ints and (mask, a, b), ints, ints)
def _(builder, context, given, args):
    return builder.icmp_signed("<", *args)


@emission(splat, lambda x: (ints, types.int32) if x == types.int32 else (floats, types.float32))
def _(builder, context, given, args):
    return broadcast(builder, ints if given[0] == types.int32 else floats, args[0])


@emission(fma, lambda a, b, c: (floats,) * 4)
def _(builder, context, given, args):
    return intrinsic(builder, f"llvm.fma.v{LANES}f32", floats.ir, *args)


@emission(where, lambda m, a, b: m == mask and a == b and (a, m, a, b))
def _(builder, context, given, args):
    return builder.select(*args)


@emission(maximum, lambda a, b: (floats,) * 3)
def _(builder, context, given, args):
    return builder.select(builder.fcmp_ordered(">", *args), *args)


@emission(minimum, lambda a, b: (floats,) * 3)
def _(builder, context, given, args):
    return builder.select(builder.fcmp_ordered("<", *args), *args)


@emission(ceil_to_ints, lambda x: (ints, floats))
def _(builder, context, given, args):
    return builder.fptosi(intrinsic(builder, f"llvm.ceil.v{LANES}f32", floats.ir, *args), ints.ir)


@emission(to_floats, lambda x: (floats, ints))
def _(builder, context, given, args):
    return builder.sitofp(args[0], floats.ir)


@emission(bits_as_ints, lambda x: (ints, floats))
def _(builder, context, given, args):
    return builder.bitcast(args[0], ints.ir)


@emission(bits_as_floats, lambda x: (floats, ints))
def _(builder, context, given, args):
    return builder.bitcast(args[0], floats.ir)


@emission(shift_left, lambda x, n: (ints, ints, types.int32))
def _(builder, context, given, args):
    return builder.shl(args[0], broadcast(builder, ints, args[1]))


@emission(shift_right, lambda x, n: (ints, ints, types.int32))
def _(builder, context, given, args):
    return builder.lshr(args[0], broadcast(builder, ints, args[1]))


@emission(lanes, lambda: (ints,))
def _(builder, context, given, args):
    return ir.Constant(ints.ir, list(range(LANES)))


@emission(total, lambda x: (types.float32, floats))
def _(builder, context, given, args):
    x, width = args[0], LANES
    while width > 1:  # halves onto halves, as written above: the order is part of the result
        width //= 2
        half = [ir.Constant(ir.VectorType(I32, width), list(range(i, i + width))) for i in (0, width)]
        x = builder.fadd(*(builder.shuffle_vector(x, ir.Constant(x.type, ir.Undefined), h) for h in half))
    return builder.extract_element(x, I32(0))


@emission(bitmap, lambda m: (types.int64, mask))
def _(builder, context, given, args):
    return builder.zext(builder.bitcast(args[0], ir.IntType(LANES)), I64)


@emission(lowest, lambda bits: (types.int64, types.int64))
def _(builder, context, given, args):
    return intrinsic(builder, "llvm.cttz.i64", I64, args[0], BIT(1))


# Whole operations.


def fetch_add(counter, n):
    """Add n to counter[0], an int64 shared by threads; returns what it was."""
    counter[0] += n
    return int(counter[0]) - n


@emission(fetch_add, lambda counter, n: (types.int64, counter, types.int64))
def _(builder, context, given, args):
    p = _address(builder, context, given[0], args[0], I64(0))
    return builder.atomic_rmw("add", p, args[1], "monotonic")


def product(c, c0, c_row, c_next, a, a0, a_row, a_column, b, b0, b_row, b_next, n, accumulate):
    """C = A B, or C += A B: the matrix product's register tile. c, a, b: float32.

    A (HEIGHT, n) at a[a0 + row * a_row + column * a_column]. B (n, WIDE * LANES) and C (HEIGHT, WIDE * LANES) at b0 and
    c0, in rows b_row and c_row apart; their next LANES columns are b_next and c_next further. n >= 1. A B is summed by
    FMAs in order from 0, and then added: over many calls the error stays that of short sums.
    """
    for row in range(HEIGHT):
        for w in range(WIDE):
            x = np.zeros(LANES, np.float32)
            for j in range(n):
                x = fma(splat(a[a0 + row * a_row + j * a_column]), load(b, b0 + w * b_next + j * b_row), x)
            at = c0 + row * c_row + w * c_next
            store(c, at, load(c, at) + x if accumulate else x)


@emission(product, lambda c, c0, c_row, c_next, a, a0, a_row, a_column, b, b0, b_row, b_next, n, accumulate: (
    types.void, c, *(types.int64,) * 3, a, *(types.int64,) * 3, b, *(types.int64,) * 4, types.boolean
))  # fmt: skip
def _(builder, context, given, args):
    c, c0, c_row, c_next, a, a0, a_row, a_column, b, b0, b_row, b_next, n, accumulate = args

    def vector_at(p, i):
        return builder.bitcast(builder.gep(p, [i]), floats.ir.as_pointer())

    c, a, b = (_address(builder, context, given[i], args[i], args[i + 1]) for i in (0, 4, 8))
    a_rows = [builder.gep(a, [builder.mul(a_row, I64(row))]) for row in range(HEIGHT)]
    b_parts = [builder.gep(b, [builder.mul(b_next, I64(w))]) for w in range(WIDE)]
    start, loop = builder.block, builder.append_basic_block("loop")
    builder.branch(loop)

    builder.position_at_end(loop)
    j, sums = builder.phi(I64), [builder.phi(floats.ir) for _ in range(HEIGHT * WIDE)]
    of_b, column = builder.mul(j, b_row), builder.mul(j, a_column)
    b_j = []
    for part in b_parts:
        b_j.append(builder.load(vector_at(part, of_b)))
        b_j[-1].align = 4
    added = []
    for row in range(HEIGHT):
        a_j = broadcast(builder, floats, builder.load(builder.gep(a_rows[row], [column])))
        for w in range(WIDE):
            args_ = a_j, b_j[w], sums[row * WIDE + w]
            added.append(intrinsic(builder, f"llvm.fma.v{LANES}f32", floats.ir, *args_))
    next_j = builder.add(j, I64(1))
    for phi, first, again in ((j, I64(0), next_j), *((x, constant(floats, 0.0), y) for x, y in zip(sums, added))):
        phi.add_incoming(first, start)
        phi.add_incoming(again, loop)
    end = builder.append_basic_block("end")
    builder.cbranch(builder.icmp_signed("<", next_j, n), loop, end)

    builder.position_at_end(end)
    for row in range(HEIGHT):
        for w in range(WIDE):
            p = vector_at(c, builder.add(builder.mul(c_row, I64(row)), builder.mul(c_next, I64(w))))
            before = builder.load(p)
            before.align = 4
            # a select, not a product with 0: C may hold anything before
            x = added[row * WIDE + w]
            x = builder.select(accumulate, builder.fadd(before, x), x)
            builder.store(x, p).align = 4


def transpose(a, a0, a_row, c, c0, c_row):
    """C = A^T, LANES x LANES, float32, at a0 and c0 in rows a_row and c_row apart."""
    rows = np.array([load(a, a0 + i * a_row) for i in range(LANES)])
    for i in range(LANES):
        store(c, c0 + i * c_row, rows[:, i])


@emission(
    transpose, lambda a, a0, a_row, c, c0, c_row: (types.void, a, types.int64, types.int64, c, types.int64, types.int64)
)
def _(builder, context, given, args):
    a, a0, a_row, c, c0, c_row = args

    def row_at(array_type, array, start, stride, i):
        at = builder.add(start, builder.mul(stride, I64(i)))
        return array_type, array, at

    x = [_load(builder, context, *row_at(given[0], a, a0, a_row, i)) for i in range(LANES)]
    for w in (8, 4, 2, 1):  # the blocks off the diagonal change places, then those in each block
        for i in range(LANES):
            if not i & w:
                upper = [lane + LANES - w if lane & w else lane for lane in range(LANES)]
                lower = [lane + LANES if lane & w else lane + w for lane in range(LANES)]
                x[i], x[i + w] = (builder.shuffle_vector(x[i], x[i + w], ir.Constant(ir.VectorType(I32, LANES), order))
                                  for order in (upper, lower))  # fmt: skip
    for i in range(LANES):
        _store(builder, context, *row_at(given[3], c, c0, c_row, i), x[i])


# ---------------------------------------------------------------------------------------------
# The kernels.
# ---------------------------------------------------------------------------------------------

ROWS = 64  # query rows of one forward task: the products reuse each key ROWS times
KEYS = 256  # keys of one step of the forward: those of K, of V and their scores stay in the second-level cache
GROUPS = ROWS // LANES

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
INF = np.float32(np.inf)


def jit(function):
    """Compiled at the first call, kept on disk where that is possible (see sus_backends/cpu.py)."""
    return numba.njit(function, nogil=True, error_model="numpy")


hash_absorb = jit(absorb)


@jit
def exp2(x):
    """2^x for floats x <= 0, and NaN; 0 below 2^-126. The fraction's polynomial is within 2e-9; then float32 rounds."""
    magic = splat(np.float32(12582912.0))  # 1.5 * 2^23: adding it rounds to an integer, in the low bits
    shifted = x + magic
    f = x - (shifted - magic)
    p = splat(np.float32(1.5345816e-4))
    p = fma(p, f, splat(np.float32(1.339993122e-3)))
    p = fma(p, f, splat(np.float32(9.618488958e-3)))
    p = fma(p, f, splat(np.float32(5.550328777e-2)))
    p = fma(p, f, splat(np.float32(2.4022646891e-1)))
    p = fma(p, f, splat(np.float32(6.9314720574e-1)))
    p = fma(p, f, splat(np.float32(1.0)))
    power = bits_as_floats(shift_left(bits_as_ints(shifted), np.int32(23)) + splat(np.int32(0x3F800000)))
    # a product with the power, not an addition to the exponent: NaN stays NaN
    return where(x < splat(np.float32(-126.0)), splat(np.float32(0.0)), p * power)


@register_jitable
def padded(D):
    return (D + WIDE * LANES - 1) // (WIDE * LANES) * WIDE * LANES


@jit
def load_row(a, start, d, D):
    """Elements d, d + 1, ... of the D at `start`; zeros beyond."""
    return load(a, start + d) if d + LANES <= D else load_first(a, start + d, D - d)


def forward_work(D, keys, singles=False):
    """float32 elements of work space for one thread of `forward` that remembers the masses of `keys` keys, and, if
    singles, their weights.
    """
    masses = -(-keys // KEYS) * (1 + KEYS // TILE)
    return ROWS * (2 * padded(D) + weights_of(keys, D, singles) + 3 + masses) + 2 * KEYS * padded(D)


@register_jitable
def weights_of(keys, D, singles):
    """How many of a row's weights `forward` has at a time; before and after, that space holds rows of Q and of O."""
    return (max(keys, padded(D)) if singles else KEYS) + HEIGHT


@jit
def pack(source, start, stride, n, D, target, width):
    """n rows of D elements, float32 or bfloat16, `stride` apart, into contiguous rows of `width` >= D, zeros behind."""
    for i in range(n):
        for d in range(0, width, LANES):
            x = load_row(source, start + i * stride, d, D) if d < D else splat(np.float32(0))
            store(target, i * width + d, x)


@jit
def transpose_all(a, a_row, rows, columns, c, c_row):
    """C = A^T, A (rows, columns), both multiples of LANES."""
    for i in range(0, rows, LANES):
        for j in range(0, columns, LANES):
            transpose(a, i * a_row + j, a_row, c, j * c_row + i, c_row)


@jit
def softmax_step(p, step, n, top, norm, step_top, mass, out_t, group, width):
    """Scores (n, LANES) at p[step] become weights 2^(score - step_top); top, norm and the output so far follow.

    mass: (KEYS / TILE, ROWS), becomes the sums of the weights in each tile.
    """
    at = group * LANES
    old = load(top, at)
    new = old
    for j in range(n):
        new = maximum(load(p, step + j * LANES), new)
    store(top, at, new)
    # rows that have seen nothing but -inf have no maximum to subtract
    base = where(new < splat(np.float32(-3e38)), splat(np.float32(0)), new)
    store(step_top, at, base)
    step_norm = splat(np.float32(0))
    for start in range(0, n, TILE):
        tile_norm = splat(np.float32(0))
        for j in range(start, min(start + TILE, n)):
            weight = exp2(load(p, step + j * LANES) - base)
            store(p, step + j * LANES, weight)
            tile_norm = tile_norm + weight
        store(mass, start // TILE * ROWS + at, tile_norm)
        step_norm = step_norm + tile_norm
    shrink = exp2(old - base)
    store(norm, at, fma(load(norm, at), shrink, step_norm))
    for i in range(group * width * LANES, (group + 1) * width * LANES, LANES):
        store(out_t, i, load(out_t, i) * shrink)


@jit
def inclusion_units(weight, c_units):
    """q = min(1, c W) in fixed point, as in reference.inclusion_units. c_units: c * UNIT, all lanes. 0 for NaN."""
    return ceil_to_ints(minimum(maximum(weight * c_units, splat(np.float32(0))), splat(np.float32(UNIT))))


@jit
def take(hits, place, weight, scratch, row, count, slots, places, weights):
    """Into the next slot of each row whose bit is set in `hits`, if it has one: the place, and the row's weight."""
    store(scratch, 0, weight)
    while hits:
        lane = lowest(hits)
        hits &= hits - 1
        if count[lane] < slots:
            slot = (row + lane) * slots + count[lane]
            places[slot], weights[slot] = place, scratch[lane]
            count[lane] += 1


@jit
def take_no_more(n, row, count, slots, places, weights):
    """-1 and 0 in what is left of n rows' slots."""
    for lane in range(n):
        for slot in range((row + lane) * slots + count[lane], (row + lane + 1) * slots):
            places[slot], weights[slot] = -1, 0


@jit
def draw(mass, step_top, top, norm, group, first_tile, n_tiles, n, used, scratch, row, u, c, slots, tiles, masses):
    """The systematic sample of 16 rows' tiles: keep one where the running sum of q, started at u, passes an integer.

    In fixed point, as specified in reference.inclusion_units and keep_systematic; q depends on the stored masses alone.
    mass: (tiles, ROWS) from first_tile on, relative to step_top: (steps, ROWS). row: the first of the rows, of B * H *
    T. n: how many of the 16 there are; used: a bitmap of those that see anything. scratch: LANES floats.
    """
    unit, fraction, none = splat(np.int32(UNIT)), splat(np.int32(UNIT - 1)), splat(np.int32(0))
    c_units = splat(np.float32(c * np.float32(UNIT)))
    at = group * LANES
    count = np.zeros(LANES, np.int64)
    running, final, norms = load_first(u, row, n), load(top, at), load(norm, at)
    for tile in range(n_tiles):
        factor = exp2(load(step_top, tile * TILE // KEYS * ROWS + at) - final) / norms
        weight = load(mass, tile * ROWS + at) * factor
        running = running + inclusion_units(weight, c_units)
        hits = bitmap(none < (running & unit)) & used
        running = running & fraction
        if hits:
            take(hits, first_tile + tile, weight, scratch, row, count, slots, tiles, masses)
    take_no_more(n, row, count, slots, tiles, masses)


def int32(word):
    """The same bits."""
    return np.array(word, np.uint32).view(np.int32)[()]


ADDED, FIRST, SECOND = int32(0x9E3779B9), int32(0x7FEB352D), int32(0x846CA68B)


@jit
def absorb_all(state, word):
    """`absorb`, lane by lane."""
    x = (state + splat(ADDED)) ^ word
    x = (x ^ shift_right(x, np.int32(16))) * splat(FIRST)
    x = (x ^ shift_right(x, np.int32(15))) * splat(SECOND)
    return x ^ shift_right(x, np.int32(16))


@jit
def draw_singles(
    p, base, step_top, top, norm, group, first_key, n_keys, n, used, scratch, row, states, c, slots, keys, weights
):
    """The Poisson sample of 16 rows' keys: keep one where a uniform of its own is below q, see reference.keep_poisson.

    p: (keys, LANES) at base, the weights from first_key on, as `softmax_step` leaves them. states: int32 (B, H, T), the
    bits of the rows' hash states. Beyond its slots a row keeps nothing: see reference.poisson_slots. Else as in `draw`.
    """
    c_units = splat(np.float32(c * np.float32(UNIT)))
    at = group * LANES
    count = np.zeros(LANES, np.int64)
    state, final, norms = load_first(states, row, n), load(top, at), load(norm, at)
    for start in range(0, n_keys, KEYS):
        factor = exp2(load(step_top, start // KEYS * ROWS + at) - final) / norms
        for j in range(start, min(start + KEYS, n_keys)):
            weight = load(p, base + j * LANES) * factor
            uniform = shift_right(absorb_all(state, splat(np.int32(first_key + j))), np.int32(32 - UNIT_BITS))
            hits = bitmap(uniform < inclusion_units(weight, c_units)) & used
            if hits:
                take(hits, first_key + j, weight, scratch, row, count, slots, keys, weights)
    take_no_more(n, row, count, slots, keys, weights)


@jit
def forward(
    q, k, v, q_strides, k_strides, v_strides, shape, ranges, ranges_stride, scale, out, lse, c, u, slots, singles,
    tiles, masses, counter, work,
):  # fmt: skip
    """Exact attention, one pass over the scores; and, if there are slots, the proposals of each row's tiles, or, if
    singles, its Poisson sample of keys.

    Flash attention's online softmax (Dao et al., arXiv 2205.14135) over steps of KEYS keys for blocks of ROWS rows, in
    base 2. Of its weights a block remembers the sums in each tile, relative to the maximum known at the time.

    shape: (B, H, K, T, N, D). ranges: int32 (B, T, 2), the keys [lo, hi) that a row sees, and its stride of batches.
    scale: of the scores. out: contiguous (B, H, T, D); lse: float32 (B, H, T). Both are 0 for a row that sees nothing.
    c: of the draw, float32; inf keeps all. u: int32 (B, H, T) in [0, 2^23), see reference.row_uniforms; the bits of
    reference.row_states if singles.
    tiles, masses: see reference.proposals_like.
    """
    B, H, K, T, N, D = shape
    width = padded(D)
    capacity = weights_of(N, D, singles)
    blocks = (T + ROWS - 1) // ROWS

    # the thread's work space; with a lane for each row of the block
    end = 0
    q_t, end = work[end : end + ROWS * width], end + ROWS * width  # (GROUPS, width, LANES): scaled queries, transposed
    out_t, end = work[end : end + ROWS * width], end + ROWS * width  # (GROUPS, width, LANES): unnormalised output
    p, end = work[end : end + ROWS * capacity], end + ROWS * capacity  # (GROUPS, capacity, LANES): scores, weights
    top, end = work[end : end + ROWS], end + ROWS  # running maximum of the scores, in base 2
    norm, end = work[end : end + ROWS], end + ROWS  # running sum of the weights
    scratch, end = work[end : end + ROWS], end + ROWS
    k_step, end = work[end : end + KEYS * width], end + KEYS * width
    v_step, end = work[end : end + KEYS * width], end + KEYS * width
    steps = (N + KEYS - 1) // KEYS if slots else 1
    step_top, mass = work[end : end + ROWS * steps], work[end + ROWS * steps :]  # (steps, ROWS), (tiles, ROWS)
    lo, hi = np.zeros(ROWS, np.int32), np.zeros(ROWS, np.int32)  # of the block's rows

    while True:
        task = fetch_add(counter, 1)
        if task >= B * H * blocks:
            return
        head, block = task // blocks, blocks - 1 - task % blocks  # the longest rows first: threads end together
        b, h = head // H, head % H
        kv = h // (H // K)
        first = block * ROWS
        rows = min(ROWS, T - first)
        # some row sees the keys from start0, a tile's first, to stop; all that see any see those from from_ to `to`
        start0, stop, from_, to = N, 0, 0, N
        for r in range(rows):
            at = b * ranges_stride + 2 * (first + r)
            lo[r], hi[r] = ranges[at], ranges[at + 1]
            if lo[r] < hi[r]:
                start0, stop = min(start0, lo[r]), max(stop, hi[r])
                from_, to = max(from_, lo[r]), min(to, hi[r])
        start0 = start0 // TILE * TILE

        pack(q, b * q_strides[0] + h * q_strides[1] + first * q_strides[2], q_strides[2], rows, D, p, width)
        p[rows * width : ROWS * width] = 0
        for group in range(GROUPS):
            transpose_all(p[group * LANES * width :], width, LANES, width, q_t[group * width * LANES :], LANES)
        for i in range(0, ROWS * width, LANES):
            store(q_t, i, load(q_t, i) * splat(np.float32(scale * LOG2_E)))
        top[:] = -INF
        norm[:] = 0
        out_t[:] = 0

        for start in range(start0, stop, KEYS):
            n = min(KEYS, stop - start)
            n_padded = (n + HEIGHT - 1) // HEIGHT * HEIGHT
            pack(k, b * k_strides[0] + kv * k_strides[1] + start * k_strides[2], k_strides[2], n, D, k_step, width)
            pack(v, b * v_strides[0] + kv * v_strides[1] + start * v_strides[2], v_strides[2], n, D, v_step, width)
            at = start - start0 if slots else 0  # whose sums are remembered
            kept = at if singles else 0  # and whose weights, where these are drawn
            for j in range(0, n_padded, HEIGHT):
                for group in range(0, GROUPS, WIDE):
                    product(p, (group * capacity + kept + j) * LANES, LANES, capacity * LANES, k_step, j * width, width,
                            1, q_t, group * width * LANES, LANES, width * LANES, D, False)  # fmt: skip
            for group in range(GROUPS):
                base = (group * capacity + kept) * LANES
                begin = min(max(from_ - start, 0), n)  # the keys before this, and those from `end` on, not all rows see
                end = min(max(to - start, begin), n)
                lo_, hi_ = load(lo, group * LANES), load(hi, group * LANES)
                for e in range(n - end + begin):
                    j = e if e < begin else end + e - begin
                    key, s = splat(np.int32(start + j)), load(p, base + j * LANES)
                    s = where(key < lo_, splat(-INF), where(key < hi_, s, splat(-INF)))
                    store(p, base + j * LANES, s)
                softmax_step(p, base, n, top, norm, step_top[at // KEYS * ROWS :],
                             mass[at // TILE * ROWS :], out_t, group, width)  # fmt: skip
            for d in range(0, width, HEIGHT):
                for group in range(0, GROUPS, WIDE):
                    product(out_t, (group * width + d) * LANES, LANES, width * LANES, v_step, d, 1, width,
                            p, (group * capacity + kept) * LANES, LANES, capacity * LANES, n, True)  # fmt: skip

        if slots:
            for group in range((rows + LANES - 1) // LANES):
                n, used, row = min(LANES, rows - group * LANES), 0, head * T + first + group * LANES
                for lane in range(n):
                    used |= int(lo[group * LANES + lane] < hi[group * LANES + lane]) << lane
                if singles:
                    draw_singles(p, group * capacity * LANES, step_top, top, norm, group, start0, stop - start0, n,
                                 used, scratch, row, u, c, slots, tiles, masses)  # fmt: skip
                else:
                    draw(mass, step_top, top, norm, group, start0 // TILE, (stop - start0 + TILE - 1) // TILE, n, used,
                         scratch, row, u, c, slots, tiles, masses)  # fmt: skip
        for group in range(GROUPS):  # into p, which has been used up
            transpose_all(out_t[group * width * LANES :], LANES, width, LANES, p[group * LANES * width :], width)
        for r in range(rows):
            row = head * T + first + r
            if lo[r] >= hi[r]:
                out[row * D : (row + 1) * D] = 0
                lse[row] = 0
                continue
            inverse = splat(np.float32(1) / norm[r])
            for d in range(0, D, LANES):
                store_first(out, row * D + d, load(p, r * width + d) * inverse, min(LANES, D - d))
            lse[row] = (top[r] + np.log2(norm[r])) * LN_2


# The backward's work is its records: the kept pairs of a row and a tile. By row it is known what is kept, and dQ is
# summed; by tile K and V stay in the cache, dK and dV are sums, and many rows make dense products. So one kernel thins,
# row by row, and sorts a chunk's records by tile; a second takes each tile's records, of all chunks, and leaves what
# each adds to dQ; a third sums that by row. What each task writes has one owner, and the order of every sum is that of
# chunks and rows: the result is the same for any number of threads.
#
# A call of these kernels does one round, a rectangle of the work: `round_` is (first_head, heads, first_chunk, chunks),
# key/value heads of the B * K, and of each the same chunks of CHUNK query rows of the G * chunks_of(T) that attend
# to it. What stands between the kernels is as large as a round, not as the whole.

CHUNK = 256  # query rows of one task
BATCH = 64  # records of one product: with K, V and what they become, they stay in the second-level cache

number_of_tiles = register_jitable(tiles_of)


@register_jitable
def chunks_of(T):
    return (T + CHUNK - 1) // CHUNK


@register_jitable
def chunk_of(task, shape, round_):
    """(batch, key/value head, query head, first row, row after the last) of a round's task, a chunk of query rows."""
    B, H, K, T, N, D = shape
    head, chunk = round_[0] + task // round_[3], round_[2] + task % round_[3]
    b, kv = head // K, head % K
    first = chunk % chunks_of(T) * CHUNK
    return b, kv, kv * (H // K) + chunk // chunks_of(T), first, min(first + CHUNK, T)


@jit
def thin(
    grad_out, grad_strides, shape, ranges, ranges_stride, first_row, first_head, out, drawn_c, c, row_weights,
    thin_state, tiles, masses, slots, round_, delta, starts, record_rows, record_weights, places, kept,
    counter, work, work_ints,
):  # fmt: skip
    """The second draw (reference.thinning_units), and the records that it leaves, sorted by tile in each chunk of rows.

    ranges, ranges_stride: as in `forward`. first_row, first_head: where the first ones stand in the whole. out:
    contiguous. drawn_c: what the forward proposed with. row_weights: float32 (B, H, T). thin_state: the hash state
    of seed and stream. tiles, masses: from `forward`. Writes

    delta: float32 (B, H, T), G_i . O_i.
    starts: int32 (heads * chunks, tiles + 1), where each tile's records begin among those of a chunk; last, how many.
    record_rows, record_weights: int32 (heads * chunks, CHUNK * slots) and float32 (the same, 2), the row; 1/q and W_iJ.
    places: int32 (heads * chunks, CHUNK, slots), where a row's records are among the chunk's, then -1.
    kept: int64 (1,), grows by the number of entries kept.
    """
    B, H, K, T, N, D = shape
    n_tiles = number_of_tiles(N)
    capacity = CHUNK * slots
    units, left = work[:slots], work[slots : 2 * slots]  # r in fixed point, 1/(x r)
    kept_weights, kept_tiles = work[2 * slots :], work_ints
    unit, drawn_units = splat(np.float32(UNIT)), splat(np.float32(drawn_c * np.float32(UNIT)))
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * round_[3]:
            return
        b, kv, h, first, stop = chunk_of(task, shape, round_)
        at = starts[task * (n_tiles + 1) : (task + 1) * (n_tiles + 1)]
        at[:] = 0
        chunk = task * capacity
        entries = 0
        for i in range(first, stop):
            row = (b * H + h) * T + i
            g_row = b * grad_strides[0] + h * grad_strides[1] + i * grad_strides[2]
            products = splat(np.float32(0))
            for d in range(0, D, LANES):
                products = fma(load_row(grad_out, g_row, d, D), load_row(out, row * D, d, D), products)
            delta[row] = total(products)

            slot, count = row * slots, 0
            while count < slots and tiles[slot + count] >= 0:
                count += 1
            aim = splat(c * row_weights[row])
            for s in range(0, count, LANES):
                n = min(LANES, count - s)
                mass = load_first(masses, slot + s, n)
                share = unit / to_floats(inclusion_units(mass, drawn_units))
                # never 0: what was proposed may not become impossible; and all where it is NaN
                r = aim * (mass * share) * unit
                r = to_floats(ceil_to_ints(where(r < unit, maximum(r, splat(np.float32(1))), unit)))
                store_first(units, s, r, n)
                store_first(left, s, share * (unit / r), n)
            state = hash_absorb(hash_absorb(hash_absorb(thin_state, b), first_head + h), first_row + i)
            lo, hi = ranges[b * ranges_stride + 2 * i], ranges[b * ranges_stride + 2 * i + 1]
            running = state >> (32 - UNIT_BITS)
            place = (i - first) * slots
            for s in range(count):
                running += int(units[s])
                if running >> UNIT_BITS:
                    tile = tiles[slot + s]
                    kept_tiles[place] = tile
                    kept_weights[2 * place], kept_weights[2 * place + 1] = left[s], masses[slot + s]
                    at[tile + 1] += 1
                    entries += min((tile + 1) * TILE, hi) - max(tile * TILE, lo)
                    place += 1
                running &= UNIT - 1
            if place < (i - first + 1) * slots:
                kept_tiles[place] = -1

        for tile in range(n_tiles):
            at[tile + 1] += at[tile]
        for i in range(first, stop):
            for place in range((i - first) * slots, (i - first + 1) * slots):
                tile = kept_tiles[place]
                if tile < 0:
                    places[chunk + place] = -1
                    break
                record = at[tile]
                at[tile] = record + 1
                places[chunk + place] = record
                record_rows[chunk + record] = i
                record_weights[2 * (chunk + record)] = kept_weights[2 * place]
                record_weights[2 * (chunk + record) + 1] = kept_weights[2 * place + 1]
        for tile in range(n_tiles, 0, -1):  # each tile's end becomes the next one's beginning
            at[tile] = at[tile - 1]
        at[0] = 0
        fetch_add(kept, entries)


def tile_work(D, chunks):
    """float32 and int32 elements of work space for one thread of `tile_gradients`."""
    width = padded(D)
    return TILE * (5 * width + 1) + BATCH * (3 * width + 2 * TILE) + 2 * chunks * CHUNK, 3 * chunks * CHUNK


@jit
def multiply(c, c_row, a, a_row, a_column, b, b_row, rows, columns, n, accumulate):
    """C = A B, or C += A B, for C (rows, columns): rows are rounded up to HEIGHT, columns one of WIDE * LANES."""
    for row in range(0, rows, HEIGHT):
        for column in range(0, columns, WIDE * LANES):
            product(c, row * c_row + column, c_row, LANES, a, row * a_row, a_row, a_column, b, column, b_row, LANES, n,
                    accumulate)  # fmt: skip


@jit
def tile_gradients(
    grad_out, q, k, v, grad_strides, q_strides, k_strides, v_strides, shape, ranges, ranges_stride, scale, lse, delta,
    slots, round_, starts, bases, record_rows, record_weights, adds, parts, dk, dv, g_squares, q_squares, k_squares,
    variance, counter, work, work_ints,
):  # fmt: skip
    """dK and dV of the round's tiles, and what each record adds to dQ.

    With P_ij = W_ij m_ij and M_ij = P_ij (G_i . V_j - delta_i): dV = P^T G, dK = scale M^T Q, dQ = scale M K.

    ranges, ranges_stride: as in `forward`. delta, starts, record_rows, record_weights: from `thin`. bases: int64 (heads
    * chunks), how many records the chunks before have. parts: float32 (records, padded(D)), M K. dk, dv: contiguous
    (heads of the round, N, D). adds: to what is in them. g_squares, q_squares (B, H, T), k_squares (B, K, N): squared
    norms, float32, or empty with variance, float64 (heads * tiles): the estimate of reference.backward, by task.
    """
    B, H, K, T, N, D = shape
    width = padded(D)
    n_tiles, chunks = number_of_tiles(N), round_[3]
    end, size = 0, TILE * width
    k_tile, end = work[end : end + size], end + size  # (TILE, width)
    k_t, end = work[end : end + size], end + size  # (width, TILE)
    v_t, end = work[end : end + size], end + size
    dk_tile, end = work[end : end + size], end + size
    dv_tile, end = work[end : end + size], end + size
    k_square, end = work[end : end + TILE], end + TILE
    size = BATCH * width
    q_rows, end = work[end : end + size], end + size  # (BATCH, width), scaled as in the forward
    g_rows, end = work[end : end + size], end + size
    part, end = work[end : end + size], end + size
    p, end = work[end : end + BATCH * TILE], end + BATCH * TILE  # (BATCH, TILE)
    m, end = work[end : end + BATCH * TILE], end + BATCH * TILE
    # of the tile's records: 1/q, W_iJ, query head, row, and the place in parts
    size = chunks * CHUNK
    multipliers, masses = work[end : end + size], work[end + size : end + 2 * size]
    heads, positions, places = work_ints[:size], work_ints[size : 2 * size], work_ints[2 * size :]
    capacity, q_scale = CHUNK * slots, splat(np.float32(scale * LOG2_E))
    estimates = variance.size > 0
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * n_tiles:
            return
        head, tile = task // n_tiles, task % n_tiles
        first = tile * TILE
        n_keys = min(TILE, N - first)
        b, kv = (round_[0] + head) // K, (round_[0] + head) % K
        k_tile[n_keys * width :] = 0
        pack(v, b * v_strides[0] + kv * v_strides[1] + first * v_strides[2], v_strides[2], n_keys, D, k_tile, width)
        transpose_all(k_tile, width, TILE, width, v_t, TILE)
        pack(k, b * k_strides[0] + kv * k_strides[1] + first * k_strides[2], k_strides[2], n_keys, D, k_tile, width)
        transpose_all(k_tile, width, TILE, width, k_t, TILE)
        if estimates:
            k_square[n_keys:] = 0
            k_square[:n_keys] = k_squares[(b * K + kv) * N + first : (b * K + kv) * N + first + n_keys]
        dk_tile[:], dv_tile[:] = 0, 0
        task_variance = 0.0
        count = 0
        for chunk in range(head * chunks, (head + 1) * chunks):
            h = chunk_of(chunk, shape, round_)[2]
            region = chunk * (n_tiles + 1) + tile
            for record in range(starts[region], starts[region + 1]):
                heads[count], positions[count] = h, record_rows[chunk * capacity + record]
                places[count] = bases[chunk] + record
                multipliers[count] = record_weights[2 * (chunk * capacity + record)]
                masses[count] = record_weights[2 * (chunk * capacity + record) + 1]
                count += 1
        for batch in range(0, count, BATCH):
            n = min(BATCH, count - batch)
            for e in range(n):
                h, i = heads[batch + e], positions[batch + e]
                q_row = b * q_strides[0] + h * q_strides[1] + i * q_strides[2]
                g_row = b * grad_strides[0] + h * grad_strides[1] + i * grad_strides[2]
                for d in range(0, D, LANES):
                    store(q_rows, e * width + d, load_row(q, q_row, d, D) * q_scale)
                    store(g_rows, e * width + d, load_row(grad_out, g_row, d, D))
                for d in range((D + LANES - 1) // LANES * LANES, width, LANES):
                    store(q_rows, e * width + d, splat(np.float32(0)))
                    store(g_rows, e * width + d, splat(np.float32(0)))

            multiply(p, TILE, q_rows, width, 1, k_t, TILE, n, TILE, width, False)
            multiply(m, TILE, g_rows, width, 1, v_t, TILE, n, TILE, width, False)
            for e in range(n):
                # what the next batch reads and this one writes comes while this one is computed
                later = min(batch + BATCH + e, count - 1)
                h, i = heads[later], positions[later]
                for d in range(0, D, LANES):
                    prefetch(q, b * q_strides[0] + h * q_strides[1] + i * q_strides[2] + d)
                    prefetch(grad_out, b * grad_strides[0] + h * grad_strides[1] + i * grad_strides[2] + d)
                    prefetch(parts, places[batch + e] * width + d)
                i = positions[batch + e]
                row = (b * H + heads[batch + e]) * T + i
                log_norm, delta_e = splat(np.float32(lse[row] * LOG2_E)), splat(delta[row])
                lo = splat(ranges[b * ranges_stride + 2 * i])
                hi = splat(ranges[b * ranges_stride + 2 * i + 1])
                zero = splat(np.float32(0))
                sums, squares = zero, zero
                for j in range(e * TILE, (e + 1) * TILE, LANES):
                    key = splat(np.int32(first + j - e * TILE)) + lanes()
                    w = where(key < lo, zero, where(key < hi, exp2(load(p, j) - log_norm), zero))
                    store(p, j, w)
                    sums = sums + w
                # their sum is known, and not by the log-sum-exp, whose last place is worth much where it is large
                all_keys = total(sums)
                share = splat(masses[batch + e] / all_keys if all_keys != 0 else all_keys)
                multiplier = splat(multipliers[batch + e])
                for j in range(e * TILE, (e + 1) * TILE, LANES):
                    key = splat(np.int32(first + j - e * TILE)) + lanes()
                    w = load(p, j) * share
                    slope = where(key < lo, zero, where(key < hi, load(m, j) - delta_e, zero))
                    store(p, j, w * multiplier)
                    store(m, j, w * multiplier * slope)
                    if estimates:
                        norms = load(k_square, j - e * TILE) + splat(q_squares[row])
                        slope = slope * splat(np.float32(scale))
                        squares = fma(w * w, fma(slope * slope, norms, splat(g_squares[row])), squares)
                if estimates:
                    task_variance += (multipliers[batch + e] - 1) * multipliers[batch + e] * total(squares)
            multiply(dv_tile, width, p, 1, TILE, g_rows, width, TILE, width, n, True)
            multiply(dk_tile, width, m, 1, TILE, q_rows, width, TILE, width, n, True)
            multiply(part, width, m, TILE, 1, k_tile, width, n, width, TILE, False)
            for e in range(n):
                for d in range(0, width, LANES):
                    store(parts, places[batch + e] * width + d, load(part, e * width + d))

        for j in range(n_keys):
            row = (head * N + first + j) * D
            for d in range(0, D, LANES):
                # LN_2 for the LOG2_E in q_rows
                lanes_left, dv_j = min(LANES, D - d), load(dv_tile, j * width + d)
                dk_j = load(dk_tile, j * width + d) * splat(np.float32(LN_2))
                if adds:
                    dk_j, dv_j = dk_j + load_row(dk, row, d, D), dv_j + load_row(dv, row, d, D)
                store_first(dk, row + d, dk_j, lanes_left)
                store_first(dv, row + d, dv_j, lanes_left)
        if estimates:
            variance[task] = task_variance


@jit
def query_gradients(shape, scale, lse, delta, slots, round_, bases, places, parts, dq, counter):
    """dQ of the round's rows, from `tile_gradients` and what `thin` wrote. dq: contiguous."""
    B, H, K, T, N, D = shape
    width = padded(D)
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * round_[3]:
            return
        b, _, h, first, stop = chunk_of(task, shape, round_)
        for i in range(first, stop):
            row = (b * H + h) * T + i
            start = (task * CHUNK + i - first) * slots
            count = 0
            while count < slots and places[start + count] >= 0:
                # of the next row; a wrong address does no harm
                later = places[min(start + slots + count, places.size - 1)]
                for d in range(0, D, LANES):
                    prefetch(parts, (bases[task] + later) * width + d)
                count += 1
            defined = math.isfinite(delta[row]) and math.isfinite(lse[row])
            for d in range(0, D, LANES):
                dq_d = splat(np.float32(0 if defined else np.nan))
                for place in range(start, start + count):
                    dq_d = dq_d + load(parts, (bases[task] + places[place]) * width + d)
                store_first(dq, row * D + d, dq_d * splat(np.float32(scale)), min(LANES, D - d))
