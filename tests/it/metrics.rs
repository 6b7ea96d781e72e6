//! The catalogue of series against what is written of it, what asks for it, and a server that is driven.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use hardmax::{
    engine::{EngineConfig, ShadowConfig},
    moe::policy::RoutingChoice,
    service::proto::{
        DetokenizeRequest, GenerateRequest, GetModelInfoRequest, PublishRequest, RollbackRequest, RoutingPolicy, ScoreRequest,
        StopTuningRequest, TokenIds, TokenizeRequest,
        generate_request::Prompt,
        routing_policy::{Policy, TopK},
        score_request::Input,
        tuning_client::TuningClient,
        watch_tuning_response::Event,
    },
    telemetry::{
        catalog::{self, Buckets, CATALOG, Family, Kind, Presence, Section, Values},
        metrics::{MetricsAliases, SeriesOptions},
    },
};

use crate::{
    support::{Options, PANIC, POISON, TestServer, collect, generate, soon},
    tuning,
};

/// Series that a driven server does not move.
const STILL: &[(&str, &str)] = &[
    ("hardmax_generation", "nothing is published"),
    ("hardmax_generations_resident", "nothing is published"),
    ("hardmax_mode", "nothing is tuned"),
    ("hardmax_metrics_series", "the number of series is that of the start"),
];

/// Series of the shadow that are as they were when a sample is done.
const STILL_SHADOW: &[(&str, &str)] = &[("hardmax_fidelity_samples_pending", "none waits any more")];

/// Series of tuning that a short job and its publish do not move.
const STILL_TUNING: &[(&str, &str)] = &[("hardmax_tuning_skipped_steps_total", "all gradients are finite")];

/// Files whose expressions ask for series.
const ASKING: &[&str] = &["docs/metrics.md", "docker/prometheus/rules/hardmax.yml", "docker/grafana/dashboards/hardmax.json"];

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

// === a driven server ===

/// Types by family, and values by series.
#[derive(Debug)]
struct Page {
    types: BTreeMap<String, String>,
    values: HashMap<String, f64>,
}

impl Page {
    async fn of(server: &TestServer) -> Self {
        let (status, text) = server.get("/metrics").await;
        assert!(status.contains("200"), "{status}");
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let values = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.rsplit_once(' '));
        Self {
            types: types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect(),
            values: values.map(|(series, value)| (series.to_owned(), value.parse().unwrap())).collect(),
        }
    }

    /// Whether a series of `family` differs.
    fn differs(&self, other: &Self, family: &Family) -> bool {
        let of_family = |series: &str| {
            let name = series.split('{').next().unwrap_or_default();
            let part = name.strip_prefix(family.name);
            part == Some("") || family.kind == Kind::Histogram && part.is_some_and(|part| ["_bucket", "_sum", "_count"].contains(&part))
        };
        self.values.iter().any(|(series, value)| of_family(series) && other.values.get(series) != Some(value))
    }
}

/// Does what a server can meet, and returns the pages before, during and after it.
async fn drive(server: &TestServer) -> [Page; 3] {
    let mut client = server.client().await;
    client.get_model_info(GetModelInfoRequest::default()).await.unwrap();
    let before = Page::of(server).await;
    // Two requests that outgrow the cache together, one that waits for them, and one that is not let in.
    let long = |letter: &str| generate(&letter.repeat(20), 30);
    let running = client.generate(long("a")).await.unwrap();
    server.gate.step(1).await;
    let waiting = client.generate(long("b")).await.unwrap();
    let queued = client.generate(long("c")).await.unwrap();
    client.generate(long("d")).await.unwrap_err();
    server.gate.allow(1);
    server.gate.step(2).await;
    let during = Page::of(server).await;
    server.gate.open();
    for stream in [running, waiting, queued] {
        assert!(collect(stream.into_inner()).await.1.is_none());
    }
    for _ in 0..2 {
        collect(client.generate(long("a")).await.unwrap().into_inner()).await;
    }
    client.score(ScoreRequest { input: Some(Input::Text("ab".into())), ..Default::default() }).await.unwrap();
    client.tokenize(TokenizeRequest { text: "a".into(), ..Default::default() }).await.unwrap();
    client.detokenize(DetokenizeRequest { token_ids: vec![97], ..Default::default() }).await.unwrap();
    for culprit in [POISON, PANIC] {
        let request = GenerateRequest { prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![1, culprit] })), ..generate("", 4) };
        collect(soon(client.generate(request)).await.unwrap().into_inner()).await;
    }
    server.metric_reaches("hardmax_engine_panics_total", &[], 1.0).await;
    server.metric_reaches("hardmax_requests_total", &[("method", "Generate"), ("code", "INTERNAL")], 2.0).await;
    [before, during, Page::of(server).await]
}

