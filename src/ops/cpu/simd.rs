//! The few vector operations that the CPU kernels need, once per instruction set, chosen at run time.
//!
//! `std::arch` rather than a crate: a dozen operations are needed, all stable, and the register tiles must be explicit.

use std::sync::OnceLock;

use half::bf16;

/// Vector instructions that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust, any CPU.
    Portable,
    /// AVX2 and FMA: 8 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW and VL: 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Instructions that multiply bf16 by bf16 into f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bf16Unit {
    /// None: bf16 is widened.
    None,
    /// AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AMX tiles.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

impl Isa {
    /// The best that this CPU has.
    pub fn detect() -> Self {
        static ISA: OnceLock<Isa> = OnceLock::new();
        *ISA.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
                    return Self::Avx512;
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    return Self::Avx2;
                }
            }
            Self::Portable
        })
    }
}

impl Isa {
    /// Whether this CPU has it. Kernels ask before they run it: the values are public.
    pub(crate) fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => Self::detect() == Self::Avx512,
        }
    }
}

impl Bf16Unit {
    /// The best that this CPU has, and that the system lets this process use.
    pub fn detect() -> Self {
        static UNIT: OnceLock<Bf16Unit> = OnceLock::new();
        *UNIT.get_or_init(|| {
            #[cfg(target_arch = "x86_64")]
            if Isa::detect() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16") {
                return if super::amx::enable() { Self::Amx } else { Self::Avx512 };
            }
            Self::None
        })
    }
}

/// One instruction set. All functions are `unsafe`: the caller must have seen that the CPU has it, and pointers must
/// be readable for `LANES` elements.
pub(crate) trait Simd: Copy {
    /// One vector register of f32.
    type Vector: Copy;
    /// Elements in it.
    const LANES: usize;

    unsafe fn zero() -> Self::Vector;
    unsafe fn splat(value: f32) -> Self::Vector;
    unsafe fn load(from: *const f32) -> Self::Vector;
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector;
    unsafe fn load_i8(from: *const i8) -> Self::Vector;
    unsafe fn store(vector: Self::Vector, to: *mut f32);
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector;
    /// `a * b + c`.
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;
    /// Sum of the lanes, in an order that depends on nothing.
    unsafe fn sum(vector: Self::Vector) -> f32;

