//! Prompts of the live page, run by the engine like any other request.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    context::{Context, Input},
    convert,
    inference::engine_stopped,
};
use crate::{
    engine::{Engine, Event, EventStream, FinishReason, Finished, GenerateParams, Request, ShadowChoice, Task, Tokens},
    error::{Error, Result},
    moe::{
        policy::{LayerChoices, RoutingRule},
        trace::RoutingTrace,
    },
    telemetry::page::{Answer, MAX_NEW_TOKENS, MAX_ROUTES, Playground, Running, TokenRoutes, TracedToken, Trial},
};

/// Longest prompt, in tokens: each becomes an element of the page.
const MAX_PROMPT_TOKENS: usize = 1024;

/// Behind other requests, but not for long.
const PRIORITY: i32 = -1;

/// How long somebody looks at a page that says that it waits.
const TIMEOUT: Duration = Duration::from_secs(60);

/// The engine as the live page knows it.
#[derive(Clone, Debug)]
pub struct EnginePlayground {
    context: Arc<Context>,
}

impl EnginePlayground {
    pub(super) fn new(context: Arc<Context>) -> Self {
        Self { context }
    }

    async fn answer(&self, trial: Trial) -> Result<Answer> {
        let engine = &self.context.engine;
        let (rule, routing) = self.routing(&trial)?;
        let params = self.params(&trial)?;
        let prompt = self.prompt(trial.prompt).await?;
        let mut record = Record::new(prompt.clone());
        let finished = record.follow(engine.submit(request(prompt, params, routing))?).await?;
        let layers = engine.spec().moe_layers().map(|(layer, _)| layer).collect();
        record.answer(engine, &rule, &finished, layers)
    }

    async fn prompt(&self, text: String) -> Result<Vec<u32>> {
        let prompt = self.context.prompt(Some(Input::Text(text)), "prompt").await?;
        match prompt.len() {
            0 => Err(Error::invalid("prompt", "it has no token: write something")),
            tokens if tokens > MAX_PROMPT_TOKENS => {
                Err(Error::out_of_range("prompt", format!("{tokens} tokens are more than the {MAX_PROMPT_TOKENS} that the page shows")))
            }
            _ => Ok(prompt),
        }
    }

    fn routing(&self, trial: &Trial) -> Result<(RoutingRule, LayerChoices)> {
        let Some(text) = &trial.routing else {
            let serving = self.context.serving();
            return Ok((serving.rule, serving.choices));
        };
        let rule: RoutingRule = text.parse()?;
        let choices = self.context.engine.spec().layer_choices(&rule, "routing")?;
        Ok((rule, choices))
    }

    fn params(&self, trial: &Trial) -> Result<GenerateParams> {
        if trial.max_new_tokens > MAX_NEW_TOKENS {
            let message = format!("{} is above {MAX_NEW_TOKENS}, the limit of the page", trial.max_new_tokens);
            return Err(Error::out_of_range("max_new_tokens", message));
        }
        let defaults = convert::generate_params(None, &self.context.config.sampling);
        Ok(GenerateParams { max_new_tokens: Some(trial.max_new_tokens), ..defaults })
    }
}

impl Playground for EnginePlayground {
    fn run(&self, trial: Trial) -> Running<'_> {
        Box::pin(self.answer(trial))
    }
}

fn request(prompt: Vec<u32>, params: GenerateParams, routing: LayerChoices) -> Request {
    Request {
        id: "live-page".into(),
        trace_id: None,
        prompt,
        task: Task::Generate(params),
        routing,
        trace: true,
        deadline: Some(Instant::now() + TIMEOUT),
        priority: PRIORITY,
        // Nobody is served it.
        shadow: ShadowChoice::Never,
    }
}

/// What has come so far.
#[derive(Debug)]
struct Record {
    /// Of the prompt, then generated.
    ids: Vec<u32>,
    prompt_tokens: usize,
    /// By position.
    routed: Vec<Option<TokenRoutes>>,
}

impl Record {
    fn new(prompt: Vec<u32>) -> Self {
        Self { prompt_tokens: prompt.len(), ids: prompt, routed: Vec::new() }
    }

    async fn follow(&mut self, mut events: EventStream) -> Result<Finished> {
        while let Some(event) = events.recv().await {
            match event {
                Event::Tokens(tokens) => self.add(&tokens),
                Event::Finished(finished) => {
                    self.add(&finished.tail);
                    return Ok(*finished);
                }
                Event::Failed(error) => return Err(error),
            }
        }
        Err(engine_stopped())
    }

