//! Checkpoint folders on disk: every family loads, every kind of damage is an error that names what is wrong, what is
//! saved reads back.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Tensor};
use hardmax::{
    checkpoint::{
        Checkpoint, CheckpointError, GenerationDefaults, LoadOptions, ReferenceMode, ReferenceRecord, RoutingBlock, SaveRequest,
        ServeRecord, TrainRecord, save,
    },
    cli::{
        compute::ComputeArgs,
        forward::{self, ForwardArgs},
        inspect::{self, InspectArgs},
    },
    model::{
        FeedForwardSpec, ReferenceRouting,
        weights::{FeedForwardWeights, ModelWeights, MoeWeights, SwiGluWeights},
    },
    moe::policy::{RoutingChoice, WeightForm},
};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;

const FAMILIES: [&str; 4] = ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"];
// Sizes of all fixtures: vocabulary, width, experts, their width, width of the shared expert and of a dense layer.
const V: usize = 12;
const D: usize = 8;
const E: usize = 3;
const F: usize = 6;
const SHARED: usize = 5;
const DENSE: usize = 10;
const LAYERS: usize = 2;
/// Two query heads of width 4, one key and value head; OLMoE has two.
const HEAD: usize = 4;

// === fixtures ===

#[derive(Clone, Debug)]
struct Disk {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

/// A checkpoint before it is written, free to be damaged.
#[derive(Clone, Debug)]
struct Fixture {
    config: Value,
    tensors: BTreeMap<String, Disk>,
}

/// The value of an element, told by the name of its tensor and its place there. Exact in f16 and bf16.
fn element(name: &str, index: usize) -> f32 {
    let hash = name.bytes().fold(7u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(u32::from(byte)));
    (hash.wrapping_add((index as u32).wrapping_mul(2_654_435_761)) >> 25) as f32 / 64.0 - 1.0
}

fn disk(dtype: Dtype, name: &str, shape: &[usize]) -> Disk {
    let values = (0..shape.iter().product()).map(|index| element(name, index));
    let bytes = match dtype {
        Dtype::BF16 => values.flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        Dtype::F16 => values.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => values.flat_map(f32::to_le_bytes).collect(),
    };
    Disk { dtype, shape: shape.to_vec(), bytes }
}

fn moe_module(family: &str) -> &'static str {
    if family == "mixtral" { "block_sparse_moe" } else { "mlp" }
}

fn expert_names(family: &str) -> [&'static str; 3] {
    if family == "mixtral" { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] }
}

/// Names and shapes as published. Layer 0 of qwen3_moe is dense.
fn published(family: &str) -> Vec<(String, Vec<usize>)> {
    let (q, k) = (2 * HEAD, if family == "olmoe" { 2 * HEAD } else { HEAD });
    let mut all = vec![("model.embed_tokens.weight".to_string(), vec![V, D]), ("model.norm.weight".into(), vec![D])];
    all.push(("lm_head.weight".into(), vec![V, D]));
    for layer in 0..LAYERS {
        let mut add = |name: &str, shape: &[usize]| all.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[D]);
        add("post_attention_layernorm.weight", &[D]);
        for (name, out) in [("q", q), ("k", k), ("v", k)] {
            add(&format!("self_attn.{name}_proj.weight"), &[out, D]);
            if family == "qwen2_moe" {
                add(&format!("self_attn.{name}_proj.bias"), &[out]);
            }
        }
        add("self_attn.o_proj.weight", &[D, q]);
        let norms = match family {
            "olmoe" => Some((q, k)),
            "qwen3_moe" => Some((HEAD, HEAD)),
            _ => None,
        };
        if let Some((query, key)) = norms {
            add("self_attn.q_norm.weight", &[query]);
            add("self_attn.k_norm.weight", &[key]);
        }
        let mut swiglu = |module: &str, names: [&str; 3], width: usize| {
            for (name, shape) in names.into_iter().zip([[width, D], [width, D], [D, width]]) {
                add(&format!("{module}.{name}.weight"), &shape);
            }
        };
        if family == "qwen3_moe" && layer == 0 {
            swiglu("mlp", expert_names(family), DENSE);
            continue;
        }
        let module = moe_module(family);
        (0..E).for_each(|expert| swiglu(&format!("{module}.experts.{expert}"), expert_names(family), F));
        if family == "qwen2_moe" {
            swiglu("mlp.shared_expert", expert_names(family), SHARED);
            add("mlp.shared_expert_gate.weight", &[1, D]);
        }
        add(&format!("{module}.gate.weight"), &[E, D]);
    }
    all
}

fn config(family: &str) -> Value {
    let mut config = json!({
        "model_type": family, "vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": if family == "olmoe" { 2 } else { 1 }, "max_position_embeddings": 64, "num_experts_per_tok": 2,
        "num_experts": E, "rms_norm_eps": 1e-6, "eos_token_id": 2, "bos_token_id": 1,
        "intermediate_size": if family.starts_with("qwen") { DENSE } else { F },
    });
    let own = match family {
        "qwen2_moe" => json!({ "moe_intermediate_size": F, "shared_expert_intermediate_size": SHARED }),
        "qwen3_moe" => json!({ "moe_intermediate_size": F, "mlp_only_layers": [0], "norm_topk_prob": true, "head_dim": HEAD }),
        _ => json!({}),
    };
    patch(&mut config, own);
    config
}

fn patch(config: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else { panic!("a patch is an object") };
    config.as_object_mut().expect("an object").extend(patch);
}

impl Fixture {
    fn new(family: &str) -> Self {
        Self::of(family, Dtype::F32)
    }

    fn of(family: &str, dtype: Dtype) -> Self {
        let tensors = published(family).into_iter().map(|(name, shape)| (name.clone(), disk(dtype, &name, &shape))).collect();
        Self { config: config(family), tensors }
    }

