//! Models that exist only as numbers: a shape in words, and random weights of that shape made in place.

use std::{fmt, str::FromStr};

use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;
use tokenizers::{Tokenizer, models::wordlevel::WordLevelBuilder, pre_tokenizers::whitespace::WhitespaceSplit};

use crate::{
    error::{Error, Result},
    model::{
        FeedForwardSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, ReferenceRouting, RopeScaling, RopeSpec,
        weights::{
            AttentionWeights, FeedForwardWeights, LayerWeights, ModelWeights, MoeWeights, OuterWeights, SharedExpertWeights, SwiGluWeights,
        },
    },
    moe::policy::WeightForm,
};

/// Standard deviation of router logits for a normalised input: a router near zero would make every choice a tie.
const ROUTER_SPREAD: f32 = 1.5;

/// Standard deviation of logits.
const HEAD_SPREAD: f32 = 2.5;

/// Elements that one generator makes; a chunk is a unit of parallel work.
const CHUNK: usize = 1 << 16;

/// The shape of a model, read from `key=value,...`, from the name of a preset, or from both: `mixtral-0.9b,experts=16`.
#[derive(Clone, Debug, PartialEq)]
pub struct SyntheticSpec {
    /// Decoder layers, all of them routed.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Experts per layer.
    pub experts: usize,
    /// Hidden width of an expert.
    pub expert_width: usize,
    /// Experts per token under native routing.
    pub top_k: usize,
    /// Size of the vocabulary.
    pub vocab: usize,
    /// Longest sequence.
    pub context: usize,
    /// Hidden width of a shared expert; 0 for none.
    pub shared_width: usize,
    /// 1 for a norm over each query and key head, as Qwen3-MoE has; 2 for one over all heads together, as OLMoE has; 0 for none.
    pub qk_norm: usize,
}

/// Shapes with a name. Those of 0.9 billion parameters have 12 layers, width 1024 and a vocabulary of 16384; the last three are those of models that are
/// published under these names.
pub const PRESETS: [(&str, SyntheticSpec); 6] = [
    ("tiny", TINY),
    ("mixtral-0.9b", MIXTRAL),
    ("qwen3-moe-0.9b", SyntheticSpec { head_dim: 128, experts: 64, expert_width: 352, top_k: 8, qk_norm: 1, ..MIXTRAL }),
    ("mixtral-8x7b", MIXTRAL_8X7B),
    ("olmoe-1b-7b", OLMOE_1B_7B),
    ("qwen3-30b-a3b", QWEN3_30B_A3B),
];

const TINY: SyntheticSpec = SyntheticSpec {
    layers: 2,
    hidden: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    experts: 4,
    expert_width: 96,
    top_k: 2,
    vocab: 256,
    context: 512,
    shared_width: 0,
    qk_norm: 0,
};

const MIXTRAL: SyntheticSpec = SyntheticSpec {
    layers: 12,
    hidden: 1024,
    heads: 16,
    kv_heads: 4,
    head_dim: 64,
    experts: 8,
    expert_width: 2816,
    top_k: 2,
    vocab: 16384,
    context: 4096,
    shared_width: 0,
    qk_norm: 0,
};

const MIXTRAL_8X7B: SyntheticSpec = SyntheticSpec {
    layers: 32,
    hidden: 4096,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    experts: 8,
    expert_width: 14336,
    top_k: 2,
    vocab: 32000,
    context: 32768,
    shared_width: 0,
    qk_norm: 0,
};

const OLMOE_1B_7B: SyntheticSpec = SyntheticSpec {
    layers: 16,
    hidden: 2048,
    heads: 16,
    kv_heads: 16,
    head_dim: 128,
    experts: 64,
    expert_width: 1024,
    top_k: 8,
    vocab: 50304,
    context: 4096,
    shared_width: 0,
    qk_norm: 2,
};

const QWEN3_30B_A3B: SyntheticSpec = SyntheticSpec {
    layers: 48,
    hidden: 2048,
    heads: 32,
    kv_heads: 4,
    head_dim: 128,
    experts: 128,
    expert_width: 768,
    top_k: 8,
    vocab: 151_936,
    context: 40960,
    shared_width: 0,
    qk_norm: 1,
};

