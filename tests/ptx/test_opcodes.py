"""Single instructions against plain Python integers and floats, on edge cases and random operands."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest

from tests.ptx.launch import prepare

LANES = 128
EDGES = [0, 1, 2, 7, 31, 32, 33, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF]
EDGES += [0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
MASK = 0xFFFFFFFF


def signed(v: int, bits: int = 32) -> int:
    return v - (1 << bits) if v >> (bits - 1) else v


def as_float(v: int) -> float:
    return struct.unpack("f", struct.pack("I", v))[0]


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extract(a: int, at: int, length: int) -> int:
    return a >> (at & 255) & ((1 << (length & 255)) - 1) if at & 255 < 256 else 0


def insert(a: int, b: int, at: int, length: int) -> int:
    mask = ((1 << length) - 1) << at & MASK
    return (b & ~mask) | (a << at & mask)


def permute(a: int, b: int, selector: int) -> int:
    data, result = (b << 32 | a).to_bytes(8, "little"), 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        result |= (byte if nibble < 8 else 255 * (byte >> 7)) << 8 * i
    return result


def lookup(table: int):
    """lop3: bit by bit, the table's entry number abc."""

    def function(a: int, b: int, c: int) -> int:
        bits = (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) for i in range(32))
        return sum((table >> index & 1) << i for i, index in enumerate(bits))

    return function


def to_bf16(v: int) -> int:
    """Nearest, ties to even, by exact comparison of both neighbours."""
    value = as_float(v)
    if math.isnan(value):
        return 0x7FFF
    low = v >> 16
    rest = v & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low & 1))


