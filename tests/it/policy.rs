//! The shape of the tree, as a test: which part may name which other part, and which part may know which outside library.
//!
//! The order is service -> engine -> model -> moe -> kernel, one way. Whoever finds this test in the way has either put
//! code in the wrong place or changed the design; in the second case the tables below are the place to say so.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// A top-level module and what it may name of this crate, besides itself: `model` is all of it, `model::spec` a part.
const MAY_NAME: &[(&str, &[&str])] = &[
    // Leaves. `error` wraps the errors of loading; telemetry reads what a forward returns.
    ("durable", &["error"]),
    ("error", &["checkpoint"]),
    ("memory", &[]),
    ("ops", &["error"]),
    ("plot", &["error"]),
    ("schedule", &["error"]),
    ("telemetry", &["error", "moe"]),
    // Maths. A MoE layer is built from the description of a model, which is data, and knows nothing of the decoder.
    ("moe", &["error", "ops", "schedule", "model::spec", "model::weights", "model::MoeSpec", "model::ReferenceRouting"]),
    ("model", &["checkpoint", "error", "moe", "ops"]),
    ("checkpoint", &["durable", "error", "model", "moe"]),
    ("train", &["checkpoint", "durable", "error", "model", "moe", "ops", "plot", "schedule"]),
    // Compares routings of one model, for the command line and beside the engine.
    ("fidelity", &["error", "model", "moe", "plot"]),
    // Closes the gap: trains over the weights that are served, and measures before and after.
    ("tune", &["checkpoint", "durable", "error", "fidelity", "memory", "model", "moe", "schedule", "train"]),
    // Serving.
    ("engine", &["error", "fidelity", "model", "moe", "telemetry"]),
    // Runs that share the machine with requests, and what becomes of them.
    ("jobs", &["checkpoint", "durable", "engine", "error", "memory", "model", "telemetry", "tune"]),
    (
        "service",
        &["checkpoint::GenerationDefaults", "engine", "error", "fidelity", "jobs", "model", "moe", "schedule", "telemetry", "tune"],
    ),
    ("server", &["engine", "error", "jobs", "model", "moe", "service", "telemetry"]),
    // Measures all of the above.
    ("bench", &["engine", "error", "model", "moe", "ops", "server", "service", "telemetry"]),
    // The laboratory: estimators against each other, on small tasks of its own and on the decoder.
    ("compare", &["durable", "error", "memory", "model", "moe", "ops", "plot", "schedule", "train"]),
    // The command line may name everything.
    (
        "cli",
        &[
            "bench",
            "checkpoint",
            "compare",
            "durable",
            "engine",
            "error",
            "fidelity",
            "jobs",
            "memory",
            "model",
            "moe",
            "ops",
            "server",
            "service",
            "telemetry",
            "train",
            "tune",
        ],
    ),
    ("main", &["cli"]),
    ("lib", &[]),
];

/// An outside library (with its companions, `tonic_health` for `tonic`) and the only modules that may know of it.
const KNOWN_TO: &[(&str, &[&str])] = &[
    ("tonic", &["bench", "service", "server", "cli"]),
    ("prost", &["service", "server", "cli"]),
    ("axum", &["telemetry"]),
    ("hyper", &["telemetry"]),
    ("tokio_io_timeout", &["telemetry"]),
    ("opentelemetry", &["telemetry"]),
    ("plotters", &["plot"]),
    ("tokio", &["bench", "engine", "jobs", "service", "server", "cli", "telemetry"]),
];

/// Settings come in as flags, which clap also reads from the environment, and nowhere else.
const NOWHERE: &[(&str, &str)] = &[("env::var", "a setting is a flag of the command line, with `env` on it")];

