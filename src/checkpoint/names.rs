//! Where every weight lies on disk: data, no tensor code.
//!
//! A weight in canonical form ([`crate::model::weights`]) is the concatenation of one or more tensors on disk along its
//! leading dimension: `gate_up [E, 2F, D]` is, expert by expert, a gate and an up matrix; or it is one stacked tensor.
//! The same table serves loading and saving.

use crate::model::{FeedForwardSpec, ModelSpec, QkNorm};

/// Tensor names of a family. Everything outside the experts is called the same in all families.
#[derive(Clone, Copy, Debug)]
pub(super) struct WeightNames {
    /// Module of the experts inside a layer: first as published, then other spellings in circulation.
    pub(super) moe: &'static [&'static str],
    /// Gate, up and down matrix of an expert.
    pub(super) experts: [&'static str; 3],
}

/// A weight of the canonical form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Weight {
    Embedding,
    FinalNorm,
    Head,
    /// In the decoder layer of that index.
    Layer(usize, LayerWeight),
}

/// A weight of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum LayerWeight {
    AttentionNorm,
    Query,
    Key,
    Value,
    Output,
    QueryBias,
    KeyBias,
    ValueBias,
    OutputBias,
    QueryNorm,
    KeyNorm,
    FeedForwardNorm,
    DenseGateUp,
    DenseDown,
    Router,
    ExpertsGateUp,
    ExpertsDown,
    SharedGateUp,
    SharedDown,
    SharedGate,
}

impl Weight {
    /// The same name as in [`ModelWeights::named`](crate::model::weights::ModelWeights::named).
    pub(super) fn name(self) -> String {
        match self {
            Self::Embedding => "embedding".into(),
            Self::FinalNorm => "final_norm".into(),
            Self::Head => "head".into(),
            Self::Layer(index, weight) => format!("layers.{index}.{}", weight.name()),
        }
    }
}

impl LayerWeight {
    fn name(self) -> &'static str {
        match self {
            Self::AttentionNorm => "attention_norm",
            Self::Query => "query",
            Self::Key => "key",
            Self::Value => "value",
            Self::Output => "output",
            Self::QueryBias => "query_bias",
            Self::KeyBias => "key_bias",
            Self::ValueBias => "value_bias",
            Self::OutputBias => "output_bias",
            Self::QueryNorm => "query_norm",
            Self::KeyNorm => "key_norm",
            Self::FeedForwardNorm => "feed_forward_norm",
            Self::DenseGateUp => "dense.gate_up",
            Self::DenseDown => "dense.down",
            Self::Router => "router",
            Self::ExpertsGateUp => "experts.gate_up",
            Self::ExpertsDown => "experts.down",
            Self::SharedGateUp => "shared.gate_up",
            Self::SharedDown => "shared.down",
            Self::SharedGate => "shared.gate",
        }
    }
}

/// How experts lie on disk in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExpertLayout {
    /// Module of the experts, one of [`WeightNames::moe`].
    module: &'static str,
    /// One tensor for all experts instead of one for each.
    stacked: bool,
}

/// A tensor on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
}

/// A weight and the tensors that make it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Source {
    /// Canonical shape.
    pub(super) shape: Vec<usize>,
    /// In the order of their rows.
    pub(super) parts: Vec<Part>,
    /// Kept in f32 whatever the dtype of the model.
    pub(super) f32: bool,
    /// Must be finite: one bad router value reroutes every token.
    pub(super) router: bool,
}

/// All weights of a model, in order of depth.
pub(super) fn weights(spec: &ModelSpec) -> Vec<Weight> {
    let layers =
        spec.layers.iter().enumerate().flat_map(|(index, layer)| {
            layer_weights(spec, &layer.feed_forward).into_iter().map(move |weight| Weight::Layer(index, weight))
        });
    let head = (!spec.tied_head).then_some(Weight::Head);
    [Weight::Embedding].into_iter().chain(layers).chain([Weight::FinalNorm]).chain(head).collect()
}

fn layer_weights(spec: &ModelSpec, feed_forward: &FeedForwardSpec) -> Vec<LayerWeight> {
    use LayerWeight::*;
    let mut all = vec![AttentionNorm, Query, Key, Value, Output];
    if spec.qkv_bias {
        all.extend([QueryBias, KeyBias, ValueBias]);
    }
    if spec.out_bias {
        all.push(OutputBias);
    }
    if spec.qk_norm != QkNorm::None {
        all.extend([QueryNorm, KeyNorm]);
    }
    all.push(FeedForwardNorm);
    match feed_forward {
        FeedForwardSpec::Dense { .. } => all.extend([DenseGateUp, DenseDown]),
        FeedForwardSpec::Moe(moe) => {
            all.extend([Router, ExpertsGateUp, ExpertsDown]);
            if moe.shared_expert_width.is_some() {
                all.extend([SharedGateUp, SharedDown, SharedGate]);
            }
        }
    }
    all
}

impl WeightNames {
    /// The layout in which this program writes: as published, one tensor for each expert.
    pub(super) fn published(&self) -> ExpertLayout {
        ExpertLayout { module: self.moe.first().copied().unwrap_or("mlp"), stacked: false }
    }