#[tokio::test]
async fn a_driven_server_moves_every_series_of_the_catalogue() {
    let engine = EngineConfig { max_batch_requests: 2, max_queue_requests: 1, ..Options::default().engine };
    let series = SeriesOptions { aliases: MetricsAliases::Vllm, ..SeriesOptions::default() };
    // 80 tokens: two of the requests can begin together, and cannot end together.
    let server = TestServer::start(Options { engine, series, cache_blocks: 5, gate_open: false, ..Options::default() }).await;
    let [before, during, after] = drive(&server).await;
    // A model that cannot be watched has no shadow: see the next test.
    let expected: BTreeMap<String, String> = catalog::families()
        .filter(|family| of_requests(family))
        .map(|family| (family.name.to_owned(), family.kind.exported().to_owned()))
        .collect();
    for page in [&before, &during, &after] {
        assert_eq!(page.types, expected);
        assert_eq!(page.values["hardmax_metrics_series"], page.values.len() as f64);
    }
    let moves = |family: &Family| before.differs(&during, family) || before.differs(&after, family);
    let fed = catalog::families().filter(|family| family.kind != Kind::Info && of_requests(family));
    let still: Vec<&str> = fed.filter(|family| !moves(family)).map(|f| f.name).collect();
    assert_eq!(still, STILL.iter().map(|(name, _)| *name).collect::<Vec<_>>());
}

/// On the page of a server that neither measures nor tunes.
fn of_requests(family: &Family) -> bool {
    !of_the_shadow(family) && family.presence != Presence::Tuning
}

fn of_the_shadow(family: &Family) -> bool {
    matches!(family.presence, Presence::Shadow | Presence::ShadowPerLayer)
}

#[tokio::test]
async fn a_measured_request_moves_every_series_of_the_shadow() {
    let shadow = ShadowConfig { rate: 1.0, budget: 1.0, ..ShadowConfig::default() };
    let engine = EngineConfig { shadow, ..Options::default().engine };
    let routing = RoutingChoice::TopK { k: 1, weight_form: None }.into();
    let server = TestServer::start(Options { engine, routing, ..Options::demo() }).await;
    let mut client = server.client().await;
    client.get_model_info(GetModelInfoRequest::default()).await.unwrap();
    let before = Page::of(&server).await;
    let text = "In the beginning was the Word, and no one knew where the experts had gone; so they were asked. ".repeat(3);
    let request = ScoreRequest { input: Some(Input::Text(text)), routing: Some(top_1()), ..Default::default() };
    client.score(request).await.unwrap();
    server.metric_reaches("hardmax_fidelity_samples_total", &[("outcome", "done")], 1.0).await;
    let after = Page::of(&server).await;
    let shadow: Vec<&Family> = catalog::families().filter(|family| of_the_shadow(family)).collect();
    for page in [&before, &after] {
        assert!(shadow.iter().all(|family| page.types.get(family.name).is_some_and(|kind| *kind == family.kind.exported())));
    }
    let still: Vec<&str> = shadow.iter().filter(|family| !before.differs(&after, family)).map(|family| family.name).collect();
    assert_eq!(still, STILL_SHADOW.iter().map(|(name, _)| *name).collect::<Vec<_>>());
}

