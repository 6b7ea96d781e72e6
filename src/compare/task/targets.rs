//! What should come out, and what it costs when something else does.

use std::ops::Range;

/// Targets of a batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Targets {
    /// `[T, O]`; the loss is the mean squared error over the outputs.
    Values(Vec<f64>),
    /// `[T]`; the loss is the cross-entropy of the outputs as logits, nats.
    Classes(Vec<usize>),
}

impl Targets {
    /// Loss of every row, `[T]`; writes `∂ loss_t / ∂ y_t` to `gradient`, `[T, O]`, not divided by T.
    pub fn loss(&self, predicted: &[f64], outputs: usize, gradient: &mut [f64]) -> Vec<f64> {
        let rows = predicted.chunks_exact(outputs).zip(gradient.chunks_exact_mut(outputs));
        match self {
            Self::Values(values) => rows.zip(values.chunks_exact(outputs)).map(|((y, dy), target)| squared_error(y, target, dy)).collect(),
            Self::Classes(classes) => rows.zip(classes).map(|((y, dy), class)| cross_entropy(y, *class, dy)).collect(),
        }
    }

    /// Share of rows whose largest output is the right class, where there are classes.
    pub fn accuracy(&self, predicted: &[f64], outputs: usize) -> Option<f64> {
        let Self::Classes(classes) = self else { return None };
        let right = predicted.chunks_exact(outputs).zip(classes).filter(|(y, class)| argmax(y) == **class).count();
        Some(right as f64 / classes.len().max(1) as f64)
    }

    /// Adds what it costs to be away from a teacher's outputs to `losses` and `gradient`: the mean squared distance, or
    /// `KL(teacher ‖ predicted)` where outputs are logits.
    pub fn distill(&self, predicted: &[f64], teacher: &[f64], outputs: usize, weight: f64, losses: &mut [f64], gradient: &mut [f64]) {
        let rows = predicted.chunks_exact(outputs).zip(teacher.chunks_exact(outputs)).zip(gradient.chunks_exact_mut(outputs));
        let mut dy = vec![0.0; outputs];
        for (((y, teacher), gradient), loss) in rows.zip(losses) {
            *loss += weight
                * match self {
                    Self::Values(_) => squared_error(y, teacher, &mut dy),
                    Self::Classes(_) => divergence(y, teacher, &mut dy),
                };
            gradient.iter_mut().zip(&dy).for_each(|(g, d)| *g += weight * d);
        }
    }

    /// The targets of some rows.
    pub fn part(&self, rows: Range<usize>, outputs: usize) -> Self {
        match self {
            Self::Values(values) => Self::Values(values[rows.start * outputs..rows.end * outputs].to_vec()),
            Self::Classes(classes) => Self::Classes(classes[rows].to_vec()),
        }
    }

    /// The targets of rows by their numbers.
    pub fn gather(&self, rows: &[usize], outputs: usize) -> Self {
        match self {
            Self::Values(values) => {
                Self::Values(rows.iter().flat_map(|row| &values[row * outputs..(row + 1) * outputs]).copied().collect())
            }
            Self::Classes(classes) => Self::Classes(rows.iter().map(|row| classes[*row]).collect()),
        }
    }
}

/// Index of the largest value, the first among equals.
pub fn argmax(values: &[f64]) -> usize {
    let first = |best: (usize, f64), (i, x): (usize, f64)| if x > best.1 { (i, x) } else { best };
    values.iter().copied().enumerate().fold((0, f64::NEG_INFINITY), first).0
}

/// `ln Σ exp`, without overflow.
pub fn log_sum_exp(values: &[f64]) -> f64 {
    let top = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if top.is_finite() { top + values.iter().map(|x| (x - top).exp()).sum::<f64>().ln() } else { top }
}

fn squared_error(y: &[f64], target: &[f64], dy: &mut [f64]) -> f64 {
    let n = y.len() as f64;
    let mut sum = 0.0;
    for ((y, target), dy) in y.iter().zip(target).zip(dy) {
        let error = y - target;
        sum += error * error;
        *dy = 2.0 * error / n;
    }
    sum / n
}

fn cross_entropy(y: &[f64], class: usize, dy: &mut [f64]) -> f64 {
    let normaliser = log_sum_exp(y);
    for (i, (y, dy)) in y.iter().zip(dy.iter_mut()).enumerate() {
        *dy = (y - normaliser).exp() - f64::from(i == class);
    }
    y.get(class).map_or(f64::NAN, |y| normaliser - y)
}

/// `KL(softmax(teacher) ‖ softmax(y))`; writes the gradient of y.
pub fn divergence(y: &[f64], teacher: &[f64], dy: &mut [f64]) -> f64 {
    let (student, reference) = (log_sum_exp(y), log_sum_exp(teacher));
    let mut sum = 0.0;
    for ((y, teacher), dy) in y.iter().zip(teacher).zip(dy) {
        let (log_p, log_q) = (teacher - reference, y - student);
        sum += log_p.exp() * (log_p - log_q);
        *dy = log_q.exp() - log_p.exp();
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_are_the_slopes_of_the_losses() {
        let y = [0.3, -1.2, 0.8, 2.0, -0.4, 0.1];
        for targets in [Targets::Values(vec![1.0, 0.0, -0.5, 1.5, 0.2, 0.3]), Targets::Classes(vec![1, 2])] {
            let mut gradient = [0.0; 6];
            let mut unused = [0.0; 6];
            targets.loss(&y, 3, &mut gradient);
            for i in 0..y.len() {
                let mut at = |h: f64| {
                    let mut moved = y;
                    moved[i] += h;
                    targets.loss(&moved, 3, &mut unused).iter().sum::<f64>()
                };
                let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
                assert!((slope - gradient[i]).abs() < 1e-8, "{i}: {slope} against {}", gradient[i]);
            }
        }
    }

    #[test]
    fn a_teacher_is_free_to_follow_and_its_gradient_is_the_slope() {
        let (y, teacher) = ([0.3, -1.2, 0.8, 2.0, -0.4, 0.1], [0.1, 0.2, 0.3, 1.0, 0.0, -1.0]);
        for targets in [Targets::Values(vec![0.0; 6]), Targets::Classes(vec![1, 2])] {
            let cost = |y: &[f64], gradient: &mut [f64]| {
                let mut losses = [0.0; 2];
                targets.distill(y, &teacher, 3, 0.7, &mut losses, gradient);
                losses.iter().sum::<f64>()
            };
            assert!(cost(&teacher, &mut [0.0; 6]).abs() < 1e-15);
            let mut gradient = [0.0; 6];
            cost(&y, &mut gradient);
            for i in 0..y.len() {
                let at = |h: f64| {
                    let mut moved = y;
                    moved[i] += h;
                    cost(&moved, &mut [0.0; 6])
                };
                let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
                assert!((slope - gradient[i]).abs() < 1e-8, "{i}: {slope} against {}", gradient[i]);
            }
        }
    }

    #[test]
    fn the_first_of_equals_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(Targets::Classes(vec![1, 0]).accuracy(&[0.0, 1.0, 0.0, 1.0], 2), Some(0.5));
    }
}
