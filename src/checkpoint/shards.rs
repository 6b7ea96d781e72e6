//! Which safetensors files a folder has and which tensor is where. Reads headers only.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io::{self, Read as _},
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Component, Path, PathBuf},
    time::SystemTime,
};

use safetensors::{Dtype, tensor::Metadata};

use super::{
    CheckpointError,
    fields::{Fields, read_optional_json},
};

type Result<T> = std::result::Result<T, CheckpointError>;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes of the length in front of a header.
const LENGTH: u64 = 8;
/// Largest header, as the safetensors format has it.
const HEADER_LIMIT: u64 = 100_000_000;

/// What identifies the content of a file well enough to notice that it was replaced or is being written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fingerprint {
    pub(super) length: u64,
    modified: Option<SystemTime>,
    inode: u64,
}

impl Fingerprint {
    fn new(metadata: &fs::Metadata) -> Self {
        Self { length: metadata.len(), modified: metadata.modified().ok(), inode: metadata.ino() }
    }

    pub(super) fn of(path: &Path) -> Result<Self> {
        fs::metadata(path).map(|metadata| Self::new(&metadata)).map_err(|e| CheckpointError::io(path, e))
    }

    /// Fails where `path` is no longer the file that this is of.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        match Self::of(path) {
            Ok(now) if now == *self => Ok(()),
            _ => Err(CheckpointError::Changed { path: path.into() }),
        }
    }
}

/// One safetensors file.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) fingerprint: Fingerprint,
    /// `__metadata__` of the header.
    pub(super) metadata: HashMap<String, String>,
}

/// Where a tensor is.
#[derive(Clone, Debug)]
pub(super) struct Location {
    /// Index into [`Shards::shards`].
    pub(super) shard: usize,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Of its first byte, from the start of the file.
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// All weights of a folder.
#[derive(Debug)]
pub(super) struct Shards {
    pub(super) shards: Vec<Shard>,
    pub(super) tensors: BTreeMap<String, Location>,
    /// The index file, where there is one.
    pub(super) index: Option<PathBuf>,
}

impl Shards {
    /// Finds the files and reads their headers.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let index_path = dir.join(INDEX);
        let index = read_index(&index_path)?;
        let names: Vec<String> = match &index {
            Some(index) => index.values().cloned().collect::<BTreeSet<_>>().into_iter().collect(),
            None => find_files(dir)?,
        };
        if index.is_some() && dir.join(SINGLE).exists() && !names.iter().any(|name| name == SINGLE) {
            let message = format!("{SINGLE} is there too, and not in the index: it is not clear which to load; remove one");
            return Err(CheckpointError::malformed(index_path, message));
        }
        let origin = if index.is_some() { index_path.as_path() } else { dir };
        let inside = Inside::new(dir, origin)?;
        let mut all = Self { shards: Vec::new(), tensors: BTreeMap::new(), index: index.is_some().then(|| index_path.clone()) };
        for name in names {
            all.add(inside.resolve(&name)?)?;
        }
        if let Some(index) = index {
            all.check_index(&index_path, &index)?;
        }
        Ok(all)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let file = File::open(&path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                CheckpointError::Missing { path: path.clone(), message: "no such file, though the index names it".into() }
            }
            _ => CheckpointError::io(&path, e),
        })?;
        let (fingerprint, data_start, header) = read_header(&path, &file)?;
        let shard = self.shards.len();
        for (name, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let location = Location {
                shard,
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: data_start + start as u64,
                bytes: (end - start) as u64,
            };
            if let Some(other) = self.tensors.insert(name.clone(), location) {
                let first = self.shards.get(other.shard).map_or_else(|| path.clone(), |shard| shard.path.clone());
                return Err(CheckpointError::DuplicateTensor { tensor: name, first, second: path });
            }
        }
        self.shards.push(Shard { path, fingerprint, metadata: header.metadata().clone().unwrap_or_default() });
        Ok(())
    }

    /// Index and shards must say the same.
    fn check_index(&self, path: &Path, index: &BTreeMap<String, String>) -> Result<()> {
        let disagree = |tensor: &str, message: String| Err(CheckpointError::Index { path: path.into(), tensor: tensor.into(), message });
        for (tensor, file) in index {
            match self.tensors.get(tensor).map(|location| self.file_name(location)) {
                None => return disagree(tensor, format!("should be in {file}, found in no shard")),
                Some(found) if found != *file => return disagree(tensor, format!("should be in {file}, found in {found}")),
                Some(_) => {}
            }
        }
        match self.tensors.iter().find(|(tensor, _)| !index.contains_key(*tensor)) {
            Some((tensor, location)) => disagree(tensor, format!("is in {} and not in the index", self.file_name(location))),
            None => Ok(()),
        }
    }

    /// File in which a tensor is.
    pub(super) fn path(&self, location: &Location) -> PathBuf {
        self.shards.get(location.shard).map(|shard| shard.path.clone()).unwrap_or_default()
    }

    /// Its name inside the folder.
    pub(super) fn file_name(&self, location: &Location) -> String {
        self.path(location).file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// Opens all files for reading, checking that they are still the same.
    pub(super) fn reader(&self) -> Result<Reader<'_>> {
        let open = |shard: &Shard| {
            let file = File::open(&shard.path).map_err(|e| CheckpointError::io(&shard.path, e))?;
            let metadata = file.metadata().map_err(|e| CheckpointError::io(&shard.path, e))?;
            if Fingerprint::new(&metadata) != shard.fingerprint {
                return Err(CheckpointError::Changed { path: shard.path.clone() });
            }
            Ok(file)
        };
        Ok(Reader { shards: self, files: self.shards.iter().map(open).collect::<Result<_>>()? })
    }
}

