//! Experts with many rows: the grouped GEMM on tensor cores, and what surrounds it. Sizes and pointers of experts stay on the device.
//!
//! `x [T, D]` -> [`GatherRows`] `[R, D]` -> [`Gemm`] with `gate_up` `[R, 2F]` -> [`SiluMul`] `[R, F]` -> [`Gemm`] with `down` `[R, D]`. The host knows of R
//! only that it is at most T times the slots of a token. Weights in e4m3 pass through [`DequantizeExperts`] first.

use std::{ffi::c_void, ptr};

use half::bf16;

use crate::{
    Error, Properties, Result, Stream, View,
    error::{check, expect_aligned, expect_len, int},
    experts::scales_len,
};

/// 16 bytes of bf16: what TMA and the kernels read at once.
const CHUNK: usize = 8;

/// Where the tables in a workspace may begin: memory of a buffer does.
const WORKSPACE_ALIGNMENT: usize = 256;

#[repr(C)]
struct GroupedArgs {
    x: *const bf16,
    weight: *const bf16,
    y: *mut bf16,
    offsets: *const u32,
    workspace: *mut c_void,
    workspace_bytes: i64,
    experts: i32,
    max_rows: i32,
    n: i32,
    k: i32,
    multiprocessors: i32,
    tile_rows: i32,
}

#[repr(C)]
struct GatherRowsArgs {
    x: *const bf16,
    rows: *const u32,
    offsets: *const u32,
    out: *mut bf16,
    experts: i32,
    max_rows: i32,
    width: i32,
    slots: i32,
}

#[repr(C)]
struct SiluMulArgs {
    gate_up: *const bf16,
    offsets: *const u32,
    out: *mut bf16,
    experts: i32,
    max_rows: i32,
    width: i32,
}

#[repr(C)]
struct DequantizeExpertsArgs {
    weight: *const u8,
    scales: *const f32,
    offsets: *const u32,
    out: *mut bf16,
    experts: i32,
    n: i32,
    k: i32,
}

unsafe extern "C" {
    fn hm_grouped_sm90(args: *const GroupedArgs, stream: *mut c_void) -> i32;
    fn hm_grouped_sm90_workspace(experts: i32, multiprocessors: i32) -> i64;
    fn hm_grouped_tiled(args: *const GroupedArgs, stream: *mut c_void) -> i32;
    fn hm_gather_rows(args: *const GatherRowsArgs, stream: *mut c_void) -> i32;
    fn hm_silu_mul(args: *const SiluMulArgs, stream: *mut c_void) -> i32;
    fn hm_dequantize_experts(args: *const DequantizeExpertsArgs, stream: *mut c_void) -> i32;
}

/// Which implementation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// TMA and wgmma, for compute capability 9.0: `grouped_sm90.cu`.
    Hopper,
    /// `cp.async` and `mma`, from 8.0 on: `grouped_tiled.cu`.
    Tiled,
}

/// How many rows of x a tile takes, each with 128 rows of weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tile {
    /// 32.
    Rows32,
    /// 64.
    Rows64,
    /// 128.
    Rows128,
    /// 256, on Hopper alone.
    Rows256,
}

/// The grouped GEMM on one device.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    path: Path,
    multiprocessors: usize,
}

/// `y[r] = weight[e] · x[r]` for the rows r of expert e, `offsets[e] .. offsets[e + 1]`, accumulated in f32 and rounded to bf16.
#[derive(Clone, Copy, Debug)]
pub struct Grouped<'a> {
    /// `[max_rows, k]`: rows in the order of their experts.
    pub x: View<'a, bf16>,
    /// `[experts, n, k]`.
    pub weight: View<'a, bf16>,
    /// `[max_rows, n]`. Rows from `offsets[experts]` on are left as they are.
    pub y: View<'a, bf16>,
    /// `[experts + 1]`, ascending from 0 to at most `max_rows`.
    pub offsets: View<'a, u32>,
    /// [`Gemm::workspace_bytes`] of them; what runs on one stream may share it.
    pub workspace: View<'a, u8>,
    /// Experts.
    pub experts: usize,
    /// The most rows there can be.
    pub max_rows: usize,
    /// Rows of an expert's weights, a multiple of 8.
    pub n: usize,
    /// Columns of an expert's weights, a multiple of 8.
    pub k: usize,
}

