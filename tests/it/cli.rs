//! The commands that talk to a server, as processes.

use std::process::{Command, Output, Stdio};

use tokio::task::spawn_blocking;

use crate::support::{Options, SCRIPT, TestServer, soon};

async fn hardmax(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.args(arguments).stdin(Stdio::null());
    soon(spawn_blocking(move || command.output())).await.unwrap().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generate_streams_the_text() {
    let server = TestServer::start(Options::default()).await;
    let url = format!("http://{}", server.grpc);
    let length = SCRIPT.len().to_string();
    let output = hardmax(&["generate", "a", "--url", &url, "--max-new-tokens", &length, "--routing", "top-1"]).await;
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("{SCRIPT}\n"));
    assert!(text(&output.stderr).contains(&format!("1 prompt + {length} generated tokens, length")), "{}", text(&output.stderr));

    let output = hardmax(&["generate", "a", "--url", &url, "--max-new-tokens", "3", "--json", "--logprobs=1"]).await;
    let lines: Vec<serde_json::Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.last().unwrap()["finish"]["generated_tokens"], 3);
    assert_eq!(lines[0]["logprobs"][0]["alternatives"].as_array().unwrap().len(), 1);

    let changed =
        ["--logit-bias", "97=9", "--logit-bias", "98=9.5", "--frequency-penalty", "1", "--min-new-tokens", "2", "--stop-token", "98"];
    let output = hardmax(
        &[&["generate", "a", "--url", &url, "--max-new-tokens", "4", "--priority", "-3", "--timeout", "30"], &changed[..]].concat(),
    )
    .await;
    assert_eq!(text(&output.stdout), "aa\n", "{}", text(&output.stderr));
    let output =
        hardmax(&["generate", "a", "--url", &url, "--max-new-tokens", "3", "--allow-token", "98,99", "--presence-penalty=-1"]).await;
    assert_eq!(text(&output.stdout), "bbb\n", "{}", text(&output.stderr));

    let output = hardmax(&["generate", "a", "--url", &url, "-n", "2", "--max-new-tokens", "2"]).await;
    assert_eq!(text(&output.stdout), "[choice 0]\nGr\n[choice 1]\nGr\n", "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("choice 1: 1 prompt"), "{}", text(&output.stderr));
    let output = hardmax(&["generate", "a", "--url", &url, "-n", "3", "--max-new-tokens", "2", "--json"]).await;
    let lines: Vec<serde_json::Value> = text(&output.stdout).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.iter().filter(|line| !line["finish"].is_null()).count(), 3);

    let output = hardmax(&["generate", "a", "--url", &url, "--top-p", "2"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("INVALID_ARGUMENT: sampling.top_p"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_closed_pipe_ends_generate_quietly() {
    let server = TestServer::start(Options::endless()).await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_hardmax"));
    command.args(["generate", "a", "--url", &server.grpc.to_string()]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = spawn_blocking(move || {
        let mut child = command.spawn().unwrap();
        drop(child.stdout.take());
        child.wait_with_output().unwrap()
    });
    let output = soon(output).await.unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!text(&output.stderr).contains("panicked"), "{}", text(&output.stderr));
    server.metric_reaches("hardmax_request_finished_total", &[("reason", "cancelled")], 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn healthcheck_tells_by_its_exit_status() {
    let server = TestServer::start(Options::default()).await;
    let url = format!("http://{}", server.grpc);
    for service in ["", "hardmax.v1.Inference"] {
        assert!(hardmax(&["healthcheck", "--url", &url, "--service", service]).await.status.success());
    }
    let unknown = hardmax(&["healthcheck", "--url", &url, "--service", "nobody"]).await;
    assert_eq!(unknown.status.code(), Some(1));
    assert!(text(&unknown.stderr).contains("NOT_FOUND"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn errors_say_what_to_do() {
    // Bound and closed: nobody listens there.
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for command in [&["generate", "a", "--url", &free][..], &["healthcheck", "--url", &free]] {
        let output = hardmax(command).await;
        assert_eq!(output.status.code(), Some(1));
        let said = text(&output.stderr);
        assert!(said.contains("no server at") && said.contains("hardmax serve"), "{said}");
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = hardmax(&["serve", "--listen", &address, "--metrics-listen", "off"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains(&format!("cannot listen on --listen {address}")), "{}", text(&output.stderr));

    let usage: [&[&str]; 7] = [
        &["generate", "a", "--logit-bias", "7"],
        &["generate", "a", "--timeout", "soon"],
        &["serve", "--listen", "50051"],
        &["serve", "--top-k", "1", "--routing", "soft"],
        &["serve", "--log-level", "=["],
        &["generate", "a", "--url", "https://127.0.0.1:1"],
        &[],
    ];
    for arguments in usage {
        assert_eq!(hardmax(arguments).await.status.code(), Some(2), "{arguments:?}");
    }
    #[cfg(not(feature = "cuda"))]
    refused_at_load(&["--device", "cuda", "--model", "tests/goldens/mixtral_gqa"], "--features cuda").await;
    refused_at_load(&["--model", "no/such/folder"], "no/such/folder").await;
}

async fn refused_at_load(flags: &[&str], expected: &str) {
    let arguments = [&["serve", "--listen", "127.0.0.1:0", "--metrics-listen", "off"], flags].concat();
    let output = hardmax(&arguments).await;
    assert_eq!(output.status.code(), Some(1), "{flags:?}");
    assert!(text(&output.stderr).contains(expected), "{}", text(&output.stderr));
}
