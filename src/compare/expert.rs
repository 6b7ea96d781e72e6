//! One expert of the small net: linear, or one hidden layer of rectifiers. Forward and backward of one row, by hand.
//!
//! Parameters of an expert are one slice: a linear one has `[D, O]`, the other `[D, H]` and then `[H + 1, O]`, whose last
//! row is the bias of the outputs. Outputs run innermost, so that the loops need no reductions.

/// Sizes of an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertShape {
    /// D.
    pub features: usize,
    /// H; 0: linear.
    pub hidden: usize,
    /// O.
    pub outputs: usize,
}

impl ExpertShape {
    /// Parameters of an expert.
    pub fn parameters(&self) -> usize {
        match self.hidden {
            0 => self.features * self.outputs,
            hidden => self.features * hidden + (hidden + 1) * self.outputs,
        }
    }

    /// `y [O] = expert(x)`; `active [H]` keeps what the backward needs.
    pub fn forward(&self, parameters: &[f64], x: &[f64], active: &mut [f64], y: &mut [f64]) {
        if self.hidden == 0 {
            return multiply(parameters, x, y);
        }
        let (up, down) = parameters.split_at(self.features * self.hidden);
        multiply(up, x, active);
        active.iter_mut().for_each(|a| *a = a.max(0.0));
        let (down, bias) = down.split_at(self.hidden * self.outputs);
        multiply(down, active, y);
        y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
    }

    /// Adds the gradient of the parameters to `gradient`, for `dy [O]`.
    pub fn backward(&self, parameters: &[f64], x: &[f64], active: &[f64], dy: &[f64], gradient: &mut [f64]) {
        if self.hidden == 0 {
            return outer(x, dy, gradient);
        }
        let (_, down) = parameters.split_at(self.features * self.hidden);
        let (gradient_up, gradient_down) = gradient.split_at_mut(self.features * self.hidden);
        let mut d_active = vec![0.0; self.hidden];
        for ((d, a), row) in d_active.iter_mut().zip(active).zip(down.chunks_exact(self.outputs)) {
            if *a > 0.0 {
                *d = row.iter().zip(dy).map(|(w, g)| w * g).sum();
            }
        }
        let (gradient_down, gradient_bias) = gradient_down.split_at_mut(self.hidden * self.outputs);
        outer(active, dy, gradient_down);
        gradient_bias.iter_mut().zip(dy).for_each(|(b, g)| *b += g);
        outer(x, &d_active, gradient_up);
    }
}

/// `y = x W`, W `[x.len(), y.len()]`.
fn multiply(w: &[f64], x: &[f64], y: &mut [f64]) {
    y.fill(0.0);
    for (x, row) in x.iter().zip(w.chunks_exact(y.len())) {
        if *x != 0.0 {
            y.iter_mut().zip(row).for_each(|(y, w)| *y += x * w);
        }
    }
}

/// `dW += x ⊗ dy`.
fn outer(x: &[f64], dy: &[f64], dw: &mut [f64]) {
    for (x, row) in x.iter().zip(dw.chunks_exact_mut(dy.len())) {
        if *x != 0.0 {
            row.iter_mut().zip(dy).for_each(|(w, g)| *w += x * g);
        }
    }
}