/// Name, largest value, and place of a number. The least is 1, or 0 where that means none.
type Key = (&'static str, usize, fn(&mut SyntheticSpec) -> &mut usize);

const KEYS: [Key; 12] = [
    ("layers", 1 << 10, |s| &mut s.layers),
    ("hidden", 1 << 17, |s| &mut s.hidden),
    ("heads", 1 << 10, |s| &mut s.heads),
    ("kv-heads", 1 << 10, |s| &mut s.kv_heads),
    ("head-dim", 1 << 10, |s| &mut s.head_dim),
    ("experts", 1 << 12, |s| &mut s.experts),
    ("expert-width", 1 << 17, |s| &mut s.expert_width),
    ("top-k", 1 << 12, |s| &mut s.top_k),
    ("vocab", 1 << 20, |s| &mut s.vocab),
    ("context", 1 << 20, |s| &mut s.context),
    ("shared-width", 1 << 17, |s| &mut s.shared_width),
    ("qk-norm", 2, |s| &mut s.qk_norm),
];

/// Keys whose value may be 0.
const OPTIONAL: [&str; 2] = ["shared-width", "qk-norm"];

impl FromStr for SyntheticSpec {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parts = text.split(',').map(str::trim).peekable();
        let mut spec = match parts.next_if(|part| !part.contains('=')) {
            Some(name) => preset(name)?,
            None => TINY,
        };
        for part in parts {
            spec.set(part)?;
        }
        spec.check()?;
        Ok(spec)
    }
}

fn preset(name: &str) -> Result<SyntheticSpec> {
    let found = PRESETS.iter().find(|(known, _)| *known == name);
    found.map(|(_, spec)| spec.clone()).ok_or_else(|| {
        let names = PRESETS.map(|(name, _)| name).join(", ");
        Error::invalid("synthetic", format!("'{name}' is neither key=value nor one of {names}"))
    })
}

impl fmt::Display for SyntheticSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some((name, _)) = PRESETS.iter().find(|(_, spec)| spec == self) {
            return f.write_str(name);
        }
        let mut spec = self.clone();
        for (index, (name, _, field)) in KEYS.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{name}={}", field(&mut spec))?;
        }
        Ok(())
    }
}

impl SyntheticSpec {
    fn set(&mut self, part: &str) -> Result<()> {
        let (name, value) =
            part.split_once('=').ok_or_else(|| Error::invalid("synthetic", format!("'{part}' is not key=value; a preset comes first")))?;
        let Some((_, most, field)) = KEYS.iter().find(|(known, ..)| *known == name.trim()) else {
            let names = KEYS.map(|(name, ..)| name).join(", ");
            return Err(Error::invalid("synthetic", format!("'{name}' is none of {names}")));
        };
        let least = usize::from(!OPTIONAL.contains(&name.trim()));
        let number = value.trim().parse().ok().filter(|number| (least..=*most).contains(number));
        *field(self) = number.ok_or_else(|| Error::invalid("synthetic", format!("{name}={value} is not from {least} to {most}")))?;
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let wrong = |message: String| Err(Error::invalid("synthetic", message));
        if !self.heads.is_multiple_of(self.kv_heads) {
            return wrong(format!("kv-heads={} does not divide heads={}", self.kv_heads, self.heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return wrong(format!("head-dim={} is odd: rotary embedding turns pairs", self.head_dim));
        }
        if self.top_k > self.experts {
            return wrong(format!("top-k={} is above experts={}", self.top_k, self.experts));
        }
        Ok(())
    }

    /// The same as a description of a model.
    pub fn model(&self) -> ModelSpec {
        let moe = MoeSpec {
            num_experts: self.experts,
            expert_width: self.expert_width,
            top_k: self.top_k,
            weight_form: WeightForm::Renorm,
            shared_expert_width: (self.shared_width > 0).then_some(self.shared_width),
        };
        let layer = LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Moe(moe) };
        ModelSpec {
            family: "synthetic".into(),
            vocab_size: self.vocab,
            hidden_size: self.hidden,
            num_heads: self.heads,
            num_kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            qkv_bias: false,
            out_bias: false,
            qk_norm: match self.qk_norm {
                1 => QkNorm::PerHead,
                2 => QkNorm::Full,
                _ => QkNorm::None,
            },
            clip_qkv: None,
            rms_norm_eps: 1e-5,
            rope: RopeSpec { theta: 1e6, scaling: RopeScaling::None },
            max_context: self.context,
            tied_head: false,
            layers: vec![layer; self.layers],
            reference: ReferenceRouting::OwnTopK { assumed: true },
            estimator: "unknown".into(),
        }
    }
}

/// Random weights for `spec`; the same seed gives the same weights on every machine.
///
/// Linear maps have variance 1 / fan-in, so that activations stay near 1; router and head have wider rows, so that
/// experts and tokens differ. The large weights have `dtype`, f32 or bf16.
pub fn weights(spec: &ModelSpec, dtype: DType, device: &Device, seed: u64) -> Result<ModelWeights> {
    Maker { seed, tensors: 0, dtype, device, normal: numbers }.model(spec)
}

/// [`weights`], the same to the bit, made on the GPU that `device` is: where they take more memory than the host has.
#[cfg(feature = "gpu")]
pub fn weights_on_gpu(spec: &ModelSpec, dtype: DType, device: &Device, seed: u64) -> Result<ModelWeights> {
    Maker { seed, tensors: 0, dtype, device, normal: crate::model::gpu::normal }.model(spec)
}

/// [`weights_on_gpu`], the layers one by one.
#[cfg(feature = "gpu")]
pub fn layers_on_gpu<'a>(
    spec: &'a ModelSpec,
    dtype: DType,
    device: &'a Device,
    seed: u64,
) -> Result<(OuterWeights, impl Iterator<Item = Result<LayerWeights>> + 'a)> {
    let mut maker = Maker { seed, tensors: 0, dtype, device, normal: crate::model::gpu::normal };
    let outer = maker.outer(spec)?;
    Ok((outer, spec.layers.iter().map(move |layer| maker.layer(spec, layer))))
}