/// Rows of tokens in the order of experts: `out[r] = x[rows[r] / slots]`.
#[derive(Clone, Copy, Debug)]
pub struct GatherRows<'a> {
    /// `[tokens, width]`.
    pub x: View<'a, bf16>,
    /// `[max_rows]`: the slot of each row. Those from `offsets[experts]` on are not read.
    pub rows: View<'a, u32>,
    /// `[experts + 1]`.
    pub offsets: View<'a, u32>,
    /// `[max_rows, width]`. Rows from `offsets[experts]` on are left as they are.
    pub out: View<'a, bf16>,
    /// Experts.
    pub experts: usize,
    /// Tokens.
    pub tokens: usize,
    /// Slots of a token.
    pub slots: usize,
    /// Elements of a row, a multiple of 8.
    pub width: usize,
}

/// `out = silu(gate) · up`, where a row of `gate_up` is the gate and then up.
#[derive(Clone, Copy, Debug)]
pub struct SiluMul<'a> {
    /// `[max_rows, 2 · width]`.
    pub gate_up: View<'a, bf16>,
    /// `[experts + 1]`.
    pub offsets: View<'a, u32>,
    /// `[max_rows, width]`. Rows from `offsets[experts]` on are left as they are.
    pub out: View<'a, bf16>,
    /// Experts.
    pub experts: usize,
    /// The most rows there can be.
    pub max_rows: usize,
    /// Elements of a row of `out`, a multiple of 8.
    pub width: usize,
}

/// Weights of experts in e4m3 with a scale per block of 128 x 128, as bf16.
#[derive(Clone, Copy, Debug)]
pub struct DequantizeExperts<'a> {
    /// `[experts, n, k]` e4m3.
    pub weight: View<'a, u8>,
    /// [`scales_len`] of them.
    pub scales: View<'a, f32>,
    /// `[experts + 1]`: experts without rows are left as they are. `None`: all are wanted.
    pub offsets: Option<View<'a, u32>>,
    /// `[experts, n, k]`.
    pub out: View<'a, bf16>,
    /// Experts.
    pub experts: usize,
    /// Rows of an expert's weights.
    pub n: usize,
    /// Columns of an expert's weights, a multiple of 8.
    pub k: usize,
}

// === impl Tile ===

impl Tile {
    /// The number that names it to the kernels.
    pub fn rows(self) -> usize {
        match self {
            Self::Rows32 => 32,
            Self::Rows64 => 64,
            Self::Rows128 => 128,
            Self::Rows256 => 256,
        }
    }
}

// === impl Gemm ===

impl Gemm {
    /// The best one for the device.
    pub fn of(properties: &Properties) -> Self {
        let path = if properties.capability == (9, 0) { Path::Hopper } else { Path::Tiled };
        Self::with_path(path, properties)
    }

    /// A certain one, for comparisons. Only capability 9.0 has [`Path::Hopper`]; elsewhere it cannot be launched.
    pub fn with_path(path: Path, properties: &Properties) -> Self {
        Self { path, multiprocessors: properties.multiprocessors }
    }

    /// Which implementation it is.
    pub fn path(self) -> Path {
        self.path
    }

