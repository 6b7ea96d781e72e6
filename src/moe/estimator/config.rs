//! An estimator as a recipe names it, and its check: everything that can be wrong is found before a run begins.

use std::{collections::BTreeMap, fmt};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::{
    Baseline, Estimator, Gradient, NoiseKind, Regulariser, Relaxation, Selection, Weights,
    catalog::{self, CATALOG, KRange, Kind, ParamRow, Range, Row, Way},
    values::{Setting, Values},
};
use crate::{
    error::{Error, Result},
    schedule::{Schedule, Shape},
};

/// A row of the catalogue and what differs from its defaults.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EstimatorConfig {
    /// Of the row.
    pub name: String,
    /// Experts per token in training; the row's default unless stated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// By the names of the row's parameters.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub params: BTreeMap<String, Param>,
}

/// A value as a recipe writes it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Param {
    /// `1.5`.
    Number(f64),
    /// `true`.
    Flag(bool),
    /// `"laplace"`.
    Word(String),
    /// `{ init = 2.0, final = 0.25 }`.
    Schedule(Schedule),
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// A model is to be trained and saved: what cannot train a router, or cannot be saved, is refused.
    Train,
    /// Estimators are compared, the broken ones with the others.
    Laboratory,
}

/// What a run may change about the choice of experts, whatever the method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChoiceChange {
    /// Now and then it is made evenly at random.
    Epsilon,
    /// A bias is added to the scores it is made on: loss-free balancing, or a remedy.
    Bias,
    /// Now and then an expert is left out of it.
    Dropout,
}

/// A checked estimator with its schedules.
#[derive(Clone, Debug)]
pub struct EstimatorSpec {
    row: &'static Row,
    k: usize,
    settings: Vec<(&'static str, Setting)>,
}

impl EstimatorSpec {
    /// Checks `config` for layers of `experts` experts and a run of `steps` updates.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on `routing.estimator`, `routing.k` or the parameter.
    pub fn new(config: &EstimatorConfig, experts: usize, steps: usize, purpose: Purpose) -> Result<Self> {
        let row = catalog::find(&config.name).ok_or_else(|| unknown(&config.name))?;
        if let (Purpose::Train, Some(reason)) = (purpose, row.laboratory_only) {
            return Err(Error::invalid("routing.estimator", format!("{} is only for the laboratory: {reason}", row.name)));
        }
        let k = check_k(row, config.k, experts)?;
        if let Some(name) = config.params.keys().find(|name| row.params.iter().all(|param| param.name != name.as_str())) {
            return Err(Error::invalid(format!("routing.{name}"), no_such_parameter(row)));
        }
        let setting = |param: &ParamRow| Ok((param.name, check(param, config.params.get(param.name), k, steps)?));
        let spec = Self { row, k, settings: row.params.iter().map(setting).collect::<Result<_>>()? };
        spec.check_whole(config, purpose)?;
        Ok(spec)
    }

    /// The same with every default written out.
    pub fn resolved(&self) -> EstimatorConfig {
        let param = |setting: Setting| match setting {
            Setting::Number(schedule) if schedule.schedule == Shape::Constant => Param::Number(schedule.init),
            Setting::Number(schedule) => Param::Schedule(schedule),
            Setting::Word(word) => Param::Word(word.to_owned()),
            Setting::Flag(flag) => Param::Flag(flag),
        };
        let params = self.settings.iter().map(|(name, setting)| ((*name).to_owned(), param(*setting))).collect();
        EstimatorConfig { name: self.row.name.to_owned(), k: self.k(), params }
    }

    /// The row of the catalogue.
    pub fn row(&self) -> &'static Row {
        self.row
    }

    /// Experts per token in training; `None` where the estimator has no k.
    pub fn k(&self) -> Option<usize> {
        (self.row.k != KRange::None).then_some(self.k)
    }

    /// The estimator in force at `step` of `steps`.
    pub fn at(&self, step: usize, steps: usize) -> Estimator {
        (self.row.build)(&self.values(step, steps))
    }

    /// A number among the parameters in force at `step`, for logs and curves; `None` if the estimator has no such one.
    pub fn number_at(&self, name: &str, step: usize, steps: usize) -> Option<f64> {
        self.schedule(name).map(|schedule| schedule.at(step, steps))
    }

    /// The schedule of a number among the parameters; `None` if the estimator has no such one.
    pub fn schedule(&self, name: &str) -> Option<Schedule> {
        match self.settings.iter().find(|(known, _)| *known == name)?.1 {
            Setting::Number(schedule) => Some(schedule),
            Setting::Word(_) | Setting::Flag(_) => None,
        }
    }

