//! Quality of router gradients, for people: bias without the noise of its own measurement.

use std::fmt;

use super::{
    arm::Arm,
    metric::median,
    probe,
    results::{GradientQuality, GradientResult, Outcome, Results},
    spec::{CellSpec, TaskName},
    table::{Runs, figure},
};

/// Relative bias of a gradient, as far as the number of draws lets one see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bias {
    /// The bias.
    Seen(f64),
    /// It is less than this, the error of the mean over the draws.
    BelowFloor(f64),
}

/// Medians of one arm over one population: every seed and problem that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// Without the noise of the mean.
    pub bias: Bias,
    /// Of mean and exact; absent for an estimator that has no gradient.
    pub cosine: Option<f64>,
    /// Of a single draw.
    pub std: f64,
    /// First and third quartile over the problems of the task `gradient`.
    pub quartiles: Option<Quartiles>,
}

/// Half of the problems lie between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quartiles {
    /// Of the bias.
    pub bias: [Bias; 2],
    /// Of the deviation of a draw.
    pub std: [f64; 2],
}

/// An arm of the task `gradient`.
#[derive(Clone, Debug)]
pub struct OneToken<'a> {
    /// What was measured, and how much of it.
    pub spec: &'a CellSpec,
    /// Of each seed that was measured.
    pub found: Vec<&'a GradientResult>,
    /// Cells that ended with an error.
    pub failed: usize,
}

impl Bias {
    /// From the distance of the mean of `draws` draws: its square is on average that of the bias plus `std²/draws`.
    pub fn of(distance: f64, std: f64, draws: usize) -> Self {
        let noise = std * std / draws.max(1) as f64;
        match (distance * distance - noise).max(0.0) {
            square if square < noise => Self::BelowFloor(noise.sqrt()),
            square => Self::Seen(square.sqrt()),
        }
    }

    /// The bias, or the most that it can be.
    pub fn most(self) -> f64 {
        match self {
            Self::Seen(bias) | Self::BelowFloor(bias) => bias,
        }
    }
}

impl fmt::Display for Bias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Seen(bias) => f.write_str(&figure(*bias)),
            Self::BelowFloor(floor) => write!(f, "< {}", figure(*floor)),
        }
    }
}

/// Along the runs of an arm; `None` where there is no exact gradient to compare with.
pub fn along(runs: &Runs<'_>) -> Option<Quality> {
    let measured = runs.steps.sound.iter().filter_map(|(_, result)| {
        let of = result.router_grad;
        Some((of.bias?, of.std?, of.cosine))
    });
    summary(&measured.collect::<Vec<_>>(), probe::DRAWS)
}

/// The arms of the task `gradient`, those with the least bias first, in the order of the plan where none was measured.
pub fn one_token(results: &Results) -> Vec<OneToken<'_>> {
    let mut arms: Vec<OneToken<'_>> = Vec::new();
    for cell in results.cells.iter().filter(|cell| cell.spec.task == TaskName::Gradient) {
        let at = arms.iter().position(|arm| arm.arm().name == cell.spec.arm.name).unwrap_or_else(|| {
            arms.push(OneToken { spec: &cell.spec, found: Vec::new(), failed: 0 });
            arms.len() - 1
        });
        match &cell.outcome {
            Outcome::Gradient(result) => arms[at].found.push(result),
            Outcome::Failed(_) | Outcome::Trained(_) => arms[at].failed += 1,
        }
    }
    let bias = |arm: &OneToken<'_>| arm.quality(quadratic).map_or(f64::INFINITY, |quality| quality.bias.most());
    arms.sort_by(|a, b| bias(a).total_cmp(&bias(b)));
    arms
}

/// On squared error: what [`OneToken::quality`] is asked for.
pub fn quadratic(result: &GradientResult) -> GradientQuality {
    result.quadratic
}

/// On cross-entropy: what [`OneToken::quality`] is asked for.
pub fn cross_entropy(result: &GradientResult) -> GradientQuality {
    result.cross_entropy
}

