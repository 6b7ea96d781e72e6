//! How good a model is on held-out text under hard routing, measured with the forward that will serve it.

use std::collections::BTreeMap;

use candle_core::Device;
use rayon::prelude::*;
use serde::{Deserialize, Deserializer, Serialize};

use crate::{
    error::Result,
    fidelity::{
        case::Case,
        measure::{kl, likeliest, nll},
        run::SideBySide,
    },
    model::{Batch, Forward, LanguageModel, LogitRows, load::ServingModel},
    moe::RoutingStats,
    train::learner::{Turn, in_turn},
};

/// A routing to be measured beside the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Routed {
    /// The routing.
    pub case: Case,
    /// It is top-k with this k and the weights that the model serves top-k with.
    pub k: Option<usize>,
}

/// A model on held-out text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Compared tokens.
    pub tokens: u64,
    /// Perplexity under its reference routing.
    #[serde(deserialize_with = "number")]
    pub reference_perplexity: f64,
    /// The serving routing first.
    pub routings: Vec<RoutingFigures>,
}

/// A model on held-out text under one routing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingFigures {
    /// As `top-1`; `native` is the model's own.
    pub routing: String,
    /// It is top-k with this k, whatever it is called.
    pub k: Option<usize>,
    /// Of the token that follows.
    #[serde(deserialize_with = "number")]
    pub perplexity: f64,
    /// The own gap: `KL(reference ‖ routing)` of next-token distributions, nats per token.
    #[serde(deserialize_with = "number")]
    pub kl: f64,
    /// The same from the reference routing of the model before it was tuned.
    #[serde(deserialize_with = "number")]
    pub teacher_kl: f64,
    /// Share of tokens with the same likeliest next token as under the reference.
    pub top1_agree: f64,
    /// By MoE layer, `[E]`: load over fair share.
    pub utilization: Vec<Vec<f64>>,
    /// By MoE layer: experts without a token.
    pub dead: Vec<usize>,
}

impl Figures {
    /// Under the routing that is to be served.
    pub fn serving(&self) -> Option<&RoutingFigures> {
        self.routings.first()
    }

    /// Under top-k.
    pub fn top(&self, k: usize) -> Option<&RoutingFigures> {
        self.routings.iter().find(|routing| routing.k == Some(k))
    }
}

/// A number, or the `null` that JSON has for one that is infinite or none.
pub(super) fn number<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::INFINITY))
}

/// [`number`]s by name.
pub(super) fn numbers<'de, D: Deserializer<'de>>(from: D) -> std::result::Result<BTreeMap<String, f64>, D::Error> {
    let numbers: BTreeMap<String, Option<f64>> = Deserialize::deserialize(from)?;
    Ok(numbers.into_iter().map(|(name, number)| (name, number.unwrap_or(f64::INFINITY))).collect())
}

/// Sums over tokens.
#[derive(Clone, Debug, Default)]
struct Sums {
    kl: f64,
    teacher_kl: f64,
    agree: u64,
    nll: f64,
    layers: Vec<RoutingStats>,
}

/// One token.
struct Compared {
    kl: f64,
    teacher_kl: f64,
    agrees: bool,
    /// Of the token that follows, where the window has one.
    nll: Option<f64>,
}

/// One model with a cache for one window.
struct Lane(Box<dyn LanguageModel>);

impl Lane {
    fn new(model: &ServingModel, longest: usize) -> Result<Self> {
        Ok(Self(model.start(SideBySide::cache(1, longest))?))
    }

    /// All of a window, from an empty context. What is returned is on the host: it may be read and dropped outside of turns.
    fn run(&mut self, window: &[u32], case: &Case) -> Result<Ran> {
        let table: Vec<u32> = (0..self.0.cache().num_blocks as u32).collect();
        let mut batch = Batch::default();
        batch.push(&table, window, 0, case.choices.clone(), LogitRows::All);
        // Of the layers, only the load is read.
        batch.routes = false;
        let mut forward = self.0.forward(&batch)?;
        forward.logits = forward.logits.to_device(&Device::Cpu)?;
        let stats = std::mem::take(&mut forward.layers).into_iter().map(|layer| layer.stats).collect();
        Ok(Ran { forward, stats })
    }
}

/// What a window has left.
struct Ran {
    /// Its logits only.
    forward: Forward,
    /// By MoE layer.
    stats: Vec<RoutingStats>,
}

impl Ran {
    fn read_logits<R>(&self, read: impl FnOnce(&[f32]) -> R) -> Result<R> {
        self.forward.read_logits(read)
    }
}

/// Figures in the making, of a model and of the model as it was before, window by window.
pub(super) struct Evaluation<'a> {
    reference: &'a Case,
    routed: &'a [Routed],
    model: Lane,
    base: Lane,
    sums: Vec<Sums>,
    nll_of_reference: f64,
    tokens: u64,
    predicted: usize,
}

