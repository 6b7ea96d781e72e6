//! The weights of a decoder in one canonical form, whatever names and layout they have on disk.
//!
//! Shapes: V vocabulary, D model width, Q = heads · head_dim, K = kv_heads · head_dim, E experts, F hidden width.
//! Linear weights are `[out, in]`. Norms, biases, the router and the gate of the shared expert are f32; the rest has
//! the dtype of the model.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Tensor};

use crate::{
    error::{Error, Result},
    ops,
};

/// All weights of a model.
#[derive(Clone, Debug)]
pub struct ModelWeights {
    /// `[V, D]`.
    pub embedding: Tensor,
    /// In order of depth.
    pub layers: Vec<LayerWeights>,
    /// `[D]`.
    pub final_norm: Tensor,
    /// `[V, D]`; `None` where the head is the embedding.
    pub head: Option<Tensor>,
}

/// What of the weights is in no layer.
#[derive(Clone, Debug)]
pub struct OuterWeights {
    /// `[V, D]`.
    pub embedding: Tensor,
    /// `[D]`.
    pub final_norm: Tensor,
    /// `[V, D]`; `None` where the head is the embedding.
    pub head: Option<Tensor>,
}

/// One decoder layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `[D]`, before attention.
    pub attention_norm: Tensor,
    /// Attention.
    pub attention: AttentionWeights,
    /// `[D]`, before the feed-forward part.
    pub feed_forward_norm: Tensor,
    /// Dense or routed.
    pub feed_forward: FeedForwardWeights,
}

/// Attention projections.
#[derive(Clone, Debug)]
pub struct AttentionWeights {
    /// `[Q, D]`.
    pub query: Tensor,
    /// `[K, D]`.
    pub key: Tensor,
    /// `[K, D]`.
    pub value: Tensor,
    /// `[D, Q]`.
    pub output: Tensor,
    /// `[Q]`, `[K]`, `[K]`.
    pub qkv_bias: Option<[Tensor; 3]>,
    /// `[D]`.
    pub output_bias: Option<Tensor>,
    /// Weights of the query and key norms: `[head_dim]` each per head, `[Q]` and `[K]` over the whole projection.
    pub qk_norm: Option<[Tensor; 2]>,
}

/// The feed-forward part of a layer.
#[derive(Clone, Debug)]
pub enum FeedForwardWeights {
    /// One SwiGLU.
    Dense(SwiGluWeights),
    /// Routed experts.
    Moe(MoeWeights),
}

/// `down(silu(gate x) ⊙ up x)`.
#[derive(Clone, Debug)]
pub struct SwiGluWeights {
    /// `[2F, D]`: F rows of gate, then F rows of up.
    pub gate_up: Tensor,
    /// `[D, F]`.
    pub down: Tensor,
}

/// Router and experts of one layer.
#[derive(Clone, Debug)]
pub struct MoeWeights {
    /// `[E, D]` f32.
    pub router: Tensor,
    /// `[E, 2F, D]`: in each expert F rows of gate, then F rows of up.
    pub gate_up: Tensor,
    /// `[E, D, F]`.
    pub down: Tensor,
    /// The expert that every token takes.
    pub shared: Option<SharedExpertWeights>,
}

/// `sigmoid(gate · x) * swiglu(x)`, for every token.
#[derive(Clone, Debug)]
pub struct SharedExpertWeights {
    /// The expert.
    pub expert: SwiGluWeights,
    /// `[1, D]` f32.
    pub gate: Tensor,
}

impl ModelWeights {
    /// Every tensor with its name, in order of depth: `embedding`, `layers.N.query` and the like, `final_norm`, `head`.
    pub fn named(&self) -> Vec<(String, &Tensor)> {
        let mut all = vec![("embedding".to_owned(), &self.embedding)];
        for (index, layer) in self.layers.iter().enumerate() {
            all.extend(layer.named().into_iter().map(|(name, tensor)| (format!("layers.{index}.{name}"), tensor)));
        }
        all.push(("final_norm".into(), &self.final_norm));
        all.extend(self.head.iter().map(|head| ("head".to_owned(), head)));
        all
    }

    /// A copy with `f` of every tensor and its name, those of [`ModelWeights::named`].
    pub fn map_named(&self, f: &mut impl FnMut(&str, &Tensor) -> Tensor) -> Self {
        let mut layer =
            |(index, layer): (usize, &LayerWeights)| layer.map(&mut |name, tensor| f(&format!("layers.{index}.{name}"), tensor));
        let layers = self.layers.iter().enumerate().map(&mut layer).collect();
        Self {
            embedding: f("embedding", &self.embedding),
            layers,
            final_norm: f("final_norm", &self.final_norm),
            head: self.head.as_ref().map(|head| f("head", head)),
        }
    }

    /// Whether they are on a device: then they are made, used and dropped while nobody else launches anything there.
    pub fn on_device(&self) -> bool {
        !ops::runs_here(self.embedding.device())
    }

    /// Element type of what goes into products with them: f32 on the CPU, that of the large weights on a device.
    pub fn products(&self) -> DType {
        if self.on_device() { self.embedding.dtype() } else { DType::F32 }
    }

