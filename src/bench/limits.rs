//! What this machine can do at best, read in the same run as what is compared with it: other tenants come and go.
//!
//! Bandwidth: every thread sums a share of a buffer larger than the last-level cache, with the widest loads of the CPU
//! and nothing written. That is the pattern of decoding. Operations: the fastest of the matrix products that this
//! program has, on one large square problem. Of a GPU, both are those of `hardmax_kernels::limits`: streaming reads of its memory, and cuBLAS.

use std::{fs, hint::black_box, path::Path, time::Instant};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use serde::Serialize;

#[cfg(feature = "gpu")]
use super::gpu::GpuMeter;
use super::stats::Sample;
use crate::{
    error::{Error, Result},
    model::load::DeviceKind,
    ops::cpu::{Arithmetic, Data, Input, Isa, Matrix, Output, Product, Reduction, Scratch, Store},
};

/// Words that one thread sums before it takes the next piece: 4 MiB.
const PIECE: usize = 1 << 19;

/// Sweeps and products of one reading: they are short, and the machine is not the same from moment to moment.
const SAMPLES: usize = 3;

/// How limits are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LimitConfig {
    /// Whose limits.
    pub device: DeviceKind,
    /// Bytes of the buffer that is read.
    pub buffer_bytes: usize,
    /// Rows and columns of the matrices that are multiplied.
    pub gemm_size: usize,
    /// Element type of the weights: whose products count.
    pub dtype: DType,
}

/// What to measure with, and the readings so far.
#[derive(Debug)]
pub struct Limits {
    meter: Meter,
    readings: Readings,
}

#[derive(Debug)]
enum Meter {
    Host(HostMeter),
    #[cfg(feature = "gpu")]
    Gpu(GpuMeter),
}

/// A buffer, and the fastest matrix product.
#[derive(Debug)]
struct HostMeter {
    words: Vec<u64>,
    routine: Routine,
}

/// Everything that was read, in order.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Readings {
    /// Bytes per second.
    pub bandwidth: Sample,
    /// Operations per second of the best routine of each reading.
    pub flops: Sample,
    /// Bytes per second, read and written, where memory is copied. Of GPUs only: no share is of it.
    #[serde(skip_serializing_if = "Sample::is_empty")]
    pub copy_bandwidth: Sample,
}

/// Medians of readings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Limit {
    /// Bytes per second.
    pub bandwidth: f64,
    /// Operations per second.
    pub flops: f64,
}

/// A way to multiply two square matrices.
#[derive(Debug)]
struct Routine {
    name: &'static str,
    size: usize,
    operands: Operands,
}

/// Whose product it is, and of what.
#[derive(Debug)]
enum Operands {
    /// candle's, through the `gemm` crate.
    Candle(Tensor),
    /// The kernels of this program.
    F32(Vec<f32>),
    /// As above, with narrow weights.
    Bf16(Vec<f32>, Vec<bf16>),
}

impl Limits {
    /// Allocates, fills, and finds out which routine is fastest. Takes a second or two.
    pub fn new(config: LimitConfig) -> Result<Self> {
        let meter = match config.device {
            #[cfg(feature = "gpu")]
            DeviceKind::Cuda => Meter::Gpu(GpuMeter::new(config)?),
            _ => Meter::Host(HostMeter::new(config)?),
        };
        Ok(Self { meter, readings: Readings::default() })
    }

    /// Takes a reading of all limits, and returns it.
    pub fn read(&mut self) -> Result<Readings> {
        let reading = match &mut self.meter {
            Meter::Host(meter) => meter.read()?,
            #[cfg(feature = "gpu")]
            Meter::Gpu(meter) => meter.read()?,
        };
        self.readings.extend(&reading);
        Ok(reading)
    }

    /// All readings.
    pub fn readings(&self) -> &Readings {
        &self.readings
    }

    /// Size of the buffer that is read, and rows and columns of the matrices.
    pub fn sizes(&self) -> (usize, usize) {
        match &self.meter {
            Meter::Host(meter) => (size_of_val(&meter.words[..]), meter.routine.size),
            #[cfg(feature = "gpu")]
            Meter::Gpu(meter) => meter.sizes(),
        }
    }

