//! One decoder layer on the host.

use std::{ops::Range, time::Instant};

use candle_core::Tensor;

use super::{
    super::{
        Batch, FeedForwardSpec, ForwardTime, ModelSpec, MoeSpec, QkNorm, Span,
        kv_cache::KvCache,
        weights::{AttentionWeights, FeedForwardWeights, LayerWeights, MoeWeights, SwiGluWeights},
    },
    Buffers,
    matrix::{HostMatrix, vector},
    rows::{by_rows, grow, rms_norm, rms_norm_in_place, rope},
};
use crate::{
    error::{Error, Result},
    moe::{
        LayerRouting, Routing, SparseRouting,
        observe::{ExpertOutputs, MoeObserver, ObservedLayer},
        plan::DispatchPlan,
    },
    ops::{
        cpu::{
            Arithmetic, AttentionShape, Bf16Unit, Disjoint, Expert, Input, KeyLayout, KeyValue, Matrix, Output, Product, Reduction,
            Scratch, Store, attention,
        },
        refill,
    },
};

/// What the layers of a step share.
pub(super) struct Step<'a> {
    pub(super) spec: &'a ModelSpec,
    pub(super) arithmetic: &'a Arithmetic,
    pub(super) batch: &'a Batch,
    pub(super) cache: &'a mut KvCache,
    pub(super) buffers: &'a mut Buffers,
    /// What earlier steps said of the layers that are still to come, for its memory; the last is for the next layer.
    pub(super) spare: &'a mut Vec<LayerRouting>,
    /// Who is shown every MoE layer.
    pub(super) observer: Option<&'a mut dyn MoeObserver>,
    pub(super) time: ForwardTime,
    /// The most elements of `routed` that a layer needed.
    pub(super) routed: usize,
}

#[derive(Debug)]
pub(super) struct Layer {
    index: usize,
    attention_norm: Vec<f32>,
    attention: Attention,
    feed_forward_norm: Vec<f32>,
    feed_forward: FeedForward,
}

#[derive(Debug)]
struct Attention {
    shape: AttentionShape,
    query: HostMatrix,
    key: HostMatrix,
    value: HostMatrix,
    output: HostMatrix,
    qkv_bias: Option<[Vec<f32>; 3]>,
    output_bias: Option<Vec<f32>>,
    qk_norm: Option<[Vec<f32>; 2]>,
}

#[derive(Debug)]
enum FeedForward {
    Dense(SwiGlu),
    Moe(Box<Moe>),
}

/// `[2F, D]` and `[D, F]`, or a stack of them.
#[derive(Debug)]
struct SwiGlu {
    gate_up: HostMatrix,
    down: HostMatrix,
}

#[derive(Debug)]
struct Moe {
    spec: MoeSpec,
    /// `[E, D]` f32.
    router: HostMatrix,
    experts: SwiGlu,
    /// With its gate, `[D]`.
    shared: Option<(SwiGlu, Vec<f32>)>,
}

impl Layer {
    pub(super) fn new(index: usize, spec: &ModelSpec, weights: LayerWeights, quantize: bool) -> Result<Self> {
        let feed_forward = match (&spec.layers[index].feed_forward, weights.feed_forward) {
            (FeedForwardSpec::Dense { .. }, FeedForwardWeights::Dense(mlp)) => FeedForward::Dense(SwiGlu::new(&mlp, quantize)?),
            (FeedForwardSpec::Moe(moe), FeedForwardWeights::Moe(weights)) => FeedForward::Moe(Box::new(Moe::new(moe, &weights, quantize)?)),
            _ => return Err(Error::Internal(format!("layer {index}: spec and weights disagree on dense or routed"))),
        };
        Ok(Self {
            index,
            attention_norm: vector(&weights.attention_norm)?,
            attention: Attention::new(index, spec, &weights.attention, quantize)?,
            feed_forward_norm: vector(&weights.feed_forward_norm)?,
            feed_forward,
        })
    }

    /// Adds what this layer makes of the residual stream to it; what its router did.
    pub(super) fn forward(&self, step: &mut Step<'_>) -> Result<Option<LayerRouting>> {
        let started = Instant::now();
        step.norm(&self.attention_norm);
        self.attention.forward(self.index, step)?;
        let attended = Instant::now();
        step.norm(&self.feed_forward_norm);
        let routing = match &self.feed_forward {
            FeedForward::Dense(mlp) => {
                step.dense(mlp, None)?;
                None
            }
            FeedForward::Moe(moe) => Some(step.moe(self.index, moe)?),
        };
        step.time.attention += attended - started;
        step.time.experts += attended.elapsed();
        Ok(routing)
    }
}