    fn patched(mut self, with: Value) -> Self {
        patch(&mut self.config, with);
        self
    }

    fn tensor(&mut self, name: &str) -> &mut Disk {
        self.tensors.get_mut(name).unwrap_or_else(|| panic!("{name} in the fixture"))
    }

    /// Experts as transformers 5 holds them: one tensor for all, gate over up.
    fn stacked(mut self, family: &str, module: &str) -> Self {
        let (old, names) = (moe_module(family), expert_names(family));
        for layer in 0..LAYERS {
            let at = |module: &str| format!("model.layers.{layer}.{module}");
            let Some(router) = self.tensors.remove(&format!("{}.gate.weight", at(old))) else { continue };
            self.tensors.insert(format!("{}.gate.weight", at(module)), router);
            for (target, parts, shape) in [("gate_up_proj", &names[..2], [E, 2 * F, D]), ("down_proj", &names[2..], [E, D, F])] {
                let sources = (0..E).flat_map(|expert| parts.iter().map(move |part| (expert, part)));
                let sources: Vec<_> = sources
                    .map(|(expert, part)| format!("{}.experts.{expert}.{part}.weight", at(old)))
                    .map(|name| self.tensors.remove(&name).expect("an expert"))
                    .collect();
                let dtype = sources[0].dtype;
                let bytes = sources.into_iter().flat_map(|source| source.bytes).collect();
                self.tensors.insert(format!("{}.experts.{target}", at(module)), Disk { dtype, shape: shape.to_vec(), bytes });
            }
        }
        self
    }

    fn write(&self) -> TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        self.write_config(dir.path());
        write_shard(&dir.path().join("model.safetensors"), self.tensors.iter());
        dir
    }

    fn write_config(&self, dir: &Path) {
        fs::write(dir.join("config.json"), self.config.to_string()).expect("config.json");
    }

    /// In `count` shards; returns the weight map of their index.
    fn write_shards(&self, dir: &Path, count: usize) -> BTreeMap<String, String> {
        self.write_config(dir);
        let mut map = BTreeMap::new();
        for number in 0..count {
            let file = format!("model-{:05}-of-{count:05}.safetensors", number + 1);
            let part = || self.tensors.iter().enumerate().filter(|(index, _)| index % count == number).map(|(_, tensor)| tensor);
            write_shard(&dir.join(&file), part());
            map.extend(part().map(|(name, _)| (name.clone(), file.clone())));
        }
        map
    }
}

fn write_shard<'a>(path: &Path, tensors: impl Iterator<Item = (&'a String, &'a Disk)>) {
    let views = tensors.map(|(name, disk)| (name, TensorView::new(disk.dtype, disk.shape.clone(), &disk.bytes).expect("bytes of a shape")));
    fs::write(path, safetensors::serialize(views, None).expect("safetensors")).expect("a shard");
}

fn write_index(dir: &Path, map: &BTreeMap<String, String>) {
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": map });
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).expect("the index");
}

fn options(dtype: DType) -> LoadOptions {
    LoadOptions { dtype, device: Device::Cpu, progress: true }
}

fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
    Checkpoint::open(dir)
}

fn load(dir: &Path) -> Result<ModelWeights, CheckpointError> {
    open(dir)?.load(&options(DType::F32))
}

/// The message with which loading fails; it must name all `parts`.
#[track_caller]
fn assert_refused(dir: &Path, parts: &[&str]) -> CheckpointError {
    let error = load(dir).expect_err("a damaged checkpoint must not load");
    let message = error.to_string();
    parts.iter().for_each(|part| assert!(message.contains(part), "'{part}' is not in: {message}"));
    error
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).and_then(|t| t.flatten_all()?.to_vec1()).expect("a readable tensor")
}

/// Asserts that `tensor` is the named tensors on disk one after the other.
#[track_caller]
fn assert_holds(tensor: &Tensor, shape: &[usize], names: &[String]) {
    assert_eq!(tensor.dims(), shape, "{names:?}");
    let each = tensor.elem_count() / names.len();
    let expected: Vec<_> = names.iter().flat_map(|name| (0..each).map(move |index| element(name, index))).collect();
    assert_eq!(floats(tensor), expected, "{names:?}");
}

// === loading ===

#[test]
fn every_family_loads_and_every_weight_is_in_its_place() {
    for family in FAMILIES {
        let dir = Fixture::new(family).write();
        let checkpoint = open(dir.path()).unwrap_or_else(|e| panic!("{family}: {e}"));
        let weights = checkpoint.load(&options(DType::F32)).unwrap_or_else(|e| panic!("{family}: {e}"));
        assert_eq!(checkpoint.spec().family, family);
        assert_eq!(checkpoint.dir(), dir.path());
        let name = |name: &str| [name.to_string()];
        assert_holds(&weights.embedding, &[V, D], &name("model.embed_tokens.weight"));
        assert_holds(weights.head.as_ref().expect("an untied head"), &[V, D], &name("lm_head.weight"));
        assert_holds(&weights.final_norm, &[D], &name("model.norm.weight"));
        assert_eq!(weights.layers.len(), LAYERS);
        for (index, layer) in weights.layers.iter().enumerate() {
            let at = |name: &str| [format!("model.layers.{index}.{name}")];
            let (q, k) = (2 * HEAD, if family == "olmoe" { 2 * HEAD } else { HEAD });
            assert_holds(&layer.attention_norm, &[D], &at("input_layernorm.weight"));
            assert_holds(&layer.feed_forward_norm, &[D], &at("post_attention_layernorm.weight"));
            assert_holds(&layer.attention.query, &[q, D], &at("self_attn.q_proj.weight"));
            assert_holds(&layer.attention.key, &[k, D], &at("self_attn.k_proj.weight"));
            assert_holds(&layer.attention.value, &[k, D], &at("self_attn.v_proj.weight"));
            assert_holds(&layer.attention.output, &[D, q], &at("self_attn.o_proj.weight"));
            assert_eq!(layer.attention.qkv_bias.is_some(), family == "qwen2_moe");
            for (bias, name) in layer.attention.qkv_bias.iter().flatten().zip(["q", "k", "v"]) {
                assert_holds(bias, bias.dims(), &at(&format!("self_attn.{name}_proj.bias")));
            }
            assert!(layer.attention.output_bias.is_none());
            assert_eq!(layer.attention.qk_norm.is_some(), ["olmoe", "qwen3_moe"].contains(&family));
            for (norm, name) in layer.attention.qk_norm.iter().flatten().zip(["q", "k"]) {
                assert_holds(norm, norm.dims(), &at(&format!("self_attn.{name}_norm.weight")));
            }
            assert_feed_forward(family, index, &layer.feed_forward);
        }
    }
}