    /// The tiles it has, ascending.
    pub fn tiles(self) -> &'static [Tile] {
        match self.path {
            Path::Hopper => &[Tile::Rows32, Tile::Rows64, Tile::Rows128, Tile::Rows256],
            Path::Tiled => &[Tile::Rows32, Tile::Rows64, Tile::Rows128],
        }
    }

    /// Which tile to take for `max_rows` rows over so many experts.
    ///
    /// Below some hundred rows per expert the time is that of reading the weights, so a tile should hold all rows of most experts: it has twice the rows
    /// of the average expert, since loads are uneven. Above, larger tiles reuse more of what they load, and it is the unused rest of each
    /// expert's last tile that costs: the largest tile waits until that rest is a sixteenth on average.
    pub fn tile(self, max_rows: usize, experts: usize) -> Tile {
        let average = max_rows.div_ceil(experts.max(1));
        match self.tiles().iter().find(|tile| 2 * average <= tile.rows()) {
            Some(Tile::Rows256) => Tile::Rows128,
            Some(&tile) => tile,
            None if average < 16 * Tile::Rows128.rows() => Tile::Rows128,
            None => self.tiles()[self.tiles().len() - 1],
        }
    }

    /// Bytes of workspace for so many experts.
    ///
    /// # Errors
    /// `Shape` beyond what kernels count to.
    pub fn workspace_bytes(self, experts: usize) -> Result<usize> {
        match self.path {
            Path::Hopper => {
                let (experts, multiprocessors) = (int(KERNEL, "experts", experts)?, int(KERNEL, "multiprocessors", self.multiprocessors)?);
                // SAFETY: a function of two numbers.
                Ok(unsafe { hm_grouped_sm90_workspace(experts, multiprocessors) }.max(0) as usize)
            }
            Path::Tiled => Ok(0),
        }
    }

    /// Launches one with the tile that [`Gemm::tile`] says.
    pub fn launch(self, grouped: Grouped<'_>, stream: Stream) -> Result<()> {
        self.launch_with(self.tile(grouped.max_rows, grouped.experts), grouped, stream)
    }

    /// Launches one with this tile.
    pub fn launch_with(self, tile: Tile, grouped: Grouped<'_>, stream: Stream) -> Result<()> {
        let args = self.args(tile, grouped)?;
        // SAFETY: the views are as long as the shapes say.
        let code = unsafe {
            match self.path {
                Path::Hopper => hm_grouped_sm90(&args, stream.raw()),
                Path::Tiled => hm_grouped_tiled(&args, stream.raw()),
            }
        };
        check(KERNEL, code)
    }

    fn args(self, tile: Tile, grouped: Grouped<'_>) -> Result<GroupedArgs> {
        let Grouped { x, weight, y, offsets, workspace, experts, max_rows, n, k } = grouped;
        if !self.tiles().contains(&tile) {
            return Err(Error::shape(KERNEL, format!("there is no tile of {} rows for {:?}", tile.rows(), self.path)));
        }
        if experts == 0 || n == 0 || k == 0 {
            return Err(Error::shape(KERNEL, format!("weights [{experts}, {n}, {k}] are none")));
        }
        expect_chunks(KERNEL, "n", n)?;
        expect_chunks(KERNEL, "k", k)?;
        expect_len(KERNEL, "x", x.len(), max_rows * k)?;
        expect_len(KERNEL, "weight", weight.len(), experts * n * k)?;
        expect_len(KERNEL, "y", y.len(), max_rows * n)?;
        expect_len(KERNEL, "offsets", offsets.len(), experts + 1)?;
        expect_len(KERNEL, "workspace", workspace.len(), self.workspace_bytes(experts)?)?;
        for (name, view) in [("x", x), ("weight", weight), ("y", y)] {
            expect_aligned(KERNEL, name, view)?;
        }
        if self.path == Path::Hopper && !workspace.as_ptr().addr().is_multiple_of(WORKSPACE_ALIGNMENT) {
            return Err(Error::shape(KERNEL, format!("the workspace does not begin at a multiple of {WORKSPACE_ALIGNMENT} bytes")));
        }
        Ok(GroupedArgs {
            x: x.as_ptr(),
            weight: weight.as_ptr(),
            y: y.as_mut_ptr(),
            offsets: offsets.as_ptr(),
            workspace: workspace.as_mut_ptr().cast(),
            workspace_bytes: workspace.len() as i64,
            experts: int(KERNEL, "experts", experts)?,
            max_rows: int(KERNEL, "max_rows", max_rows)?,
            n: int(KERNEL, "n", n)?,
            k: int(KERNEL, "k", k)?,
            multiprocessors: int(KERNEL, "multiprocessors", self.multiprocessors)?,
            tile_rows: tile.rows() as i32,
        })
    }
}

const KERNEL: &str = "grouped";

// === impl GatherRows, SiluMul, DequantizeExperts ===

