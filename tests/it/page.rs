//! The live page over a real socket: what it says, whom it answers, and what it refuses.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use hardmax::telemetry::{
    http::{self, Page, Readiness},
    page::{PageConfig, PageMode},
};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::spawn_blocking};

use crate::support::{Options, TestServer, collect, generate, said, soon};

/// An answer: status, head in lower case, body.
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }
}

/// Names and values.
type Headers<'a> = &'a [(&'a str, &'a str)];

/// A request with `headers` beside Host, and its answer.
async fn send(to: SocketAddr, line: &str, headers: Headers<'_>, body: &[u8]) -> Answer {
    let request = request(to, line, headers, body);
    let work = spawn_blocking(move || {
        let mut socket = TcpStream::connect(to).unwrap();
        // Refused while it is sent: the answer says why.
        let _ = socket.write_all(&request);
        let mut response = Vec::new();
        socket.read_to_end(&mut response).unwrap();
        response
    });
    let response = soon(work).await.unwrap();
    let end = response.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8(response[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let names =
        head.lines().map(|line| line.split_once(": ").map_or(line.into(), |(name, value)| format!("{}: {value}", name.to_lowercase())));
    Answer { status, head: names.collect::<Vec<_>>().join("\n"), body: response[end + 4..].to_vec() }
}

fn request(to: SocketAddr, line: &str, headers: Headers<'_>, body: &[u8]) -> Vec<u8> {
    let mut head = format!("{line} HTTP/1.1\r\nConnection: close\r\n");
    if !headers.iter().any(|(name, _)| *name == "Host") {
        head += &format!("Host: {to}\r\n");
    }
    headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
    if line.starts_with("POST") {
        head += &format!("Content-Length: {}\r\n", body.len());
    }
    [head.as_bytes(), b"\r\n", body].concat()
}

async fn get(server: &TestServer, path: &str) -> Answer {
    send(server.observers, &format!("GET {path}"), &[], b"").await
}

const JSON: (&str, &str) = ("Content-Type", "application/json");

/// A server whose model is loaded.
async fn serving(options: Options) -> TestServer {
    let server = TestServer::start(options).await;
    let loaded = async {
        while get(&server, "/healthz").await.status != 200 {
            tokio::task::yield_now().await;
        }
    };
    soon(loaded).await;
    server
}

async fn try_prompt(server: &TestServer, trial: &Value) -> Answer {
    send(server.observers, "POST /try", &[JSON], trial.to_string().as_bytes()).await
}

fn with_page(mode: PageMode) -> Options {
    Options { live_page: PageConfig { mode, hosts: vec!["gpu1.lan".into()], ..PageConfig::default() }, ..Options::default() }
}

#[tokio::test]
async fn the_document_loads_nothing_from_elsewhere() {
    let server = serving(Options::default()).await;
    let (one, two) = (get(&server, "/").await, get(&server, "/").await);
    assert_eq!(
        (one.status, one.header("content-type"), one.header("cache-control")),
        (200, Some("text/html; charset=utf-8"), Some("no-store"))
    );
    let policy = one.header("content-security-policy").unwrap();
    assert!(
        policy.starts_with("default-src 'none'") && policy.contains("frame-ancestors 'none'") && !policy.contains("unsafe-eval"),
        "{policy}"
    );
    let nonce = policy.split_once("script-src 'nonce-").unwrap().1.split_once('\'').unwrap().0;
    let scripts: Vec<_> = one.text().match_indices("<script").map(|(at, _)| &one.text()[at..]).collect();
    assert_eq!(scripts.len(), 2);
    assert!(scripts.iter().all(|script| script.starts_with(&format!("<script nonce=\"{nonce}\""))), "every script may run, and no other");
    assert_ne!(one.header("content-security-policy"), two.header("content-security-policy"));
    let outside = one.text().replace("http://www.w3.org/2000/svg", "");
    assert!(!outside.contains("http:") && !outside.contains("https:") && !outside.contains("{{"), "an address, or a blank not filled in");
    assert!(one.text().contains("data-page=\"full\""));
    for path in ["/", "/live.json", "/assets/plotly.js"] {
        assert_eq!(get(&server, path).await.header("x-content-type-options"), Some("nosniff"), "{path}");
        let head = send(server.observers, &format!("HEAD {path}"), &[], b"").await;
        assert_eq!((head.status, head.body.len()), (200, 0), "{path}");
    }
    assert_eq!(get(&server, "/nothing").await.status, 404);
    assert_eq!(send(server.observers, "POST /live.json", &[], b"").await.status, 405);
    assert_eq!(get(&server, "/try").await.status, 405);
}

#[tokio::test]
async fn the_library_is_sent_once() {
    let server = serving(Options::default()).await;
    let document = get(&server, "/").await;
    let path = document.text().split_once("src=\"/assets/").unwrap().1.split_once('"').unwrap().0;
    let library = get(&server, &format!("/assets/{path}")).await;
    assert_eq!((library.status, library.header("content-encoding")), (200, Some("gzip")));
    assert_eq!(library.header("content-type"), Some("text/javascript; charset=utf-8"));
    assert!(library.header("cache-control").unwrap().contains("immutable"));
    assert!(library.body.starts_with(b"\x1f\x8b") && library.body.len() > 1 << 20, "{} bytes", library.body.len());
    let tag = library.header("etag").unwrap();
    let again = send(server.observers, "GET /assets/plotly.js", &[("If-None-Match", tag)], b"").await;
    assert_eq!((again.status, again.body.len()), (304, 0));
}

#[tokio::test]
async fn the_state_follows_the_traffic() {
    let server = serving(Options::default()).await;
    let mut client = server.client().await;
    collect(client.generate(generate("abc", 5)).await.unwrap().into_inner()).await;
    server.metric_reaches("hardmax_request_finished_total", &[("reason", "length")], 1.0).await;
    let answer = get(&server, "/live.json").await;
    assert_eq!((answer.header("content-type"), answer.header("cache-control")), (Some("application/json"), Some("no-store")));
    let live = answer.json();
    assert_eq!(
        (&live["readiness"], &live["facts"]["model"], &live["facts"]["reference"]),
        (&json!("serving"), &json!("fake"), &json!("soft:0.5"))
    );
    assert_eq!((&live["counters"]["prompt_tokens"], &live["counters"]["generated_tokens"]), (&json!(3.0), &json!(5.0)));
    assert_eq!(live["time_to_first_token"]["count"].as_array().unwrap().last(), Some(&json!(1.0)));
    assert_eq!(live["inter_token_latency"]["count"].as_array().unwrap().last(), Some(&json!(4.0)));
    for scope in ["window", "total"] {
        let layer = &live["expert_load"][scope]["layers"][0];
        assert_eq!(
            (&layer["layer"], &layer["expert_tokens"], &layer["dead_experts"]),
            (&json!(0), &json!([7, 0, 0, 0]), &json!(3)),
            "{scope}"
        );
    }
}

#[tokio::test]
async fn a_prompt_comes_back_with_its_experts() {
    let server = serving(Options::default()).await;
    let answer = try_prompt(&server, &json!({ "prompt": "abc", "max_new_tokens": 10 })).await;
    assert_eq!((answer.status, answer.header("cache-control")), (200, Some("no-store")), "{}", answer.text());
    let answer = answer.json();
    assert_eq!((&answer["routing"], &answer["finish"], &answer["layers"]), (&json!("native"), &json!("length"), &json!([0])));
    let tokens = answer["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token["text"].as_str().unwrap()).collect();
    assert_eq!(text, format!("abc{}", str::from_utf8(&said(3, 10)).unwrap()));
    let generated: Vec<_> = tokens.iter().map(|token| token["generated"].as_bool().unwrap()).collect();
    assert_eq!(generated, [[false; 3].as_slice(), &[true; 10]].concat());
    assert_eq!([&tokens[3]["text"], &tokens[4]["text"]], ["", "ö"], "half a character is no text");
    for (at, token) in tokens.iter().enumerate() {
        let expected = if at == 12 { Value::Null } else { json!([[[0, 1.0]]]) };
        assert_eq!(token["routes"], expected, "token {at}: all but the last, which nobody reads");
    }
    let soft = try_prompt(&server, &json!({ "prompt": "a", "max_new_tokens": 1, "routing": "soft:0.25" })).await;
    assert_eq!((soft.status, &soft.json()["routing"]), (200, &json!("soft:0.25")));
}

#[tokio::test]
async fn a_model_without_experts_is_shown_as_one() {
    let server = serving(Options { dense: true, ..Options::default() }).await;
    let answer = try_prompt(&server, &json!({ "prompt": "abc", "max_new_tokens": 2 })).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let answer = answer.json();
    assert_eq!((&answer["layers"], answer["tokens"].as_array().unwrap().len()), (&json!([]), 5));
    assert_eq!(answer["tokens"][0], json!({ "id": 97, "text": "a", "generated": false }));
    let live = get(&server, "/live.json").await.json();
    assert_eq!((&live["facts"]["experts"], &live["expert_load"]["total"]["layers"]), (&json!("0"), &json!([])));
}

#[tokio::test]
async fn what_is_wrong_is_named() {
    let server = serving(with_page(PageMode::Full)).await;
    let trial = |prompt: &str, tokens: u32| json!({ "prompt": prompt, "max_new_tokens": tokens });
    let long = "x".repeat(300);
    let wrong = [
        (trial("", 4), "prompt", "no token"),
        (trial("a", 0), "max_new_tokens", "at least 1"),
        (trial("a", 257), "max_new_tokens", "256"),
        (trial(&long, 4), "prompt", "context"),
        (trial(&"x".repeat(2000), 4), "prompt", "2000 tokens"),
        (json!({ "prompt": "a", "max_new_tokens": 1, "routing": "top-one" }), "routing", "top-K"),
        (json!({ "prompt": "a", "max_new_tokens": 1, "routing": "top-5" }), "routing", "k: 5 is not from 1 to 4"),
        (json!({ "prompt": "a", "max_new_tokens": 1, "routing": "mass-2" }), "routing", "threshold: 2 is not above 0"),
        (json!({ "prompt": "a", "max_new_tokens": 1, "routing": "top-1,1" }), "routing", "2 numbers for 1 MoE layers"),
        (json!({ "prompt": "a", "max_new_tokens": 1, "temperature": 1 }), "", "temperature"),
        (json!({ "prompt": "a" }), "", "max_new_tokens"),
        (json!(7), "", "invalid type"),
    ];
    for (trial, field, message) in wrong {
        let answer = try_prompt(&server, &trial).await;
        assert_eq!((answer.status, &answer.json()["field"]), (400, &json!(field)), "{trial}: {}", answer.text());
        assert!(answer.json()["message"].as_str().unwrap().contains(message), "{trial}: {}", answer.text());
    }
    let good = trial("a", 1).to_string();
    let large = trial(&"x".repeat(70_000), 1).to_string();
    let text = ("Content-Type", "text/plain");
    let cases: [(u16, Headers<'_>, &str); 8] = [
        (400, &[JSON], "{\"prompt\": "),
        (413, &[JSON], &large),
        (415, &[text], &good),
        (415, &[], &good),
        (403, &[JSON, ("Origin", "http://evil.example")], &good),
        (403, &[JSON, ("Host", "evil.example"), ("Origin", "http://evil.example")], &good),
        (200, &[JSON, ("Host", "gpu1.lan:9464"), ("Origin", "http://gpu1.lan:9464")], &good),
        (200, &[JSON], &good),
    ];
    for (status, headers, body) in cases {
        let answer = send(server.observers, "POST /try", headers, body.as_bytes()).await;
        assert_eq!(answer.status, status, "{headers:?}: {}", answer.text());
        assert!(status == 200 || answer.json()["message"].is_string());
    }
    let asked = send(server.observers, "OPTIONS /try", &[("Origin", "http://evil.example")], b"").await;
    assert!(asked.status == 405 && asked.header("access-control-allow-origin").is_none(), "a preflight gets no permission");
}

#[tokio::test]
async fn foreign_names_lead_to_nothing_but_metrics() {
    let server = serving(with_page(PageMode::Full)).await;
    let foreign: Headers<'_> = &[("Host", "evil.example:9464")];
    for path in ["/", "/live.json", "/assets/plotly.js"] {
        let answer = send(server.observers, &format!("GET {path}"), foreign, b"").await;
        assert_eq!((answer.status, &answer.json()["field"]), (403, &json!("host")), "{path}");
        assert!(answer.json()["message"].as_str().unwrap().contains("--live-page-hosts"));
        for host in ["gpu1.lan", "localhost:9464", "[::1]:9464"] {
            assert_eq!(send(server.observers, &format!("GET {path}"), &[("Host", host)], b"").await.status, 200, "{path} {host}");
        }
    }
    for path in ["/metrics", "/healthz"] {
        assert_eq!(send(server.observers, &format!("GET {path}"), foreign, b"").await.status, 200, "Prometheus comes by any name");
    }
}

#[tokio::test]
async fn whoever_says_nothing_is_sent_away() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let config = PageConfig { idle_timeout: Duration::from_millis(50), ..PageConfig::default() };
    let served = tokio::spawn(http::serve(listener, Arc::default(), config));
    let prompt = "POST /try HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{";
    for said in ["", "GET / HTTP/1.1\r\nHost: ", "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", prompt] {
        let closed = spawn_blocking(move || {
            let mut socket = TcpStream::connect(to).unwrap();
            socket.write_all(said.as_bytes()).unwrap();
            socket.read_to_end(&mut Vec::new())
        });
        assert!(soon(closed).await.unwrap().is_ok(), "after '{said}'");
    }
    served.abort();
}

#[tokio::test]
async fn whoever_takes_no_answer_gives_its_place_back() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let to = listener.local_addr().unwrap();
    let config = PageConfig { idle_timeout: Duration::from_millis(50), max_connections: 1, ..PageConfig::default() };
    let served = tokio::spawn(http::serve(listener, Arc::default(), config));
    let answer = spawn_blocking(move || {
        let mut stalled = TcpStream::connect(to).unwrap();
        // Far more than the buffers of both sides.
        let ask = "GET /assets/plotly.js HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(40);
        stalled.write_all(ask.as_bytes()).unwrap();
        let mut next = TcpStream::connect(to).unwrap();
        next.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        next.read_to_string(&mut answer).unwrap();
        drop(stalled);
        answer
    });
    assert!(soon(answer).await.unwrap().starts_with("HTTP/1.1 503"), "the model is loading, says the next one");
    served.abort();
}

#[tokio::test]
async fn more_connections_than_that_wait() {
    let live_page = PageConfig { max_connections: 1, ..PageConfig::default() };
    let server = serving(Options { live_page, gate_open: false, ..Options::default() }).await;
    let ask = |line: &str, headers: Headers<'_>, body: &[u8]| {
        let mut socket = TcpStream::connect(server.observers).unwrap();
        socket.write_all(&request(server.observers, line, headers, body)).unwrap();
        socket
    };
    let first = ask("POST /try", &[JSON], json!({ "prompt": "a", "max_new_tokens": 2 }).to_string().as_bytes());
    server.gate.step(1).await;
    let second = ask("GET /healthz", &[], b"");
    // Time for an answer, if it had a place.
    for _ in 0..8 {
        server.client().await;
    }
    second.set_nonblocking(true).unwrap();
    assert_eq!(second.peek(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "the first has the only place");
    second.set_nonblocking(false).unwrap();
    server.gate.open();
    let read = |mut socket: TcpStream| {
        let mut answer = String::new();
        socket.read_to_string(&mut answer).map(|_| answer)
    };
    for answer in soon(spawn_blocking(move || [first, second].map(read))).await.unwrap() {
        assert!(answer.as_ref().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200")), "{answer:?}");
    }
}

#[tokio::test]
async fn one_prompt_at_a_time_and_none_for_who_left() {
    let server = serving(Options { gate_open: false, ..Options::default() }).await;
    let trial = json!({ "prompt": "a", "max_new_tokens": 200 });
    let mut first = TcpStream::connect(server.observers).unwrap();
    first.write_all(&request(server.observers, "POST /try", &[JSON], trial.to_string().as_bytes())).unwrap();
    server.gate.step(1).await;
    let second = try_prompt(&server, &trial).await;
    assert_eq!(second.status, 429, "{}", second.text());
    drop(first);
    server.gate.open();
    server.metric_reaches("hardmax_request_finished_total", &[("reason", "cancelled")], 1.0).await;
    let third = try_prompt(&server, &json!({ "prompt": "a", "max_new_tokens": 2 })).await;
    assert_eq!(third.status, 200, "{}", third.text());
}

#[tokio::test]
async fn while_loading_there_is_a_page_and_no_prompt() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (to, page) = (listener.local_addr().unwrap(), Arc::new(Page::default()));
    let served = tokio::spawn(http::serve(listener, page.clone(), PageConfig::default()));
    assert_eq!(send(to, "GET /", &[], b"").await.status, 200);
    assert_eq!(send(to, "GET /live.json", &[], b"").await.json()["readiness"], "loading");
    let trial = json!({ "prompt": "a", "max_new_tokens": 2 }).to_string();
    let answer = send(to, "POST /try", &[JSON], trial.as_bytes()).await;
    assert_eq!((answer.status, &answer.json()["message"]), (503, &json!("the model is loading")));
    page.set(Readiness::Failed);
    assert_eq!(send(to, "GET /live.json", &[], b"").await.json()["readiness"], "failed");
    served.abort();
}

#[tokio::test]
async fn the_page_can_be_less() {
    let server = serving(with_page(PageMode::ReadOnly)).await;
    assert!(get(&server, "/").await.text().contains("data-page=\"read-only\""));
    assert_eq!(get(&server, "/live.json").await.status, 200);
    assert_eq!(try_prompt(&server, &json!({ "prompt": "a", "max_new_tokens": 2 })).await.status, 404);

    let server = serving(with_page(PageMode::Off)).await;
    for path in ["/", "/live.json", "/assets/plotly.js", "/try"] {
        assert_eq!(get(&server, path).await.status, 404, "{path}");
    }
    server.metric_reaches("hardmax_requests_running", &[], 0.0).await;
    assert_eq!(get(&server, "/healthz").await.status, 200);
}