    /// What the method adds to the loss at `step` of `steps`.
    pub fn regulariser(&self, step: usize, steps: usize) -> Regulariser {
        (self.row.regulariser)(&self.values(step, steps))
    }

    /// Refuses a change of the choice, set by `field`, under which the gradient would not be the one that the method is
    /// known for.
    ///
    /// Methods that draw their experts have a gradient that is right in the mean over just these draws. Choices by
    /// epsilon are other draws. A bias moves the draws too: REINFORCE takes the score of what it has drawn from, bias
    /// and all, and stays exact; the others differentiate the softmax without it. An expert that is left out is to leave
    /// the weights of the others as they would be without it, which those of DSelect-k cannot be.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] on `field`.
    pub fn check_choice(&self, change: ChoiceChange, field: &str) -> Result<()> {
        let Estimator { noise, selection, gradient, relaxation, .. } = self.at(0, 1);
        let draws = noise.kind == NoiseKind::Gumbel && matches!(selection, Selection::TopK { .. });
        let name = self.row.name;
        let message = match change {
            ChoiceChange::Epsilon if draws => format!(
                "{name} draws its experts, and its gradient is made for these draws: choices at random beside them would make it \
                 biased; it explores without"
            ),
            ChoiceChange::Bias if draws && !matches!(gradient, Gradient::Score { .. }) => format!(
                "{name} draws its experts, and its gradient is made for draws without a selection bias: it would be biased; balance \
                 with a loss, such as switch"
            ),
            ChoiceChange::Dropout if matches!(relaxation, Relaxation::SmoothStep { .. }) => {
                format!("the weights of {name} are products of bits that experts share: none can be left out of them")
            }
            ChoiceChange::Epsilon | ChoiceChange::Bias | ChoiceChange::Dropout => return Ok(()),
        };
        Err(Error::invalid(field, message))
    }

    fn values(&self, step: usize, steps: usize) -> Values<'_> {
        Values { k: self.k, settings: &self.settings, step, steps }
    }

    /// What no parameter says by itself.
    fn check_whole(&self, config: &EstimatorConfig, purpose: Purpose) -> Result<()> {
        let estimator = self.at(0, 1);
        if purpose == Purpose::Train && self.k == 1 && estimator.weights == Weights::Renorm && estimator.gradient == Gradient::Exact {
            let message =
                "renormalised top-1 has weight 1 for every router, so the router gets no gradient; use raw_topk, ste or soft, or k = 2";
            let field = if config.params.contains_key("weights") { "routing.weights" } else { "routing.k" };
            return Err(Error::invalid(field, message));
        }
        let Gradient::Score { baseline, samples } = estimator.gradient else { return Ok(()) };
        if baseline == Baseline::LeaveOneOut && samples < 2 {
            return Err(Error::invalid("routing.samples", "must be at least 2: leave_one_out takes the mean of the others"));
        }
        if config.params.contains_key("decay") && !matches!(baseline, Baseline::MovingAverage { .. }) {
            let message = "has no effect because only baseline = \"moving_average\" has an average; remove it";
            return Err(Error::invalid("routing.decay", message));
        }
        Ok(())
    }
}

fn unknown(name: &str) -> Error {
    let nearest = CATALOG.iter().map(|row| (distance(name, row.name), row.name)).min().filter(|(distance, _)| *distance <= 2);
    let guess = nearest.map(|(_, name)| format!("did you mean {name}? ")).unwrap_or_default();
    let names: Vec<&str> = CATALOG.iter().map(|row| row.name).collect();
    Error::invalid("routing.estimator", format!("'{name}' is unknown; {guess}one of {}", names.join(", ")))
}

/// Insertions, deletions and replacements from one word to the other (Levenshtein 1966).
pub(crate) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    // Longer than any name: no near miss, and not worth the time.
    for (i, a) in a.chars().take(64).enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

fn no_such_parameter(row: &Row) -> String {
    let names: Vec<&str> = row.params.iter().map(|param| param.name).collect();
    match names.as_slice() {
        [] => format!("{} has no such parameter; it has none", row.name),
        names => format!("{} has no such parameter; it has {}", row.name, names.join(", ")),
    }
}

fn check_k(row: &Row, k: Option<usize>, experts: usize) -> Result<usize> {
    let bad = |message: String| Err(Error::invalid("routing.k", message));
    let default = if let KRange::From { from } = row.k { from } else { 1 };
    let chosen = k.unwrap_or(default);
    match row.k {
        KRange::None if k.is_some() => bad(format!("{} has none: it weighs all experts", row.name)),
        KRange::None => Ok(1),
        KRange::One if chosen != 1 => bad(format!("{} routes to one expert", row.name)),
        _ if chosen == 0 => bad("must be at least 1".into()),
        _ if chosen > experts => bad(format!("{chosen} is more than the {experts} experts")),
        KRange::BelowExperts if chosen == experts => bad(format!("{} needs fewer than all {experts} experts", row.name)),
        _ => Ok(chosen),
    }
}

