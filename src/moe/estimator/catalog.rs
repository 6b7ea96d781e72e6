//! The catalogue: estimators by name. A row is data: what the method is, its settings with defaults, and the parts that it
//! is made of.

mod rows;

pub use self::rows::CATALOG;
use super::{Baseline, Combine, Estimator, Execution, Gradient, NoiseKind, Regulariser, Relaxation, values::Values};
use crate::schedule::Shape;

/// An estimator with a name.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// As recipes and reports spell it.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// Weights of the training forward.
    pub forward: &'static str,
    /// Gradient of the router outputs; c is the credit, J the vector-Jacobian product of the relaxation.
    pub backward: &'static str,
    /// Where the method comes from; numbers are those of arXiv.
    pub source: &'static str,
    /// What to know before choosing it.
    pub note: &'static str,
    /// Which k it can have.
    pub k: KRange,
    /// Settings besides k.
    pub params: &'static [ParamRow],
    /// Why a recipe cannot use it; `hardmax compare` can.
    pub laboratory_only: Option<&'static str>,
    /// What it adds to the loss, from the values that are in force at a step.
    pub(in crate::moe::estimator) regulariser: fn(&Values<'_>) -> Regulariser,
    /// The parts, from the values that are in force at a step.
    pub(in crate::moe::estimator) build: fn(&Values<'_>) -> Estimator,
}

/// Which k an estimator can have. The default is the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KRange {
    /// It has none.
    None,
    /// 1.
    One,
    /// `from`, up to all experts.
    From {
        /// Default.
        from: usize,
    },
    /// From 1 to all experts but one: with all of them there would be nothing to choose.
    BelowExperts,
}

/// A setting of an estimator.
#[derive(Clone, Copy, Debug)]
pub struct ParamRow {
    /// As recipes spell it.
    pub name: &'static str,
    /// Its values and default.
    pub kind: Kind,
    /// What it does.
    pub doc: &'static str,
}

/// Values of a setting.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A number that may change over the run.
    Scheduled {
        /// Unless stated.
        default: Way,
        /// At every step.
        range: Range,
    },
    /// A number for the whole run.
    Number {
        /// Unless stated.
        default: f64,
        /// What it may be.
        range: Range,
    },
    /// One of a few words.
    Choice {
        /// The words.
        options: &'static [&'static str],
        /// Unless stated: at k = 1, and above.
        default: [&'static str; 2],
    },
    /// Yes or no; no unless stated.
    Flag,
}

/// Default of a scheduled setting; a tenth of the run is held at either end.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Way {
    /// The same at every step.
    Constant(f64),
    /// From one value to another.
    Along(Shape, f64, f64),
}

/// What a number may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Range {
    /// Above 0.
    Positive,
    /// 0 or more.
    NotNegative,
    /// So much or more.
    AtLeast(f64),
    /// Above the first, below the second.
    Between(f64, f64),
    /// At least 0, below 1.
    Probability,
    /// Above 1, at most 2.
    Alpha,
    /// A whole number from the first on.
    Count(usize),
}

/// The row of a name.
pub fn find(name: &str) -> Option<&'static Row> {
    CATALOG.iter().find(|row| row.name == name)
}

/// What a method asks of whoever implements and runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// All experts run in training.
    pub dense: bool,
    /// Random numbers.
    pub noise: bool,
    /// Something remembered from step to step.
    pub state: bool,
    /// Router outputs besides one logit per expert.
    pub outputs: bool,
    /// A backward that automatic differentiation of the forward does not give.
    pub backward: bool,
    /// Parameters of experts are added up.
    pub merge: bool,
}

impl Row {
    /// Whether a checkpoint in the layout of Mixtral can hold what was trained.
    pub fn exports(&self) -> bool {
        self.laboratory_only.is_none()
    }
}

impl Estimator {
    /// What the method asks for.
    pub fn needs(&self) -> Needs {
        let implicit = matches!(self.relaxation, Relaxation::Entmax { .. } | Relaxation::SoftTopK { .. });
        let moving = matches!(self.gradient, Gradient::Score { baseline: Baseline::MovingAverage { .. }, .. });
        Needs {
            dense: self.combine == Combine::Mixture(Execution::All),
            noise: self.noise.kind != NoiseKind::None || self.noise.dropout > 0.0,
            state: moving || matches!(self.combine, Combine::Means { .. }) || self.relaxation == Relaxation::Relu,
            outputs: self.noise.kind == NoiseKind::Learned || matches!(self.relaxation, Relaxation::SmoothStep { .. }),
            backward: implicit || !matches!(self.gradient, Gradient::Zero | Gradient::Exact),
            merge: self.combine == Combine::Merged,
        }
    }
}
