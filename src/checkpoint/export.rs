//! A checkpoint with the tensors of a delta in their places, as a folder in the layout of the checkpoint.
//!
//! What did not change is copied byte by byte, so every family is written as it was published.

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File},
    io::{BufWriter, Write as _},
    ops::Range,
    path::Path,
};

use candle_core::{DType, Tensor};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use serde_json::Value;

use super::{
    CONFIG, Checkpoint, CheckpointError, Delta, ROUTING,
    config::Config,
    fields::read_json,
    load::{CHUNK, HEAD, Plan},
    names::{Source, Weight, weights},
    save::{WEIGHTS, bytes_of, routing_json, write_json},
    shards::Location,
    swap::Swap,
};

type Result<T> = std::result::Result<T, CheckpointError>;

/// Files beside weights and config.json that say how a model is used: tokenizers in all their forms, generation, chat templates.
const ENDINGS: [&str; 4] = [".json", ".model", ".txt", ".jinja"];

/// Writes `base` with the tensors and the routing block of `delta` as the folder `dir`, replacing a checkpoint that is there.
///
/// Tensors keep the element type that they have on disk, but for routers that changed: those are f32. Fails as [`super::save()`] does,
/// and where the delta names or shapes a tensor that the checkpoint does not have. `base` and `dir` may be the same folder.
pub fn export(base: &Checkpoint, dir: &Path, delta: &Delta) -> Result<()> {
    let plan = base.plan()?;
    base.check_unchanged()?;
    let config = config_json(base, delta)?;
    let files = Files::new(base, &plan, delta)?;
    let swap = Swap::new(dir)?;
    let write = || {
        files.write(&swap.partial.join(WEIGHTS), delta)?;
        write_json(&swap.partial.join(CONFIG), &config)?;
        copy_others(base.dir(), &swap.partial)?;
        base.check_unchanged()?;
        swap.commit(dir)
    };
    let written = write();
    if written.is_err() {
        // Best effort: the error that matters is the one above.
        let _ = fs::remove_dir_all(&swap.partial);
    }
    written
}

/// The config of `base` with another routing block, which must read back.
fn config_json(base: &Checkpoint, delta: &Delta) -> Result<Value> {
    let path = base.dir().join(CONFIG);
    let mut config = read_json(&path)?;
    if let Value::Object(map) = &mut config {
        map.insert(ROUTING.into(), routing_json(&delta.routing)?);
    }
    Config::parse(&path, &config)?;
    Ok(config)
}

fn copy_others(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).map_err(|e| CheckpointError::io(from, e))? {
        let entry = entry.map_err(|e| CheckpointError::io(from, e))?;
        let (name, path) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
        let other = ENDINGS.iter().any(|ending| name.ends_with(ending)) && name != CONFIG && !name.ends_with(".index.json");
        if other && path.is_file() {
            let copy = || {
                File::open(&path).and_then(|mut from| {
                    let mut to = File::create_new(to.join(&name))?;
                    std::io::copy(&mut from, &mut to)?;
                    to.sync_all()
                })
            };
            copy().map_err(|e| CheckpointError::io(&path, e))?;
        }
    }
    Ok(())
}

/// The tensors of a file about to be written.
struct Files<'a> {
    base: &'a Checkpoint,
    /// In the order in which they are written: wide element types first, so that every tensor is aligned.
    tensors: Vec<Entry<'a>>,
}

struct Entry<'a> {
    name: &'a str,
    location: &'a Location,
    dtype: Dtype,
    /// The tensor that changed, and the elements of it that lie here.
    changed: Option<(&'a Tensor, Source, Range<usize>)>,
}

impl<'a> Files<'a> {
    fn new(base: &'a Checkpoint, plan: &Plan<'a>, delta: &'a Delta) -> Result<Self> {
        let mut changed = changed_parts(base, plan, delta)?;
        let entry = |(name, location): (&'a String, &'a Location)| {
            let changed = changed.remove(name.as_str());
            let router = changed.as_ref().is_some_and(|(_, source, _)| source.router);
            Entry { name, location, dtype: if router { Dtype::F32 } else { location.dtype }, changed }
        };
        let mut tensors: Vec<Entry<'a>> = base.shards.tensors.iter().map(entry).collect();
        tensors.sort_by_key(|entry| (std::cmp::Reverse(entry.dtype.bitsize()), entry.name));
        Ok(Self { base, tensors })
    }

