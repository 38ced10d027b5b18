"""The executor of PTX in tests/ptx: programs written by hand give what a GPU gives, and wrong ones are caught."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

HERE = Path(__file__).parent
if not (HERE / "ptx").exists():
    pytest.skip("needs a checkout", allow_module_level=True)
sys.path.append(str(HERE / "ptx"))

import executor  # noqa: E402
from executor import KernelError  # noqa: E402

SEEDS = range(6)


@pytest.fixture(scope="module", autouse=True)
def library() -> executor.Library:
    try:
        return executor.library()
    except executor.UnavailableError as reason:
        pytest.skip(str(reason))


REGISTERS = {"pred": "p", "b16": "h", "b32": "r", "f32": "f", "b64": "d", "f64": "e", "b128": "q"}
HEAD = """
.version 8.7
.target sm_90
.address_size 64
"""


def program(body: str, *, parameters: str = "", outside: str = "") -> str:
    """A kernel of the name `kernel` with 16 registers of each type: %p0, %h0, %r0, %f0, %d0, %e0, %q0."""
    registers = "\n".join(f".reg .{kind} %{letter}<16>;" for kind, letter in REGISTERS.items())
    return f"{HEAD}{outside}\n.visible .entry kernel({parameters})\n{{\n{registers}\n{body}\nret;\n}}\n"


def run(
    body: str, *tensors: Tensor, grid: int = 1, block: int = 32, seed: int = 1, outside: str = "", shared: int = 0
) -> None:
    """Run a kernel that finds the tensors' addresses in %d0, %d1, … and the thread's number, of all, in %r0."""
    parameters = ", ".join(f".param .u64 t{k}" for k in range(len(tensors)))
    start = "".join(f"ld.param.u64 %d{k}, [t{k}];\ncvta.to.global.u64 %d{k}, %d{k};\n" for k in range(len(tensors)))
    start += "mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %ntid.x;\nmov.u32 %r2, %tid.x;\nmad.lo.s32 %r0, %r0, %r1, %r2;\n"
    library = executor.library()
    library.seed(seed)
    module = library.load(program(start + body, parameters=parameters, outside=outside))
    library.launch(module, "kernel", (grid,), (block,), tensors, shared=shared)


def at(register: str, base: str, bytes_: int, index: str = "%r0") -> str:
    """Code that leaves the address of an element."""
    return f"mad.wide.u32 {register}, {index}, {bytes_}, {base};\n"


LETTERS = {1: "h", 2: "h", 4: "r", 8: "d", 16: "q"}
FLOATING = {torch.float32: "f", torch.float64: "e"}


def elementwise(instructions: str, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    """Run instructions on elements of the inputs, which they find in {a}, {b}, {c}, … and whose result is {o}."""
    names, body = {}, ""
    count = inputs[0].numel()
    out = torch.zeros(count, dtype=dtype)
    for k, tensor in enumerate([*inputs, out]):
        letter = FLOATING.get(tensor.dtype, LETTERS[tensor.element_size()])
        names["abcd"[k] if k < len(inputs) else "o"] = f"%{letter}{4 + k if letter != 'd' else 8 + k}"
    for k, (tensor, name) in enumerate(zip(inputs, names.values(), strict=False)):
        body += at("%d7", f"%d{k}", tensor.element_size()) + f"ld.global.b{8 * tensor.element_size()} {name}, [%d7];\n"
    body += instructions.format(**names) + "\n"
    body += at("%d7", f"%d{len(inputs)}", out.element_size())
    body += f"st.global.b{8 * out.element_size()} [%d7], {names['o']};"
    block = next(b for b in (32, 20, 5, 1) if count % b == 0)
    run(body, *(tensor.contiguous() for tensor in inputs), out, grid=count // block, block=block)
    return out


# --- floating point ---------------------------------------------------------------------------------------------


def numbers(dtype: torch.dtype = torch.float32, count: int = 1600) -> Tensor:
    """Of all sizes, both signs, and those that are special."""
    sizes = torch.randn(count, dtype=torch.float64) * torch.exp2(torch.randint(-30, 30, (count,)).double())
    special = [
        0.0,
        -0.0,
        math.inf,
        -math.inf,
        math.nan,
        1.0,
        -1.0,
        0.5,
        2.5,
        -3.5,
        1e-40,
        -1e-40,
        65504.0,
        65519.0,
        65520.0,
    ]
    sizes[: len(special)] = torch.tensor(special, dtype=torch.float64)
    return sizes.to(dtype)


def directed(exact: Fraction, dtype: type, rounding: str) -> float:
    """A fraction rounded as a mode says, by the neighbours of what is nearest."""
    nearest = dtype(float(exact)) if dtype is np.float32 else dtype(exact.numerator / exact.denominator)
    towards = {"rz": 0.0, "rm": -math.inf, "rp": math.inf}[rounding]
    below = Fraction(float(nearest)) < exact
    if Fraction(float(nearest)) == exact:
        return float(nearest)
    goes_up = rounding == "rp" or (rounding == "rz" and exact < 0)
    if below == goes_up:
        return float(np.nextafter(nearest, dtype(math.inf if goes_up else -math.inf)))
    assert towards is not None
    return float(nearest)


ARITHMETIC: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: a * b + c,
}


@pytest.mark.parametrize("rounding", ["rz", "rm", "rp"])
@pytest.mark.parametrize("operation", ARITHMETIC)
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "f32"), (torch.float64, "f64")], ids=["f32", "f64"])
def test_directed_rounding(dtype: torch.dtype, name: str, operation: str, rounding: str) -> None:
    count = 3 if operation == "fma" else 2
    inputs = [torch.randn(160, dtype=torch.float64).to(dtype) for _ in range(count)]
    operands = ", ".join(["{a}", "{b}", "{c}"][:count])
    found = elementwise(f"{operation}.{rounding}.{name} {{o}}, {operands};", dtype, *inputs)
    number = np.float32 if dtype == torch.float32 else np.float64
    for k, value in enumerate(found.tolist()):
        exact = ARITHMETIC[operation](*(Fraction(tensor[k].item()) for tensor in inputs))
        assert value == directed(exact, number, rounding), (k, exact)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    numbers_ = ~expected.isnan()
    assert torch.equal(found[numbers_].signbit(), expected[numbers_].signbit())


@pytest.mark.parametrize("name", ["f32", "f64"])
def test_nearest_rounding(name: str) -> None:
    dtype = {"f32": torch.float32, "f64": torch.float64}[name]
    a, b = numbers(dtype), numbers(dtype).flip(0)
    same(elementwise(f"add.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), a + b)
    same(elementwise(f"sub.rn.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), a - b)
    same(elementwise(f"mul.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), a * b)
    same(elementwise(f"div.rn.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), a / b)
    # numpy rounds roots correctly, PyTorch does not.
    same(elementwise(f"sqrt.rn.{name} {{o}}, {{a}};", dtype, a.abs()), torch.from_numpy(np.sqrt(a.abs().numpy())))
    same(elementwise(f"rcp.rn.{name} {{o}}, {{a}};", dtype, a), 1 / a)
    same(elementwise(f"min.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), torch.fmin(a, b))
    same(elementwise(f"abs.{name} {{o}}, {{a}};", dtype, a), a.abs())
    same(elementwise(f"copysign.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), torch.copysign(b, a))


def test_flushing_saturating_and_extremes() -> None:
    a, b = numbers(), numbers().flip(0)
    small = torch.tensor([1e-39, -1e-39, 2e-38, 1.5e-38, 0.0]).repeat(32)
    flushed = torch.where(small.abs() < 2**-126, torch.copysign(torch.zeros(()), small), small)
    same(elementwise("mul.ftz.f32 {o}, {a}, 0f3F800000;", torch.float32, small), flushed)
    same(elementwise("mul.ftz.f32 {o}, {a}, 0f3F000000;", torch.float32, small.abs()), torch.zeros(()).expand(160))
    same(elementwise("add.sat.f32 {o}, {a}, {b};", torch.float32, a, b), (a + b).clamp(0, 1).nan_to_num(0.0))
    same(elementwise("max.NaN.f32 {o}, {a}, {b};", torch.float32, a, b), torch.maximum(a, b))
    same(elementwise("min.NaN.f32 {o}, {a}, {b};", torch.float32, a, b), torch.minimum(a, b))
    zeros = torch.tensor([0.0, -0.0]).repeat(16)
    same(elementwise("max.f32 {o}, {a}, {b};", torch.float32, zeros, -zeros), torch.zeros(32))
    same(elementwise("min.f32 {o}, {a}, {b};", torch.float32, zeros, -zeros), -torch.zeros(32))


def narrowed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Doubles rounded once: PyTorch would go by way of float32. What that cuts off sets its last bit here."""
    single = values.float()
    inexact = single.isfinite() & (single.double() != values)
    below = torch.where(single.double().abs() > values.abs(), single.nextafter(torch.zeros(())), single)
    odd = (below.view(torch.int32) | 1).view(torch.float32)
    return torch.where(inexact, odd, single).to(dtype)