# text of the instruction on %r1, %r2, %r3 -> %r4; what it means; how many bits of the second and third operand to use
INTEGER = [
    ("add.u32 %r4, %r1, %r2", lambda a, b, c: a + b),
    ("sub.s32 %r4, %r1, %r2", lambda a, b, c: a - b),
    ("mul.lo.s32 %r4, %r1, %r2", lambda a, b, c: a * b),
    ("mul.hi.u32 %r4, %r1, %r2", lambda a, b, c: a * b >> 32),
    ("mul.hi.s32 %r4, %r1, %r2", lambda a, b, c: signed(a) * signed(b) >> 32),
    ("mad.lo.s32 %r4, %r1, %r2, %r3", lambda a, b, c: a * b + c),
    ("mad.hi.u32 %r4, %r1, %r2, %r3", lambda a, b, c: (a * b >> 32) + c),
    ("div.u32 %r4, %r1, %r2", lambda a, b, c: a // b if b else None),
    ("div.s32 %r4, %r1, %r2", lambda a, b, c: truncated(signed(a), signed(b)) if b else None),
    ("rem.u32 %r4, %r1, %r2", lambda a, b, c: a % b if b else None),
    ("rem.s32 %r4, %r1, %r2",
     lambda a, b, c: signed(a) - truncated(signed(a), signed(b)) * signed(b) if b else None),
    ("min.s32 %r4, %r1, %r2", lambda a, b, c: min(signed(a), signed(b))),
    ("max.u32 %r4, %r1, %r2", lambda a, b, c: max(a, b)),
    ("neg.s32 %r4, %r1", lambda a, b, c: -a),
    ("not.b32 %r4, %r1", lambda a, b, c: ~a),
    ("xor.b32 %r4, %r1, %r2", lambda a, b, c: a ^ b),
    ("shl.b32 %r4, %r1, %r2", lambda a, b, c: a << b if b < 32 else 0),
    ("shr.u32 %r4, %r1, %r2", lambda a, b, c: a >> b if b < 32 else 0),
    ("shr.s32 %r4, %r1, %r2", lambda a, b, c: signed(a) >> min(b, 31)),
    ("shf.l.wrap.b32 %r4, %r1, %r2, %r3", lambda a, b, c: (b << 32 | a) << (c & 31) >> 32),
    ("shf.r.wrap.b32 %r4, %r1, %r2, %r3", lambda a, b, c: (b << 32 | a) >> (c & 31)),
    ("shf.r.clamp.b32 %r4, %r1, %r2, %r3", lambda a, b, c: (b << 32 | a) >> min(c, 32)),
    ("bfe.u32 %r4, %r1, 5, 9", lambda a, b, c: extract(a, 5, 9)),
    ("bfe.s32 %r4, %r1, 5, 9", lambda a, b, c: signed(extract(a, 5, 9), 9)),
    ("bfi.b32 %r4, %r1, %r2, 12, 7", lambda a, b, c: insert(a, b, 12, 7)),
    ("prmt.b32 %r4, %r1, %r2, %r3", permute),
    ("prmt.b32 %r4, %r1, %r2, 0x5410", lambda a, b, c: b << 16 | a & 0xFFFF),
    ("lop3.b32 %r4, %r1, %r2, %r3, 0x96", lookup(0x96)),
    ("lop3.b32 %r4, %r1, %r2, %r3, 0xEA", lookup(0xEA)),
    ("popc.b32 %r4, %r1", lambda a, b, c: a.bit_count()),
    ("clz.b32 %r4, %r1", lambda a, b, c: 32 - a.bit_length()),
    ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r4, %r3, 5, %p1", lambda a, b, c: c if signed(a) < signed(b) else 5),
    ("setp.hi.u32 %p1, %r1, %r2; selp.b32 %r4, %r3, 5, %p1", lambda a, b, c: c if a > b else 5),
    ("mul.wide.s32 %rd3, %r1, %r2; cvt.u32.u64 %r4, %rd3; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r4, %rd3",
     lambda a, b, c: signed(a) * signed(b) >> 32),
    ("cvt.s16.s32 %h1, %r1; cvt.s32.s16 %r4, %h1", lambda a, b, c: signed(a & 0xFFFF, 16)),
    ("cvt.u8.u32 %h1, %r1; cvt.u32.u8 %r4, %h1", lambda a, b, c: a & 0xFF),
    ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r4, {%h2, %h1}", lambda a, b, c: (a & 0xFFFF) << 16 | a >> 16),
    ("cvt.rn.bf16.f32 %h1, %r1; cvt.u32.u16 %r4, %h1", lambda a, b, c: to_bf16(a)),
    ("cvt.rn.bf16x2.f32 %r4, %r1, %r2", lambda a, b, c: to_bf16(a) << 16 | to_bf16(b)),
    ("and.b32 %r5, %r2, 1; TABLE: .branchtargets EVEN, ODD; brx.idx %r5, TABLE;"
     "ODD: mov.u32 %r4, %r3; bra END; EVEN: mov.u32 %r4, %r1; END: add.u32 %r4, %r4, 1",
     lambda a, b, c: (c if b & 1 else a) + 1),
]  # fmt: skip


def results(
    text: str, operands: np.ndarray, schedule: int | None = None, atomics: int = 0
) -> np.ndarray:
    """%r4 of every lane, %r1 to %r3 being the rows of `operands`, which are at %rd4, and %r9 the lane's number."""
    out = np.zeros(LANES, np.uint32)
    ptx = f"""
    .visible .entry one(.param .u64 out, .param .u64 source) {{
        .reg .pred %p<3>; .reg .b16 %h<3>; .reg .b32 %r<10>; .reg .b64 %rd<5>;
        ld.param.u64 %rd1, [out]; ld.param.u64 %rd2, [source]; mov.b64 %rd4, %rd2;
        mov.u32 %r9, %tid.x; mad.wide.u32 %rd1, %r9, 4, %rd1; mad.wide.u32 %rd2, %r9, 4, %rd2;
        ld.global.u32 %r1, [%rd2]; ld.global.u32 %r2, [%rd2+{4 * LANES}]; ld.global.u32 %r3, [%rd2+{8 * LANES}];
        {text};
        st.global.u32 [%rd1], %r4;
        ret;
    }}"""
    launch = prepare(ptx, (1,), LANES, [("out", "*", out), ("source", "*", operands)])
    assert launch.run(schedule).tensors["source"].atomics == atomics
    return out


@pytest.fixture(scope="module")
def operands() -> np.ndarray:
    rng = np.random.default_rng(0)
    words = rng.integers(0, 1 << 32, (3, LANES), np.uint32)
    words[:, :48] = rng.choice(np.array(EDGES, np.uint32), (3, 48))
    words[1:, 48:80] %= 40
    return words


@pytest.mark.parametrize(("text", "meaning"), INTEGER, ids=[text for text, _ in INTEGER])
def test_bits(text, meaning, operands):
    with np.errstate(all="ignore"):
        actual = results(text, operands)
    for (a, b, c), value in zip(operands.T.tolist(), actual.tolist(), strict=True):
        expected = meaning(a, b, c)
        assert expected is None or value == expected & MASK, (hex(a), hex(b), hex(c))


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("add.f32 %r4, %r1, %r2", lambda a, b, c: a + b),
        ("mul.rn.f32 %r4, %r1, %r2", lambda a, b, c: a * b),
        ("fma.rn.f32 %r4, %r1, %r2, %r3", lambda a, b, c: a * b + c),
        ("div.full.f32 %r4, %r1, %r2", lambda a, b, c: a / b),
        ("max.f32 %r4, %r1, %r2", max),
        ("neg.f32 %r4, %r1", lambda a, b, c: -a),
        ("cvt.rni.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r4, %r4", lambda a, b, c: float(round(a))),
        ("cvt.rzi.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r4, %r4", lambda a, b, c: float(int(a))),
        (
            "sqrt.approx.f32 %r4, %r1; mul.f32 %r4, %r4, %r4",
            lambda a, b, c: a if a >= 0 else math.nan,
        ),
        (
            "setp.leu.f32 %p1, %r1, %r2; selp.f32 %r4, %r1, %r3, %p1",
            lambda a, b, c: c if a > b else a,
        ),
    ],
)
def test_floats(text, meaning):
    """Within a rounding of the same in float64; halves round to even."""
    values = np.random.default_rng(1).standard_normal((3, LANES)).astype(np.float32) * 3
    values[0, :4] = (0.5, 1.5, -2.5, 3.0)
    if text.startswith("max"):
        values[2] = -np.inf
    with np.errstate(all="ignore"):
        actual = results(text, values.view(np.uint32)).view(np.float32)
    exact = np.array([meaning(*map(float, column)) for column in values.T])
    np.testing.assert_allclose(
        actual, exact, rtol=3e-7, atol=1e-7 if "fma" in text or "add" in text else 0
    )


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("shfl.sync.bfly.b32 %r4, %r1, 5, 31, -1", lambda lane: lane ^ 5),
        ("shfl.sync.idx.b32 %r4, %r1, 9, 31, -1", lambda lane: 9),
        ("shfl.sync.down.b32 %r4, %r1, 3, 31, -1", lambda lane: lane + 3 if lane < 29 else lane),
        ("shfl.sync.up.b32 %r4, %r1, 3, 0, -1", lambda lane: lane - 3 if lane >= 3 else lane),
        ("shfl.sync.bfly.b32 %r4, %r1, 1, 0x1c1f, -1", lambda lane: lane ^ 1),
        (
            "shfl.sync.down.b32 %r4, %r1, 2, 0x181f, -1",
            lambda lane: lane + 2 if lane % 8 < 6 else lane,
        ),
    ],
)
def test_shuffles(text, meaning, operands):
    first = operands[0].reshape(-1, 32)
    expected = first[:, [meaning(lane) for lane in range(32)]].ravel()
    assert (results(text, operands) == expected).all()


