//! A model of a few lines and a tokenizer of bytes, for the tests of the engine.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, mpsc},
    time::Duration,
};

use candle_core::{Device, Tensor};
use tokenizers::{AddedToken, Tokenizer, models::bpe::BPE, pre_tokenizers::byte_level::ByteLevel};

use super::{EngineConfig, GenerateParams, Request, ShadowChoice, Task};
use crate::{
    error::{Error, Result},
    model::{
        Batch, CacheShape, Drawn, FeedForwardSpec, Forward, ForwardTime, LanguageModel, LayerSpec, ModelSpec, MoeSpec, QkNorm,
        ReferenceRouting, RopeScaling, RopeSpec, RowChoice, SharedWeights, draw,
    },
    moe::{
        LayerRouting, Routing, RoutingStats, SparseRouting,
        policy::{RoutingChoice, WeightForm},
    },
};

/// End of sequence; the ids below are bytes.
pub(super) const EOS: u32 = 256;
pub(super) const VOCAB: usize = 260;
pub(super) const EXPERTS: usize = 4;

/// Blocks of the cache.
pub(super) const CACHE: CacheShape = CacheShape { block_tokens: 8, num_blocks: 64 };

/// Longest a test waits for the engine before it fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn spec() -> ModelSpec {
    let moe = MoeSpec { num_experts: EXPERTS, expert_width: 8, top_k: 1, weight_form: WeightForm::Raw, shared_expert_width: None };
    ModelSpec {
        family: "fake".into(),
        vocab_size: VOCAB,
        hidden_size: 8,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 8,
        qkv_bias: false,
        out_bias: false,
        qk_norm: QkNorm::None,
        clip_qkv: None,
        rms_norm_eps: 1e-6,
        rope: RopeSpec { theta: 1e4, scaling: RopeScaling::None },
        max_context: 64,
        tied_head: true,
        layers: vec![LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Moe(moe) }],
        reference: ReferenceRouting::OwnTopK { assumed: true },
        estimator: "unknown".into(),
    }
}

/// One token for each byte, with the byte's value as id, and a special [`EOS`].
pub(super) fn tokenizer() -> Arc<Tokenizer> {
    let printable = |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte);
    let mut others = 256..;
    let vocab: [(String, u32); 256] = std::array::from_fn(|byte| {
        let byte = byte as u32;
        let spelled = if printable(byte) { byte } else { others.next().unwrap() };
        (char::from_u32(spelled).unwrap().to_string(), byte)
    });
    let mut tokenizer = Tokenizer::new(BPE::builder().vocab_and_merges(vocab, Vec::new()).build().unwrap());
    let byte_level = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(byte_level));
    tokenizer.with_decoder(Some(byte_level));
    tokenizer.add_special_tokens([AddedToken::from("<eos>", true)]).unwrap();
    assert_eq!(tokenizer.token_to_id("<eos>"), Some(EOS));
    Arc::new(tokenizer)
}

pub(super) fn config() -> EngineConfig {
    EngineConfig {
        max_batch_requests: 8,
        max_queue_requests: 8,
        max_step_tokens: 64,
        max_new_tokens: 32,
        max_choices: 8,
        event_buffer: 64,
        reader_timeout: PATIENCE,
        ..EngineConfig::default()
    }
}

/// Greedy continuation of `prompt`.
pub(super) fn request(prompt: &[u32]) -> Request {
    Request {
        id: "test".into(),
        trace_id: None,
        prompt: prompt.to_vec(),
        task: Task::Generate(GenerateParams::default()),
        routing: RoutingChoice::Native.into(),
        trace: false,
        deadline: None,
        priority: 0,
        shadow: ShadowChoice::Sampled,
    }
}

/// Logits after a history of tokens.
type Row = Box<dyn Fn(&[u32]) -> Vec<f32> + Send>;

/// Computes each row from the tokens in the blocks alone, and checks that they hold what the span says: the whole history up to
/// each position, under its routing and the weights of the moment.
pub(super) struct FakeModel {
    spec: ModelSpec,
    cache: CacheShape,
    /// By block and row.
    written: HashMap<(u32, usize), Written>,
    row: Row,
    draws: bool,
    weights: Arc<FakeWeights>,
    gate: Option<Gate>,
}

