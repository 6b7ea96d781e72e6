//! Tasks: rows with features, targets and the region that an optimal router would tell apart.

pub mod digits;
pub mod regions;
pub mod targets;

use std::ops::Range;

pub use targets::Targets;

use super::spec::{Size, TaskName};
use crate::error::{Error, Result};

/// Rows of a task. The last feature is a constant 1: the bias of router and experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    /// D.
    pub features: usize,
    /// O.
    pub outputs: usize,
    /// `[T, D]`.
    pub x: Vec<f64>,
    /// What should come out, `[T]`.
    pub targets: Targets,
    /// The expert that an optimal router chooses, `[T]`.
    pub region: Vec<usize>,
}

/// A source of rows. Everything follows from the seed it was made with.
pub trait Task: Send + Sync {
    /// Features of a row, D, the constant included.
    fn features(&self) -> usize;

    /// Outputs of an expert, O.
    fn outputs(&self) -> usize;

    /// Hidden units of an expert; 0: experts are linear.
    fn hidden(&self) -> usize;

    /// The rows of a step.
    fn batch(&self, step: usize, rows: usize) -> Batch;

    /// Rows that no step sees.
    fn test(&self) -> &Batch;

    /// Rows that are in neither, to choose settings by; `None` where the data is too small for that.
    fn validation(&self) -> Option<&Batch>;

    /// Added to the router's initial logits, `[E]`.
    fn handicap(&self) -> Vec<f64>;

    /// Router weights `[E, D]` that route every row to its region, if there are such in closed form.
    fn optimal_router(&self) -> Option<Vec<f64>>;

    /// Loss of the best constant prediction on the test rows.
    fn trivial(&self) -> f64;
}

/// The task of a cell; text is trained by [`super::lm`], `gradient` by nobody.
pub fn open(name: TaskName, seed: u64, size: Size) -> Result<Box<dyn Task>> {
    match name {
        TaskName::Equal | TaskName::Rates => Ok(Box::new(regions::Regions::new(seed, [0.0; 3], 0.0, size.test))),
        TaskName::Unequal => Ok(Box::new(regions::Regions::new(seed, regions::UNEQUAL, 0.0, size.test))),
        TaskName::Collapsed => Ok(Box::new(regions::Regions::new(seed, [0.0; 3], regions::HANDICAP, size.test))),
        TaskName::Digits => Ok(Box::new(digits::Digits::new(seed)?)),
        TaskName::Text | TaskName::Gradient => Err(Error::Internal(format!("{} is not a task of the small net", name.id()))),
    }
}

impl Batch {
    /// Rows, T.
    pub fn rows(&self) -> usize {
        self.region.len()
    }

    /// Some of the rows.
    pub fn part(&self, rows: Range<usize>) -> Batch {
        let rows = rows.start.min(self.rows())..rows.end.min(self.rows());
        Batch {
            x: self.x[rows.start * self.features..rows.end * self.features].to_vec(),
            targets: self.targets.part(rows.clone(), self.outputs),
            region: self.region[rows].to_vec(),
            ..*self
        }
    }

    /// Rows by their numbers, which must be below [`Self::rows`].
    pub fn gather(&self, rows: &[usize]) -> Batch {
        let x = rows.iter().flat_map(|row| &self.x[row * self.features..(row + 1) * self.features]).copied().collect();
        let targets = self.targets.gather(rows, self.outputs);
        Batch { x, targets, region: rows.iter().map(|row| self.region[*row]).collect(), ..*self }
    }

    /// A hash of every row's features, `[T]`: what routes the control `hash`.
    pub fn hashes(&self) -> Vec<u64> {
        let hash =
            |row: &[f64]| row.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, x| (h ^ x.to_bits()).wrapping_mul(0x0100_0000_01b3) ^ (h >> 29));
        self.x.chunks_exact(self.features.max(1)).map(hash).collect()
    }
}