impl GatherRows<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "gather_rows";
        let Self { x, rows, offsets, out, experts, tokens, slots, width } = self;
        let max_rows = tokens * slots;
        if max_rows == 0 {
            return Ok(());
        }
        expect_chunks(KERNEL, "width", width)?;
        expect_len(KERNEL, "x", x.len(), tokens * width)?;
        expect_len(KERNEL, "rows", rows.len(), max_rows)?;
        expect_len(KERNEL, "offsets", offsets.len(), experts + 1)?;
        expect_len(KERNEL, "out", out.len(), max_rows * width)?;
        expect_aligned(KERNEL, "x", x)?;
        expect_aligned(KERNEL, "out", out)?;
        expect_threads(KERNEL, max_rows, 32)?;
        let args = GatherRowsArgs {
            x: x.as_ptr(),
            rows: rows.as_ptr(),
            offsets: offsets.as_ptr(),
            out: out.as_mut_ptr(),
            experts: int(KERNEL, "experts", experts)?,
            max_rows: int(KERNEL, "max_rows", max_rows)?,
            width: int(KERNEL, "width", width)?,
            slots: int(KERNEL, "slots", slots)?,
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_gather_rows(&args, stream.raw()) })
    }
}

impl SiluMul<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "silu_mul";
        let Self { gate_up, offsets, out, experts, max_rows, width } = self;
        if max_rows == 0 || width == 0 {
            return Ok(());
        }
        expect_chunks(KERNEL, "width", width)?;
        expect_len(KERNEL, "gate_up", gate_up.len(), max_rows * 2 * width)?;
        expect_aligned(KERNEL, "gate_up", gate_up)?;
        expect_aligned(KERNEL, "out", out)?;
        expect_len(KERNEL, "offsets", offsets.len(), experts + 1)?;
        expect_len(KERNEL, "out", out.len(), max_rows * width)?;
        expect_threads(KERNEL, max_rows, width / CHUNK)?;
        let args = SiluMulArgs {
            gate_up: gate_up.as_ptr(),
            offsets: offsets.as_ptr(),
            out: out.as_mut_ptr(),
            experts: int(KERNEL, "experts", experts)?,
            max_rows: int(KERNEL, "max_rows", max_rows)?,
            width: int(KERNEL, "width", width)?,
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_silu_mul(&args, stream.raw()) })
    }
}

impl DequantizeExperts<'_> {
    /// Launches it.
    pub fn launch(self, stream: Stream) -> Result<()> {
        const KERNEL: &str = "dequantize_experts";
        let Self { weight, scales, offsets, out, experts, n, k } = self;
        if experts * n * k == 0 {
            return Ok(());
        }
        expect_chunks(KERNEL, "k", k)?;
        expect_len(KERNEL, "weight", weight.len(), experts * n * k)?;
        expect_len(KERNEL, "scales", scales.len(), scales_len(experts, n, k))?;
        expect_len(KERNEL, "out", out.len(), experts * n * k)?;
        expect_aligned(KERNEL, "weight", weight)?;
        expect_aligned(KERNEL, "out", out)?;
        if let Some(offsets) = offsets {
            expect_len(KERNEL, "offsets", offsets.len(), experts + 1)?;
        }
        expect_threads(KERNEL, n, k / CHUNK)?;
        let args = DequantizeExpertsArgs {
            weight: weight.as_ptr(),
            scales: scales.as_ptr(),
            offsets: offsets.map_or(ptr::null(), View::as_ptr),
            out: out.as_mut_ptr(),
            experts: int(KERNEL, "experts", experts)?,
            n: int(KERNEL, "n", n)?,
            k: int(KERNEL, "k", k)?,
        };
        // SAFETY: the views are as long as the shapes say.
        check(KERNEL, unsafe { hm_dequantize_experts(&args, stream.raw()) })
    }
}

fn expect_chunks(kernel: &'static str, name: &str, value: usize) -> Result<()> {
    if value.is_multiple_of(CHUNK) {
        return Ok(());
    }
    Err(Error::shape(kernel, format!("{name} is {value}: it has to be a multiple of {CHUNK}, so that rows begin at multiples of 16 bytes")))
}

