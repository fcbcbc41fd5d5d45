"""The CPU backend's kernels, compiled by numba: attention's exact forward with the draw, and the sparse backward.

Two parts. First a small vector language: 16 lanes of float32, explicit operations on them, and one matrix product. Each
operation has a meaning in NumPy (which is what runs under NUMBA_DISABLE_JIT=1) and an emission of LLVM's vector
instructions, which LLVM turns into those of any CPU. Then the kernels, written in that language.

The layout that the forward rests on: **a lane is a query row**. 16 rows stand side by side, and every loop runs over
keys or over the head dim. So maxima, sums and the draw's running total need nothing across lanes, and both matrix
products take the scalars of K and V as they lie in memory.

One file, because numba's cache of compiled code looks at changes of a function's own file only (and, see backends/cpu.py,
of reference.py).

Dims: B batch, H query heads, K key/value heads, G = H / K, T positions, D head dim. Arrays are flat; where they are
views of tensors they come with strides (batch, head, position) in elements. bfloat16 comes as uint16.

Deliberately missing: threads (backends/cpu.py runs these functions on several; they release the GIL, and share the
work through a counter), and everything but causal attention with the systematic draw, thinned or not.
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

from backends.reference import UNIT, UNIT_BITS, absorb

# ---------------------------------------------------------------------------------------------
# The vector language.
# ---------------------------------------------------------------------------------------------

LANES = 16
INTERPRETED = bool(numba.config.DISABLE_JIT)
# Rows of the matrix product's register tile: 8 of 32 registers of 16 floats, or 4 pairs of 16 registers of 8.
TILE = 8 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 4

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


# Arithmetic, lane by lane: + - * < of floats, + & < of ints, and these.


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


def square_root(x):
    return np.sqrt(x)


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
    (operator.truediv, "fdiv", None), (operator.and_, None, "and_"),
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


@emission(square_root, lambda x: (floats, floats))
def _(builder, context, given, args):
    return intrinsic(builder, f"llvm.sqrt.v{LANES}f32", floats.ir, *args)


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


def product(c, c0, a, a0, a_row, a_column, b, b0, n, accumulate):
    """C = A B, or C += A B: the matrix product's register tile. c, a, b: float32.

    A (TILE, n) at a[a0 + row * a_row + column * a_column]; B (n, LANES) and C (TILE, LANES) contiguous at b0 and c0;
    n >= 1. A B is summed by FMAs in order from 0, and then added: over many calls the error stays that of short sums.
    """
    for row in range(TILE):
        x = np.zeros(LANES, np.float32)
        for j in range(n):
            x = fma(splat(a[a0 + row * a_row + j * a_column]), load(b, b0 + j * LANES), x)
        store(c, c0 + row * LANES, load(c, c0 + row * LANES) + x if accumulate else x)


@emission(product, lambda c, c0, a, a0, a_row, a_column, b, b0, n, accumulate:
          (types.void, c, types.int64, a, *(types.int64,) * 3, b, types.int64, types.int64, types.boolean))  # fmt: skip
def _(builder, context, given, args):
    c, c0, a, a0, a_row, a_column, b, b0, n, accumulate = args

    def vector_at(p, i):
        return builder.bitcast(builder.gep(p, [i]), floats.ir.as_pointer())

    c, a, b = (_address(builder, context, given[i], args[i], args[i + 1]) for i in (0, 2, 6))
    a_rows = [builder.gep(a, [builder.mul(a_row, I64(row))]) for row in range(TILE)]
    start, loop = builder.block, builder.append_basic_block("loop")
    builder.branch(loop)

    builder.position_at_end(loop)
    j, sums = builder.phi(I64), [builder.phi(floats.ir) for _ in range(TILE)]
    b_j = builder.load(vector_at(b, builder.mul(j, I64(LANES))))
    b_j.align = 4
    column = builder.mul(j, a_column)
    added = []
    for row in range(TILE):
        a_j = builder.load(builder.gep(a_rows[row], [column]))
        added.append(intrinsic(builder, f"llvm.fma.v{LANES}f32", floats.ir, broadcast(builder, floats, a_j), b_j, sums[row]))
    next_j = builder.add(j, I64(1))
    for phi, first, again in ((j, I64(0), next_j), *((x, constant(floats, 0.0), y) for x, y in zip(sums, added))):
        phi.add_incoming(first, start)
        phi.add_incoming(again, loop)
    end = builder.append_basic_block("end")
    builder.cbranch(builder.icmp_signed("<", next_j, n), loop, end)

    builder.position_at_end(end)
    for row in range(TILE):
        p = vector_at(c, I64(row * LANES))
        before = builder.load(p)
        before.align = 4
        # a select, not a product with 0: C may hold anything before
        x = builder.select(accumulate, builder.fadd(before, added[row]), added[row])
        builder.store(x, p).align = 4


# ---------------------------------------------------------------------------------------------
# The kernels.
# ---------------------------------------------------------------------------------------------

ROWS = 64  # query rows of one forward task: the products reuse each key ROWS times
KEYS = 256  # keys of one tile: a tile of K, of V and of the scores stay in the second-level cache
GROUPS = ROWS // LANES

LOG2_E, LN_2 = math.log2(math.e), math.log(2)
INF = np.float32(np.inf)


def jit(function):
    """Compiled at the first call, kept on disk where that is possible (see backends/cpu.py)."""
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
    return (D + LANES - 1) // LANES * LANES


@jit
def load_row(a, start, d, D):
    """Elements d, d + 1, ... of the D at `start`; zeros beyond."""
    return load(a, start + d) if d + LANES <= D else load_first(a, start + d, D - d)


def forward_work(D, keys):
    """float32 elements of work space for one thread of `forward` whose buffer of weights holds `keys` keys."""
    tiles = (keys + KEYS - 1) // KEYS
    return ROWS * (D + padded(D) + keys + TILE + 3 + tiles) + 2 * KEYS * padded(D)


@jit
def pack(source, start, stride, n, D, target, width):
    """n rows of D elements, float32 or bfloat16, `stride` apart, into contiguous rows of `width` >= D, zeros behind."""
    for i in range(n):
        for d in range(0, D, LANES):
            store(target, i * width + d, load_row(source, start + i * stride, d, D))


@jit
def softmax_tile(p, tile, n, top, norm, tile_top, out_t, group, width):
    """Scores (n, LANES) at p[tile] become weights 2^(score - tile_top); top, norm and the output so far follow."""
    at = group * LANES
    old = load(top, at)
    new = old
    for j in range(n):
        new = maximum(load(p, tile + j * LANES), new)
    store(top, at, new)
    # rows that have seen nothing but -inf have no maximum to subtract
    base = where(new < splat(np.float32(-3e38)), splat(np.float32(0)), new)
    store(tile_top, at, base)
    tile_norm = splat(np.float32(0))
    for j in range(n):
        weight = exp2(load(p, tile + j * LANES) - base)
        store(p, tile + j * LANES, weight)
        tile_norm = tile_norm + weight
    shrink = exp2(old - base)
    store(norm, at, fma(load(norm, at), shrink, tile_norm))
    for i in range(group * width * LANES, (group + 1) * width * LANES, LANES):
        store(out_t, i, load(out_t, i) * shrink)


@jit
def inclusion_units(weight, c_units):
    """q = min(1, c W) in fixed point, as reference.inclusion_units specifies it. c_units: c * UNIT, all lanes. 0 for NaN."""
    return ceil_to_ints(minimum(maximum(weight * c_units, splat(np.float32(0))), splat(np.float32(UNIT))))


@jit
def draw(p, base, n, top, norm, tile_top, group, drawn, first, rows, c, u, slots, entry_key, entry_weight, dropped):
    """The systematic sample of 16 rows: keep key j where the running sum of q, started at u, passes an integer.

    In fixed point, as specified in reference.inclusion_units and keep_systematic; q depends on the stored W alone.
    """
    unit, fraction, none = splat(np.int32(UNIT)), splat(np.int32(UNIT - 1)), splat(np.int32(0))
    c_units = splat(np.float32(c * np.float32(UNIT)))
    count = np.zeros(LANES, np.int64)
    lanes_used = min(max(rows - group * LANES, 0), LANES)
    used = (1 << lanes_used) - 1
    running = none if lanes_used == 0 else load_first(u, first + group * LANES, lanes_used)
    final, norms = load(top, group * LANES), load(norm, group * LANES)
    for start in range(0, n, KEYS):
        factor = exp2(load(tile_top, start // KEYS * ROWS + group * LANES) - final) / norms
        for j in range(start, min(start + KEYS, n)):
            weight = load(p, base + j * LANES) * factor
            running = running + inclusion_units(weight, c_units)
            hits = bitmap(none < (running & unit)) & used
            running = running & fraction
            if hits:
                store(drawn, 0, weight)
                while hits:
                    lane = lowest(hits)
                    hits &= hits - 1
                    row = first + group * LANES + lane
                    if count[lane] < slots:
                        entry_key[row * slots + count[lane]] = j
                        entry_weight[row * slots + count[lane]] = drawn[lane]
                    else:
                        fetch_add(dropped, 1)
                    count[lane] += 1
    for lane in range(lanes_used):
        row = first + group * LANES + lane
        for slot in range(row * slots + min(count[lane], slots), (row + 1) * slots):
            entry_key[slot] = -1
            entry_weight[slot] = 0


@jit
def forward(
    q, k, v, q_strides, k_strides, v_strides, shape, scale, out, lse,
    draws, c, u, slots, entry_key, entry_weight, dropped, counter, work,
):  # fmt: skip
    """Exact causal attention, one pass over the scores; and, if `draws`, each row's systematic sample of its weights.

    Flash attention's online softmax (Dao et al., arXiv 2205.14135) over tiles of KEYS keys for blocks of ROWS rows, in
    base 2. A block's weights stay in `work`, each tile relative to the maximum known at its time, until the block's
    normaliser is known; then one sweep over them draws.

    shape: (B, H, K, T, D). scale: of the scores. out: contiguous (B, H, T, D); lse: float32 (B, H, T).
    c: float32, inf keeps all. u: int32 (B, H, T) in [0, 2^23), see reference.row_uniforms.
    entry_key, entry_weight: int32 and float32 (B, H, T, slots): the kept entries of each row by ascending key, and
    their weights W; behind them -1 and 0. dropped: int64 (1,), entries beyond the slots.
    """
    B, H, K, T, D = shape
    width = padded(D)
    keys = T if draws else KEYS
    capacity = keys + TILE
    blocks = (T + ROWS - 1) // ROWS

    # the thread's work space; with a lane for each row of the block
    end = 0
    q_t, end = work[end : end + ROWS * D], end + ROWS * D  # (GROUPS, D, LANES): scaled queries, transposed
    out_t, end = work[end : end + ROWS * width], end + ROWS * width  # (GROUPS, width, LANES): unnormalised output
    p, end = work[end : end + ROWS * capacity], end + ROWS * capacity  # (GROUPS, capacity, LANES): scores, weights
    top, end = work[end : end + ROWS], end + ROWS  # running maximum of the scores, in base 2
    norm, end = work[end : end + ROWS], end + ROWS  # running sum of the weights
    drawn, end = work[end : end + ROWS], end + ROWS  # the draw's scratch
    tiles = (keys + KEYS - 1) // KEYS
    tile_top, end = work[end : end + ROWS * tiles], end + ROWS * tiles  # (tiles, ROWS): the maximum that a tile knew
    k_tile, end = work[end : end + KEYS * width], end + KEYS * width
    v_tile = work[end : end + KEYS * width]

    while True:
        task = fetch_add(counter, 1)
        if task >= B * H * blocks:
            return
        head, block = task // blocks, blocks - 1 - task % blocks  # the longest rows first: threads end together
        b, h = head // H, head % H
        kv = h // (H // K)
        first = block * ROWS
        rows = min(ROWS, T - first)
        stop = first + rows  # keys that the block sees

        q_t[:] = 0
        for r in range(rows):
            q_row = b * q_strides[0] + h * q_strides[1] + (first + r) * q_strides[2]
            group, lane = r // LANES, r % LANES
            for d in range(0, D, LANES):
                n = min(LANES, D - d)
                store(drawn, 0, load_first(q, q_row + d, n))
                for i in range(n):
                    q_t[(group * D + d + i) * LANES + lane] = drawn[i] * np.float32(scale * LOG2_E)
        top[:] = -INF
        norm[:] = 0
        out_t[:] = 0

        for start in range(0, stop, KEYS):
            n = min(KEYS, stop - start)
            n_tiled = (n + TILE - 1) // TILE * TILE
            at = start if draws else 0  # where the tile's weights lie in p
            pack(k, b * k_strides[0] + kv * k_strides[1] + start * k_strides[2], k_strides[2], n, D, k_tile, width)
            pack(v, b * v_strides[0] + kv * v_strides[1] + start * v_strides[2], v_strides[2], n, D, v_tile, width)
            for j in range(0, n_tiled, TILE):
                for group in range(GROUPS):
                    product(p, (group * capacity + at + j) * LANES, k_tile, j * width, width, 1,
                            q_t, group * D * LANES, D, False)  # fmt: skip
            for group in range(GROUPS):
                tile = (group * capacity + at) * LANES
                row = splat(np.int32(first + group * LANES)) + lanes()
                for j in range(max(0, first - start), n):  # keys on and beyond the diagonal
                    s = load(p, tile + j * LANES)
                    future = row < splat(np.int32(start + j))
                    store(p, tile + j * LANES, where(future, splat(-INF), s))
                this_top = tile_top[at // KEYS * ROWS :]
                softmax_tile(p, tile, n, top, norm, this_top, out_t, group, width)
            for d in range(0, width, TILE):
                for group in range(GROUPS):
                    product(out_t, (group * width + d) * LANES, v_tile, d, 1, width,
                            p, (group * capacity + at) * LANES, n, True)  # fmt: skip

        for r in range(rows):
            group, lane = r // LANES, r % LANES
            inverse = np.float32(1) / norm[r]
            out_row = (head * T + first + r) * D
            for d in range(0, D, LANES):
                n = min(LANES, D - d)
                for i in range(n):
                    drawn[i] = out_t[(group * width + d + i) * LANES + lane] * inverse
                store_first(out, out_row + d, load(drawn, 0), n)
            lse[head * T + first + r] = (top[r] + np.log2(norm[r])) * LN_2
        if draws:
            for group in range(GROUPS):
                draw(p, group * capacity * LANES, stop, top, norm, tile_top, group, drawn, head * T + first, rows,
                     c, u, slots, entry_key, entry_weight, dropped)  # fmt: skip


# The backward's work is its entries, and most of it is waiting for rows of K, V, Q and G from memory. So entries go through
# in two orders: by query row, where dQ is a sum in registers and each entry's M is found; then by bucket of
# BUCKET keys, where dK and dV lie in the first-level cache and rows of Q and G come in ascending order. Between the
# two stands a counting sort by bucket. Its regions, one for each (bucket, chunk of rows), depend on the shape only,
# and have one owner each: the result is the same for any number of threads.
#
# A call of these kernels does one round, a rectangle of the work: `round_` is (first_head, heads, first_chunk, chunks),
# key/value heads of the B * K, and of each the same chunks of CHUNK query rows of the G * chunks_of(T) that attend to
# it. What stands between the two passes is as large as a round, not as the whole.

BUCKET = 64  # keys
CHUNK = 256  # query rows of one task
AHEAD = 8  # records between a prefetch and its use
TERMS = 256  # of a key's sum, before it is added to the whole: a key that all rows attend to has very many


@register_jitable
def chunks_of(T):
    return (T + CHUNK - 1) // CHUNK


@register_jitable
def buckets_of(T):
    return (T + BUCKET - 1) // BUCKET


@register_jitable
def chunk_of(task, shape, round_):
    """(batch, key/value head, query head, first row, row after the last) of a round's task, a chunk of query rows."""
    B, H, K, T, D = shape
    head, chunk = round_[0] + task // round_[3], round_[2] + task % round_[3]
    b, kv = head // K, head % K
    first = chunk % chunks_of(T) * CHUNK
    return b, kv, kv * (H // K) + chunk // chunks_of(T), first, min(first + CHUNK, T)


@jit
def count_entries(entry_key, shape, slots, round_, counts, counter):
    """How many entries each region holds. counts: int64 (heads, chunks, buckets) of the round, zero before."""
    B, H, K, T, D = shape
    buckets = buckets_of(T)
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * round_[3]:
            return
        b, kv, h, first, stop = chunk_of(task, shape, round_)
        for i in range(first, stop):
            row = (b * H + h) * T + i
            for slot in range(row * slots, (row + 1) * slots):
                if entry_key[slot] < 0:
                    break
                counts[task * buckets + entry_key[slot] // BUCKET] += 1


@jit
def thin(keys, weights, w, slopes, squares, units, count, c_units, u):
    """The second draw: of a row's proposals it keeps each with the probability r of reference.thinning_units.

    w: W / q of the proposals, becomes W / (q r). squares: of their contributions. units: scratch. c_units: the row's
    c * UNIT. u: its uniform, int in [0, UNIT). What is kept moves to the front of all arrays; returns how many that is.
    """
    sums, shares = splat(np.float32(0)), splat(np.float32(0))
    for e in range(0, count, LANES):
        share = load_first(w, e, min(LANES, count - e))
        sums = fma(share, load_first(squares, e, min(LANES, count - e)), sums)
        shares = shares + share
    inverse_mean, unit = splat(total(shares) / total(sums)), splat(np.float32(UNIT))
    for e in range(0, count, LANES):
        n = min(LANES, count - e)
        share = load_first(w, e, n)
        factor = square_root(load_first(squares, e, n) * inverse_mean)
        aim = share * splat(c_units) * where(factor < splat(INF), factor, splat(np.float32(1)))
        # never 0: what was proposed may not become impossible; and all where aim is NaN
        aim = where(aim < unit, maximum(aim, splat(np.float32(1))), unit)
        r = ceil_to_ints(aim)
        store_first(units, e, r, n)
        store_first(w, e, share * (unit / to_floats(r)), n)
    left, running = 0, u
    for e in range(count):  # without a branch, which could not be foreseen
        running += units[e]
        keys[left], weights[left], w[left] = keys[e], weights[e], w[e]
        slopes[left], squares[left] = slopes[e], squares[e]
        left += running >> UNIT_BITS
        running &= UNIT - 1
    return left


def row_work(D, slots):
    """float32 elements of work space for one thread of `row_gradients`."""
    return padded(D) + 5 * slots


@jit
def row_gradients(
    grad_out, k, v, grad_strides, k_strides, v_strides, shape, scale, out, lse, drawn_c, c, row_weights, thin_state,
    entry_key, entry_weight, slots, round_, places, record_ints, record_floats, dq, kept, q_squares, k_squares, variance,
    counter, work, work_ints,
):  # fmt: skip
    """dQ of the round's rows, and a record of every entry for dK and dV, put into its region.

    For a kept entry, with w = W / q: dQ_i += M K_j, M = scale * w * (G_i . V_j - delta_i), delta_i = G_i . O_i.

    drawn_c: what the entries were drawn with. row_weights: float32 (B, H, T); the entries are thinned to c times that,
    or not if it is empty. thin_state: the hash state of seed and stream.
    places: int64 (heads, chunks, buckets) of the round, where the regions begin before, and where they end after.
    record_ints, record_floats: one buffer, (entries, 4): key, row, w, M. dq: contiguous.
    kept: int64 (1,), grows by the entries left after thinning. q_squares (B, H, T), k_squares (B, K, T): squared norms;
    needed to thin, and for variance, float64 (heads * chunks), or empty: the estimate of reference.backward, by task.
    """
    B, H, K, T, D = shape
    buckets = buckets_of(T)
    g_i, rest = work[: padded(D)], work[padded(D) :]
    weights, w, m, squares, k_square = rest[:slots], rest[slots:], rest[2 * slots :], rest[3 * slots :], rest[4 * slots :]
    keys, units = work_ints[:slots], work_ints[slots:]
    drawn_units = splat(np.float32(drawn_c * np.float32(UNIT)))
    thins, estimates = row_weights.size > 0, variance.size > 0
    weighs = thins or estimates
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * round_[3]:
            return
        b, kv, h, first, stop = chunk_of(task, shape, round_)
        k_head, v_head = b * k_strides[0] + kv * k_strides[1], b * v_strides[0] + kv * v_strides[1]
        task_kept, task_variance = 0, 0.0
        for i in range(first, stop):
            row = (b * H + h) * T + i
            g_row = b * grad_strides[0] + h * grad_strides[1] + i * grad_strides[2]
            products, squared = splat(np.float32(0)), splat(np.float32(0))
            for d in range(0, D, LANES):
                g_d = load_row(grad_out, g_row, d, D)
                store(g_i, d, g_d)
                products = fma(g_d, load_row(out, row * D, d, D), products)
                squared = fma(g_d, g_d, squared)
            delta = total(products)

            slot, count = row * slots, 0
            while count < slots:
                n = min(LANES, slots - count)
                key, weight = load_first(entry_key, slot + count, n), load_first(entry_weight, slot + count, n)
                store_first(keys, count, key, n)
                store_first(weights, count, weight, n)
                q = to_floats(inclusion_units(weight, drawn_units))
                store_first(w, count, weight * (splat(np.float32(UNIT)) / q), n)
                behind = bitmap(key < splat(np.int32(0)))
                count += n
                if behind:
                    count += lowest(behind) - n
                    break

            for e in range(count):
                # of the next row: it comes at the right time, and a wrong address does no harm
                later = entry_key[min(slot + slots + e, entry_key.size - 1)]
                for d in range(0, D, LANES):
                    prefetch(k, k_head + later * k_strides[2] + d)
                    prefetch(v, v_head + later * v_strides[2] + d)
                at = v_head + keys[e] * v_strides[2]
                products = splat(np.float32(0))
                for d in range(0, D, LANES):
                    products = fma(load(g_i, d), load_row(v, at, d, D), products)
                m[e] = np.float32(scale) * (total(products) - delta)
                if weighs:
                    k_square[e] = k_squares[(b * K + kv) * T + keys[e]]
            if weighs:
                g_square = splat(total(squared))
                for e in range(0, count, LANES):
                    n = min(LANES, count - e)
                    slope, norms = load_first(m, e, n), load_first(k_square, e, n) + splat(q_squares[row])
                    store_first(squares, e, fma(slope * slope, norms, g_square), n)
            if thins:
                state = hash_absorb(hash_absorb(hash_absorb(thin_state, b), h), i)
                row_c = np.float32(c * row_weights[row] * np.float32(UNIT))
                count = thin(keys, weights, w, m, squares, units, count, row_c, state >> (32 - UNIT_BITS))
            for e in range(count):
                m[e] *= w[e]
            defined = math.isfinite(delta) and math.isfinite(lse[row])
            for d in range(0, D, LANES):
                dq_d = splat(np.float32(0 if defined else np.nan))
                for e in range(count):
                    dq_d = fma(splat(m[e]), load_row(k, k_head + keys[e] * k_strides[2], d, D), dq_d)
                store_first(dq, row * D + d, dq_d, min(LANES, D - d))

            for e in range(count):
                j = keys[e]
                region = task * buckets + j // BUCKET
                place = places[region]
                places[region] = place + 1
                record_ints[4 * place] = j
                record_ints[4 * place + 1] = i
                record_floats[4 * place + 2] = w[e]
                record_floats[4 * place + 3] = m[e]
            task_kept += count
            if estimates:
                for e in range(count):
                    task_variance += w[e] * (w[e] - weights[e]) * squares[e]
        fetch_add(kept, task_kept)
        if estimates:
            variance[task] = task_variance


def key_work(D):
    """float32 elements of work space for one thread of `key_gradients`."""
    return 4 * BUCKET * padded(D)


@jit
def move_sums(terms, whole, start, D):
    """Add the D sums at `start` of terms to those of whole, and begin them anew."""
    for i in range(start, start + D, LANES):
        store(whole, i, load(whole, i) + load(terms, i))
        store(terms, i, splat(np.float32(0)))


@jit
def key_gradients(
    grad_out, q, grad_strides, q_strides, shape, round_, starts, ends, record_ints, record_floats, adds, dk, dv,
    counter, work,
):  # fmt: skip
    """dK_j = sum of M Q_i and dV_j = sum of w G_i over the round's records of key j.

    dk, dv: contiguous (heads of the round, T, D). adds: to what is in them. A row whose log-sum-exp isn't finite has no
    entries, and adds nothing.
    """
    B, H, K, T, D = shape
    chunks, buckets = round_[3], buckets_of(T)
    width = padded(D)
    size = BUCKET * width
    dk_terms, dv_terms = work[:size], work[size : 2 * size]
    dk_bucket, dv_bucket = work[2 * size : 3 * size], work[3 * size : 4 * size]
    count = np.zeros(BUCKET, np.int64)
    while True:
        task = fetch_add(counter, 1)
        if task >= round_[1] * buckets:
            return
        head, bucket = task // buckets, task % buckets
        first = bucket * BUCKET
        work[: 4 * size] = 0
        count[:] = 0
        for chunk in range(chunks):
            b, kv, h, _, _ = chunk_of(head * chunks + chunk, shape, round_)
            g_head = b * grad_strides[0] + h * grad_strides[1]
            q_head = b * q_strides[0] + h * q_strides[1]
            region = (head * chunks + chunk) * buckets + bucket
            for place in range(starts[region], ends[region]):
                later = record_ints[4 * (place + AHEAD) + 1]
                for d in range(0, D, LANES):
                    prefetch(grad_out, g_head + later * grad_strides[2] + d)
                    prefetch(q, q_head + later * q_strides[2] + d)
                i = record_ints[4 * place + 1]
                w, m = splat(record_floats[4 * place + 2]), splat(record_floats[4 * place + 3])
                g_row, q_row = g_head + i * grad_strides[2], q_head + i * q_strides[2]
                key = record_ints[4 * place] - first
                sums = key * width
                count[key] += 1
                if count[key] > TERMS:
                    count[key] = 1
                    move_sums(dk_terms, dk_bucket, sums, D)
                    move_sums(dv_terms, dv_bucket, sums, D)
                for d in range(0, D, LANES):
                    store(dk_terms, sums + d, fma(m, load_row(q, q_row, d, D), load(dk_terms, sums + d)))
                    store(dv_terms, sums + d, fma(w, load_row(grad_out, g_row, d, D), load(dv_terms, sums + d)))
        for j in range(min(BUCKET, T - first)):
            move_sums(dk_terms, dk_bucket, j * width, D)
            move_sums(dv_terms, dv_bucket, j * width, D)
            row = (head * T + first + j) * D
            for d in range(0, D, LANES):
                n, dk_j, dv_j = min(LANES, D - d), load(dk_bucket, j * width + d), load(dv_bucket, j * width + d)
                if adds:
                    dk_j, dv_j = dk_j + load_row(dk, row, d, D), dv_j + load_row(dv, row, d, D)
                store_first(dk, row + d, dk_j, n)
                store_first(dv, row + d, dv_j, n)
