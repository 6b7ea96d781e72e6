//! What a request may ask for. Field paths are those of `hardmax.v1.GenerateRequest` and `ScoreRequest`.

use std::collections::HashSet;

use super::{
    EngineConfig,
    request::{GenerateParams, MAX_LOGPROBS, Request, Task},
};
use crate::{
    error::{Error, Result},
    model::ModelSpec,
    moe::{policy::LayerChoices, trace::RoutingTrace},
};

/// Most stop strings of a request: each is searched for after every token.
pub const MAX_STOP_STRINGS: usize = 16;

/// Most stop tokens of a request.
pub const MAX_STOP_TOKENS: usize = 1024;

/// Most tokens with a bias of a request: each is added after every token.
pub const MAX_LOGIT_BIASES: usize = 1024;

/// Most tokens that a request may allow: each is looked at after every token.
pub const MAX_ALLOWED_TOKENS: usize = 8192;

/// Largest weight of an expert in a replay: far beyond what a router gives, and far from what the sums of weights could not hold.
const MAX_REPLAY_WEIGHT: f32 = 1000.0;

/// Largest bias of a token, either way: no token with it is drawn by chance, or else no other one.
const MAX_BIAS: f32 = 100.0;

/// Most bytes of a stop string: as much text may have to be held back.
pub const MAX_STOP_BYTES: usize = 1024;

/// Checks everything but the deadline and the state of the queue.
pub(super) fn check(request: &Request, spec: &ModelSpec, eos_token_ids: &[u32], config: &EngineConfig) -> Result<()> {
    check_prompt(request, spec)?;
    match &request.task {
        Task::Generate(params) => Sampling { params, prompt_tokens: request.prompt.len(), spec, eos_token_ids, config }.check()?,
        Task::Score { alternatives } => check_logprobs("alternatives", *alternatives)?,
        Task::Read => {}
    }
    if let LayerChoices::Replay { replay, .. } = &request.routing {
        check_replay(&replay.trace, request.prompt.len(), spec)?;
    }
    spec.check_routing(&request.routing)
}

/// The given experts are those of the model.
fn check_replay(trace: &RoutingTrace, prompt_tokens: usize, spec: &ModelSpec) -> Result<()> {
    let field = "traces";
    let layers: Vec<(usize, usize)> = spec.moe_layers().map(|(layer, moe)| (layer, moe.num_experts)).collect();
    if !trace.layers.iter().eq(layers.iter().map(|(layer, _)| layer)) {
        let expected = layers.iter().map(|(layer, _)| layer.to_string()).collect::<Vec<_>>().join(", ");
        return Err(Error::invalid(field, format!("their layers are not those of the model: {expected}")));
    }
    if trace.num_tokens() > prompt_tokens {
        return Err(Error::invalid(field, format!("{} tokens are more than the {prompt_tokens} of the input", trace.num_tokens())));
    }
    if trace.first_position != 0 {
        return Err(Error::invalid(field, format!("the first begins at position {}, not at 0", trace.first_position)));
    }
    for (position, &(layer, experts)) in (0..trace.num_tokens()).flat_map(|position| layers.iter().map(move |layer| (position, layer))) {
        let Some(row) = trace.row(position, layer) else {
            return Err(Error::invalid(field, format!("position {position} has no row for layer {layer}")));
        };
        let place = || format!("position {position}, layer {layer}");
        if let Some(expert) = row.experts.iter().find(|&&expert| usize::from(expert) >= experts) {
            return Err(Error::invalid(field, format!("{}: {expert} is not below {experts}, the number of experts", place())));
        }
        if let Some((at, expert)) = row.experts.iter().enumerate().find(|(at, expert)| row.experts[..*at].contains(expert)) {
            return Err(Error::invalid(field, format!("{}: expert {expert} comes again at place {at}", place())));
        }
        if let Some(weight) = row.weights.iter().find(|weight| !(0.0..=MAX_REPLAY_WEIGHT).contains(*weight)) {
            return Err(Error::invalid(field, format!("{}: the weight {weight} is not from 0 to {MAX_REPLAY_WEIGHT}", place())));
        }
    }
    Ok(())
}