fn assert_feed_forward(family: &str, index: usize, weights: &FeedForwardWeights) {
    let names = expert_names(family);
    let assert_swiglu = |SwiGluWeights { gate_up, down }: &SwiGluWeights, module: &str, width: usize| {
        let name = |name: &str| format!("model.layers.{index}.{module}.{name}.weight");
        assert_holds(gate_up, &[2 * width, D], &[name(names[0]), name(names[1])]);
        assert_holds(down, &[D, width], &[name(names[2])]);
    };
    match weights {
        FeedForwardWeights::Dense(dense) => {
            assert_eq!((family, index), ("qwen3_moe", 0));
            assert_swiglu(dense, "mlp", DENSE);
        }
        FeedForwardWeights::Moe(MoeWeights { router, gate_up, down, shared }) => {
            let module = format!("model.layers.{index}.{}", moe_module(family));
            let expert = |which: &[&str]| {
                let all = (0..E).flat_map(|e| which.iter().map(|name| format!("{module}.experts.{e}.{name}.weight")).collect::<Vec<_>>());
                all.collect::<Vec<_>>()
            };
            assert_holds(router, &[E, D], &[format!("{module}.gate.weight")]);
            assert_holds(gate_up, &[E, 2 * F, D], &expert(&names[..2]));
            assert_holds(down, &[E, D, F], &expert(&names[2..]));
            assert_eq!(shared.is_some(), family == "qwen2_moe");
            if let Some(shared) = shared {
                assert_swiglu(&shared.expert, "mlp.shared_expert", SHARED);
                assert_holds(&shared.gate, &[1, D], &[format!("{module}.shared_expert_gate.weight")]);
            }
        }
    }
}

fn first_experts(weights: &ModelWeights) -> &MoeWeights {
    let moe = weights.layers.iter().find_map(|layer| match &layer.feed_forward {
        FeedForwardWeights::Moe(moe) => Some(moe),
        FeedForwardWeights::Dense(_) => None,
    });
    moe.expect("a routed layer")
}

#[test]
fn stacked_experts_equal_experts_one_by_one() {
    for family in FAMILIES {
        let expected = load(Fixture::new(family).write().path()).expect("the published layout");
        for module in ["mlp", moe_module(family)] {
            let dir = Fixture::new(family).stacked(family, module).write();
            let weights = load(dir.path()).unwrap_or_else(|e| panic!("{family} {module}: {e}"));
            let (found, expected) = (first_experts(&weights), first_experts(&expected));
            assert_eq!(floats(&found.gate_up), floats(&expected.gate_up), "{family} {module}");
            assert_eq!(floats(&found.down), floats(&expected.down), "{family} {module}");
            assert_eq!(floats(&found.router), floats(&expected.router), "{family} {module}");
        }
    }
}

#[test]
fn all_three_formats_load_as_all_three() {
    let expected = load(Fixture::new("qwen2_moe").write().path()).expect("f32");
    for on_disk in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let dir = Fixture::of("qwen2_moe", on_disk).write();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let weights = open(dir.path()).and_then(|c| c.load(&options(dtype))).unwrap_or_else(|e| panic!("{on_disk:?} {dtype:?}: {e}"));
            let (found, experts) = (first_experts(&weights), first_experts(&expected));
            let shared = found.shared.as_ref().expect("a shared expert");
            assert_eq!([weights.embedding.dtype(), found.gate_up.dtype(), shared.expert.down.dtype()], [dtype; 3]);
            let attention = &weights.layers[0].attention;
            let kept = [&weights.final_norm, &found.router, &shared.gate, &attention.qkv_bias.as_ref().expect("biases")[0]];
            assert!(kept.iter().all(|tensor| tensor.dtype() == DType::F32));
            assert_eq!(floats(&found.gate_up), floats(&experts.gate_up), "{on_disk:?} as {dtype:?}");
            assert_eq!(floats(&weights.final_norm), floats(&expected.final_norm));
        }
    }
    let dir = Fixture::new("mixtral").write();
    let error = open(dir.path()).and_then(|c| c.load(&options(DType::U8))).expect_err("weights are not bytes");
    assert!(error.to_string().contains("U8"), "{error}");
}

#[test]
fn shards_load_with_and_without_an_index() {
    let fixture = Fixture::new("olmoe");
    let expected = load(fixture.write().path()).expect("one file");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let map = fixture.write_shards(dir.path(), 3);
    let without = load(dir.path()).expect("numbered shards");
    write_index(dir.path(), &map);
    let with = load(dir.path()).expect("shards and an index");
    for weights in [with, without] {
        assert_eq!(floats(&first_experts(&weights).gate_up), floats(&first_experts(&expected).gate_up));
    }
    let checkpoint = open(dir.path()).expect("shards and an index");
    let files: std::collections::BTreeSet<_> = checkpoint.tensors().map(|tensor| tensor.file).collect();
    assert_eq!((checkpoint.tensors().count(), files.len()), (fixture.tensors.len(), 3));
    let bytes: u64 = checkpoint.tensors().map(|tensor| tensor.bytes).sum();
    assert_eq!(bytes, fixture.tensors.values().map(|disk| disk.bytes.len() as u64).sum::<u64>());
}