/// The weights of a [`FakeModel`]: it says every byte so much larger than it would with 0, which it begins with.
#[derive(Debug, Default)]
pub(super) struct FakeWeights(pub(super) u32);

/// What stands for the keys and values of a position.
#[derive(Clone, Copy)]
struct Written {
    token: u32,
    /// Of this token, all before it, their routing, and the weights.
    history: u64,
}

/// The model's side of a [`Control`].
struct Gate {
    steps: mpsc::Sender<Batch>,
    verdicts: mpsc::Receiver<Verdict>,
}

/// What a step does.
pub(super) enum Verdict {
    Go,
    Fail,
    /// The device is gone.
    Lose,
    Panic,
    /// Logits of a wrong shape.
    Misshape,
    /// These instead of what was asked for; rows are of zeros.
    Answer(Vec<Drawn>),
}

/// Lets a test see each step before it is taken. Once dropped, the model runs freely.
pub(super) struct Control {
    steps: mpsc::Receiver<Batch>,
    verdicts: mpsc::Sender<Verdict>,
}

impl Control {
    /// The batch of the next step, which waits for [`Control::decide`].
    pub(super) fn step(&self) -> Batch {
        self.steps.recv_timeout(PATIENCE).expect("the engine takes a step")
    }

    pub(super) fn decide(&self, verdict: Verdict) {
        self.verdicts.send(verdict).unwrap();
    }

    /// The next step, allowed.
    pub(super) fn go(&self) -> Batch {
        let batch = self.step();
        self.decide(Verdict::Go);
        batch
    }
}

impl FakeModel {
    pub(super) fn new(row: impl Fn(&[u32]) -> Vec<f32> + Send + 'static) -> Self {
        Self { spec: spec(), cache: CACHE, written: HashMap::new(), row: Box::new(row), draws: false, weights: Arc::default(), gate: None }
    }

    /// Draws tokens itself, and leaves out the routes that nobody reads.
    pub(super) fn drawing(self) -> Self {
        Self { draws: true, ..self }
    }

    /// With a cache of this size.
    pub(super) fn with_cache(self, block_tokens: usize, num_blocks: usize) -> Self {
        Self { cache: CacheShape { block_tokens, num_blocks }, ..self }
    }

    /// With a context of so many tokens.
    pub(super) fn with_context(mut self, max_context: usize) -> Self {
        self.spec.max_context = max_context;
        self
    }

    /// Certain of `next(history)`.
    pub(super) fn certain(next: impl Fn(&[u32]) -> u32 + Send + 'static) -> Self {
        Self::new(move |history| one_hot(next(history)))
    }

    /// The sum of all tokens so far, modulo the number of bytes.
    pub(super) fn sum() -> Self {
        Self::certain(|history| history.iter().sum::<u32>() % 256)
    }

    /// Says `text` after a prompt of one token, then ends.
    pub(super) fn recite(text: &str) -> Self {
        let ids: Vec<u32> = text.bytes().map(u32::from).collect();
        Self::certain(move |history| ids.get(history.len() - 1).copied().unwrap_or(EOS))
    }

    #[expect(clippy::disallowed_methods, reason = "a test sends a handful of messages")]
    pub(super) fn gated(mut self) -> (Self, Control) {
        let (steps, steps_seen) = mpsc::channel();
        let (verdicts, verdicts_taken) = mpsc::channel();
        self.gate = Some(Gate { steps, verdicts: verdicts_taken });
        (self, Control { steps: steps_seen, verdicts })
    }
}

pub(super) fn one_hot(token: u32) -> Vec<f32> {
    (0..VOCAB as u32).map(|id| if id == token { 1.0 } else { 0.0 }).collect()
}

impl LanguageModel for FakeModel {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn cache(&self) -> CacheShape {
        self.cache
    }

    fn draws(&self) -> bool {
        self.draws
    }

