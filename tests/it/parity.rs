//! Forwards and greedy continuations against what Hugging Face transformers computed on the same weights, in f32.
//!
//! `tests/parity` holds the scripts that made `tests/goldens`, and says what is in them.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use hardmax::{
    model::{
        Batch, CacheShape, CachedDecoder, Decoder, LanguageModel, LogitRows,
        load::{DeviceKind, WeightType, load},
    },
    moe::{LayerRouting, Routing, policy::RoutingChoice},
};

/// Largest difference of a logit, in parts of the range of all logits.
const TOLERANCE: f32 = 1e-4;

fn cases() -> Vec<PathBuf> {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let mut cases: Vec<PathBuf> = std::fs::read_dir(goldens).unwrap().map(|entry| entry.unwrap().path()).filter(|p| p.is_dir()).collect();
    cases.sort();
    cases
}

fn modes() -> [(&'static str, RoutingChoice); 4] {
    let top = |k| RoutingChoice::TopK { k, weight_form: None };
    [("native", RoutingChoice::Native), ("top1", top(1)), ("top2", top(2)), ("soft", RoutingChoice::Soft { temperature: None })]
}

struct Golden(HashMap<String, Tensor>);

impl Golden {
    fn read(case: &Path) -> Self {
        Self(candle_core::safetensors::load(case.join("golden.safetensors"), &Device::Cpu).unwrap())
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.0[name].to_vec1::<i64>().unwrap().into_iter().map(|id| id as u32).collect()
    }

    fn floats(&self, name: &str) -> Vec<Vec<f32>> {
        self.0[name].to_vec2().unwrap()
    }

    /// Weight of each chosen expert, per token.
    fn experts(&self, mode: &str, layer: usize) -> Vec<HashMap<u32, f32>> {
        let ids = self.0[&format!("{mode}.expert_ids.{layer}")].to_vec2::<i64>().unwrap();
        let weights = self.floats(&format!("{mode}.expert_weights.{layer}"));
        ids.into_iter().zip(weights).map(|(ids, weights)| ids.into_iter().map(|id| id as u32).zip(weights).collect()).collect()
    }
}

fn largest(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!((a.len(), a[0].len()), (b.len(), b[0].len()));
    a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn range(rows: &[Vec<f32>]) -> f32 {
    let all = || rows.iter().flatten().copied();
    all().fold(f32::NEG_INFINITY, f32::max) - all().fold(f32::INFINITY, f32::min)
}

fn decoder(case: &Path, weights: WeightType) -> Decoder {
    load(case, DeviceKind::Cpu, weights, false).unwrap_or_else(|error| panic!("{}: {error}", case.display())).decoder
}

fn check_layer(what: &str, golden: &Golden, mode: &str, routing: &LayerRouting) {
    let layer = routing.layer;
    let wanted = golden.floats(&format!("{mode}.router_logits.{layer}"));
    assert!(
        largest(&routing.router_logits.to_vec2().unwrap(), &wanted) < TOLERANCE * range(&wanted),
        "{what}: router logits of layer {layer}"
    );
    let Routing::Sparse(routes) = &routing.routing else { panic!("{what}: serving routes sparsely") };
    for (token, wanted) in golden.experts(mode, layer).into_iter().enumerate() {
        let found: HashMap<u32, f32> = routes.routes(token).map(|i| (routes.expert_ids[i], routes.weights[i])).collect();
        assert_eq!(found.len(), wanted.len(), "{what}: layer {layer}, token {token}");
        for (expert, weight) in wanted {
            let found = found.get(&expert).unwrap_or_else(|| panic!("{what}: layer {layer}, token {token}: expert {expert} is not chosen"));
            assert!((found - weight).abs() < 1e-5, "{what}: layer {layer}, token {token}, expert {expert}: {found} for {weight}");
        }
    }
}

#[test]
fn forwards_agree() {
    let cases = cases();
    assert!(cases.len() >= 14, "the goldens are not there");
    for case in cases {
        let (golden, decoder) = (Golden::read(&case), decoder(&case, WeightType::F32));
        for (mode, routing) in modes() {
            let what = format!("{}, {mode}", case.file_name().unwrap().to_string_lossy());
            let mut batch = Batch::default();
            batch.push(&[], &golden.ids("input_ids"), 0, routing, LogitRows::All);
            let forward = decoder.serve(&batch, None).unwrap();
            let wanted = golden.floats(&format!("{mode}.logits"));
            let difference = largest(&forward.logits.to_vec2().unwrap(), &wanted);
            assert!(difference < TOLERANCE * range(&wanted), "{what}: logits differ by {difference}, range {}", range(&wanted));
            assert!(!forward.layers.is_empty());
            forward.layers.iter().for_each(|layer| check_layer(&what, &golden, mode, layer));
        }
    }
}

#[test]
fn greedy_continuations_agree() {
    for case in cases() {
        let golden = Golden::read(&case);
        let wanted = golden.ids("native.greedy");
        // Once with the prompt at once, once token by token through the cache.
        for chunk in [usize::MAX, 1] {
            let (shape, table) = (CacheShape { block_tokens: 8, num_blocks: 64 }, (0..64).rev().collect::<Vec<u32>>());
            let mut model = CachedDecoder::new(decoder(&case, WeightType::F32), shape).unwrap();
            let prompt = golden.ids("input_ids");
            let (mut input, mut past, mut found) = (prompt, 0, Vec::new());
            while found.len() < wanted.len() {
                let mut row = Vec::new();
                for part in input.chunks(chunk.min(input.len())) {
                    let mut batch = Batch::default();
                    batch.push(&table, part, past, RoutingChoice::Native, LogitRows::Last);
                    row = model.forward(&batch).unwrap().logits.to_vec2::<f32>().unwrap().remove(0);
                    past += part.len();
                }
                let next = (1..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32;
                found.push(next);
                input = vec![next];
            }
            assert_eq!(found, wanted, "{}", case.display());
        }
    }
}

/// bf16 weights in memory: exact where the file is bf16, since activations stay f32.
#[test]
fn bf16_weights_of_bf16_files_lose_nothing() {
    for name in ["mixtral_bf16", "qwen2_bf16"] {
        let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name);
        let (golden, decoder) = (Golden::read(&case), decoder(&case, WeightType::Bf16));
        let mut batch = Batch::default();
        batch.push(&[], &golden.ids("input_ids"), 0, RoutingChoice::Native, LogitRows::All);
        let wanted = golden.floats("native.logits");
        let found = decoder.serve(&batch, None).unwrap().logits.to_vec2().unwrap();
        assert!(largest(&found, &wanted) < TOLERANCE * range(&wanted), "{name}");
    }
}