    /// The same tensors without gradients, sharing storage.
    pub fn detached(&self) -> Self {
        self.map_named(&mut |_, tensor| tensor.detach())
    }

    /// With other values for some tensors, in the element type and on the device of those that they replace. The rest is shared.
    ///
    /// # Errors
    /// `NotFound` on a name that is none of [`ModelWeights::named`], `FailedPrecondition` on another shape.
    pub fn with(&self, changed: &BTreeMap<String, Tensor>) -> Result<Self> {
        let mut changes = Changes::new(changed);
        let fitted = changes.fit(self.named())?;
        changes.finish()?;
        Ok(self.map_named(&mut |name, tensor| fitted.get(name).unwrap_or(tensor).clone()))
    }
}

/// Other values for some tensors of a model, by the names of [`ModelWeights::named`], for weights that come part by part.
#[derive(Debug)]
pub struct Changes<'a> {
    tensors: &'a BTreeMap<String, Tensor>,
    /// Names that had no place yet.
    left: BTreeSet<&'a str>,
}

impl<'a> Changes<'a> {
    /// All of `tensors`.
    pub fn new(tensors: &'a BTreeMap<String, Tensor>) -> Self {
        Self { tensors, left: tensors.keys().map(String::as_str).collect() }
    }

    /// `outer` with what is for it.
    ///
    /// # Errors
    /// `FailedPrecondition` on another shape.
    pub fn outer(&mut self, outer: OuterWeights) -> Result<OuterWeights> {
        let OuterWeights { embedding, final_norm, head } = outer;
        let named = [("embedding", Some(&embedding)), ("final_norm", Some(&final_norm)), ("head", head.as_ref())];
        let mut fitted = self.fit(named.into_iter().filter_map(|(name, tensor)| Some((name.to_owned(), tensor?))))?;
        Ok(OuterWeights {
            embedding: fitted.remove("embedding").unwrap_or(embedding),
            final_norm: fitted.remove("final_norm").unwrap_or(final_norm),
            head: fitted.remove("head").or(head),
        })
    }

    /// Layer `index` with what is for it.
    ///
    /// # Errors
    /// `FailedPrecondition` on another shape.
    pub fn layer(&mut self, index: usize, layer: LayerWeights) -> Result<LayerWeights> {
        let full = |name: &str| format!("layers.{index}.{name}");
        let fitted = self.fit(layer.named().into_iter().map(|(name, tensor)| (full(name), tensor)))?;
        if fitted.is_empty() {
            return Ok(layer);
        }
        Ok(layer.map(&mut |name, tensor| fitted.get(&full(name)).unwrap_or(tensor).clone()))
    }

    /// Fails where a name had no place: `NotFound`.
    pub fn finish(self) -> Result<()> {
        self.left.first().map_or(Ok(()), |name| Err(Error::NotFound(format!("the model has no tensor {name}"))))
    }

    /// What is for these places, in the element type and on the device of what is there.
    fn fit<'t>(&mut self, places: impl IntoIterator<Item = (String, &'t Tensor)>) -> Result<BTreeMap<String, Tensor>> {
        let mut fitted = BTreeMap::new();
        for (name, place) in places {
            let Some(tensor) = self.tensors.get(&name) else { continue };
            if place.shape() != tensor.shape() {
                let message =
                    format!("{name} has shape {:?} in the model, and {:?} where it is to be replaced", place.dims(), tensor.dims());
                return Err(Error::FailedPrecondition(message));
            }
            self.left.remove(name.as_str());
            fitted.insert(name, tensor.detach().to_dtype(place.dtype())?.to_device(place.device())?);
        }
        Ok(fitted)
    }
}

