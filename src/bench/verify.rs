//! Whether two greedy streams of one prompt agree.
//!
//! Where a kernel adds in another order for another batch, the last bits of logits differ, and where two tokens are
//! nearly tied the greedy choice may flip; from there on the streams are different texts. So the first token that
//! differs is judged: both candidates are scored in its place, and a difference is accepted if their log-probabilities
//! lie within a tolerance.

use serde::Serialize;
use tonic::transport::Channel;

use super::client::Ask;
use crate::{
    error::{Error, Result},
    service::{
        proto::{self, inference_client::InferenceClient, score_request::Input},
        routing_message,
    },
};

/// How one stream compares with another.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// The same tokens, as far as the shorter one goes.
    Equal,
    /// The first different token was nearly tied with the expected one.
    NearTie {
        /// Index of the token in the continuation.
        position: usize,
        /// Between the two log-probabilities, in nats.
        gap: f64,
    },
    /// The first different token was not the model's choice.
    Different {
        /// As above.
        position: usize,
        /// As above.
        gap: f64,
    },
}

/// Index of the first token in which `a` and `b` differ; `None` if one begins with the other.
pub fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    a.iter().zip(b).position(|(a, b)| a != b)
}

/// Compares `found` with `expected`, both continuations of `ask`. `tolerance` is in nats; 0 accepts no difference.
pub async fn judge(client: &mut InferenceClient<Channel>, ask: &Ask, expected: &[u32], found: &[u32], tolerance: f64) -> Result<Verdict> {
    let Some(position) = first_difference(expected, found) else { return Ok(Verdict::Equal) };
    let [wanted, got] = [score_at(client, ask, expected, position).await?, score_at(client, ask, found, position).await?];
    let gap = (wanted - got).abs();
    Ok(verdict(position, gap, tolerance))
}

fn verdict(position: usize, gap: f64, tolerance: f64) -> Verdict {
    if tolerance > 0.0 && gap <= tolerance { Verdict::NearTie { position, gap } } else { Verdict::Different { position, gap } }
}

/// Log-probability of the token at `position` of a continuation.
async fn score_at(client: &mut InferenceClient<Channel>, ask: &Ask, tokens: &[u32], position: usize) -> Result<f64> {
    let ids = ask.prompt.iter().chain(tokens.iter().take(position + 1)).copied().collect();
    let request = proto::ScoreRequest {
        input: Some(Input::TokenIds(proto::TokenIds { ids })),
        routing: Some(routing_message(&ask.routing.into())),
        ..Default::default()
    };
    let answer = client.score(request).await.map_err(|status| Error::FailedPrecondition(format!("score: {}", status.message())))?;
    let last = answer.into_inner().tokens.last().and_then(|token| token.logprob);
    last.map(f64::from).ok_or_else(|| Error::Internal("a score without a log-probability".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_difference_counts() {
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2, 3]), None);
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2]), None, "cancelled after two");
        assert_eq!(first_difference(&[1, 2, 3], &[1, 4, 5]), Some(1));
    }

    #[test]
    fn tolerance_zero_accepts_nothing() {
        assert_eq!(verdict(3, 0.0, 0.0), Verdict::Different { position: 3, gap: 0.0 });
        assert_eq!(verdict(3, 0.01, 0.02), Verdict::NearTie { position: 3, gap: 0.01 });
        assert_eq!(verdict(3, 0.03, 0.02), Verdict::Different { position: 3, gap: 0.03 });
        assert!(matches!(verdict(3, f64::NAN, 0.02), Verdict::Different { .. }), "no number is no tie");
    }
}