/// Makes one tensor after the other, each of its own seed.
struct Maker<'a> {
    seed: u64,
    tensors: u64,
    dtype: DType,
    device: &'a Device,
    normal: Normal,
}

/// Nearly normal numbers of mean 0: shape, dtype, device, seed, standard deviation.
type Normal = fn(&[usize], DType, &Device, u64, f32) -> Result<Tensor>;

impl Maker<'_> {
    fn model(&mut self, spec: &ModelSpec) -> Result<ModelWeights> {
        let OuterWeights { embedding, final_norm, head } = self.outer(spec)?;
        let layers = spec.layers.iter().map(|layer| self.layer(spec, layer)).collect::<Result<_>>()?;
        Ok(ModelWeights { embedding, layers, final_norm, head })
    }

    fn outer(&mut self, spec: &ModelSpec) -> Result<OuterWeights> {
        let (d, v) = (spec.hidden_size, spec.vocab_size);
        let embedding = self.large(&[v, d], 1.0)?;
        let final_norm = self.norm(d)?;
        let head = if spec.tied_head { None } else { Some(self.large(&[v, d], HEAD_SPREAD * fan_in(d))?) };
        Ok(OuterWeights { embedding, final_norm, head })
    }

    fn layer(&mut self, spec: &ModelSpec, layer: &LayerSpec) -> Result<LayerWeights> {
        let d = spec.hidden_size;
        Ok(LayerWeights {
            attention_norm: self.norm(d)?,
            attention: self.attention(spec)?,
            feed_forward_norm: self.norm(d)?,
            feed_forward: match &layer.feed_forward {
                FeedForwardSpec::Dense { width } => FeedForwardWeights::Dense(self.swiglu(d, *width)?),
                FeedForwardSpec::Moe(moe) => FeedForwardWeights::Moe(self.moe(d, moe)?),
            },
        })
    }

    fn attention(&mut self, spec: &ModelSpec) -> Result<AttentionWeights> {
        let (d, hd) = (spec.hidden_size, spec.head_dim);
        let (q, kv) = (spec.num_heads * hd, spec.num_kv_heads * hd);
        let norms = match spec.qk_norm {
            QkNorm::None => None,
            QkNorm::PerHead => Some([self.norm(hd)?, self.norm(hd)?]),
            QkNorm::Full => Some([self.norm(q)?, self.norm(kv)?]),
        };
        Ok(AttentionWeights {
            query: self.large(&[q, d], fan_in(d))?,
            key: self.large(&[kv, d], fan_in(d))?,
            value: self.large(&[kv, d], fan_in(d))?,
            output: self.large(&[d, q], fan_in(q))?,
            qkv_bias: if spec.qkv_bias { Some([self.small(&[q], 0.1)?, self.small(&[kv], 0.1)?, self.small(&[kv], 0.1)?]) } else { None },
            output_bias: if spec.out_bias { Some(self.small(&[d], 0.1)?) } else { None },
            qk_norm: norms,
        })
    }

    fn moe(&mut self, d: usize, moe: &MoeSpec) -> Result<MoeWeights> {
        let (e, f) = (moe.num_experts, moe.expert_width);
        let shared = match moe.shared_expert_width {
            Some(width) => Some(SharedExpertWeights { expert: self.swiglu(d, width)?, gate: self.small(&[1, d], fan_in(d))? }),
            None => None,
        };
        Ok(MoeWeights {
            router: self.small(&[e, d], ROUTER_SPREAD * fan_in(d))?,
            gate_up: self.large(&[e, 2 * f, d], fan_in(d))?,
            down: self.large(&[e, d, f], fan_in(f))?,
            shared,
        })
    }

    fn swiglu(&mut self, d: usize, width: usize) -> Result<SwiGluWeights> {
        Ok(SwiGluWeights { gate_up: self.large(&[2 * width, d], fan_in(d))?, down: self.large(&[d, width], fan_in(width))? })
    }

    fn norm(&self, width: usize) -> Result<Tensor> {
        Ok(Tensor::ones(width, DType::F32, self.device)?)
    }

    /// f32 whatever the dtype of the model.
    fn small(&mut self, shape: &[usize], deviation: f32) -> Result<Tensor> {
        self.random(shape, DType::F32, deviation)
    }

    fn large(&mut self, shape: &[usize], deviation: f32) -> Result<Tensor> {
        self.random(shape, self.dtype, deviation)
    }

    fn random(&mut self, shape: &[usize], dtype: DType, deviation: f32) -> Result<Tensor> {
        self.tensors += 1;
        (self.normal)(shape, dtype, self.device, mix(self.seed ^ mix(self.tensors)), deviation)
    }
}

