//! `/live.json`: the state of this moment. Rates and quantiles are differences between two of them, which the page makes.

use std::collections::BTreeMap;

use serde::Serialize;

use super::samples::{Buckets, Sample, samples};
use crate::{
    moe::RoutingStats,
    telemetry::{
        fidelity::FidelitySnapshot,
        http::Readiness,
        metrics::{ExpertLoadSnapshot, Metrics, Scope},
        tuning::TuningCurves,
    },
};

/// What the page draws. Counters and buckets are since the start of the server.
#[derive(Debug, Default, Serialize)]
pub(super) struct Live {
    pub(super) readiness: &'static str,
    /// Of the server. Goes back when it was restarted.
    pub(super) uptime_seconds: f64,
    /// Nothing while the model loads.
    #[serde(flatten)]
    pub(super) model: Option<ModelState>,
}

/// What there is once a model is in memory.
#[derive(Debug, Default, Serialize)]
pub(super) struct ModelState {
    /// Labels of the `_info` series: model, generation, dtype, device, layers, experts, serving, reference, version, ...
    facts: BTreeMap<String, String>,
    counters: Counters,
    running: f64,
    waiting: f64,
    /// Share of the cache blocks, 0 to 1.
    cache_usage: f64,
    time_to_first_token: Buckets,
    inter_token_latency: Buckets,
    expert_load: ExpertLoad,
    fidelity: Fidelity,
    /// What the machine is given to: serve, tune, tune_exclusive.
    mode: String,
    /// `None`: this server does not tune.
    tuning: Option<TuningCurves>,
}

#[derive(Debug, Default, Serialize)]
struct Counters {
    prompt_tokens: f64,
    generated_tokens: f64,
    rejected: f64,
    failed: f64,
}

#[derive(Debug, Default, Serialize)]
struct ExpertLoad {
    window: Load,
    total: Load,
}

#[derive(Debug, Default, Serialize)]
struct Fidelity {
    window: FidelitySnapshot,
    total: FidelitySnapshot,
}

#[derive(Debug, Default, Serialize)]
struct Load {
    /// What the numbers cover.
    seconds: f64,
    layers: Vec<LayerLoad>,
}

#[derive(Debug, Serialize)]
struct LayerLoad {
    layer: usize,
    /// Routed to each expert. A token counts once for each expert that it is routed to.
    expert_tokens: Vec<u64>,
    /// Mean load over largest load.
    balancedness: f64,
    load_cv: f64,
    dead_experts: usize,
    /// Mean over tokens, in nats.
    router_entropy: f64,
}

impl Readiness {
    fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Serving => "serving",
            Self::Tuning => "tuning",
            Self::Draining => "draining",
            Self::Failed => "failed",
        }
    }
}

impl Live {
    /// The state of a server; `metrics` once its model is loaded.
    pub(super) fn new(readiness: Readiness, uptime_seconds: f64, metrics: Option<&Metrics>) -> Self {
        Self { readiness: readiness.name(), uptime_seconds, model: metrics.map(ModelState::new) }
    }
}

impl ModelState {
    fn new(metrics: &Metrics) -> Self {
        let load = |scope| Load::from(metrics.expert_load(scope));
        let expert_load = ExpertLoad { window: load(Scope::Window), total: load(Scope::Total) };
        let fidelity = Fidelity { window: metrics.recent_fidelity(), total: metrics.fidelity_snapshot() };
        let mut state = Self { expert_load, fidelity, tuning: metrics.tuning_curves(), ..Self::default() };
        samples(&metrics.render_common()).for_each(|sample| state.take(sample));
        state
    }

    fn take(&mut self, sample: Sample<'_>) {
        match sample.name {
            "hardmax_build_info" | "hardmax_model_info" | "hardmax_routing_info" if sample.value == 1.0 => {
                self.facts.extend(sample.labels.into_iter().map(|(label, value)| (label.to_owned(), value)));
            }
            "hardmax_prompt_tokens_total" => self.counters.prompt_tokens = sample.value,
            "hardmax_generated_tokens_total" => self.counters.generated_tokens = sample.value,
            "hardmax_admission_rejections_total" => self.counters.rejected += sample.value,
            "hardmax_request_finished_total" if sample.labels.get("reason").is_some_and(|reason| reason == "error") => {
                self.counters.failed = sample.value;
            }
            "hardmax_mode" if sample.value == 1.0 => self.mode = sample.labels.get("mode").cloned().unwrap_or_default(),
            "hardmax_requests_running" => self.running = sample.value,
            "hardmax_requests_waiting" => self.waiting = sample.value,
            "hardmax_kv_cache_usage_ratio" => self.cache_usage = sample.value,
            "hardmax_time_to_first_token_seconds_bucket" => self.time_to_first_token.push(&sample),
            "hardmax_inter_token_latency_seconds_bucket" => self.inter_token_latency.push(&sample),
            _ => {}
        }
    }
}

