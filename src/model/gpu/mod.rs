//! The forward on a GPU: kernels of the crate `hardmax-kernels` over memory that stays, on one stream.
//!
//! What [`Decoder`](super::Decoder) computes with tensors, for serving only: bf16 weights and keys and values, an f32 residual stream, f32 router
//! logits. A step is one copy of words to the device, launches, and one copy of a report back: tokens that were drawn, and the load of every layer.
//! Nothing between waits for the device. Steps that only decode are recorded as graphs, by their rounded sizes, and launched as one.
//!
//! Under the feature `cuda-emulated` the same runs on the processor.

mod arena;
mod attention;
mod cache;
mod device;
mod experts;
mod graphs;
mod head;
mod held;
mod layer;
pub mod parity;
mod profile;
mod random;
mod report;
mod stack;
mod step;
#[cfg(test)]
mod tests;
mod values;
mod watch;
mod weights;

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::Arc,
    time::Instant,
};

use candle_core::DType;
use hardmax_kernels::{Buffer, HostBuffer, Stream, grouped::Gemm, linear::Blas};

use self::{
    arena::Arena,
    attention::Launch,
    cache::Cache,
    graphs::{Advice, Graphs, Key},
    profile::Clock,
    report::Report,
    step::{Layout, Policies, Sizes},
    values::Values,
    watch::Watch,
};
pub use self::{
    device::{free_memory, open},
    profile::{Class, Profile},
    random::normal,
    weights::GpuWeights,
};
use super::{
    Batch, CacheShape, Forward, ForwardTime, LanguageModel, LogitRows, ModelSpec, Observable, SharedWeights,
    decoder::check_batch,
    draw::{RowChoice, TokenDraw},
    fitting,
    kv_cache::KvCache,
};
use crate::{
    error::{Error, Result},
    moe::{observe::MoeObserver, policy::RoutingChoice},
};

/// A decoder on a GPU, with the cache of the sequences it serves.
#[derive(Debug)]
pub struct GpuDecoder {
    cache: Cache,
    graphs: Graphs,
    machine: Machine,
    /// Last, so that it goes last: with the last of its tensors candle's device would go, and the stream of it.
    weights: Arc<GpuWeights>,
}

/// What steps are run with; it stays from step to step.
#[derive(Debug)]
struct Machine {
    /// Where steps run: that of candle's tensors, on which other threads may allocate, copy and free.
    stream: Stream,
    /// Where steps are recorded. Nobody else knows it, so nobody else's work gets into a recording.
    recorder: Stream,
    multiprocessors: usize,
    blas: Blas,
    gemm: Gemm,
    /// Values of a step.
    arena: Arena,
    /// `[hd / 2]`: inverse frequencies of the rotary embedding.
    frequencies: Buffer<f32>,
    words: Mirror,
    report: Mirror,
    clock: Clock,
}

/// Words that are on the host and on the device.
#[derive(Debug)]
struct Mirror {
    host: HostBuffer<u32>,
    device: Buffer<u32>,
}

impl Mirror {
    fn new(stream: Stream, len: usize) -> Result<Self> {
        Ok(Self { host: HostBuffer::new(len)?, device: Buffer::new(stream, len, "the words of a step")? })
    }

    /// Makes it hold `len` words; whether it has moved.
    fn reserve(&mut self, stream: Stream, len: usize) -> Result<bool> {
        if len <= self.device.len() {
            return Ok(false);
        }
        *self = Self::new(stream, len.next_power_of_two())?;
        Ok(true)
    }
}

/// A step, ready to be launched.
#[derive(Debug)]
struct Step<'a> {
    spec: &'a ModelSpec,
    batch: &'a Batch,
    sizes: Sizes,
    layout: &'a Layout,
    policies: &'a Policies,
    values: &'a Values,
    attention: &'a [Launch],
    /// Experts are held in 8 bits.
    quantized: bool,
}

/// What a step did besides computing.
#[derive(Debug, Default)]
struct Seen {
    time: ForwardTime,
    /// Rows of logits that were handed out, one behind the other.
    rows: Vec<f32>,
}