fn check(param: &ParamRow, given: Option<&Param>, k: usize, steps: usize) -> Result<Setting> {
    let field = || format!("routing.{}", param.name);
    let bad = |message: String| Err(Error::invalid(field(), message));
    let schedule = |schedule: Schedule, range: Range| match range.problem(&schedule, steps) {
        Some(problem) => bad(problem),
        None => Ok(Setting::Number(schedule)),
    };
    match (param.kind, given) {
        (Kind::Scheduled { default, range }, None) => schedule(default.into(), range),
        (Kind::Scheduled { range, .. }, Some(Param::Number(number))) => schedule(Schedule::constant(*number), range),
        (Kind::Scheduled { range, .. }, Some(Param::Schedule(given))) => schedule(*given, range),
        (Kind::Scheduled { .. }, Some(_)) => bad("must be a number, or a schedule with init and final".into()),
        (Kind::Number { default, range }, None) => schedule(Schedule::constant(default), range),
        (Kind::Number { range, .. }, Some(Param::Number(number))) => schedule(Schedule::constant(*number), range),
        (Kind::Number { .. }, Some(_)) => bad("must be a number, the same for the whole run".into()),
        (Kind::Choice { default, .. }, None) => Ok(Setting::Word(default[usize::from(k > 1)])),
        (Kind::Choice { options, .. }, Some(given)) => {
            let known = |word: &String| options.iter().find(|option| *option == word);
            match given {
                Param::Word(word) => known(word).map(|word| Setting::Word(word)),
                _ => None,
            }
            .map_or_else(|| bad(format!("must be one of {}", options.join(", "))), Ok)
        }
        (Kind::Flag, None) => Ok(Setting::Flag(false)),
        (Kind::Flag, Some(Param::Flag(flag))) => Ok(Setting::Flag(*flag)),
        (Kind::Flag, Some(_)) => bad("must be true or false".into()),
    }
}

impl Range {
    /// What is wrong with a number over a run, if anything.
    pub(super) fn problem(self, schedule: &Schedule, steps: usize) -> Option<String> {
        // Every form of the way stays between its ends.
        let ends = [schedule.init, schedule.last()];
        if let Some(bad) = ends.into_iter().find(|end| !self.contains(*end)) {
            return Some(format!("{bad} is no value for it: must be {self} at every step"));
        }
        schedule.problem(self.excludes_zero(), steps)
    }

    fn contains(self, x: f64) -> bool {
        x.is_finite()
            && match self {
                Self::Positive => x > 0.0,
                Self::NotNegative => x >= 0.0,
                Self::AtLeast(least) => x >= least,
                Self::Between(low, high) => x > low && x < high,
                Self::Probability => (0.0..1.0).contains(&x),
                Self::Alpha => x > 1.0 && x <= 2.0,
                Self::Count(least) => x >= least as f64 && x.fract() == 0.0 && x <= f64::from(u16::MAX),
            }
    }

    fn excludes_zero(self) -> bool {
        !self.contains(0.0)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Positive => f.write_str("above 0"),
            Self::NotNegative => f.write_str("at least 0"),
            Self::AtLeast(least) => write!(f, "at least {least}"),
            Self::Between(low, high) => write!(f, "above {low} and below {high}"),
            Self::Probability => f.write_str("at least 0 and below 1"),
            Self::Alpha => f.write_str("above 1 and at most 2"),
            Self::Count(least) => write!(f, "a whole number from {least} to {}", u16::MAX),
        }
    }
}

impl From<Way> for Schedule {
    fn from(way: Way) -> Self {
        match way {
            Way::Constant(value) => Self::constant(value),
            Way::Along(shape, init, end) => Self::new(shape, init, end),
        }
    }
}

impl<'de> Deserialize<'de> for Param {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyParam)
    }
}

/// By hand: an untagged enum would say of every mistake only that nothing matched.
struct AnyParam;

impl<'de> Visitor<'de> for AnyParam {
    type Value = Param;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, a word, true or false, or a schedule with init and final")
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Param, E> {
        Ok(Param::Number(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Param, E> {
        Ok(Param::Number(value as f64))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Param, E> {
        Ok(Param::Number(value as f64))
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Param, E> {
        Ok(Param::Flag(value))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Param, E> {
        Ok(Param::Word(value.to_owned()))
    }

    fn visit_map<M: MapAccess<'de>>(self, map: M) -> Result<Param, M::Error> {
        Schedule::deserialize(MapAccessDeserializer::new(map)).map(Param::Schedule)
    }
}
