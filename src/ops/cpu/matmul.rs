//! Rows times transposed weights, `y[m, n] = Σ_k x[m, k] · w[n, k]`, in register tiles.
//!
//! Every output element is reduced over k in one order, whatever the number of rows, their position in a tile, or the
//! number of threads: a token's result does not depend on its batch. (A library GEMM takes another path, with another
//! order, for one row than for many.)

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::{
    exp::exp,
    simd::{Isa, Portable, Simd},
};

/// Rows in a register tile.
const TILE_ROWS: usize = 4;
/// Weight rows in a register tile.
const TILE_COLS: usize = 4;
/// Rows in a task: they stay in the second-level cache while weights stream by.
const TASK_ROWS: usize = 128;
/// Products in a task, at least: smaller ones cost more to hand out than to compute.
const TASK_PRODUCTS: usize = 1 << 16;

/// An element type of weights. Activations are f32.
pub(crate) trait Weight: Copy + Send + Sync + 'static {
    /// The value as f32; exact.
    fn widen(self) -> f32;

    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector;
}

impl Weight for f32 {
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector {
        // SAFETY: the caller's contract.
        unsafe { S::load(from) }
    }
}

impl Weight for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::Vector {
        // SAFETY: the caller's contract.
        unsafe { S::load_bf16(from) }
    }
}

/// `tile[i][j] = rows[i] · weights[j]`.
///
/// # Safety
/// The CPU has `S`; all pointers are readable for `k` elements.
#[inline(always)]
unsafe fn tile<S: Simd, W: Weight, const M: usize, const N: usize>(
    rows: [*const f32; M],
    weights: [*const W; N],
    k: usize,
) -> [[f32; N]; M] {
    // SAFETY: offsets stay below k.
    unsafe {
        let mut sums = [[S::zero(); N]; M];
        let whole = k / S::LANES * S::LANES;
        let mut at = 0;
        while at < whole {
            let w: [S::Vector; N] = std::array::from_fn(|j| W::load::<S>(weights[j].add(at)));
            for i in 0..M {
                let x = S::load(rows[i].add(at));
                for j in 0..N {
                    sums[i][j] = S::mul_add(x, w[j], sums[i][j]);
                }
            }
            at += S::LANES;
        }
        let mut out = [[0f32; N]; M];
        for i in 0..M {
            for j in 0..N {
                let mut sum = S::sum(sums[i][j]);
                for tail in whole..k {
                    sum += *rows[i].add(tail) * (*weights[j].add(tail)).widen();
                }
                out[i][j] = sum;
            }
        }
        out
    }
}

/// Calls `tile` for N weight rows and all `rows`, in tiles of rows.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn strip<S: Simd, W: Weight, const N: usize>(
    rows: &[&[f32]],
    weights: [*const W; N],
    k: usize,
    emit: &mut impl FnMut(usize, [f32; N]),
) {
    let mut row = 0;
    // SAFETY: the caller's contract; a row is a slice of k elements.
    unsafe {
        while row + TILE_ROWS <= rows.len() {
            let pointers: [*const f32; TILE_ROWS] = std::array::from_fn(|i| rows[row + i].as_ptr());
            let result = tile::<S, W, TILE_ROWS, N>(pointers, weights, k);
            result.into_iter().enumerate().for_each(|(i, values)| emit(row + i, values));
            row += TILE_ROWS;
        }
        while row < rows.len() {
            let [values] = tile::<S, W, 1, N>([rows[row].as_ptr()], weights, k);
            emit(row, values);
            row += 1;
        }
    }
}

/// What to do with the products of one task.
trait Epilogue: Sync {
    /// Weight rows `[N]` that belong to output columns `column ..`; the number of columns they make.
    fn columns(&self, column: usize, end: usize) -> ([usize; TILE_COLS], usize);
    /// The output values of these columns.
    fn finish(&self, products: [f32; TILE_COLS]) -> [f32; TILE_COLS];
}

/// One output column for each weight row.
struct Plain;

impl Epilogue for Plain {
    #[inline(always)]
    fn columns(&self, column: usize, end: usize) -> ([usize; TILE_COLS], usize) {
        (std::array::from_fn(|j| (column + j).min(end - 1)), TILE_COLS.min(end - column))
    }

