//! Labels with a fixed set of values, as enums: each value has its series from the start.

use crate::error::ErrorKind;

/// Labels of one kind, with the texts that they are exported as.
macro_rules! label {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$variant_doc])* $variant,)+
        }

        impl $name {
            /// All of them: each has its series from the start.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The texts of all of them.
            pub const LABELS: &[&'static str] = &[$($text,)+];

            /// The text of the label.
            pub fn label(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }
    };
}

label! {
    /// Methods of the service.
    Method {
        /// Streaming continuation.
        Generate = "Generate",
        /// Log-probabilities.
        Score = "Score",
        /// Text to tokens.
        Tokenize = "Tokenize",
        /// Tokens to text.
        Detokenize = "Detokenize",
        /// Description of the model.
        GetModelInfo = "GetModelInfo",
        /// The fidelity gap of a text.
        MeasureFidelity = "MeasureFidelity",
        /// Experts of each token of a text.
        TraceRouting = "TraceRouting",
        /// Log-probabilities under given experts.
        ReplayRouting = "ReplayRouting",
        /// What each expert was given.
        GetExpertLoad = "GetExpertLoad",
        /// The statistics begin anew.
        ResetStatistics = "ResetStatistics",
        /// The routing in force.
        GetRoutingPolicy = "GetRoutingPolicy",
        /// Another routing from now on.
        SetRoutingPolicy = "SetRoutingPolicy",
        /// A tuning job begins.
        StartTuning = "StartTuning",
        /// What a job does.
        WatchTuning = "WatchTuning",
        /// A job rests.
        PauseTuning = "PauseTuning",
        /// A job goes on.
        ResumeTuning = "ResumeTuning",
        /// A job ends.
        StopTuning = "StopTuning",
        /// All jobs.
        ListTunings = "ListTunings",
        /// A job.
        GetTuning = "GetTuning",
        /// Other weights from now on.
        Publish = "Publish",
        /// Older weights from now on.
        Rollback = "Rollback",
        /// The weights there are.
        ListGenerations = "ListGenerations",
        /// Weights as files.
        ExportGeneration = "ExportGeneration",
    }
}

label! {
    /// Outcomes of a call, named as in gRPC. Those that this server never gives by itself are `Unknown`.
    Code {
        /// Success.
        Ok = "OK",
        /// The client went away.
        Cancelled = "CANCELLED",
        /// Anything else.
        Unknown = "UNKNOWN",
        /// A field can never be right.
        InvalidArgument = "INVALID_ARGUMENT",
        /// The deadline passed.
        DeadlineExceeded = "DEADLINE_EXCEEDED",
        /// Another model was asked for.
        NotFound = "NOT_FOUND",
        /// The queue was full.
        ResourceExhausted = "RESOURCE_EXHAUSTED",
        /// Refused in this mode.
        FailedPrecondition = "FAILED_PRECONDITION",
        /// Too large.
        OutOfRange = "OUT_OF_RANGE",
        /// The server has no such method, or does not read the encoding of the message.
        Unimplemented = "UNIMPLEMENTED",
        /// A bug.
        Internal = "INTERNAL",
        /// Draining, or tuning with all of the machine.
        Unavailable = "UNAVAILABLE",
    }
}

label! {
    /// How a request that was let in ended.
    Outcome {
        /// Stop token or stop string.
        Stop = "stop",
        /// Limit of tokens; end of a score.
        Length = "length",
        /// The client went away.
        Cancelled = "cancelled",
        /// The deadline passed.
        Deadline = "deadline",
        /// Anything else.
        Error = "error",
    }
}

label! {
    /// Why a well-formed request was not let in.
    Rejection {
        /// Too many wait.
        QueueFull = "queue_full",
        /// It came too late.
        Deadline = "deadline",
        /// The server is stopping.
        Draining = "draining",
        /// The prompt does not fit into the context.
        TooLong = "too_long",
        /// Tuning has all of the machine.
        Tuning = "tuning",
    }
}

label! {
    /// Where the time of a step goes.
    Part {
        /// Attention of all layers.
        Attention = "attention",
        /// Feed-forward parts of all layers.
        Experts = "experts",
        /// The rest of the forward: embedding, norms, head.
        Rest = "rest",
        /// Scheduling, sampling, sending.
        Engine = "engine",
    }
}

label! {
    /// What became of a request that was to be measured against the reference routing.
    SampleOutcome {
        /// It was measured.
        Done = "done",
        /// It was served under the reference routing: there is no gap.
        Same = "same",
        /// It was served under another routing than the one in force: its gap is not that of this server.
        OtherRouting = "other_routing",
        /// Too many waited.
        DroppedQueue = "dropped_queue",
        /// There was no time for it.
        DroppedBudget = "dropped_budget",
        /// Either, and it had asked to be measured.
        DroppedAsked = "dropped_asked",
        /// It has fewer than two tokens.
        DroppedShort = "dropped_short",
        /// The server stops.
        DroppedDraining = "dropped_draining",
        /// An error or a panic.
        Failed = "failed",
    }
}

