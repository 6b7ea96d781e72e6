//! Linear regression on the octants of a hidden three-dimensional space: the hard optimum is known and has loss 0.
//!
//! `x` is normal in 15 dimensions, `u = Q x` with three orthonormal rows. The signs of `u - t` name one of eight regions, and
//! each has its own linear map to the target. A linear router can tell them apart: the signs `s(e)` of region e give the
//! logits `Σ_i s_i(e) (u_i - t_i)`, largest where all signs agree.

use super::{Batch, Targets, Task};
use crate::compare::random::Random;

/// Thresholds that make the masses of the regions 0.03 to 0.32.
pub const UNEQUAL: [f64; 3] = [0.8, 0.5, 0.2];
/// Head start of expert 0, in logits.
pub const HANDICAP: f64 = 8.0;

const NORMAL: usize = 15;
const FEATURES: usize = NORMAL + 1;
const OUTPUTS: usize = 4;
const REGIONS: usize = 8;
/// Rows that steps take theirs from: so many more than there are weights that drawing new ones would change nothing but the
/// time.
const POOL: usize = 16_384;
/// Rows to choose settings by.
const VALIDATION: usize = 2048;

/// The task.
#[derive(Clone, Debug)]
pub struct Regions {
    seed: u64,
    /// Rows of Q.
    directions: [[f64; NORMAL]; 3],
    thresholds: [f64; 3],
    handicap: f64,
    /// `[E, O, D]`.
    maps: Vec<f64>,
    /// Rows that steps take theirs from.
    pool: Batch,
    validation: Batch,
    test: Batch,
    trivial: f64,
}

impl Regions {
    /// The task of `seed`.
    pub fn new(seed: u64, thresholds: [f64; 3], handicap: f64, test_rows: usize) -> Self {
        let mut random = Random::new(seed, "regions");
        let directions = orthonormal(&mut random);
        // So that the target has a variance of about 1.
        let maps = random.normals(REGIONS * OUTPUTS * FEATURES, 1.0 / (FEATURES as f64).sqrt());
        let empty = Batch { features: FEATURES, outputs: OUTPUTS, x: Vec::new(), targets: Targets::Values(Vec::new()), region: Vec::new() };
        let (pool, validation) = (empty.clone(), empty.clone());
        let mut task = Self { seed, directions, thresholds, handicap, maps, pool, validation, test: empty, trivial: 0.0 };
        task.pool = task.draw(&mut Random::new(seed, "pool"), POOL);
        task.validation = task.draw(&mut Random::new(seed, "validation rows"), VALIDATION);
        task.test = task.draw(&mut Random::new(seed, "test rows"), test_rows);
        task.trivial = trivial(&task.test);
        task
    }

    /// The linear maps of the regions, `[E, O, D]`: optimal experts.
    pub fn maps(&self) -> &[f64] {
        &self.maps
    }

    fn draw(&self, random: &mut Random, rows: usize) -> Batch {
        let mut x = Vec::with_capacity(rows * FEATURES);
        let mut y = Vec::with_capacity(rows * OUTPUTS);
        let mut region = Vec::with_capacity(rows);
        for _ in 0..rows {
            let mut row = [1.0; FEATURES];
            row.iter_mut().take(NORMAL).for_each(|x| *x = random.normal());
            let above = |i: usize| dot(&self.directions[i], &row) > self.thresholds[i];
            let r = (0..3).map(|i| usize::from(above(i)) << i).sum::<usize>();
            let map = &self.maps[r * OUTPUTS * FEATURES..(r + 1) * OUTPUTS * FEATURES];
            y.extend(map.chunks_exact(FEATURES).map(|map| dot(map, &row)));
            x.extend(row);
            region.push(r);
        }
        Batch { features: FEATURES, outputs: OUTPUTS, x, targets: Targets::Values(y), region }
    }
}

impl Task for Regions {
    fn features(&self) -> usize {
        FEATURES
    }

    fn outputs(&self) -> usize {
        OUTPUTS
    }

    fn hidden(&self) -> usize {
        0
    }

    fn batch(&self, step: usize, rows: usize) -> Batch {
        let mut random = Random::of_step(self.seed, "rows", step);
        let drawn: Vec<usize> = (0..rows).map(|_| random.below(POOL)).collect();
        self.pool.gather(&drawn)
    }

    fn test(&self) -> &Batch {
        &self.test
    }

    fn validation(&self) -> Option<&Batch> {
        Some(&self.validation)
    }

