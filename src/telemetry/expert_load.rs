//! Load per layer and expert: totals, and a sliding window for the ratios.
//!
//! The weight mass is a fractional counter, and the ratios are only worth computing when somebody asks; so these families are kept
//! here and written at each scrape instead of going through the `metrics` crate, whose counters are integers. The load is kept
//! whatever is exported: remote procedures and the live page show it as well.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::{
    catalog::{self, EXPERT_BATCH_BUCKETS, Family},
    config::{Detail, MetricsConfig},
    exposition::{Exposition, FixedHistogram},
};
use crate::moe::{LayerRouting, RoutingStats};

/// Span of the window, which moves in steps of [`BUCKET`].
const WINDOW: Duration = Duration::from_secs(60);

/// Granularity of the window.
const BUCKET: Duration = Duration::from_secs(5);

/// Steps of the window.
const BUCKETS: u64 = WINDOW.as_secs() / BUCKET.as_secs();

/// What a load covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The last 60 s, in steps of 5 s.
    Window,
    /// All since the start, or since the statistics were reset.
    Total,
}

/// The load of all MoE layers at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertLoadSnapshot {
    /// The time that it covers.
    pub seconds: f64,
    /// In the order of the decoder.
    pub layers: Vec<LayerLoadSnapshot>,
}

/// The load of one MoE layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerLoadSnapshot {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// What was routed.
    pub stats: RoutingStats,
}

/// Loads of all MoE layers of one model.
#[derive(Debug)]
pub(super) struct ExpertLoad {
    model: String,
    detail: Detail,
    start: Instant,
    /// When [`LayerLoad::since_reset`] began.
    reset: Instant,
    layers: Vec<LayerLoad>,
    batch_tokens: FixedHistogram,
}

/// What a page says of an [`ExpertLoad`] at one moment.
#[derive(Debug)]
pub(super) struct ExpertLoadCopy {
    model: String,
    detail: Detail,
    /// Decoder layers.
    layers: Vec<usize>,
    /// Of each layer, since the start.
    totals: Vec<RoutingStats>,
    /// Of each layer, in the window.
    recent: Vec<RoutingStats>,
    batch_tokens: FixedHistogram,
}

#[derive(Debug)]
struct LayerLoad {
    layer: usize,
    /// Of the counters, which never fall.
    total: RoutingStats,
    since_reset: RoutingStats,
    /// (bucket number since the start, load), ascending; at most the buckets of one window.
    window: VecDeque<(u64, RoutingStats)>,
}

impl LayerLoad {
    fn new(layer: usize, experts: usize) -> Self {
        let none = RoutingStats::new(experts);
        Self { layer, total: none.clone(), since_reset: none, window: VecDeque::new() }
    }

    fn recent(&self, bucket: u64) -> RoutingStats {
        let mut sum = RoutingStats::new(self.total.expert_tokens.len());
        self.window.iter().filter(|(number, _)| number + BUCKETS > bucket).for_each(|(_, stats)| sum.add(stats));
        sum
    }

    fn add(&mut self, bucket: u64, stats: &RoutingStats) {
        self.total.add(stats);
        self.since_reset.add(stats);
        while self.window.front().is_some_and(|(number, _)| number + BUCKETS <= bucket) {
            self.window.pop_front();
        }
        match self.window.back_mut() {
            Some((number, sum)) if *number == bucket => sum.add(stats),
            _ => {
                let mut sum = RoutingStats::new(self.total.expert_tokens.len());
                sum.add(stats);
                self.window.push_back((bucket, sum));
            }
        }
    }
}

impl ExpertLoad {
    /// No load on the layers of `config`.
    pub(super) fn new(config: &MetricsConfig, detail: Detail, start: Instant) -> Self {
        let layers = config.layers.iter().map(|&(layer, experts)| LayerLoad::new(layer, experts)).collect();
        let batch_tokens = FixedHistogram::new(EXPERT_BATCH_BUCKETS);
        Self { model: config.model.clone(), detail, start, reset: start, layers, batch_tokens }
    }

    /// Adds what a step routed.
    pub(super) fn add(&mut self, routings: &[LayerRouting], now: Instant) {
        let bucket = self.bucket(now);
        for routing in routings {
            if let Some(load) = self.layers.iter_mut().find(|load| load.layer == routing.layer) {
                load.add(bucket, &routing.stats);
                let batches = routing.stats.expert_tokens.iter().filter(|&&tokens| tokens > 0);
                batches.for_each(|&tokens| self.batch_tokens.record(tokens as f64));
            }
        }
    }

    /// The load as it is now.
    pub(super) fn snapshot(&self, scope: Scope, now: Instant) -> ExpertLoadSnapshot {
        let bucket = self.bucket(now);
        let since = match scope {
            Scope::Window => self.start + BUCKET * u32::try_from(bucket.saturating_sub(BUCKETS - 1)).unwrap_or(u32::MAX),
            Scope::Total => self.reset,
        };
        let stats = |load: &LayerLoad| match scope {
            Scope::Window => load.recent(bucket),
            Scope::Total => load.since_reset.clone(),
        };
        let layers = self.layers.iter().map(|load| LayerLoadSnapshot { layer: load.layer, stats: stats(load) }).collect();
        ExpertLoadSnapshot { seconds: now.saturating_duration_since(since).as_secs_f64(), layers }
    }

