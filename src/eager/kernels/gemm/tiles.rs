//! Products by AMX-BF16: 32 × 32 numbers of the result stand in four tiles while 32 rows and 32 columns meet, 32 numbers
//! of k at a time (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18).
//!
//! An element is a pair of neighbours along k. A group of rows is packed as (k / 32, 32 rows, 16 pairs), a panel of columns
//! as (pairs, 32 columns). The compiler knows no tiles yet, so their instructions are written out.

#![allow(clippy::needless_range_loop)] // loops over constant ranges become registers, iterators may not

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count, __m512};
use std::sync::OnceLock;

use super::bf16::x86::{Unit, has_unit};
use super::bf16::{Pairs, load_row, pack};
use super::micro::{Loops, PackSource, ProductBlock, Vector, write};

/// Rows and columns of a block that four tiles hold.
const SIDE: usize = 32;
/// Rows of a tile.
const ROWS: usize = 16;
/// Pairs in a tile's row.
const PAIRS: usize = 16;
/// Elements of a tile.
const TILE: usize = ROWS * PAIRS;

pub(super) const LOOPS: Loops = Loops {
    rows: SIDE,
    columns: SIDE,
    per_element: 2,
    k_unit: 2 * PAIRS,
    // a panel of columns and a group of rows stand in the first cache together
    depth: 384,
    block,
    pack_rows,
    pack_columns,
};

/// Whether the processor has the unit, and the system lets this process use it.
pub(super) fn are_there() -> bool {
    static THERE: OnceLock<bool> = OnceLock::new();
    *THERE.get_or_init(|| {
        let has_tiles = || {
            let features = if __cpuid(0).eax >= 7 { __cpuid_count(7, 0).edx } else { 0 };
            features & (1 << 22) != 0 && features & (1 << 24) != 0 // AMX-BF16, AMX-TILE
        };
        has_unit() && has_tiles() && permitted()
    })
}

/// Asks the system for the tiles, whose state it then keeps for each thread.
#[cfg(target_os = "linux")]
pub(super) fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// Which system would have to be asked how is not known.
#[cfg(not(target_os = "linux"))]
pub(super) fn permitted() -> bool {
    false
}

