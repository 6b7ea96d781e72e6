//! The page as a whole: what is on it, under which options, and that feeding one series moves that one.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use candle_core::{DType, Device, Tensor};

use super::{
    catalog::{self, Presence},
    metrics::*,
};
use crate::moe::{LayerRouting, Routing, RoutingStats, SparseRouting};

fn metrics() -> Metrics {
    metrics_with(SeriesOptions::default())
}

fn metrics_with(series: SeriesOptions) -> Metrics {
    let config = MetricsConfig {
        series,
        model: "demo \"x\"".into(),
        version: "0.1.0".into(),
        git: "unknown".into(),
        layers: vec![(0, 4), (2, 8)],
        num_layers: 3,
        top_k: 1,
        max_context: 128,
        shadow: true,
        tuning: true,
        ..MetricsConfig::default()
    };
    Metrics::new(&config).unwrap()
}

/// Types by family, and values by series.
fn parse(text: &str) -> (HashMap<String, String>, HashMap<String, f64>) {
    let (mut types, mut helped, mut values) = (HashMap::new(), HashSet::new(), HashMap::new());
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(types.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
            assert!(helped.contains(name), "{name} has no HELP before its TYPE");
        } else if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(help.ends_with('.'), "{line}");
            helped.insert(name.to_owned());
        } else {
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let family =
                ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix).filter(|f| types.contains_key(*f)));
            assert!(types.contains_key(family.unwrap_or(name)), "{series} has no TYPE");
            assert!(values.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{series} twice");
        }
    }
    (types, values)
}

#[test]
fn everything_is_there_from_the_start() {
    let (types, values) = parse(&metrics().render());
    let on_the_page = |family: &&catalog::Family| family.presence != Presence::VllmAlias;
    let expected = catalog::families().filter(on_the_page);
    let expected: HashMap<String, String> = expected.map(|family| (family.name.to_owned(), family.kind.exported().to_owned())).collect();
    assert_eq!(types, expected);
    for (series, value) in &values {
        let expected = if series == "hardmax_metrics_series" {
            values.len() as f64
        } else if series.contains("_info{") || series.contains("mode=\"serve\"") {
            1.0
        } else {
            0.0
        };
        assert_eq!(*value, expected, "{series}");
    }
    let count = |prefix: &str| values.keys().filter(|series| series.starts_with(prefix)).count();
    assert_eq!(count("hardmax_requests_total{"), Method::ALL.len() * Code::ALL.len());
    assert_eq!(count("hardmax_request_finished_total{"), Outcome::ALL.len());
    assert_eq!(count("hardmax_admission_rejections_total{"), Rejection::ALL.len());
    assert_eq!(count("hardmax_expert_tokens_total{"), 12);
    assert_eq!(count("hardmax_time_to_first_token_seconds_bucket{"), 23);
    assert_eq!(values["hardmax_routing_info{model=\"demo \\\"x\\\"\",serving=\"\",reference=\"\",estimator=\"\"}"], 1.0);
}

#[test]
fn labels_match_their_counters() {
    let metrics = metrics();
    for (n, &method) in Method::ALL.iter().enumerate() {
        (0..=n).for_each(|_| metrics.request(method, Code::InvalidArgument));
    }
    for (n, &outcome) in Outcome::ALL.iter().enumerate() {
        (0..=n).for_each(|_| metrics.finished(outcome));
    }
    for (n, &rejection) in Rejection::ALL.iter().enumerate() {
        (0..=n).for_each(|_| metrics.rejected(rejection));
    }
    let (_, values) = parse(&metrics.render());
    for (n, method) in Method::ALL.iter().enumerate() {
        let series = |code: &str| format!("hardmax_requests_total{{method=\"{}\",code=\"{code}\"}}", method.label());
        assert_eq!((values[&series("INVALID_ARGUMENT")], values[&series("OK")]), (n as f64 + 1.0, 0.0));
    }
    for (n, outcome) in Outcome::ALL.iter().enumerate() {
        assert_eq!(values[&format!("hardmax_request_finished_total{{reason=\"{}\"}}", outcome.label())], n as f64 + 1.0);
    }
    for (n, rejection) in Rejection::ALL.iter().enumerate() {
        assert_eq!(values[&format!("hardmax_admission_rejections_total{{reason=\"{}\"}}", rejection.label())], n as f64 + 1.0);
    }
}