impl<'a> OneToken<'a> {
    /// What was measured.
    pub fn arm(&self) -> &'a Arm {
        &self.spec.arm
    }

    /// On one of the two losses; `None` if no cell measured it.
    pub fn quality(&self, loss: fn(&GradientResult) -> GradientQuality) -> Option<Quality> {
        let draws = self.spec.size.batch;
        let of: Vec<GradientQuality> = self.found.iter().map(|result| loss(result)).collect();
        let measured: Vec<_> = of.iter().filter_map(|of| Some((of.bias?, of.std?, of.cosine))).collect();
        let quality = summary(&measured, draws)?;
        let middle = |pick: fn(&GradientQuality) -> Option<f64>| median(&of.iter().filter_map(pick).collect::<Vec<_>>());
        let both = |low, high| Some([middle(low)?, middle(high)?]);
        let bias = both(|of| Some(of.bias_quartiles?[0]), |of| Some(of.bias_quartiles?[1]));
        let std = both(|of| Some(of.std_quartiles?[0]), |of| Some(of.std_quartiles?[1]));
        let quartiles = bias.zip(std);
        let quartiles = quartiles.map(|(bias, std)| Quartiles { bias: bias.map(|bias| Bias::of(bias, quality.std, draws)), std });
        Some(Quality { quartiles, ..quality })
    }
}

/// Of (distance of the mean, deviation, cosine).
fn summary(measured: &[(f64, f64, Option<f64>)], draws: usize) -> Option<Quality> {
    let middle = |value: fn(&(f64, f64, Option<f64>)) -> f64| median(&measured.iter().map(value).collect::<Vec<_>>());
    let (distance, std) = (middle(|of| of.0)?, middle(|of| of.1)?);
    // Where some have a gradient and some have none, the latter point nowhere.
    let cosine = if measured.iter().all(|of| of.2.is_none()) { None } else { middle(|of| of.2.unwrap_or(0.0)) };
    Some(Quality { bias: Bias::of(distance, std, draws), cosine, std, quartiles: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_of_the_mean_is_no_bias() {
        assert_eq!(Bias::of(0.5, 0.0, 1), Bias::Seen(0.5), "nothing is random");
        assert_eq!(Bias::of(0.5, 4.0, 100).to_string(), "< 0.400", "0.3 is within 0.4");
        assert_eq!(Bias::of(0.5, 3.0, 100).to_string(), "0.400", "0.4 is above 0.3");
        assert_eq!(Bias::of(0.1, 3.0, 100).to_string(), "< 0.300", "less than the noise is no negative bias");
        assert_eq!(Bias::of(0.0, 0.0, 64).to_string(), "0");
    }

    #[test]
    fn medians_are_of_the_same_probes() {
        let probe = |bias, cosine, std| probe::Quality { bias, cosine, std };
        let exact_is_0 = probe(f64::INFINITY, f64::NAN, f64::NAN);
        let found = probe::medians(&[probe(1.0, f64::NAN, 0.0), probe(0.5, 0.9, 0.1), probe(0.6, 0.8, 0.2), exact_is_0]);
        let quartiles = (Some([0.5, 0.6]), Some([0.0, 0.1]));
        assert_eq!((found.bias, found.cosine, found.std), (Some(0.6), Some(0.8), Some(0.1)), "no direction counts as 0");
        assert_eq!((found.bias_quartiles, found.std_quartiles), quartiles, "the lower of two neighbours");
        let none = probe::medians(&[probe(1.0, f64::NAN, 0.0), exact_is_0]);
        assert_eq!((none.bias, none.cosine, none.std), (Some(1.0), None, Some(0.0)));
        assert_eq!(probe::medians(&[exact_is_0]), GradientQuality::default());
    }

    #[test]
    fn medians_are_of_one_population() {
        let quality = summary(&[(1.0, 0.0, None), (0.5, 0.0, Some(0.9)), (0.6, 0.0, Some(0.8))], 64).expect("three");
        assert_eq!((quality.bias, quality.cosine), (Bias::Seen(0.6), Some(0.8)), "what has no direction counts");
        assert_eq!(summary(&[(1.0, 0.0, None)], 64).expect("one").cosine, None);
        assert_eq!(summary(&[], 64), None);
    }
}
