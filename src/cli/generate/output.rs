//! What `hardmax generate` prints: text or JSON to standard output, the rest to standard error.

use std::{
    collections::BTreeMap,
    io::{self, Write as _},
};

use serde_json::{Value, json};

use super::args::GenerateArgs;
use crate::{
    error::{Error, Result},
    service::{
        proto::{self, finish::Matched},
        routing_trace,
    },
};

/// Puts messages where they belong.
pub(super) struct Printer {
    form: Form,
    /// Choices that have finished.
    finished: usize,
}

enum Form {
    /// One JSON object for each message.
    Json,
    /// The only choice, piece by piece.
    Stream {
        /// The line on standard output has no end yet.
        open: bool,
    },
    /// Several choices, each when it and those before it are complete.
    Blocks {
        waiting: BTreeMap<u32, Block>,
        /// The choice to be printed next.
        next: u32,
    },
}

#[derive(Default)]
struct Block {
    text: String,
    finish: Option<proto::Finish>,
}

/// Whether anybody reads standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    Listens,
    Gone,
}

impl Printer {
    pub(super) fn new(args: &GenerateArgs) -> Self {
        let form = match args.choices() {
            _ if args.json => Form::Json,
            0 | 1 => Form::Stream { open: false },
            _ => Form::Blocks { waiting: BTreeMap::new(), next: 0 },
        };
        Self { form, finished: 0 }
    }

    /// Choices that are complete.
    pub(super) fn finished(&self) -> usize {
        self.finished
    }

    /// Prints what can be printed now.
    pub(super) fn take(&mut self, message: proto::GenerateResponse) -> Result<Reader> {
        self.finished += usize::from(message.finish.is_some());
        match &mut self.form {
            Form::Json => {
                let reader = print(&format!("{}\n", message_json(&message)?))?;
                message.finish.iter().for_each(|finish| note(&summary(finish)));
                Ok(reader)
            }
            Form::Stream { open } => {
                *open = message.finish.is_none();
                let end = if message.finish.is_some() { "\n" } else { "" };
                let reader = print(&format!("{}{end}", message.text))?;
                note_logprobs("", &message);
                message.finish.iter().for_each(|finish| note(&summary(finish)));
                Ok(reader)
            }
            Form::Blocks { waiting, next } => {
                note_logprobs(&format!("choice {}: ", message.index), &message);
                let block = waiting.entry(message.index).or_default();
                block.text += &message.text;
                block.finish = message.finish.or(block.finish.take());
                while let Some(entry) = waiting.first_entry().filter(|entry| entry.key() == next) {
                    let Some(finish) = &entry.get().finish else { break };
                    if print(&format!("[choice {next}]\n{}\n", entry.get().text))? == Reader::Gone {
                        return Ok(Reader::Gone);
                    }
                    note(&format!("choice {next}: {}", summary(finish)));
                    entry.remove();
                    *next += 1;
                }
                Ok(Reader::Listens)
            }
        }
    }

    /// Prints what is left when no more comes. Whether anybody reads it does not matter.
    pub(super) fn give_up(&mut self) {
        match &mut self.form {
            Form::Json | Form::Stream { open: false } => {}
            Form::Stream { open: true } => {
                let _ = print("\n");
            }
            Form::Blocks { waiting, .. } => {
                for (index, block) in std::mem::take(waiting) {
                    let state = if block.finish.is_some() { "" } else { ", incomplete" };
                    let _ = print(&format!("[choice {index}{state}]\n{}\n", block.text));
                }
            }
        }
    }
}

/// Writes and flushes.
fn print(text: &str) -> Result<Reader> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(Reader::Listens),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(Error::io("standard output", error)),
    }
}

/// A line on standard error, if anybody reads it.
fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

fn note_logprobs(label: &str, message: &proto::GenerateResponse) {
    for token in &message.logprobs {
        let alternatives: Vec<_> = token.alternatives.iter().map(|a| format!("{} {:.3}", a.token_id, a.logprob)).collect();
        note(&format!("{label}token {} {:.3}  {}", token.token_id, token.logprob.unwrap_or(f32::NAN), alternatives.join(", ")));
    }
}

fn message_json(message: &proto::GenerateResponse) -> Result<Value> {
    let mut value =
        json!({ "request_id": message.request_id, "index": message.index, "text": message.text, "token_ids": message.token_ids });
    if !message.logprobs.is_empty() {
        value["logprobs"] = message.logprobs.iter().map(logprob_json).collect();
    }
    if let Some(trace) = &message.trace {
        value["trace"] = trace_json(trace)?;
    }
    if let Some(finish) = &message.finish {
        value["finish"] = finish_json(finish);
    }
    Ok(value)
}

/// Of each token, of each layer: experts and weights.
fn trace_json(message: &proto::RoutingTrace) -> Result<Value> {
    let trace = routing_trace("trace", std::slice::from_ref(message))?;
    let row = |position: usize, layer: usize| {
        trace.row(position, layer).map_or(Value::Null, |row| json!({ "experts": row.experts, "weights": row.weights }))
    };
    let token = |position: usize| trace.layers.iter().map(|&layer| row(position, layer)).collect::<Value>();
    let tokens: Value = (trace.first_position..trace.first_position + trace.num_tokens()).map(token).collect();
    Ok(json!({ "first_position": trace.first_position, "layers": &trace.layers[..], "tokens": tokens }))
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
        "cached_prompt_tokens": usage.cached_prompt_tokens,
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
    let cached = match usage.cached_prompt_tokens {
        0 => String::new(),
        cached => format!(" ({cached} cached)"),
    };
    format!(
        "{} prompt{cached} + {} generated tokens, {}; queue {:.1} ms, prefill {:.1} ms, decode {:.1} ms{rate}",
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
            usage: Some(proto::Usage { prompt_tokens: 4, generated_tokens, cached_prompt_tokens: 0 }),
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
        let value = message_json(&message).unwrap();
        assert_eq!(value["index"], 0);
        assert_eq!((value["text"].as_str(), value["finish"]["generated_tokens"].as_u64()), (Some("é"), Some(1)));
        assert!(value.get("trace").is_none());
        assert!(value.get("logprobs").is_none());
    }
}