#[test]
fn histograms_count_seconds() {
    let metrics = metrics();
    metrics.first_token(Duration::from_millis(30));
    metrics.next_token(Duration::from_millis(2));
    let [attention, experts, engine] = [1000, 2000, 30].map(Duration::from_micros);
    metrics.observe_step(&Step { requests: 3, tokens: 9, forward: Duration::from_millis(4), attention, experts, engine, layers: &[] });
    metrics.set_cache_usage(3, 12);
    metrics.preempted();
    metrics.prefix(20, 16);
    metrics.completed(&Completed {
        prompt_tokens: 7,
        total: Duration::from_secs(2),
        queue: Duration::ZERO,
        prefill: Duration::ZERO,
        generated: Some(Generated { tokens: 3, decode: Duration::from_secs(1) }),
    });
    let (_, values) = parse(&metrics.render());
    let model = "model=\"demo \\\"x\\\"\"";
    assert_eq!(values[&format!("hardmax_time_to_first_token_seconds_bucket{{{model},le=\"0.02\"}}")], 0.0);
    assert_eq!(values[&format!("hardmax_time_to_first_token_seconds_bucket{{{model},le=\"0.04\"}}")], 1.0);
    assert_eq!(values[&format!("hardmax_inter_token_latency_seconds_bucket{{{model},le=\"0.0025\"}}")], 1.0);
    assert_eq!(values[&format!("hardmax_request_seconds_sum{{{model}}}")], 2.0);
    assert_eq!(values[&format!("hardmax_request_prompt_tokens_bucket{{{model},le=\"10\"}}")], 1.0);
    assert_eq!(values[&format!("hardmax_step_tokens_bucket{{{model},le=\"8\"}}")], 0.0);
    assert_eq!(values[&format!("hardmax_generated_tokens_total{{{model}}}")], 2.0);
    assert_eq!(values[&format!("hardmax_time_per_output_token_seconds_sum{{{model}}}")], 0.5);
    assert_eq!(values[&format!("hardmax_step_requests_bucket{{{model},le=\"2\"}}")], 0.0);
    for (part, seconds) in [("attention", 0.001), ("experts", 0.002), ("rest", 0.001), ("engine", 0.000_03)] {
        assert_eq!(values[&format!("hardmax_step_part_seconds_sum{{{model},part=\"{part}\"}}")], seconds);
    }
    assert_eq!(values[&format!("hardmax_kv_cache_usage_ratio{{{model}}}")], 0.25);
    assert_eq!(values[&format!("hardmax_prefix_cache_hits_total{{{model}}}")], 16.0);
    assert_eq!(values[&format!("hardmax_kv_cache_info{{{model},block_size=\"0\",num_blocks=\"0\"}}")], 1.0);
}

fn names(page: &str) -> HashSet<String> {
    parse(page).0.into_keys().collect()
}

#[test]
fn options_decide_which_series_there_are() {
    let page = |experts, expert_limit, aliases| metrics_with(SeriesOptions { experts, expert_limit, aliases }).render();
    let expected = |hidden: &[Presence]| -> HashSet<String> {
        catalog::families().filter(|family| !hidden.contains(&family.presence)).map(|family| family.name.to_owned()).collect()
    };
    use MetricsAliases::{None, Vllm};
    use Presence::{PerExpert, PerLayer, Shadow, ShadowPerLayer, Tuning, VllmAlias};
    assert_eq!(names(&page(ExpertMetrics::PerExpert, 0, Vllm)), expected(&[]));
    assert_eq!(names(&page(ExpertMetrics::Auto, 36, None)), expected(&[VllmAlias]));
    assert_eq!(names(&page(ExpertMetrics::Auto, 35, None)), expected(&[VllmAlias, PerExpert]));
    assert_eq!(names(&page(ExpertMetrics::PerLayer, 36, None)), expected(&[VllmAlias, PerExpert]));
    assert_eq!(names(&page(ExpertMetrics::Off, 36, Vllm)), expected(&[PerLayer, PerExpert, ShadowPerLayer]));
    let unmeasured = Metrics::new(&MetricsConfig::default()).unwrap();
    assert_eq!(names(&unmeasured.render()), expected(&[VllmAlias, Shadow, ShadowPerLayer, Tuning]));
}