    #[inline(always)]
    fn finish(&self, products: [f32; TILE_COLS]) -> [f32; TILE_COLS] {
        products
    }
}

/// `silu(gate) · up`: weight rows are F of gate, then F of up.
struct SwiGlu {
    width: usize,
}

impl Epilogue for SwiGlu {
    #[inline(always)]
    fn columns(&self, column: usize, end: usize) -> ([usize; TILE_COLS], usize) {
        let second = (column + 1).min(end - 1);
        ([column, second, self.width + column, self.width + second], 2.min(end - column))
    }

    #[inline(always)]
    fn finish(&self, [gate0, gate1, up0, up1]: [f32; TILE_COLS]) -> [f32; TILE_COLS] {
        [silu(gate0) * up0, silu(gate1) * up1, 0.0, 0.0]
    }
}

/// `x · sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// One task: `rows` against the weight rows of output columns `columns`.
///
/// # Safety
/// The CPU has `S`; each row and each weight row has `k` elements.
#[inline(always)]
unsafe fn task<S: Simd, W: Weight>(
    rows: &[&[f32]],
    weights: &[W],
    k: usize,
    columns: Range<usize>,
    epilogue: &impl Epilogue,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    let mut column = columns.start;
    while column < columns.end {
        let (weight_rows, made) = epilogue.columns(column, columns.end);
        let pointers = weight_rows.map(|row| weights[row * k..(row + 1) * k].as_ptr());
        // SAFETY: the caller's contract; the slices above have k elements.
        unsafe {
            strip::<S, W, TILE_COLS>(rows, pointers, k, &mut |row, products| {
                let values = epilogue.finish(products);
                values[..made].iter().enumerate().for_each(|(j, &value)| emit(row, column + j, value));
            });
        }
        column += made;
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn task_avx512<W: Weight>(
    rows: &[&[f32]],
    w: &[W],
    k: usize,
    columns: Range<usize>,
    epilogue: &impl Epilogue,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    // SAFETY: the target feature is enabled here; `run_task` has checked the lengths.
    unsafe { task::<super::simd::x86::Avx512, W>(rows, w, k, columns, epilogue, emit) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn task_avx2<W: Weight>(
    rows: &[&[f32]],
    w: &[W],
    k: usize,
    columns: Range<usize>,
    epilogue: &impl Epilogue,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    // SAFETY: the target features are enabled here; `run_task` has checked the lengths.
    unsafe { task::<super::simd::x86::Avx2, W>(rows, w, k, columns, epilogue, emit) }
}

fn run_task<W: Weight>(
    isa: Isa,
    rows: &[&[f32]],
    weights: &[W],
    k: usize,
    columns: Range<usize>,
    epilogue: &impl Epilogue,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    assert!(rows.iter().all(|row| row.len() == k), "rows of another length than the weights': this is a bug");
    match isa {
        // SAFETY: `Isa` values other than Portable are made by `Isa::detect` (or tests that ask it first).
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { task_avx512(rows, weights, k, columns, epilogue, emit) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { task_avx2(rows, weights, k, columns, epilogue, emit) },
        // SAFETY: Portable needs nothing; lengths are checked above.
        Isa::Portable => unsafe { task::<Portable, W>(rows, weights, k, columns, epilogue, emit) },
    }
}

/// An output buffer that tasks fill at places of their own.
struct Disjoint<'a> {
    start: *mut f32,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: only `write` touches the memory, and its contract forbids two writers of one place.
unsafe impl Sync for Disjoint<'_> {}

impl<'a> Disjoint<'a> {
    fn new(out: &'a mut [f32]) -> Self {
        Self { start: out.as_mut_ptr(), len: out.len(), lifetime: std::marker::PhantomData }
    }

    /// # Safety
    /// No other thread writes `index`.
    #[inline(always)]
    unsafe fn write(&self, index: usize, value: f32) {
        debug_assert!(index < self.len, "write outside of the output: this is a bug");
        // SAFETY: in bounds (row and column are below the shape by construction of the tasks), one writer.
        unsafe { self.start.add(index).write(value) }
    }
}

/// Rows that share a weight matrix: an expert and what was routed to it.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// Output rows.
    pub(crate) rows: Range<usize>,
    /// Index of the weight matrix.
    pub(crate) matrix: usize,
}

/// Rows of several weight matrices at once.
#[derive(Debug)]
pub(crate) struct Grouped<'a, W> {
    /// Instruction set.
    pub(crate) isa: Isa,
    /// `[*, k]`.
    pub(crate) x: &'a [f32],
    /// Row of `x` for each output row; `None`: the same row.
    pub(crate) source: Option<&'a [u32]>,
    /// In order and without a gap; together they cover the output rows.
    pub(crate) groups: &'a [Group],
    /// `[matrices, rows, k]`.
    pub(crate) weights: &'a [W],
    /// Inner dimension.
    pub(crate) k: usize,
}

impl<W: Weight> Grouped<'_, W> {
    /// `[R, n]`: every row times the `n` weight rows of its matrix.
    pub(crate) fn linear(&self, n: usize) -> Vec<f32> {
        self.run(n, n, &Plain)
    }

    /// `[R, width]`: `silu(gate) · up`, each matrix having `width` rows of gate and `width` of up.
    pub(crate) fn swiglu(&self, width: usize) -> Vec<f32> {
        self.run(2 * width, width, &SwiGlu { width })
    }

    fn run(&self, weight_rows: usize, n: usize, epilogue: &impl Epilogue) -> Vec<f32> {
        // What makes the writes below sound: rows of one group after the other, from 0.
        let rows = self.groups.iter().fold(0, |end, group| {
            assert!(group.rows.start == end && group.rows.end >= end, "groups that overlap or leave a gap: this is a bug");
            group.rows.end
        });
        let mut out = vec![0f32; rows * n];
        let tasks = self.tasks(n);
        let target = Disjoint::new(&mut out);
        tasks.into_par_iter().for_each(|(group, rows, columns)| {
            let inputs: Vec<&[f32]> = rows
                .clone()
                .map(|row| {
                    let source = self.source.map_or(row, |source| source[row] as usize);
                    &self.x[source * self.k..(source + 1) * self.k]
                })
                .collect();
            let size = weight_rows * self.k;
            let weights = &self.weights[group.matrix * size..(group.matrix + 1) * size];
            run_task(self.isa, &inputs, weights, self.k, columns, epilogue, &mut |row, column, value| {
                // SAFETY: tasks have disjoint (row, column) ranges: their groups are disjoint, as checked above.
                unsafe { target.write((rows.start + row) * n + column, value) }
            });
        });
        out
    }

    /// (group, rows, columns) of each task. How work is cut does not change any result.
    fn tasks(&self, n: usize) -> Vec<(&Group, Range<usize>, Range<usize>)> {
        let threads = rayon::current_num_threads();
        let total: usize = self.groups.iter().map(|group| group.rows.len() * n * self.k).sum();
        let products = (total / (threads * 4)).max(TASK_PRODUCTS);
        let mut tasks = Vec::new();
        for group in self.groups {
            for start in group.rows.clone().step_by(TASK_ROWS) {
                let rows = start..group.rows.end.min(start + TASK_ROWS);
                let columns = (products / (rows.len() * self.k).max(1)).max(1).next_multiple_of(TILE_COLS);
                for column in (0..n).step_by(columns) {
                    tasks.push((group, rows.clone(), column..n.min(column + columns)));
                }
            }
        }
        tasks
    }
}

/// `x [m, k]` times `weights [n, k]` transposed: `[m, n]`.
pub(crate) fn linear<W: Weight>(isa: Isa, x: &[f32], weights: &[W], k: usize, n: usize) -> Vec<f32> {
    let groups = [Group { rows: 0..x.len() / k, matrix: 0 }];
    Grouped { isa, x, source: None, groups: &groups, weights, k }.linear(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The writes are unchecked: what is not a partition of the rows must not get to them.
    #[test]
    fn groups_that_do_not_partition_the_rows_are_refused() {
        for ranges in [[0..2, 1..3], [0..1, 2..4], [2..3, 0..2]] {
            let groups: Vec<Group> = ranges.clone().map(|rows| Group { rows, matrix: 0 }).into();
            let run = || Grouped { isa: Isa::Portable, x: &[1.0; 12], source: None, groups: &groups, weights: &[1f32; 6], k: 3 }.linear(2);
            assert!(std::panic::catch_unwind(run).is_err(), "{ranges:?}");
        }
    }
}