HALVES = [(torch.float16, "f16"), (torch.bfloat16, "bf16")]


@pytest.mark.parametrize(("dtype", "name"), HALVES, ids=["f16", "bf16"])
def test_half_precision(dtype: torch.dtype, name: str) -> None:
    a, b, c = numbers(dtype), numbers(dtype).flip(0), numbers(dtype).roll(7)
    exact = narrowed(a.double() * b.double() + c.double(), dtype)
    same(elementwise(f"fma.rn.{name} {{o}}, {{a}}, {{b}}, {{c}};", dtype, a, b, c), exact)
    same(elementwise(f"add.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), a + b)
    same(elementwise(f"mul.{name} {{o}}, {{a}}, {{b}};", dtype, a, b), a * b)
    found = elementwise(f"max.NaN.{name} {{o}}, {{a}}, {{b}};", dtype, a, b)
    torch.testing.assert_close(found, torch.maximum(a, b), rtol=0, atol=0, equal_nan=True)
    pairs = [tensor.view(torch.int32) for tensor in (a, b, c)]
    found = elementwise(f"fma.rn.{name}x2 {{o}}, {{a}}, {{b}}, {{c}};", torch.int32, *pairs)
    same(found.view(dtype), exact)
    same(elementwise(f"neg.{name}x2 {{o}}, {{a}};", torch.int32, pairs[0]).view(dtype), -a)
    found = elementwise(f"add.{name}x2 {{o}}, {{a}}, {{b}};", torch.int32, *pairs[:2])
    same(found.view(dtype), a + b)
    for comparison, holds in (("lt", a < b), ("neu", a != b)):
        code = f"setp.{comparison}.{name}x2 %p1|%p2, {{a}}, {{b}}; selp.b32 %r13, 1, 0, %p1;"
        code += "selp.b32 %r14, 65536, 0, %p2; or.b32 {o}, %r13, %r14;"
        found = elementwise(code, torch.int32, *pairs[:2])
        assert torch.equal(found.view(torch.int16) != 0, holds)


@pytest.mark.parametrize(("dtype", "name"), HALVES, ids=["f16", "bf16"])
def test_conversions_of_half_precision(dtype: torch.dtype, name: str) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    same(elementwise(f"cvt.f32.{name} {{o}}, {{a}};", torch.float32, every), every.float())
    finite = every[every.isfinite()].double().sort().values
    ties = ((finite[1:] + finite[:-1]) / 2).float()
    given = torch.cat(
        [ties, ties.nextafter(torch.tensor(math.inf)), ties.nextafter(torch.tensor(-math.inf)), numbers()]
    )
    given = given[: len(given) // 32 * 32]
    same(elementwise(f"cvt.rn.{name}.f32 {{o}}, {{a}};", dtype, given), given.to(dtype))
    pairs = elementwise(f"cvt.rn.{name}x2.f32 {{o}}, {{b}}, {{a}};", torch.int32, given[::2], given[1::2])
    same(pairs.view(dtype), given.to(dtype))
    # Towards zero: of the same sign, no larger, and the next one is.
    cut = elementwise(f"cvt.rz.{name}.f32 {{o}}, {{a}};", dtype, given[given.isfinite()][:60000]).double()
    wanted = given[given.isfinite()][:60000].double()
    assert (cut.abs() <= wanted.abs()).all()
    up = elementwise(f"cvt.rp.{name}.f32 {{o}}, {{a}};", dtype, wanted.float()).double()
    down = elementwise(f"cvt.rm.{name}.f32 {{o}}, {{a}};", dtype, wanted.float()).double()
    assert (down <= wanted).all()
    assert (wanted <= up).all()
    assert ((up == down) == (wanted == wanted.to(dtype).double())).all()


def test_conversions_of_integers() -> None:
    a = torch.cat([numbers(torch.float64), torch.tensor([2.0**31, -(2.0**31), 2.0**32, 2.0**63, -(2.0**63), 1e300])])
    a = torch.cat([a, torch.zeros(26, dtype=torch.float64)])
    clean = a.nan_to_num(nan=0.0, posinf=1e308, neginf=-1e308)
    rounds = {"rni": torch.round, "rzi": torch.trunc, "rmi": torch.floor, "rpi": torch.ceil}
    for mode, function in rounds.items():
        # In double: integers of 32 bits are exact there.
        expected = function(clean).clamp(-(2.0**31), 2.0**31 - 1).to(torch.int64)
        expected[a.isnan()] = -(2**31)
        assert torch.equal(elementwise(f"cvt.{mode}.s32.f64 {{o}}, {{a}};", torch.int32, a).long(), expected)
        single = a.float()
        expected = function(single.double().nan_to_num(0.0, 1e308, -1e308)).clamp(0, 2.0**32 - 1).to(torch.int64)
        found = elementwise(f"cvt.{mode}.u32.f32 {{o}}, {{a}};", torch.int32, single).long() & 0xFFFFFFFF
        assert torch.equal(found, expected)
        same(elementwise(f"cvt.{mode}.f32.f32 {{o}}, {{a}};", torch.float32, single), function(single))
    integers = torch.randint(-(2**62), 2**62, (1600,)) >> torch.randint(0, 62, (1600,))
    same(elementwise("cvt.rn.f32.s64 {o}, {a};", torch.float32, integers), integers.float())
    same(elementwise("cvt.rn.f64.s64 {o}, {a};", torch.float64, integers), integers.double())
    lower = elementwise("cvt.rm.f32.s64 {o}, {a};", torch.float32, integers)
    upper = elementwise("cvt.rp.f32.s64 {o}, {a};", torch.float32, integers)
    for value, low, high in zip(integers.tolist(), lower.tolist(), upper.tolist(), strict=True):
        assert int(low) <= value <= int(high)
        assert (low == high) == (int(np.float32(value)) == value)
    words = torch.randint(-(2**31), 2**31, (320,)).int()
    assert torch.equal(elementwise("cvt.s64.s32 {o}, {a};", torch.int64, words), words.long())
    assert torch.equal(elementwise("cvt.u64.u32 {o}, {a};", torch.int64, words), words.long() & 0xFFFFFFFF)
    assert torch.equal(elementwise("cvt.s32.s8 {o}, {a};", torch.int32, words), words.to(torch.int8).int())
    assert torch.equal(elementwise("cvt.sat.u8.s32 {o}, {a};", torch.int32, words), words.clamp(0, 255))


FUNCTIONS = {
    "ex2.approx.f32": torch.exp2,
    "lg2.approx.f32": torch.log2,
    "sin.approx.f32": torch.sin,
    "cos.approx.f32": torch.cos,
    "tanh.approx.f32": torch.tanh,
    "sqrt.approx.f32": torch.sqrt,
    "rsqrt.approx.f32": torch.rsqrt,
    "rcp.approx.f32": torch.reciprocal,
}

GRAINS = {"lg2.approx.f32": 2.0**-23, "sin.approx.f32": 2.0**-22, "cos.approx.f32": 2.0**-22}
"""What their errors are multiples of where results are below 1."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_approximate_functions(name: str) -> None:
    a = torch.cat(
        [torch.randn(150) * 3, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 2.0, -1.0, 1e-30, 60.0])]
    )
    exact = FUNCTIONS[name](a.double()).float()
    found = elementwise(f"{name} {{o}}, {{a}};", torch.float32, a)
    torch.testing.assert_close(found, exact, rtol=1.2e-7, atol=0, equal_nan=True)
    executor.library().approximate(2)
    try:
        off = elementwise(f"{name} {{o}}, {{a}};", torch.float32, a)
        again = elementwise(f"{name} {{o}}, {{a}};", torch.float32, a)
    finally:
        executor.library().approximate(0)
    assert torch.equal(off.nan_to_num(), again.nan_to_num())
    finite = exact.isfinite() & (exact != 0)
    ulps = (off.view(torch.int32) - exact.view(torch.int32))[finite].abs()
    grain = GRAINS.get(name, 0.0)
    is_fine = exact[finite].abs() >= (1 if grain else 0)
    if is_fine.any():
        assert 1 <= ulps[is_fine].max() <= 3
    errors = (off - exact)[finite][~is_fine].abs()
    assert not grain or grain < errors.max() <= 2.01 * grain
    torch.testing.assert_close(off[~finite], exact[~finite], rtol=0, atol=0, equal_nan=True)


# --- integers ---------------------------------------------------------------------------------------------------


def words(count: int = 320) -> Tensor:
    special = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 31, 32, 33])
    return torch.cat([special, torch.randint(-(2**31), 2**31, (count - 8,))]).int()


def unsigned(tensor: Tensor, bits: int = 32) -> list[int]:
    return [value & (1 << bits) - 1 for value in tensor.tolist()]


def signed(value: int, bits: int = 32) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


INTEGERS: dict[str, Callable[..., int]] = {
    "add.s32": lambda a, b, c: a + b,
    "sub.u32": lambda a, b, c: a - b,
    "mul.lo.s32": lambda a, b, c: a * b,
    "mul.hi.u32": lambda a, b, c: a * b >> 32,
    "mul.hi.s32": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mul24.lo.u32": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul24.hi.s32": lambda a, b, c: signed(a, 24) * signed(b, 24) >> 16,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.hi.s32": lambda a, b, c: (signed(a) * signed(b) >> 32) + c,
    "min.s32": lambda a, b, c: min(signed(a), signed(b)),
    "max.u32": lambda a, b, c: max(a, b),
    "sad.u32": lambda a, b, c: abs(a - b) + c,
    "add.sat.s32": lambda a, b, c: min(max(signed(a) + signed(b), -(2**31)), 2**31 - 1),
    "div.u32": lambda a, b, c: a // b if b else -1,
    "rem.u32": lambda a, b, c: a % b if b else a,
    "div.s32": lambda a, b, c: int(Fraction(signed(a), signed(b))) if b else -1,
    "rem.s32": lambda a, b, c: signed(a) - signed(b) * int(Fraction(signed(a), signed(b))) if b else a,
    "and.b32": lambda a, b, c: a & b,
    "xor.b32": lambda a, b, c: a ^ b,
    "shl.b32": lambda a, b, c: a << b if b < 32 else 0,
    "shr.u32": lambda a, b, c: a >> b if b < 32 else 0,
    "shr.s32": lambda a, b, c: signed(a) >> min(b, 31),
    "shf.l.wrap.b32": lambda a, b, c: ((b << 32 | a) << (c & 31)) >> 32,
    "shf.r.clamp.b32": lambda a, b, c: (b << 32 | a) >> min(c, 32),
    "bfe.u32": lambda a, b, c: a >> (b & 255) & ((1 << (c & 255)) - 1),
    "prmt.b32": lambda a, b, c: sum(permuted(b << 32 | a, c >> 4 * k & 15) << 8 * k for k in range(4)),
    "dp4a.u32.s32": lambda a, b, c: c + sum((a >> 8 * k & 255) * signed(b >> 8 * k, 8) for k in range(4)),
}


def permuted(both: int, selector: int) -> int:
    byte = both >> 8 * (selector & 7) & 255
    return (255 if byte >> 7 else 0) if selector & 8 else byte


@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str) -> None:
    a, b, c = words(), words().roll(3), words().roll(5)
    function = INTEGERS[name]
    takes = 3 if name.split(".")[0] in ("mad", "sad", "shf", "bfe", "prmt", "dp4a") else 2
    operands = ", ".join(["{a}", "{b}", "{c}"][:takes])
    found = elementwise(f"{name} {{o}}, {operands};", torch.int32, a, b, c)
    expected = [function(*given) & 0xFFFFFFFF for given in zip(unsigned(a), unsigned(b), unsigned(c), strict=True)]
    assert unsigned(found) == expected


def test_bits() -> None:
    a, b, c = words(), words().roll(1), words().roll(2)
    one = {
        "popc.b32": lambda x: bin(x).count("1"),
        "clz.b32": lambda x: 32 - x.bit_length(),
        "brev.b32": lambda x: int(f"{x:032b}"[::-1], 2),
        "bfind.u32": lambda x: (x.bit_length() - 1) & 0xFFFFFFFF,
        "not.b32": lambda x: ~x & 0xFFFFFFFF,
    }
    for name, function in one.items():
        assert unsigned(elementwise(f"{name} {{o}}, {{a}};", torch.int32, a)) == [function(x) for x in unsigned(a)]
    for table in (0x80, 0xE8, 0x96, 0x1B):
        found = elementwise(f"lop3.b32 {{o}}, {{a}}, {{b}}, {{c}}, {table};", torch.int32, a, b, c)
        expected = [
            sum((table >> (x >> k & 1) * 4 + (y >> k & 1) * 2 + (z >> k & 1) & 1) << k for k in range(32))
            for x, y, z in zip(unsigned(a), unsigned(b), unsigned(c), strict=True)
        ]
        assert unsigned(found) == expected
    found = elementwise("bfi.b32 {o}, {a}, {b}, 5, 11;", torch.int32, a, b)
    expected = [y & ~(2047 << 5) | (x & 2047) << 5 for x, y in zip(unsigned(a), unsigned(b), strict=True)]
    assert unsigned(found) == expected
    wide = torch.randint(-(2**63), 2**63 - 1, (320,))
    other = wide.roll(1)
    found = elementwise("mul.hi.u64 {o}, {a}, {b};", torch.int64, wide, other)
    expected = [x * y >> 64 for x, y in zip(unsigned(wide, 64), unsigned(other, 64), strict=True)]
    assert unsigned(found, 64) == expected
    # 128 bits by carries: the high words' sum.
    code = "add.cc.u64 %d12, {a}, {b}; addc.u64 {o}, {a}, 0;"
    found = elementwise(code, torch.int64, wide, other)
    expected = [
        (x + (x + y >> 64)) & (1 << 64) - 1 for x, y in zip(unsigned(wide, 64), unsigned(other, 64), strict=True)
    ]
    assert unsigned(found, 64) == expected


# --- lanes, warps, blocks ---------------------------------------------------------------------------------------


def store(register: str, base: str = "%d0", index: str = "%r0") -> str:
    return at("%d7", base, 4, index) + f"st.global.b32 [%d7], {register};\n"


def test_lanes_that_part_meet_again() -> None:
    # Collatz's steps of 1 + the thread's number: every lane leaves the loop at its own time. Then all take a vote.
    code = """
    add.s32 %r3, %r0, 1;
    mov.u32 %r4, 0;
  again:
    setp.eq.s32 %p0, %r3, 1;
    @%p0 bra done;
    and.b32 %r5, %r3, 1;
    setp.eq.s32 %p1, %r5, 0;
    @!%p1 bra odd;
    shr.u32 %r3, %r3, 1;
    bra.uni next;
  odd:
    mad.lo.s32 %r3, %r3, 3, 1;
  next:
    add.s32 %r4, %r4, 1;
    bra again;
  done:
    setp.gt.s32 %p2, %r4, 10;
    vote.sync.ballot.b32 %r6, %p2, 0xffffffff;
    activemask.b32 %r8;
    """ + store("%r4") + store("%r6", "%d1") + store("%r8", "%d2")  # fmt: skip

    def steps(value: int) -> int:
        count = 0
        while value != 1:
            value, count = (value // 2, count + 1) if value % 2 == 0 else (3 * value + 1, count + 1)
        return count

    out, votes, active = (torch.zeros(64, dtype=torch.int32) for _ in range(3))
    run(code, out, votes, active, block=64)
    expected = [steps(1 + k) for k in range(64)]
    assert out.tolist() == expected
    ballots = [sum((expected[32 * w + lane] > 10) << lane for lane in range(32)) for w in range(2)]
    assert unsigned(votes) == [ballots[k // 32] for k in range(64)]
    assert unsigned(active) == [0xFFFFFFFF] * 64


SCAN = """
    mov.u32 %r3, buffer;
    shl.b32 %r4, %r2, 2;
    add.s32 %r5, %r3, %r4;
    add.s32 %r6, %r0, 1;
    st.shared.u32 [%r5], %r6;
    mov.u32 %r7, 1;
  step:
    bar.sync 0;
    setp.lt.u32 %p0, %r2, %r7;
    mov.u32 %r8, 0;
    @%p0 bra none;
    sub.s32 %r9, %r2, %r7;
    shl.b32 %r9, %r9, 2;
    add.s32 %r9, %r9, %r3;
    ld.shared.u32 %r8, [%r9];
  none:
    BARRIER
    ld.shared.u32 %r10, [%r5];
    add.s32 %r10, %r10, %r8;
    st.shared.u32 [%r5], %r10;
    shl.b32 %r7, %r7, 1;
    setp.lt.u32 %p1, %r7, 128;
    @%p1 bra step;
    ld.shared.u32 %r10, [%r5];
"""
BUFFER = ".shared .align 4 .b8 buffer[512];"


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers_in_a_loop(seed: int) -> None:
    out = torch.zeros(3 * 128, dtype=torch.int32)
    run(SCAN.replace("BARRIER", "bar.sync 0;") + store("%r10"), out, grid=3, block=128, seed=seed, outside=BUFFER)
    assert torch.equal(out.view(3, 128), torch.arange(1, 385).view(3, 128).cumsum(1).int())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("missing", ["before reading", "before writing"])
def test_a_missing_barrier_is_a_race(missing: str, seed: int) -> None:
    code = SCAN.replace("bar.sync 0;", "") if missing == "before reading" else SCAN
    code = code.replace("BARRIER", "bar.sync 0;" if missing == "before reading" else "")
    with pytest.raises(
        KernelError, match=r"shared memory that (thread \d+ (reads|writes), with no barrier|nothing has)"
    ):
        run(code + store("%r10"), torch.zeros(128, dtype=torch.int32), block=128, seed=seed, outside=BUFFER)


def test_several_threads_may_write_the_same() -> None:
    code = "mov.u32 %r3, buffer; st.shared.v2.u32 [%r3], {VALUE, 7}; bar.sync 0; ld.shared.u32 %r4, [%r3];" + store(
        "%r4"
    )
    out = torch.zeros(64, dtype=torch.int32)
    run(code.replace("VALUE", "5"), out, block=64, outside=BUFFER)
    assert out.tolist() == [5] * 64
    with pytest.raises(KernelError, match=r"a write of shared memory that thread \d+ writes, with no barrier between"):
        run(code.replace("VALUE", "%r0"), out, block=64, outside=BUFFER)


def test_a_missing_barrier_gives_other_results_in_some_order() -> None:
    """In global memory, whose accesses are not followed."""
    code = store("%r0") + "BARRIER xor.b32 %r3, %r0, 32;" + at("%d7", "%d0", 4, "%r3") + "ld.global.u32 %r4, [%d7];"
    results = set()
    for barrier in ("bar.sync 0;", ""):
        for seed in SEEDS:
            memory, out = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
            run(code.replace("BARRIER", barrier) + store("%r4", "%d1"), memory, out, block=64, seed=seed)
            results.add(tuple(out.tolist()))
            assert not barrier or results == {tuple(k ^ 32 for k in range(64))}
    assert len(results) > 1


@pytest.mark.parametrize("synchronizes", [True, False])
def test_lanes_of_a_warp_must_be_ordered_too(synchronizes: bool) -> None:
    code = (
        """
    mov.u32 %r3, buffer;
    shl.b32 %r4, %r0, 2;
    add.s32 %r5, %r3, %r4;
    st.shared.u32 [%r5], %r0;
    SYNCHRONIZE
    xor.b32 %r4, %r4, 4;
    add.s32 %r5, %r3, %r4;
    ld.shared.u32 %r6, [%r5];
    """.replace("SYNCHRONIZE", "bar.warp.sync -1;" if synchronizes else "shfl.sync.bfly.b32 %r7, %r0, 1, 31, -1;")
        + store("%r6")
    )
    out = torch.zeros(32, dtype=torch.int32)
    if synchronizes:
        run(code, out, outside=BUFFER)
        assert out.tolist() == [lane ^ 1 for lane in range(32)]
    else:
        with pytest.raises(
            KernelError, match=r"a read of shared memory that thread \d+ writes, with no barrier between"
        ):
            run(code, out, outside=BUFFER)


def test_reductions_at_barriers() -> None:
    code = """
    and.b32 %r3, %r0, 3;
    setp.eq.s32 %p0, %r3, 0;
    bar.red.popc.u32 %r4, 0, %p0;
    barrier.red.and.pred %p1, 1, %p0;
    barrier.sync.or.pred %p2, 1, %p0;
    """.replace("barrier.sync.or", "barrier.red.or")
    code += "selp.b32 %r5, 1, 0, %p1; selp.b32 %r6, 2, 0, %p2; or.b32 %r5, %r5, %r6;"
    counts, holds = torch.zeros(96, dtype=torch.int32), torch.zeros(96, dtype=torch.int32)
    run(code + store("%r4") + store("%r5", "%d1"), counts, holds, block=96)
    assert counts.tolist() == [24] * 96
    assert holds.tolist() == [2] * 96


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers_of_a_part_of_a_block(seed: int) -> None:
    # The first two warps meet twice; the third one does not take part, and has finished by then, or not.
    code = (
        """
    setp.ge.u32 %p0, %r0, 64;
    @%p0 bra end;
    mov.u32 %r3, buffer;
    shl.b32 %r4, %r0, 2;
    add.s32 %r5, %r3, %r4;
    st.shared.u32 [%r5], %r0;
    bar.sync 3, 64;
    xor.b32 %r6, %r4, 128;
    add.s32 %r6, %r6, %r3;
    ld.shared.u32 %r7, [%r6];
    """
        + store("%r7")
        + "end:"
    )
    out = torch.zeros(64, dtype=torch.int32)
    run(code, out, block=96, seed=seed, outside=BUFFER)
    assert out.tolist() == [k ^ 32 for k in range(64)]


def test_shuffles() -> None:
    lanes = range(32)
    modes = {
        ("up", 3, 0): lambda lane: (lane - 3, lane >= 3),
        ("down", 3, 31): lambda lane: (lane + 3, lane + 3 < 32),
        ("bfly", 6, 31): lambda lane: (lane ^ 6, True),
        ("idx", 5, 31): lambda lane: (5, True),
        ("up", 3, 0x1800): lambda lane: (lane - 3, lane % 8 >= 3),
        ("down", 3, 0x181F): lambda lane: (lane + 3, lane % 8 + 3 < 8),
        ("idx", 9, 0x181F): lambda lane: (lane // 8 * 8 + 1, True),
        ("bfly", 8, 0x1807): lambda lane: (lane ^ 8, (lane ^ 8) <= (lane & 24 | 7)),
    }
    for (mode, distance, bounds), source in modes.items():
        code = f"mul.lo.u32 %r3, %r0, 10; shfl.sync.{mode}.b32 %r4|%p0, %r3, {distance}, {bounds}, -1;"
        code += "selp.b32 %r5, 1, 0, %p0;"
        values, holds = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        run(code + store("%r4") + store("%r5", "%d1"), values, holds)
        expected = [(10 * (source(lane)[0] if source(lane)[1] else lane), int(source(lane)[1])) for lane in lanes]
        assert list(zip(values.tolist(), holds.tolist(), strict=True)) == expected, (mode, distance, bounds)


def test_masks_of_halves_that_part() -> None:
    """Each half shuffles by its own instruction, or both by the same one."""
    code = """
    setp.lt.u32 %p0, %r0, 16;
    @%p0 bra low;
    shfl.sync.bfly.b32 %r4, %r0, 1, 31, 0xffff0000;
    bra.uni both;
  low:
    shfl.sync.bfly.b32 %r4, %r0, 2, 31, 0xffff;
  both:
    selp.b32 %r5, 0xffff, 0xffff0000, %p0;
    shfl.sync.bfly.b32 %r6, %r4, 4, 31, %r5;
    bar.warp.sync 0xffffffff;
    """ + store("%r6")
    out = torch.zeros(32, dtype=torch.int32)
    run(code, out)
    assert out.tolist() == [lane ^ 4 ^ (2 if lane < 16 else 1) for lane in range(32)]


def test_votes_matches_and_reductions() -> None:
    cases = {
        "setp.lt.u32 %p0, %r0, 20; vote.sync.any.pred %p1, %p0, -1; selp.b32 %r4, 1, 0, %p1;": lambda k: 1,
        "setp.lt.u32 %p0, %r0, 20; vote.sync.all.pred %p1, %p0, -1; selp.b32 %r4, 1, 0, %p1;": lambda k: 0,
        "setp.lt.u32 %p0, %r0, 20; vote.sync.uni.pred %p1, %p0, -1; selp.b32 %r4, 1, 0, %p1;": lambda k: 0,
        "setp.lt.u32 %p0, %r0, 20; vote.sync.ballot.b32 %r4, !%p0, -1;": lambda k: 0xFFF00000,
        "rem.u32 %r3, %r0, 3; match.any.sync.b32 %r4, %r3, -1;": lambda k: sum(1 << j for j in range(k % 3, 32, 3)),
        "mov.u32 %r3, 7; match.all.sync.b32 %r4|%p0, %r3, -1;": lambda k: 0xFFFFFFFF,
        "redux.sync.add.u32 %r4, %r0, -1;": lambda k: 496,
        "xor.b32 %r3, %r0, 5; redux.sync.max.s32 %r4, %r3, -1;": lambda k: 31,
        "redux.sync.xor.b32 %r4, %r0, -1;": lambda k: 0,
        "elect.sync %r4|%p0, -1; selp.b32 %r4, 1, 0, %p0;": lambda k: int(k == 0),
        "mov.u32 %r4, %lanemask_lt;": lambda k: (1 << k) - 1,
    }
    for code, expected in cases.items():
        out = torch.zeros(32, dtype=torch.int32)
        run(code + store("%r4"), out)
        assert unsigned(out) == [expected(k) for k in range(32)], code


def test_atomics_of_many_blocks() -> None:
    tickets = torch.zeros(2048, dtype=torch.int32)
    cells = torch.zeros(8, dtype=torch.int32)
    sums = torch.zeros(2)
    double = torch.zeros(1, dtype=torch.float64)
    code = """
    atom.global.add.u32 %r3, [%d1], 1;
    atom.global.max.s32 %r4, [%d1+4], %r0;
    red.global.add.u32 [%d1+8], %r0;
    atom.global.inc.u32 %r4, [%d1+12], 99;
    atom.global.or.b32 %r4, [%d1+16], %r0;
    atom.global.exch.b32 %r4, [%d1+20], 5;
    red.global.add.f32 [%d2], 0f3F000000;
    red.global.add.noftz.bf16x2 [%d2+4], 0x3f803f80;
    red.relaxed.gpu.global.add.f64 [%d3], 0d3FD0000000000000;
  retry:
    ld.volatile.global.u32 %r5, [%d1+24];
    add.u32 %r6, %r5, 2;
    atom.global.cas.b32 %r7, [%d1+24], %r5, %r6;
    setp.ne.u32 %p0, %r7, %r5;
    @%p0 bra retry;
    """
    run(code + store("%r3"), tickets, cells, sums, double, grid=32, block=64)
    assert sorted(tickets.tolist()) == list(range(2048))
    total = sum(range(2048))
    assert cells.tolist() == [2048, 2047, total, 2048 % 100, 2047, 5, 4096, 0]
    assert sums[0] == 1024
    assert sums[1:].view(torch.bfloat16).tolist() == [256, 256]  # in steps of 1, up to where these are lost
    assert double.item() == 512
    orders = set()
    for seed in SEEDS:
        cells.zero_()
        run("atom.global.add.u32 %r3, [%d1], 1;" + store("%r3"), tickets, cells, grid=32, block=64, seed=seed)
        orders.add(tuple(tickets.tolist()))
    assert len(orders) == len(SEEDS)


# --- memory -----------------------------------------------------------------------------------------------------


def test_vectors_and_small_types() -> None:
    source, out = torch.randint(-128, 128, (32, 16)).to(torch.int8), torch.zeros(32, 8, dtype=torch.int32)
    code = """
    shl.b32 %r3, %r0, 4;
    cvt.u64.u32 %d4, %r3;
    add.s64 %d5, %d4, %d0;
    ld.global.nc.L1::no_allocate.v4.u32 {%r4, %r5, %r6, %r7}, [%d5];
    ld.global.s8 %r8, [%d5+3];
    ld.global.u8 %r9, [%d5+3];
    ld.global.cg.v2.u16 {%h0, _}, [%d5+4];
    cvt.u32.u16 %r10, %h0;
    ld.global.b128 %q0, [%d5];
    mov.b128 {%d8, %d9}, %q0;
    mov.b64 {%r11, %r12}, %d9;
    shl.b32 %r3, %r0, 5;
    cvt.u64.u32 %d4, %r3;
    add.s64 %d6, %d4, %d1;
    st.global.v4.b32 [%d6], {%r7, %r6, %r5, %r4};
    st.global.v2.b32 [%d6+16], {%r8, %r9};
    st.global.b32 [%d6+24], %r10;
    st.global.b32 [%d6+28], %r12;
    """
    run(code, source, out)
    words_ = source.view(torch.int32)
    assert torch.equal(out[:, :4], words_.flip(1))
    assert torch.equal(out[:, 4], source[:, 3].int())
    assert torch.equal(out[:, 5], source[:, 3].int() & 255)
    assert torch.equal(out[:, 6], source.view(torch.int16)[:, 2].int() & 0xFFFF)
    assert torch.equal(out[:, 7], words_[:, 3])


def test_local_memory_constants_and_functions() -> None:
    outside = """
    .const .align 4 .b32 table[4] = {10, 20, 30, 40};
    .func (.param .b32 result) twice(.param .b32 given)
    {
      .reg .b32 %r<4>;
      .reg .pred %p<2>;
      ld.param.b32 %r0, [given];
      setp.gt.u32 %p0, %r0, 25;
      @%p0 bra large;
      shl.b32 %r0, %r0, 1;
      st.param.b32 [result], %r0;
      ret;
    large:
      st.param.b32 [result], 1000;
      ret;
    }
    """
    code = """
    .local .align 8 .b8 depot[16];
    and.b32 %r3, %r0, 3;
    shl.b32 %r3, %r3, 2;
    cvt.u64.u32 %d4, %r3;
    mov.u64 %d5, table;
    add.s64 %d5, %d5, %d4;
    ld.const.u32 %r4, [%d5];
    mov.u64 %d6, depot;
    cvta.local.u64 %d6, %d6;
    add.s64 %d6, %d6, %d4;
    st.u32 [%d6], %r4;
    ld.u32 %r5, [%d6];
    {
      .param .b32 argument;
      .param .b32 returned;
      st.param.b32 [argument], %r5;
      call.uni (returned), twice, (argument);
      ld.param.b32 %r6, [returned];
    }
    """ + store("%r6")
    out = torch.zeros(32, dtype=torch.int32)
    run(code, out, outside=outside)
    assert out.tolist() == [20, 40, 1000, 1000] * 8


def test_dynamic_shared_memory_and_copies_into_it() -> None:
    source, out = torch.arange(128, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
    code = """
    mov.u32 %r3, memory;
    shl.b32 %r4, %r0, 4;
    add.s32 %r5, %r3, %r4;
    mad.wide.u32 %d4, %r0, 16, %d0;
    cp.async.cg.shared.global [%r5], [%d4], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.u32 %r6, [%r5+12];
    """ + store("%r6", "%d1")
    outside = ".extern .shared .align 16 .b8 memory[];"
    run(code, source, out, outside=outside, shared=512)
    assert out.tolist() == [4 * k + 3 for k in range(32)]
    with pytest.raises(KernelError, match="shared memory"):
        run(code, source, out, outside=outside, shared=508)


# --- faults -----------------------------------------------------------------------------------------------------


def test_an_access_out_of_bounds_is_caught() -> None:
    out = torch.zeros(50, dtype=torch.int32)
    check = "setp.ge.u32 %p0, %r0, {}; @%p0 bra end;" + store("%r0") + "end:"
    run(check.format(50), out, block=64)
    assert out.tolist() == list(range(50))
    message = (
        r"(?s)a write out of bounds: 4 bytes at 0x\w+ are out of bounds: 0 bytes behind the end of the buffer of 200"
    )
    with pytest.raises(
        KernelError, match=message + r".*st\.global\.b32.*kernel, block \(0, 0, 0\), thread \(50, 0, 0\)"
    ):
        run(check.format(51), out, block=64)
    with pytest.raises(KernelError, match="4 bytes before the buffer"):
        run("ld.global.u32 %r4, [%d0+-4];", out)
    with pytest.raises(KernelError, match="8 of them past the end"):
        run("ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d0+192];", torch.zeros(50, dtype=torch.int32))
    with pytest.raises(KernelError, match="out of bounds"):
        run("mov.u64 %d4, 0; atom.global.add.u32 %r4, [%d4], 1;", out)
    # A part of a larger tensor ends where it ends.
    with pytest.raises(KernelError, match="out of bounds"):
        run(check.format(51), torch.zeros(64, dtype=torch.int32)[:50], block=64)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("ld.global.v2.u32 {%r4, %r5}, [%d0+4];", "a read of 8 bytes is misaligned"),
        ("st.global.v4.f32 [%d0+8], {%f0, %f0, %f0, %f0};", "a write of 16 bytes is misaligned"),
        ("mov.u32 %r4, buffer; ld.shared.u32 %r5, [%r4+508];", "a read of shared memory that nothing has written"),
        ("mov.u32 %r4, buffer; st.shared.u32 [%r4+512], %r4;", "a write out of bounds: .*shared memory"),
        ("shfl.sync.bfly.b32 %r4, %r0, 16, 31, 0xffff;", "not in its own mask"),
        (
            "setp.lt.u32 %p0, %r0, 16; @!%p0 bra end; shfl.sync.bfly.b32 %r4, %r0, 16, 31, 0xffff; end:",
            "a shuffle from lane 16, which takes no part in it",
        ),
        (
            "setp.lt.u32 %p0, %r0, 31; @!%p0 bra end; shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1; end:",
            "lane 31, which have",
        ),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bra low; bar.warp.sync -1; low: bar.sync 0;", "waits for ever"),
        ("setp.lt.u32 %p0, %r0, 16; @%p0 bra low; bar.sync 1; low: bar.sync 0;", "waits for ever"),
        ("trap;", "the kernel has stopped itself"),
    ],
)
def test_faults(code: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        run(code, torch.zeros(64, dtype=torch.int32), outside=BUFFER)


def test_lanes_that_are_not_there() -> None:
    with pytest.raises(KernelError, match=r"names lanes .*, which are not there"):
        run("shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;", block=24)


def test_what_is_not_known_is_said() -> None:
    for instruction in (
        "frobnicate.b32 %r4, %r5;",
        "cvt.rn.satfinite.e4m3x2.f32 %h0, %f0, %f1;",
        "add.f16.b8 %r4, %r4;",
    ):
        with pytest.raises(KernelError, match=f"{instruction.split('.')[0]}.*line .* of the PTX, in kernel"):
            run(instruction)
    with pytest.raises(KernelError, match="no kernel missing"):
        executor.library().launch(executor.library().load(program("")), "missing", (1,), (1,), ())


def test_counts() -> None:
    library = executor.library()
    out = torch.zeros(64, dtype=torch.int32)
    library.reset_counts()
    run("setp.lt.u32 %p0, %r0, 8; @%p0 ld.global.u32 %r4, [%d0];" + store("%r0"), out, grid=2)
    counts = library.counts()
    instructions = 2 + 4 + 2 + 2 + 1  # the start of `run`, the code, what stores, ret
    assert counts.launches == 1
    assert counts.instructions == 2 * instructions
    assert counts.lane_instructions == 64 * (instructions - 1) + 8
    # The eight lanes read the same element, at once.
    assert (counts.bytes_read, counts.bytes_written) == (4, 64 * 4)
    (loads,) = [row for row in library.profile() if row[4].startswith("@%p0 ld.global")]
    assert loads[2:4] == (2, 8)
    library.reset_counts()
    assert library.counts() == (0, 0, 0, 0, 0)


def test_numbers_as_arguments() -> None:
    body = "ld.param.f32 %f0, [x]; ld.param.u64 %d0, [to]; ld.param.s16 %r0, [n]; st.global.f32 [%d0], %f0;"
    body += "st.global.b32 [%d0+4], %r0;"
    library = executor.library()
    module = library.load(program(body, parameters=".param .f32 x, .param .s16 n, .param .u64 to"))
    assert library.parameter_sizes(module, "kernel") == [4, 2, 8]
    out = torch.zeros(2)
    library.launch(module, "kernel", (1,), (1,), [ctypes.c_float(2.5), ctypes.c_int16(-3), out])
    assert out[0] == 2.5
    assert out.view(torch.int32)[1] == -3