/// A job that is at it, then one that has left a candidate, which is published and taken back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_and_a_publish_move_every_series_of_tuning() {
    let dir = tempfile::tempdir().unwrap();
    let server = TestServer::start(Options::tuning(dir.path(), &[])).await;
    server.client().await.get_model_info(GetModelInfoRequest::default()).await.unwrap();
    let mut client = TuningClient::new(server.channel().await);
    let before = Page::of(&server).await;
    let job = tuning::start(&mut client, tuning::short(100_000)).await;
    let mut stream = tuning::watch(&mut client, &job.id).await;
    tuning::until(&mut stream, |message| matches!(message.event, Some(Event::Evaluation(_)))).await;
    let during = Page::of(&server).await;
    let stop = StopTuningRequest { id: job.id.clone(), keep_candidate: true, ..StopTuningRequest::default() };
    client.stop_tuning(stop).await.unwrap();
    tuning::ended(&mut client, &job.id).await;
    let publish = PublishRequest { id: job.id, override_gates: true, ..PublishRequest::default() };
    assert_eq!(client.publish(publish).await.unwrap().into_inner().generation, 2);
    let published = Page::of(&server).await;
    client.rollback(RollbackRequest::default()).await.unwrap();
    let after = Page::of(&server).await;

    let of_tuning: Vec<&Family> = catalog::families().filter(|family| family.presence == Presence::Tuning).collect();
    for page in [&before, &during, &after] {
        assert!(of_tuning.iter().all(|family| page.types.get(family.name).is_some_and(|kind| *kind == family.kind.exported())));
    }
    let moves = |family: &Family| [&during, &published, &after].iter().any(|page| page.differs(&before, family));
    let still: Vec<&str> = of_tuning.iter().filter(|family| !moves(family)).map(|family| family.name).collect();
    assert_eq!(still, STILL_TUNING.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    let value = |page: &Page, name: &str| page.values.iter().find(|(series, _)| series.starts_with(name)).map(|(_, value)| *value);
    assert_eq!([&before, &published, &after].map(|page| value(page, "hardmax_generation{")), [1.0, 2.0, 1.0].map(Some));
    let modes = [&before, &during, &after]
        .map(|page| page.values.iter().find(|(series, value)| series.starts_with("hardmax_mode{") && **value == 1.0));
    let modes = modes.map(|series| series.is_some_and(|(series, _)| series.contains("mode=\"tune\"")));
    assert_eq!(modes, [false, true, false]);
}

fn top_1() -> RoutingPolicy {
    RoutingPolicy { policy: Some(Policy::TopK(TopK { k: 1, weight_form: None })) }
}

// === the page about it ===

/// The lists of `docs/metrics.md`.
fn printed() -> String {
    let mut text = String::new();
    for Section { title, families } in CATALOG {
        let _ = writeln!(text, "### {title}\n\n| series | labels | type, unit | what it says | it moves when |\n|---|---|---|---|---|");
        for family in *families {
            let Family { name, kind, labels, unit, help, moves, presence, .. } = family;
            let labels: Vec<&str> = labels.iter().map(|label| label.name).collect();
            let kind = match kind {
                Kind::Info => "info".to_owned(),
                kind => format!("{}, {unit}", kind.exported()),
            };
            let help = help.replace('|', "\\|");
            let _ = writeln!(text, "| `{name}` | {} | {kind}{} | {help} | {moves} |", labels.join(", "), there(*presence));
        }
        text.push('\n');
    }
    text + &printed_labels() + "\n" + &printed_buckets()
}

/// What decides whether a family is there, unless nothing does.
fn there(presence: Presence) -> &'static str {
    match presence {
        Presence::Always => "",
        Presence::PerLayer => "; not with `--expert-metrics off`",
        Presence::PerExpert => "; only with `--expert-metrics per-expert`",
        Presence::Shadow => "; not with `--shadow-budget 0`",
        Presence::ShadowPerLayer => "; not with `--shadow-budget 0` or `--expert-metrics off`",
        Presence::Tuning => "; only with `--tuning-dir`",
        Presence::VllmAlias => "; only with `--metrics-aliases vllm`",
    }
}

fn printed_labels() -> String {
    let mut text = "### Values of labels\n\n| label | of | values |\n|---|---|---|\n".to_owned();
    let mut seen = Vec::new();
    for label in catalog::families().flat_map(|family| family.labels) {
        if seen.contains(label) {
            continue;
        }
        seen.push(*label);
        let of: Vec<String> = catalog::families().filter(|family| family.labels.contains(label)).map(|f| format!("`{}`", f.name)).collect();
        let of = if of.len() > 4 { "many".to_owned() } else { of.join(", ") };
        let values = match label.values {
            Values::OneOf(values) => values.iter().map(|value| format!("`{value}`")).collect::<Vec<_>>().join(", "),
            Values::Fact(words) => words.to_owned(),
        };
        let _ = writeln!(text, "| `{}` | {of} | {values} |", label.name);
    }
    text
}

fn printed_buckets() -> String {
    let mut text = "### Buckets of histograms\n\n| histogram | upper ends, and infinity |\n|---|---|\n".to_owned();
    for family in catalog::families() {
        let ends = match family.buckets {
            Buckets::None => continue,
            Buckets::Fixed(ends) => ends.iter().map(f64::to_string).collect::<Vec<_>>().join(", "),
            Buckets::UpToContext => "1, 2, 5, 10, 20, ... up to the context of the model".to_owned(),
        };
        let _ = writeln!(text, "| `{}` | {ends} |", family.name);
    }
    text
}