label! {
    /// What a layer of a shadow sample is measured by.
    LayerMeasure {
        /// For equal input: relative L2 distance of the outputs.
        L2Rel = "l2_rel",
        /// For equal input: 1 - cosine of the outputs.
        CosineDistance = "cosine_distance",
        /// Reference weight outside the served experts.
        MissedMass = "missed_mass",
        /// Share of the served experts that the reference would not have taken.
        ExpertDisagree = "expert_disagree",
        /// 1 where the first expert is another.
        ArgmaxDisagree = "argmax_disagree",
    }
}

label! {
    /// What the logits of a shadow sample are measured by.
    OutputMeasure {
        /// Divergence of the served from the reference distribution.
        Kl = "kl",
        /// Jensen-Shannon divergence.
        Js = "js",
        /// Relative distance of the centred logits.
        LogitL2 = "logit_l2",
    }
}

label! {
    /// A side of a shadow sample.
    Side {
        /// What the checkpoint was trained under.
        Reference = "reference",
        /// What the request was served under.
        Serving = "serving",
    }
}

label! {
    /// Who has the machine.
    #[derive(Default)]
    Mode {
        /// Requests.
        #[default]
        Serve = "serve",
        /// Requests, and turns within their share.
        Tune = "tune",
        /// Turns, once the requests inside have ended: new ones are refused.
        TuneExclusive = "tune_exclusive",
    }
}

label! {
    /// Which weights a request runs on.
    Age {
        /// Those in force.
        Current = "current",
        /// Others, which it began on.
        Older = "older",
    }
}

label! {
    /// What a tuning job is.
    #[derive(serde::Serialize)]
    #[serde(rename_all = "snake_case")]
    TuningState {
        /// It has a thread.
        Running = "running",
        /// It lies on disk and can go on.
        Paused = "paused",
        /// It has a candidate.
        Done = "done",
        /// It was given up.
        Stopped = "stopped",
        /// It cannot go on.
        Failed = "failed",
    }
}

label! {
    /// A part of what a tuning job makes smaller.
    LossPart {
        /// All of it, each part by its weight.
        Total = "total",
        /// Of the next token, nats per token.
        Lm = "lm",
        /// Divergence from the teacher by its weight, nats per token.
        Distill = "distill",
        /// The rest of the total: auxiliary losses by their weights.
        Auxiliary = "auxiliary",
    }
}

label! {
    /// Whose gradient.
    GradientPart {
        /// That of all that learns.
        All = "all",
        /// That of the routers.
        Router = "router",
    }
}

label! {
    /// A routing that tuning is measured under.
    TunedRouting {
        /// That which is to be served.
        Serving = "serving",
        /// One expert.
        Top1 = "top1",
        /// Two experts.
        Top2 = "top2",
    }
}

label! {
    /// When tuning was measured.
    Stage {
        /// Before the first step.
        Before = "before",
        /// Last.
        Now = "now",
    }
}

label! {
    /// What became of a wish to publish.
    #[derive(serde::Serialize)]
    #[serde(rename_all = "snake_case")]
    PublishOutcome {
        /// The candidate met its gates and is in force.
        Published = "published",
        /// It did not meet them.
        Refused = "refused",
        /// It did not meet them and is in force, because that was asked for.
        Overridden = "overridden",
        /// An error.
        Failed = "failed",
    }
}

label! {
    /// Why older weights are in force again.
    #[derive(serde::Serialize)]
    #[serde(rename_all = "snake_case")]
    RollbackReason {
        /// Somebody wanted them.
        Asked = "asked",
        /// The gap of the traffic had grown.
        Gap = "gap",
        /// Too many requests failed.
        Errors = "errors",
    }
}

impl Code {
    /// From the number that gRPC gives a code.
    pub fn from_number(number: i32) -> Self {
        match number {
            0 => Self::Ok,
            1 => Self::Cancelled,
            3 => Self::InvalidArgument,
            4 => Self::DeadlineExceeded,
            5 => Self::NotFound,
            8 => Self::ResourceExhausted,
            9 => Self::FailedPrecondition,
            11 => Self::OutOfRange,
            12 => Self::Unimplemented,
            13 => Self::Internal,
            14 => Self::Unavailable,
            _ => Self::Unknown,
        }
    }
}

impl From<ErrorKind> for Code {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::InvalidArgument => Self::InvalidArgument,
            ErrorKind::OutOfRange => Self::OutOfRange,
            ErrorKind::NotFound => Self::NotFound,
            ErrorKind::FailedPrecondition => Self::FailedPrecondition,
            ErrorKind::ResourceExhausted => Self::ResourceExhausted,
            ErrorKind::Unavailable => Self::Unavailable,
            ErrorKind::DeadlineExceeded => Self::DeadlineExceeded,
            ErrorKind::Cancelled => Self::Cancelled,
            ErrorKind::Internal => Self::Internal,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_numbers_of_grpc() {
        assert_eq!(Code::from_number(0), Code::Ok);
        assert_eq!(Code::from_number(8), Code::ResourceExhausted);
        assert_eq!(Code::from_number(14), Code::Unavailable);
        assert_eq!(Code::from_number(12), Code::Unimplemented);
        assert_eq!([2, 99, -1].map(Code::from_number), [Code::Unknown; 3]);
        assert_eq!(Code::from(ErrorKind::OutOfRange), Code::OutOfRange);
    }
}