#[test]
fn the_files_of_a_hub_cache_may_be_links_into_its_blobs() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let (snapshot, blobs) = (cache.path().join("snapshots/0123abcd"), cache.path().join("blobs"));
    fs::create_dir_all(&snapshot).and_then(|()| fs::create_dir(&blobs)).expect("folders");
    let source = Fixture::new("mixtral").write();
    for (file, blob) in [("config.json", "c0"), ("model.safetensors", "5a")] {
        fs::rename(source.path().join(file), blobs.join(blob)).expect("a blob");
        symlink(Path::new("../../blobs").join(blob), snapshot.join(file)).expect("a link");
    }
    load(&snapshot).expect("links into the blobs of the same repository");
}

#[test]
fn a_tied_head_is_not_loaded_twice() {
    let mut fixture = Fixture::new("mixtral").patched(json!({ "tie_word_embeddings": true }));
    assert_refused(fixture.write().path(), &["tie_word_embeddings", "'lm_head.weight'", "differs"]);
    *fixture.tensor("lm_head.weight") = fixture.tensor("model.embed_tokens.weight").clone();
    assert!(load(fixture.write().path()).expect("a copy of the embedding").head.is_none());
    fixture.tensors.remove("lm_head.weight");
    assert!(load(fixture.write().path()).expect("no head").head.is_none());
}

#[test]
fn generation_defaults_come_from_their_file_then_from_the_configuration() {
    let defaults = |config: Value, file: Option<Value>| {
        let dir = Fixture::new("mixtral").patched(config).write();
        if let Some(file) = file {
            fs::write(dir.path().join("generation_config.json"), file.to_string()).expect("generation_config.json");
        }
        open(dir.path()).map(|checkpoint| checkpoint.generation().clone())
    };
    let plain = defaults(json!({}), None).expect("ids of config.json");
    assert_eq!(plain, GenerationDefaults { eos_token_ids: vec![2], bos_token_id: Some(1), ..GenerationDefaults::default() });
    let file = json!({ "eos_token_id": [3, 4], "temperature": 0.7, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "do_sample": true,
        "transformers_version": "5.23.0" });
    let stated = defaults(json!({}), Some(file)).expect("a full file");
    let expected = GenerationDefaults {
        eos_token_ids: vec![3, 4],
        bos_token_id: Some(1),
        temperature: Some(0.7),
        top_p: Some(0.9),
        top_k: Some(20),
        repetition_penalty: Some(1.1),
        do_sample: Some(true),
    };
    assert_eq!(stated, expected);
    assert!(defaults(json!({ "eos_token_id": null }), None).expect("no end").eos_token_ids.is_empty());
    assert_eq!(defaults(json!({ "eos_token_id": [2, 99, -1] }), None).expect("ids outside are dropped").eos_token_ids, [2]);
    for (file, part) in [
        (json!({ "temperature": -1 }), "temperature is -1"),
        (json!({ "temperature": 1e308 }), "temperature is 1e+308"),
        (json!({ "repetition_penalty": 1e-60 }), "repetition_penalty is 1"), // The JSON reader may round the last digits.
        (json!({ "top_p": 1e-60 }), "top_p is 1"),
        (json!({ "top_p": 0 }), "top_p is 0"),
        (json!({ "top_k": 1.5 }), "top_k is 1.5"),
        (json!({ "eos_token_id": {} }), "eos_token_id is {}"),
        (json!(7), "expected a JSON object"),
    ] {
        let message = defaults(json!({}), Some(file)).expect_err("a wrong value").to_string();
        assert!(message.contains("generation_config.json") && message.contains(part), "{message}");
    }
}

// === damage ===

#[test]
fn a_missing_or_malformed_file_is_named() {
    let nowhere = tempfile::tempdir().expect("a temporary folder");
    assert_refused(&nowhere.path().join("nope"), &["nope", "no such folder"]);
    assert_refused(nowhere.path(), &["config.json", "no such file"]);
    let file = nowhere.path().join("file");
    fs::write(&file, "x").expect("a file");
    assert_refused(&file, &["not a folder"]);

    let dir = Fixture::new("mixtral").write();
    let path = |name: &str| dir.path().join(name);
    fs::remove_file(path("model.safetensors")).expect("it is there");
    assert_refused(dir.path(), &["no weights", "model.safetensors"]);
    fs::write(path("pytorch_model.bin"), "not read").expect("a file");
    assert_refused(dir.path(), &["pytorch_model.bin", "pickle", "convert"]);
    fs::write(path("config.json"), "{ \"model_type\": ").expect("a file");
    assert_refused(dir.path(), &["config.json", "not valid JSON", "line 1"]);
    fs::write(path("config.json"), "[1]").expect("a file");
    assert_refused(dir.path(), &["config.json", "JSON object"]);
    fs::remove_file(path("config.json")).and_then(|()| fs::create_dir(path("config.json"))).expect("a folder instead");
    assert_refused(dir.path(), &["config.json"]);
}

#[test]
fn unsupported_configurations_are_refused_on_disk_too() {
    let dir = Fixture::new("mixtral").patched(json!({ "model_type": "gpt_oss" })).write();
    assert_refused(dir.path(), &["config.json", "model_type", "gpt_oss", "mixtral"]);
    let dir = Fixture::new("qwen3_moe").patched(json!({ "hidden_act": "gelu" })).write();
    assert_refused(dir.path(), &["hidden_act", "gelu"]);
}