    /// `silu(gate) · up` of 16 elements.
    #[inline(always)]
    unsafe fn swiglu(gate: &[f32; 16], up: &[f32; 16]) -> [f32; 16] {
        let mut out = [0f32; 16];
        for lane in 0..16 {
            out[lane] = super::silu(gate[lane]) * up[lane];
        }
        out
    }
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type Vector = [f32; 8];
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn zero() -> Self::Vector {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Vector {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::Vector {
        // SAFETY: readable for LANES elements, by the contract of the trait.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self::Vector {
        // SAFETY: readable for LANES elements, by the contract of the trait.
        unsafe { from.cast::<[bf16; 8]>().read_unaligned() }.map(bf16::to_f32)
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self::Vector {
        // SAFETY: readable for LANES elements, by the contract of the trait.
        unsafe { from.cast::<[i8; 8]>().read_unaligned() }.map(f32::from)
    }

    #[inline(always)]
    unsafe fn store(vector: Self::Vector, to: *mut f32) {
        // SAFETY: writable for LANES elements, by the contract of the trait.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(vector) }
    }

    #[inline(always)]
    unsafe fn mul(a: Self::Vector, b: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] * b[i])
    }

    #[inline(always)]
    unsafe fn mul_add(a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }

    #[inline(always)]
    unsafe fn sum(v: Self::Vector) -> f32 {
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! AVX2 and AVX-512.

    use std::arch::x86_64::*;

    use half::bf16;

    use super::Simd;

    /// AVX2 with FMA.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2;

    /// AVX-512F.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512;

    impl Simd for Avx2 {
        type Vector = __m256;
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn zero() -> __m256 {
            // SAFETY: AVX2 is there, by the contract of the trait; so below.
            unsafe { _mm256_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m256 {
            // SAFETY: AVX2 is there, by the contract of the trait.
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m256 {
            // SAFETY: readable for LANES elements, by the contract of the trait.
            unsafe { _mm256_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m256 {
            // SAFETY: readable for LANES elements. A bf16 is the upper half of an f32.
            unsafe {
                let half = _mm_loadu_si128(from.cast());
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)))
            }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> __m256 {
            // SAFETY: readable for LANES elements, by the contract of the trait.
            unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn store(vector: __m256, to: *mut f32) {
            // SAFETY: writable for LANES elements, by the contract of the trait.
            unsafe { _mm256_storeu_ps(to, vector) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            // SAFETY: AVX2 is there, by the contract of the trait.
            unsafe { _mm256_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul_add(a: __m256, b: __m256, c: __m256) -> __m256 {
            // SAFETY: FMA is there, by the contract of the trait.
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }

        #[inline(always)]
        unsafe fn sum(v: __m256) -> f32 {
            // SAFETY: AVX2 is there, by the contract of the trait.
            unsafe {
                let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
                let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
                _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
            }
        }
    }

    impl Simd for Avx512 {
        type Vector = __m512;
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> __m512 {
            // SAFETY: AVX-512F is there, by the contract of the trait; so below.
            unsafe { _mm512_setzero_ps() }
        }

        #[inline(always)]
        unsafe fn splat(value: f32) -> __m512 {
            // SAFETY: AVX-512F is there, by the contract of the trait.
            unsafe { _mm512_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> __m512 {
            // SAFETY: readable for LANES elements, by the contract of the trait.
            unsafe { _mm512_loadu_ps(from) }
        }

        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> __m512 {
            // SAFETY: readable for LANES elements. A bf16 is the upper half of an f32.
            unsafe {
                let half = _mm256_loadu_si256(from.cast());
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(half)))
            }
        }

        #[inline(always)]
        unsafe fn load_i8(from: *const i8) -> __m512 {
            // SAFETY: readable for LANES elements, by the contract of the trait.
            unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
        }

        #[inline(always)]
        unsafe fn store(vector: __m512, to: *mut f32) {
            // SAFETY: writable for LANES elements, by the contract of the trait.
            unsafe { _mm512_storeu_ps(to, vector) }
        }

        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            // SAFETY: AVX-512F is there, by the contract of the trait.
            unsafe { _mm512_mul_ps(a, b) }
        }

        #[inline(always)]
        unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
            // SAFETY: AVX-512F is there, by the contract of the trait.
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }

        /// Without a division, which takes longer than all the rest: an estimate of the reciprocal and a step of Newton's method are as
        /// good as f32. Elsewhere as [`super::super::silu`].
        #[inline(always)]
        unsafe fn swiglu(gate: &[f32; 16], up: &[f32; 16]) -> [f32; 16] {
            let mut out = [0f32; 16];
            // SAFETY: AVX-512F is there, by the contract of the trait; arrays hold one vector each.
            unsafe {
                let (gate, up) = (_mm512_loadu_ps(gate.as_ptr()), _mm512_loadu_ps(up.as_ptr()));
                let set = |x: f32| _mm512_set1_ps(x);
                // The order of operands lets what is no number through.
                let x = _mm512_sub_ps(_mm512_setzero_ps(), gate);
                let x = _mm512_min_ps(set(87.0), _mm512_max_ps(set(-87.0), x));
                let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm512_mul_ps(
                    x,
                    set(std::f32::consts::LOG2_E),
                ));
                let r = _mm512_fnmadd_ps(n, set(-2.121_944_4e-4), _mm512_fnmadd_ps(n, set(0.693_359_4), x));
                let p = _mm512_fmadd_ps(set(1.987_569_1e-4), r, set(1.398_199_9e-3));
                let p = _mm512_fmadd_ps(p, r, set(8.333_452e-3));
                let p = _mm512_fmadd_ps(p, r, set(4.166_579_6e-2));
                let p = _mm512_fmadd_ps(p, r, set(1.666_666_5e-1));
                let p = _mm512_fmadd_ps(p, r, set(0.5));
                let p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, set(1.0)));
                let d = _mm512_add_ps(set(1.0), _mm512_scalef_ps(p, n));
                let y = _mm512_rcp14_ps(d);
                let y = _mm512_mul_ps(y, _mm512_fnmadd_ps(d, y, set(2.0)));
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(_mm512_mul_ps(gate, y), up));
            }
            out
        }

        #[inline(always)]
        unsafe fn sum(v: __m512) -> f32 {
            // SAFETY: AVX-512F is there, by the contract of the trait.
            unsafe { _mm512_reduce_add_ps(v) }
        }
    }
}
