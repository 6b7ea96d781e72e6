//! Verdicts with stated thresholds. Fidelity (is it the function that was trained?) and quality (does it predict better or worse?) are two
//! questions with two answers, and the answers can differ.
//!
//! No standard exists. The thresholds follow practice in quantisation, where a mean KL of 0.01 nats is hard to notice and 0.05 is not.

use serde::Serialize;

use super::{floor::Floor, run::OutputGaps};

/// A gap counts above so many times the noise floor.
pub const MATERIAL: f64 = 3.0;
/// A perplexity gap that is rounding, whatever its interval.
const NO_GAP: f64 = 1e-6;

/// How good a number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Safe.
    Green,
    /// Noticeable: look before you serve it.
    Amber,
    /// Another function: tune, or take a larger k.
    Red,
}

impl Level {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Green => "green",
            Self::Amber => "amber",
            Self::Red => "red",
        }
    }
}

/// The largest value that is green, and the largest that is amber.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Threshold {
    /// Up to here it is green.
    pub green: f64,
    /// Up to here it is amber, above red.
    pub amber: f64,
}

/// Mean KL at the logits, nats per token.
pub const KL: Threshold = Threshold { green: 0.01, amber: 0.05 };
/// Share of tokens whose likeliest next token is another.
pub const TOP1_DISAGREE: Threshold = Threshold { green: 0.02, amber: 0.06 };
/// Perplexity over the reference's, less 1.
pub const PERPLEXITY_GAP: Threshold = Threshold { green: 0.005, amber: 0.02 };
/// 95th percentile of the relative L2 distance of a layer's output for equal input.
pub const LOCAL_L2: Threshold = Threshold { green: 0.05, amber: 0.20 };
/// Mean reference weight outside the served experts, per layer.
pub const MISSED_MASS: Threshold = Threshold { green: 0.02, amber: 0.10 };

impl Threshold {
    /// The level of a value.
    pub fn level(self, value: f64) -> Level {
        if value <= self.green {
            Level::Green
        } else if value <= self.amber {
            Level::Amber
        } else {
            // A NaN too.
            Level::Red
        }
    }
}

/// One number, judged.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// The number.
    pub value: f64,
    /// The same routing against itself in other arithmetic; `None` where that was not measured.
    pub floor: Option<f64>,
    /// Above [`MATERIAL`] times the floor. What is not is green: it may be rounding.
    pub material: bool,
    /// By the thresholds.
    pub level: Level,
}

impl Judged {
    /// By a threshold and a floor.
    pub fn new(value: f64, threshold: Threshold, floor: Option<f64>) -> Self {
        let material = value.is_nan() || value > MATERIAL * floor.unwrap_or(0.0);
        Self { value, floor, material, level: if material { threshold.level(value) } else { Level::Green } }
    }
}

/// Is the served function the one that was trained?
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Fidelity {
    /// The worse of the two.
    pub level: Level,
    /// Mean KL.
    pub kl: Judged,
    /// Tokens whose likeliest next token is another.
    pub top1_disagree: Judged,
}

/// Does the served function predict the text as well?
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Quality {
    /// By the perplexity gap; what predicts better is green.
    pub level: Level,
    /// Which way.
    pub direction: Direction,
    /// The gap.
    pub perplexity_gap: Judged,
}

/// Which of the two predicts better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// The served routing.
    Better,
    /// Neither: the interval of the gap has 0 in it, or the gap is no larger than the noise.
    Same,
    /// The reference.
    Worse,
}

/// Both answers for one served routing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// Is it the function that was trained?
    pub fidelity: Fidelity,
    /// Does it predict as well?
    pub quality: Quality,
}

impl Verdict {
    /// Of a gap at the logits.
    pub fn new(output: &OutputGaps, floor: Option<&Floor>) -> Self {
        let kl = Judged::new(output.kl.mean, KL, floor.map(|floor| floor.kl));
        let top1_disagree = Judged::new(1.0 - output.top1_agree, TOP1_DISAGREE, floor.map(|floor| floor.top1_disagree));
        let fidelity = Fidelity { level: kl.level.max(top1_disagree.level), kl, top1_disagree };

        let gap = output.perplexity.gap;
        let noise = floor.map(|floor| floor.perplexity_gap);
        let judged = Judged::new(gap, PERPLEXITY_GAP, noise);
        let sure = output.perplexity.interval.is_none_or(|[low, high]| low > 0.0 || high < 0.0);
        let direction = match gap {
            _ if !sure || gap.abs() <= (MATERIAL * noise.unwrap_or(0.0)).max(NO_GAP) => Direction::Same,
            gap if gap < 0.0 => Direction::Better,
            _ => Direction::Worse,
        };
        let level = if direction == Direction::Worse { judged.level } else { Level::Green };
        Self { fidelity, quality: Quality { level, direction, perplexity_gap: judged } }
    }

    /// One sentence: what an operator can do.
    pub fn sentence(&self, name: &str) -> String {
        let fidelity = match self.fidelity.level {
            Level::Green => format!("{name} is the function that was trained, as far as the text shows"),
            Level::Amber => format!("{name} is noticeably another function than was trained"),
            Level::Red => format!("{name} is another function than was trained"),
        };
        let quality = match (self.quality.direction, self.quality.level) {
            (Direction::Better, _) => "and predicts the text better",
            (Direction::Same, _) => "and predicts the text as well",
            (Direction::Worse, Level::Green) => "and predicts the text nearly as well",
            (Direction::Worse, _) => "and predicts the text worse",
        };
        let action = match (self.fidelity.level, self.quality.level) {
            (Level::Green, Level::Green) => "safe to serve",
            (_, Level::Red) => "tune the router, or serve a larger k",
            (Level::Red, _) => "serve it only where the answers need not be those of the trained model",
            _ => "acceptable where a larger k costs too much",
        };
        format!("{fidelity}, {quality}: {action}.")
    }
}
