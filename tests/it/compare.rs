//! `hardmax compare` as a process: one folder, whole, the same again, and precise about what it cannot do.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Output, Stdio},
};

use hardmax::compare::{
    results::{CellResult, Outcome, Results},
    spec::TaskName,
};

/// A run of a second or two: one estimator and the controls.
const SMALL: [&str; 9] =
    ["compare", "--quick", "--arms", "ste,steep", "--tasks", "equal,gradient", "--steps-scale", "0.1", "--log-level=warn"];

fn hardmax(arguments: &[&str], out: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.args(arguments).arg("--out").arg(out).stdin(Stdio::null()).output().expect("the program starts")
}

fn small(jobs: &str, out: &Path) -> Results {
    let output = hardmax(&[&SMALL[..], &["--jobs", jobs]].concat(), out);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&fs::read(out.join("results.json")).expect("results")).expect("of the form of results")
}

/// Without what the machine and its load decide.
fn timeless(results: &Results) -> Vec<Outcome> {
    let of_cell = |outcome: &Outcome| match outcome.clone() {
        Outcome::Trained(result) => {
            let machine = CellResult { step_ms: Default::default(), seconds: 0.0, peak_bytes: None, ..*result };
            Outcome::Trained(Box::new(machine))
        }
        other => other,
    };
    results.cells.iter().map(|cell| of_cell(&cell.outcome)).collect()
}

#[test]
fn one_command_makes_one_folder_and_a_second_only_what_is_missing() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let first = small("2", &out);
    assert!(first.cells.len() > 10);

    let report = fs::read_to_string(out.join("report.md")).expect("a report");
    for row in ["ste", "steep", "frozen", "hash", "oracle", "experts_only"] {
        assert!(report.contains(&format!("| `{row}` |")), "{row} has no row");
    }
    for picture in fs::read_dir(out.join("plots")).expect("pictures") {
        let picture = picture.expect("readable").path();
        assert!(picture.with_extension("svg").exists() && picture.with_extension("png").exists(), "{}", picture.display());
        let name = picture.file_stem().expect("a name").to_string_lossy().into_owned();
        assert!(report.contains(&name), "{name} is not in the report");
    }

    let cells = || -> BTreeMap<_, _> {
        let entries = fs::read_dir(out.join("cells")).expect("cells").map(|entry| entry.expect("readable"));
        entries.map(|entry| (entry.path(), entry.metadata().expect("readable").modified().expect("a time"))).collect()
    };
    let before = cells();
    let lost = before.keys().find(|path| path.extension().is_some_and(|e| e == "json")).expect("a cell").clone();
    fs::remove_file(&lost).expect("removable");
    let second = small("1", &out);
    let changed: Vec<_> = cells().into_iter().filter(|(path, time)| before.get(path) != Some(time)).map(|(path, _)| path).collect();
    assert_eq!(changed, [lost]);
    assert_eq!(timeless(&first), timeless(&second), "a cell that ran again, alone, came out the same");
}

#[test]
fn controls_do_what_their_names_say() {
    let folder = tempfile::tempdir().expect("a folder");
    let results = small("2", folder.path());
    let result = |arm: &str| {
        let is = |cell: &&hardmax::compare::results::CellRecord| cell.spec.arm.name == arm && cell.spec.task == TaskName::Equal;
        match &results.cells.iter().find(is).expect(arm).outcome {
            Outcome::Trained(result) => result.clone(),
            other => panic!("{arm}: {other:?}"),
        }
    };
    assert_eq!(result("oracle").agreement, Some(1.0));
    assert!(result("hash").nmi.expect("loads") < 0.05);
    for control in ["frozen", "hash", "oracle"] {
        assert_eq!((result(control).executed_per_token, result(control).router_grad.norm), (1.0, Some(0.0)), "{control}");
    }
    assert_eq!(result("ste").executed_per_token, 8.0);
    assert!(result("ste").router_grad.norm.expect("a norm") > 0.0);
}

#[test]
fn what_cannot_be_is_said_before_a_folder_is_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("arms.toml");
    fs::write(&config, "[[arm]]\nname = 'mine'\nestimator = { name = 'soft', params = { temperature = 0.0 } }\n").expect("writable");
    let config = config.to_string_lossy().into_owned();
    let out = folder.path().join("out");
    for (arguments, message) in [
        (vec!["--arms", "stee"], "--arms: 'stee' is unknown"),
        (vec!["--tasks", "eqal"], "one of equal, unequal, collapsed, digits, text, gradient"),
        (vec!["--seeds", "0"], "--seeds: must be at least 1"),
        (vec!["--steps-scale", "0"], "--steps-scale: must be above 0"),
        (vec!["--config", &config], "mine.routing.temperature: 0 is no value for it"),
    ] {
        let output = hardmax(&[&["compare"], &arguments[..]].concat(), &out);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(message), "{said}");
        assert!(!out.exists(), "{arguments:?}");
    }
}
