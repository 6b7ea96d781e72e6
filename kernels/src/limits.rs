//! What a device can do at best, measured: how fast it reads memory and copies it, and how fast cuBLAS multiplies.
//!
//! Times are CUDA's events around single launches, after one that warms up. An emulator has no limits worth knowing: there the sizes are tiny, and the
//! figures mean nothing ([`EMULATED`]).

use std::{ffi::c_void, ptr};

use half::bf16;

use crate::{
    Buffer, Error, Event, Properties, Result, Stream, View,
    error::{check, expect_len, int},
    fill,
    linear::{Blas, Linear},
};

/// Whether kernels run on the processor: then no figure says anything about a GPU.
pub const EMULATED: bool = cfg!(feature = "emulated");

/// Blocks that one multiprocessor holds at once.
const BLOCKS: usize = 8;

#[repr(C)]
struct Args {
    from: *const u32,
    to: *mut u32,
    sums: *mut u32,
    len: i64,
    blocks: i32,
    reserved: i32,
}

unsafe extern "C" {
    fn hm_stream_tile_bytes() -> i64;
    fn hm_stream_copy(args: *const Args, stream: *mut c_void) -> i32;
    fn hm_stream_read(args: *const Args, stream: *mut c_void) -> i32;
}

/// How limits are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Bytes of the buffer that is read, and of its copy; rounded to what kernels take at once.
    pub buffer_bytes: usize,
    /// Rows and columns of the matrices that are multiplied; a multiple of 8.
    pub gemm_size: usize,
    /// Launches of one reading, of which it has the median.
    pub repeats: usize,
}

/// Medians of one reading.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Reading {
    /// Bytes per second where memory is only read.
    pub read: f64,
    /// Bytes per second, those read and those written, where it is copied.
    pub copy: f64,
    /// Operations per second of a dense product of bf16, accumulated in f32.
    pub flops: f64,
}

/// Memory to measure with.
#[derive(Debug)]
pub struct Meter {
    config: Config,
    stream: Stream,
    blas: Blas,
    blocks: usize,
    from: Buffer<u32>,
    to: Buffer<u32>,
    sums: Buffer<u32>,
    /// Two factors and their product.
    matrices: [Buffer<bf16>; 3],
    events: [Event; 2],
}

impl Config {
    /// For this device: buffers of 1 GiB, or of 16 times its second-level cache if that is more, and matrices of 8192 x 8192.
    pub fn of(device: &Properties) -> Self {
        if EMULATED {
            return Self { buffer_bytes: 1 << 16, gemm_size: 32, repeats: 1 };
        }
        Self { buffer_bytes: device.l2_bytes.saturating_mul(16).max(1 << 30), gemm_size: 8192, repeats: 10 }
    }
}

impl Meter {
    /// Allocates and fills.
    ///
    /// # Errors
    /// `OutOfMemory` where the device has no room for two buffers and three matrices.
    pub fn new(stream: Stream, device: &Properties, config: Config) -> Result<Self> {
        if config.gemm_size == 0 || !config.gemm_size.is_multiple_of(8) || config.repeats == 0 {
            return Err(Error::shape("limits", format!("{config:?}: the matrices need a multiple of 8, and the readings a launch")));
        }
        let tile = tile_bytes();
        let config = Config { buffer_bytes: config.buffer_bytes.div_ceil(tile).max(1) * tile, ..config };
        let words = config.buffer_bytes / size_of::<u32>();
        let (from, to) = (Buffer::<u32>::new(stream, words, "reading limits")?, Buffer::zeros(stream, words, "reading limits")?);
        // SAFETY: as many floats as there are words; any bits are a value of either.
        fill::normal(unsafe { View::<f32>::from_raw(from.view().as_mut_ptr().cast(), words) }, 1, 1.0, stream)?;
        let blocks = device.multiprocessors * BLOCKS;
        let matrix = |seed: u64| {
            let matrix = Buffer::new(stream, config.gemm_size * config.gemm_size, "reading limits")?;
            // Numbers as in use: a product of zeros takes less power, and is faster.
            fill::normal(matrix.view(), seed, 1.0, stream).map(|()| matrix)
        };
        Ok(Self {
            config,
            stream,
            blas: Blas::new(stream)?,
            blocks,
            from,
            to,
            sums: Buffer::zeros(stream, blocks, "reading limits")?,
            matrices: [matrix(2)?, matrix(3)?, matrix(4)?],
            events: [Event::new()?, Event::new()?],
        })
    }

