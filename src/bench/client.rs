//! One request of a load generator, and everything about its answer that is worth a number.

use std::time::{Duration, Instant};

use rand::{Rng as _, rngs::StdRng};
use tonic::{Code, Status, transport::Channel};

use crate::{
    moe::policy::RoutingChoice,
    service::{
        proto::{self, generate_request::Prompt, inference_client::InferenceClient},
        routing_message,
    },
};

/// What to ask.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// Tokens to generate, exactly: the end-of-sequence token does not end it.
    pub new_tokens: usize,
    /// Of all tokens.
    pub routing: RoutingChoice,
    /// The `grpc-timeout` of the call.
    pub timeout: Option<Duration>,
    /// Drop the stream after so many tokens.
    pub cancel_after: Option<usize>,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// Generated tokens, all that arrived.
    pub tokens: Vec<u32>,
    /// When the request was sent.
    pub asked: Instant,
    /// When each message with tokens arrived, and how many it had.
    pub arrivals: Vec<(Instant, usize)>,
    /// How it ended.
    pub end: End,
}

/// The end of a request as its client sees it.
#[derive(Debug)]
pub enum End {
    /// All tokens came.
    Finished,
    /// This client went away, as planned.
    Cancelled,
    /// The deadline passed, and there was one.
    Deadline,
    /// No room for the request.
    Refused,
    /// Anything else.
    Failed(Status),
}

impl Ask {
    /// `tokens` random tokens to continue greedily.
    pub fn random(rng: &mut StdRng, vocab_size: u32, tokens: usize, new_tokens: usize, routing: RoutingChoice) -> Self {
        let prompt = (0..tokens).map(|_| rng.random_range(0..vocab_size.max(1))).collect();
        Self { prompt, new_tokens, routing, timeout: None, cancel_after: None }
    }

    fn message(&self) -> proto::GenerateRequest {
        let sampling = proto::SamplingParams {
            max_new_tokens: Some(u32::try_from(self.new_tokens).unwrap_or(u32::MAX)),
            temperature: Some(0.0),
            repetition_penalty: Some(1.0),
            ignore_eos: Some(true),
            ..Default::default()
        };
        proto::GenerateRequest {
            prompt: Some(Prompt::TokenIds(proto::TokenIds { ids: self.prompt.clone() })),
            sampling: Some(sampling),
            routing: Some(routing_message(&self.routing.into())),
            ..Default::default()
        }
    }

    /// Sends it and reads until the end; `first` is called when the first token is here.
    pub async fn send(&self, client: &mut InferenceClient<Channel>, mut first: impl FnMut()) -> Answer {
        let mut request = tonic::Request::new(self.message());
        if let Some(timeout) = self.timeout {
            request.set_timeout(timeout);
        }
        let mut answer = Answer { tokens: Vec::new(), asked: Instant::now(), arrivals: Vec::new(), end: End::Finished };
        let mut stream = match client.generate(request).await {
            Ok(response) => response.into_inner(),
            Err(status) => {
                answer.end = self.ended(status);
                return answer;
            }
        };
        loop {
            if self.cancel_after.is_some_and(|limit| answer.tokens.len() >= limit) {
                answer.end = End::Cancelled;
                return answer;
            }
            match stream.message().await {
                Ok(Some(message)) => {
                    if !message.token_ids.is_empty() {
                        if answer.arrivals.is_empty() {
                            first();
                        }
                        answer.arrivals.push((Instant::now(), message.token_ids.len()));
                        answer.tokens.extend(message.token_ids);
                    }
                }
                Ok(None) => return answer,
                Err(status) => {
                    answer.end = self.ended(status);
                    return answer;
                }
            }
        }
    }

    fn ended(&self, status: Status) -> End {
        match status.code() {
            // tonic's client ends a call whose deadline passes before the head as CANCELLED.
            Code::DeadlineExceeded | Code::Cancelled if self.timeout.is_some() => End::Deadline,
            Code::ResourceExhausted => End::Refused,
            _ => End::Failed(status),
        }
    }
}

impl Answer {
    /// Seconds from the request to the first token.
    pub fn time_to_first_token(&self) -> Option<f64> {
        self.arrivals.first().map(|(first, _)| first.duration_since(self.asked).as_secs_f64())
    }

    /// Seconds between messages with tokens.
    pub fn gaps(&self) -> impl Iterator<Item = f64> {
        self.arrivals.windows(2).filter_map(|pair| match pair {
            [(before, _), (after, _)] => Some(after.duration_since(*before).as_secs_f64()),
            _ => None,
        })
    }

    /// Seconds per token of each message from `start` to `end`, since the one before it.
    pub fn steps(&self, start: Instant, end: Instant) -> impl Iterator<Item = f64> {
        self.arrivals.windows(2).filter_map(move |pair| match pair {
            [(before, _), (after, tokens)] if *before >= start && *after <= end && *tokens > 0 => {
                Some(after.duration_since(*before).as_secs_f64() / *tokens as f64)
            }
            _ => None,
        })
    }

    /// Seconds per token between the first and the last arrival from `start` to `end`; `None` if fewer than two lie there.
    pub fn seconds_per_token(&self, start: Instant, end: Instant) -> Option<f64> {
        let mut inside = self.arrivals.iter().filter(|(at, _)| (start..=end).contains(at));
        let (first, _) = inside.next()?;
        let (last, tokens) = inside.fold((first, 0), |(_, tokens), (at, new)| (at, tokens + new));
        (tokens > 0).then(|| last.duration_since(*first).as_secs_f64() / tokens as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(arrivals: &[(u64, usize)]) -> Answer {
        let asked = Instant::now();
        let arrivals = arrivals.iter().map(|&(ms, tokens)| (asked + Duration::from_millis(ms), tokens)).collect();
        Answer { tokens: Vec::new(), asked, arrivals, end: End::Finished }
    }

    #[test]
    fn latencies() {
        let answer = answer(&[(50, 1), (60, 1), (90, 2), (100, 1)]);
        assert_eq!(answer.time_to_first_token(), Some(0.05));
        let gaps: Vec<f64> = answer.gaps().map(|gap| (gap * 1e3).round()).collect();
        assert_eq!(gaps, [10.0, 30.0, 10.0]);
        let at = |ms| answer.asked + Duration::from_millis(ms);
        let per_token = answer.seconds_per_token(at(55), at(95)).unwrap();
        assert!((per_token - 0.015).abs() < 1e-9, "30 ms for the 2 tokens after the one at 60: {per_token}");
        assert_eq!(answer.seconds_per_token(at(91), at(100)), None);
        let steps: Vec<f64> = answer.steps(at(50), at(95)).map(|step| (step * 1e3).round()).collect();
        assert_eq!(steps, [10.0, 15.0]);
    }

    #[test]
    fn only_who_set_a_deadline_can_miss_it() {
        let ask = |timeout| Ask { prompt: vec![1], new_tokens: 1, routing: RoutingChoice::Native, timeout, cancel_after: None };
        let (patient, hasty) = (ask(None), ask(Some(Duration::from_millis(1))));
        assert!(matches!(hasty.ended(Status::cancelled("")), End::Deadline));
        assert!(matches!(hasty.ended(Status::deadline_exceeded("")), End::Deadline));
        assert!(matches!(patient.ended(Status::deadline_exceeded("")), End::Failed(_)));
        assert!(matches!(patient.ended(Status::resource_exhausted("")), End::Refused));
    }
}