#[test]
fn missing_and_extra_tensors_are_listed() {
    let mut fixture = Fixture::new("mixtral");
    fixture.tensors.remove("model.layers.1.self_attn.k_proj.weight");
    assert_refused(fixture.write().path(), &["lack 1 tensor ", "'model.layers.1.self_attn.k_proj.weight'"]);
    fixture.tensors.retain(|name, _| !name.contains("experts"));
    let all = LAYERS * E * 3 + 1;
    assert_refused(fixture.write().path(), &[&format!("lack {all} tensors "), "experts.0.w1.weight", &format!("and {} more", all - 8)]);

    let mut fixture = Fixture::new("olmoe");
    fixture.tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), disk(Dtype::F32, "f", &[HEAD / 2]));
    load(fixture.write().path()).expect("harmless leftovers");
    fixture.tensors.insert("model.layers.0.mlp.gate.bias".into(), disk(Dtype::F32, "b", &[E]));
    assert_refused(fixture.write().path(), &["hold 1 tensor ", "'model.layers.0.mlp.gate.bias'", "not expected"]);
    let more = Fixture::new("olmoe").patched(json!({ "num_hidden_layers": 1 }));
    assert_refused(more.write().path(), &["model.layers.1.", "more"]);
}

#[test]
fn a_wrong_shape_or_dtype_is_named_with_what_was_expected() {
    let mut fixture = Fixture::new("mixtral");
    let name = "model.layers.0.block_sparse_moe.experts.2.w2.weight";
    *fixture.tensor(name) = disk(Dtype::F32, "w", &[F, D]);
    assert_refused(fixture.write().path(), &["model.safetensors", name, "[6, 8]", "[8, 6]"]);
    *fixture.tensor(name) = Disk { dtype: Dtype::I32, ..disk(Dtype::F32, "w", &[D, F]) };
    assert_refused(fixture.write().path(), &[name, "I32", "F32, BF16, F16"]);
    let bigger = Fixture::new("mixtral").patched(json!({ "vocab_size": V + 1 }));
    assert_refused(bigger.write().path(), &["model.embed_tokens.weight", "[12, 8]", "[13, 8]"]);
}

#[test]
fn a_truncated_shard_says_how_many_bytes_it_should_have() {
    let dir = Fixture::new("mixtral").write();
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).expect("the shard");
    let full = bytes.len().to_string();
    for length in [bytes.len() - 1, bytes.len() / 2] {
        fs::write(&path, &bytes[..length]).expect("a shorter shard");
        assert_refused(dir.path(), &["model.safetensors", "truncated", &full, &length.to_string()]);
    }
    for length in [0, 7, 100] {
        fs::write(&path, &bytes[..length]).expect("half a header");
        assert_refused(dir.path(), &["truncated", &format!("found {length}")]);
    }
    fs::write(&path, [bytes.as_slice(), b"xyz"].concat()).expect("a longer shard");
    assert_refused(dir.path(), &["3 bytes after the last tensor", &full]);
    fs::write(&path, [u64::MAX.to_le_bytes().as_slice(), &bytes].concat()).expect("an absurd header");
    assert_refused(dir.path(), &["header of 18446744073709551615 bytes"]);
    let mut broken = bytes.clone();
    broken[8] = b'[';
    fs::write(&path, &broken).expect("a broken header");
    assert_refused(dir.path(), &["model.safetensors", "broken safetensors header"]);
}

#[test]
fn an_index_that_leads_outside_the_folder_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let map = Fixture::new("mixtral").write_shards(dir.path(), 2);
    let outside = tempfile::tempdir().expect("a temporary folder");
    let target = outside.path().join("model-00002-of-00002.safetensors");
    fs::copy(dir.path().join("model-00002-of-00002.safetensors"), &target).expect("a copy");
    let absolute = target.to_string_lossy();
    let relative = format!("../{}/model-00002-of-00002.safetensors", outside.path().file_name().expect("a name").to_string_lossy());
    for name in
        [&*absolute, relative.as_str(), "..", ".", "", "sub/x.safetensors", "a\\b.safetensors", "./model-00002-of-00002.safetensors"]
    {
        let mut map = map.clone();
        map.insert("lm_head.weight".into(), name.into());
        write_index(dir.path(), &map);
        let error = assert_refused(dir.path(), &["model.safetensors.index.json", "outside", name]);
        assert!(matches!(error, CheckpointError::Outside { .. }), "{error}");
    }
    write_index(dir.path(), &map);
    let shard = dir.path().join("model-00002-of-00002.safetensors");
    fs::remove_file(&shard).and_then(|()| symlink(&target, &shard)).expect("a link");
    assert_refused(dir.path(), &["model-00002-of-00002.safetensors", "outside"]);
    fs::remove_file(dir.path().join("model.safetensors.index.json")).expect("the index");
    assert_refused(dir.path(), &["model-00002-of-00002.safetensors", "outside"]);
}

#[test]
fn index_and_shards_must_agree() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let map = Fixture::new("mixtral").write_shards(dir.path(), 2);
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let with = |change: &dyn Fn(&mut BTreeMap<String, String>)| {
        let mut map = map.clone();
        change(&mut map);
        write_index(dir.path(), &map);
    };
    let moved = if map["lm_head.weight"] == first { second } else { first };
    with(&|map| drop(map.insert("lm_head.weight".into(), moved.into())));
    assert_refused(dir.path(), &["index.json", "'lm_head.weight'", moved, &map["lm_head.weight"]]);
    with(&|map| drop(map.insert("ghost.weight".into(), first.into())));
    assert_refused(dir.path(), &["'ghost.weight'", "found in no shard"]);
    with(&|map| drop(map.remove("lm_head.weight")));
    assert_refused(dir.path(), &["'lm_head.weight'", "not in the index"]);
    with(&|map| drop(map.insert("x".into(), "model-9.safetensors".into())));
    assert_refused(dir.path(), &["model-9.safetensors", "no such file"]);
    fs::write(dir.path().join("model.safetensors.index.json"), r#"{ "weight_map": { "a": 1 } }"#).expect("the index");
    assert_refused(dir.path(), &["index.json", "weight_map.a is 1"]);
    fs::write(dir.path().join("model.safetensors.index.json"), "{}").expect("the index");
    assert_refused(dir.path(), &["index.json", "weight_map is absent"]);
    write_index(dir.path(), &map);
    fs::copy(dir.path().join(first), dir.path().join("model.safetensors")).expect("a leftover");
    assert_refused(dir.path(), &["model.safetensors", "not clear which"]);
}