impl LayerWeights {
    fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let Self { attention_norm, attention, feed_forward_norm, feed_forward } = self;
        let AttentionWeights { query, key, value, output, qkv_bias, output_bias, qk_norm } = attention;
        let mut all = vec![("attention_norm", attention_norm), ("query", query), ("key", key), ("value", value), ("output", output)];
        if let Some([query, key, value]) = qkv_bias {
            all.extend([("query_bias", query), ("key_bias", key), ("value_bias", value)]);
        }
        all.extend(output_bias.iter().map(|bias| ("output_bias", bias)));
        if let Some([query, key]) = qk_norm {
            all.extend([("query_norm", query), ("key_norm", key)]);
        }
        all.push(("feed_forward_norm", feed_forward_norm));
        match feed_forward {
            FeedForwardWeights::Dense(mlp) => all.extend([("dense.gate_up", &mlp.gate_up), ("dense.down", &mlp.down)]),
            FeedForwardWeights::Moe(MoeWeights { router, gate_up, down, shared }) => {
                all.extend([("router", router), ("experts.gate_up", gate_up), ("experts.down", down)]);
                if let Some(SharedExpertWeights { expert, gate }) = shared {
                    all.extend([("shared.gate_up", &expert.gate_up), ("shared.down", &expert.down), ("shared.gate", gate)]);
                }
            }
        }
        all
    }

    fn map(&self, f: &mut impl FnMut(&str, &Tensor) -> Tensor) -> Self {
        let attention = &self.attention;
        Self {
            attention_norm: f("attention_norm", &self.attention_norm),
            attention: AttentionWeights {
                query: f("query", &attention.query),
                key: f("key", &attention.key),
                value: f("value", &attention.value),
                output: f("output", &attention.output),
                qkv_bias: attention.qkv_bias.as_ref().map(|[q, k, v]| [f("query_bias", q), f("key_bias", k), f("value_bias", v)]),
                output_bias: attention.output_bias.as_ref().map(|bias| f("output_bias", bias)),
                qk_norm: attention.qk_norm.as_ref().map(|[q, k]| [f("query_norm", q), f("key_norm", k)]),
            },
            feed_forward_norm: f("feed_forward_norm", &self.feed_forward_norm),
            feed_forward: match &self.feed_forward {
                FeedForwardWeights::Dense(mlp) => FeedForwardWeights::Dense(mlp.map("dense", f)),
                FeedForwardWeights::Moe(moe) => FeedForwardWeights::Moe(MoeWeights {
                    router: f("router", &moe.router),
                    gate_up: f("experts.gate_up", &moe.gate_up),
                    down: f("experts.down", &moe.down),
                    shared: moe
                        .shared
                        .as_ref()
                        .map(|shared| SharedExpertWeights { expert: shared.expert.map("shared", f), gate: f("shared.gate", &shared.gate) }),
                }),
            },
        }
    }
}

impl SwiGluWeights {
    fn map(&self, of: &str, f: &mut impl FnMut(&str, &Tensor) -> Tensor) -> Self {
        Self { gate_up: f(&format!("{of}.gate_up"), &self.gate_up), down: f(&format!("{of}.down"), &self.down) }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{DType, Device};

    use super::*;

    fn one(value: f32) -> Tensor {
        Tensor::new(&[value], &Device::Cpu).unwrap()
    }

    /// One layer of each kind, with all that a layer can have; every tensor has one element, its number.
    fn all_kinds() -> ModelWeights {
        let mut next = (0..).map(|n| one(n as f32));
        let mut tensor = || next.next().unwrap();
        let mut layer = |moe: bool| LayerWeights {
            attention_norm: tensor(),
            attention: AttentionWeights {
                query: tensor(),
                key: tensor(),
                value: tensor(),
                output: tensor(),
                qkv_bias: Some([tensor(), tensor(), tensor()]),
                output_bias: Some(tensor()),
                qk_norm: Some([tensor(), tensor()]),
            },
            feed_forward_norm: tensor(),
            feed_forward: match moe {
                false => FeedForwardWeights::Dense(SwiGluWeights { gate_up: tensor(), down: tensor() }),
                true => FeedForwardWeights::Moe(MoeWeights {
                    router: tensor(),
                    gate_up: tensor(),
                    down: tensor(),
                    shared: Some(SharedExpertWeights { expert: SwiGluWeights { gate_up: tensor(), down: tensor() }, gate: tensor() }),
                }),
            },
        };
        let layers = vec![layer(false), layer(true)];
        ModelWeights { embedding: tensor(), layers, final_norm: tensor(), head: Some(tensor()) }
    }

    #[test]
    fn both_ways_through_the_weights_give_the_same_names() {
        let weights = all_kinds();
        let named: BTreeMap<String, f32> = weights.named().iter().map(|(name, t)| (name.clone(), t.to_vec1::<f32>().unwrap()[0])).collect();
        assert_eq!(named.len(), weights.named().len(), "no name twice");
        let mut mapped = BTreeMap::new();
        weights.map_named(&mut |name, tensor| {
            mapped.insert(name.to_owned(), tensor.to_vec1::<f32>().unwrap()[0]);
            tensor.clone()
        });
        assert_eq!(named, mapped);
        assert!(named.contains_key("layers.1.shared.gate_up") && named.contains_key("layers.0.dense.down"), "{named:?}");
    }

    #[test]
    fn some_tensors_are_replaced_and_the_rest_is_shared() {
        let weights = all_kinds();
        let narrow = one(7.5).to_dtype(DType::BF16).unwrap();
        let with = weights.with(&BTreeMap::from([("layers.1.router".to_owned(), narrow)])).unwrap();
        for ((name, old), (_, new)) in weights.named().into_iter().zip(with.named()) {
            let same = old.id() == new.id();
            assert_eq!(same, name != "layers.1.router", "{name}");
            assert_eq!(new.dtype(), DType::F32, "{name}");
        }
        let refused = |name: &str, tensor: Tensor| weights.with(&BTreeMap::from([(name.to_owned(), tensor)])).unwrap_err();
        assert_eq!(refused("layers.2.router", one(0.0)).kind(), crate::ErrorKind::NotFound);
        let wide = refused("layers.1.router", Tensor::new(&[1f32, 2.0], &Device::Cpu).unwrap());
        assert_eq!(wide.kind(), crate::ErrorKind::FailedPrecondition);
        assert!(wide.to_string().contains("[1]") && wide.to_string().contains("[2]"), "{wide}");
    }
}