#[test]
fn the_page_prints_the_catalogue() {
    let page = fs::read_to_string(root("docs/metrics.md")).unwrap();
    let (begin, end) = ("<!-- catalogue: begin -->\n", "<!-- catalogue: end -->");
    let (head, rest) = page.split_once(begin).expect("docs/metrics.md has the mark");
    let (found, tail) = rest.split_once(end).expect("docs/metrics.md has the other mark");
    let printed = printed();
    if found != printed {
        let right = Path::new(env!("CARGO_TARGET_TMPDIR")).join("metrics.md");
        fs::write(&right, [head, begin, &printed, end, tail].concat()).unwrap();
        panic!("docs/metrics.md is not what the catalogue says. As it should be: cp {} docs/metrics.md", right.display());
    }
}

// === those who ask ===

/// The words of a text that are names of series, exported or (with a colon) recorded.
fn names(text: &str) -> BTreeSet<&str> {
    let word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    text.split(|c| !word(c)).map(|word| word.trim_end_matches(':')).filter(|word| word.contains("hardmax_")).collect()
}

#[test]
fn nobody_asks_for_a_series_that_does_not_exist() {
    let rules = fs::read_to_string(root("docker/prometheus/rules/hardmax.yml")).unwrap();
    let recorded: BTreeSet<&str> = rules.lines().filter_map(|line| line.trim_start().strip_prefix("- record: ")).collect();
    let exists = |name: &str| {
        let is = |family: &Family| match family.kind {
            Kind::Histogram => ["", "_bucket", "_sum", "_count"].iter().any(|part| name.strip_suffix(part) == Some(family.name)),
            _ => name == family.name,
        };
        catalog::families().any(is)
    };
    for file in ASKING {
        let text = fs::read_to_string(root(file)).unwrap();
        let unknown: Vec<&str> =
            names(&text).into_iter().filter(|name| !exists(name) && !recorded.contains(name) && *name != "hardmax_test").collect();
        assert!(unknown.is_empty(), "{file}: {unknown:?}");
    }
}

#[test]
fn every_alert_is_tested_explained_and_in_the_list() {
    let rules = fs::read_to_string(root("docker/prometheus/rules/hardmax.yml")).unwrap();
    let tests = fs::read_to_string(root("docker/prometheus/rules/hardmax_test.yml")).unwrap();
    let page = fs::read_to_string(root("docs/metrics.md")).unwrap();
    let alerts: Vec<&str> = rules.split("- alert: ").skip(1).collect();
    assert!(!alerts.is_empty());
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        assert!(tests.contains(&format!("- name: {name}\n")), "{name} has no test");
        assert!(page.contains(&format!("| {name} |")), "{name} is not in docs/metrics.md");
        // Folded text may break anywhere.
        let alert = alert.split_whitespace().collect::<Vec<_>>().join(" ");
        for part in ["severity:", "summary:", "description:", "What to do:"] {
            assert!(alert.contains(part), "{name} has no {part}");
        }
    }
}

#[test]
fn the_dashboard_is_whole() {
    let text = fs::read_to_string(root("docker/grafana/dashboards/hardmax.json")).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let (mut ids, mut covered) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id is taken");
        let place = |side: &str| panel["gridPos"][side].as_u64().unwrap();
        assert!(place("x") + place("w") <= 24, "{title} is too wide");
        for cell in (0..place("h")).flat_map(|y| (0..place("w")).map(move |x| (x, y))) {
            assert!(covered.insert((place("x") + cell.0, place("y") + cell.1)), "{title} lies on another panel");
        }
        if panel["type"] == "row" {
            continue;
        }
        assert!(panel["description"].as_str().is_some_and(|text| text.ends_with('.')), "{title} has no description");
        assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{title} asks for nothing");
        for expr in targets.iter().map(|target| target["expr"].as_str().unwrap()) {
            assert!(expr.contains("model=\"$model\""), "{title} shows other models: {expr}");
            let share = panel["fieldConfig"]["defaults"]["unit"] == "percentunit";
            assert!(!share || !expr.starts_with("sum") || expr.contains(" / "), "{title} adds up the shares of replicas: {expr}");
        }
    }
    let variables = dashboard["templating"]["list"].as_array().unwrap();
    let names: Vec<&str> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
    assert_eq!(names, ["datasource", "model", "layer"]);
    // Layers and experts of two models have the same names, and nothing in common.
    assert_eq!((&variables[1]["multi"], &variables[1]["includeAll"]), (&false.into(), &false.into()));
}
