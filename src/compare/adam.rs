//! Adam in f64 (Kingma and Ba 2015), for the small net: no weight decay.

use std::ops::Range;

/// Moments of one group of parameters.
#[derive(Clone, Debug)]
pub struct Adam {
    first: Vec<f64>,
    second: Vec<f64>,
    updates: i32,
}

const DECAY: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

impl Adam {
    /// Zero moments for so many parameters.
    pub fn new(parameters: usize) -> Self {
        Self { first: vec![0.0; parameters], second: vec![0.0; parameters], updates: 0 }
    }

    /// One update.
    pub fn step(&mut self, parameters: &mut [f64], gradient: &[f64], rate: f64) {
        self.updates += 1;
        let [unbias1, unbias2] = DECAY.map(|decay| 1.0 - decay.powi(self.updates));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((parameter, g), (first, second)) in parameters.iter_mut().zip(gradient).zip(moments) {
            *first = DECAY[0] * *first + (1.0 - DECAY[0]) * g;
            *second = DECAY[1] * *second + (1.0 - DECAY[1]) * g * g;
            *parameter -= rate * (*first / unbias1) / ((*second / unbias2).sqrt() + EPSILON);
        }
    }

    /// Parameters whose weights were replaced by those of others, of the same number, start from rest with the scale of
    /// the others' gradients. Without a scale the first steps would be several times the rate: the bias correction counts
    /// all updates.
    pub fn renew(&mut self, parameters: Range<usize>, from: Range<usize>) {
        self.first[parameters.clone()].fill(0.0);
        self.second.copy_within(from, parameters.start);
    }
}

/// L2 norm.
pub fn norm(values: &[f64]) -> f64 {
    values.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Scales `gradient` to a norm of at most `limit`; returns the norm before.
pub fn clip(gradient: &mut [f64], limit: f64) -> f64 {
    let length = norm(gradient);
    if length > limit {
        gradient.iter_mut().for_each(|g| *g *= limit / length);
    }
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_the_rate_against_the_sign_and_a_parabola_is_descended() {
        let mut adam = Adam::new(2);
        let mut x = [1.0, -2.0];
        adam.step(&mut x, &[3.0, -0.01], 0.1);
        assert!((x[0] - 0.9).abs() < 1e-6 && (x[1] + 1.9).abs() < 1e-6, "{x:?}");
        for _ in 0..2000 {
            let gradient = x.map(|x| 2.0 * x);
            adam.step(&mut x, &gradient, 0.01);
        }
        assert!(norm(&x) < 1e-3, "{x:?}");
    }

    #[test]
    fn renewed_parameters_take_no_step_beyond_the_rate() {
        for before in [1, 10, 1000] {
            let mut adam = Adam::new(3);
            let mut x = [0.0; 3];
            (0..before).for_each(|_| adam.step(&mut x, &[1.0, 5.0, 2.0], 0.1));
            adam.renew(1..2, 0..1);
            assert_eq!((adam.first[1], adam.second[1]), (0.0, adam.second[0]));
            for step in 0..50 {
                let was = x;
                adam.step(&mut x, &[1.0, 1.0, 2.0], 0.1);
                let moved = was[1] - x[1];
                assert!(moved > 0.0 && moved <= 0.1 + 1e-12, "step {step} after {before}: {moved}");
            }
        }
    }

    #[test]
    fn clipping_keeps_the_direction() {
        let mut gradient = [3.0, 4.0];
        assert_eq!(clip(&mut gradient, 1.0), 5.0);
        assert!((norm(&gradient) - 1.0).abs() < 1e-12 && (gradient[1] / gradient[0] - 4.0 / 3.0).abs() < 1e-12);
        assert_eq!(clip(&mut gradient, 2.0), norm(&gradient));
    }
}