    /// [`Scope::Total`] counts from here. The counters on the page go on.
    pub(super) fn reset(&mut self, now: Instant) {
        self.reset = now;
        for load in &mut self.layers {
            load.since_reset = RoutingStats::new(load.total.expert_tokens.len());
        }
    }

    fn bucket(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs() / BUCKET.as_secs()
    }

    /// What is written of it, apart from it: formatting takes long, and the engine's steps wait for whoever holds the load.
    pub(super) fn copy(&self, now: Instant) -> ExpertLoadCopy {
        let bucket = self.bucket(now);
        ExpertLoadCopy {
            model: self.model.clone(),
            detail: self.detail,
            layers: self.layers.iter().map(|load| load.layer).collect(),
            totals: self.layers.iter().map(|load| load.total.clone()).collect(),
            recent: self.layers.iter().map(|load| load.recent(bucket)).collect(),
            batch_tokens: self.batch_tokens.clone(),
        }
    }
}

impl ExpertLoadCopy {
    /// Writes every family that is exported.
    pub(super) fn write(&self, page: &mut Exposition) {
        page.family(&catalog::EXPERT_BATCH_TOKENS);
        page.histogram(&catalog::EXPERT_BATCH_TOKENS, &[&self.model], &self.batch_tokens);
        let (totals, recent) = (&self.totals, &self.recent);

        self.write_experts(page, &catalog::EXPERT_TOKENS, totals, |stats| stats.expert_tokens.iter().map(|&n| n as f64).collect());
        self.write_experts(page, &catalog::EXPERT_WEIGHT_SUM, totals, |stats| stats.expert_weights.clone());
        self.write_experts(page, &catalog::EXPERT_UTILIZATION, recent, RoutingStats::utilization);

        self.write_layers(page, &catalog::LAYER_FAIR_SHARE, recent, RoutingStats::fair_share);
        self.write_layers(page, &catalog::LAYER_BALANCEDNESS, recent, RoutingStats::balancedness);
        self.write_layers(page, &catalog::LAYER_LOAD_CV, recent, RoutingStats::load_cv);
        self.write_layers(page, &catalog::DEAD_EXPERTS, recent, |stats| if stats.routes == 0 { 0.0 } else { stats.dead() as f64 });
        self.write_layers(page, &catalog::ROUTER_ENTROPY, recent, RoutingStats::router_entropy);
        self.write_layers(page, &catalog::ROUTER_NEAR_TIES, totals, |stats| stats.near_ties as f64);
        self.write_layers(page, &catalog::ROUTER_NON_FINITE, totals, |stats| stats.non_finite as f64);
    }

    fn write_experts(&self, page: &mut Exposition, family: &Family, stats: &[RoutingStats], values: impl Fn(&RoutingStats) -> Vec<f64>) {
        if !self.detail.shows(family.presence) {
            return;
        }
        page.family(family);
        for (layer, stats) in self.layers.iter().zip(stats) {
            for (expert, value) in values(stats).into_iter().enumerate() {
                page.sample(family, &[&self.model, layer, &expert], value);
            }
        }
    }

