"""Vector registers for numba: the few operations that the kernels are written in.

numba's own loops over arrays are not enough here: LLVM vectorises them only after run-time checks
for overlap, never a reduction in a fixed order, and nothing in numba can store past the caches.
So a value of type `Vector` is an LLVM vector; addresses are integers, indices count elements, and
the operations below take and return whole vectors. LLVM splits a vector where the machine's
registers are narrower, so the results are the same on every machine. No operation carries a
fast-math flag: a product is rounded before it is added.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import models, register_model

from mpisync.kernels.jit import intrinsic

AHEAD_BYTES = 1024  # how far before its use a gradient's line is asked for; see `_loader`
VECTOR_BYTES = 64  # of accumulated elements in a vector: a cache line, so that a store fills one

Builder: TypeAlias = ir.IRBuilder
Intrinsic = Callable[..., Any]  # one of the operations below, as an argument of a kernel
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


class Vector(types.Type):
    """A vector of `lanes` floats or integers, held in registers."""

    def __init__(self, element: Any, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(f"Vector({element}, {lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        element = manager.lookup(vector.element).get_value_type()
        super().__init__(manager, vector, ir.VectorType(element, vector.lanes))


def _integers(vector: Vector) -> Vector:
    return Vector(getattr(types, f"int{vector.element.bitwidth}"), vector.lanes)


def _fill(value: ir.Type, number: float) -> ir.Constant:
    return ir.Constant(value, [ir.Constant(value.element, number)] * value.count)


def _spread(builder: Builder, scalar: ir.Value, vector: ir.VectorType) -> ir.Value:
    """Return a vector whose lanes are all `scalar`."""
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, I32(0))
    return builder.shuffle_vector(first, first, _fill(ir.VectorType(I32, vector.count), 0))


def _pointer(builder: Builder, address: ir.Value, index: ir.Value, value: ir.Type) -> ir.Value:
    """Return where element `index` of the elements from `address` on is."""
    offset = builder.mul(index, I64(_bytes(value.element)))
    return builder.inttoptr(builder.add(address, offset), value.as_pointer())


def _bytes(element: ir.Type) -> int:
    if isinstance(element, ir.IntType):
        return int(element.width) // 8
    return 8 if isinstance(element, ir.DoubleType) else 4


def _read(builder: Builder, args: Sequence[ir.Value], value: ir.VectorType) -> ir.Value:
    address, index = args
    loaded = builder.load(_pointer(builder, address, index, value))
    loaded.align = _bytes(value.element)
    return loaded


# -- loading: the storage's elements, widened to the accumulator's ---------------------------------


def _as_is(builder: Builder, stored: ir.Value, wide: ir.VectorType) -> ir.Value:
    return stored


def _from_bfloat16(builder: Builder, stored: ir.Value, wide: ir.VectorType) -> ir.Value:
    """A bfloat16 is the upper half of a float32."""
    stored = builder.zext(stored, ir.VectorType(I32, wide.count))
    bits = builder.shl(stored, _fill(stored.type, 16))
    return builder.bitcast(bits, wide)


def _from_float16(builder: Builder, stored: ir.Value, wide: ir.VectorType) -> ir.Value:
    """Widen exactly by integers, since not every CPU converts float16.

    Normal numbers: shift, and move the exponent's bias from 15 to 127. Inf and NaN: move it as far
    again, to all ones. Subnormals m * 2**-24: put m below a leading one and subtract that one; all
    three of these float32 are normal, so the result does not depend on the flush-to-zero mode.
    """
    stored = builder.zext(stored, ir.VectorType(I32, wide.count))

    def constant(number: int) -> ir.Constant:
        return _fill(stored.type, number)

    rebias = constant((127 - 15) << 23)
    magnitude = builder.and_(stored, constant(0x7FFF))
    normal = builder.add(builder.shl(magnitude, constant(13)), rebias)
    special = builder.icmp_unsigned(">=", magnitude, constant(0x7C00))
    normal = builder.select(special, builder.add(normal, rebias), normal)
    with_one = builder.add(normal, constant(1 << 23))
    one = builder.bitcast(constant((127 - 14) << 23), wide)
    small = builder.bitcast(builder.fsub(builder.bitcast(with_one, wide), one), stored.type)
    subnormal = builder.icmp_unsigned("<", magnitude, constant(0x0400))
    bits = builder.select(subnormal, small, normal)
    sign = builder.shl(builder.and_(stored, constant(0x8000)), constant(16))
    return builder.bitcast(builder.or_(bits, sign), wide)


def _prefetch(builder: Builder, args: Sequence[ir.Value], value: ir.VectorType) -> None:
    address, index = args
    begin = builder.add(address, builder.mul(index, I64(_bytes(value.element))))
    pointer = builder.inttoptr(builder.add(begin, I64(AHEAD_BYTES)), I8.as_pointer())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [pointer, I32(0), I32(3), I32(1)])  # to read, keep in all caches, data


def _loader(
    element: Any,
    lanes: int,
    storage: ir.Type,
    widen: Callable[[Builder, ir.Value, ir.VectorType], ir.Value],
    *,
    ahead: bool = False,
) -> Any:
    """Make load(address, index): `lanes` stored elements from `index` on, widened to `element`.

    With `ahead` it asks for a line farther on at the same time: processors do not look beyond a page by themselves,
    and several streams from pages of 4 kB come a tenth faster with it. Behind an array's end that does nothing.
    """

    @intrinsic
    def load(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
            wide = context.get_value_type(signature.return_type)
            stored = _read(builder, args, ir.VectorType(storage, lanes))
            if ahead:
                _prefetch(builder, args, stored.type)
            return widen(builder, stored, wide)

        return Vector(element, lanes)(types.int64, types.int64), generate

    return load


load_float64 = _loader(types.float64, 8, ir.DoubleType(), _as_is)
load_float32 = _loader(types.float32, 16, ir.FloatType(), _as_is)
load_float16 = _loader(types.float32, 16, I16, _from_float16)
load_bfloat16 = _loader(types.float32, 16, I16, _from_bfloat16)
# For gradients, which come from memory:
fetch_float64 = _loader(types.float64, 8, ir.DoubleType(), _as_is, ahead=True)
fetch_float32 = _loader(types.float32, 16, ir.FloatType(), _as_is, ahead=True)
fetch_float16 = _loader(types.float32, 16, I16, _from_float16, ahead=True)
fetch_bfloat16 = _loader(types.float32, 16, I16, _from_bfloat16, ahead=True)
# For the elements before and after the whole vectors:
load_one_float64 = _loader(types.float64, 1, ir.DoubleType(), _as_is)
load_one_float32 = _loader(types.float32, 1, ir.FloatType(), _as_is)
load_one_float16 = _loader(types.float32, 1, I16, _from_float16)
load_one_bfloat16 = _loader(types.float32, 1, I16, _from_bfloat16)
# To copy what is not computed with:
load_bits16 = _loader(types.int16, 32, I16, _as_is)
load_one_bits16 = _loader(types.int16, 1, I16, _as_is)
load_bytes = _loader(types.int8, 64, I8, _as_is)
load_one_byte = _loader(types.int8, 1, I8, _as_is)


# -- storing ---------------------------------------------------------------------------------------


def _storer(past_caches: bool) -> Any:
    """Make a function (address, index, vector) that stores a vector at element `index`."""

    @intrinsic
    def put(typing_context: Any, address: Any, index: Any, vector: Vector) -> Any:
        def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
            address, index, value = args
            stored = builder.store(value, _pointer(builder, address, index, value.type))
            stored.align = _bytes(value.type.element)
            if past_caches:
                stored.align = VECTOR_BYTES
                flag = builder.module.add_metadata([I32(1)])
                stored.set_metadata("nontemporal", flag)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, vector), generate

    return put


store = _storer(past_caches=False)
# Past the caches, to an address aligned to VECTOR_BYTES: memory is not read before it is written,
# and what is in the caches stays. On x86 such stores are not ordered before a later release, so
# whoever publishes them needs `atomics.fence()` first.
stream = _storer(past_caches=True)


@intrinsic
def drop(typing_context: Any, address: Any, index: Any, vector: Vector) -> Any:
    """Store nothing: for a kernel that only looks."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, vector), generate


