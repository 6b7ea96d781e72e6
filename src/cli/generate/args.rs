//! The flags of `hardmax generate`, and the request that they make.

use std::time::Duration;

use clap::Args;

use super::super::{client::DEFAULT_URL, serve::seconds};
use crate::{
    moe::policy::RoutingRule,
    service::{
        proto::{self, generate_request::Prompt, sampling_params::LogitBias},
        routing_message,
    },
};

/// Ask a server to continue a text, and print it as it comes.
///
/// The text goes to standard output; token counts, times and errors go to standard error. Ctrl-C cancels the request.
#[derive(Args, Clone, Debug)]
pub struct GenerateArgs {
    /// The text to continue; `-` reads it from standard input.
    pub prompt: String,
    /// Address of the server.
    #[arg(long, env = "HARDMAX_URL", default_value = DEFAULT_URL)]
    pub url: String,
    /// `native`, `top-K`, `top-K,K,...`, `mass-P`, `mass-P:MAX_K`, each of these with `:raw|renorm|unit`, `soft` or `soft:TEMPERATURE`.
    /// Default: that of the server.
    #[arg(long, value_name = "ROUTING")]
    pub routing: Option<RoutingRule>,
    /// Requests with a larger number go first; below 0 for what can wait.
    #[arg(long, value_name = "N", default_value_t = 0, allow_negative_numbers = true)]
    pub priority: i32,
    /// Give up after this long, in the middle of the text as well. Default: never.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
    /// Print each message of the server as one line of JSON instead of the text.
    #[arg(long)]
    pub json: bool,
    /// Also tell which experts each token was given, layer by layer. The prompt is then read anew, whatever the cache has of it.
    #[arg(long, requires = "json")]
    pub trace: bool,
    /// How to choose tokens.
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

/// How to choose tokens. What is not given is the server's choice.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Continuations of the prompt. Several are printed one after the other, each when it and those before it are complete.
    #[arg(long, short, value_name = "N")]
    pub n: Option<u32>,
    /// Tokens to generate at most. Default: what the server allows.
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<u32>,
    /// So many tokens come before whatever ends the text.
    #[arg(long, value_name = "N")]
    pub min_new_tokens: Option<u32>,
    /// 0 always takes the likeliest token; 1 samples as the model says. Default: that of the checkpoint.
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Sample from the K likeliest tokens only; 0 is off.
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Sample from the likeliest tokens that together have this probability; 1 is off.
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Drop tokens less likely than this times the likeliest; 0 is off.
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Same seed, same text. Default: random.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Divides positive and multiplies negative logits of tokens that the prompt or the text has; 1 is off.
    #[arg(long, value_name = "R")]
    pub repetition_penalty: Option<f32>,
    /// Subtracted from the logits of tokens that the text has, -2 to 2; 0 is off.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub presence_penalty: Option<f32>,
    /// The same, for each time that the text has the token.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub frequency_penalty: Option<f32>,
    /// Added to the logit of a token, -100 to 100. May be given several times.
    #[arg(long, value_name = "TOKEN_ID=BIAS", value_parser = bias)]
    pub logit_bias: Vec<LogitBias>,
    /// Draw nothing else. May be given several times, or with commas.
    #[arg(long, value_name = "TOKEN_ID", value_delimiter = ',')]
    pub allow_token: Vec<u32>,
    /// End before this text. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// End at this token. May be given several times, or with commas.
    #[arg(long, value_name = "TOKEN_ID", value_delimiter = ',')]
    pub stop_token: Vec<u32>,
    /// Do not end at the model's end-of-sequence token.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Also report the log-probability of each token, and of N alternatives.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub logprobs: Option<u32>,
}

impl GenerateArgs {
    pub(super) fn request(&self, prompt: String) -> proto::GenerateRequest {
        proto::GenerateRequest {
            prompt: Some(Prompt::Text(prompt)),
            sampling: Some(self.sampling.message()),
            routing: self.routing.as_ref().map(routing_message),
            priority: self.priority,
            timeout_seconds: self.timeout.map(|timeout| timeout.as_secs_f64()),
            trace: self.trace.then(proto::TraceOptions::default),
            ..Default::default()
        }
    }

    pub(super) fn choices(&self) -> usize {
        self.sampling.n.map_or(1, |n| n as usize)
    }
}

impl SamplingArgs {
    fn message(&self) -> proto::SamplingParams {
        proto::SamplingParams {
            n: self.n,
            max_new_tokens: self.max_new_tokens,
            min_new_tokens: self.min_new_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            allowed_token_ids: self.allow_token.clone(),
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token.clone(),
            ignore_eos: self.ignore_eos.then_some(true),
            logprobs: self.logprobs,
        }
    }
}

fn bias(text: &str) -> Result<LogitBias, String> {
    let (token_id, bias) = text.split_once('=').ok_or("not TOKEN_ID=BIAS, for example 13=-2.5")?;
    let token_id = token_id.trim().parse().map_err(|_| format!("'{token_id}' is not a token id"))?;
    let bias = bias.trim().parse().map_err(|_| format!("'{bias}' is not a number"))?;
    Ok(LogitBias { token_id, bias })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn biases_are_pairs() {
        assert_eq!(bias("13=-2.5"), Ok(LogitBias { token_id: 13, bias: -2.5 }));
        for bad in ["13", "=1", "x=1", "-1=1", "13=", "13=x"] {
            assert!(bias(bad).is_err(), "{bad}");
        }
    }
}
