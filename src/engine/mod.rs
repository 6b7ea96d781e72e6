//! The engine: a bounded queue, one thread that owns the model, several requests in one batch.

mod request;

pub use self::request::{
    Event, FinishReason, Finished, GenerateParams, MAX_LOGPROBS, Request, Task, Timing, TokenLogprob, Tokens,
};
