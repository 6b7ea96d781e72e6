//! `hardmax bench` as a process: the whole way from a shape in words to a report.

use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn bench(flags: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.arg("bench").args(flags.split_whitespace()).stdin(Stdio::null()).output().unwrap()
}

/// The report of a run that must succeed, as JSON and as text.
fn report(flags: &str) -> (Value, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let output = bench(&format!("{flags} --json {}", path.display()));
    let (said, log) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{flags}\n{said}\n{log}");
    (serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap(), said)
}

fn positive(value: &Value, path: &str) -> f64 {
    let number = value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number at {path} of {value}"));
    assert!(number > 0.0, "{path} is {number}");
    number
}

#[test]
fn a_model_is_measured_without_files() {
    let (report, text) = report(
        "--synthetic tiny,layers=1 --work prefill,decode,mixed --routing native,top-1,soft --prompt-tokens 24 --context 8 --generate 3 \
         --batch 1,2 --step-tokens 16 --repeats 1 --limits-mib 1 --gemm-size 64 --dtype bf16",
    );
    let steps = report["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 3 * 3 * 2);
    for step in steps {
        for path in ["/tokens_per_second", "/step_seconds/p99", "/bytes_per_token", "/flops_per_token", "/bandwidth_share", "/flops_share"]
        {
            positive(step, path);
        }
    }
    let experts = |routing: &str| {
        let found = steps.iter().find(|step| step["routing"] == routing && step["work"] == "decode" && step["batch"] == 1);
        positive(found.unwrap(), "/experts_per_layer")
    };
    assert_eq!((experts("top-1"), experts("native"), experts("soft")), (1.0, 2.0, 4.0));
    assert_eq!((report["model"]["dtype"].as_str(), report["format"].as_u64()), (Some("bf16"), Some(1)));
    positive(&report, "/limits/bandwidth");
    positive(&report, "/limits/flops");
    assert!(text.contains("| mixed") && text.contains("| top-1"), "{text}");
}

#[test]
fn serving_is_measured_through_grpc() {
    let (report, _) =
        report("--synthetic tiny,layers=1 --grpc --clients 1,3 --prompt-tokens 12 --generate 24 --repeats 2 --step-tokens 64");
    let rows = report["grpc"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["clients"].as_u64()).collect::<Vec<_>>(), [Some(1), Some(3)]);
    for row in rows {
        assert_eq!(row["time_to_first_token"]["count"], row["clients"].as_u64().unwrap() * 2);
        assert_eq!(row["inter_token"]["count"], row["clients"].as_u64().unwrap() * 2 * 23);
        positive(row, "/tokens_per_second");
        positive(row, "/time_to_first_token/p50");
    }
    // A client alone is always together with itself.
    for path in ["/steps/client/median", "/steps/client/mean", "/steps/model/median", "/steps/model/mean", "/steps/engine"] {
        positive(&rows[0], path);
    }
}

#[test]
fn a_soak_holds_streams_against_solo_runs() {
    let (report, text) = report(
        "--synthetic tiny,layers=1 --soak 1 --clients 8 --max-batch-requests 4 --prompts 6 --prompt-tokens 20 --generate 12 \
         --routing native,soft --tie-tolerance 0",
    );
    let soak = &report["soak"];
    assert_eq!(soak["violations"].as_array().map(Vec::len), Some(0), "{text}");
    assert_eq!((soak["compared"].as_u64(), soak["different"].as_u64()), (soak["equal"].as_u64(), Some(0)));
    positive(soak, "/compared_finished");
    positive(soak, "/ends/finished");
    positive(soak, "/ends/cancelled");
    assert_eq!((&soak["server"]["hardmax_requests_running"], &soak["server"]["hardmax_kv_cache_usage_ratio"]), (&0.0.into(), &0.0.into()));
}

#[test]
fn experiments_answer_with_ratios() {
    let (experts, text) = report("--experiment experts --synthetic tiny,layers=1 --rows-per-expert 4 --repeats 1 --prompt-tokens 16");
    assert_eq!(experts["experts"]["rows"].as_array().map(Vec::len), Some(4), "{text}");
    positive(&experts, "/experts/rows/3/relative");
    let (soft, _) = report("--experiment soft --synthetic tiny --prompt-tokens 32 --batch 2 --generate 2 --repeats 1");
    assert_eq!(soft["soft"][0]["experts_over_k"], 2.0);
    positive(&soft, "/soft/1/relative");
    let (prefix, _) = report("--experiment prefix --synthetic tiny --prompt-tokens 64 --repeats 2");
    positive(&prefix, "/prefix/relative");
    assert_eq!((prefix["prefix"]["equal"].as_u64(), prefix["prefix"]["different"].as_u64()), (Some(2), Some(0)));
}

#[test]
fn mistakes_are_told_with_the_flag() {
    for (flags, says) in [
        ("--synthetic big", "'big' is neither key=value nor one of tiny"),
        ("--synthetic tiny --context 600", "--context: decode"),
        ("--synthetic tiny --routing top-9", "--routing: 'top-9'"),
        ("--synthetic tiny --grpc --generate 600", "--prompt-tokens: 256 and --generate 600 are more than the 512 tokens"),
        ("", "--model: name a checkpoint folder"),
    ] {
        let output = bench(flags);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(says), "{flags}: {said}");
    }
    let gone = bench("--endpoint 127.0.0.1:1 --grpc");
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8(gone.stderr).unwrap().contains("no server at http://127.0.0.1:1"));
}