    fn write(&self, path: &Path, delta: &Delta) -> Result<()> {
        let io = |e| CheckpointError::io(path, e);
        let mut header = self.header(path, delta)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut file = BufWriter::with_capacity(CHUNK, File::create_new(path).map_err(io)?);
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        file.write_all(&header).map_err(io)?;
        let reader = self.base.shards.reader()?;
        let mut buffer = vec![0; CHUNK];
        for Entry { location, dtype, changed, .. } in &self.tensors {
            if let Some((tensor, source, range)) = changed {
                file.write_all(&elements(path, tensor, source, range, *dtype)?).map_err(io)?;
                continue;
            }
            let mut start = 0;
            while start < location.bytes {
                let piece = &mut buffer[..CHUNK.min(usize::try_from(location.bytes - start).unwrap_or(CHUNK))];
                reader.read(location, start, piece)?;
                file.write_all(piece).map_err(io)?;
                start += piece.len() as u64;
            }
        }
        file.into_inner().map_err(|e| io(e.into_error()))?.sync_all().map_err(io)
    }

    fn header(&self, path: &Path, delta: &Delta) -> Result<Vec<u8>> {
        let routing = routing_json(&delta.routing)?.to_string();
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned()), (ROUTING.to_owned(), routing)]);
        let mut offset = 0;
        let info = |entry: &Entry<'_>| {
            let (start, elements) = (offset, entry.location.shape.iter().product::<usize>());
            offset += elements * entry.dtype.bitsize() / 8;
            (entry.name.to_owned(), TensorInfo { dtype: entry.dtype, shape: entry.location.shape.clone(), data_offsets: (start, offset) })
        };
        let infos = self.tensors.iter().map(info).collect();
        let header = Metadata::new(Some(metadata), infos).map_err(|e| CheckpointError::malformed(path, e))?;
        serde_json::to_vec(&header).map_err(|e| CheckpointError::malformed(path, e))
    }
}

type Changed<'a> = (&'a Tensor, Source, Range<usize>);

/// By name on disk: the tensor of the delta that it is made of, and which elements.
fn changed_parts<'a>(base: &'a Checkpoint, plan: &Plan<'a>, delta: &'a Delta) -> Result<BTreeMap<String, Changed<'a>>> {
    let named: BTreeMap<String, Weight> = weights(base.spec()).into_iter().map(|weight| (weight.name(), weight)).collect();
    let mut parts = BTreeMap::new();
    for (name, tensor) in &delta.tensors {
        let unlike = |found: String, expected: String| CheckpointError::NotSavable { field: name.clone(), found, expected };
        let weight = *named.get(name).ok_or_else(|| unlike("a tensor of the delta".into(), "a tensor that the model has".into()))?;
        let source = plan.source(weight);
        if tensor.dims() != source.shape {
            return Err(unlike(format!("shape {:?}", tensor.dims()), format!("shape {:?}", source.shape)));
        }
        let mut start = 0;
        for part in &source.parts {
            let end = start + part.shape.iter().product::<usize>();
            parts.insert(part.name.clone(), (tensor, source.clone(), start..end));
            start = end;
        }
        if weight == Weight::Embedding && plan.redundant_head {
            parts.insert(HEAD.to_owned(), (tensor, source.clone(), 0..source.elements()));
        }
    }
    Ok(parts)
}