/// What `ldtilecfg` reads: eight tiles of 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static SHAPES: Shapes = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (row_bytes[tile], rows[tile]) = (4 * PAIRS as u16, ROWS as u8);
        tile += 1;
    }
    Shapes { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// Sums of a block.
#[repr(C, align(64))]
struct Sums([f32; SIDE * SIDE]);

/// See [`Loops::block`].
#[target_feature(enable = "avx512f")]
unsafe fn block(b: &ProductBlock) {
    let mut sums = Sums([0.0; SIDE * SIDE]);
    // SAFETY: whoever calls has the unit and the permission; the tiles are this thread's, and are given back below.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const SHAPES, options(nostack, readonly)) }
    for column in (0..b.columns).step_by(SIDE) {
        for row in (0..b.rows).step_by(SIDE) {
            let (rows, columns) = ((b.rows - row).min(SIDE), (b.columns - column).min(SIDE));
            // SAFETY: packed operands hold whole groups and panels, whose k is a multiple of a tile's.
            unsafe {
                let lhs = b.lhs.add(row * b.k);
                let rhs = b.rhs.add(column / SIDE * b.panel);
                match b.k / PAIRS {
                    0 => {}
                    steps if rows > ROWS => four_tiles(lhs, rhs, sums.0.as_mut_ptr(), steps),
                    steps => two_tiles(lhs, rhs, sums.0.as_mut_ptr(), steps),
                }
            }
            for r in 0..rows {
                for c in (0..columns).step_by(__m512::LANES) {
                    // SAFETY: inside the sums, and inside the block.
                    unsafe {
                        let sum = __m512::load(sums.0.as_ptr().add(r * SIDE + c));
                        write(b, row + r, column + c, [sum]);
                    }
                }
            }
        }
    }
    // SAFETY: as above.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}

/// Multiplies `steps` times 32 numbers of k by the given instructions, between tiles of zeros and stored ones. All tiles count
/// as used.
macro_rules! tiles {
    ($lhs:ident, $rhs:ident, $sums:ident, $steps:ident, [$($zero:literal)*] [$($multiply:literal)*] [$($store:literal)*]) => {
        asm!(
            $($zero,)*
            "2:",
            $($multiply,)*
            "add {lhs}, 2048",
            "add {rhs}, 2048",
            "sub {steps}, 1",
            "jnz 2b",
            $($store,)*
            lhs = inout(reg) $lhs => _,
            rhs = inout(reg) $rhs => _,
            steps = inout(reg) $steps => _,
            sums = in(reg) $sums,
            // bytes from one row of a tile to the next
            row = in(reg) 4 * PAIRS,
            pairs = in(reg) 4 * SIDE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// 32 rows and 32 columns, `steps` times 32 numbers of k → sums (32, 32).
///
/// # Safety
/// The tiles are configured, and the pointers valid.
unsafe fn four_tiles(lhs: *const f32, rhs: *const f32, sums: *mut f32, steps: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        tiles!(lhs, rhs, sums, steps,
            ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"]
            ["tileloadd tmm4, [{lhs} + {row}]"
             "tileloadd tmm6, [{rhs} + {pairs}]"
             "tileloadd tmm7, [{rhs} + {pairs} + 64]"
             "tdpbf16ps tmm0, tmm4, tmm6"
             "tdpbf16ps tmm1, tmm4, tmm7"
             "tileloadd tmm5, [{lhs} + {row} + 1024]"
             "tdpbf16ps tmm2, tmm5, tmm6"
             "tdpbf16ps tmm3, tmm5, tmm7"]
            ["tilestored [{sums} + {pairs}], tmm0"
             "tilestored [{sums} + {pairs} + 64], tmm1"
             "tilestored [{sums} + {pairs} + 2048], tmm2"
             "tilestored [{sums} + {pairs} + 2112], tmm3"]
        );
    }
}

/// The same for the first 16 rows of a group.
///
/// # Safety
/// As above.
unsafe fn two_tiles(lhs: *const f32, rhs: *const f32, sums: *mut f32, steps: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        tiles!(lhs, rhs, sums, steps,
            ["tilezero tmm0" "tilezero tmm1"]
            ["tileloadd tmm4, [{lhs} + {row}]"
             "tileloadd tmm6, [{rhs} + {pairs}]"
             "tileloadd tmm7, [{rhs} + {pairs} + 64]"
             "tdpbf16ps tmm0, tmm4, tmm6"
             "tdpbf16ps tmm1, tmm4, tmm7"]
            ["tilestored [{sums} + {pairs}], tmm0"
             "tilestored [{sums} + {pairs} + 64], tmm1"]
        );
    }
}

/// Packs groups of rows as (k / 32, 32, 16 pairs); of those that are missing nothing is written.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_rows(source: PackSource, to: *mut f32) {
    let PackSource { start, count, k, across, along } = source;
    let steps = k.div_ceil(2 * PAIRS);
    for first in (0..count).step_by(SIDE) {
        let here = SIDE.min(count - first);
        // SAFETY: reads stay inside the source, writes inside of whole groups.
        unsafe {
            let (from, to) = (start.add(first * across), to.add(first * steps * PAIRS));
            for step in 0..steps {
                let to = to.add(step * 2 * TILE);
                let at = step * 2 * PAIRS;
                if along == 1 {
                    for i in 0..here {
                        let row = from.add(i * across);
                        let first: __m512 = load_row(row, at, k);
                        Unit::adjacent(first, load_row(row, at + PAIRS, k)).store(to.add(i * PAIRS));
                    }
                    continue;
                }
                for i in (0..here).step_by(ROWS) {
                    let n = (here - i).min(ROWS);
                    let mut vectors = [__m512::splat(0.0); PAIRS];
                    for pair in 0..PAIRS {
                        let from = from.add(i * across);
                        let first = load_column(from, n, at + 2 * pair, source);
                        let second = load_column(from, n, at + 2 * pair + 1, source);
                        vectors[pair] = Unit::interleave(first, second);
                    }
                    __m512::transpose(&mut vectors);
                    for row in 0..n {
                        vectors[row].store(to.add((i + row) * PAIRS));
                    }
                }
            }
        }
    }
}

/// Number `at` of k of the n rows from `from` on, zeros behind the end of k.
///
/// # Safety
/// The rows are valid.
#[inline(always)]
unsafe fn load_column(from: *const f32, n: usize, at: usize, source: PackSource) -> __m512 {
    // SAFETY: the caller's promise.
    unsafe {
        if at >= source.k {
            return __m512::splat(0.0);
        }
        let from = from.add(at * source.along);
        if source.across == 1 {
            return __m512::load_first(from, n);
        }
        let mut numbers = [0.0; ROWS];
        (0..n).for_each(|row| numbers[row] = *from.add(row * source.across));
        __m512::load(numbers.as_ptr())
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_columns(source: PackSource, to: *mut f32) {
    // SAFETY: the caller's promise.
    unsafe { pack::<__m512, Unit, 16>(source, SIDE, LOOPS.k_unit, to) }
}