impl SwiGlu {
    fn new(weights: &SwiGluWeights, quantize: bool) -> Result<Self> {
        Ok(Self { gate_up: HostMatrix::new(&weights.gate_up, quantize)?, down: HostMatrix::new(&weights.down, quantize)? })
    }
}

impl Moe {
    fn new(spec: &MoeSpec, weights: &MoeWeights, quantize: bool) -> Result<Self> {
        let shared = weights.shared.as_ref().map(|shared| Ok::<_, Error>((SwiGlu::new(&shared.expert, quantize)?, vector(&shared.gate)?)));
        Ok(Self {
            spec: spec.clone(),
            router: HostMatrix::new(&weights.router, false)?,
            experts: SwiGlu { gate_up: HostMatrix::new(&weights.gate_up, quantize)?, down: HostMatrix::new(&weights.down, quantize)? },
            shared: shared.transpose()?,
        })
    }
}

impl Attention {
    fn new(index: usize, spec: &ModelSpec, weights: &AttentionWeights, quantize: bool) -> Result<Self> {
        let shape = AttentionShape {
            heads: spec.num_heads,
            kv_heads: spec.num_kv_heads,
            head_dim: spec.head_dim,
            window: spec.layers[index].sliding_window,
        };
        let matrix = |tensor: &Tensor| HostMatrix::new(tensor, quantize);
        let biases = weights.qkv_bias.as_ref().map(|[q, k, v]| Ok::<_, Error>([vector(q)?, vector(k)?, vector(v)?]));
        let norms = weights.qk_norm.as_ref().map(|[q, k]| Ok::<_, Error>([vector(q)?, vector(k)?]));
        Ok(Self {
            shape,
            query: matrix(&weights.query)?,
            key: matrix(&weights.key)?,
            value: matrix(&weights.value)?,
            output: matrix(&weights.output)?,
            qkv_bias: biases.transpose()?,
            output_bias: weights.output_bias.as_ref().map(vector).transpose()?,
            qk_norm: norms.transpose()?,
        })
    }

    /// Attention over `normed`, added to the residual stream.
    fn forward(&self, layer: usize, step: &mut Step<'_>) -> Result<()> {
        let Step { spec, arithmetic, batch, cache, buffers, .. } = step;
        let (spec, batch) = (*spec, *batch);
        let Buffers { x, normed, qkv, queries, attended, cos, sin, scratch, .. } = &mut **buffers;
        let (t, d) = (batch.tokens.len(), spec.hidden_size);
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let (q_width, kv_width) = (heads * head_dim, kv_heads * head_dim);
        let width = q_width + 2 * kv_width;
        grow(qkv, t * width);
        grow(queries, t * q_width);
        grow(attended, t * q_width);
        {
            let (query, key, value) = (self.query.lend(), self.key.lend(), self.value.lend());
            let parts = [(query.matrix()?, 0), (key.matrix()?, q_width), (value.matrix()?, q_width + kv_width)];
            let products = parts.map(|(weights, column)| Product { weights, rows: 0..t, column });
            let output = Output { values: qkv, stride: width, store: Store::Set };
            arithmetic.linear(scratch, Input { x: normed, k: d, source: None }, &products, output);
        }
        {
            let (qkv, queries) = (Disjoint::new(qkv), Disjoint::new(queries));
            let half = head_dim / 2;
            by_rows(t, |rows| {
                for row in rows {
                    // SAFETY: each row is worked on by one task.
                    let (qkv, to) =
                        unsafe { (qkv.slice(row * width..(row + 1) * width), queries.slice(row * q_width..(row + 1) * q_width)) };
                    let (cos, sin) = (&cos[row * half..(row + 1) * half], &sin[row * half..(row + 1) * half]);
                    self.shape_row(spec, qkv, (q_width, kv_width), (cos, sin));
                    to.copy_from_slice(&qkv[..q_width]);
                }
            });
        }
        cache.write_rows(layer, batch, &qkv[..t * width], width, q_width)?;

        let block_tokens = cache.shape().block_tokens;
        let (keys, values) = cache.host_layer(layer)?;
        let sequence = |span: &Span| {
            let layout = KeyLayout::Paged { table: batch.table(span), block_tokens };
            KeyValue { past: span.past, new: span.new, keys, values, layout }
        };
        let sequences: Vec<KeyValue<'_>> = batch.spans.iter().map(sequence).collect();
        // As its weights, so its products. One form for any number of queries where the batch must not matter.
        let narrow = self.query.is_narrow() && arithmetic.reduction == Reduction::Fastest;
        let bf16 = if narrow { arithmetic.bf16 } else { Bf16Unit::None };
        attention(arithmetic.isa, bf16, &queries[..t * q_width], &sequences, self.shape, &mut attended[..t * q_width]);

        let output = self.output.lend();
        let product = Product { weights: output.matrix()?, rows: 0..t, column: 0 };
        let input = Input { x: attended, k: q_width, source: None };
        arithmetic.linear(scratch, input, &[product], Output { values: x, stride: d, store: Store::Add });
        if let Some(bias) = &self.output_bias {
            x.chunks_exact_mut(d).take(t).for_each(|x| add(x, bias));
        }
        Ok(())
    }