/// Open files of a [`Shards`].
#[derive(Debug)]
pub(super) struct Reader<'a> {
    pub(super) shards: &'a Shards,
    files: Vec<File>,
}

impl Reader<'_> {
    /// Fills `buffer` with the bytes of a tensor from `start`, counted from its first.
    pub(super) fn read(&self, location: &Location, start: u64, buffer: &mut [u8]) -> Result<()> {
        let path = || self.shards.path(location);
        let Some(file) = self.files.get(location.shard) else { return Err(CheckpointError::Changed { path: path() }) };
        file.read_exact_at(buffer, location.offset + start).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => CheckpointError::Changed { path: path() },
            _ => CheckpointError::io(path(), e),
        })
    }
}

/// Parses a header and checks it against the length of its file.
fn read_header(path: &Path, mut file: &File) -> Result<(Fingerprint, u64, Metadata)> {
    let io = |e| CheckpointError::io(path, e);
    let metadata = file.metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(CheckpointError::malformed(path, "not a regular file"));
    }
    let fingerprint = Fingerprint::new(&metadata);
    let truncated = |expected| CheckpointError::Truncated { path: path.into(), expected, found: fingerprint.length };
    if fingerprint.length < LENGTH {
        return Err(truncated(LENGTH));
    }
    let mut length = [0; LENGTH as usize];
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_LIMIT {
        let message = format!("not a safetensors file: it announces a header of {length} bytes, expected at most {HEADER_LIMIT}");
        return Err(CheckpointError::malformed(path, message));
    }
    let data_start = LENGTH + length;
    if data_start > fingerprint.length {
        return Err(truncated(data_start));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(io)?;
    let header: Metadata =
        serde_json::from_slice(&header).map_err(|e| CheckpointError::malformed(path, format!("broken safetensors header: {e}")))?;
    let expected = data_start.saturating_add(header.data_len() as u64);
    if expected > fingerprint.length {
        return Err(truncated(expected));
    }
    if expected < fingerprint.length {
        let message = format!("{} bytes after the last tensor, expected a file of {expected} bytes", fingerprint.length - expected);
        return Err(CheckpointError::malformed(path, message));
    }
    Ok((fingerprint, data_start, header))
}