    fn handicap(&self) -> Vec<f64> {
        (0..REGIONS).map(|e| if e == 0 { self.handicap } else { 0.0 }).collect()
    }

    fn optimal_router(&self) -> Option<Vec<f64>> {
        let mut router = vec![0.0; REGIONS * FEATURES];
        for (e, row) in router.chunks_exact_mut(FEATURES).enumerate() {
            for i in 0..3 {
                let sign = if e >> i & 1 == 1 { 1.0 } else { -1.0 };
                row.iter_mut().zip(&self.directions[i]).for_each(|(w, q)| *w += sign * q);
                row[NORMAL] -= sign * self.thresholds[i];
            }
        }
        Some(router)
    }

    fn trivial(&self) -> f64 {
        self.trivial
    }
}

/// Variance of the targets: the loss of their mean.
fn trivial(test: &Batch) -> f64 {
    let Targets::Values(y) = &test.targets else { return f64::NAN };
    let rows = test.rows().max(1) as f64;
    let variance = |o: usize| {
        let of_output = || y.iter().skip(o).step_by(OUTPUTS);
        let mean = of_output().sum::<f64>() / rows;
        of_output().map(|y| (y - mean).powi(2)).sum::<f64>() / rows
    };
    (0..OUTPUTS).map(variance).sum::<f64>() / OUTPUTS as f64
}

/// Gram and Schmidt on three random rows.
fn orthonormal(random: &mut Random) -> [[f64; NORMAL]; 3] {
    let mut rows = [[0.0; NORMAL]; 3];
    for i in 0..3 {
        let mut row = [0.0; NORMAL];
        row.iter_mut().for_each(|x| *x = random.normal());
        for before in &rows[..i] {
            let along = dot(before, &row);
            row.iter_mut().zip(before).for_each(|(x, b)| *x -= along * b);
        }
        let length = dot(&row, &row).sqrt();
        rows[i] = row.map(|x| x / length);
    }
    rows
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::task::targets::argmax;

    fn masses(task: &Regions) -> Vec<f64> {
        let share = |r: usize| task.test.region.iter().filter(|&&region| region == r).count() as f64 / task.test.rows() as f64;
        (0..REGIONS).map(share).collect()
    }

    #[test]
    fn the_closed_form_router_finds_every_region_and_the_maps_leave_no_loss() {
        for thresholds in [[0.0; 3], UNEQUAL] {
            let task = Regions::new(3, thresholds, 0.0, 2000);
            let router = task.optimal_router().expect("there is one");
            let batch = task.batch(5, 500);
            let Targets::Values(y) = &batch.targets else { panic!("regression") };
            for (t, x) in batch.x.chunks_exact(FEATURES).enumerate() {
                let z: Vec<f64> = router.chunks_exact(FEATURES).map(|w| dot(w, x)).collect();
                assert_eq!(argmax(&z), batch.region[t]);
                let map = &task.maps()[argmax(&z) * OUTPUTS * FEATURES..];
                assert_eq!(y[t * OUTPUTS], dot(&map[..FEATURES], x));
            }
        }
    }

    #[test]
    fn masses_are_equal_or_not_as_stated() {
        let error = 4.0 * (0.25_f64 / 20_000.0).sqrt();
        let equal = masses(&Regions::new(1, [0.0; 3], 0.0, 20_000));
        assert!(equal.iter().all(|m| (m - 0.125).abs() < error), "{equal:?}");
        let unequal = masses(&Regions::new(1, UNEQUAL, 0.0, 20_000));
        // P(u > 0.8), P(u > 0.5), P(u > 0.2) are 0.2119, 0.3085, 0.4207.
        assert!((unequal[0] - 0.7881 * 0.6915 * 0.5793).abs() < error, "{unequal:?}");
        assert!((unequal[7] - 0.2119 * 0.3085 * 0.4207).abs() < error, "{unequal:?}");
    }

    #[test]
    fn one_seed_is_one_task_and_steps_differ() {
        let (a, b) = (Regions::new(2, [0.0; 3], 0.0, 10), Regions::new(2, [0.0; 3], 0.0, 10));
        assert_eq!(a.batch(7, 20), b.batch(7, 20));
        assert_ne!(a.batch(7, 20), a.batch(8, 20));
        assert_ne!(a.test(), Regions::new(3, [0.0; 3], 0.0, 10).test());
        let validation = a.validation().expect("there is one").part(0..10);
        assert!(validation.x != a.test().x && validation.x != a.pool.part(0..10).x, "rows of their own");
        assert!((a.trivial() - 1.0).abs() < 0.9);
    }
}