    /// Bias, norm, clip and rotation of one row of queries, keys and values.
    fn shape_row(&self, spec: &ModelSpec, qkv: &mut [f32], (q_width, kv_width): (usize, usize), (cos, sin): (&[f32], &[f32])) {
        let (head_dim, eps) = (self.shape.head_dim, spec.rms_norm_eps as f32);
        let (q, kv) = qkv.split_at_mut(q_width);
        let (k, v) = kv.split_at_mut(kv_width);
        if let Some([q_bias, k_bias, v_bias]) = &self.qkv_bias {
            add(q, q_bias);
            add(k, k_bias);
            add(v, v_bias);
        }
        if let Some([q_norm, k_norm]) = &self.qk_norm {
            match spec.qk_norm {
                QkNorm::PerHead => {
                    q.chunks_exact_mut(head_dim).for_each(|head| rms_norm_in_place(head, q_norm, eps));
                    k.chunks_exact_mut(head_dim).for_each(|head| rms_norm_in_place(head, k_norm, eps));
                }
                QkNorm::Full => {
                    rms_norm_in_place(q, q_norm, eps);
                    rms_norm_in_place(k, k_norm, eps);
                }
                QkNorm::None => {}
            }
        }
        if let Some(limit) = spec.clip_qkv {
            for x in q.iter_mut().chain(&mut *k).chain(&mut *v) {
                *x = x.clamp(-limit, limit);
            }
        }
        q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)).for_each(|head| rope(head, cos, sin));
    }
}

