//! What one cell of the laboratory is. A cell's file holds its whole specification, so that a rerun knows what is done.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{
    arm::{Arm, Route},
    data,
};
use crate::{
    durable::hex,
    error::{Error, Result},
    moe::estimator::{EstimatorConfig, EstimatorSpec, Param, Purpose},
};

/// Version of the measurement: part of every cell, raised whenever code changes what a cell would measure, so that old
/// cells are not taken for new ones. A test (`compare::tests`) notices what is forgotten.
pub const LAB_VERSION: u32 = 3;

/// In tuning the router learns this much slower than the rest: it is the teacher's already.
const TUNING_ROUTER_RATE: f64 = 0.3;

/// A task of the laboratory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskName {
    /// Eight linear regions of equal mass.
    Equal,
    /// Eight linear regions with masses between 0.03 and 0.32.
    Unequal,
    /// `Equal`, where the router of expert 0 starts 8 above the others.
    Collapsed,
    /// Rotated handwritten digits.
    Digits,
    /// A byte language model on text of four domains.
    Text,
    /// `Equal` at several learning rates.
    Rates,
    /// Gradients of one token, everything enumerated; nothing is trained.
    Gradient,
}

/// Where a cell starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// From random weights.
    Scratch,
    /// From the weights of the soft-trained teacher of the same seed.
    Tune,
}

/// What arms are given equally much of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// Equal steps.
    Steps,
    /// Equal expert-FLOPs, forward and backward: an arm whose step takes n times the products of a sparse top-1 arm's has
    /// 1/n of the steps ([`super::cost`]).
    Flops,
}

/// How long a cell trains and on how much it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Size {
    /// Updates.
    pub steps: usize,
    /// Tokens of a step; windows, for text; random draws, for `gradient`.
    pub batch: usize,
    /// Test tokens; windows, for text; problems, for `gradient`.
    pub test: usize,
    /// Points of the curves.
    pub points: usize,
    /// Peak of Adam's learning rate, which falls to 0 by a cosine.
    pub rate: f64,
}

/// One training and its measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CellSpec {
    /// [`LAB_VERSION`].
    pub lab: u32,
    /// On what.
    pub task: TaskName,
    /// From where.
    pub mode: Mode,
    /// For how long.
    pub budget: Budget,
    /// What is compared.
    pub arm: Arm,
    /// Of the task's data, the initial weights and the noise. Arms with one seed see the same task and start.
    pub seed: u64,
    /// Steps and rows.
    pub size: Size,
    /// In tuning: those of the teacher, which is the soft arm of the same task and seed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher_size: Option<Size>,
}

/// What decides a cell's figures besides its specification: defaults of this program, filled in.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Experts per token in training; absent where the estimator has no k.
    pub k: Option<usize>,
    /// Every parameter of the estimator.
    pub params: BTreeMap<String, Param>,
    /// Peak learning rate of all but the router.
    pub rate: f64,
    /// Peak learning rate of the router; 0 where it does not learn.
    pub router_rate: f64,
    /// Digest of the files that the task reads; absent where it reads none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
}

impl TaskName {
    /// All of them, in the order of the report.
    pub const ALL: [Self; 7] = [Self::Equal, Self::Unequal, Self::Collapsed, Self::Digits, Self::Text, Self::Rates, Self::Gradient];

    /// As flags and files spell it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Equal => "equal",
            Self::Unequal => "unequal",
            Self::Collapsed => "collapsed",
            Self::Digits => "digits",
            Self::Text => "text",
            Self::Rates => "rates",
            Self::Gradient => "gradient",
        }
    }

    /// Experts of its layers.
    pub fn experts(self) -> usize {
        match self {
            Self::Equal | Self::Unequal | Self::Collapsed | Self::Rates | Self::Gradient => 8,
            Self::Digits | Self::Text => 4,
        }
    }

    /// In which modes it is run.
    pub fn modes(self) -> &'static [Mode] {
        match self {
            Self::Equal | Self::Digits | Self::Text => &[Mode::Scratch, Mode::Tune],
            Self::Unequal | Self::Collapsed | Self::Rates | Self::Gradient => &[Mode::Scratch],
        }
    }

    /// What the routing is compared with.
    pub fn optimum(self) -> &'static str {
        match self {
            Self::Equal | Self::Unequal | Self::Collapsed | Self::Rates => "the best routing, known in closed form",
            Self::Digits => "the rotation of the digit: a label, not an optimum, so that an arm may be better than `oracle`",
            Self::Text => "the domain of the text: a label, not an optimum, so that an arm may be better than `oracle`",
            Self::Gradient => "none",
        }
    }
}

impl Mode {
    /// As flags and files spell it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Scratch => "scratch",
            Self::Tune => "tune",
        }
    }
}

impl Budget {
    /// As files spell it.
    pub fn id(self) -> &'static str {
        match self {
            Self::Steps => "steps",
            Self::Flops => "flops",
        }
    }
}

impl CellSpec {
    /// Name of the cell, unique among all: readable, then the hash of everything that defines it, defaults included.
    pub fn id(&self) -> Result<String> {
        let teacher = self.teacher().map(|teacher| teacher.settings()).transpose()?;
        let all = (self, self.settings()?, teacher);
        let json = serde_json::to_vec(&all).map_err(|error| Error::Internal(format!("a cell has no JSON form: {error}")))?;
        Ok(format!("{}-{}", self.slug(), hex(&Sha256::digest(json)[..4])))
    }

    /// The readable part of [`Self::id`]: cells that differ only in settings or in their version share it.
    pub fn slug(&self) -> String {
        format!("{}-{}-{}-{}-s{}", self.task.id(), self.mode.id(), self.budget.id(), self.arm.name, self.seed)
    }

    /// What the cell is run with once every default is filled in.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on what the estimator cannot have.
    pub fn settings(&self) -> Result<Settings> {
        let estimator = EstimatorSpec::new(&self.arm.estimator, self.task.experts(), self.size.steps, Purpose::Laboratory)?;
        let EstimatorConfig { k, params, .. } = estimator.resolved();
        let learns = match self.arm.route {
            Route::Learned => true,
            Route::ExpertsAfter { share } => share > 0.0,
            Route::Frozen | Route::Hash | Route::Oracle | Route::Untouched => false,
        };
        let router_rate = if learns { self.router_share() * self.size.rate } else { 0.0 };
        Ok(Settings { k, params, rate: self.size.rate, router_rate, data: data::digest(self.task).map(str::to_owned) })
    }

    /// Learning rate of a router that learns over that of the rest.
    pub fn router_share(&self) -> f64 {
        if self.mode == Mode::Tune { TUNING_ROUTER_RATE } else { 1.0 }
    }

    /// The file of its result in the folder of cells.
    pub fn file(&self, cells: &Path) -> Result<PathBuf> {
        Ok(cells.join(format!("{}.json", self.id()?)))
    }

    /// The file of its trained weights, if others start from them: of a teacher.
    pub fn weights(&self, cells: &Path) -> Result<PathBuf> {
        Ok(cells.join(format!("{}.teacher", self.id()?)))
    }

    /// The cell that must run before this one: the teacher, in [`Mode::Tune`].
    pub fn teacher(&self) -> Option<CellSpec> {
        let size = self.teacher_size?;
        Some(Self { mode: Mode::Scratch, budget: Budget::Steps, arm: Arm::teacher(), size, teacher_size: None, ..self.clone() })
    }

    /// Whether the weights of this cell are kept, because others start from them.
    pub fn is_teacher(&self) -> bool {
        self.arm == Arm::teacher()
    }
}