    fn forward(&mut self, batch: &Batch) -> Result<Forward> {
        let verdict = match &self.gate {
            Some(gate) if gate.steps.send(batch.clone()).is_ok() => gate.verdicts.recv_timeout(PATIENCE).unwrap_or(Verdict::Go),
            _ => Verdict::Go,
        };
        match verdict {
            Verdict::Fail => return Err(Error::FailedPrecondition("as the test wished".into())),
            Verdict::Lose => return Err(Error::DeviceLost("as the test wished".into())),
            Verdict::Panic => panic!("as the test wished"),
            Verdict::Go | Verdict::Misshape | Verdict::Answer(_) => {}
        }
        assert_eq!(batch.choices.len(), if self.draws { batch.num_logit_rows() } else { 0 });
        let wanted = batch.logit_rows();
        let (mut logits, mut drawn, mut at) = (Vec::new(), Vec::new(), 0);
        for span in &batch.spans {
            let (table, block_tokens) = (batch.table(span), self.cache.block_tokens);
            let place = |position: usize| (table[position / block_tokens], position % block_tokens);
            let (mut tokens, mut hash) = (Vec::new(), extend(self.weights.0.into(), &format!("{:?}", span.routing.at(0))));
            for position in 0..span.past + span.new {
                if position >= span.past {
                    tokens.push(batch.tokens[at]);
                    hash = extend(hash, &batch.tokens[at]);
                    self.written.insert(place(position), Written { token: batch.tokens[at], history: hash });
                    if wanted.contains(&(at as u32)) {
                        let row = shifted((self.row)(&tokens), self.weights.0);
                        drawn.push(match batch.choices.get(drawn.len()) {
                            Some(RowChoice::Token(wanted)) => draw::reference(&row, wanted),
                            Some(RowChoice::Logits) | None => Drawn::Row,
                        });
                        if drawn.last() == Some(&Drawn::Row) {
                            logits.extend(row);
                        }
                    }
                    at += 1;
                } else {
                    let written = self.written.get(&place(position)).expect("a past that was written");
                    tokens.push(written.token);
                    hash = extend(hash, &written.token);
                    assert_eq!(written.history, hash, "the block of another history");
                }
            }
        }
        let extra = usize::from(matches!(verdict, Verdict::Misshape));
        if let Verdict::Answer(answer) = verdict {
            (drawn, logits) = (answer, Vec::new());
        }
        let rows = drawn.iter().filter(|&&drawn| drawn == Drawn::Row).count() + extra;
        logits.resize(rows * VOCAB, 0.0);
        let logits = Tensor::from_vec(logits, (rows, VOCAB), &Device::Cpu)?;
        let drawn = if self.draws { drawn } else { Vec::new() };
        let told = if self.draws && !batch.routes { 0 } else { batch.tokens.len() };
        Ok(Forward { logits, drawn, layers: vec![routing(batch.tokens.len(), told)?], time: ForwardTime::default() })
    }

    fn exchange(&mut self, weights: SharedWeights) -> Result<SharedWeights> {
        let weights = weights.get().ok_or_else(|| Error::FailedPrecondition("these weights are not those of a fake".into()))?;
        Ok(SharedWeights::new(std::mem::replace(&mut self.weights, weights)))
    }
}

/// The logits of each byte are those of the byte `by` below.
fn shifted(mut row: Vec<f32>, by: u32) -> Vec<f32> {
    if let Some(bytes) = row.get_mut(..256) {
        bytes.rotate_right(by as usize % 256);
    }
    row
}

/// Every token goes to the first expert; the routes of `told` are told.
fn routing(tokens: usize, told: usize) -> Result<LayerRouting> {
    let mut stats = RoutingStats { tokens: tokens as u64, routes: tokens as u64, ..RoutingStats::new(EXPERTS) };
    stats.expert_tokens[0] = tokens as u64;
    let routing = SparseRouting { offsets: (0..=told as u32).collect(), expert_ids: vec![0; told], weights: vec![1.0; told] };
    let router_logits = Tensor::zeros((told, EXPERTS), candle_core::DType::F32, &Device::Cpu)?;
    Ok(LayerRouting { layer: 0, router_logits, routing: Routing::Sparse(routing), stats })
}

fn extend(hash: u64, value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    (hash, value).hash(&mut hasher);
    hasher.finish()
}
