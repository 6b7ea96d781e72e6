//! What a request may ask for. Field paths are those of `hardmax.v1.GenerateRequest` and `ScoreRequest`.

use super::{
    EngineConfig,
    request::{GenerateParams, MAX_LOGPROBS, Request, Task},
};
use crate::{
    error::{Error, Result},
    model::ModelSpec,
};

/// Most stop strings of a request: each is searched for after every token.
pub const MAX_STOP_STRINGS: usize = 16;

/// Most bytes of a stop string: as much text may have to be held back.
pub const MAX_STOP_BYTES: usize = 1024;

/// Checks everything but the deadline and the state of the queue.
pub(super) fn check(request: &Request, spec: &ModelSpec, eos_token_ids: &[u32], config: &EngineConfig) -> Result<()> {
    check_prompt(request, spec)?;
    match &request.task {
        Task::Generate(params) => check_sampling(params, spec, eos_token_ids, config)?,
        Task::Score { alternatives } => check_logprobs("alternatives", *alternatives)?,
    }
    spec.check_routing(request.routing)
}

fn check_prompt(request: &Request, spec: &ModelSpec) -> Result<()> {
    let (field, room) = match request.task {
        Task::Generate(_) => ("prompt", 1),
        Task::Score { .. } => ("input", 0),
    };
    let (tokens, context) = (request.prompt.len(), spec.max_context);
    if tokens == 0 {
        return Err(Error::invalid(field, "it has no token"));
    }
    if tokens > context {
        return Err(Error::out_of_range(field, format!("{tokens} tokens are more than the {context} of the model's context")));
    }
    if tokens + room > context {
        let message = format!("{tokens} tokens leave no room for a new one in the model's context of {context}");
        return Err(Error::out_of_range(field, message));
    }
    check_ids("token_ids", &request.prompt, spec)
}

fn check_ids(field: &str, ids: &[u32], spec: &ModelSpec) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= spec.vocab_size) {
        None => Ok(()),
        Some(index) => {
            let message = format!("{} is not below {}, the size of the vocabulary", ids[index], spec.vocab_size);
            Err(Error::invalid(format!("{field}[{index}]"), message))
        }
    }
}

