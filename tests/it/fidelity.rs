//! `hardmax fidelity` as a process: what transformers computes with all experts active against top-k, and what it says of the demo.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use serde_json::Value;

/// Largest difference of a measure, as a part of itself where it is above 1.
const TOLERANCE: f64 = 1e-4;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn hardmax(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.arg("fidelity").args(arguments).stdin(Stdio::null()).output().expect("the program starts")
}

/// The report of a run, and what it printed.
fn report(model: &Path, arguments: &[&str]) -> (Value, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("report.json");
    let places = ["--model", model.to_str().expect("UTF-8"), "--json", json.to_str().expect("UTF-8")];
    let output = hardmax(&[&places, arguments].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = serde_json::from_slice(&fs::read(json).expect("a report")).expect("JSON");
    (report, String::from_utf8(output.stdout).expect("UTF-8"))
}

fn policy<'a>(report: &'a Value, name: &str) -> &'a Value {
    let has = |policy: &&Value| policy["name"] == name || policy["aliases"].as_array().is_some_and(|names| names.contains(&name.into()));
    report["policies"].as_array().and_then(|policies| policies.iter().find(has)).unwrap_or_else(|| panic!("no {name} in {report}"))
}

/// Every number of `expected` is in `found`, at the same place.
fn assert_close(expected: &Value, found: &Value, place: &str) {
    match expected {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| assert_close(value, &found[name], &format!("{place}.{name}"))),
        Value::Array(items) => {
            assert_eq!(Some(items.len()), found.as_array().map(Vec::len), "{place}");
            items.iter().enumerate().for_each(|(i, value)| assert_close(value, &found[i], &format!("{place}[{i}]")));
        }
        Value::Number(number) => {
            let (expected, found) = (number.as_f64().expect("a number"), found.as_f64().unwrap_or(f64::NAN));
            assert!((expected - found).abs() <= TOLERANCE * expected.abs().max(1.0), "{place}: {found}, not {expected}");
        }
        other => panic!("{place}: {other} in a golden of numbers"),
    }
}

#[test]
fn every_measure_is_what_transformers_computes() {
    let goldens = root().join("tests/goldens");
    let golden: Value = serde_json::from_slice(&fs::read(goldens.join("fidelity.json")).expect("a golden")).expect("JSON");
    let folder = tempfile::tempdir().expect("a folder");
    for (case, expected) in golden.as_object().expect("cases by name") {
        let ids = folder.path().join(case);
        fs::write(&ids, expected["tokens"].to_string()).expect("writable");
        let (ids, window) = (ids.to_str().expect("UTF-8"), expected["window"].to_string());
        let arguments = ["--token-ids", ids, "--window", &window, "--reference", "soft:1", "--routing", "native,top-1,top-2"];
        let (report, _) = report(&goldens.join(case), &[&arguments[..], &["--floor-tokens", "0", "--advice-tokens", "0"]].concat());
        for (name, expected) in expected["policies"].as_object().expect("policies by name") {
            assert_close(expected, policy(&report, name), &format!("{case}, {name}"));
        }
    }
}

fn demo() -> (PathBuf, String) {
    let model = root().join("models/demo");
    let text = model.join("data/heldout.txt").to_str().expect("UTF-8").to_owned();
    (model, text)
}

/// The demo was trained until its mixture was nearly one-hot. Eight times as warm, the same experts are a mixture that top-1 is not.
#[test]
fn a_sharp_router_and_a_soft_one_are_told_apart() {
    let (model, text) = demo();
    let common = ["--text", &text, "--routing", "native,top-1"];
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("plots");
    let pictures = ["--out", out.to_str().expect("UTF-8")];
    let whole = ["--max-tokens", "1024", "--floor-tokens", "128", "--advice-tokens", "512", "--mean-k", "1.5"];
    let (sharp, printed) = report(&model, &[&common[..], &whole, &pictures].concat());
    let gap = ["--max-tokens", "512", "--floor-tokens", "0", "--advice-tokens", "0", "--reference", "soft:8"];
    let (soft, _) = report(&model, &[&common[..], &gap].concat());

    let kl = |report: &Value| policy(report, "top-1")["output"]["kl"]["mean"].as_f64().expect("a number");
    assert!(kl(&soft) > 5.0 * kl(&sharp), "{} and {}", kl(&soft), kl(&sharp));
    let level = |report: &Value| policy(report, "top-1")["verdict"]["fidelity"]["level"].clone();
    assert_eq!((&sharp["reference"]["assumed"], &soft["reference"]["assumed"]), (&false.into(), &true.into()));
    assert_eq!(level(&soft), "red");
    assert_ne!(level(&sharp), "red");
    assert_eq!(policy(&sharp, "native")["name"], policy(&sharp, "top-1")["name"], "the demo is served with top-1");
    assert!(kl(&sharp) > 3.0 * sharp["floor"]["floor"]["kl"].as_f64().expect("a number"), "above the noise");
    for part in ["reference  soft:1\n", "Verdict", "native (= top-1): fidelity"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    for picture in ["gap-by-layer", "load", "coactivation", "tokens", "advice"] {
        assert!(out.join(format!("{picture}.svg")).is_file() && out.join(format!("{picture}.png")).is_file(), "{picture}");
    }

    // Advice is chosen on other text than it is run on.
    let advice = &sharp["advice"];
    let number = |value: &Value| value.as_f64().expect("a number");
    let plan = &advice["plans"][0];
    let (measured, expected) = (number(&plan["measured_kl"]), number(&plan["predicted_kl"]));
    assert!(measured < 2.0 * expected && expected < 2.0 * measured, "{measured} measured, {expected} expected");
    assert!(measured < number(&advice["top_1"]["measured_kl"]), "{advice}");
}

#[test]
fn what_cannot_be_measured_is_named() {
    let (model, text) = demo();
    let model = model.to_str().expect("UTF-8");
    let message = |arguments: &[&str]| {
        let output = hardmax(&[&["--model", model], arguments].concat());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        String::from_utf8(output.stderr).expect("UTF-8")
    };
    for (arguments, part) in [
        (vec![], "--text"),
        (vec!["--text", &text, "--layer-k", "1,2"], "--layer-k: 2 numbers for 4 MoE layers: give one for each"),
        (vec!["--text", &text, "--layer-k", "1,2,x,1"], "'x' is no number of experts"),
        (vec!["--text", &text, "--layer-k", "1,2,9,1"], "--layer-k: 9 for layer 2 is not from 1 to 8, its experts"),
        (vec!["--text", &text, "--routing", "top-9"], "--routing: top-9: "),
        (vec!["--text", &text, "--reference", "soft:0"], "--reference: soft:0: "),
        (vec!["--text", &text, "--window", "257"], "--window: 257 is not from 2 to 256, the context of the model"),
        (vec!["--text", &text, "--mean-k", "0.5"], "--mean-k: 0.5 is not a number from 1"),
    ] {
        let message = message(&arguments);
        assert!(message.contains(part), "{arguments:?}: {message}");
    }
}