impl<'a> Evaluation<'a> {
    /// Of windows of at most `longest` tokens.
    pub(super) fn new([model, base]: [&ServingModel; 2], (reference, routed): (&'a Case, &'a [Routed]), longest: usize) -> Result<Self> {
        let (model, base) = (Lane::new(model, longest)?, Lane::new(base, longest)?);
        let sums = vec![Sums::default(); routed.len()];
        Ok(Self { reference, routed, model, base, sums, nll_of_reference: 0.0, tokens: 0, predicted: 0 })
    }

    /// Adds a window, each routing in a turn of its own. A token whose logits are no numbers makes the figures infinite.
    pub(super) fn add(&mut self, window: &[u32], turn: &mut Turn<'_>) -> Result<()> {
        let teacher = in_turn(turn, || self.base.run(window, self.reference))?;
        let own = in_turn(turn, || self.model.run(window, self.reference))?;
        let of_reference = |own: &[f32]| rows(own, window).map(|(at, row)| nll_of_next(row, window, at).unwrap_or(0.0)).sum::<f64>();
        self.nll_of_reference += own.read_logits(of_reference)?;
        for (routed, sums) in self.routed.iter().zip(&mut self.sums) {
            let (served, compared) = in_turn(turn, || {
                let served = self.model.run(window, &routed.case)?;
                let with = |teacher: &[f32], own: &[f32]| served.read_logits(|served| compare([teacher, own, served], window));
                let compared = teacher.read_logits(|teacher| own.read_logits(|own| with(teacher, own)))???;
                Ok((served, compared))
            })?;
            compared.iter().for_each(|compared| sums.add(compared));
            sums.add_load(&served.stats);
        }
        self.tokens += window.len() as u64;
        self.predicted += window.len().saturating_sub(1);
        Ok(())
    }

    /// The figures of what was added.
    pub(super) fn figures(&self) -> Figures {
        let perplexity = |nll: f64| (nll / self.predicted.max(1) as f64).exp();
        let routings = self.routed.iter().zip(&self.sums).map(|(routed, sums)| sums.told(routed, self.tokens, perplexity(sums.nll)));
        Figures { tokens: self.tokens, reference_perplexity: perplexity(self.nll_of_reference), routings: routings.collect() }
    }
}

/// The rows of `logits [T, V]` of a window, and the place of each.
fn rows<'a>(logits: &'a [f32], window: &[u32]) -> impl Iterator<Item = (usize, &'a [f32])> + use<'a> {
    logits.chunks_exact((logits.len() / window.len().max(1)).max(1)).enumerate()
}

fn nll_of_next(row: &[f32], window: &[u32], at: usize) -> Option<f64> {
    window.get(at + 1).map(|&next| finite(nll(row, next)))
}

fn compare(logits: [&[f32]; 3], window: &[u32]) -> Vec<Compared> {
    let v = (logits[0].len() / window.len().max(1)).max(1);
    let compare = |at: usize| {
        let [teacher, own, served] = logits.map(|logits| &logits[at * v..(at + 1) * v]);
        Compared {
            kl: finite(kl(own, served)),
            teacher_kl: finite(kl(teacher, served)),
            agrees: likeliest(own) == likeliest(served),
            nll: nll_of_next(served, window, at),
        }
    };
    (0..window.len()).into_par_iter().map(compare).collect()
}

/// What is no number is as bad as can be.
fn finite(value: f64) -> f64 {
    if value.is_finite() { value } else { f64::INFINITY }
}

impl Sums {
    fn add(&mut self, compared: &Compared) {
        self.kl += compared.kl;
        self.teacher_kl += compared.teacher_kl;
        self.agree += u64::from(compared.agrees);
        self.nll += compared.nll.unwrap_or(0.0);
    }

    fn add_load(&mut self, layers: &[RoutingStats]) {
        if self.layers.is_empty() {
            self.layers = layers.to_vec();
            return;
        }
        self.layers.iter_mut().zip(layers).for_each(|(sum, stats)| sum.add(stats));
    }

    fn told(&self, routed: &Routed, tokens: u64, perplexity: f64) -> RoutingFigures {
        let mean = |sum: f64| sum / tokens.max(1) as f64;
        RoutingFigures {
            routing: routed.case.name.clone(),
            k: routed.k,
            perplexity,
            kl: mean(self.kl),
            teacher_kl: mean(self.teacher_kl),
            top1_agree: mean(self.agree as f64),
            utilization: self.layers.iter().map(RoutingStats::utilization).collect(),
            dead: self.layers.iter().map(RoutingStats::dead).collect(),
        }
    }
}