#[test]
fn a_tensor_in_two_shards_and_a_missing_shard_are_refused() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let fixture = Fixture::new("mixtral");
    fixture.write_shards(dir.path(), 2);
    let (first, second) = (dir.path().join("model-00001-of-00002.safetensors"), dir.path().join("model-00002-of-00002.safetensors"));
    write_shard(&second, fixture.tensors.iter());
    assert_refused(dir.path(), &["tensor '", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "once"]);
    fs::remove_file(&second).expect("a shard");
    assert_refused(dir.path(), &["shard 2 of 2 is missing"]);
    fs::rename(&first, dir.path().join("model-00001-of-00001.safetensors")).expect("a shard");
    fs::write(&second, "").expect("a shard of another model");
    let error = load(dir.path()).expect_err("two sets of shards").to_string();
    assert!(error.contains("shards of more than one model"), "{error}");
}

#[test]
fn router_weights_must_be_finite() {
    for (value, dtype) in [(f32::NAN, DType::F32), (f32::INFINITY, DType::BF16)] {
        let mut fixture = Fixture::new("qwen2_moe");
        let name = "model.layers.1.mlp.gate.weight";
        fixture.tensor(name).bytes[20..24].copy_from_slice(&value.to_le_bytes());
        let dir = fixture.write();
        let error = open(dir.path()).and_then(|c| c.load(&options(dtype))).expect_err("a broken router").to_string();
        assert!(error.contains(name) && error.contains("element 5") && error.contains("not finite"), "{error}");
    }
    // 1e6 is a fine weight, and infinite in f16.
    let mut fixture = Fixture::new("mixtral");
    fixture.tensor("lm_head.weight").bytes[..4].copy_from_slice(&1e6f32.to_le_bytes());
    let dir = fixture.write();
    load(dir.path()).expect("1e6 in f32");
    let error = open(dir.path()).and_then(|c| c.load(&options(DType::F16))).expect_err("1e6 in f16").to_string();
    assert!(error.contains("lm_head.weight") && error.contains("too large for f16"), "{error}");
}

fn tokenizer_json(tokens: usize) -> String {
    let vocab: BTreeMap<_, _> = (0..tokens).map(|id| (format!("t{id}"), id)).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": { "type": "Whitespace" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "t0" },
    })
    .to_string()
}