/// Fails beyond the 2^32 threads that these kernels number.
fn expect_threads(kernel: &'static str, rows: usize, per_row: usize) -> Result<()> {
    if rows.checked_mul(per_row).is_some_and(|threads| threads < u32::MAX as usize - 1024) {
        return Ok(());
    }
    Err(Error::shape(kernel, format!("{rows} rows of {per_row} threads are more than 2^32: launch it for fewer rows at a time")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Buffer, Device};

    fn gemm(path: Path) -> Gemm {
        Gemm { path, multiprocessors: 132 }
    }

    #[test]
    fn tiles_follow_the_rows_of_an_average_expert() {
        let hopper = |tokens: usize, k: usize, experts: usize| gemm(Path::Hopper).tile(tokens * k, experts).rows();
        // OLMoE-1B-7B, Qwen3-30B-A3B, Mixtral-8x7B.
        assert_eq!([64, 128, 256, 512, 8192].map(|tokens| hopper(tokens, 8, 64)), [32, 32, 64, 128, 128]);
        assert_eq!([128, 512, 1024, 8192, 16384].map(|tokens| hopper(tokens, 8, 128)), [32, 64, 128, 128, 128]);
        assert_eq!([64, 128, 2048, 8192, 16384].map(|tokens| hopper(tokens, 2, 8)), [32, 64, 128, 256, 256]);
        assert_eq!(hopper(0, 2, 8), 32);
        assert_eq!(gemm(Path::Tiled).tile(1 << 20, 8), Tile::Rows128);
    }

    #[test]
    fn more_rows_never_take_a_smaller_tile() {
        for path in [Path::Hopper, Path::Tiled] {
            for experts in [1, 7, 64, 1024] {
                let tiles: Vec<Tile> = (0..200_000).step_by(97).map(|rows| gemm(path).tile(rows, experts)).collect();
                assert!(tiles.is_sorted() && tiles.iter().all(|tile| gemm(path).tiles().contains(tile)));
            }
        }
    }

    #[test]
    fn arguments_that_do_not_fit_are_told_by_name() {
        Device::open(0).unwrap();
        let stream = Stream::create().unwrap();
        let (numbers, offsets) = (Buffer::<bf16>::zeros(stream, 4096, "test").unwrap(), Buffer::<u32>::zeros(stream, 3, "test").unwrap());
        let bytes = gemm(Path::Hopper).workspace_bytes(2).unwrap();
        let workspace = Buffer::<u8>::new(stream, bytes, "test").unwrap();
        let view = numbers.view();
        let good = Grouped {
            x: view,
            weight: view,
            y: view,
            offsets: offsets.view(),
            workspace: workspace.view(),
            experts: 2,
            max_rows: 4,
            n: 16,
            k: 24,
        };
        let fails =
            |tile, grouped: Grouped<'_>, path| gemm(path).args(tile, grouped).err().map_or_else(String::new, |error| error.to_string());
        assert_eq!(fails(Tile::Rows256, good, Path::Hopper), "");
        assert_eq!(fails(Tile::Rows256, good, Path::Tiled), "grouped: there is no tile of 256 rows for Tiled");
        let message = fails(Tile::Rows32, Grouped { k: 20, ..good }, Path::Tiled);
        assert_eq!(message, "grouped: k is 20: it has to be a multiple of 8, so that rows begin at multiples of 16 bytes");
        assert!(
            fails(Tile::Rows32, Grouped { x: view.part(1..), ..good }, Path::Tiled).contains("x does not begin at a multiple of 16 bytes")
        );
        assert!(fails(Tile::Rows32, Grouped { x: view.part(..95), ..good }, Path::Tiled).contains("x has 95 elements, its shape has 96"));
        let short = Grouped { workspace: workspace.view().part(1..), ..good };
        assert!(fails(Tile::Rows32, short, Path::Hopper).contains("workspace has") && fails(Tile::Rows32, short, Path::Tiled).is_empty());
        assert!(fails(Tile::Rows32, Grouped { experts: 0, ..good }, Path::Tiled).contains("are none"));
    }
}
