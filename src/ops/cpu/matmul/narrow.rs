//! Products in bf16.

use half::bf16;

use super::{
    super::{matrix::Q8_BLOCK, simd::x86::Avx512},
    *,
};

/// Bytes of a strip of [`tiles`]: about a fourth of a second-level cache.
const STRIP_BYTES: usize = 512 << 10;

/// The rows of a strip as bf16: as they are, or rounded from 8-bit blocks into the buffer. Row `slot` of the strip is `weight_row`
/// of tiles of `tile_rows`.
struct Strip<'a> {
    start: *const bf16,
    /// Elements between rows.
    k: usize,
    direct: Option<&'a [bf16]>,
    first: usize,
    end: usize,
    tile_rows: usize,
    pair: Option<usize>,
}

impl Strip<'_> {
    /// Row `slot` of tile `tile`.
    #[inline(always)]
    fn row(&self, tile: usize, slot: usize) -> *const bf16 {
        match self.direct {
            Some(weights) => {
                let per_tile = if self.pair.is_some() { self.tile_rows / 2 } else { self.tile_rows };
                weights.row(weight_row(slot, self.tile_rows, self.first + tile * per_tile, self.end, self.pair), self.k)
            }
            // SAFETY: the buffer holds all rows of all tiles of the strip.
            None => unsafe { self.start.add((tile * self.tile_rows + slot) * self.k) },
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn strip<'a>(
    buffer: &mut Vec<Line>,
    weights: &Matrix<'a>,
    (first, end): (usize, usize),
    tiles: usize,
    tile_rows: usize,
    pair: Option<usize>,
) -> Strip<'a> {
    let k = weights.k();
    let mut strip = Strip { start: std::ptr::null(), k, direct: None, first, end, tile_rows, pair };
    match weights.data() {
        Data::Bf16(direct) => strip.direct = Some(direct),
        Data::Q8 { values, scales } => {
            let per_tile = if pair.is_some() { tile_rows / 2 } else { tile_rows };
            let rows = tiles * tile_rows;
            grow(buffer, (rows * k).div_ceil(32), Line::ZERO);
            // SAFETY: a line holds 32 bf16.
            let out = unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr().cast::<bf16>(), rows * k) };
            for (slot, out) in out.chunks_exact_mut(k).enumerate() {
                let row = weight_row(slot % tile_rows, tile_rows, first + slot / tile_rows * per_tile, end, pair);
                let blocks = k.div_ceil(Q8_BLOCK);
                dot_q8::narrow(&values[row * k..(row + 1) * k], &scales[row * blocks..(row + 1) * blocks], out);
            }
            strip.start = buffer.as_ptr().cast();
        }
        Data::F32(_) => unreachable!("f32 weights are not multiplied in bf16: this is a bug"),
    }
    strip
}