#[test]
fn a_tokenizer_must_be_there_and_fit_the_embedding() {
    let dir = Fixture::new("mixtral").write();
    let path = dir.path().join("tokenizer.json");
    let message = || match open(dir.path()).expect("the rest is fine").tokenizer() {
        Ok(_) => panic!("a broken tokenizer was accepted"),
        Err(e) => e.to_string(),
    };
    assert!(message().contains("tokenizer.json: no such file"), "{}", message());
    fs::write(&path, "{}").expect("tokenizer.json");
    assert!(message().contains("not a tokenizer"), "{}", message());
    fs::write(&path, tokenizer_json(V + 1)).expect("tokenizer.json");
    let larger = message();
    assert!(["larger than the embedding", "'t12'", "id 12", "vocab_size 12"].iter().all(|part| larger.contains(part)), "{larger}");
    fs::write(&path, tokenizer_json(V)).expect("tokenizer.json");
    let tokenizer = open(dir.path()).and_then(|c| c.tokenizer()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(tokenizer.encode("t3 t4", false).expect("known words").get_ids(), [3, 4]);
}

#[test]
fn a_folder_that_changes_after_it_was_opened_is_refused() {
    let change = |name: &str, work: &dyn Fn(&Path)| {
        let dir = Fixture::new("mixtral").write();
        let checkpoint = open(dir.path()).expect("a whole checkpoint");
        work(&dir.path().join(name));
        let error = checkpoint.load(&options(DType::F32)).expect_err("the folder changed");
        assert!(matches!(error, CheckpointError::Changed { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    };
    change("model.safetensors", &|path| {
        let file = fs::OpenOptions::new().write(true).open(path).expect("the shard");
        file.set_len(64).expect("a shorter file");
    });
    change("model.safetensors", &|path| {
        // The same bytes in a new file: somebody is replacing the checkpoint.
        let bytes = fs::read(path).expect("the shard");
        fs::write(path.with_extension("new"), bytes).and_then(|()| fs::rename(path.with_extension("new"), path)).expect("a new shard");
    });
    change("model.safetensors", &|path| fs::remove_file(path).expect("the shard"));
    change("config.json", &|path| fs::write(path, "{}").expect("config.json"));
}

#[test]
fn damaged_files_never_panic() {
    let dir = Fixture::new("qwen3_moe").patched(json!({ "routing": { "version": 1, "serve": { "k": 1 } } })).write();
    let attempt = || drop(load(dir.path()));
    for (name, reach) in [("config.json", usize::MAX), ("model.safetensors", 4000)] {
        let path = dir.path().join(name);
        let bytes = fs::read(&path).expect("a whole file");
        let reach = reach.min(bytes.len());
        for length in (0..reach).step_by(31) {
            fs::write(&path, &bytes[..length]).expect("a shorter file");
            attempt();
        }
        for (at, flip) in (0..reach).step_by(7).zip([0x01, 0x10, 0x20, 0x80, 0xff].into_iter().cycle()) {
            let mut damaged = bytes.clone();
            damaged[at] ^= flip;
            fs::write(&path, &damaged).expect("a damaged file");
            attempt();
        }
        fs::write(&path, &bytes).expect("the whole file");
    }
    load(dir.path()).expect("the whole checkpoint");
}

// === saving ===

fn saved_parts() -> (TempDir, Checkpoint, ModelWeights) {
    let dir = Fixture::new("mixtral").write();
    let checkpoint = open(dir.path()).expect("a whole checkpoint");
    let weights = checkpoint.load(&options(DType::F32)).expect("a whole checkpoint");
    (dir, checkpoint, weights)
}

fn request<'a>(checkpoint: &'a Checkpoint, weights: &'a ModelWeights) -> SaveRequest<'a> {
    SaveRequest {
        spec: checkpoint.spec(),
        weights,
        routing: checkpoint.routing(),
        tokenizer: None,
        generation: checkpoint.generation(),
        dtype: DType::F32,
    }
}

fn target() -> (TempDir, PathBuf) {
    let parent = tempfile::tempdir().expect("a temporary folder");
    let dir = parent.path().join("model");
    (parent, dir)
}

#[test]
fn what_is_saved_reads_back() {
    let (_source, checkpoint, weights) = saved_parts();
    let block = RoutingBlock {
        train: Some(TrainRecord { estimator: "gumbel_soft".into(), ..TrainRecord::default() }),
        reference: Some(ReferenceRecord { mode: ReferenceMode::Soft, temperature: Some(0.5), k: None, noise: None }),
        serve: Some(ServeRecord { k: Some(1), weight_form: Some(WeightForm::Unit), ..ServeRecord::default() }),
        ..RoutingBlock::default()
    };
    let mut spec = checkpoint.spec().clone();
    spec.reference = ReferenceRouting::Soft { temperature: 0.5 };
    spec.estimator = "gumbel_soft".into();
    for layer in &mut spec.layers {
        let FeedForwardSpec::Moe(moe) = &mut layer.feed_forward else { panic!("Mixtral has no dense layer") };
        (moe.top_k, moe.weight_form) = (1, WeightForm::Unit);
    }
    let tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer_json(V)).expect("a tokenizer");
    let generation = GenerationDefaults { temperature: Some(0.7), top_k: Some(5), ..checkpoint.generation().clone() };
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let (_parent, dir) = target();
        let full = SaveRequest {
            spec: &spec,
            routing: Some(&block),
            tokenizer: Some(&tokenizer),
            generation: &generation,
            dtype,
            ..request(&checkpoint, &weights)
        };
        save(&dir, &full).unwrap_or_else(|e| panic!("{dtype:?}: {e}"));
        let back = open(&dir).expect("what was saved");
        assert_eq!((back.spec(), back.routing(), back.generation()), (&spec, Some(&block), &generation));
        assert_eq!(back.tokenizer().expect("a tokenizer").get_vocab_size(true), V);
        let loaded = back.load(&options(DType::F32)).expect("what was saved");
        assert_eq!(floats(&loaded.embedding), floats(&weights.embedding));
        assert_eq!(floats(&first_experts(&loaded).gate_up), floats(&first_experts(&weights).gate_up));
        assert_eq!(floats(&first_experts(&loaded).router), floats(&first_experts(&weights).router));
        let routers: Vec<_> = back.tensors().filter(|tensor| tensor.name.ends_with(".gate.weight")).map(|tensor| tensor.dtype).collect();
        assert_eq!(routers, ["F32"; LAYERS]);
        let bytes = fs::read(dir.join("model.safetensors")).expect("the weights");
        let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header that the library accepts");
        let metadata = header.metadata().clone().expect("metadata");
        assert_eq!(metadata["format"], "pt");
        let config: Value = serde_json::from_slice(&fs::read(dir.join("config.json")).expect("config.json")).expect("JSON");
        assert_eq!(serde_json::from_str::<Value>(&metadata["routing"]).expect("JSON"), config["routing"]);
        assert_eq!(config["architectures"], json!(["MixtralForCausalLM"]));
        let leftovers: Vec<_> = fs::read_dir(dir.parent().expect("a parent")).expect("a folder").collect();
        assert_eq!(leftovers.len(), 1, "{leftovers:?}");
    }
}

#[test]
fn saving_over_a_checkpoint_keeps_what_else_is_there() {
    let (_source, checkpoint, weights) = saved_parts();
    let (_parent, dir) = target();
    save(&dir, &request(&checkpoint, &weights)).expect("a first save");
    fs::write(dir.join("README.md"), "the card").and_then(|()| fs::create_dir(dir.join("curves"))).expect("files of somebody else");
    fs::write(dir.join("model-00001-of-00002.safetensors"), "stale").expect("a stale shard");
    save(&dir, &SaveRequest { dtype: DType::BF16, ..request(&checkpoint, &weights) }).expect("a second save");
    assert_eq!(fs::read_to_string(dir.join("README.md")).expect("kept"), "the card");
    assert!(dir.join("curves").is_dir() && !dir.join("model-00001-of-00002.safetensors").exists());
    load(&dir).expect("the second save");

    let (_parent, foreign) = target();
    fs::create_dir(&foreign).and_then(|()| fs::write(foreign.join("thesis.tex"), "years of work")).expect("somebody's folder");
    let error = save(&foreign, &request(&checkpoint, &weights)).expect_err("not ours to replace").to_string();
    assert!(error.contains("neither empty nor a checkpoint"), "{error}");
    assert!(foreign.join("thesis.tex").exists());
}

#[test]
fn a_save_that_fails_leaves_the_old_checkpoint() {
    let (_source, checkpoint, weights) = saved_parts();
    let (parent, dir) = target();
    save(&dir, &request(&checkpoint, &weights)).expect("a first save");
    let mut broken = weights.clone();
    broken.final_norm = (broken.final_norm * f64::INFINITY).expect("a tensor");
    let error = save(&dir, &request(&checkpoint, &broken)).expect_err("infinite weights").to_string();
    assert!(error.contains("model.norm.weight") && error.contains("not finite"), "{error}");
    load(&dir).expect("the first save");
    assert_eq!(fs::read_dir(parent.path()).expect("a folder").count(), 1, "nothing is left behind");
}

#[test]
fn what_mixtral_cannot_state_is_not_saved() {
    let (_parent, dir) = target();
    for (family, part) in [("olmoe", "qk_norm"), ("qwen2_moe", "bias"), ("qwen3_moe", "qk_norm")] {
        let source = Fixture::new(family).write();
        let checkpoint = open(source.path()).expect("a whole checkpoint");
        let weights = checkpoint.load(&options(DType::F32)).expect("a whole checkpoint");
        let error = save(&dir, &request(&checkpoint, &weights)).expect_err("not the Mixtral layout").to_string();
        assert!(error.contains("cannot save") && error.contains(part), "{family}: {error}");
    }
    let (_source, checkpoint, weights) = saved_parts();
    let whole = request(&checkpoint, &weights);
    let refused = |request: &SaveRequest<'_>, part: &str| {
        let error = save(&dir, request).expect_err("not what can be stated").to_string();
        assert!(error.contains(part), "{error}");
    };
    let mut spec = checkpoint.spec().clone();
    spec.estimator = "soft".into();
    refused(&SaveRequest { spec: &spec, ..whole }, "estimator");
    let mut spec = checkpoint.spec().clone();
    spec.reference = ReferenceRouting::Soft { temperature: 1.0 };
    refused(&SaveRequest { spec: &spec, ..whole }, "reference");
    let mut spec = checkpoint.spec().clone();
    let FeedForwardSpec::Moe(moe) = &mut spec.layers[1].feed_forward else { panic!("Mixtral has no dense layer") };
    moe.top_k = 1;
    refused(&SaveRequest { spec: &spec, ..whole }, "layer 1");
    let mut spec = checkpoint.spec().clone();
    spec.layers[1].feed_forward = FeedForwardSpec::Dense { width: F };
    refused(&SaveRequest { spec: &spec, ..whole }, "dense");
    let mut spec = checkpoint.spec().clone();
    spec.vocab_size += 1;
    refused(&SaveRequest { spec: &spec, ..whole }, "model.embed_tokens.weight");
    refused(&SaveRequest { dtype: DType::U8, ..whole }, "U8");
    let generation = GenerationDefaults { eos_token_ids: vec![V as u32], ..GenerationDefaults::default() };
    refused(&SaveRequest { generation: &generation, ..whole }, "vocab_size");
    let tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer_json(V + 1)).expect("a tokenizer");
    refused(&SaveRequest { tokenizer: Some(&tokenizer), ..whole }, "larger than the embedding");
    assert!(!dir.exists());
}

