//! `hardmax generate`: a client that prints a continuation as it comes.

use std::io::{self, Read as _, Write as _};

use clap::Args;
use serde_json::{Value, json};
use tonic::Streaming;

use super::client::{DEFAULT_URL, block_on, connect, refused};
use crate::{
    error::{Error, Result},
    moe::policy::RoutingChoice,
    service::{
        proto::{self, finish::Matched, generate_request::Prompt, inference_client::InferenceClient},
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
    /// Tokens to generate at most. Default: what the server allows.
    #[arg(long, value_name = "N")]
    pub max_new_tokens: Option<u32>,
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
    /// End before this text. May be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// `native`, `top-K`, `top-K:raw|renorm|unit`, `soft` or `soft:TEMPERATURE`. Default: that of the server.
    #[arg(long, value_name = "ROUTING")]
    pub routing: Option<RoutingChoice>,
    /// Also report the log-probability of each token, and of N alternatives.
    #[arg(long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub logprobs: Option<u32>,
    /// Print each message of the server as one line of JSON instead of the text.
    #[arg(long)]
    pub json: bool,
}

/// How a generation ended, seen from the terminal.
enum Outcome {
    Finished(proto::Finish),
    /// Nobody reads standard output any more.
    ReaderGone,
}

/// Streams the continuation to standard output, and a line about it to standard error.
///
/// Ctrl-C and a closed pipe cancel the request at the server.
pub fn run(args: GenerateArgs) -> Result<()> {
    let prompt = read_prompt(&args.prompt)?;
    block_on(async {
        tokio::select! {
            result = generate(&args, prompt) => result,
            _ = tokio::signal::ctrl_c() => {
                finish_line(&args);
                Err(Error::Cancelled)
            }
        }
    })
}

fn read_prompt(argument: &str) -> Result<String> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text).map_err(|error| Error::io("standard input", error))?;
    Ok(text)
}

async fn generate(args: &GenerateArgs, prompt: String) -> Result<()> {
    let mut client = InferenceClient::new(connect(&args.url).await?);
    let response = client.generate(request(args, prompt)).await.map_err(|status| refused(&status))?;
    match print_stream(args, response.into_inner()).await? {
        Outcome::ReaderGone => Ok(()),
        Outcome::Finished(finish) => {
            finish_line(args);
            note(&summary(&finish));
            Ok(())
        }
    }
}

fn request(args: &GenerateArgs, prompt: String) -> proto::GenerateRequest {
    let sampling = proto::SamplingParams {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
        stop: args.stop.clone(),
        logprobs: args.logprobs,
        ..Default::default()
    };
    proto::GenerateRequest {
        prompt: Some(Prompt::Text(prompt)),
        sampling: Some(sampling),
        routing: args.routing.map(routing_message),
        ..Default::default()
    }
}

async fn print_stream(args: &GenerateArgs, mut stream: Streaming<proto::GenerateResponse>) -> Result<Outcome> {
    loop {
        let message = match stream.message().await {
            Ok(Some(message)) => message,
            Ok(None) => return Err(Error::FailedPrecondition("the server ended the stream without a finish".into())),
            Err(status) => {
                finish_line(args);
                return Err(refused(&status));
            }
        };
        let line = if args.json { format!("{}\n", message_json(&message)) } else { message.text.clone() };
        if !print(&line)? {
            return Ok(Outcome::ReaderGone);
        }
        if !args.json {
            print_logprobs(&message);
        }
        if let Some(finish) = message.finish {
            return Ok(Outcome::Finished(finish));
        }
    }
}

/// Writes and flushes; false if nobody reads.
fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Error::io("standard output", error)),
    }
}

/// A line on standard error, if anybody reads it.
fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// The text itself need not end with a newline. Whether anybody reads this one does not matter.
fn finish_line(args: &GenerateArgs) {
    if !args.json {
        let _ = print("\n");
    }
}

fn print_logprobs(message: &proto::GenerateResponse) {
    for token in &message.logprobs {
        let alternatives: Vec<_> = token.alternatives.iter().map(|a| format!("{} {:.3}", a.token_id, a.logprob)).collect();
        note(&format!("token {} {:.3}  {}", token.token_id, token.logprob.unwrap_or(f32::NAN), alternatives.join(", ")));
    }
}