#[test]
fn modules_name_only_what_is_below_them() {
    let mut wrong = Vec::new();
    for source in sources() {
        let Some((_, allowed)) = MAY_NAME.iter().find(|(module, _)| *module == source.module) else {
            wrong.push(format!("{}: give `{}` its place in tests/it/policy.rs", source.path, source.module));
            continue;
        };
        for path in crate_paths(&source.tokens) {
            let top = path.split("::").next().unwrap_or_default();
            let own = top == source.module || !top.starts_with(|c: char| c.is_ascii_lowercase());
            let covered = |rule: &&str| path == **rule || path.starts_with(&format!("{rule}::"));
            if !own && !allowed.iter().any(covered) {
                wrong.push(format!("{}: crate::{path} is not below `{}`", source.path, source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn libraries_stay_in_their_layer() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (library, modules) in KNOWN_TO {
            let named = source.tokens.iter().zip(source.tokens.iter().skip(1)).any(|(name, next)| {
                next == "::" && (name == library || name.strip_prefix(library).is_some_and(|rest| rest.starts_with('_')))
            });
            if named && !modules.contains(&source.module.as_str()) {
                wrong.push(format!("{}: `{}` must not know of {library}", source.path, source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Tensors may be on a device, and what reads them as slices is for the CPU. Whoever finds this test in the way has written such a thing where
/// training or serving meets tensors of a device: take `ops::OnHost`, or have a form for `ops::device` beside it, and then a line here.
const CPU_ONLY: &[(&[&str], &[&str])] = &[
    // Custom operations are applied through `OnHost`, which refuses a tensor of a device, or have a value that is on any.
    (&["apply_op1", "apply_op2", "apply_op3", "apply_op1_no_bwd", "apply_op2_no_bwd"], &["src/ops/attached.rs", "src/ops/place.rs"]),
    (&["inplace_op1", "inplace_op2", "inplace_op3"], &["src/model/gpu/random.rs", "src/ops/refill.rs"]),
    // Those that there are; all but `attached` and `random` have no `cuda_fwd`.
    (
        &["cpu_fwd"],
        &[
            "src/model/gpu/random.rs",
            "src/moe/train.rs",
            "src/ops/attached.rs",
            "src/ops/frozen.rs",
            "src/ops/fused.rs",
            "src/ops/grouped.rs",
            "src/ops/known.rs",
            "src/ops/refill.rs",
            "src/train/distill.rs",
        ],
    ),
    // Slices of a tensor: after a copy to the host, or where `runs_here` has said yes.
    (
        &["cpu_slice"],
        &[
            "src/cli/forward.rs",
            "src/model/attention.rs",
            "src/model/host/matrix.rs",
            "src/model/kv_cache.rs",
            "src/model/mod.rs",
            "src/moe/kernel/cpu.rs",
            "src/moe/layer.rs",
            "src/moe/trace.rs",
            "src/ops/mod.rs",
            "src/ops/refill.rs",
            "src/train/distill.rs",
            "src/train/optimizer.rs",
        ],
    ),
];

#[test]
fn what_is_for_the_cpu_is_where_somebody_has_looked() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (words, files) in CPU_ONLY {
            let used = words.iter().find(|word| source.tokens.iter().any(|token| token == *word));
            wrong.extend(used.filter(|_| !files.contains(&source.path.as_str())).map(|word| format!("{}: {word}", source.path)));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn forbidden_everywhere() {
    let mut wrong = Vec::new();
    for source in sources() {
        let text = source.tokens.concat();
        for (forbidden, why) in NOWHERE {
            if text.contains(forbidden) {
                wrong.push(format!("{}: {forbidden}: {why}", source.path));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_scanner_reads_rust() {
    let tokens = tokens(concat!(
        "// crate::comment\n/* crate::block /* nested */ */\n",
        "use crate::{error::{Error, Result}, model::{self, spec::{A, B as C}}, ops};\n",
        "const S: &str = \"crate::text \\\" tokio::x\"; const R: &str = r#\"crate::raw\"#; const C: char = '\"';\n",
        "fn f<'a>(x: &'a str) -> crate::moe::Routing { crate::engine::run(b\"crate::bytes\", '\\'', x) }",
    ));
    let expected = ["engine::run", "error::Error", "error::Result", "model", "model::spec::A", "model::spec::B", "moe::Routing", "ops"];
    assert_eq!(crate_paths(&tokens), expected.map(str::to_owned).into());
}

/// A file of `src/` other than the unit tests (`tests.rs` and what is in `tests/`), which may use what they like. As code: words, `::` and other signs, without comments and without what stands in quotes.
struct Source {
    /// For messages, from the root of the repository.
    path: String,
    /// Top-level module it belongs to; `main` and `lib` for the roots.
    module: String,
    tokens: Vec<String>,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    let mut folders = vec![root.join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("src is readable") {
            let path: PathBuf = entry.expect("src is readable").path();
            if path.is_dir() {
                folders.extend((!path.ends_with("tests")).then_some(path));
            } else if path.extension().is_some_and(|extension| extension == "rs") && !path.ends_with("tests.rs") {
                found.push(path);
            }
        }
    }
    assert!(!found.is_empty(), "no source found");
    found.sort();
    found.iter().map(|path| source(root, path)).collect()
}

fn source(root: &Path, path: &Path) -> Source {
    let relative = path.strip_prefix(root).expect("src is below the root");
    let first = relative.components().nth(1).expect("src has files").as_os_str().to_string_lossy();
    Source {
        path: relative.display().to_string(),
        module: first.trim_end_matches(".rs").to_owned(),
        tokens: tokens(&fs::read_to_string(path).expect("sources are UTF-8")),
    }
}

fn tokens(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let (mut found, mut i) = (Vec::new(), 0);
    while i < chars.len() {
        let c = at(i);
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && at(i) != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 1;
            i += 2;
            while i < chars.len() && depth > 0 {
                match (at(i), at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
            }
        } else if c == '"' {
            i += 1;
            while i < chars.len() && at(i) != '"' {
                i += if at(i) == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c == '\'' {
            // A character, unless a lifetime: 'x' closes after one character or begins with a backslash.
            if at(i + 1) == '\\' {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            } else if at(i + 2) == '\'' {
                i += 3;
            } else {
                i += 1;
            }
        } else if c.is_alphanumeric() || c == '_' {
            let begin = i;
            while at(i).is_alphanumeric() || at(i) == '_' {
                i += 1;
            }
            let word: String = chars[begin..i].iter().collect();
            let hashes = chars[i..].iter().take_while(|c| **c == '#').count();
            if matches!(word.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                i += hashes + 1;
                let closes = |i: usize| at(i) == '"' && (1..=hashes).all(|n| at(i + n) == '#');
                while i < chars.len() && !closes(i) {
                    i += 1;
                }
                i += hashes + 1;
            } else {
                found.push(word);
            }
        } else if c == ':' && at(i + 1) == ':' {
            found.push("::".to_owned());
            i += 2;
        } else {
            if !c.is_whitespace() {
                found.push(c.to_string());
            }
            i += 1;
        }
    }
    found
}

/// Every path that begins with `crate::`, without that beginning, braces multiplied out.
fn crate_paths(tokens: &[String]) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (i, pair) in tokens.windows(2).enumerate() {
        if pair[0] == "crate" && pair[1] == "::" {
            use_tree(tokens, i + 2, "", &mut found);
        }
    }
    found
}

/// Reads one path or group of paths from `i` on; returns the place after it.
fn use_tree(tokens: &[String], mut i: usize, prefix: &str, found: &mut BTreeSet<String>) -> usize {
    let mut path = prefix.to_owned();
    loop {
        match tokens.get(i).map(String::as_str) {
            Some("{") => {
                i += 1;
                while tokens.get(i).is_some_and(|token| token != "}") {
                    i = use_tree(tokens, i, &path, found);
                    while tokens.get(i).is_some_and(|token| token != "," && token != "}") {
                        i += 1;
                    }
                    if tokens.get(i).is_some_and(|token| token == ",") {
                        i += 1;
                    }
                }
                return i + 1;
            }
            Some("self") => i += 1,
            Some(word) if word.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
                if !path.is_empty() {
                    path += "::";
                }
                path += word;
                i += 1;
            }
            _ => break,
        }
        if tokens.get(i).is_none_or(|token| token != "::") {
            break;
        }
        i += 1;
    }
    found.insert(path);
    i
}
