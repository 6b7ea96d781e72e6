//! The fidelity gap of live traffic: what samples came to, as histograms over tokens, and the means that a page shows.
//!
//! A histogram takes all tokens of a sample at once, with their exact sum; so these families are kept here and written at each scrape.

use std::time::Duration;

use serde::Serialize;

use super::{
    exposition::{Exposition, Kind},
    metrics::SampleOutcome,
};

/// Buckets of the gap of a layer: distances and shares, from rounding to another function.
const LAYER_BUCKETS: &[f64] = &[0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0];

/// Buckets of the gap at the logits, in nats but for the relative distance.
const OUTPUT_BUCKETS: &[f64] = &[0.0001, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

/// The measures of a layer, as [`LayerSample`] has them.
const LAYER_MEASURES: [&str; 5] = ["l2_rel", "cosine_distance", "missed_mass", "expert_disagree", "argmax_disagree"];

/// The measures at the logits, as [`FidelitySample`] has them.
const OUTPUT_MEASURES: [&str; 3] = ["kl", "js", "logit_l2"];

/// A measure, token by token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenValues {
    /// Exact sum.
    pub sum: f64,
    /// One for each token.
    pub values: Vec<f32>,
}

/// What one sample came to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FidelitySample {
    /// Compared tokens.
    pub tokens: u64,
    /// `KL(reference ‖ serving)` in nats.
    pub kl: TokenValues,
    /// Jensen-Shannon divergence in nats.
    pub js: TokenValues,
    /// Relative L2 distance of the centred logits.
    pub logit_l2: TokenValues,
    /// Tokens whose likeliest next token is another.
    pub top1_disagreements: u64,
    /// Tokens that were predicted.
    pub predicted_tokens: u64,
    /// Their negative log-likelihood under the reference routing, in nats.
    pub reference_nats: f64,
    /// The same under the serving routing.
    pub serving_nats: f64,
    /// The MoE layers, in order of depth.
    pub layers: Vec<LayerSample>,
}

/// One layer of a sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerSample {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Relative L2 distance of the outputs for equal input.
    pub l2_rel: TokenValues,
    /// 1 - cosine of the same.
    pub cosine_distance: TokenValues,
    /// Reference weight outside the served experts.
    pub missed_mass: TokenValues,
    /// Share of the served experts that the reference run puts lower.
    pub expert_disagree: TokenValues,
    /// 1 where the first expert is another, else 0.
    pub argmax_disagree: TokenValues,
}

/// Means since the start, or since they were last reset. Where `tokens` is 0 so is every mean.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FidelitySnapshot {
    /// Samples can be measured.
    pub enabled: bool,
    /// Measured samples.
    pub samples: u64,
    /// Samples that had no gap by definition: served under the reference routing.
    pub same: u64,
    /// Samples that were neither.
    pub dropped: u64,
    /// Samples that wait or are being measured now.
    pub pending: usize,
    /// Compared tokens.
    pub tokens: u64,
    /// `KL(reference ‖ serving)`, nats per token.
    pub kl: f64,
    /// Jensen-Shannon divergence, nats per token.
    pub js: f64,
    /// Relative L2 distance of the centred logits.
    pub logit_l2: f64,
    /// Share of tokens with the same likeliest next token.
    pub top1_agree: f64,
    /// Perplexity under the serving over that under the reference routing, less 1.
    pub perplexity_gap: f64,
    /// The MoE layers, in order of depth.
    pub layers: Vec<LayerFidelitySnapshot>,
}

/// One layer of a [`FidelitySnapshot`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct LayerFidelitySnapshot {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Relative L2 distance of the outputs for equal input.
    pub l2_rel: f64,
    /// 1 - cosine of the same.
    pub cosine_distance: f64,
    /// Reference weight outside the served experts.
    pub missed_mass: f64,
    /// Served experts that the reference run would have taken as well, each on its own hidden state.
    pub overlap: f64,
}

/// The gap of one model.
#[derive(Debug)]
pub(super) struct Fidelity {
    model: String,
    /// Decoder layers.
    layers: Vec<usize>,
    totals: Totals,
    /// At the last reset.
    base: Totals,
    pending: usize,
}

/// Sums since the start.
#[derive(Clone, Debug)]
struct Totals {
    /// Of each [`SampleOutcome`].
    outcomes: Vec<u64>,
    tokens: u64,
    top1_disagreements: u64,
    predicted_tokens: u64,
    reference_nats: f64,
    serving_nats: f64,
    seconds: f64,
    output: [Histogram; 3],
    layers: Vec<[Histogram; 5]>,
}

