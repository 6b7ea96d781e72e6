//! The gRPC face: the services of `hardmax.v1`, the translation between their messages and the engine's types, and
//! what every RPC goes through. Nothing below this module knows tonic or prost.
//!
//! A request passes [`ObserveLayer`] (its span begins and ends, its outcome is counted, a panic becomes INTERNAL), [`DeadlineLayer`]
//! (`grpc-timeout` becomes a [`Deadline`]), [`InferenceService`], and then the engine.

mod call;
mod config;
mod context;
mod convert;
mod deadline;
mod fidelity;
mod inference;
mod observe;
mod playground;
mod routing;
mod status;
mod trace;
mod traced;
mod tuning;

use std::sync::Arc;

use self::context::Context;
use crate::{engine::Engine, error::Result, jobs::Jobs};

pub use self::{
    config::{SamplingDefaults, ServiceConfig},
    convert::routing_message,
    deadline::{Deadline, DeadlineLayer, DeadlineService},
    fidelity::FidelityStream,
    inference::{GenerateStream, InferenceService},
    observe::{ObserveLayer, ObserveService},
    playground::EnginePlayground,
    routing::{RoutingService, TraceStream},
    status::{code_name, to_status},
    trace::joined as routing_trace,
    tuning::{TuningService, read_event, read_figures, read_phase, read_verdicts, tuning_message},
};

/// Messages, clients and server traits generated from `proto/hardmax/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all, reason = "generated code; the proto files are its documentation")]
pub mod proto {
    tonic::include_proto!("hardmax.v1");
}

/// The encoded `FileDescriptorSet` of [`proto`], for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hardmax_descriptor.bin"));

/// The services of one engine. Clones are the same services.
#[derive(Clone, Debug)]
pub struct Services {
    context: Arc<Context>,
}

impl Services {
    /// Over `engine`, and the tuning jobs beside it. Fails where a layer of the model cannot follow `config.routing`.
    pub fn new(engine: Engine, config: ServiceConfig, jobs: Option<Jobs>) -> Result<Self> {
        Ok(Self { context: Arc::new(Context::new(engine, config, jobs)?) })
    }

    /// `hardmax.v1.Inference`.
    pub fn inference(&self) -> InferenceService {
        InferenceService::new(Arc::clone(&self.context))
    }

    /// `hardmax.v1.Routing`.
    pub fn routing(&self) -> RoutingService {
        RoutingService::new(Arc::clone(&self.context))
    }

    /// `hardmax.v1.Tuning`.
    pub fn tuning(&self) -> TuningService {
        TuningService::new(Arc::clone(&self.context))
    }

    /// Prompts of the live page.
    pub fn playground(&self) -> EnginePlayground {
        EnginePlayground::new(Arc::clone(&self.context))
    }
}
