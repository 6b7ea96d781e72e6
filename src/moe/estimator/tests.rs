//! Tests of the estimators. `arms` is what they run over: every row of the catalogue at k = 1 and 2, and its variants.

mod backward;
mod config;
mod forward;
mod goldens;
mod means;
mod page;
mod parts;
mod preference;
mod sampling;
mod served;

use super::{
    EstimatorConfig, EstimatorSpec, Param, Purpose,
    catalog::{CATALOG, KRange, Kind},
};
use crate::moe::draw::{Draw, Stream};

/// Length of the runs whose schedules are resolved.
const STEPS: usize = 100;

fn spec(name: &str, k: Option<usize>, params: &[(&str, Param)], experts: usize) -> EstimatorSpec {
    let params = params.iter().map(|(name, param)| ((*name).to_owned(), param.clone())).collect();
    EstimatorSpec::new(&EstimatorConfig { name: name.into(), k, params }, experts, STEPS, Purpose::Laboratory).unwrap()
}

fn number(number: f64) -> Param {
    Param::Number(number)
}

fn word(word: &str) -> Param {
    Param::Word(word.into())
}

/// Every row at every k it has of 1 and 2, with its defaults and with each word and flag in turn.
fn arms(experts: usize) -> Vec<EstimatorSpec> {
    let mut arms = Vec::new();
    for row in CATALOG {
        let ks: &[Option<usize>] = match row.k {
            KRange::None => &[None],
            KRange::One => &[Some(1)],
            KRange::From { .. } | KRange::BelowExperts => &[Some(1), Some(2)],
        };
        for &k in ks {
            arms.push(spec(row.name, k, &[], experts));
            for param in row.params {
                match param.kind {
                    Kind::Flag => arms.push(spec(row.name, k, &[(param.name, Param::Flag(true))], experts)),
                    Kind::Choice { options, .. } => {
                        arms.extend(options.iter().map(|option| spec(row.name, k, &[(param.name, word(option))], experts)));
                    }
                    Kind::Number { .. } | Kind::Scheduled { .. } => {}
                }
            }
        }
    }
    arms
}

/// `count` standard normals times `scale`.
fn normals(seed: u64, count: usize, scale: f64) -> Vec<f64> {
    let draw = Draw::new(seed, 0, 0);
    (0..count as u64).map(|i| scale * draw.normal(Stream::Reinit, 0, i)).collect()
}

/// The naive softmax.
fn softmax(z: &[f64]) -> Vec<f64> {
    let sum: f64 = z.iter().map(|z| z.exp()).sum();
    z.iter().map(|z| z.exp() / sum).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst =
        found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, |worst: f64, d| if d.is_nan() { f64::NAN } else { worst.max(d) });
    assert!(worst <= tolerance, "{what}: off by {worst:e}\n{found:?}\n{expected:?}");
}
