//! Elementary functions in plain arithmetic, so that loops over them become vector instructions.

/// Compiles a loop for AVX-512, for AVX2 with FMA and plainly, and calls the widest that the processor can run.
macro_rules! vectorised {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn plain($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            {
                use $crate::eager::kernels::simd::Instructions;

                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn widest($($arg: $ty),*) $(-> $ret)? { plain($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn wide($($arg: $ty),*) $(-> $ret)? { plain($($arg),*) }

                match Instructions::widest() {
                    // SAFETY: the processor was asked for each of these instructions.
                    Instructions::Avx512 => unsafe { widest($($arg),*) },
                    // SAFETY: as above.
                    Instructions::Avx2 => unsafe { wide($($arg),*) },
                    Instructions::Plain => plain($($arg),*),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            plain($($arg),*)
        }
    };
}
pub(crate) use vectorised;

/// What [`vectorised`] compiles loops for. A value other than `Plain` exists only where the processor runs it.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instructions {
    /// AVX-512 (F, VL, BW and DQ), AVX2 and FMA.
    Avx512,
    /// AVX2 and FMA.
    Avx2,
    /// What every processor has.
    Plain,
}

#[cfg(target_arch = "x86_64")]
impl Instructions {
    /// The widest that this processor runs.
    #[inline]
    pub(crate) fn widest() -> Self {
        #[cfg(test)]
        if let Some(chosen) = tests::CHOSEN.get() {
            return chosen;
        }
        let wide = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let widest = wide
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq");
        match (widest, wide) {
            (true, _) => Self::Avx512,
            (false, true) => Self::Avx2,
            (false, false) => Self::Plain,
        }
    }
}

/// Numbers that are summed side by side: the width of the widest vectors in use, twice.
const LANES: usize = 16;

/// `eˣ`, relative error below 2e-7 where the result is a normal number; 0 below, finite above.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts: n · HIGH is exact
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // adding and taking away 1.5 · 2²³ rounds to the nearest integer
    const ROUND: f32 = 12_582_912.0;
    let tiny = x < -87.3;
    let x = x.clamp(-87.3, 88.3);
    let n = (x * LOG2_E + ROUND) - ROUND;
    let r = x - n * HIGH - n * LOW;
    // least squares on Chebyshev nodes over |r| ≤ ln 2 / 2
    let p = 0.001_394_859_3;
    let p = p * r + 0.008_375_137;
    let p = p * r + 0.041_666_217;
    let p = p * r + 0.166_664_15;
    let p = p * r + 0.5;
    let p = p * r + 1.0;
    let p = p * r + 1.0;
    let power = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if tiny { 0.0 } else { p * power }
}

/// The standard normal distribution's Φ(x), relative error below 1e-6 on both sides, and `exp(−x² / 2)`.
///
/// `erfc(z) = t · Q(t) · exp(−z²)` with `t = 1 / (1 + 0.4 z)`; Q is a least-squares fit on Chebyshev nodes.
#[inline(always)]
pub fn normal(x: f32) -> (f32, f32) {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let e = exp(-z * z);
    let t = 1.0 / (1.0 + 0.4 * z);
    let q = 0.041_941_803;
    let q = q * t - 0.143_589_12;
    let q = q * t + 0.090_559_445;
    let q = q * t + 0.080_683_574;
    let q = q * t + 0.084_602_7;
    let q = q * t + 0.191_415_13;
    let q = q * t + 0.202_369_65;
    let q = q * t + 0.226_379_13;
    let q = q * t + 0.225_637_74;
    let tail = 0.5 * t * q * e;
    (if x > 0.0 { 1.0 - tail } else { tail }, e)
}

/// `tanh x`, absolute error below 2e-7.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    1.0 - 2.0 / (1.0 + exp(2.0 * x))
}

/// The sum of `f(i)` for i below `n`, in sixteen partial sums: a fixed order, and one that vectorises.
#[inline(always)]
pub fn sum(n: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0; LANES];
    let whole = n - n % LANES;
    for start in (0..whole).step_by(LANES) {
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(start + lane);
        }
    }
    let rest: f32 = (whole..n).map(f).sum();
    lanes.iter().sum::<f32>() + rest
}

/// The largest of `values`, or −∞.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for (most, &value) in lanes.iter_mut().zip(chunk) {
            *most = if value > *most { value } else { *most };
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    #[cfg(target_arch = "x86_64")]
    thread_local! {
        /// What this thread's loops run on, in place of the widest.
        pub(crate) static CHOSEN: std::cell::Cell<Option<Instructions>> = const { std::cell::Cell::new(None) };
    }

    /// The results of one computation, which stays in this thread, on each of the processor's instructions that loops
    /// are compiled for.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn on_each<T>(compute: impl Fn() -> T) -> Vec<(Instructions, T)> {
        let run = |chosen| {
            CHOSEN.set(Some(chosen));
            let result = compute();
            CHOSEN.set(None);
            (chosen, result)
        };
        let all = match Instructions::widest() {
            Instructions::Avx512 => &[Instructions::Plain, Instructions::Avx2, Instructions::Avx512][..],
            Instructions::Avx2 => &[Instructions::Plain, Instructions::Avx2],
            Instructions::Plain => &[Instructions::Plain],
        };
        all.iter().copied().map(run).collect()
    }

    #[test]
    fn exp_is_as_near_as_it_says() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            assert!((f64::from(exp(x)) / exact - 1.0).abs() < 2e-7, "exp({x})");
        }
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(1000.0).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_normal_distribution_is_symmetric_and_known_at_some_points() {
        for (x, exact) in [(0.0, 0.5), (1.0, 0.841_344_746), (-1.0, 0.158_655_254), (-5.0, 2.866_515_72e-7)] {
            assert!((f64::from(normal(x).0) / exact - 1.0).abs() < 1e-6, "at {x}");
        }
        assert_eq!(normal(-40.0).0, 0.0);
        assert_eq!(normal(40.0).0, 1.0);
    }
}
