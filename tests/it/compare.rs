//! `hardmax compare` as a process: one folder, whole, the same again, and precise about what it cannot do.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use hardmax::compare::{
    cell::UNWRITABLE,
    plan::{Request, plan},
    results::{CellResult, Outcome, Results},
    spec::TaskName,
};

/// A run of a second or two: one estimator and the controls.
const SMALL: [&str; 9] =
    ["compare", "--quick", "--arms", "ste,steep", "--tasks", "equal,gradient", "--steps-scale", "0.1", "--log-level=warn"];
/// One that would take hours.
const LONG: [&str; 7] = ["compare", "--arms", "ste", "--tasks", "equal", "--steps-scale", "1000"];

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
        (vec!["--arms", "stee"], "--arms: 'stee' is unknown; did you mean ste"),
        (vec!["--tasks", "eqal"], "one of equal, unequal, collapsed, digits, text, rates, gradient"),
        (vec!["--seeds", "0"], "--seeds: must be at least 1"),
        (vec!["--seeds", "18446744073709551615"], "--seeds: must be at least 1 and at most 100"),
        (vec!["--arms", "dselect_k", "--tasks", "gradient"], "--arms: 'dselect_k' has no place in what is asked for"),
        (vec!["--jobs", "18446744073709551615"], "--jobs: must be at most 256"),
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

/// Waits for `is` to become true, at most half a minute.
fn wait_until(what: &str, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < Duration::from_secs(30), "{what}");
        thread::yield_now();
    }
}

/// Processes whose command line names the folder.
#[cfg(target_os = "linux")]
fn processes_of(folder: &Path) -> usize {
    let folder = folder.to_string_lossy().into_owned();
    let names =
        |entry: fs::DirEntry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).contains(&folder));
    fs::read_dir("/proc").expect("processes").flatten().map(names).filter(|named| *named).count()
}

#[test]
#[cfg(target_os = "linux")]
fn a_folder_has_one_run_and_cells_end_with_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let out = folder.path().join("out");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.args(LONG).args(["--jobs", "2"]).arg("--out").arg(&out).stdin(Stdio::null()).stderr(Stdio::null());
    let mut first = command.spawn().expect("the program starts");
    wait_until("no cell was begun", || processes_of(folder.path()) == 3);

    let second = hardmax(&SMALL, &out);
    let said = String::from_utf8_lossy(&second.stderr);
    assert_eq!(second.status.code(), Some(1), "{said}");
    assert!(said.contains("another run writes to this folder"), "{said}");

    // As the kernel does when memory is short: it has no time to end anything itself.
    first.kill().expect("it runs");
    first.wait().expect("it was killed");
    wait_until("cells live on", || processes_of(folder.path()) == 0);
    assert!(hardmax(&SMALL, &out).status.success(), "a lock ends with its owner");
}

#[test]
fn a_cell_that_cannot_write_says_so_by_its_status() {
    let folder = tempfile::tempdir().expect("a folder");
    let request =
        Request { arms: vec!["ste".into()], tasks: vec![TaskName::Gradient], quick: true, steps_scale: 1.0, ..Request::default() };
    let cells = plan(&request).expect("sound");
    let spec = serde_json::to_vec(&cells[0]).expect("JSON");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.args(["compare", "--cell"]).arg(folder.path().join("no-such-folder")).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program starts");
    child.stdin.take().expect("a pipe").write_all(&spec).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(i32::from(UNWRITABLE)), "{said}");
    assert!(said.contains("No such file"), "{said}");
}