    /// The routine whose speed is the limit.
    pub fn routine(&self) -> &'static str {
        match &self.meter {
            Meter::Host(meter) => meter.routine.name,
            #[cfg(feature = "gpu")]
            Meter::Gpu(_) => "cuBLAS bf16 product",
        }
    }
}

impl HostMeter {
    fn new(config: LimitConfig) -> Result<Self> {
        let mut words = vec![0u64; (config.buffer_bytes / size_of::<u64>()).max(1)];
        // Pages that were never written are all the same one.
        words.par_chunks_mut(PIECE).enumerate().for_each(|(index, piece)| piece.fill(index as u64 + 1));
        let mut routines = routines(config)?;
        let mut speeds = Vec::with_capacity(routines.len());
        for routine in &routines {
            routine.flops()?;
            speeds.push(routine.flops()?);
        }
        let best = (0..speeds.len()).max_by(|&a, &b| speeds[a].total_cmp(&speeds[b]));
        let best = best.ok_or_else(|| Error::Internal("no matrix product to measure".into()))?;
        tracing::debug!(routines = ?routines.iter().map(|r| r.name).zip(&speeds).collect::<Vec<_>>(), "matrix products");
        Ok(Self { words, routine: routines.swap_remove(best) })
    }

    fn read(&self) -> Result<Readings> {
        let mut reading = Readings::default();
        for _ in 0..SAMPLES {
            let start = Instant::now();
            black_box(sum(&self.words));
            let bandwidth = size_of_val(&self.words[..]) as f64 / start.elapsed().as_secs_f64();
            reading.push(Limit { bandwidth, flops: self.routine.flops()? });
        }
        Ok(reading)
    }
}

impl Readings {
    /// Medians; 0 where there is no reading.
    pub fn limit(&self) -> Limit {
        Limit { bandwidth: self.bandwidth.median().unwrap_or(0.0), flops: self.flops.median().unwrap_or(0.0) }
    }

    /// All values of another reading.
    pub fn extend(&mut self, other: &Self) {
        self.bandwidth.extend(&other.bandwidth);
        self.flops.extend(&other.flops);
        self.copy_bandwidth.extend(&other.copy_bandwidth);
    }

    /// One value more of each.
    pub fn push(&mut self, limit: Limit) {
        self.bandwidth.push(limit.bandwidth);
        self.flops.push(limit.flops);
    }
}

impl Routine {
    /// Operations per second of one product.
    fn flops(&self) -> Result<f64> {
        let start = Instant::now();
        match &self.operands {
            Operands::Candle(matrix) => drop(black_box(matrix.matmul(matrix)?)),
            Operands::F32(x) => own_product(x, Data::F32(x), self.size),
            Operands::Bf16(x, weights) => own_product(x, Data::Bf16(weights), self.size),
        }
        Ok(2.0 * (self.size as f64).powi(3) / start.elapsed().as_secs_f64())
    }
}

/// `[size, size]` activations times as many weights, with the fastest instructions of this CPU.
fn own_product(x: &[f32], weights: Data<'_>, size: usize) {
    let product = Product { weights: Matrix::new(weights, size, size), rows: 0..size, column: 0 };
    let mut values = vec![0f32; size * size];
    let output = Output { values: &mut values, stride: size, store: Store::Set };
    let input = Input { x, k: size, source: None };
    Arithmetic::detect(Reduction::default()).linear(&mut Scratch::default(), input, &[product], output);
    black_box(values);
}

/// All matrix products of the program for weights of a dtype.
fn routines(config: LimitConfig) -> Result<Vec<Routine>> {
    let size = config.gemm_size;
    let values: Vec<f32> = (0..size * size).map(|i| ((i * 7919) % 997) as f32 / 997.0 - 0.5).collect();
    let candle = Operands::Candle(Tensor::from_slice(&values, (size, size), &Device::Cpu)?);
    let (name, own) = if config.dtype == DType::F32 {
        ("hardmax f32 product", Operands::F32(values))
    } else {
        let narrow = values.iter().map(|&value| bf16::from_f32(value)).collect();
        ("hardmax bf16 product", Operands::Bf16(values, narrow))
    };
    Ok(vec![Routine { name: "candle f32 matmul", size, operands: candle }, Routine { name, size, operands: own }])
}