    /// What is measured, as it came out of rounding.
    pub fn config(&self) -> Config {
        self.config
    }

    /// Takes a reading. Waits for it, and for everything before it.
    pub fn read(&mut self) -> Result<Reading> {
        let (bytes, size) = (self.config.buffer_bytes as f64, self.config.gemm_size as f64);
        let read = self.seconds(|meter| read(meter.from.view(), meter.sums.view(), meter.stream))?;
        let copied = self.seconds(|meter| copy(meter.from.view(), meter.to.view(), meter.blocks, meter.stream))?;
        let multiplied = self.seconds(Self::multiply)?;
        Ok(Reading { read: bytes / read, copy: 2.0 * bytes / copied, flops: 2.0 * size.powi(3) / multiplied })
    }

    fn multiply(&mut self) -> Result<()> {
        let size = self.config.gemm_size;
        let [x, weight, y] = &self.matrices;
        let product = Linear { x: x.view(), weight: weight.view(), y: y.view(), stride: size, rows: size, n: size, k: size, add: false };
        self.blas.linear(product)
    }

    /// The median of the launches.
    fn seconds(&mut self, mut launch: impl FnMut(&mut Self) -> Result<()>) -> Result<f64> {
        launch(self)?;
        let mut all = Vec::with_capacity(self.config.repeats);
        for _ in 0..self.config.repeats {
            self.events[0].record(self.stream)?;
            launch(self)?;
            self.events[1].record(self.stream)?;
            self.stream.synchronize()?;
            // What took no time that can be told took as long as can be told.
            all.push(f64::from(self.events[0].milliseconds_to(&self.events[1])?).max(1e-6) * 1e-3);
        }
        all.sort_by(f64::total_cmp);
        Ok((all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0)
    }
}

/// Bytes that a block takes at once: buffers are multiples of it.
pub(crate) fn tile_bytes() -> usize {
    // SAFETY: it is a number.
    unsafe { hm_stream_tile_bytes() as usize }
}

/// Reads all of `from` with a block for each element of `sums`, which get the exclusive or of what each of them read.
pub(crate) fn read(from: View<'_, u32>, sums: View<'_, u32>, stream: Stream) -> Result<()> {
    let args = args("stream_read", from, ptr::null_mut(), sums.as_mut_ptr(), sums.len())?;
    // SAFETY: `from` is whole tiles, `sums` has an element for each block.
    check("stream_read", unsafe { hm_stream_read(&args, stream.raw()) })
}

/// Copies all of `from` with so many blocks.
pub(crate) fn copy(from: View<'_, u32>, to: View<'_, u32>, blocks: usize, stream: Stream) -> Result<()> {
    expect_len("stream_copy", "the target", to.len(), from.len())?;
    let args = args("stream_copy", from, to.as_mut_ptr(), ptr::null_mut(), blocks)?;
    // SAFETY: `from` is whole tiles, `to` has as many.
    check("stream_copy", unsafe { hm_stream_copy(&args, stream.raw()) })
}

fn args(kernel: &'static str, from: View<'_, u32>, to: *mut u32, sums: *mut u32, blocks: usize) -> Result<Args> {
    let bytes = from.len() * size_of::<u32>();
    if !bytes.is_multiple_of(tile_bytes()) || blocks == 0 {
        return Err(Error::shape(
            kernel,
            format!("{bytes} bytes for {blocks} blocks: it has to be a multiple of {}, for one block or more", tile_bytes()),
        ));
    }
    Ok(Args { from: from.as_ptr(), to, sums, len: (bytes / 16) as i64, blocks: int(kernel, "blocks", blocks)?, reserved: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    #[test]
    fn a_reading_has_all_limits() {
        let device = Device::open(0).unwrap();
        let config = Config { buffer_bytes: 1, ..Config::of(device.properties()) };
        let mut meter = Meter::new(Stream::create().unwrap(), device.properties(), config).unwrap();
        assert_eq!(meter.config().buffer_bytes, tile_bytes());
        let Reading { read, copy, flops } = meter.read().unwrap();
        assert!(read > 0.0 && copy > 0.0 && flops > 0.0, "{read} {copy} {flops}");
        let copied = (meter.from.to_vec().unwrap(), meter.to.to_vec().unwrap());
        assert_eq!(copied.0, copied.1);
        let wrong = Config { gemm_size: 12, ..config };
        assert!(Meter::new(meter.stream, device.properties(), wrong).unwrap_err().to_string().contains("multiple of 8"));
    }
}