def test_votes(operands):
    odd = (operands[0] & 1).astype(bool).reshape(-1, 32)
    actual = results(
        "and.b32 %r4, %r1, 1; setp.ne.u32 %p1, %r4, 0; vote.sync.ballot.b32 %r4, %p1, -1", operands
    )
    ballots = [sum(int(bit) << lane for lane, bit in enumerate(warp)) for warp in odd]
    assert (actual.reshape(-1, 32) == np.array(ballots, np.uint32)[:, None]).all()


def test_sums_of_a_warp(operands):
    warps = operands[0].reshape(-1, 32)
    actual = results("redux.sync.add.s32 %r4, %r1, -1", operands).reshape(-1, 32)
    assert (actual == warps.sum(1, dtype=np.uint32)[:, None]).all()
    some = results(
        "mov.u32 %r4, 0; setp.lt.u32 %p1, %r1, 40; @%p1 redux.sync.add.u32 %r4, %r1, -1", operands
    ).reshape(-1, 32)
    chosen = warps < 40
    assert (some == np.where(chosen, np.where(chosen, warps, 0).sum(1)[:, None], 0)).all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("add", LANES * (LANES - 1) // 2), ("max", LANES - 1), ("or", LANES - 1), ("inc", LANES % 7)],
)
def test_atomics(name, expected):
    """All lanes on one word; each sees another old value where the operation makes that so."""
    operand = "6" if name == "inc" else "%r9"
    text = f"atom.global.{name}.{'b' if name == 'or' else 'u'}32 %r4, [%rd4], {operand}"
    for schedule in (None, 1):
        words = np.zeros((3, LANES), np.uint32)
        assert results(text, words, schedule, LANES).min() == 0
        assert words[0, 0] == expected and not words[0, 1:].any()
