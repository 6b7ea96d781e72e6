//! The gRPC face: the services of `hardmax.v1`, the translation between their messages and the engine's types, and
//! what every RPC goes through. Nothing below this module knows tonic or prost.
//!
//! A request passes [`ObserveLayer`] (its outcome is counted, a panic becomes INTERNAL), [`DeadlineLayer`]
//! (`grpc-timeout` becomes a [`Deadline`]), [`InferenceService`], and then the engine.

mod convert;
mod deadline;
mod inference;
mod observe;
mod playground;
mod status;

pub use self::{
    convert::choice as routing_message,
    deadline::{Deadline, DeadlineLayer, DeadlineService},
    inference::{GenerateStream, InferenceService, SamplingDefaults, ServiceConfig},
    observe::{ObserveLayer, ObserveService},
    playground::EnginePlayground,
    status::{code_name, to_status},
};

/// Messages, clients and server traits generated from `proto/hardmax/v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, rustdoc::all, reason = "generated code; the proto files are its documentation")]
pub mod proto {
    tonic::include_proto!("hardmax.v1");
}

/// The encoded `FileDescriptorSet` of [`proto`], for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/hardmax_descriptor.bin"));
