//! Load per layer and expert: totals since the start, and a sliding window for the ratios.
//!
//! The weight mass is a fractional counter, and the ratios are only worth computing when somebody asks; so these families are kept
//! here and written at each scrape instead of going through the `metrics` crate, whose counters are integers.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use super::exposition::{Exposition, Kind};
use crate::moe::{LayerRouting, RoutingStats};

/// Span of the window, which moves in steps of [`BUCKET`].
const WINDOW: Duration = Duration::from_secs(60);

/// Granularity of the window.
const BUCKET: Duration = Duration::from_secs(5);

/// Loads of all MoE layers of one model.
#[derive(Debug)]
pub(super) struct ExpertLoad {
    model: String,
    start: Instant,
    layers: Vec<LayerLoad>,
}

/// What a snapshot covers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The last 60 seconds, in steps of 5.
    Window,
    /// Since the start.
    Total,
}

/// The load of all MoE layers.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertLoadSnapshot {
    /// What it covers.
    pub seconds: f64,
    /// In order of depth.
    pub layers: Vec<LayerLoadSnapshot>,
}

/// The load of one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerLoadSnapshot {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Its load.
    pub stats: RoutingStats,
}

#[derive(Debug)]
struct LayerLoad {
    layer: usize,
    total: RoutingStats,
    /// (bucket number since the start, load), ascending; at most the buckets of one window.
    window: VecDeque<(u64, RoutingStats)>,
}

impl LayerLoad {
    fn recent(&self, bucket: u64) -> RoutingStats {
        let mut sum = RoutingStats::new(self.total.expert_tokens.len());
        let buckets = WINDOW.as_secs() / BUCKET.as_secs();
        self.window.iter().filter(|(number, _)| number + buckets > bucket).for_each(|(_, stats)| sum.add(stats));
        sum
    }