    fn write_layers(&self, page: &mut Exposition, family: &Family, stats: &[RoutingStats], value: impl Fn(&RoutingStats) -> f64) {
        if !self.detail.shows(family.presence) {
            return;
        }
        page.family(family);
        for (layer, stats) in self.layers.iter().zip(stats) {
            page.sample(family, &[&self.model, layer], value(stats));
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device, Tensor};

    use super::*;
    use crate::moe::Routing;

    fn routing(layer: usize, expert_tokens: &[u64]) -> LayerRouting {
        let routes: u64 = expert_tokens.iter().sum();
        LayerRouting {
            layer,
            router_logits: Tensor::zeros((1, 1), DType::F32, &Device::Cpu).unwrap(),
            routing: Routing::Sparse(Default::default()),
            stats: RoutingStats {
                tokens: routes,
                routes,
                expert_tokens: expert_tokens.to_vec(),
                expert_weights: expert_tokens.iter().map(|&n| n as f64 / 2.0).collect(),
                entropy_sum: routes as f64 * 0.25,
                executed: routes,
                near_ties: routes / 2,
                ..RoutingStats::new(expert_tokens.len())
            },
        }
    }

    fn load(layers: &[(usize, usize)], start: Instant) -> ExpertLoad {
        let config = MetricsConfig { model: "m".into(), layers: layers.to_vec(), ..MetricsConfig::default() };
        ExpertLoad::new(&config, Detail::PerExpert, start)
    }

    fn value(load: &ExpertLoad, now: Instant, sample: &str) -> f64 {
        written(&load.copy(now), sample)
    }

    fn written(load: &ExpertLoadCopy, sample: &str) -> f64 {
        let mut page = Exposition::default();
        load.write(&mut page);
        let text = page.finish();
        let line = text.lines().find(|line| line.starts_with(sample)).unwrap_or_else(|| panic!("no {sample} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn totals_stay_and_the_window_moves() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut load = load(&[(1, 2), (3, 4)], start);
        load.add(&[routing(1, &[3, 1]), routing(3, &[2, 2, 0, 0]), routing(9, &[1])], after(2));
        load.add(&[routing(1, &[1, 1])], after(40));

        assert_eq!(value(&load, after(41), "hardmax_expert_tokens_total{model=\"m\",layer=\"1\",expert=\"0\"}"), 4.0);
        assert_eq!(value(&load, after(41), "hardmax_expert_weight_sum_total{model=\"m\",layer=\"1\",expert=\"0\"}"), 2.0);
        let utilization = "hardmax_expert_utilization_ratio{model=\"m\",layer=\"1\",expert=\"0\"}";
        assert_eq!(value(&load, after(41), utilization), 4.0 / 3.0);
        assert_eq!(value(&load, after(70), utilization), 1.0, "only the second load is left");
        assert_eq!(value(&load, after(200), utilization), 0.0);
        assert_eq!(value(&load, after(200), "hardmax_expert_tokens_total{model=\"m\",layer=\"1\",expert=\"0\"}"), 4.0);

        let dead = "hardmax_dead_experts{model=\"m\",layer=\"3\"}";
        assert_eq!([value(&load, after(41), dead), value(&load, after(200), dead)], [2.0, 0.0]);
        let fair = "hardmax_layer_fair_share_tokens{model=\"m\",layer=\"1\"}";
        assert_eq!([value(&load, after(41), fair), value(&load, after(70), fair), value(&load, after(200), fair)], [3.0, 1.0, 0.0]);
        assert_eq!(value(&load, after(41), "hardmax_layer_balancedness_ratio{model=\"m\",layer=\"3\"}"), 0.5);
        assert_eq!(value(&load, after(41), "hardmax_layer_load_cv{model=\"m\",layer=\"3\"}"), 1.0);
        assert_eq!(value(&load, after(41), "hardmax_router_entropy_nats{model=\"m\",layer=\"3\"}"), 0.25);
        assert_eq!(value(&load, after(200), "hardmax_router_near_tie_total{model=\"m\",layer=\"1\"}"), 3.0);
        // Batches of 3, 1, 2, 2, 1 and 1 tokens; the layer that the model does not have is left out.
        assert_eq!(value(&load, after(41), "hardmax_expert_batch_tokens_bucket{model=\"m\",le=\"2\"}"), 5.0);
        assert_eq!(value(&load, after(41), "hardmax_expert_batch_tokens_sum{model=\"m\"}"), 10.0);
    }

    #[test]
    fn a_page_is_of_one_moment() {
        let start = Instant::now();
        let mut load = load(&[(1, 2)], start);
        load.add(&[routing(1, &[3, 1])], start);
        let copy = load.copy(start);
        load.add(&[routing(1, &[9, 9])], start);
        for (series, expected) in [("hardmax_expert_tokens_total", 3.0), ("hardmax_layer_fair_share_tokens", 2.0)] {
            assert_eq!(written(&copy, series), expected, "what comes while it is written is on the next one");
        }
    }

    #[test]
    fn snapshots_cover_a_window_or_all_since_the_reset() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut load = load(&[(1, 2)], start);
        load.add(&[routing(1, &[3, 1])], after(2));
        let seen = |load: &ExpertLoad, scope, now| {
            let ExpertLoadSnapshot { seconds, layers } = load.snapshot(scope, now);
            assert_eq!((layers.len(), layers[0].layer), (1, 1));
            (seconds, layers[0].stats.expert_tokens.clone())
        };
        assert_eq!(seen(&load, Scope::Window, after(3)), (3.0, vec![3, 1]));
        load.add(&[routing(1, &[0, 1])], after(70));
        assert_eq!(seen(&load, Scope::Window, after(72)), (57.0, vec![0, 1]));
        assert_eq!(seen(&load, Scope::Total, after(72)), (72.0, vec![3, 2]));

        load.reset(after(80));
        assert_eq!(seen(&load, Scope::Total, after(81)), (1.0, vec![0, 0]));
        assert_eq!(seen(&load, Scope::Window, after(81)), (56.0, vec![0, 1]), "a window ends by itself");
        load.add(&[routing(1, &[5, 0])], after(82));
        assert_eq!(seen(&load, Scope::Total, after(84)), (4.0, vec![5, 0]));
        assert_eq!(value(&load, after(84), "hardmax_expert_tokens_total{model=\"m\",layer=\"1\",expert=\"0\"}"), 8.0);
    }

    #[test]
    fn memory_is_bounded() {
        let start = Instant::now();
        let mut load = load(&[(0, 2)], start);
        for second in 0..1000 {
            load.add(&[routing(0, &[1, 0])], start + Duration::from_secs(second));
        }
        assert!(load.layers[0].window.len() <= 12);
        assert_eq!(load.layers[0].total.routes, 1000);
    }
}