fn check_prompt(request: &Request, spec: &ModelSpec) -> Result<()> {
    let (field, room) = match request.task {
        Task::Generate(_) => ("prompt", 1),
        Task::Score { .. } | Task::Read => ("input", 0),
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

pub(super) fn check_ids(field: &str, ids: &[u32], spec: &ModelSpec) -> Result<()> {
    ids.iter()
        .enumerate()
        .try_for_each(|(index, &id)| if (id as usize) < spec.vocab_size { Ok(()) } else { check_id(format!("{field}[{index}]"), id, spec) })
}

fn check_id(field: String, id: u32, spec: &ModelSpec) -> Result<()> {
    if (id as usize) < spec.vocab_size {
        return Ok(());
    }
    Err(Error::invalid(field, format!("{id} is not below {}, the size of the vocabulary", spec.vocab_size)))
}

/// The sampling parameters of a request, with what they are checked against.
struct Sampling<'a> {
    params: &'a GenerateParams,
    prompt_tokens: usize,
    spec: &'a ModelSpec,
    eos_token_ids: &'a [u32],
    config: &'a EngineConfig,
}

impl Sampling<'_> {
    fn check(&self) -> Result<()> {
        self.check_choices()?;
        self.check_lengths()?;
        self.check_numbers()?;
        self.check_stops()?;
        self.check_biases()?;
        self.check_allowed()?;
        self.check_something_is_left()
    }

    fn check_choices(&self) -> Result<()> {
        let (n, limit) = (self.params.n, self.config.max_choices);
        if n == 0 {
            return Err(Error::invalid("sampling.n", "0 asks for nothing: at least 1"));
        }
        if n > limit {
            return Err(Error::out_of_range("sampling.n", format!("{n} is above {limit}, the limit of this server")));
        }
        Ok(())
    }

    fn check_lengths(&self) -> Result<()> {
        let limit = self.config.max_new_tokens;
        if let Some(tokens) = self.params.max_new_tokens {
            let field = "sampling.max_new_tokens";
            if tokens == 0 {
                return Err(Error::invalid(field, "0 asks for nothing: at least 1"));
            }
            if tokens > limit {
                return Err(Error::out_of_range(field, format!("{tokens} is above {limit}, the limit of this server")));
            }
        }
        let (field, least) = ("sampling.min_new_tokens", self.params.min_new_tokens);
        if let Some(most) = self.params.max_new_tokens.filter(|&most| least > most) {
            return Err(Error::invalid(field, format!("{least} is above {most}, the max_new_tokens of the request")));
        }
        if least > limit {
            return Err(Error::out_of_range(field, format!("{least} is above {limit}, the limit of this server")));
        }
        let room = self.spec.max_context.saturating_sub(self.prompt_tokens);
        if least > room {
            return Err(Error::out_of_range(field, format!("{least} is above {room}, what the prompt leaves of the model's context")));
        }
        Ok(())
    }

    fn check_numbers(&self) -> Result<()> {
        let params = self.params;
        check_number("sampling.temperature", params.temperature, "a finite number from 0", |t| t >= 0.0)?;
        check_number("sampling.top_p", params.top_p, "above 0 and at most 1", |p| p > 0.0 && p <= 1.0)?;
        check_number("sampling.min_p", params.min_p, "from 0 and below 1", |p| (0.0..1.0).contains(&p))?;
        check_number("sampling.repetition_penalty", params.repetition_penalty, "a finite number above 0", |r| r > 0.0)?;
        let penalty = |field, value| check_number(field, value, "from -2 to 2", |p| (-2.0..=2.0).contains(&p));
        penalty("sampling.presence_penalty", params.presence_penalty)?;
        penalty("sampling.frequency_penalty", params.frequency_penalty)?;
        params.logprobs.map_or(Ok(()), |alternatives| check_logprobs("sampling.logprobs", alternatives))
    }

    fn check_stops(&self) -> Result<()> {
        check_count("sampling.stop", "strings", self.params.stop.len(), MAX_STOP_STRINGS)?;
        for (index, stop) in self.params.stop.iter().enumerate() {
            let field = || format!("sampling.stop[{index}]");
            if stop.is_empty() {
                return Err(Error::invalid(field(), "an empty string would stop at once"));
            }
            if stop.len() > MAX_STOP_BYTES {
                return Err(Error::invalid(field(), format!("{} bytes are more than {MAX_STOP_BYTES}", stop.len())));
            }
        }
        check_count("sampling.stop_token_ids", "tokens", self.params.stop_token_ids.len(), MAX_STOP_TOKENS)?;
        check_ids("sampling.stop_token_ids", &self.params.stop_token_ids, self.spec)
    }

    fn check_biases(&self) -> Result<()> {
        let biases = &self.params.logit_bias;
        check_count("sampling.logit_bias", "tokens", biases.len(), MAX_LOGIT_BIASES)?;
        let mut seen = HashSet::new();
        for (index, &(token, bias)) in biases.iter().enumerate() {
            let field = |name: &str| format!("sampling.logit_bias[{index}].{name}");
            check_id(field("token_id"), token, self.spec)?;
            check_number(&field("bias"), bias, "from -100 to 100", |bias| bias.abs() <= MAX_BIAS)?;
            if !seen.insert(token) {
                return Err(Error::invalid(field("token_id"), format!("{token} has a bias already")));
            }
        }
        Ok(())
    }

    fn check_allowed(&self) -> Result<()> {
        let (field, allowed) = ("sampling.allowed_token_ids", &self.params.allowed_token_ids);
        check_count(field, "tokens", allowed.len(), MAX_ALLOWED_TOKENS)?;
        check_ids(field, allowed, self.spec)?;
        let mut seen = HashSet::new();
        match allowed.iter().position(|token| !seen.insert(token)) {
            None => Ok(()),
            Some(index) => Err(Error::invalid(format!("{field}[{index}]"), "this token is allowed already")),
        }
    }

    /// Some token can be drawn before `min_new_tokens` is reached.
    fn check_something_is_left(&self) -> Result<()> {
        let params = self.params;
        if params.min_new_tokens == 0 {
            return Ok(());
        }
        let eos = self.eos_token_ids.iter().filter(|_| !params.ignore_eos);
        let ends: HashSet<u32> = eos.chain(&params.stop_token_ids).copied().filter(|&id| (id as usize) < self.spec.vocab_size).collect();
        let allowed = &params.allowed_token_ids;
        if !allowed.is_empty() && allowed.iter().all(|id| ends.contains(id)) {
            let message = "every one of them ends the text, which sampling.min_new_tokens does not let happen at first";
            return Err(Error::invalid("sampling.allowed_token_ids", message));
        }
        if allowed.is_empty() && ends.len() == self.spec.vocab_size {
            return Err(Error::invalid("sampling.min_new_tokens", "every token of the vocabulary ends the text"));
        }
        Ok(())
    }
}