    /// The layout of one layer, by the names that are there. As published where nothing fits, so that messages name
    /// the tensors one would look for.
    pub(super) fn detect(&self, layer: usize, exists: impl Fn(&str) -> bool) -> ExpertLayout {
        let module = self.moe.iter().copied().find(|module| exists(&format!("model.layers.{layer}.{module}.gate.weight")));
        let published = self.published();
        let module = module.unwrap_or(published.module);
        ExpertLayout { module, stacked: exists(&format!("model.layers.{layer}.{module}.experts.gate_up_proj")) }
    }

    /// The tensors that make `weight`. `layout` counts for the experts of its layer only.
    pub(super) fn source(&self, spec: &ModelSpec, weight: Weight, layout: ExpertLayout) -> Source {
        let (v, d) = (spec.vocab_size, spec.hidden_size);
        match weight {
            Weight::Embedding => Source::one("model.embed_tokens.weight", &[v, d]),
            Weight::FinalNorm => Source::one("model.norm.weight", &[d]).in_f32(),
            Weight::Head => Source::one("lm_head.weight", &[v, d]),
            Weight::Layer(index, weight) => self.layer_source(spec, index, weight, layout),
        }
    }

    fn layer_source(&self, spec: &ModelSpec, index: usize, weight: LayerWeight, layout: ExpertLayout) -> Source {
        let d = spec.hidden_size;
        let (q, k) = (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim);
        let (query_norm, key_norm) = if spec.qk_norm == QkNorm::Full { (q, k) } else { (spec.head_dim, spec.head_dim) };
        // The width of the dense part, or of one expert.
        let (width, experts, shared) = match spec.layers.get(index).map(|layer| &layer.feed_forward) {
            Some(FeedForwardSpec::Dense { width }) => (*width, 0, 0),
            Some(FeedForwardSpec::Moe(moe)) => (moe.expert_width, moe.num_experts, moe.shared_expert_width.unwrap_or(0)),
            None => (0, 0, 0),
        };
        let at = |name: &str| format!("model.layers.{index}.{name}");
        let module = at(layout.module);
        use LayerWeight::*;
        match weight {
            AttentionNorm => Source::one(at("input_layernorm.weight"), &[d]).in_f32(),
            Query => Source::one(at("self_attn.q_proj.weight"), &[q, d]),
            Key => Source::one(at("self_attn.k_proj.weight"), &[k, d]),
            Value => Source::one(at("self_attn.v_proj.weight"), &[k, d]),
            Output => Source::one(at("self_attn.o_proj.weight"), &[d, q]),
            QueryBias => Source::one(at("self_attn.q_proj.bias"), &[q]).in_f32(),
            KeyBias => Source::one(at("self_attn.k_proj.bias"), &[k]).in_f32(),
            ValueBias => Source::one(at("self_attn.v_proj.bias"), &[k]).in_f32(),
            OutputBias => Source::one(at("self_attn.o_proj.bias"), &[d]).in_f32(),
            QueryNorm => Source::one(at("self_attn.q_norm.weight"), &[query_norm]).in_f32(),
            KeyNorm => Source::one(at("self_attn.k_norm.weight"), &[key_norm]).in_f32(),
            FeedForwardNorm => Source::one(at("post_attention_layernorm.weight"), &[d]).in_f32(),
            DenseGateUp => Source::gate_up(&at("mlp"), width, d),
            DenseDown => Source::one(at("mlp.down_proj.weight"), &[d, width]),
            Router => Source { router: true, ..Source::one(format!("{module}.gate.weight"), &[experts, d]).in_f32() },
            ExpertsGateUp => self.experts(&module, &[0, 1], layout, experts, &[width, d]),
            ExpertsDown => self.experts(&module, &[2], layout, experts, &[d, width]),
            SharedGateUp => Source::gate_up(&format!("{module}.shared_expert"), shared, d),
            SharedDown => Source::one(format!("{module}.shared_expert.down_proj.weight"), &[d, shared]),
            SharedGate => Source::one(format!("{module}.shared_expert_gate.weight"), &[1, d]).in_f32(),
        }
    }

    /// The `which` matrices of all experts, `matrix` being the shape of one.
    fn experts(&self, module: &str, which: &[usize], layout: ExpertLayout, experts: usize, matrix: &[usize; 2]) -> Source {
        let shape = [experts, which.len() * matrix[0], matrix[1]];
        if layout.stacked {
            let name = if which.len() == 2 { "gate_up_proj" } else { "down_proj" };
            return Source::one(format!("{module}.experts.{name}"), &shape);
        }
        let names = (0..experts).flat_map(|expert| which.iter().map(move |matrix| (expert, self.experts[*matrix])));
        let part = |(expert, name)| Part { name: format!("{module}.experts.{expert}.{name}.weight"), shape: matrix.to_vec() };
        Source { shape: shape.to_vec(), parts: names.map(part).collect(), f32: false, router: false }
    }
}

impl Source {
    fn one(name: impl Into<String>, shape: &[usize]) -> Self {
        let part = Part { name: name.into(), shape: shape.to_vec() };
        Self { shape: shape.to_vec(), parts: vec![part], f32: false, router: false }
    }

    fn gate_up(module: &str, width: usize, d: usize) -> Self {
        let part = |name: &str| Part { name: format!("{module}.{name}.weight"), shape: vec![width, d] };
        Self { shape: vec![2 * width, d], parts: vec![part("gate_proj"), part("up_proj")], f32: false, router: false }
    }

    fn in_f32(self) -> Self {
        Self { f32: true, ..self }
    }

    /// Number of elements.
    pub(super) fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Tensors that published files carry and nobody needs.
pub(super) fn harmless(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
}