fn elements(path: &Path, tensor: &Tensor, source: &Source, range: &Range<usize>, dtype: Dtype) -> Result<Vec<u8>> {
    let dtype = match dtype {
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        _ => DType::F32,
    };
    let part = tensor.flatten_all().and_then(|flat| flat.narrow(0, range.start, range.len()));
    let part = part.map_err(|source_error| CheckpointError::Tensor {
        tensor: source.parts.first().map(|p| p.name.clone()).unwrap_or_default(),
        source: source_error,
    })?;
    bytes_of(path, &part, source, dtype)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use candle_core::Device;

    use super::*;
    use crate::{
        checkpoint::{FidelityRecord, LoadOptions, RoutingBlock},
        error::ErrorKind,
        model::weights::ModelWeights,
    };

    fn goldens() -> Vec<PathBuf> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
        let mut folders: Vec<_> = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_dir()).collect();
        folders.sort();
        assert!(folders.len() >= 12, "{folders:?}");
        folders
    }

    fn load(checkpoint: &Checkpoint) -> ModelWeights {
        checkpoint.load(&LoadOptions { dtype: DType::F32, device: Device::Cpu, progress: false }).unwrap()
    }

    fn values(tensor: &Tensor) -> Vec<f32> {
        tensor.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Numbers that every element type holds.
    fn delta(base: &Checkpoint, chosen: impl Fn(&str) -> bool) -> Delta {
        let weights = load(base);
        let other = |tensor: &Tensor| {
            let values: Vec<f32> = (0..tensor.elem_count()).map(|i| (i % 251) as f32 / 64.0 - 1.5).collect();
            Tensor::from_vec(values, tensor.shape(), &Device::Cpu).unwrap()
        };
        let named = weights.named().into_iter().filter(|(name, _)| chosen(name));
        let tensors = named.map(|(name, tensor)| (name, other(tensor))).collect();
        let fidelity = Some(FidelityRecord { kl: Some(0.25), ..FidelityRecord::default() });
        Delta { base: base.digest().unwrap(), routing: RoutingBlock { fidelity, ..base.routing().cloned().unwrap_or_default() }, tensors }
    }

    /// Every family, layout and element type there is a golden of.
    #[test]
    fn every_family_is_written_in_its_own_layout() {
        let dir = tempfile::tempdir().unwrap();
        for folder in goldens() {
            let base = Checkpoint::open(&folder).unwrap();
            let chosen = |name: &str| name.starts_with("layers.0.") && !name.contains("norm") || name == "embedding";
            let delta = delta(&base, chosen);
            let out = dir.path().join(folder.file_name().unwrap());
            export(&base, &out, &delta).unwrap();
            let written = Checkpoint::open(&out).unwrap();
            written.verify().unwrap();
            assert_eq!(written.routing(), Some(&delta.routing));
            assert_eq!((written.spec(), written.generation()), (base.spec(), base.generation()), "{}", folder.display());
            let (before, after) = (load(&base), load(&written));
            for ((name, old), (_, new)) in before.named().into_iter().zip(after.named()) {
                let wanted = delta.tensors.get(&name).unwrap_or(old);
                assert!(values(wanted) == values(new), "{}: {name}", folder.display());
            }
            let dtypes: BTreeMap<_, _> = base.tensors().map(|tensor| (tensor.name, tensor.dtype)).collect();
            for tensor in written.tensors() {
                let router = base.spec().moe_layers().next().is_some_and(|(layer, _)| layer == 0)
                    && tensor.name.starts_with("model.layers.0.")
                    && tensor.name.ends_with(".gate.weight");
                let wanted = if router { "F32" } else { dtypes[&tensor.name].as_str() };
                assert_eq!(tensor.dtype, wanted, "{}: {}", folder.display(), tensor.name);
            }
            assert_eq!(dtypes.len(), written.tensors().count());
        }
    }

    #[test]
    fn a_delta_is_for_its_base_and_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["mixtral_top1", "mixtral_gqa"]
            .map(|name| Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)).unwrap());
        let delta = delta(&one, |name| name.ends_with(".router"));
        let file = dir.path().join("routers.safetensors");
        delta.write(&file).unwrap();
        let read = Delta::read(&file).unwrap();
        assert_eq!((&read.base, &read.routing), (&delta.base, &delta.routing));
        assert!(read.tensors.iter().zip(&delta.tensors).all(|((a, x), (b, y))| a == b && values(x) == values(y)));
        one.check_delta(&read).unwrap();
        let refused = other.check_delta(&read).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::FailedPrecondition);
        assert!(refused.to_string().contains(&delta.base) && refused.to_string().contains(&other.digest().unwrap()), "{refused}");

        let whole = fs::read(&file).unwrap();
        for (damage, what) in [(0, "not a delta"), (whole.len() - 1, "damaged"), (whole.len() - 5, "damaged")] {
            let mut bytes = whole.clone();
            bytes[damage] ^= 0x55;
            fs::write(&file, bytes).unwrap();
            let error = Delta::read(&file).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}");
            assert!(error.to_string().contains(what), "{error}");
        }
        fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        assert!(Delta::read(&file).is_err(), "half of it");
        assert!(Delta::read(&one.dir().join("model.safetensors")).unwrap_err().to_string().contains("not a delta"));
    }

    #[test]
    fn what_the_model_does_not_have_is_refused_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let base = Checkpoint::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/mixtral_top1")).unwrap();
        let good = delta(&base, |name| name == "layers.0.router");
        let router = good.tensors["layers.0.router"].clone();
        let nan = (&router * f64::NAN).unwrap();
        let short = router.narrow(0, 0, 1).unwrap();
        for (name, tensor, message) in [
            ("layers.9.router", router, "layers.9.router"),
            ("layers.0.router", short, "shape"),
            ("layers.0.router", nan, "cannot be served"),
        ] {
            let bad = Delta { tensors: BTreeMap::from([(name.to_owned(), tensor)]), ..good.clone() };
            let error = export(&base, &dir.path().join("out"), &bad).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{error}");
        }
        export(&base, &dir.path().join("out"), &good).unwrap();
        export(&base, &dir.path().join("out"), &good).unwrap();
    }
}