/// Numbers made on the host, by all threads.
fn numbers(shape: &[usize], dtype: DType, device: &Device, seed: u64, deviation: f32) -> Result<Tensor> {
    let tensor = match dtype {
        DType::F32 => Tensor::from_vec(values(shape, seed, 0f32, |value| deviation * value), shape, &Device::Cpu)?,
        DType::BF16 => Tensor::from_vec(values(shape, seed, bf16::ZERO, |value| bf16::from_f32(deviation * value)), shape, &Device::Cpu)?,
        other => return Err(Error::Internal(format!("synthetic weights have no {other:?}"))),
    };
    Ok(tensor.to_device(device)?)
}

fn values<T: Copy + Send>(shape: &[usize], seed: u64, zero: T, make: impl Fn(f32) -> T + Sync) -> Vec<T> {
    let mut values = vec![zero; shape.iter().product()];
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let mut state = mix(seed.wrapping_add(chunk as u64));
        for value in values {
            state = state.wrapping_add(GOLDEN);
            *value = make(bell(mix(state)));
        }
    });
    values
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The output function of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Nearly normal, mean 0 and variance 1: the sum of four uniform numbers of 16 bits. Speed matters here, tails do not.
fn bell(bits: u64) -> f32 {
    let sum: u64 = (0..4).map(|part| (bits >> (16 * part)) & 0xffff).sum();
    // Mean 4 · 65535 / 2; variance 4 · 65536² / 12.
    (sum as f32 - 131_070.0) * (1.0 / 37_837.227)
}

/// Standard deviation of the weights of a linear map with `inputs` inputs.
fn fan_in(inputs: usize) -> f32 {
    1.0 / (inputs as f32).sqrt()
}