#[derive(Clone, Debug)]
struct Histogram {
    bounds: &'static [f64],
    /// Values above the bound before and not above this one; those above all bounds are in none.
    buckets: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, buckets: vec![0; bounds.len()], count: 0, sum: 0.0 }
    }

    /// Values that are not finite are left out: one of them would stay in the sum for good.
    fn add(&mut self, tokens: &TokenValues) {
        let finite = tokens.values.iter().map(|&value| f64::from(value)).filter(|value| value.is_finite());
        self.sum += if tokens.sum.is_finite() { tokens.sum } else { finite.clone().sum() };
        for value in finite {
            self.count += 1;
            if let Some(bucket) = self.bounds.iter().position(|&bound| value <= bound) {
                self.buckets[bucket] += 1;
            }
        }
    }

    fn mean_since(&self, base: &Self) -> f64 {
        let count = self.count - base.count;
        if count == 0 { 0.0 } else { (self.sum - base.sum) / count as f64 }
    }

    fn write(&self, page: &mut Exposition, name: &str, labels: &[(&str, &dyn std::fmt::Display)]) {
        let mut below = 0;
        for (bound, count) in self.bounds.iter().zip(&self.buckets) {
            below += count;
            page.sample(&format!("{name}_bucket"), &[labels, &[("le", bound)]].concat(), below as f64);
        }
        page.sample(&format!("{name}_bucket"), &[labels, &[("le", &"+Inf")]].concat(), self.count as f64);
        page.sample(&format!("{name}_sum"), labels, self.sum);
        page.sample(&format!("{name}_count"), labels, self.count as f64);
    }
}

impl Totals {
    fn new(layers: usize) -> Self {
        Self {
            outcomes: vec![0; SampleOutcome::ALL.len()],
            tokens: 0,
            top1_disagreements: 0,
            predicted_tokens: 0,
            reference_nats: 0.0,
            serving_nats: 0.0,
            seconds: 0.0,
            output: std::array::from_fn(|_| Histogram::new(OUTPUT_BUCKETS)),
            layers: (0..layers).map(|_| std::array::from_fn(|_| Histogram::new(LAYER_BUCKETS))).collect(),
        }
    }
}

impl Fidelity {
    /// Nothing yet on `layers`, which are (decoder layer, number of experts).
    pub(super) fn new(model: &str, layers: &[(usize, usize)]) -> Self {
        let totals = Totals::new(layers.len());
        let layers = layers.iter().map(|&(layer, _)| layer).collect();
        Self { model: model.to_owned(), layers, base: totals.clone(), totals, pending: 0 }
    }

    pub(super) fn count(&mut self, outcome: SampleOutcome) {
        self.totals.outcomes[outcome as usize] += 1;
    }

    pub(super) fn spend(&mut self, spent: Duration) {
        self.totals.seconds += spent.as_secs_f64();
    }

    pub(super) fn set_pending(&mut self, samples: usize) {
        self.pending = samples;
    }

    pub(super) fn add(&mut self, sample: &FidelitySample) {
        self.count(SampleOutcome::Done);
        let totals = &mut self.totals;
        totals.tokens += sample.tokens;
        totals.top1_disagreements += sample.top1_disagreements;
        totals.predicted_tokens += sample.predicted_tokens;
        totals.reference_nats += sample.reference_nats;
        totals.serving_nats += sample.serving_nats;
        for (histogram, values) in totals.output.iter_mut().zip([&sample.kl, &sample.js, &sample.logit_l2]) {
            histogram.add(values);
        }
        for layer in &sample.layers {
            let Some(place) = self.layers.iter().position(|&at| at == layer.layer) else { continue };
            let values = [&layer.l2_rel, &layer.cosine_distance, &layer.missed_mass, &layer.expert_disagree, &layer.argmax_disagree];
            totals.layers[place].iter_mut().zip(values).for_each(|(histogram, values)| histogram.add(values));
        }
    }

    /// The snapshot counts from here; the series go on.
    pub(super) fn reset(&mut self) {
        self.base = self.totals.clone();
    }