    fn add(&mut self, tokens: &Tokens) {
        self.ids.extend_from_slice(&tokens.ids);
        let Some(trace) = &tokens.trace else { return };
        for token in 0..trace.num_tokens() {
            let position = trace.first_position + token;
            if self.routed.len() <= position {
                self.routed.resize(position + 1, None);
            }
            self.routed[position] = Some(token_routes(trace, token));
        }
    }

    fn answer(mut self, engine: &Engine, rule: &RoutingRule, finished: &Finished, layers: Vec<usize>) -> Result<Answer> {
        self.routed.resize(self.ids.len(), None);
        let texts = texts(engine, &self.ids)?;
        let tokens = self.ids.into_iter().zip(texts).zip(self.routed).enumerate();
        let tokens = tokens.map(|(at, ((id, text), routed))| TracedToken { id, text, generated: at >= self.prompt_tokens, routed });
        Ok(Answer {
            routing: rule.to_string(),
            generation: finished.generation,
            finish: if finished.reason == FinishReason::Length { "length" } else { "stop" },
            first_token_seconds: (finished.timing.queue + finished.timing.prefill).as_secs_f64(),
            decode_seconds: finished.timing.decode.as_secs_f64(),
            layers,
            tokens: tokens.collect(),
        })
    }
}

/// The rows of one token of a trace.
fn token_routes(trace: &RoutingTrace, token: usize) -> TokenRoutes {
    let layers = trace.layers.len();
    let rows = token * layers..(token + 1) * layers;
    let of_rows = |values: &[f32]| values.get(rows.clone()).unwrap_or_default().iter().map(|&value| short(value)).collect();
    let routes = trace.layers.iter().filter_map(|&layer| trace.row(trace.first_position + token, layer));
    let routes =
        routes.map(|row| row.experts.iter().copied().zip(row.weights.iter().map(|&weight| short(weight))).take(MAX_ROUTES).collect());
    TokenRoutes { routes: routes.collect(), entropy: of_rows(&trace.entropy), margin: of_rows(&trace.margin) }
}

/// Four decimals: there are many of them, and they are looked at.
fn short(value: f32) -> f64 {
    (f64::from(value) * 1e4).round() / 1e4
}

/// What each token adds to the text. Bytes that never become a character are part of the token after them.
fn texts(engine: &Engine, ids: &[u32]) -> Result<Vec<String>> {
    let mut decoder = engine.tokenizer().decode_stream(false);
    let step = |&id: &u32| decoder.step(id).map(Option::unwrap_or_default);
    let texts = ids.iter().map(step).collect::<std::result::Result<_, _>>();
    texts.map_err(|error| Error::Internal(format!("the tokens of a trial cannot be decoded: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two tokens in layers 1 and 3, the first at position 5.
    fn trace() -> RoutingTrace {
        RoutingTrace {
            first_position: 5,
            layers: [1, 3].into(),
            offsets: vec![0, 1, 3, 4, 6],
            expert_ids: vec![2, 0, 1, 3, 1, 0],
            weights: vec![1.0, 0.75, 0.25, 1.0, 0.666_666_7, 0.333_333_3],
            entropy: vec![0.1, 0.2, 0.3, 0.4],
            margin: vec![1.0, f32::INFINITY, 2.0, 0.5],
        }
    }

    #[test]
    fn traces_become_rows_of_tokens() {
        let mut record = Record::new(vec![7; 6]);
        record.add(&Tokens { ids: vec![8, 9], trace: Some(Box::new(trace())), ..Tokens::default() });
        assert_eq!((record.ids.len(), record.routed.len(), record.prompt_tokens), (8, 7, 6));
        assert!(record.routed[..5].iter().all(Option::is_none), "nothing was said of them");
        let token = record.routed[6].as_ref().unwrap();
        assert_eq!(token.routes, [vec![(3, 1.0)], vec![(1, 0.6667), (0, 0.3333)]]);
        assert_eq!((token.entropy.as_slice(), token.margin.as_slice()), (&[0.3, 0.4][..], &[2.0, 0.5][..]));
        assert_eq!(record.routed[5].as_ref().unwrap().margin[1], f64::INFINITY);
    }

    #[test]
    fn few_of_many_experts_are_named() {
        let experts = 3 * MAX_ROUTES as u16;
        let trace = RoutingTrace {
            first_position: 0,
            layers: [0].into(),
            offsets: vec![0, u32::from(experts)],
            expert_ids: (0..experts).collect(),
            weights: vec![1.0 / f32::from(experts); usize::from(experts)],
            entropy: vec![3.0],
            margin: vec![f32::INFINITY],
        };
        assert_eq!(token_routes(&trace, 0).routes[0].len(), MAX_ROUTES);
    }
}