impl From<ExpertLoadSnapshot> for Load {
    fn from(snapshot: ExpertLoadSnapshot) -> Self {
        let layers = snapshot.layers.into_iter().map(|load| LayerLoad::new(load.layer, load.stats)).collect();
        Self { seconds: snapshot.seconds, layers }
    }
}

impl LayerLoad {
    fn new(layer: usize, stats: RoutingStats) -> Self {
        Self {
            layer,
            balancedness: stats.balancedness(),
            load_cv: stats.load_cv(),
            dead_experts: if stats.routes == 0 { 0 } else { stats.dead() },
            router_entropy: stats.router_entropy(),
            expert_tokens: stats.expert_tokens,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::{Value, json};

    use super::*;
    use crate::telemetry::metrics::{MetricsConfig, Mode, Outcome, PublishOutcome, Rejection, SampleOutcome};

    fn live(metrics: Option<&Metrics>) -> Value {
        serde_json::to_value(Live::new(Readiness::Serving, 2.5, metrics)).unwrap()
    }

    #[test]
    fn before_the_model_there_is_the_state_only() {
        assert_eq!(live(None), json!({ "readiness": "serving", "uptime_seconds": 2.5 }));
    }

    #[test]
    fn shows_what_the_series_say() {
        let config = MetricsConfig {
            model: "a \"b\"".into(),
            serving: "top-1".into(),
            reference: "soft".into(),
            generation: 3,
            layers: vec![(1, 4)],
            ..MetricsConfig::default()
        };
        let metrics = Metrics::new(&config).unwrap();
        metrics.prompt_computed(7);
        metrics.first_token(Duration::from_millis(30));
        metrics.next_token(Duration::from_millis(3));
        metrics.set_requests(2, 5);
        metrics.set_cache_usage(1, 4);
        metrics.rejected(Rejection::QueueFull);
        metrics.rejected(Rejection::TooLong);
        metrics.finished(Outcome::Error);
        metrics.finished(Outcome::Stop);
        let live = live(Some(&metrics));
        let facts = &live["facts"];
        assert_eq!([&facts["model"], &facts["serving"], &facts["reference"], &facts["generation"]], ["a \"b\"", "top-1", "soft", "3"]);
        let counters = json!({ "prompt_tokens": 7.0, "generated_tokens": 2.0, "rejected": 2.0, "failed": 1.0 });
        assert_eq!(live["counters"], counters);
        assert_eq!([&live["running"], &live["waiting"], &live["cache_usage"]], [2.0, 5.0, 0.25]);
        for (histogram, before) in [("time_to_first_token", 0.02), ("inter_token_latency", 0.0025)] {
            let (le, count) = (&live[histogram]["le"], live[histogram]["count"].as_array().unwrap());
            let place = le.as_array().unwrap().iter().position(|bound| *bound == before).unwrap();
            assert_eq!([&count[place], &count[place + 1], count.last().unwrap()], [0.0, 1.0, 1.0], "{histogram}");
            assert_eq!(*le.as_array().unwrap().last().unwrap(), Value::Null);
        }
        for scope in ["window", "total"] {
            let fidelity = &live["fidelity"][scope];
            assert_eq!((&fidelity["enabled"], &fidelity["samples"]), (&json!(false), &json!(0)), "{scope}");
        }
        let layer = &live["expert_load"]["total"]["layers"][0];
        assert_eq!((&layer["layer"], &layer["expert_tokens"], &layer["dead_experts"]), (&json!(1), &json!([0, 0, 0, 0]), &json!(0)));
    }

    #[test]
    fn tuning_is_there_where_the_server_tunes() {
        let of = |tuning| {
            let metrics = Metrics::new(&MetricsConfig { model: "m".into(), tuning, ..MetricsConfig::default() }).unwrap();
            metrics.set_mode(Mode::Tune);
            metrics.set_generation(2);
            metrics.published(PublishOutcome::Overridden);
            live(Some(&metrics))
        };
        assert_eq!((&of(false)["tuning"], &of(false)["mode"]), (&Value::Null, &json!("tune")));
        let tuning = of(true)["tuning"].clone();
        assert_eq!((&tuning["job"], &tuning["loss"], &tuning["gap"]), (&Value::Null, &json!([]), &json!([])));
        assert_eq!((&tuning["switch"]["publish"], &tuning["switch"]["generation"]), (&json!("overridden"), &json!(2)));
    }

    #[test]
    fn the_window_of_the_gap_ends_with_the_routing() {
        let metrics = Metrics::new(&MetricsConfig { model: "m".into(), shadow: true, ..MetricsConfig::default() }).unwrap();
        metrics.fidelity_outcome(SampleOutcome::Same);
        let same = |scope: &str| live(Some(&metrics))["fidelity"][scope]["same"].clone();
        assert_eq!([same("window"), same("total")], [1, 1]);
        metrics.set_serving("top-2".into(), 2);
        assert_eq!([same("window"), same("total")], [0, 1]);
        metrics.fidelity_outcome(SampleOutcome::Same);
        metrics.set_serving("top-2".into(), 2);
        assert_eq!([same("window"), same("total")], [1, 2], "the same again is no other routing");
    }
}
