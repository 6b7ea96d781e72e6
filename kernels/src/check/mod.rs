//! Every kernel against its definition, over tables of shapes.

mod attention;
mod attention_prepare;
mod combine;
mod experts;
mod fill;
mod grouped;
mod limits;
mod linear;
mod norm;
mod random;
mod routing;
mod sample;

pub use self::random::Random;
use crate::{Result, Stream, bf16};

/// One kernel on one shape.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Of the kernel.
    pub kernel: &'static str,
    /// What it was run on.
    pub shape: String,
    /// The largest deviation, in units of what is allowed: up to 1 is good.
    pub deviation: f64,
}

/// Where checks put their outcomes.
#[derive(Debug)]
pub struct Bench {
    /// Where they run.
    pub stream: Stream,
    /// Small shapes only: for emulators, and for the impatient.
    pub quick: bool,
    outcomes: Vec<Outcome>,
}

/// Runs all checks.
///
/// # Errors
/// What a kernel that cannot be launched says. One that computes something else is no error but an outcome.
pub fn all(stream: Stream, quick: bool) -> Result<Vec<Outcome>> {
    let mut bench = Bench { stream, quick, outcomes: Vec::new() };
    for check in CHECKS {
        check(&mut bench)?;
    }
    Ok(bench.outcomes)
}

const CHECKS: &[fn(&mut Bench) -> Result<()>] = &[
    attention::check,
    attention_prepare::check,
    combine::check,
    experts::check,
    fill::check,
    grouped::check,
    limits::check,
    linear::check,
    norm::check,
    routing::check,
    sample::check,
];

impl Bench {
    /// Notes the outcome of one shape. Allowed is `absolute + relative · |expected|`; NaN is equal to NaN alone.
    pub fn compare(&mut self, kernel: &'static str, shape: impl Into<String>, found: &[f32], expected: &[f32], tolerance: Tolerance) {
        let mut deviation = if found.len() == expected.len() { 0.0 } else { f64::INFINITY };
        for (&found, &expected) in found.iter().zip(expected) {
            let allowed = tolerance.absolute + tolerance.relative * f64::from(expected).abs();
            let difference = f64::from(found) - f64::from(expected);
            let this = match (found == expected || (found.is_nan() && expected.is_nan()), difference.is_nan()) {
                (true, _) => 0.0,
                (false, true) => f64::INFINITY,
                (false, false) => difference.abs() / allowed,
            };
            deviation = f64::max(deviation, this);
        }
        self.outcomes.push(Outcome { kernel, shape: shape.into(), deviation });
    }

    /// Notes whether two things that have to be the same are.
    pub fn same<T: PartialEq + ?Sized>(&mut self, kernel: &'static str, shape: impl Into<String>, found: &T, expected: &T) {
        self.outcomes.push(Outcome { kernel, shape: shape.into(), deviation: if found == expected { 0.0 } else { f64::INFINITY } });
    }
}

/// Of norms: so much that one without it is seen.
const EPSILON: f32 = 0.25;

/// How far a result may be off.
#[derive(Clone, Copy, Debug)]
pub struct Tolerance {
    /// In units of the result.
    pub absolute: f64,
    /// In parts of what is expected.
    pub relative: f64,
}

impl Tolerance {
    /// Of sums in f32 in another order.
    pub const F32: Self = Self { absolute: 1e-5, relative: 1e-5 };
    /// Of results that are rounded to bf16, 2^-8 of their size at most, of operands that are bf16 already.
    pub const BF16: Self = Self { absolute: 4e-3, relative: 8e-3 };
}

/// As bf16.
pub fn narrow(values: &[f32]) -> Vec<bf16> {
    values.iter().copied().map(bf16::from_f32).collect()
}

/// As f32.
pub fn widen(values: &[bf16]) -> Vec<f32> {
    values.iter().copied().map(bf16::to_f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;

    fn check_all(quick: bool) {
        Device::open(0).unwrap();
        let outcomes = all(Stream::create().unwrap(), quick).unwrap();
        let bad: Vec<&Outcome> = outcomes.iter().filter(|outcome| outcome.deviation > 1.0).collect();
        assert!(bad.is_empty(), "{bad:#?}");
        assert!(outcomes.len() > 10);
    }

    #[test]
    fn kernels_compute_what_their_definitions_say() {
        check_all(true);
    }

    #[test]
    #[ignore = "takes minutes in an emulator"]
    fn also_on_large_shapes() {
        check_all(false);
    }

    #[test]
    fn deviations_are_seen() {
        let mut bench = Bench { stream: Stream::create().unwrap(), quick: true, outcomes: Vec::new() };
        let mut of = |found: &[f32], expected: &[f32]| {
            bench.compare("test", "", found, expected, Tolerance::F32);
            bench.outcomes.pop().unwrap().deviation
        };
        assert_eq!(of(&[1.0, f32::NAN], &[1.0, f32::NAN]), 0.0);
        assert!(of(&[1.0], &[1.0001]) > 1.0 && of(&[1.0], &[1.000_01]) < 1.0);
        assert!(of(&[f32::NAN], &[1.0]).is_infinite() && of(&[1.0], &[f32::NAN]).is_infinite() && of(&[1.0], &[]).is_infinite());
    }
}
