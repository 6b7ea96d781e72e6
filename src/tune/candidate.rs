//! What a run leaves: other values for some tensors, and what they are worth.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::{evaluate::Figures, gates::Verdict, plan::TunePlan};
use crate::{
    checkpoint::{Delta, FidelityRecord, ReferenceMode, ReferenceRecord, RoutingBlock, TrainRecord},
    moe::policy::RoutingChoice,
    train::export::train_record,
};

/// A tuned model, as what differs from the one before.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// By canonical name, in the element type that they are served in. Nobody else has their storage.
    pub tensors: BTreeMap<String, Tensor>,
    /// Block of the checkpoint, brought up to date.
    pub routing: RoutingBlock,
    /// On all held-out text, before.
    pub before: Figures,
    /// And after.
    pub after: Figures,
    /// Whether it may be served.
    pub verdicts: Vec<Verdict>,
    /// Steps after which the tensors were as they are.
    pub steps: usize,
    /// Why it ended: `steps`, `time`, `patience`, or `asked`.
    pub reason: &'static str,
}

impl Candidate {
    /// Whether every gate lets it pass.
    pub fn passes(&self) -> bool {
        self.verdicts.iter().all(|verdict| verdict.passed)
    }

    /// As a file over the checkpoint with this digest.
    pub fn delta(&self, base: String) -> Delta {
        Delta { base, routing: self.routing.clone(), tensors: self.tensors.clone() }
    }
}

/// The routing block after `steps` of a plan; `base` is that of the checkpoint.
pub(super) fn routing_block(base: Option<&RoutingBlock>, plan: &TunePlan, estimator: &str, steps: usize) -> RoutingBlock {
    let mut block = base.cloned().unwrap_or_default();
    let before = block.train.take();
    let done = before.as_ref().and_then(|train| train.steps).unwrap_or(0);
    let learned = plan.selection.names.iter().any(|name| name.ends_with(".router"));
    let mut train = match before {
        // No router has moved: how they were trained is as it was.
        Some(train) if !learned => TrainRecord { frozen_router: Some(true), ..train },
        _ => train_record(&plan.routing, estimator, steps),
    };
    train.steps = Some(done + steps);
    if let Some(temperature) = &mut train.temperature {
        // Routers are written such that the softmax at the reference's temperature is the one they were trained under.
        temperature.folded = temperature.folded.map(|folded| folded && plan.temperature == 1.0);
    }
    block.train = Some(train);
    if let RoutingChoice::Soft { .. } = plan.reference {
        let temperature = Some(plan.temperature);
        block.reference = Some(ReferenceRecord { mode: ReferenceMode::Soft, temperature, k: None, noise: Some("none".into()) });
    }
    block
}

/// What was measured of the candidate under the serving routing.
pub(super) fn fidelity_record(figures: &Figures, corpus_sha256: &str) -> Option<FidelityRecord> {
    let serving = figures.routings.first()?;
    Some(FidelityRecord {
        corpus_sha256: Some(corpus_sha256.to_owned()),
        tokens: Some(figures.tokens as usize),
        kl: Some(serving.kl).filter(|kl| kl.is_finite()),
        top1_agree: Some(serving.top1_agree),
        ppl_gap: Some(serving.perplexity / figures.reference_perplexity - 1.0).filter(|gap| gap.is_finite()),
        floor_kl: None,
        measured_by: Some(concat!("hardmax ", env!("CARGO_PKG_VERSION")).into()),
    })
}