impl GpuDecoder {
    /// With an empty cache; every kernel has run once.
    ///
    /// # Errors
    /// `FailedPrecondition` where the GPU has not enough memory, with how much it has.
    pub fn new(weights: Arc<GpuWeights>, shape: CacheShape) -> Result<Self> {
        let stream = weights.stream();
        let machine = Machine::new(stream, &weights)?;
        let cache = Cache::new(stream, &weights.spec, shape)?;
        let mut decoder = Self { weights, cache, graphs: Graphs::default(), machine };
        decoder.warm_up()?;
        Ok(decoder)
    }

    /// Measures what kernels take, by their class, from now on; each step then waits for the device.
    pub fn measure(&mut self) -> Result<()> {
        self.machine.clock = Clock::running()?;
        Ok(())
    }

    /// What was measured since [`GpuDecoder::measure`] or the last call.
    pub fn take_profile(&mut self) -> Profile {
        self.machine.clock.take()
    }

    /// Runs a prompt and decode steps, so that the first request waits for nothing that is loaded at the first use. Writes to blocks that nobody
    /// has yet.
    fn warm_up(&mut self) -> Result<()> {
        let shape = self.cache.shape;
        let context = self.weights.spec.max_context.min(shape.tokens());
        let prompt = context.saturating_sub(1).clamp(1, WARM_UP_TOKENS);
        let blocks: Vec<u32> = (0..shape.blocks_for(context.min(prompt + 1)) as u32).collect();
        for soft in [false, true] {
            let routing = if soft { RoutingChoice::Soft { temperature: None } } else { RoutingChoice::Native };
            let mut batch = Batch { routes: false, ..Batch::default() };
            batch.push(&blocks, &vec![0; prompt], 0, routing, LogitRows::Last);
            self.forward(&batch)?;
        }
        // The second is recorded.
        for _ in 0..2 {
            let mut batch = Batch { routes: false, ..Batch::default() };
            batch.push(&blocks, &[0], prompt.min(context - 1), RoutingChoice::Native, LogitRows::Last);
            batch.choices.push(RowChoice::Token(TokenDraw::LIKELIEST));
            self.forward(&batch)?;
        }
        Ok(())
    }

    fn run(&mut self, batch: &Batch, observer: Option<&mut dyn MoeObserver>) -> Result<Forward> {
        let Self { weights, cache, graphs, machine } = self;
        let spec = &*weights.spec;
        check_batch(spec, batch, Some(cache.shape))?;
        let policies = Policies::of(spec, batch)?;
        let recordable = observer.is_none() && !batch.routes && !policies.on_host && !machine.clock.is_running() && only_draws(batch);
        let rounded = if recordable { step::decode_sizes(batch, cache.shape, policies.sets.len()) } else { None };
        let sizes = rounded.unwrap_or_else(|| step::exact_sizes(batch, cache.shape, policies.sets.len()));
        let heads = layer::heads(spec);
        let layout = Layout::new(sizes);
        let attention = match rounded {
            Some(sizes) => vec![Launch::decoding(heads, sizes, cache.shape, machine.multiprocessors)],
            None => Launch::of(heads, batch, machine.multiprocessors),
        };
        let values = Values::new(weights, sizes, &policies, &attention, machine.gemm)?;
        let moved = [
            machine.words.reserve(machine.stream, layout.words),
            machine.report.reserve(machine.stream, values.report.words()),
            machine.arena.reserve(values.bytes),
        ];
        // Recorded steps know the old addresses; so they do where another of the three found no memory.
        if moved.iter().any(|moved| !matches!(moved, Ok(false))) {
            graphs.clear();
        }
        moved.into_iter().collect::<Result<Vec<bool>>>()?;
        step::write(machine.words.host.values_mut(), &layout, sizes, batch, &policies);
        machine.upload(layout.words)?;

        let step = Step {
            spec,
            batch,
            sizes,
            layout: &layout,
            policies: &policies,
            values: &values,
            attention: &attention,
            quantized: weights.quantized,
        };
        let mut watch = Watch::new(batch.routes, observer, &policies);
        let mut seen = Seen::default();
        let key = Key { sizes, layers: policies.layers.clone(), splits: attention.iter().map(|launch| launch.splits).max().unwrap_or(1) };
        match if rounded.is_some() { graphs.advise(weights, &key) } else { Advice::Run } {
            Advice::Run => machine.launch(weights, cache, &step, &mut watch, &mut seen)?,
            Advice::Launch(graph) => graph.launch(machine.stream)?,
            Advice::Record => match machine.record(weights, cache, &step, &mut watch, &mut seen) {
                Ok(graph) => {
                    graph.launch(machine.stream)?;
                    graphs.keep(weights, &key, graph);
                }
                Err(error @ Error::DeviceLost(_)) => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, tokens = sizes.tokens, "a decode step cannot be recorded: steps of this size are launched kernel by kernel");
                    graphs.refuse(weights, &key);
                    machine.launch(weights, cache, &step, &mut watch, &mut seen)?;
                }
            },
        }
        machine.download(values.report.words())?;
        machine.clock.settle()?;
        self.collect(batch, &values.report, watch, seen)
    }

    /// What the report of a step says.
    fn collect(&self, batch: &Batch, report: &Report, watch: Watch<'_>, seen: Seen) -> Result<Forward> {
        let words = self.machine.report.host.values();
        let drawn = report.drawn(words, &batch.choices);
        let layers = report.layers(words, &self.weights.spec, batch.tokens.len(), watch)?;
        let vocab = self.weights.spec.vocab_size;
        let logits = candle_core::Tensor::from_vec(seen.rows, (report::rows_handed_out(batch), vocab), &candle_core::Device::Cpu)?;
        Ok(Forward { logits, drawn, layers, time: seen.time })
    }
}

