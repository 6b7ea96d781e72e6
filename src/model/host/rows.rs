//! Operations on rows of activations.

use crate::ops::cpu::parallel;

/// Rows that are worked on at once; fewer in all are not worth a second thread.
const ROWS: usize = 16;

/// At least `len` elements.
pub(super) fn grow(buffer: &mut Vec<f32>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
}

/// Runs `task` for parts of `0..rows`, in parallel where there are many.
pub(super) fn by_rows(rows: usize, task: impl Fn(std::ops::Range<usize>) + Sync) {
    if rows <= ROWS {
        task(0..rows);
    } else {
        parallel(rows.div_ceil(ROWS), |part| task(part * ROWS..rows.min((part + 1) * ROWS)));
    }
}

/// `out = x / sqrt(mean(x²) + eps) · weight`.
pub(super) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let scale = norm_scale(x, eps);
    out.iter_mut().zip(x).zip(weight).for_each(|((out, x), weight)| *out = x * scale * weight);
}

/// [`rms_norm`] in place.
pub(super) fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = norm_scale(x, eps);
    x.iter_mut().zip(weight).for_each(|(x, weight)| *x = *x * scale * weight);
}

/// `1 / sqrt(mean(x²) + eps)`, summed in 16 lanes.
fn norm_scale(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let tail: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane += x * x;
        }
    }
    1.0 / ((lanes.iter().sum::<f32>() + tail) / x.len() as f32 + eps).sqrt()
}

/// Rotates one head `x [hd]`; the two halves are the two coordinates.
pub(super) fn rope(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (a, b) = x.split_at_mut(cos.len());
    for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}