fn check_sampling(params: &GenerateParams, spec: &ModelSpec, _eos_token_ids: &[u32], config: &EngineConfig) -> Result<()> {
    check_choices(params.n)?;
    if let Some(tokens) = params.max_new_tokens {
        let limit = config.max_new_tokens;
        if tokens == 0 {
            return Err(Error::invalid("sampling.max_new_tokens", "0 asks for nothing: at least 1"));
        }
        if tokens > limit {
            return Err(Error::out_of_range("sampling.max_new_tokens", format!("{tokens} is above {limit}, the limit of this server")));
        }
    }
    check_number("sampling.temperature", params.temperature, "a finite number from 0", |t| t >= 0.0)?;
    check_number("sampling.top_p", params.top_p, "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
    check_number("sampling.min_p", params.min_p, "from 0 and below 1", |p| (0.0..1.0).contains(&p))?;
    check_number("sampling.repetition_penalty", params.repetition_penalty, "a finite number above 0", |r| r > 0.0)?;
    if let Some(alternatives) = params.logprobs {
        check_logprobs("sampling.logprobs", alternatives)?;
    }
    if params.stop.len() > MAX_STOP_STRINGS {
        return Err(Error::invalid("sampling.stop", format!("{} strings are more than {MAX_STOP_STRINGS}", params.stop.len())));
    }
    for (index, stop) in params.stop.iter().enumerate() {
        let field = || format!("sampling.stop[{index}]");
        if stop.is_empty() {
            return Err(Error::invalid(field(), "an empty string would stop at once"));
        }
        if stop.len() > MAX_STOP_BYTES {
            return Err(Error::invalid(field(), format!("{} bytes are more than {MAX_STOP_BYTES}", stop.len())));
        }
    }
    check_ids("sampling.stop_token_ids", &params.stop_token_ids, spec)
}

fn check_choices(n: usize) -> Result<()> {
    match n {
        0 => Err(Error::invalid("sampling.n", "0 asks for nothing: at least 1")),
        _ => Ok(()),
    }
}

fn check_number(field: &str, value: f32, range: &str, valid: impl Fn(f32) -> bool) -> Result<()> {
    if value.is_finite() && valid(value) { Ok(()) } else { Err(Error::invalid(field, format!("{value} is not {range}"))) }
}

fn check_logprobs(field: &str, alternatives: usize) -> Result<()> {
    if alternatives <= MAX_LOGPROBS { Ok(()) } else { Err(Error::invalid(field, format!("{alternatives} is above {MAX_LOGPROBS}"))) }
}

#[cfg(test)]
mod tests {
    use super::{super::fake, *};
    use crate::{error::ErrorKind, moe::policy::RoutingChoice};

    fn outcome(change: impl FnOnce(&mut Request)) -> Option<(ErrorKind, String)> {
        let mut request = fake::request(&[1, 2, 3]);
        change(&mut request);
        match check(&request, &fake::spec(), &[fake::EOS], &EngineConfig { max_new_tokens: 8, ..EngineConfig::default() }) {
            Ok(()) => None,
            Err(error) => match &error {
                Error::InvalidArgument { field, .. } | Error::OutOfRange { field, .. } => Some((error.kind(), field.clone())),
                other => panic!("{other}"),
            },
        }
    }

    fn sampling(change: impl FnOnce(&mut GenerateParams)) -> Option<(ErrorKind, String)> {
        let mut params = GenerateParams::default();
        change(&mut params);
        outcome(|request| request.task = Task::Generate(params))
    }

    fn invalid(field: &str) -> Option<(ErrorKind, String)> {
        Some((ErrorKind::InvalidArgument, field.to_owned()))
    }

    fn too_large(field: &str) -> Option<(ErrorKind, String)> {
        Some((ErrorKind::OutOfRange, field.to_owned()))
    }

    #[test]
    fn prompts() {
        let (vocab, context) = (fake::spec().vocab_size as u32, fake::spec().max_context);
        assert_eq!(outcome(|_| ()), None);
        assert_eq!(outcome(|r| r.prompt = vec![]), invalid("prompt"));
        assert_eq!(outcome(|r| r.prompt = vec![0, vocab]), invalid("token_ids[1]"));
        assert_eq!(outcome(|r| r.prompt = vec![0; context - 1]), None);
        assert_eq!(outcome(|r| r.prompt = vec![0; context]), too_large("prompt"));
        assert_eq!(outcome(|r| r.prompt = vec![u32::MAX; context + 1]), too_large("prompt"));
        let score = |tokens: usize, alternatives| {
            outcome(move |r| {
                r.prompt = vec![0; tokens];
                r.task = Task::Score { alternatives };
            })
        };
        assert_eq!(score(context, MAX_LOGPROBS), None);
        assert_eq!(score(context + 1, 0), too_large("input"));
        assert_eq!(score(0, 0), invalid("input"));
        assert_eq!(score(1, MAX_LOGPROBS + 1), invalid("alternatives"));
    }

    #[test]
    fn sampling_ranges() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.1] {
            assert_eq!(sampling(|p| p.temperature = bad), invalid("sampling.temperature"));
            assert_eq!(sampling(|p| p.top_p = bad), invalid("sampling.top_p"));
            assert_eq!(sampling(|p| p.min_p = bad), invalid("sampling.min_p"));
            assert_eq!(sampling(|p| p.repetition_penalty = bad), invalid("sampling.repetition_penalty"));
        }
        assert_eq!(sampling(|p| p.top_p = 0.0), invalid("sampling.top_p"));
        assert_eq!(sampling(|p| p.top_p = 1.1), invalid("sampling.top_p"));
        assert_eq!(sampling(|p| p.min_p = 1.0), invalid("sampling.min_p"));
        assert_eq!(sampling(|p| p.repetition_penalty = 0.0), invalid("sampling.repetition_penalty"));
        assert_eq!(sampling(|p| p.max_new_tokens = Some(0)), invalid("sampling.max_new_tokens"));
        assert_eq!(sampling(|p| p.max_new_tokens = Some(8)), None);
        assert_eq!(sampling(|p| p.max_new_tokens = Some(9)), too_large("sampling.max_new_tokens"));
        assert_eq!(sampling(|p| p.logprobs = Some(MAX_LOGPROBS + 1)), invalid("sampling.logprobs"));
        assert_eq!(sampling(|p| p.top_k = usize::MAX), None);
    }

    #[test]
    fn stops() {
        assert_eq!(sampling(|p| p.stop = vec!["a".into(), String::new()]), invalid("sampling.stop[1]"));
        assert_eq!(sampling(|p| p.stop = vec!["a".repeat(MAX_STOP_BYTES)]), None);
        assert_eq!(sampling(|p| p.stop = vec!["a".repeat(MAX_STOP_BYTES + 1)]), invalid("sampling.stop[0]"));
        assert_eq!(sampling(|p| p.stop = vec!["a".into(); MAX_STOP_STRINGS + 1]), invalid("sampling.stop"));
        assert_eq!(sampling(|p| p.stop_token_ids = vec![1, u32::MAX]), invalid("sampling.stop_token_ids[1]"));
    }

    #[test]
    fn routing() {
        assert_eq!(outcome(|r| r.routing = RoutingChoice::TopK { k: 2, weight_form: None }), None);
        assert_eq!(outcome(|r| r.routing = RoutingChoice::TopK { k: 99, weight_form: None }), invalid("routing.top_k.k"));
        assert_eq!(outcome(|r| r.routing = RoutingChoice::Soft { temperature: Some(f32::NAN) }), invalid("routing.soft.temperature"));
    }
}