/// Tokens of the prompt of a warm-up.
const WARM_UP_TOKENS: usize = 64;

/// Every sequence has one new token, and the one after it is to be drawn.
fn only_draws(batch: &Batch) -> bool {
    let one = batch.spans.iter().all(|span| span.new == 1 && span.logits != LogitRows::None);
    one && batch.choices.len() == batch.spans.len() && batch.choices.iter().all(|choice| matches!(choice, RowChoice::Token(_)))
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: nothing runs on it: what was recorded on it runs on the other.
        unsafe { self.recorder.destroy() };
    }
}

impl Machine {
    fn new(stream: Stream, weights: &GpuWeights) -> Result<Self> {
        let properties = hardmax_kernels::Device::open(0)?.properties().clone();
        Ok(Self {
            stream,
            recorder: Stream::create()?,
            multiprocessors: properties.multiprocessors,
            blas: Blas::new(stream)?,
            gemm: Gemm::of(&properties),
            arena: Arena::new(stream)?,
            frequencies: Buffer::from_slice(stream, weights.rope.inverse_frequencies(), "the frequencies of the rotary embedding")?,
            words: Mirror::new(stream, 1 << 12)?,
            report: Mirror::new(stream, 1 << 12)?,
            clock: Clock::default(),
        })
    }

    fn upload(&self, words: usize) -> Result<()> {
        Ok(self.words.device.view().write(&self.words.host.values()[..words], self.stream)?)
    }

    /// The one wait of a step.
    fn download(&mut self, words: usize) -> Result<()> {
        self.report.device.view().part(..words).read_into(&mut self.report.host, self.stream)?;
        Ok(self.stream.synchronize()?)
    }

