//! What the services share: the engine, the routing in force, and the way from a text to its tokens.

use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::Semaphore;

use super::{ServiceConfig, convert, proto};
use crate::{
    engine::Engine,
    error::{Error, Result},
    jobs::Jobs,
    moe::policy::{LayerChoices, RoutingRule},
};

/// Longer texts are tokenised away from the threads that serve sockets, and only so many at once as there are cores.
const INLINE_TEXT: usize = 64 * 1024;

/// How much longer each part of a long text is than the one before, until the whole text is tokenised.
const PART_GROWTH: usize = 4;

/// Shared by all services of a server.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) engine: Engine,
    pub(super) config: ServiceConfig,
    /// `None`: the server does not tune.
    pub(super) jobs: Option<Jobs>,
    serving: RwLock<Serving>,
    /// Permits for long tokenisations.
    tokenizing: Arc<Semaphore>,
}

/// Routing of requests that choose none.
#[derive(Clone, Debug)]
pub(super) struct Serving {
    pub(super) rule: RoutingRule,
    /// What it asks of each layer.
    pub(super) choices: LayerChoices,
}

/// The prompt of a generation or the input of a score.
pub(super) enum Input {
    Text(String),
    Ids(Vec<u32>),
}

/// The messages that carry one, each with a oneof of its own.
macro_rules! carry_input {
    ($($message:ident :: $oneof:ident),+ $(,)?) => {
        $(impl From<proto::$message::$oneof> for Input {
            fn from(input: proto::$message::$oneof) -> Self {
                match input {
                    proto::$message::$oneof::Text(text) => Self::Text(text),
                    proto::$message::$oneof::TokenIds(ids) => Self::Ids(ids.ids),
                }
            }
        })+
    };
}

carry_input!(
    generate_request::Prompt,
    score_request::Input,
    trace_routing_request::Input,
    replay_routing_request::Input,
    measure_fidelity_request::Input,
);

impl Context {
    /// Fails where a layer of the model cannot follow `config.routing`.
    pub(super) fn new(engine: Engine, config: ServiceConfig, jobs: Option<Jobs>) -> Result<Self> {
        let choices = engine.spec().layer_choices(&config.routing, "routing")?;
        engine.set_serving(choices.clone());
        let serving = RwLock::new(Serving { rule: config.routing.clone(), choices });
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        Ok(Self { engine, config, jobs, serving, tokenizing: Arc::new(Semaphore::new(cores)) })
    }

    /// In force where a request says nothing.
    pub(super) fn serving(&self) -> Serving {
        self.serving.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts `rule` in force for the requests that come from now on; what was in force before.
    pub(super) fn set_serving(&self, rule: RoutingRule) -> Result<RoutingRule> {
        if !self.config.runtime_routing {
            return Err(Error::FailedPrecondition("the routing of this server is fixed: it was started with --runtime-routing off".into()));
        }
        let choices = self.layer_choices(&rule, "serving")?;
        let top_k = self.engine.spec().most_experts_per_token(&choices)?;
        let mut serving = self.serving.write().unwrap_or_else(PoisonError::into_inner);
        tracing::info!(before = %serving.rule, now = %rule, "serving routing changed");
        self.engine.set_serving(choices.clone());
        self.engine.metrics().set_serving(rule.to_string(), top_k);
        Ok(std::mem::replace(&mut *serving, Serving { rule, choices }).rule)
    }

    /// The routing of a request.
    pub(super) fn routing(&self, policy: Option<proto::RoutingPolicy>) -> Result<LayerChoices> {
        match policy {
            None => Ok(self.serving().choices),
            Some(policy) => self.layer_choices(&convert::routing_rule(policy, "routing")?, "routing"),
        }
    }

    /// What `rule`, which came in `field`, asks of each layer.
    pub(super) fn layer_choices(&self, rule: &RoutingRule, field: &str) -> Result<LayerChoices> {
        self.engine.spec().layer_choices(rule, "routing.layer_top_k.k").map_err(|error| error.rooted("routing", field))
    }

    pub(super) fn check_model(&self, model: &str) -> Result<()> {
        if model.is_empty() || model == self.config.model_name {
            return Ok(());
        }
        Err(Error::NotFound(format!("model: this server has '{}' only", self.config.model_name)))
    }

    /// Runs `work` here if `bytes` is small, else on a thread that serves no socket.
    pub(super) async fn work<T: Send + 'static>(&self, bytes: usize, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        if bytes <= INLINE_TEXT {
            return Ok(work());
        }
        let permit = self.tokenizing.clone().acquire_owned().await;
        let permit = permit.map_err(|_| Error::Internal("the tokenising semaphore is closed".into()))?;
        let task = tokio::task::spawn_blocking(move || {
            let result = work();
            drop(permit);
            result
        });
        task.await.map_err(|error| Error::Internal(format!("tokenising failed: {error}")))
    }

    /// The tokens of what a model reads as a whole.
    pub(super) async fn prompt(&self, input: Option<Input>, field: &'static str) -> Result<Vec<u32>> {
        let engine = self.engine.clone();
        // A cut changes the tokens beside it; those of another whole context are beyond doubt.
        self.tokens(input, field, 2 * engine.spec().max_context, move || engine.refuse_too_long(field)).await
    }

    /// The tokens of what is read window by window.
    pub(super) async fn long_text(&self, input: Option<Input>, field: &'static str) -> Result<Vec<u32>> {
        let limit = self.engine.config().measure.max_tokens;
        let refuse = move || Error::out_of_range(field, format!("more than {limit} tokens, the limit of this server"));
        self.tokens(input, field, limit + self.engine.spec().max_context, refuse).await
    }

    /// A text whose beginning has more tokens than `beyond` is refused with it: tokenising megabytes takes many seconds.
    async fn tokens(
        &self,
        input: Option<Input>,
        field: &'static str,
        beyond: usize,
        refuse: impl FnOnce() -> Error + Send + 'static,
    ) -> Result<Vec<u32>> {
        match input {
            None => Err(Error::invalid(field, "neither text nor token_ids is set")),
            Some(Input::Ids(ids)) => Ok(ids),
            Some(Input::Text(text)) => {
                let (engine, bytes) = (self.engine.clone(), text.len());
                self.work(bytes, move || encode_up_to(&engine, &text, field, beyond)?.ok_or_else(refuse)).await?
            }
        }
    }
}

/// The tokens of `text`, with byte offsets.
pub(super) fn encode(engine: &Engine, text: &str, add_special: bool, field: &str) -> Result<tokenizers::Encoding> {
    let encoding = engine.tokenizer().encode(text, add_special);
    encoding.map_err(|error| Error::invalid(field, format!("cannot be tokenised: {error}")))
}

/// The tokens of a text; `None` if its beginning already has more than `beyond`.
fn encode_up_to(engine: &Engine, text: &str, field: &str, beyond: usize) -> Result<Option<Vec<u32>>> {
    let mut part = INLINE_TEXT;
    while part < text.len() {
        let beginning = &text[..text.floor_char_boundary(part)];
        if encode(engine, beginning, true, field)?.len() > beyond {
            return Ok(None);
        }
        part = part.saturating_mul(PART_GROWTH);
    }
    Ok(Some(encode(engine, text, true, field)?.get_ids().to_vec()))
}