    pub(super) fn snapshot(&self) -> FidelitySnapshot {
        let (now, base) = (&self.totals, &self.base);
        let outcome = |outcome: SampleOutcome| now.outcomes[outcome as usize] - base.outcomes[outcome as usize];
        let (samples, same) = (outcome(SampleOutcome::Done), outcome(SampleOutcome::Same));
        let all: u64 = SampleOutcome::ALL.iter().map(|&of| outcome(of)).sum();
        let tokens = now.tokens - base.tokens;
        let predicted = (now.predicted_tokens - base.predicted_tokens).max(1) as f64;
        let nats = (now.serving_nats - base.serving_nats) - (now.reference_nats - base.reference_nats);
        let [kl, js, logit_l2] = std::array::from_fn(|at| now.output[at].mean_since(&base.output[at]));
        let agree = tokens - (now.top1_disagreements - base.top1_disagreements);
        let layer = |(place, &layer): (usize, &usize)| {
            let mean = |at: usize| now.layers[place][at].mean_since(&base.layers[place][at]);
            let overlap = if now.layers[place][3].count > base.layers[place][3].count { 1.0 - mean(3) } else { 0.0 };
            LayerFidelitySnapshot { layer, l2_rel: mean(0), cosine_distance: mean(1), missed_mass: mean(2), overlap }
        };
        FidelitySnapshot {
            enabled: true,
            samples,
            same,
            dropped: all - samples - same,
            pending: self.pending,
            tokens,
            kl,
            js,
            logit_l2,
            top1_agree: agree as f64 / tokens.max(1) as f64,
            perplexity_gap: (nats / predicted).exp_m1(),
            layers: self.layers.iter().enumerate().map(layer).collect(),
        }
    }

    /// Writes every family.
    pub(super) fn write(&self, page: &mut Exposition) {
        let (model, totals) = (&self.model, &self.totals);
        let name = "hardmax_routing_fidelity_gap";
        page.family(
            name,
            Kind::Histogram,
            "Gap of a layer per token of shadow samples, reference against serving routing. For equal input: l2_rel and cosine_distance of the \
             layer's output, missed_mass, the reference weight outside the served experts. Each on its own hidden state: expert_disagree, the \
             share of served experts that the reference would not have taken, argmax_disagree, 1 where the first expert is another.",
        );
        for (layer, histograms) in self.layers.iter().zip(&totals.layers) {
            for (histogram, measure) in histograms.iter().zip(LAYER_MEASURES) {
                histogram.write(page, name, &[("model", model), ("layer", layer), ("measure", &measure)]);
            }
        }
        let name = "hardmax_output_fidelity_gap";
        page.family(
            name,
            Kind::Histogram,
            "Gap at the logits per token of shadow samples: kl is KL(reference || serving) and js the Jensen-Shannon divergence, in nats; \
             logit_l2 is the relative distance of the centred logits.",
        );
        for (histogram, measure) in totals.output.iter().zip(OUTPUT_MEASURES) {
            histogram.write(page, name, &[("model", model), ("measure", &measure)]);
        }
        self.write_counters(page);
    }