    /// Records what [`Machine::launch`] launches, on the stream for that.
    fn record(
        &mut self,
        weights: &GpuWeights,
        cache: &Cache,
        step: &Step<'_>,
        watch: &mut Watch<'_>,
        seen: &mut Seen,
    ) -> Result<hardmax_kernels::Graph> {
        let (shared, recorder) = (self.stream, self.recorder);
        self.stream = recorder;
        self.blas.set_stream(recorder)?;
        // Whatever becomes of it, the next step is launched where steps are.
        let recorded = catch_unwind(AssertUnwindSafe(|| {
            let mut launched = Ok(());
            let graph = recorder.capture(|| {
                launched = self.launch(weights, cache, step, watch, seen);
                Ok(())
            });
            launched.and_then(|()| Ok(graph?))
        }));
        self.stream = shared;
        self.blas.set_stream(shared)?;
        recorded.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Launches all of a step, from the embedding to what is drawn.
    fn launch(&mut self, weights: &GpuWeights, cache: &Cache, step: &Step<'_>, watch: &mut Watch<'_>, seen: &mut Seen) -> Result<()> {
        self.embed(weights, step)?;
        for (index, layer) in weights.layers.iter().enumerate() {
            let started = Instant::now();
            self.attention(index, layer, cache, weights, step)?;
            let attended = Instant::now();
            self.feed_forward(index, layer, step, watch)?;
            seen.time.attention += attended - started;
            seen.time.experts += attended.elapsed();
        }
        self.head(weights, step, &mut seen.rows)
    }
}

/// What the memory of a GPU has to hold while a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Footprint {
    /// All of it in this type.
    Whole(DType),
    /// Routed experts in 8 bits, and one layer of them in bf16 as well; the rest in bf16.
    Quantized,
}

impl Footprint {
    /// Bytes of the weights of `spec`.
    fn bytes(self, spec: &ModelSpec) -> u64 {
        let all = spec.parameters().0;
        match self {
            Self::Whole(dtype) => all.saturating_mul(dtype.size_in_bytes() as u64),
            Self::Quantized => {
                let experts = || spec.moe_layers().map(|(_, moe)| (3 * spec.hidden_size * moe.expert_width * moe.num_experts) as u64);
                // A scale for 128 x 128 weights is less than a thousandth of them.
                (2 * all).saturating_sub(experts().sum()).saturating_add(2 * experts().max().unwrap_or(0))
            }
        }
    }
}

/// Fails where the weights of a model do not fit into the memory of the first GPU: before any of them is read.
pub fn check_memory(spec: &ModelSpec, footprint: Footprint) -> Result<()> {
    let (needed, free) = (footprint.bytes(spec), free_memory()?);
    if needed <= free {
        return Ok(());
    }
    Err(Error::FailedPrecondition(too_large(spec, footprint, free)))
}

/// What to do about a model that is not in its place yet and does not fit into `free` bytes.
fn too_large(spec: &ModelSpec, footprint: Footprint, free: u64) -> String {
    let how = match footprint {
        Footprint::Whole(dtype) => dtype.as_str(),
        Footprint::Quantized => "8 bits, one layer of experts more in bf16 while it is loaded",
    };
    let smaller = [(Footprint::Whole(DType::BF16), "bf16"), (Footprint::Quantized, "fp8")];
    let fits = |other: Footprint| other.bytes(spec) <= free && weights::check_shapes(spec, other == Footprint::Quantized).is_ok();
    let less = smaller.iter().find(|(other, _)| fits(*other)).map(|(_, dtype)| format!("use --dtype {dtype}, ")).unwrap_or_default();
    format!(
        "the weights of this model are {} MiB in {how}, and {} MiB are free on the GPU: end what else runs there, {less}or use a larger GPU or a smaller model",
        footprint.bytes(spec) >> 20,
        free >> 20
    )
}

/// Bytes of keys and values of one token.
pub fn token_bytes(spec: &ModelSpec) -> usize {
    KvCache::token_bytes(spec, DType::BF16)
}

impl LanguageModel for GpuDecoder {
    fn spec(&self) -> &ModelSpec {
        &self.weights.spec
    }

    fn cache(&self) -> CacheShape {
        self.cache.shape
    }

    fn draws(&self) -> bool {
        true
    }

    fn forward(&mut self, batch: &Batch) -> Result<Forward> {
        self.run(batch, None)
    }

    fn exchange(&mut self, weights: SharedWeights) -> Result<SharedWeights> {
        let weights = fitting(&weights, &self.weights.spec, |weights: &GpuWeights| &weights.spec)?;
        if weights.stream() != self.weights.stream() {
            return Err(Error::FailedPrecondition("these weights are on another device than the served ones".into()));
        }
        Ok(SharedWeights::new(std::mem::replace(&mut self.weights, weights)))
    }
}

impl Observable for GpuDecoder {
    fn forward_observed(&mut self, batch: &Batch, observer: &mut dyn MoeObserver) -> Result<Forward> {
        self.run(batch, Some(observer))
    }
}