/// Tensor to file, of an index.
fn read_index(path: &Path) -> Result<Option<BTreeMap<String, String>>> {
    let Some(value) = read_optional_json(path)? else { return Ok(None) };
    let index = Fields::new(path, &value)?;
    let map = index.object("weight_map")?.ok_or_else(|| index.wrong("weight_map", "an object from tensor names to file names"))?;
    let entry = |key| Ok((String::from(key), map.string(key)?.ok_or_else(|| map.wrong(key, "a file name"))?.to_string()));
    map.keys().map(entry).collect::<Result<_>>().map(Some)
}

/// Weight files of a folder without an index.
fn find_files(dir: &Path) -> Result<Vec<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(|e| CheckpointError::io(dir, e))? {
        let entry = entry.map_err(|e| CheckpointError::io(dir, e))?;
        names.insert(entry.file_name().to_string_lossy().into_owned());
    }
    if names.contains(SINGLE) {
        return Ok(vec![SINGLE.to_string()]);
    }
    let numbered: Vec<_> = names.iter().filter_map(|name| Some((name, shard_number(name)?))).collect();
    if let Some((_, (_, total))) = numbered.first() {
        let missing = (1..=*total).find(|wanted| !numbered.iter().any(|(_, number)| *number == (*wanted, *total)));
        return match missing {
            Some(number) => {
                let message = format!("shard {number} of {total} is missing (model-{number:05}-of-{total:05}.safetensors)");
                Err(CheckpointError::Missing { path: dir.into(), message })
            }
            None if numbered.len() != *total => Err(CheckpointError::malformed(dir, "shards of more than one model, and no index")),
            None => Ok(numbered.into_iter().map(|(name, _)| name.clone()).collect()),
        };
    }
    let pickle = names
        .iter()
        .find(|name| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|ending| name.ends_with(ending)) && !name.starts_with("training_args"));
    let message = match pickle {
        Some(name) => format!("{name} is a pickle file, which hardmax does not read; convert the weights to {SINGLE}"),
        None => format!("no weights: neither {SINGLE}, nor {INDEX}, nor model-00001-of-0000N.safetensors"),
    };
    Err(CheckpointError::Missing { path: dir.into(), message })
}

/// (number, total) of `model-00001-of-00003.safetensors`.
fn shard_number(name: &str) -> Option<(usize, usize)> {
    let (number, total) = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
    let (number, total) = (number.parse().ok()?, total.parse().ok()?);
    (number >= 1 && total <= 100_000).then_some((number, total))
}

/// Turns file names into paths that stay inside a folder.
struct Inside<'a> {
    dir: &'a Path,
    origin: &'a Path,
    /// The folder without links, and the blob store of a Hugging Face cache, to which the files of a snapshot are links.
    roots: Vec<PathBuf>,
}

impl<'a> Inside<'a> {
    fn new(dir: &'a Path, origin: &'a Path) -> Result<Self> {
        let real = dir.canonicalize().map_err(|e| CheckpointError::io(dir, e))?;
        let snapshots = real.parent().filter(|parent| parent.ends_with("snapshots"));
        let blobs = snapshots.and_then(Path::parent).map(|repository| repository.join("blobs"));
        Ok(Self { dir, origin, roots: [Some(real), blobs].into_iter().flatten().collect() })
    }

    fn resolve(&self, name: &str) -> Result<PathBuf> {
        let outside = || CheckpointError::Outside { path: self.origin.into(), name: name.to_string() };
        let mut components = Path::new(name).components();
        let plain = matches!((components.next(), components.next()), (Some(Component::Normal(part)), None) if part.to_str() == Some(name));
        if !plain || name.contains(['/', '\\', '\0']) {
            return Err(outside());
        }
        let path = self.dir.join(name);
        match path.canonicalize() {
            Ok(real) if !self.roots.iter().any(|root| real.starts_with(root)) => Err(outside()),
            Ok(_) => Ok(path),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(CheckpointError::Missing { path, message: "no such file, though the checkpoint needs it".into() })
            }
            Err(e) => Err(CheckpointError::io(path, e)),
        }
    }
}