fn message_json(message: &proto::GenerateResponse) -> Value {
    let mut value = json!({ "request_id": message.request_id, "text": message.text, "token_ids": message.token_ids });
    if !message.logprobs.is_empty() {
        value["logprobs"] = message.logprobs.iter().map(logprob_json).collect();
    }
    if let Some(finish) = &message.finish {
        value["finish"] = finish_json(finish);
    }
    value
}

fn logprob_json(token: &proto::TokenLogprob) -> Value {
    let alternatives: Vec<_> = token.alternatives.iter().map(|a| json!({ "token_id": a.token_id, "logprob": a.logprob })).collect();
    json!({ "token_id": token.token_id, "logprob": token.logprob, "alternatives": alternatives })
}

fn finish_json(finish: &proto::Finish) -> Value {
    let (usage, timing) = (finish.usage.unwrap_or_default(), finish.timing.unwrap_or_default());
    let mut value = json!({
        "reason": finish.reason().as_str_name(),
        "prompt_tokens": usage.prompt_tokens,
        "generated_tokens": usage.generated_tokens,
        "queue_seconds": timing.queue_seconds,
        "prefill_seconds": timing.prefill_seconds,
        "decode_seconds": timing.decode_seconds,
        "generation": finish.generation,
    });
    match &finish.matched {
        Some(Matched::StopString(text)) => value["stop_string"] = json!(text),
        Some(Matched::StopTokenId(id)) => value["stop_token_id"] = json!(id),
        None => {}
    }
    value
}

fn reason(finish: &proto::Finish) -> String {
    match (finish.reason(), &finish.matched) {
        (proto::FinishReason::Stop, Some(Matched::StopString(text))) => format!("stop ({text:?})"),
        (proto::FinishReason::Stop, Some(Matched::StopTokenId(id))) => format!("stop (token {id})"),
        (proto::FinishReason::Stop, None) => "stop".into(),
        (proto::FinishReason::Length, _) => "length".into(),
        (proto::FinishReason::Unspecified, _) => "unspecified".into(),
    }
}

fn summary(finish: &proto::Finish) -> String {
    let (usage, timing) = (finish.usage.unwrap_or_default(), finish.timing.unwrap_or_default());
    // The first token comes out of the prefill.
    let decoded = f64::from(usage.generated_tokens.saturating_sub(1));
    let rate = if timing.decode_seconds > 0.0 { format!(", {:.1} tokens/s", decoded / timing.decode_seconds) } else { String::new() };
    format!(
        "{} prompt + {} generated tokens, {}; queue {:.1} ms, prefill {:.1} ms, decode {:.1} ms{rate}",
        usage.prompt_tokens,
        usage.generated_tokens,
        reason(finish),
        timing.queue_seconds * 1e3,
        timing.prefill_seconds * 1e3,
        timing.decode_seconds * 1e3,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finish(generated_tokens: u32, decode_seconds: f64) -> proto::Finish {
        proto::Finish {
            reason: proto::FinishReason::Stop.into(),
            matched: Some(Matched::StopString("\n".into())),
            usage: Some(proto::Usage { prompt_tokens: 4, generated_tokens }),
            timing: Some(proto::Timing { queue_seconds: 0.001, prefill_seconds: 0.0205, decode_seconds }),
            generation: 1,
        }
    }

    #[test]
    fn the_summary_has_no_rate_without_a_decode() {
        let text = "4 prompt + 1 generated tokens, stop (\"\\n\"); queue 1.0 ms, prefill 20.5 ms, decode 0.0 ms";
        assert_eq!(summary(&finish(1, 0.0)), text);
        assert!(summary(&finish(11, 0.5)).ends_with("decode 500.0 ms, 20.0 tokens/s"));
    }

    #[test]
    fn json_lines_hold_the_whole_message() {
        let message = proto::GenerateResponse {
            request_id: "r".into(),
            text: "é".into(),
            token_ids: vec![1],
            finish: Some(finish(1, 0.0)),
            ..Default::default()
        };
        let value = message_json(&message);
        assert_eq!((value["text"].as_str(), value["finish"]["generated_tokens"].as_u64()), (Some("é"), Some(1)));
        assert!(value.get("logprobs").is_none());
    }
}
