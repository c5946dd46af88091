//! x86-64 with AMX: products of tiles of bfloat16 numbers, added up in single precision.
//!
//! A number in single precision is the sum of three bfloat16 numbers, exactly: its mantissa has 24 bits, theirs have
//! eight. So activations are multiplied piece by piece, and products with weights that are bfloat16 numbers, as codes of
//! up to eight bits are, too, are as exact as those of vectors. Weights of two and three pieces would take five and six
//! products; they stay with vectors.
//!
//! Tiles are state of a thread that the operating system hands out on request. A process that has asked for them needs
//! larger stacks for signals (`sigaltstack`) from then on.

use super::{Avx512, Simd};
use std::arch::{asm, x86_64::*};

/// Rows of a tile.
pub(crate) const SIDE: usize = 16;

/// Columns that are multiplied at a time: numbers in a row of a tile.
pub(crate) const STEP: usize = 32;

/// Numbers in a tile.
pub(crate) const TILE: usize = SIDE * STEP;

/// Pieces of a number in single precision.
pub(crate) const PIECES: usize = 3;

/// Rows and columns of an output that is computed at once.
pub(crate) const SQUARE: usize = 2 * SIDE;

/// That this processor has tiles of bfloat16 numbers, and that this process may use them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Amx(());

/// What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 8 {
        (row_bytes[i], rows[i]) = (64, SIDE as u8);
        i += 1;
    }
    Shapes {
        palette: 1,
        start: 0,
        reserved: [0; 14],
        row_bytes,
        rows,
    }
};

/// Tiles that are in use by this thread until this is dropped.
pub(crate) struct Tiles(());

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the value exists only where tiles are in use.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}

/// A piece of the activations, which lies `$at` bytes on, times the weights in tiles 6 and 7.
macro_rules! piece {
    ($at:literal) => {
        concat!(
            "tileloadd tmm4, [{x0} + {line} + ",
            $at,
            "]
             tileloadd tmm5, [{x1} + {line} + ",
            $at,
            "]
             tdpbf16ps tmm0, tmm4, tmm6
             tdpbf16ps tmm1, tmm4, tmm7
             tdpbf16ps tmm2, tmm5, tmm6
             tdpbf16ps tmm3, tmm5, tmm7"
        )
    };
}

impl Amx {
    pub(super) fn detect() -> Option<Self> {
        // EDX of leaf 7: tiles, and products of bfloat16 numbers in them.
        const ALL: u32 = 1 << 24 | 1 << 22;
        if cfg!(miri) || __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & ALL != ALL {
            return None;
        }
        permitted().then_some(Self(()))
    }

    /// Takes tiles into use.
    #[inline(always)]
    pub(crate) fn tiles(self) -> Tiles {
        // SAFETY: the receiver exists only where the processor has tiles and the system lets us use them.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, readonly)) };
        Tiles(())
    }
}

/// Whether the operating system lets this process use tiles, from now on.
fn permitted() -> bool {
    #[cfg(target_os = "linux")]
    {
        // Linux's `ARCH_REQ_XCOMP_PERM`, for the data of tiles.
        const REQUEST: libc::c_int = 0x1023;
        const TILE_DATA: libc::c_int = 18;
        // SAFETY: two numbers; an older kernel says no.
        unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}

impl Tiles {
    /// `out[i, j] = Σ_k x[i, k] · w[j, k]` for 32 rows each, or the same added to what is there; `w` are bfloat16 numbers,
    /// of `x` there are [`PIECES`].
    ///
    /// # Safety
    /// For each step of [`STEP`] columns, of which there must be one at least, each of `x` must be valid for reading
    /// [`PIECES`] tiles of 16 rows, whose rows are one below the other, and `w` for two, whose rows are side by side, two
    /// numbers of each at a time. `out` must be valid for writing 32 rows of 32 numbers that are `stride` numbers
    /// apart, and for reading them where something is added.
    #[inline(always)]
    pub(crate) unsafe fn multiply(
        &self,
        steps: usize,
        x: [*const u16; 2],
        w: *const u16,
        out: *mut f32,
        stride: usize,
        add: bool,
    ) {
        // SAFETY: promised by the caller; the receiver exists only while tiles are in use.
        unsafe {
            asm!(
                "test {add}, {add}
                 jnz 3f
                 tilezero tmm0
                 tilezero tmm1
                 tilezero tmm2
                 tilezero tmm3
                 jmp 2f
                 3:
                 tileloadd tmm0, [{out} + {stride}]
                 tileloadd tmm1, [{out} + {stride} + 64]
                 tileloadd tmm2, [{below} + {stride}]
                 tileloadd tmm3, [{below} + {stride} + 64]
                 2:
                 tileloadd tmm6, [{w} + {line}]
                 tileloadd tmm7, [{w} + {line} + 1024]",
                piece!("0"),
                piece!("1024"),
                piece!("2048"),
                "add {x0}, 3072
                 add {x1}, 3072
                 add {w}, 2048
                 dec {steps}
                 jnz 2b
                 tilestored [{out} + {stride}], tmm0
                 tilestored [{out} + {stride} + 64], tmm1
                 tilestored [{below} + {stride}], tmm2
                 tilestored [{below} + {stride} + 64], tmm3",
                add = in(reg) usize::from(add),
                out = in(reg) out,
                below = in(reg) out.wrapping_add(SIDE * stride),
                stride = in(reg) 4 * stride,
                line = in(reg) 64usize,
                x0 = inout(reg) x[0] => _,
                x1 = inout(reg) x[1] => _,
                w = inout(reg) w => _,
                steps = inout(reg) steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Avx512 {
    /// The first `N` pieces of 16 numbers, the first bits first: of each 16 to `to`, [`TILE`] apart. An infinite number,
    /// or none at all, has a piece that is no number.
    ///
    /// # Safety
    /// `from` must be valid for reading 16 numbers, `to` for writing 16 at each of the first `N` multiples of [`TILE`].
    #[inline(always)]
    pub(crate) unsafe fn split<const N: usize>(self, from: *const f32, to: *mut u16) {
        // SAFETY: promised by the caller; the receiver exists only where there is AVX-512F.
        unsafe {
            let upper = _mm512_set1_epi32(0xffff_0000u32.cast_signed());
            let mut rest = self.load(from);
            for piece in 0..N {
                let bits = _mm512_and_si512(_mm512_castps_si512(rest), upper);
                rest = self.sub(rest, _mm512_castsi512_ps(bits));
                let short = _mm512_cvtepi32_epi16(_mm512_srli_epi32::<16>(bits));
                _mm256_storeu_si256(to.add(piece * TILE).cast(), short);
            }
        }
    }
}