    fn add(&mut self, bucket: u64, stats: &RoutingStats) {
        self.total.add(stats);
        let buckets = WINDOW.as_secs() / BUCKET.as_secs();
        while self.window.front().is_some_and(|(number, _)| number + buckets <= bucket) {
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
    /// No load on `layers`, which are (decoder layer, number of experts).
    pub(super) fn new(model: &str, layers: &[(usize, usize)], start: Instant) -> Self {
        let layers = layers
            .iter()
            .map(|&(layer, experts)| LayerLoad { layer, total: RoutingStats::new(experts), window: VecDeque::new() })
            .collect();
        Self { model: model.to_owned(), start, layers }
    }

    /// Adds what a step routed.
    pub(super) fn add(&mut self, routings: &[LayerRouting], now: Instant) {
        let bucket = self.bucket(now);
        for routing in routings {
            if let Some(load) = self.layers.iter_mut().find(|load| load.layer == routing.layer) {
                load.add(bucket, &routing.stats);
            }
        }
    }

    fn bucket(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs() / BUCKET.as_secs()
    }

    /// The load of a scope.
    pub(super) fn snapshot(&self, scope: Scope, now: Instant) -> ExpertLoadSnapshot {
        let (bucket, age) = (self.bucket(now), now.saturating_duration_since(self.start));
        let stats = |load: &LayerLoad| match scope {
            Scope::Window => load.recent(bucket),
            Scope::Total => load.total.clone(),
        };
        let layers = self.layers.iter().map(|load| LayerLoadSnapshot { layer: load.layer, stats: stats(load) }).collect();
        let covered = if scope == Scope::Window { age.min(WINDOW) } else { age };
        ExpertLoadSnapshot { seconds: covered.as_secs_f64(), layers }
    }

    /// Writes every family.
    pub(super) fn write(&self, page: &mut Exposition, now: Instant) {
        let bucket = self.bucket(now);
        let recent: Vec<RoutingStats> = self.layers.iter().map(|load| load.recent(bucket)).collect();
        let totals: Vec<&RoutingStats> = self.layers.iter().map(|load| &load.total).collect();
        let recent: Vec<&RoutingStats> = recent.iter().collect();

        let name = "hardmax_expert_tokens_total";
        page.family(name, Kind::Counter, "Tokens routed to the expert. A token counts once for each expert that it is routed to.");
        self.experts(page, name, &totals, |stats| stats.expert_tokens.iter().map(|&n| n as f64).collect());
        let name = "hardmax_expert_weight_sum_total";
        page.family(name, Kind::Counter, "Sum of the routing weights given to the expert.");
        self.experts(page, name, &totals, |stats| stats.expert_weights.clone());
        let name = "hardmax_expert_utilization_ratio";
        page.family(
            name,
            Kind::Gauge,
            "Tokens of the expert over its fair share in the last 60 s (in steps of 5 s): 1 is fair, 0 is dead. 0 without traffic.",
        );
        self.experts(page, name, &recent, RoutingStats::utilization);

        let name = "hardmax_layer_balancedness_ratio";
        page.family(name, Kind::Gauge, "Mean over largest load of the layer's experts in the last 60 s: 1 is even. 0 without traffic.");
        self.layer_family(page, name, &recent, RoutingStats::balancedness);
        let name = "hardmax_layer_load_cv";
        page.family(name, Kind::Gauge, "Coefficient of variation of the load of the layer's experts in the last 60 s: 0 is even.");
        self.layer_family(page, name, &recent, RoutingStats::load_cv);
        let name = "hardmax_dead_experts";
        page.family(name, Kind::Gauge, "Experts of the layer without a token in the last 60 s. 0 without traffic.");
        self.layer_family(page, name, &recent, |stats| if stats.routes == 0 { 0.0 } else { stats.dead() as f64 });
        let name = "hardmax_router_entropy_nats";
        page.family(
            name,
            Kind::Gauge,
            "Entropy of the softmax of the router logits, mean over the tokens of the last 60 s. 0 without traffic.",
        );
        self.layer_family(page, name, &recent, |stats| if stats.tokens == 0 { 0.0 } else { stats.entropy_sum / stats.tokens as f64 });
        let name = "hardmax_router_non_finite_tokens_total";
        page.family(name, Kind::Counter, "Tokens whose router logits were not finite; their requests failed.");
        self.layer_family(page, name, &totals, |stats| stats.non_finite as f64);
    }

    fn experts(&self, page: &mut Exposition, name: &str, stats: &[&RoutingStats], values: impl Fn(&RoutingStats) -> Vec<f64>) {
        for (load, stats) in self.layers.iter().zip(stats) {
            for (expert, value) in values(stats).into_iter().enumerate() {
                page.sample(name, &[("model", &self.model), ("layer", &load.layer), ("expert", &expert)], value);
            }
        }
    }

    fn layer_family(&self, page: &mut Exposition, name: &str, stats: &[&RoutingStats], value: impl Fn(&RoutingStats) -> f64) {
        for (load, stats) in self.layers.iter().zip(stats) {
            page.sample(name, &[("model", &self.model), ("layer", &load.layer)], value(stats));
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
                ..RoutingStats::new(expert_tokens.len())
            },
        }
    }

    fn value(load: &ExpertLoad, now: Instant, sample: &str) -> f64 {
        let mut page = Exposition::default();
        load.write(&mut page, now);
        let text = page.finish();
        let line = text.lines().find(|line| line.starts_with(sample)).unwrap_or_else(|| panic!("no {sample} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    #[test]
    fn totals_stay_and_the_window_moves() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut load = ExpertLoad::new("m", &[(1, 2), (3, 4)], start);
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
        assert_eq!(value(&load, after(41), "hardmax_layer_balancedness_ratio{model=\"m\",layer=\"3\"}"), 0.5);
        assert_eq!(value(&load, after(41), "hardmax_layer_load_cv{model=\"m\",layer=\"3\"}"), 1.0);
        assert_eq!(value(&load, after(41), "hardmax_router_entropy_nats{model=\"m\",layer=\"3\"}"), 0.25);
    }

    #[test]
    fn memory_is_bounded() {
        let start = Instant::now();
        let mut load = ExpertLoad::new("m", &[(0, 2)], start);
        for second in 0..1000 {
            load.add(&[routing(0, &[1, 0])], start + Duration::from_secs(second));
        }
        assert!(load.layers[0].window.len() <= 12);
        assert_eq!(load.layers[0].total.routes, 1000);
    }
}
