//! The fidelity gap of live traffic: what samples came to, as histograms over tokens, and the means that a page shows.
//!
//! A histogram takes all tokens of a sample at once, with their exact sum; so these families are kept here and written at each scrape.
//! They are kept whatever is exported: remote procedures and the live page show them as well.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::{
    catalog::{self, Family, LAYER_GAP_BUCKETS, OUTPUT_GAP_BUCKETS},
    config::{Detail, MetricsConfig},
    exposition::{Exposition, FixedHistogram},
    labels::{LayerMeasure, OutputMeasure, SampleOutcome, Side},
    recent::Recent,
};

/// The last while, as long as the charts of the live page: ten times that of the load, since few requests are measured.
const WINDOW: Duration = Duration::from_secs(600);

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

impl FidelitySample {
    /// `KL(reference ‖ serving)` in nats per token.
    pub fn mean_kl(&self) -> f64 {
        self.kl.sum / self.tokens.max(1) as f64
    }
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

/// Means over some time. Where `tokens` is 0 so is every mean.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct FidelitySnapshot {
    /// The time that it covers.
    pub seconds: f64,
    /// Samples can be measured.
    pub enabled: bool,
    /// Measured samples.
    pub samples: u64,
    /// Samples that had no gap by definition: served under the reference routing.
    pub same: u64,
    /// Samples whose gap is not that of the server: served under another routing than the one in force.
    pub other_routing: u64,
    /// Samples that were none of these.
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
    detail: Detail,
    /// Decoder layers.
    layers: Vec<usize>,
    totals: Totals,
    /// When [`Fidelity::base`] was taken.
    reset: Instant,
    /// At the last reset.
    base: Totals,
    recent: Recent<Totals>,
    pending: usize,
}

/// What a page says of a [`Fidelity`] at one moment.
#[derive(Debug)]
pub(super) struct FidelityCopy {
    model: String,
    detail: Detail,
    /// Decoder layers.
    layers: Vec<usize>,
    totals: Totals,
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
    /// Of each [`OutputMeasure`].
    output: [FixedHistogram; 3],
    /// Of each layer, of each [`LayerMeasure`].
    layers: Vec<[FixedHistogram; 5]>,
}

/// Values that are not finite are left out: one of them would stay in the sum for good.
fn record(histogram: &mut FixedHistogram, tokens: &TokenValues) {
    let finite = tokens.values.iter().map(|&value| f64::from(value)).filter(|value| value.is_finite());
    let sum = if tokens.sum.is_finite() { tokens.sum } else { finite.clone().sum() };
    histogram.record_all(finite, sum);
}

fn mean_since(now: &FixedHistogram, base: &FixedHistogram) -> f64 {
    let count = now.count() - base.count();
    // No measure is below 0, but a difference of two large sums may be, by a little.
    if count == 0 { 0.0 } else { ((now.sum() - base.sum()) / count as f64).max(0.0) }
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
            output: std::array::from_fn(|_| FixedHistogram::new(OUTPUT_GAP_BUCKETS)),
            layers: (0..layers).map(|_| std::array::from_fn(|_| FixedHistogram::new(LAYER_GAP_BUCKETS))).collect(),
        }
    }
}

impl Fidelity {
    /// Nothing yet on the layers of `config`.
    pub(super) fn new(config: &MetricsConfig, detail: Detail, now: Instant) -> Self {
        let layers: Vec<usize> = config.layers.iter().map(|&(layer, _)| layer).collect();
        let totals = Totals::new(layers.len());
        let recent = Recent::new(WINDOW, now);
        Self { model: config.model.clone(), detail, layers, reset: now, base: totals.clone(), recent, totals, pending: 0 }
    }