fn check_count(field: &str, what: &str, count: usize, limit: usize) -> Result<()> {
    if count <= limit { Ok(()) } else { Err(Error::invalid(field, format!("{count} {what} are more than {limit}"))) }
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
    fn choices() {
        let limit = EngineConfig::default().max_choices;
        assert_eq!(sampling(|p| p.n = 0), invalid("sampling.n"));
        assert_eq!(sampling(|p| p.n = limit), None);
        assert_eq!(sampling(|p| p.n = limit + 1), too_large("sampling.n"));
    }

    #[test]
    fn lengths() {
        assert_eq!(sampling(|p| (p.min_new_tokens, p.max_new_tokens) = (8, Some(8))), None);
        assert_eq!(sampling(|p| (p.min_new_tokens, p.max_new_tokens) = (5, Some(4))), invalid("sampling.min_new_tokens"));
        assert_eq!(sampling(|p| p.min_new_tokens = 9), too_large("sampling.min_new_tokens"));
        let (context, task) = (fake::spec().max_context, Task::Generate(GenerateParams { min_new_tokens: 2, ..Default::default() }));
        let prompt = |tokens| outcome(|r| (r.prompt, r.task) = (vec![0; tokens], task.clone()));
        assert_eq!(prompt(context - 2), None);
        assert_eq!(prompt(context - 1), too_large("sampling.min_new_tokens"));
    }

    #[test]
    fn penalties_and_biases() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 2.1, -2.1] {
            assert_eq!(sampling(|p| p.presence_penalty = bad), invalid("sampling.presence_penalty"));
            assert_eq!(sampling(|p| p.frequency_penalty = bad), invalid("sampling.frequency_penalty"));
        }
        assert_eq!(sampling(|p| (p.presence_penalty, p.frequency_penalty) = (-2.0, 2.0)), None);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 100.5, -100.5] {
            assert_eq!(sampling(|p| p.logit_bias = vec![(0, 1.0), (1, bad)]), invalid("sampling.logit_bias[1].bias"));
        }
        let vocab = fake::VOCAB as u32;
        assert_eq!(sampling(|p| p.logit_bias = vec![(0, -100.0), (vocab - 1, 100.0)]), None);
        assert_eq!(sampling(|p| p.logit_bias = vec![(vocab, 1.0)]), invalid("sampling.logit_bias[0].token_id"));
        assert_eq!(sampling(|p| p.logit_bias = vec![(7, 1.0), (8, 1.0), (7, 1.0)]), invalid("sampling.logit_bias[2].token_id"));
        assert_eq!(sampling(|p| p.logit_bias = vec![(7, 1.0); MAX_LOGIT_BIASES + 1]), invalid("sampling.logit_bias"));
    }

    #[test]
    fn allowed_tokens() {
        let vocab = fake::VOCAB as u32;
        assert_eq!(sampling(|p| p.allowed_token_ids = (0..vocab).collect()), None);
        assert_eq!(sampling(|p| p.allowed_token_ids = vec![3, vocab]), invalid("sampling.allowed_token_ids[1]"));
        assert_eq!(sampling(|p| p.allowed_token_ids = vec![3, 4, 3]), invalid("sampling.allowed_token_ids[2]"));
        assert_eq!(sampling(|p| p.allowed_token_ids = vec![3; MAX_ALLOWED_TOKENS + 1]), invalid("sampling.allowed_token_ids"));
    }

    #[test]
    fn something_can_be_drawn_before_the_least_length() {
        let with = |min_new_tokens, allowed_token_ids: Vec<u32>, stop_token_ids: Vec<u32>, ignore_eos| {
            sampling(|p| *p = GenerateParams { min_new_tokens, allowed_token_ids, stop_token_ids, ignore_eos, ..p.clone() })
        };
        let (eos, all) = (fake::EOS, (0..fake::VOCAB as u32).collect::<Vec<_>>());
        assert_eq!(with(1, vec![eos, 7], vec![7], false), invalid("sampling.allowed_token_ids"));
        assert_eq!(with(0, vec![eos, 7], vec![7], false), None);
        assert_eq!(with(1, vec![eos, 7], vec![7], true), None);
        assert_eq!(with(1, vec![eos, 7], vec![], false), None);
        assert_eq!(with(1, vec![], all.clone(), false), invalid("sampling.min_new_tokens"));
        assert_eq!(with(1, vec![], all[1..].to_vec(), true), None);
    }

    #[test]
    fn stops() {
        assert_eq!(sampling(|p| p.stop = vec!["a".into(), String::new()]), invalid("sampling.stop[1]"));
        assert_eq!(sampling(|p| p.stop = vec!["a".repeat(MAX_STOP_BYTES)]), None);
        assert_eq!(sampling(|p| p.stop = vec!["a".repeat(MAX_STOP_BYTES + 1)]), invalid("sampling.stop[0]"));
        assert_eq!(sampling(|p| p.stop = vec!["a".into(); MAX_STOP_STRINGS + 1]), invalid("sampling.stop"));
        assert_eq!(sampling(|p| p.stop_token_ids = vec![1, u32::MAX]), invalid("sampling.stop_token_ids[1]"));
        assert_eq!(sampling(|p| p.stop_token_ids = vec![1; MAX_STOP_TOKENS + 1]), invalid("sampling.stop_token_ids"));
    }

    #[test]
    fn routing() {
        assert_eq!(outcome(|r| r.routing = RoutingChoice::TopK { k: 2, weight_form: None }.into()), None);
        assert_eq!(outcome(|r| r.routing = RoutingChoice::TopK { k: 99, weight_form: None }.into()), invalid("routing.top_k.k"));
        assert_eq!(
            outcome(|r| r.routing = RoutingChoice::Soft { temperature: Some(f32::NAN) }.into()),
            invalid("routing.soft.temperature")
        );
    }
}