#[test]
fn aliases_say_what_they_are_aliases_of() {
    let metrics = metrics_with(SeriesOptions { aliases: MetricsAliases::Vllm, ..SeriesOptions::default() });
    metrics.set_requests(3, 2);
    metrics.set_cache_usage(1, 4);
    let (_, values) = parse(&metrics.render());
    for (name, alias, value) in [
        ("hardmax_requests_running", "vllm:num_requests_running", 3.0),
        ("hardmax_requests_waiting", "vllm:num_requests_waiting", 2.0),
        ("hardmax_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc", 0.25),
    ] {
        assert_eq!(values[&format!("{name}{{model=\"demo \\\"x\\\"\"}}")], value);
        assert_eq!(values[&format!("{alias}{{model_name=\"demo \\\"x\\\"\"}}")], value);
    }
}

#[test]
fn the_routing_in_force_is_shown() {
    let metrics = metrics();
    metrics.set_serving("top-2".into(), 2);
    let (_, values) = parse(&metrics.render());
    let shown = |name: &str, label: &str| {
        let mut series = values.keys().filter(|series| series.starts_with(name));
        let found = series.next().is_some_and(|series| series.contains(label));
        found && series.next().is_none()
    };
    assert!(shown("hardmax_routing_info{", "serving=\"top-2\""));
    assert!(shown("hardmax_model_info{", "top_k=\"2\""));
}

#[test]
fn generations_and_the_mode_are_shown() {
    let metrics = metrics();
    metrics.set_generation(4);
    metrics.set_generations(2, 5, 3);
    metrics.set_mode(Mode::TuneExclusive);
    let (_, values) = parse(&metrics.render());
    let of = |name: &str, label: &str| values[&format!("hardmax_{name}{{model=\"demo \\\"x\\\"\"{label}}}")];
    assert_eq!((of("generation", ""), of("generations_resident", "")), (4.0, 2.0));
    assert_eq!(["current", "older"].map(|age| of("generation_requests", &format!(",age=\"{age}\""))), [5.0, 3.0]);
    assert_eq!(["serve", "tune", "tune_exclusive"].map(|mode| of("mode", &format!(",mode=\"{mode}\""))), [0.0, 0.0, 1.0]);
    assert!(values.keys().any(|series| series.starts_with("hardmax_model_info{") && series.contains("generation=\"4\"")));
}

#[test]
fn the_load_is_kept_whatever_is_exported() {
    let metrics = metrics_with(SeriesOptions { experts: ExpertMetrics::Off, ..SeriesOptions::default() });
    let mut stats = RoutingStats::new(8);
    (stats.tokens, stats.routes, stats.expert_tokens[5]) = (4, 4, 4);
    let router_logits = Tensor::zeros((4, 8), DType::F32, &Device::Cpu).unwrap();
    let layers = [LayerRouting { layer: 2, router_logits, routing: Routing::Sparse(SparseRouting::default()), stats: stats.clone() }];
    let [forward, attention, experts, engine] = [Duration::ZERO; 4];
    metrics.observe_step(&Step { requests: 1, tokens: 4, forward, attention, experts, engine, layers: &layers });
    for scope in [Scope::Window, Scope::Total] {
        let load = metrics.expert_load(scope);
        assert_eq!(load.layers, [(0, RoutingStats::new(4)), (2, stats.clone())].map(|(layer, stats)| LayerLoadSnapshot { layer, stats }));
        assert!((0.0..60.0).contains(&load.seconds));
    }
    metrics.reset_statistics();
    assert_eq!(metrics.expert_load(Scope::Total).layers[1].stats.routes, 0);
    assert_eq!(metrics.expert_load(Scope::Window).layers[1].stats.routes, 4);
}