/// [`Form::Pairs`] of one task.
pub(super) fn pairs(weights: &Matrix<'_>, x: &[Line], rows: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Sink) {
    assert!(Bf16Unit::detect() != Bf16Unit::None);
    // SAFETY: the CPU has AVX512-BF16, says the assertion.
    unsafe { pairs_task(weights, x, rows, columns, pair, sink) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pairs_task(weights: &Matrix<'_>, x: &[Line], rows: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Sink) {
    let (k, blocks) = (weights.k(), rows.div_ceil(BLOCK));
    let lines = Format::Bf16.block_lines(k);
    assert!(x.len() >= blocks * lines && k.is_multiple_of(2), "less input than rows: this is a bug");
    let (per_tile, step) = if pair.is_some() { (MAX_ROWS / 2, STRIP / 2) } else { (MAX_ROWS, STRIP) };
    let mut buffer = STRIP_BUFFER.take();
    for start in columns.clone().step_by(step) {
        let end = columns.end.min(start + step);
        let tiles = (end - start).div_ceil(per_tile);
        let strip = strip(&mut buffer, weights, (start, end), tiles, MAX_ROWS, pair);
        for block in (0..blocks).step_by(MAX_BLOCKS) {
            let count = MAX_BLOCKS.min(blocks - block);
            let inputs: [*const f32; MAX_BLOCKS] =
                std::array::from_fn(|b| x[(block + b.min(count - 1)) * lines..][..lines].as_ptr().cast::<f32>());
            for tile in 0..tiles {
                let column = start + tile * per_tile;
                let w = std::array::from_fn(|slot| strip.row(tile, slot).cast::<u32>());
                let mut out = [[Line::ZERO; MAX_BLOCKS]; MAX_ROWS];
                // SAFETY: rows have k elements, an even number; blocks have `lines`.
                unsafe { panel::bf16_pairs::products(w, &inputs[..count], k / 2, &mut out) };
                // SAFETY: the CPU has AVX-512.
                unsafe {
                    finish::<Avx512>(&out, MAX_ROWS, per_tile.min(end - column), count, pair, |b, values| {
                        sink.block(block + b, column, values);
                    });
                }
            }
        }
    }
    STRIP_BUFFER.set(buffer);
}

/// [`Form::Tiles`] of one task.
pub(super) fn tiles(weights: &Matrix<'_>, x: &[Line], rows: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Sink) {
    assert!(Bf16Unit::detect() == Bf16Unit::Amx);
    // SAFETY: the CPU has AMX and AVX-512, says the assertion.
    unsafe { tiles_task(weights, x, rows, columns, pair, sink) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn tiles_task(weights: &Matrix<'_>, x: &[Line], rows: usize, columns: Range<usize>, pair: Option<usize>, sink: &mut impl Sink) {
    let (k, blocks) = (weights.k(), rows.div_ceil(BLOCK));
    let lines = Format::Bf16.block_lines(k);
    assert!(x.len() >= blocks * lines && k > 0 && k.is_multiple_of(amx::DEPTH), "less input than rows: this is a bug");
    // With few tokens nothing is gained by a long strip, and a short one stays in the first caches.
    let strip_rows = if blocks <= 2 { 32 } else { (STRIP_BYTES / (2 * k) / 32).clamp(1, 16) * 32 };
    let (per_tile, step) = if pair.is_some() { (16, strip_rows / 2) } else { (32, strip_rows) };
    // SAFETY: the CPU has AMX; a task does not start another on its thread.
    let _tiles = unsafe { amx::Tiles::configure() };
    let steps = k / amx::DEPTH;
    let mut buffer = STRIP_BUFFER.take();
    for start in columns.clone().step_by(step) {
        let end = columns.end.min(start + step);
        let count = (end - start).div_ceil(per_tile);
        let strip = strip(&mut buffer, weights, (start, end), count, 32, pair);
        for block in (0..blocks).step_by(2) {
            for tile in 0..count {
                let column = start + tile * per_tile;
                // A last tile of 16 rows repeats them: the second half is not used.
                let second = if pair.is_none() && end - column <= 16 { 0 } else { 16 };
                let left = [0, second].map(|slot| {
                    let row = strip.row(tile, slot);
                    let half = 16 * k;
                    let ahead = if pair.is_some() { half } else { 2 * half };
                    amx::Left { start: row.cast(), stride: 2 * k, next: row.wrapping_add(ahead).cast() }
                });
                let input = |b: usize| x[b * lines..][..lines].as_ptr().cast::<u8>();
                let mut out = [Line::ZERO; 64];
                let (to, two) = (out.as_mut_ptr().cast::<f32>(), block + 1 < blocks);
                // SAFETY: 16 rows of k elements each, blocks of `steps` tiles, room for four tiles.
                unsafe {
                    match (two, block) {
                        (false, _) => amx::two_by_one(left, input(block), steps, to),
                        (true, 0) => amx::two_by_two_ahead(left, [input(0), input(1)], steps, to),
                        (true, _) => amx::two_by_two(left, [input(block), input(block + 1)], steps, to),
                    }
                }
                let width = if two { 2 } else { 1 };
                for b in 0..width {
                    let (upper, lower) = (&out[16 * b..16 * b + 16], &out[16 * (width + b)..16 * (width + b) + 16]);
                    if pair.is_some() {
                        let mut values = [Line::ZERO; 16];
                        for (to, (gate, up)) in values.iter_mut().zip(upper.iter().zip(lower)) {
                            // SAFETY: the CPU has AVX-512.
                            *to = unsafe { gated::<Avx512>(gate, up) };
                        }
                        sink.block(block + b, column, &values[..16.min(end - column)]);
                    } else {
                        sink.block(block + b, column, upper);
                        if second > 0 {
                            sink.block(block + b, column + 16, lower);
                        }
                    }
                }
            }
        }
    }
    STRIP_BUFFER.set(buffer);
}
