//! Measuring on a GPU: what it is, its limits, and where the time of a step goes by kinds of kernels.

use std::fmt;

use hardmax_kernels::{
    Device, Stream,
    limits::{Config, EMULATED, Meter},
};
use serde::Serialize;

use super::limits::{Limit, LimitConfig, Readings};
use crate::error::{Error, Result};

/// The GPU of a run.
#[derive(Clone, Debug, Serialize)]
pub(super) struct GpuFacts {
    /// As its maker calls it.
    pub name: String,
    /// As `9.0`.
    pub compute_capability: String,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of the second-level cache.
    pub l2_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Newest CUDA that the driver runs: 13000 is 13.0.
    pub driver: u32,
    /// CUDA that this program was built with.
    pub cuda: u32,
    /// The kernels ran on the processor: then no figure says anything about a GPU.
    pub emulated: bool,
}

impl GpuFacts {
    /// Of the first GPU.
    pub(super) fn read() -> Result<Self> {
        let device = Device::open(0)?;
        let properties = device.properties();
        let (major, minor) = properties.capability;
        Ok(Self {
            name: properties.name.clone(),
            compute_capability: format!("{major}.{minor}"),
            multiprocessors: properties.multiprocessors,
            l2_bytes: properties.l2_bytes,
            memory_bytes: properties.total_bytes,
            driver: properties.driver,
            cuda: properties.runtime,
            emulated: EMULATED,
        })
    }
}

impl fmt::Display for GpuFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, compute_capability, multiprocessors, memory_bytes, driver, cuda, emulated, .. } = self;
        let version = |number: u32| format!("{}.{}", number / 1000, number % 1000 / 10);
        write!(f, "{name}, compute capability {compute_capability}, {multiprocessors} multiprocessors, {} GiB; ", memory_bytes >> 30)?;
        write!(f, "CUDA {}, driver up to {}", version(*cuda), version(*driver))?;
        if *emulated { f.write_str("; emulated: no figure says anything about a GPU") } else { Ok(()) }
    }
}

/// Memory and matrices on the first GPU.
#[derive(Debug)]
pub(super) struct GpuMeter(Meter);

impl GpuMeter {
    /// What `limits` asks for; in an emulator, what it can do.
    pub(super) fn new(limits: LimitConfig) -> Result<Self> {
        if !limits.gemm_size.is_multiple_of(8) {
            return Err(Error::invalid("--gemm-size", format!("{}: on a GPU a multiple of 8", limits.gemm_size)));
        }
        let device = Device::open(0)?;
        let default = Config::of(device.properties());
        let config = if EMULATED { default } else { Config { buffer_bytes: limits.buffer_bytes, gemm_size: limits.gemm_size, ..default } };
        Ok(Self(Meter::new(Stream::create()?, device.properties(), config)?))
    }

    /// What is measured: bytes of the buffer, and rows and columns of the matrices.
    pub(super) fn sizes(&self) -> (usize, usize) {
        let config = self.0.config();
        (config.buffer_bytes, config.gemm_size)
    }

    /// Takes a reading.
    pub(super) fn read(&mut self) -> Result<Readings> {
        let found = self.0.read()?;
        let mut reading = Readings::default();
        reading.push(Limit { bandwidth: found.read, flops: found.flops });
        reading.copy_bandwidth.push(found.copy);
        Ok(reading)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::DType;

    use super::{
        super::{
            Placement, Source, Subject, run_steps,
            steps::{StepsConfig, Work},
        },
        *,
    };
    use crate::{
        model::load::{DeviceKind, WeightType},
        moe::policy::RoutingChoice,
        ops::cpu::Reduction,
    };

    #[test]
    fn a_model_is_measured_on_a_gpu() {
        let source = Source::Synthetic("tiny,layers=1,context=64".parse().unwrap());
        let placement = Placement { device: DeviceKind::Cuda, weights: WeightType::Auto, reduction: Reduction::Fastest, seed: 3 };
        let subject = Subject::load(&source, placement).unwrap();
        let config = StepsConfig {
            works: vec![Work::Prefill, Work::Decode],
            routings: vec![RoutingChoice::Native],
            batches: vec![1, 3],
            prompt_tokens: vec![20],
            contexts: vec![5],
            generate: 3,
            step_tokens: 32,
            repeats: 1,
            seed: 1,
        };
        let limits = LimitConfig { device: DeviceKind::Cuda, buffer_bytes: 1 << 20, gemm_size: 64, dtype: DType::BF16 };
        let report = run_steps(&subject, &config, Some(limits)).unwrap();
        assert_eq!(report.steps.len(), 4);
        for m in &report.steps {
            assert!(m.roofline_share >= m.bandwidth_share && m.roofline_share >= m.flops_share && m.roofline_share > Some(0.0), "{m:?}");
            assert_eq!((m.attention_share, m.experts_share, m.experts_seconds_per_token), (None, None, None));
            let shares: f64 = m.classes.iter().map(|time| time.share).sum();
            assert!((shares - 1.0).abs() < 1e-9 && m.classes.iter().any(|time| time.class == "experts"), "{m:?}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["gpu"]["emulated"], EMULATED);
        assert!(json["limits"]["copy_bandwidth"].as_f64() > Some(0.0) && json["steps"][0]["bytes_per_step"].as_f64() > Some(0.0), "{json}");
        let text = report.to_string();
        assert!(text.contains("by kinds of kernels") && text.contains("of roofline") && text.contains("compute capability"), "{text}");
    }

    #[test]
    fn matrices_that_cublas_does_not_take_are_refused() {
        let limits = LimitConfig { device: DeviceKind::Cuda, buffer_bytes: 1 << 20, gemm_size: 12, dtype: DType::BF16 };
        assert!(GpuMeter::new(limits).unwrap_err().to_string().contains("--gemm-size"));
    }
}