    /// For changes that happen now: moves the window on.
    pub(super) fn at(&mut self, now: Instant) -> &mut Self {
        self.recent.before_change(&self.totals, now);
        self
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
            record(histogram, values);
        }
        for layer in &sample.layers {
            let Some(place) = self.layers.iter().position(|&at| at == layer.layer) else { continue };
            let values = [&layer.l2_rel, &layer.cosine_distance, &layer.missed_mass, &layer.expert_disagree, &layer.argmax_disagree];
            totals.layers[place].iter_mut().zip(values).for_each(|(histogram, values)| record(histogram, values));
        }
    }

    /// [`Fidelity::snapshot`] counts from here; the series and the window go on.
    pub(super) fn reset(&mut self, now: Instant) {
        (self.base, self.reset) = (self.totals.clone(), now);
    }

    /// The window begins anew: another routing is served.
    pub(super) fn restart_window(&mut self, now: Instant) {
        self.recent.restart(now);
    }

    /// Time in which samples were measured.
    pub(super) fn measuring_seconds(&self) -> f64 {
        self.totals.seconds
    }

    /// All since the last reset.
    pub(super) fn snapshot(&self, now: Instant) -> FidelitySnapshot {
        self.since(&self.base, now.saturating_duration_since(self.reset))
    }

    /// The last [`WINDOW`].
    pub(super) fn recent(&self, now: Instant) -> FidelitySnapshot {
        self.since(self.recent.base(now).unwrap_or(&self.totals), self.recent.covered(now))
    }

    fn since(&self, base: &Totals, time: Duration) -> FidelitySnapshot {
        let now = &self.totals;
        let outcome = |outcome: SampleOutcome| now.outcomes[outcome as usize] - base.outcomes[outcome as usize];
        let [samples, same, other_routing] = [SampleOutcome::Done, SampleOutcome::Same, SampleOutcome::OtherRouting].map(outcome);
        let all: u64 = SampleOutcome::ALL.iter().map(|&of| outcome(of)).sum();
        let tokens = now.tokens - base.tokens;
        let predicted = (now.predicted_tokens - base.predicted_tokens).max(1) as f64;
        let nats = (now.serving_nats - base.serving_nats) - (now.reference_nats - base.reference_nats);
        let [kl, js, logit_l2] = std::array::from_fn(|at| mean_since(&now.output[at], &base.output[at]));
        let agree = tokens - (now.top1_disagreements - base.top1_disagreements);
        let layer = |(place, &layer): (usize, &usize)| {
            let (now, base) = (&now.layers[place], &base.layers[place]);
            let mean = |measure: LayerMeasure| mean_since(&now[measure as usize], &base[measure as usize]);
            LayerFidelitySnapshot {
                layer,
                l2_rel: mean(LayerMeasure::L2Rel),
                cosine_distance: mean(LayerMeasure::CosineDistance),
                missed_mass: mean(LayerMeasure::MissedMass),
                overlap: if tokens > 0 { 1.0 - mean(LayerMeasure::ExpertDisagree) } else { 0.0 },
            }
        };
        FidelitySnapshot {
            seconds: time.as_secs_f64(),
            enabled: true,
            samples,
            same,
            other_routing,
            dropped: all - samples - same - other_routing,
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

    /// What is written of it, apart from it: formatting takes long, and the engine waits for whoever holds the gap.
    pub(super) fn copy(&self) -> FidelityCopy {
        let Self { model, detail, layers, totals, pending, .. } = self;
        FidelityCopy { model: model.clone(), detail: *detail, layers: layers.clone(), totals: totals.clone(), pending: *pending }
    }
}

impl FidelityCopy {
    /// Writes every family that is exported.
    pub(super) fn write(&self, page: &mut Exposition) {
        let (model, totals) = (&self.model, &self.totals);
        if self.detail.shows(catalog::ROUTING_GAP.presence) {
            page.family(&catalog::ROUTING_GAP);
            for (layer, histograms) in self.layers.iter().zip(&totals.layers) {
                for (histogram, measure) in histograms.iter().zip(LayerMeasure::LABELS) {
                    page.histogram(&catalog::ROUTING_GAP, &[model, layer, measure], histogram);
                }
            }
        }
        page.family(&catalog::OUTPUT_GAP);
        for (histogram, measure) in totals.output.iter().zip(OutputMeasure::LABELS) {
            page.histogram(&catalog::OUTPUT_GAP, &[model, measure], histogram);
        }
        page.family(&catalog::FIDELITY_SAMPLES);
        for (outcome, &count) in SampleOutcome::LABELS.iter().zip(&totals.outcomes) {
            page.sample(&catalog::FIDELITY_SAMPLES, &[model, outcome], count as f64);
        }
        let mut single = |family: &Family, value: f64| page.single(family, &[model], value);
        single(&catalog::FIDELITY_PENDING, self.pending as f64);
        single(&catalog::FIDELITY_TOKENS, totals.tokens as f64);
        single(&catalog::OUTPUT_TOP1_DISAGREEMENTS, totals.top1_disagreements as f64);
        single(&catalog::FIDELITY_PREDICTED_TOKENS, totals.predicted_tokens as f64);
        single(&catalog::SHADOW_SECONDS, totals.seconds);
        page.family(&catalog::FIDELITY_NLL);
        for (side, nats) in [(Side::Reference, totals.reference_nats), (Side::Serving, totals.serving_nats)] {
            page.sample(&catalog::FIDELITY_NLL, &[model, &side.label()], nats);
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

    fn fidelity(layers: &[(usize, usize)]) -> Fidelity {
        let config = MetricsConfig { model: "m".into(), layers: layers.to_vec(), ..MetricsConfig::default() };
        Fidelity::new(&config, Detail::PerLayer, Instant::now())
    }

    fn page(fidelity: &Fidelity) -> String {
        let mut page = Exposition::default();
        fidelity.copy().write(&mut page);
        page.finish()
    }

    fn value(fidelity: &Fidelity, series: &str) -> f64 {
        let page = page(fidelity);
        let line = page.lines().find(|line| line.starts_with(series)).unwrap_or_else(|| panic!("no {series} in {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn everything_is_there_from_the_start() {
        let page = page(&fidelity(&[(0, 4), (2, 4)]));
        let samples: Vec<&str> = page.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(samples.iter().all(|line| line.ends_with(" 0")), "{page}");
        let histograms = 2 * 5 * (LAYER_GAP_BUCKETS.len() + 3) + 3 * (OUTPUT_GAP_BUCKETS.len() + 3);
        assert_eq!(samples.len(), histograms + SampleOutcome::ALL.len() + 7);
    }

    #[test]
    fn histograms_are_cumulative_and_sums_exact() {
        let mut fidelity = fidelity(&[(2, 4)]);
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
        let mut fidelity = fidelity(&[(2, 4)]);
        assert_eq!(fidelity.snapshot(Instant::now()).layers.len(), 1);
        fidelity.add(&FidelitySample { kl: values(&[9.0; 4]), ..sample() });
        fidelity.reset(Instant::now());
        let empty = fidelity.snapshot(Instant::now());
        assert_eq!((empty.samples, empty.kl, empty.top1_agree, empty.perplexity_gap, empty.layers[0].overlap), (0, 0.0, 0.0, 0.0, 0.0));
        fidelity.add(&sample());
        fidelity.count(SampleOutcome::Same);
        fidelity.count(SampleOutcome::OtherRouting);
        fidelity.count(SampleOutcome::DroppedQueue);
        fidelity.count(SampleOutcome::Failed);
        let snapshot = fidelity.snapshot(Instant::now());
        assert_eq!((snapshot.samples, snapshot.same, snapshot.other_routing, snapshot.dropped, snapshot.tokens), (1, 1, 1, 2, 4));
        assert_eq!((snapshot.kl, snapshot.top1_agree), (21.0 / 4.0, 0.75));
        assert!((snapshot.perplexity_gap - (1f64.exp() - 1.0)).abs() < 1e-12);
        let layer = snapshot.layers[0];
        assert_eq!((layer.layer, layer.missed_mass, layer.overlap), (2, 0.25, 1.0 - 1.5 / 4.0));
        assert_eq!(value(&fidelity, "hardmax_fidelity_tokens_total"), 8.0, "the series go on");
        let json = serde_json::to_value(snapshot).unwrap();
        assert_eq!(json["layers"][0]["layer"], 2);
    }

    #[test]
    fn the_window_forgets_and_begins_anew_with_another_routing() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut fidelity = Fidelity { recent: Recent::new(WINDOW, start), ..fidelity(&[(2, 4)]) };
        fidelity.at(start).add(&FidelitySample { kl: values(&[9.0; 4]), ..sample() });
        assert_eq!((fidelity.recent(after(60)).kl, fidelity.recent(after(60)).seconds), (9.0, 60.0));
        fidelity.at(after(500)).add(&sample());
        fidelity.at(after(501)).count(SampleOutcome::Same);
        assert_eq!(fidelity.recent(after(599)).kl, (36.0 + 21.0) / 8.0);
        let later = fidelity.recent(after(620));
        assert_eq!((later.kl, later.samples, later.same, later.tokens), (21.0 / 4.0, 1, 1, 4), "the first sample is too old");
        assert_eq!((fidelity.recent(after(2000)).samples, fidelity.snapshot(after(2000)).samples), (0, 2));
        fidelity.restart_window(after(640));
        assert_eq!((fidelity.recent(after(650)).samples, fidelity.recent(after(650)).seconds), (0, 10.0));
        fidelity.at(after(651)).add(&sample());
        assert_eq!((fidelity.recent(after(660)).tokens, fidelity.recent(after(660)).kl), (4, 21.0 / 4.0));
    }
}