/// A tokenizer with the words `t0`, `t1`, ... for the tokens of a synthetic model.
pub fn tokenizer(vocab_size: usize) -> Result<Tokenizer> {
    let words = (0..vocab_size as u32).map(|id| (format!("t{id}"), id)).collect();
    let model = WordLevelBuilder::new().vocab(words).unk_token("t0".into()).build();
    let mut tokenizer = Tokenizer::new(model.map_err(|error| Error::Internal(format!("the synthetic tokenizer: {error}")))?);
    tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<SyntheticSpec, String> {
        text.parse::<SyntheticSpec>().map_err(|error| error.to_string())
    }

    #[test]
    fn specs_are_read() {
        let spec =
            parse("layers=12,hidden=1024,heads=16,kv-heads=4,head-dim=64,experts=8,expert-width=2816,vocab=16384,top-k=2,context=4096");
        assert_eq!(spec.as_ref(), Ok(&MIXTRAL));
        assert_eq!(parse("mixtral-0.9b, experts=16").unwrap(), SyntheticSpec { experts: 16, ..MIXTRAL });
        for (name, spec) in PRESETS {
            assert_eq!(parse(name), Ok(spec.clone()));
            assert_eq!(spec.to_string(), name);
        }
        let other = SyntheticSpec { layers: 3, ..TINY };
        assert_eq!(parse(&other.to_string()), Ok(other), "what is printed can be read");
    }

    #[test]
    fn mistakes_are_named() {
        for (text, says) in [
            ("", "neither key=value nor one of tiny"),
            ("mixtral", "'mixtral' is neither"),
            ("layers=2,tiny", "a preset comes first"),
            ("layers=0", "layers=0 is not from 1"),
            ("layers=-1", "layers=-1 is not from 1"),
            ("width=3", "'width' is none of layers, hidden"),
            ("hidden=99999999", "is not from 1 to 131072"),
            ("heads=4,kv-heads=3", "kv-heads=3 does not divide heads=4"),
            ("head-dim=7", "head-dim=7 is odd"),
            ("top-k=5", "top-k=5 is above experts=4"),
            ("qk-norm=3", "qk-norm=3 is not from 0 to 2"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }

    #[test]
    fn presets_have_the_parameters_of_their_name() {
        let millions = |name: &str| (parse(name).unwrap().model().parameters().0 + 500_000) / 1_000_000;
        assert_eq!((millions("mixtral-0.9b"), millions("qwen3-moe-0.9b")), (896, 928));
        assert_eq!((millions("mixtral-8x7b"), millions("olmoe-1b-7b"), millions("qwen3-30b-a3b")), (46_703, 6_919, 30_532));
        let active = |name: &str| (parse(name).unwrap().model().parameters().1 + 500_000) / 1_000_000;
        assert_eq!((active("mixtral-8x7b"), active("olmoe-1b-7b"), active("qwen3-30b-a3b")), (12_880, 1_282, 3_353));
    }

    #[test]
    fn weights_have_the_shapes_of_the_spec_and_unit_variance() {
        let spec = SyntheticSpec { shared_width: 32, qk_norm: 1, ..TINY }.model();
        let weights = weights(&spec, DType::BF16, &Device::Cpu, 7).unwrap();
        assert_eq!((weights.embedding.dims(), weights.embedding.dtype()), (&[256, 64][..], DType::BF16));
        let FeedForwardWeights::Moe(moe) = &weights.layers[1].feed_forward else { panic!("the layer is routed") };
        assert_eq!((moe.gate_up.dims(), moe.down.dims(), moe.router.dims()), (&[4, 192, 64][..], &[4, 64, 96][..], &[4, 64][..]));
        assert_eq!((moe.router.dtype(), moe.shared.as_ref().unwrap().gate.dims()), (DType::F32, &[1, 64][..]));
        let values: Vec<f32> = weights.embedding.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / values.len() as f32;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        let again = super::weights(&spec, DType::BF16, &Device::Cpu, 7).unwrap();
        let same = |a: &Tensor, b: &Tensor| {
            a.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
                == b.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert!(same(&weights.embedding, &again.embedding), "the seed decides");
        assert!(!same(&weights.layers[0].attention.query, &weights.layers[1].attention.query), "layers differ");
    }

    #[cfg(feature = "gpu")]
    #[test]
    fn a_gpu_makes_the_same_weights() {
        // Tensors with more elements than a chunk has.
        let spec = SyntheticSpec { layers: 1, vocab: 1500, qk_norm: 1, ..TINY }.model();
        let device = crate::model::load::DeviceKind::Cuda.open().unwrap();
        for dtype in [DType::F32, DType::BF16] {
            let here = weights(&spec, dtype, &Device::Cpu, 5).unwrap();
            let there = weights_on_gpu(&spec, dtype, &device, 5).unwrap();
            let values = |tensor: &Tensor| tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let pairs = here.named().into_iter().zip(there.named());
            for ((name, here), (_, there)) in pairs {
                assert_eq!((here.dtype(), here.dims()), (there.dtype(), there.dims()), "{name}");
                assert_eq!(values(here), values(there), "{name}");
            }
        }
    }

    #[test]
    fn the_tokenizer_spells_ids() {
        let tokenizer = tokenizer(300).unwrap();
        assert_eq!(tokenizer.encode("t7 t299 what", false).unwrap().get_ids(), [7, 299, 0]);
        assert_eq!(tokenizer.decode(&[7, 299], false).unwrap(), "t7 t299");
    }
}
