"""A small GGUF file with one tensor of every encoding, and the values that it stands for.

    python3 make.py

Packages: gguf 0.19.0, numpy. Deterministic.

encodings.gguf:  tensors named after their encoding, 2 rows of 512 values, and metadata of every type.
                 The plain and the 32-value formats are quantised by the package from normal numbers;
                 the K and IQ4 formats, which it only reads, are random bytes with sane scales.
encodings.f32:   the values that the package reads from them, f32 little-endian, in the file's order.
"""

import pathlib

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

HERE = pathlib.Path(__file__).parent
ROWS, COLS = 2, 512

QUANTISED = [T.F32, T.F16, T.BF16, T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0]
# Where the half-precision scales of a K or IQ4 block are.
SCALES = {
    T.Q2_K: [80, 82],
    T.Q3_K: [108],
    T.Q4_K: [0, 2],
    T.Q5_K: [0, 2],
    T.Q6_K: [208],
    T.IQ4_NL: [0],
    T.IQ4_XS: [0],
}


def random_blocks(rng, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * COLS // block, size), dtype=np.uint8)
    for at in SCALES[kind]:
        scales = rng.uniform(-0.1, 0.1, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(ROWS, -1)


def main():
    rng = np.random.default_rng(20240917)
    writer = gguf.GGUFWriter(HERE / "encodings.gguf", "none")
    writer.add_uint8("test.u8", 200)
    writer.add_int8("test.i8", -100)
    writer.add_uint16("test.u16", 60_000)
    writer.add_int16("test.i16", -30_000)
    writer.add_uint32("test.u32", 4_000_000_000)
    writer.add_int32("test.i32", -2_000_000_000)
    writer.add_uint64("test.u64", 1 << 60)
    writer.add_int64("test.i64", -(1 << 60))
    writer.add_float32("test.f32", 1.5)
    writer.add_float64("test.f64", -2.25)
    writer.add_bool("test.bool", True)
    writer.add_string("test.string", "gr\u00fc\u00dfe \u2603")
    writer.add_array("test.strings", ["a", "", "\u65e5\u672c"])
    writer.add_array("test.ints", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -0.25])

    expected = []
    for kind in QUANTISED + list(SCALES):
        if kind in SCALES:
            packed = random_blocks(rng, kind)
        else:
            values = rng.standard_normal((ROWS, COLS)).astype(np.float32)
            values[0, :32] = 0  # a block whose scale is zero
            packed = gguf.quantize(values, kind)
        values = gguf.dequantize(packed, kind).astype(np.float32).reshape(ROWS, COLS)
        assert np.isfinite(values).all()
        expected.append(values)
        if kind in (T.F32, T.F16):
            writer.add_tensor(kind.name, packed)
        else:
            writer.add_tensor(kind.name, packed.view(np.uint8), raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (HERE / "encodings.f32").write_bytes(np.concatenate(expected).astype("<f4").tobytes())


if __name__ == "__main__":
    main()