#[test]
fn inspect_reports_and_fails_where_tensors_do_not_fit() {
    let mut fixture = Fixture::new("qwen3_moe");
    let whole = fixture.write();
    let checkpoint = open(whole.path()).expect("a whole checkpoint");
    let text = inspect::report(&checkpoint, false, true);
    for part in ["complete", "qwen3_moe", "dense, width 10", "3 experts of width 6", "top-2 (renorm), layers 1", "own top-k (assumed)"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    assert!(fixture.tensors.keys().all(|name| text.contains(name)), "{text}");
    let json: Value = serde_json::from_str(&inspect::report(&checkpoint, true, false)).expect("JSON");
    let elements: usize = fixture.tensors.values().map(|disk| disk.bytes.len() / 4).sum();
    assert_eq!((&json["size"]["parameters"], &json["tensors"]["bytes_by_dtype"]["F32"]), (&json!(elements), &json!(4 * elements)));
    assert_eq!(json["routing"]["serving"], json!([{ "layer": 1, "k": 2, "weight_form": "renorm" }]));
    assert!(json["tensors"]["list"].is_null());

    fixture.tensors.remove("model.norm.weight");
    let dir = fixture.write();
    let text = inspect::report(&open(dir.path()).expect("headers are fine"), false, false);
    assert!(text.contains("lack 1 tensor ('model.norm.weight')"), "{text}");
    let args = InspectArgs { dir: dir.path().into(), json: false, tensors: false };
    let error = inspect::run(args).expect_err("a missing tensor").to_string();
    assert!(error.contains("model.norm.weight"), "{error}");
}

#[test]
fn forward_fails_where_the_model_computes_no_numbers() {
    let forward = |fixture: &Fixture| {
        let dir = fixture.write();
        let output = dir.path().join("forward.safetensors");
        let result = forward::run(ForwardArgs {
            model: dir.path().into(),
            input_ids: vec![0, 1, 2],
            routing: RoutingChoice::Native,
            output: output.clone(),
            compute: ComputeArgs::default(),
        });
        (result, output.exists())
    };
    let mut fixture = Fixture::new("mixtral");
    assert!(matches!(forward(&fixture), (Ok(()), true)));
    // Of the first token only, then of all.
    for name in ["model.embed_tokens.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight"] {
        let whole = fixture.clone();
        fixture.tensor(name).bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        let (result, written) = forward(&fixture);
        let error = result.expect_err(name).to_string();
        assert!(error.contains("non-finite") && !written, "{name}: {error}");
        fixture = whole;
    }
}