impl Step<'_> {
    /// RMSNorm of the residual stream, into `normed`.
    fn norm(&mut self, weight: &[f32]) {
        let (t, d, eps) = (self.batch.tokens.len(), self.spec.hidden_size, self.spec.rms_norm_eps as f32);
        let Buffers { x, normed, .. } = &mut *self.buffers;
        grow(normed, t * d);
        let out = Disjoint::new(normed);
        by_rows(t, |rows| {
            for row in rows {
                // SAFETY: each row is worked on by one task.
                let out = unsafe { out.slice(row * d..(row + 1) * d) };
                rms_norm(&x[row * d..(row + 1) * d], weight, eps, out);
            }
        });
    }

    /// Adds `gate_t · mlp(normed_t)` to the residual stream; gates `[T]`, or 1.
    fn dense(&mut self, mlp: &SwiGlu, gates: Option<&[f32]>) -> Result<()> {
        let (t, d) = (self.batch.tokens.len(), self.spec.hidden_size);
        let Buffers { x, normed, routed, scratch, .. } = &mut *self.buffers;
        self.routed = self.routed.max(t * d);
        grow(routed, t * d);
        let (gate_up, down) = (mlp.gate_up.lend(), mlp.down.lend());
        let expert = Expert { gate_up: gate_up.matrix()?, down: down.matrix()?, rows: 0..t };
        self.arithmetic.experts(scratch, Input { x: normed, k: d, source: None }, &[expert], routed);
        let out = Disjoint::new(x);
        by_rows(t, |rows| {
            for row in rows {
                // SAFETY: each row is worked on by one task.
                let x = unsafe { out.slice(row * d..(row + 1) * d) };
                add_scaled(x, &routed[row * d..(row + 1) * d], gates.map_or(1.0, |gates| gates[row]));
            }
        });
        Ok(())
    }

    /// Adds what the routed experts, and the shared one, make of `normed` to the residual stream.
    fn moe(&mut self, index: usize, moe: &Moe) -> Result<LayerRouting> {
        let (t, d, e) = (self.batch.tokens.len(), self.spec.hidden_size, moe.spec.num_experts);
        let Buffers { x, normed, router_logits, routed, route, scratch, .. } = &mut *self.buffers;
        grow(router_logits, t * e);
        {
            let router = moe.router.lend();
            let product = Product { weights: router.matrix()?, rows: 0..t, column: 0 };
            let output = Output { values: router_logits, stride: e, store: Store::Set };
            self.arithmetic.linear(scratch, Input { x: normed, k: d, source: None }, &[product], output);
        }
        let logits = &router_logits[..t * e];
        let runs = self.batch.spans.iter().map(|span| (&span.routing, span.new));
        let spare = self.spare.pop().map(|LayerRouting { router_logits, routing, stats, .. }| {
            route.stats = stats;
            if let Routing::Sparse(routing) = routing {
                route.routing = routing;
            }
            router_logits
        });
        route.fill((index, &moe.spec), self.spec.reference, logits, runs)?;
        let plan = &route.plan;
        {
            self.routed = self.routed.max(plan.tokens.len() * d);
            grow(routed, plan.tokens.len() * d);
            let (gate_up, down) = (moe.experts.gate_up.lend(), moe.experts.down.lend());
            let (gate_up, down) = (gate_up.matrix()?, down.matrix()?);
            let experts = Stack { gate_up, down, experts: e, x: normed, d };
            self.arithmetic.experts(scratch, experts.input(plan), &experts.of(plan), routed);
            let out = Disjoint::new(x);
            by_rows(t, |rows| {
                for row in rows {
                    // SAFETY: each row is worked on by one task.
                    let x = unsafe { out.slice(row * d..(row + 1) * d) };
                    for (place, weight) in plan.routes(row) {
                        add_scaled(x, &routed[place * d..(place + 1) * d], weight);
                    }
                }
            });
            if let Some(observer) = self.observer.as_deref_mut() {
                observer.layer(&ObservedLayer {
                    layer: index,
                    spec: &moe.spec,
                    x: &normed[..t * d],
                    router_logits: logits,
                    routing: &route.routing,
                    computed: Some((plan, routed)),
                    experts: &(self.arithmetic, experts),
                })?;
            }
            // So that their logits say what happened.
            route.non_finite().iter().for_each(|&row| x[row as usize * d..(row as usize + 1) * d].fill(f32::NAN));
        }
        let router_logits = refill(spare, (t, e), |values| values.copy_from_slice(logits))?;
        let (routing, stats) = (std::mem::take(&mut route.routing), std::mem::take(&mut route.stats));
        if let Some((expert, gate)) = &moe.shared {
            let sigmoid = |row: &[f32]| 1.0 / (1.0 + (-row.iter().zip(gate).map(|(x, w)| x * w).sum::<f32>()).exp());
            let gates: Vec<f32> = self.buffers.normed.chunks_exact(d).take(t).map(sigmoid).collect();
            self.dense(expert, Some(&gates))?;
        }
        Ok(LayerRouting { layer: index, router_logits, routing: Routing::Sparse(routing), stats })
    }
}

/// The routed experts of a layer, lent, and the rows that they read.
#[derive(Clone, Copy)]
struct Stack<'a> {
    gate_up: Matrix<'a>,
    down: Matrix<'a>,
    experts: usize,
    /// `[T, D]`.
    x: &'a [f32],
    d: usize,
}

impl<'a> Stack<'a> {
    /// Those that have rows.
    fn of(&self, plan: &DispatchPlan) -> Vec<Expert<'a>> {
        let (d, f2) = (self.d, self.gate_up.rows() / self.experts);
        let expert = |(expert, rows): (usize, Range<usize>)| Expert {
            gate_up: self.gate_up.part(expert * f2, f2),
            down: self.down.part(expert * d, d),
            rows,
        };
        plan.active().map(expert).collect()
    }

    fn input<'b>(&self, plan: &'b DispatchPlan) -> Input<'b>
    where
        'a: 'b,
    {
        Input { x: self.x, k: self.d, source: Some(&plan.tokens) }
    }
}

impl ExpertOutputs for (&Arithmetic, Stack<'_>) {
    fn outputs(&self, routing: &SparseRouting) -> Result<Vec<f32>> {
        let (arithmetic, stack) = self;
        let (d, plan) = (stack.d, DispatchPlan::new(routing, stack.experts));
        let mut sorted = vec![0f32; plan.tokens.len() * d];
        arithmetic.experts(&mut Scratch::default(), stack.input(&plan), &stack.of(&plan), &mut sorted);
        let places = (0..plan.num_tokens()).flat_map(|token| plan.routes(token));
        Ok(places.flat_map(|(row, _)| sorted[row * d..][..d].iter().copied()).collect())
    }
}

fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

fn add_scaled(x: &mut [f32], y: &[f32], scale: f32) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += scale * y);
}
