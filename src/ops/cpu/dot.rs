//! Few rows times a weight matrix: the weights stream by once, each loaded and widened once for all rows.
//!
//! Limited by memory: what counts is that the next weights are always on their way. Each tile of weight rows asks for the lines of
//! the next tile while it works; a plain sweep leaves that to the hardware, which starts anew at every page.

use std::ops::Range;

use super::{
    matrix::{Row, Rows},
    simd::Simd,
};

/// Rows that this form is for.
pub(crate) const FEW_ROWS: usize = 8;

/// Weight rows in a tile of one to four rows, and of more: their sums must fit into registers.
const WIDE: usize = 4;
const NARROW: usize = 2;

/// What becomes of the products of one row with neighbouring weight rows.
pub(crate) trait Emit {
    /// `products[j]` belongs to column `column + j`.
    fn emit(&mut self, row: usize, column: usize, products: &[f32]);
}

/// `out[i][j] = x[i] · w[j]`.
///
/// # Safety
/// The CPU has `S`; all rows have `k` elements.
#[inline(always)]
unsafe fn tile<S: Simd, W: Row, const M: usize, const N: usize>(x: [*const f32; M], w: [W; N], k: usize) -> [[f32; N]; M] {
    // SAFETY: offsets stay below k.
    unsafe {
        let mut sums = [[S::zero(); N]; M];
        let whole = k / S::LANES * S::LANES;
        let mut at = 0;
        while at < whole {
            for j in 0..N {
                // The next tile's row lies N rows further (the one after the next if gate and up are paired).
                w[j].prefetch(at + N * k);
                let weights = w[j].load::<S>(at);
                for i in 0..M {
                    sums[i][j] = S::mul_add(S::load(x[i].add(at)), weights, sums[i][j]);
                }
            }
            at += S::LANES;
        }
        let mut out = [[0f32; N]; M];
        for i in 0..M {
            for j in 0..N {
                let mut sum = S::sum(sums[i][j]);
                for tail in whole..k {
                    sum += *x[i].add(tail) * w[j].get(tail);
                }
                out[i][j] = sum;
            }
        }
        out
    }
}

#[inline(always)]
unsafe fn columns<S: Simd, W: Rows, const M: usize, const N: usize>(
    x: &[&[f32]],
    weights: W,
    k: usize,
    columns: Range<usize>,
    pair: Option<usize>,
    emit: &mut impl Emit,
) {
    let x: [*const f32; M] = std::array::from_fn(|i| x[i].as_ptr());
    let mut column = columns.start;
    while column < columns.end {
        let last = columns.end - 1;
        // SAFETY: `run` has checked the rows of x; `row` checks those of the weights.
        unsafe {
            match pair {
                None => {
                    let made = N.min(columns.end - column);
                    let out = tile::<S, W::Row, M, N>(x, std::array::from_fn(|j| weights.row((column + j).min(last), k)), k);
                    out.iter().enumerate().for_each(|(i, products)| emit.emit(i, column, &products[..made]));
                    column += made;
                }
                Some(width) => {
                    let made = (N / 2).min(columns.end - column);
                    let rows = std::array::from_fn(|j| weights.row((column + j % (N / 2)).min(last) + j / (N / 2) * width, k));
                    let out = tile::<S, W::Row, M, N>(x, rows, k);
                    for (i, products) in out.iter().enumerate() {
                        let mut hidden = [0f32; N];
                        (0..made).for_each(|j| hidden[j] = super::silu(products[j]) * products[j + N / 2]);
                        emit.emit(i, column, &hidden[..made]);
                    }
                    column += made;
                }
            }
        }
    }
}

/// The rows of `x` times weight rows `columns`. With `pair = F`, weight row `F + c` is `up` where row `c` is `gate`, and what is
/// emitted is `silu(gate) · up`.
///
/// # Safety
/// The CPU has `S`.
#[inline(always)]
pub(crate) unsafe fn run<S: Simd, W: Rows>(
    x: &[&[f32]],
    weights: W,
    k: usize,
    range: Range<usize>,
    pair: Option<usize>,
    emit: &mut impl Emit,
) {
    assert!(x.iter().all(|row| row.len() == k), "rows of another length than the weights': this is a bug");
    // SAFETY: the caller's contract, and the assertion.
    unsafe {
        match x.len() {
            0 => {}
            1 => columns::<S, W, 1, WIDE>(x, weights, k, range, pair, emit),
            2 => columns::<S, W, 2, WIDE>(x, weights, k, range, pair, emit),
            3 => columns::<S, W, 3, WIDE>(x, weights, k, range, pair, emit),
            4 => columns::<S, W, 4, WIDE>(x, weights, k, range, pair, emit),
            5 => columns::<S, W, 5, NARROW>(x, weights, k, range, pair, emit),
            6 => columns::<S, W, 6, NARROW>(x, weights, k, range, pair, emit),
            7 => columns::<S, W, 7, NARROW>(x, weights, k, range, pair, emit),
            8 => columns::<S, W, 8, NARROW>(x, weights, k, range, pair, emit),
            _ => unreachable!("more than {FEW_ROWS} rows: this is a bug"),
        }
    }
}