/// The sum of all words, by all threads.
fn sum(words: &[u64]) -> u64 {
    let isa = Isa::detect();
    words.par_chunks(PIECE).map(|piece| sum_piece(isa, piece)).reduce(|| 0, u64::wrapping_add)
}

fn sum_piece(isa: Isa, words: &[u64]) -> u64 {
    match isa {
        // SAFETY: `Isa::detect` has seen AVX-512F.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { sum_avx512(words) },
        // SAFETY: `Isa::detect` has seen AVX2.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { sum_avx2(words) },
        _ => sum_lanes::<8>(words),
    }
}

/// Independent sums side by side, which compilers turn into vector registers.
#[inline(always)]
fn sum_lanes<const LANES: usize>(words: &[u64]) -> u64 {
    let (rows, rest) = words.as_chunks::<LANES>();
    let mut lanes = [0u64; LANES];
    for row in rows {
        for (lane, word) in lanes.iter_mut().zip(row) {
            *lane = lane.wrapping_add(*word);
        }
    }
    lanes.iter().chain(rest).fold(0, |sum, word| sum.wrapping_add(*word))
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn sum_avx2(words: &[u64]) -> u64 {
    sum_lanes::<32>(words)
}

/// Four registers of eight words.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn sum_avx512(words: &[u64]) -> u64 {
    use std::arch::x86_64::{_mm512_add_epi64, _mm512_loadu_si512, _mm512_reduce_add_epi64, _mm512_setzero_si512};
    let (rows, rest) = words.as_chunks::<32>();
    let mut sums = [_mm512_setzero_si512(); 4];
    for row in rows {
        for (sum, part) in sums.iter_mut().zip(row.as_chunks::<8>().0) {
            // SAFETY: `part` is 8 words.
            let part = unsafe { _mm512_loadu_si512(part.as_ptr().cast()) };
            *sum = _mm512_add_epi64(*sum, part);
        }
    }
    let vectors = sums.into_iter().map(|sum| _mm512_reduce_add_epi64(sum) as u64);
    vectors.chain(rest.iter().copied()).fold(0, u64::wrapping_add)
}

/// Bytes of the largest cache of the first CPU, as Linux tells; `None` where it does not.
pub fn last_level_cache() -> Option<usize> {
    let folder = Path::new("/sys/devices/system/cpu/cpu0/cache");
    let sizes = fs::read_dir(folder).ok()?.filter_map(|entry| {
        let text = fs::read_to_string(entry.ok()?.path().join("size")).ok()?;
        cache_size(text.trim())
    });
    sizes.max()
}

fn cache_size(text: &str) -> Option<usize> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_set_reads_every_word() {
        let words: Vec<u64> = (0..1003).map(|i| i * i + (1 << 40)).collect();
        let expected = words.iter().sum::<u64>();
        assert_eq!(sum_piece(Isa::Portable, &words), expected);
        assert_eq!(sum_piece(Isa::detect(), &words), expected);
        assert_eq!(sum_lanes::<32>(&words), expected);
        assert_eq!(sum(&words), expected);
    }

    #[test]
    fn limits_are_medians_of_readings() {
        let mut readings = Readings::default();
        assert_eq!(readings.limit(), Limit::default());
        for (bandwidth, flops) in [(1.0, 30.0), (9.0, 10.0), (2.0, 20.0)] {
            readings.push(Limit { bandwidth, flops });
        }
        assert_eq!(readings.limit(), Limit { bandwidth: 2.0, flops: 20.0 });
    }

    #[test]
    fn sizes_of_caches() {
        assert_eq!(cache_size("307200K"), Some(300 << 20));
        assert_eq!(cache_size("2M"), Some(2 << 20));
        assert_eq!(cache_size("48T"), None);
    }
}