# -- arithmetic ------------------------------------------------------------------------------------


@intrinsic
def add_scaled(typing_context: Any, total: Vector, weight: Any, vector: Vector) -> Any:
    """Return total + weight * vector, the product rounded before it is added."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        total, weight, vector = args
        return builder.fadd(total, builder.fmul(_spread(builder, weight, vector.type), vector))

    return total(total, total.element, total), generate


@intrinsic
def subtract_product(typing_context: Any, vector: Vector, rate: Any, other: Vector) -> Any:
    """Return vector - rate * other, rounded once, as torch's `add_(other, alpha=-rate)` does where it has FMA."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        vector, rate, other = args
        kind = vector.type
        name = f"llvm.fma.v{kind.count}f{8 * _bytes(kind.element)}"
        fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(fma, [other, _spread(builder, builder.fneg(rate), kind), vector])

    return vector(vector, vector.element, vector), generate


@intrinsic
def divide(typing_context: Any, vector: Vector, divisor: Any) -> Any:
    """Return vector / divisor, a true division."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        vector, divisor = args
        return builder.fdiv(vector, _spread(builder, divisor, vector.type))

    return vector(vector, vector.element), generate


@intrinsic
def larger_magnitude(typing_context: Any, peak: Vector, vector: Vector) -> Any:
    """Lane by lane the larger of `peak` and the bits of |vector|, as integers.

    They are ordered as the magnitudes are, with inf above every number and NaN above inf; and
    unlike a float's maximum an integer's drops no NaN.
    """

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        peak, vector = args
        width = peak.type.element.width
        bits = builder.bitcast(vector, peak.type)
        bits = builder.and_(bits, _fill(peak.type, (1 << (width - 1)) - 1))
        return builder.select(builder.icmp_signed(">", bits, peak), bits, peak)

    return peak(_integers(vector), vector), generate


@intrinsic
def highest(typing_context: Any, peak: Vector) -> Any:
    """Return the largest lane."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        lanes = [builder.extract_element(args[0], I32(lane)) for lane in range(peak.lanes)]
        top = lanes[0]
        for lane in lanes[1:]:
            top = builder.select(builder.icmp_signed(">", lane, top), lane, top)
        return builder.sext(top, I64) if top.type.width < 64 else top

    return types.int64(peak), generate


@intrinsic
def no_magnitude(typing_context: Any, like: Vector) -> Any:
    """Zeros for `larger_magnitude` to begin with, for vectors like `like`."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        return ir.Constant(context.get_value_type(signature.return_type), None)

    return _integers(like)(like), generate


@intrinsic
def squares(typing_context: Any, vector: Vector) -> Any:
    """Return vector * vector in float64, in which a float32's square is exact."""
    wide = Vector(types.float64, vector.lanes)

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        value, target = args[0], context.get_value_type(wide)
        if value.type != target:
            value = builder.fpext(value, target)
        return builder.fmul(value, value)

    return wide(vector), generate


@intrinsic
def add(typing_context: Any, first: Vector, second: Vector) -> Any:
    """Return first + second."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        return builder.fadd(*args)

    return first(first, first), generate


@intrinsic
def add_lanes(typing_context: Any, vector: Vector) -> Any:
    """Return the sum of the lanes, from the first to the last."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> ir.Value:
        total = builder.extract_element(args[0], I32(0))
        for lane in range(1, vector.lanes):
            total = builder.fadd(total, builder.extract_element(args[0], I32(lane)))
        return total

    return vector.element(vector), generate
