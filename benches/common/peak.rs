//! What the units that multiply reach where nothing has to be fetched.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;
use tk::eager::kernels::gemm::Factors;
use tk::eager::kernels::gemm::bf16::{self, Unit};

/// The FLOPs in a second of all threads' units for factors of this kind, in registers alone: their name comes first. None
/// where nothing is known of the processor.
pub fn peak(factors: Factors) -> Option<(&'static str, f64)> {
    #[cfg(target_arch = "x86_64")]
    {
        let (name, unit): (_, unsafe fn(usize) -> usize) = match factors {
            Factors::Bf16 => match bf16::unit()? {
                Unit::Amx => (Unit::Amx.name(), x86::tiles),
                Unit::Avx512Bf16 => (Unit::Avx512Bf16.name(), x86::pairs),
            },
            Factors::F32 if is_x86_feature_detected!("avx512f") => ("AVX-512", x86::numbers),
            Factors::F32 => return None,
        };
        let threads = rayon::current_num_threads();
        let run = |rounds: usize| -> usize {
            // SAFETY: the processor has the unit, and the system lets this process use it.
            (0..threads).into_par_iter().with_max_len(1).map(|_| unsafe { unit(black_box(rounds)) }).sum()
        };
        run(100_000); // the clock settles
        let best = (0..5).map(|_| {
            let started = Instant::now();
            let flops = run(1_000_000);
            flops as f64 / started.elapsed().as_secs_f64()
        });
        Some((name, best.fold(0.0, f64::max)))
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (factors, bf16::unit(), black_box(()));
        None
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;

    /// One multiply-add into each of sixteen vectors, which do not wait for each other.
    macro_rules! vectors {
        ($instruction:literal, $rounds:ident) => {
            asm!(
                "2:",
                concat!($instruction, " zmm0, zmm30, zmm31"),
                concat!($instruction, " zmm1, zmm30, zmm31"),
                concat!($instruction, " zmm2, zmm30, zmm31"),
                concat!($instruction, " zmm3, zmm30, zmm31"),
                concat!($instruction, " zmm4, zmm30, zmm31"),
                concat!($instruction, " zmm5, zmm30, zmm31"),
                concat!($instruction, " zmm6, zmm30, zmm31"),
                concat!($instruction, " zmm7, zmm30, zmm31"),
                concat!($instruction, " zmm8, zmm30, zmm31"),
                concat!($instruction, " zmm9, zmm30, zmm31"),
                concat!($instruction, " zmm10, zmm30, zmm31"),
                concat!($instruction, " zmm11, zmm30, zmm31"),
                concat!($instruction, " zmm12, zmm30, zmm31"),
                concat!($instruction, " zmm13, zmm30, zmm31"),
                concat!($instruction, " zmm14, zmm30, zmm31"),
                concat!($instruction, " zmm15, zmm30, zmm31"),
                "sub {rounds}, 1",
                "jnz 2b",
                rounds = inout(reg) $rounds => _,
                out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                in("zmm30") 0.0f32, in("zmm31") 0.0f32,
                options(nostack, nomem),
            )
        };
    }

    /// The FLOPs of so many rounds of AVX-512.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn numbers(rounds: usize) -> usize {
        // SAFETY: the caller's promise.
        unsafe { vectors!("vfmadd231ps", rounds) }
        16 * rounds * 2 * 16
    }

    /// The same of AVX512-BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn pairs(rounds: usize) -> usize {
        // SAFETY: the caller's promise.
        unsafe { vectors!("vdpbf16ps", rounds) }
        16 * rounds * 2 * 32
    }

    /// Eight tiles of 16 rows of 64 bytes.
    #[repr(align(64))]
    struct Shapes([u8; 64]);

    /// The same of AMX-BF16: products of 16 × 32 and 32 × 16 numbers into each of four tiles.
    pub unsafe fn tiles(rounds: usize) -> usize {
        let rounds = rounds / 16;
        let mut shapes = Shapes([0; 64]);
        shapes.0[0] = 1;
        for tile in 0..8 {
            (shapes.0[16 + 2 * tile], shapes.0[48 + tile]) = (64, 16);
        }
        // SAFETY: the caller's promise.
        unsafe {
            asm!(
                "ldtilecfg [{shapes}]",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "sub {rounds}, 1",
                "jnz 2b",
                "tilerelease",
                shapes = in(reg) &shapes,
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly),
            );
        }
        4 * rounds * 2 * 16 * 16 * 32
    }
}