    fn write_counters(&self, page: &mut Exposition) {
        let (model, totals) = (&self.model, &self.totals);
        let name = "hardmax_fidelity_samples_total";
        page.family(
            name,
            Kind::Counter,
            "Requests that were to be measured, by outcome: done; same, served under the reference routing, so without a gap and not in the \
             histograms; dropped for a full queue, for want of time within --shadow-budget, as too short, or because the server stops; failed. \
             With --shadow-rate 0 only those that ask for it themselves.",
        );
        for (&outcome, &count) in SampleOutcome::ALL.iter().zip(&totals.outcomes) {
            page.sample(name, &[("model", model), ("outcome", &outcome.label())], count as f64);
        }
        let name = "hardmax_fidelity_samples_pending";
        page.family(name, Kind::Gauge, "Shadow samples that wait or are being measured now.");
        page.sample(name, &[("model", model)], self.pending as f64);
        let mut counter = |name: &str, help: &str, value: f64| {
            page.family(name, Kind::Counter, help);
            page.sample(name, &[("model", model)], value);
        };
        counter("hardmax_fidelity_tokens_total", "Tokens of shadow samples whose logits were compared.", totals.tokens as f64);
        counter(
            "hardmax_output_top1_disagreements_total",
            "Of those, tokens whose likeliest next token is another under the serving routing.",
            totals.top1_disagreements as f64,
        );
        counter(
            "hardmax_fidelity_predicted_tokens_total",
            "Tokens of shadow samples that were predicted from those before.",
            totals.predicted_tokens as f64,
        );
        counter(
            "hardmax_shadow_seconds_total",
            "Time that the engine spent on shadow samples, between the steps of requests.",
            totals.seconds,
        );
        let name = "hardmax_fidelity_nll_nats_total";
        page.family(name, Kind::Counter, "Negative log-likelihood of the predicted tokens under each routing, in nats.");
        for (routing, nats) in [("reference", totals.reference_nats), ("serving", totals.serving_nats)] {
            page.sample(name, &[("model", model), ("routing", &routing)], nats);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(values: &[f32]) -> TokenValues {
        TokenValues { sum: values.iter().map(|&value| f64::from(value)).sum(), values: values.to_vec() }
    }

    fn sample() -> FidelitySample {
        FidelitySample {
            tokens: 4,
            kl: values(&[0.0, 0.5, 0.5, 20.0]),
            js: values(&[0.0, 0.1, 0.1, 0.6]),
            logit_l2: values(&[0.5; 4]),
            top1_disagreements: 1,
            predicted_tokens: 3,
            reference_nats: 3.0,
            serving_nats: 6.0,
            layers: vec![LayerSample {
                layer: 2,
                l2_rel: values(&[0.0, 0.05, 0.15, f32::INFINITY]),
                cosine_distance: values(&[0.1; 4]),
                missed_mass: values(&[0.25; 4]),
                expert_disagree: values(&[0.0, 0.0, 0.5, 1.0]),
                argmax_disagree: values(&[0.0, 0.0, 0.0, 1.0]),
            }],
        }
    }

    fn page(fidelity: &Fidelity) -> String {
        let mut page = Exposition::default();
        fidelity.write(&mut page);
        page.finish()
    }

    fn value(fidelity: &Fidelity, series: &str) -> f64 {
        let page = page(fidelity);
        let line = page.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series} in {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn everything_is_there_from_the_start() {
        let page = page(&Fidelity::new("m", &[(0, 4), (2, 4)]));
        let samples: Vec<&str> = page.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(samples.iter().all(|line| line.ends_with(" 0")), "{page}");
        let histograms = 2 * 5 * (LAYER_BUCKETS.len() + 3) + 3 * (OUTPUT_BUCKETS.len() + 3);
        assert_eq!(samples.len(), histograms + SampleOutcome::ALL.len() + 7);
    }

    #[test]
    fn histograms_are_cumulative_and_sums_exact() {
        let mut fidelity = Fidelity::new("m", &[(2, 4)]);
        fidelity.add(&sample());
        let kl = |rest: &str| value(&fidelity, &format!("hardmax_output_fidelity_gap_{rest}"));
        assert_eq!(kl("bucket{model=\"m\",measure=\"kl\",le=\"0.0001\"}"), 1.0);
        assert_eq!(kl("bucket{model=\"m\",measure=\"kl\",le=\"1\"}"), 3.0);
        assert_eq!(kl("bucket{model=\"m\",measure=\"kl\",le=\"10\"}"), 3.0);
        assert_eq!(kl("bucket{model=\"m\",measure=\"kl\",le=\"+Inf\"}"), 4.0);
        assert_eq!((kl("sum{model=\"m\",measure=\"kl\"}"), kl("count{model=\"m\",measure=\"kl\"}")), (21.0, 4.0));
        let layer = |rest: &str| value(&fidelity, &format!("hardmax_routing_fidelity_gap_{rest}"));
        let labels = "{model=\"m\",layer=\"2\",measure=\"l2_rel\"";
        assert!((layer(&format!("sum{labels}}}")) - 0.2).abs() < 1e-7, "the infinite one is left out");
        assert_eq!(layer(&format!("count{labels}}}")), 3.0);
        assert_eq!(layer("sum{model=\"m\",layer=\"2\",measure=\"argmax_disagree\"}"), 1.0);
        assert_eq!(value(&fidelity, "hardmax_fidelity_nll_nats_total{model=\"m\",routing=\"serving\"}"), 6.0);
        assert_eq!(value(&fidelity, "hardmax_fidelity_samples_total{model=\"m\",outcome=\"done\"}"), 1.0);
    }

    #[test]
    fn a_snapshot_counts_from_the_last_reset() {
        let mut fidelity = Fidelity::new("m", &[(2, 4)]);
        assert_eq!(fidelity.snapshot().layers.len(), 1);
        fidelity.add(&FidelitySample { kl: values(&[9.0; 4]), ..sample() });
        fidelity.reset();
        let empty = fidelity.snapshot();
        assert_eq!((empty.samples, empty.kl, empty.top1_agree, empty.perplexity_gap, empty.layers[0].overlap), (0, 0.0, 0.0, 0.0, 0.0));
        fidelity.add(&sample());
        fidelity.count(SampleOutcome::Same);
        fidelity.count(SampleOutcome::DroppedQueue);
        fidelity.count(SampleOutcome::Failed);
        let snapshot = fidelity.snapshot();
        assert_eq!((snapshot.samples, snapshot.same, snapshot.dropped, snapshot.tokens), (1, 1, 2, 4));
        assert_eq!((snapshot.kl, snapshot.top1_agree), (21.0 / 4.0, 0.75));
        assert!((snapshot.perplexity_gap - (1f64.exp() - 1.0)).abs() < 1e-12);
        let layer = snapshot.layers[0];
        assert_eq!((layer.layer, layer.missed_mass, layer.overlap), (2, 0.25, 1.0 - 1.5 / 4.0));
        assert_eq!(value(&fidelity, "hardmax_fidelity_tokens_total"), 8.0, "the series go on");
        let json = serde_json::to_value(snapshot).unwrap();
        assert_eq!(json["layers"][0]["layer"], 2);
    }
}
