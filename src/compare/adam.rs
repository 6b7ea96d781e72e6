//! Adam in f64 (Kingma and Ba 2015), for the small net: no weight decay.

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

    /// Forgets what it knows of some parameters: their weights were replaced.
    pub fn forget(&mut self, parameters: std::ops::Range<usize>) {
        for moments in [&mut self.first, &mut self.second] {
            moments.iter_mut().skip(parameters.start).take(parameters.len()).for_each(|m| *m = 0.0);
        }
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
    fn forgotten_parameters_start_again() {
        let mut adam = Adam::new(3);
        adam.step(&mut [0.0; 3], &[1.0; 3], 0.1);
        adam.forget(1..2);
        assert_eq!(adam.first[1], 0.0);
        assert!(adam.first[0] > 0.0 && adam.second[2] > 0.0);
    }

    #[test]
    fn clipping_keeps_the_direction() {
        let mut gradient = [3.0, 4.0];
        assert_eq!(clip(&mut gradient, 1.0), 5.0);
        assert!((norm(&gradient) - 1.0).abs() < 1e-12 && (gradient[1] / gradient[0] - 4.0 / 3.0).abs() < 1e-12);
        assert_eq!(clip(&mut gradient, 2.0), norm(&gradient));
    }
}
