//! The life of a server: health, reflection, the observers' port, draining.

use std::time::Duration;

use hardmax::{
    error::Error,
    service::proto::{GetModelInfoRequest, inference_client::InferenceClient},
};
use tonic::{Code, Streaming};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_types::StatusExt as _;

use crate::support::{Options, TestServer, collect, generate, soon};

const SERVICES: [&str; 4] = ["", "hardmax.v1.Inference", "hardmax.v1.Routing", "hardmax.v1.Tuning"];

async fn watch(server: &TestServer, service: &str) -> Streaming<HealthCheckResponse> {
    let mut client = HealthClient::new(server.channel().await);
    soon(client.watch(HealthCheckRequest { service: service.into() })).await.unwrap().into_inner()
}

async fn next(stream: &mut Streaming<HealthCheckResponse>) -> Option<ServingStatus> {
    soon(stream.message()).await.unwrap().map(|message| message.status())
}

#[tokio::test]
async fn health_by_service_and_as_a_whole() {
    let server = TestServer::start(Options::default()).await;
    let mut client = HealthClient::new(server.channel().await);
    for service in SERVICES {
        let answer = client.check(HealthCheckRequest { service: service.into() }).await.unwrap();
        assert_eq!(answer.get_ref().status(), ServingStatus::Serving);
    }
    let status = client.check(HealthCheckRequest { service: "nobody".into() }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
}

#[tokio::test]
async fn watchers_see_the_drain_and_its_end() {
    let mut server = TestServer::start(Options::default()).await;
    let (mut whole, mut service) = (watch(&server, SERVICES[0]).await, watch(&server, SERVICES[1]).await);
    assert_eq!(next(&mut whole).await, Some(ServingStatus::Serving));
    assert_eq!(next(&mut service).await, Some(ServingStatus::Serving));
    server.signal();
    for stream in [&mut whole, &mut service] {
        assert_eq!(next(stream).await, Some(ServingStatus::NotServing));
        assert_eq!(next(stream).await, None, "an open Watch would hold the server open");
    }
    server.ended().await.unwrap();
}

#[tokio::test]
async fn while_withdrawing_the_server_still_serves() {
    let drain = hardmax::server::DrainConfig { grace: Duration::from_secs(3600), timeout: Duration::ZERO };
    let mut server = TestServer::start(Options { drain, ..Options::default() }).await;
    let mut client = server.client().await;
    let mut health = watch(&server, "").await;
    assert_eq!(next(&mut health).await, Some(ServingStatus::Serving));
    server.signal();
    assert_eq!(next(&mut health).await, Some(ServingStatus::NotServing));
    assert_eq!(server.get("/healthz").await, ("HTTP/1.1 503 Service Unavailable".into(), "draining\n".into()));
    let (messages, end) = collect(client.generate(generate("a", 4)).await.unwrap().into_inner()).await;
    assert!(end.is_none() && messages.last().unwrap().finish.is_some());
    let mut newcomer = server.client().await;
    assert!(newcomer.generate(generate("a", 4)).await.is_ok());
}

/// Asks until the server is draining, and returns what it says then.
async fn draining(client: &mut InferenceClient<tonic::transport::Channel>) -> tonic::Status {
    let refused = async {
        loop {
            match client.generate(generate("a", 1)).await {
                Err(status) if status.code() == Code::Unavailable => return status,
                // Not yet. Those that are let in are cancelled here.
                Ok(_) | Err(_) => {}
            }
        }
    };
    soon(refused).await
}

#[tokio::test]
async fn a_drain_refuses_the_new_and_finishes_the_old() {
    let mut server = TestServer::start(Options { gate_open: false, ..Options::default() }).await;
    let mut client = server.client().await;
    let live = client.generate(generate("a", 8)).await.unwrap();
    server.gate.step(1).await;
    server.signal();
    let status = draining(&mut client).await;
    assert!(status.get_details_retry_info().and_then(|info| info.retry_delay).is_some());
    server.gate.open();
    let (messages, end) = collect(live.into_inner()).await;
    assert!(end.is_none(), "{end:?}");
    assert_eq!(messages.last().unwrap().finish.as_ref().unwrap().usage.unwrap().generated_tokens, 8);
    server.ended().await.unwrap();
}

#[tokio::test]
async fn after_the_drain_timeout_the_rest_fails_with_a_status() {
    let drain = hardmax::server::DrainConfig { grace: Duration::ZERO, timeout: Duration::from_millis(50) };
    let mut server = TestServer::start(Options { drain, ..Options::endless() }).await;
    let mut client = server.client().await;
    let mut live = client.generate(generate("a", 1 << 20)).await.unwrap().into_inner();
    soon(live.message()).await.unwrap();
    server.signal();
    let (_, end) = collect(live).await;
    assert_eq!(end.unwrap().code(), Code::Unavailable);
    server.ended().await.unwrap();
}

#[tokio::test]
async fn the_observers_port() {
    let server = TestServer::start(Options::default()).await;
    let mut client = server.client().await;
    client.get_model_info(GetModelInfoRequest::default()).await.unwrap();
    let count = [("method", "Generate"), ("code", "OK")];
    assert_eq!(server.metric("hardmax_requests_total", &count).await, Some(0.0), "present before the first request");
    collect(client.generate(generate("abc", 5)).await.unwrap().into_inner()).await;
    client.generate(generate("", 5)).await.unwrap_err();

    server.metric_reaches("hardmax_requests_total", &count, 1.0).await;
    server.metric_reaches("hardmax_requests_total", &[("method", "Generate"), ("code", "INVALID_ARGUMENT")], 1.0).await;
    assert_eq!(server.metric("hardmax_prompt_tokens_total", &[]).await, Some(3.0));
    assert_eq!(server.metric("hardmax_generated_tokens_total", &[]).await, Some(5.0));
    assert_eq!(server.metric("hardmax_requests_running", &[]).await, Some(0.0));
    assert!(server.metric("hardmax_expert_tokens_total", &[("layer", "0"), ("expert", "0")]).await > Some(0.0));
    assert_eq!(server.metric("hardmax_expert_tokens_total", &[("layer", "0"), ("expert", "3")]).await, Some(0.0));

    assert_eq!(server.get("/healthz").await, ("HTTP/1.1 200 OK".into(), "ok\n".into()));
    assert!(server.get("/nothing").await.0.contains("404"));
}

#[tokio::test]
async fn a_checkpoint_that_does_not_load_ends_the_server() {
    let server = TestServer::start(Options { load_fails: true, ..Options::default() }).await;
    assert!(matches!(server.ended().await, Err(Error::NotFound(_))));
}

#[tokio::test]
async fn a_routing_that_the_model_cannot_follow_ends_the_server() {
    let routing = "top-5".parse().unwrap();
    let server = TestServer::start(Options { routing, ..Options::default() }).await;
    assert!(matches!(server.ended().await, Err(Error::InvalidArgument { .. })));
}

/// The same conversation in both versions of reflection.
macro_rules! reflection_test {
    ($name:ident, $version:ident) => {
        #[tokio::test]
        async fn $name() {
            use tonic_reflection::pb::$version::{
                ServerReflectionRequest, server_reflection_client::ServerReflectionClient, server_reflection_request::MessageRequest,
                server_reflection_response::MessageResponse,
            };
            let server = TestServer::start(Options::default()).await;
            let mut client = ServerReflectionClient::new(server.channel().await);
            let ask = |request| ServerReflectionRequest { host: String::new(), message_request: Some(request) };
            let questions = [
                ask(MessageRequest::ListServices(String::new())),
                ask(MessageRequest::FileContainingSymbol("hardmax.v1.Inference".into())),
                ask(MessageRequest::FileByFilename("hardmax/v1/types.proto".into())),
                ask(MessageRequest::FileContainingSymbol("grpc.health.v1.Health".into())),
                ask(MessageRequest::FileContainingSymbol("hardmax.v1.Nothing".into())),
            ];
            let mut answers = client.server_reflection_info(tokio_stream::iter(questions)).await.unwrap().into_inner();
            let mut answer = async || soon(answers.message()).await.map(|message| message.unwrap().message_response.unwrap());

            let Ok(MessageResponse::ListServicesResponse(list)) = answer().await else { panic!("a list of services") };
            let names: Vec<_> = list.service.iter().map(|service| service.name.as_str()).collect();
            for name in ["hardmax.v1.Inference", "hardmax.v1.Routing", "hardmax.v1.Tuning", "grpc.health.v1.Health"] {
                assert!(names.contains(&name), "{names:?}");
            }
            for file in ["hardmax/v1/inference.proto", "hardmax/v1/types.proto", "health.proto"] {
                let Ok(MessageResponse::FileDescriptorResponse(found)) = answer().await else { panic!("a file for {file}") };
                let descriptor: prost_types::FileDescriptorProto = prost::Message::decode(&found.file_descriptor_proto[0][..]).unwrap();
                assert!(descriptor.name().ends_with(file), "{}", descriptor.name());
            }
            assert!(!matches!(answer().await, Ok(MessageResponse::FileDescriptorResponse(_))));
        }
    };
}

reflection_test!(reflection_v1, v1);
reflection_test!(reflection_v1alpha, v1alpha);
