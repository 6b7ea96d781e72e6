//! One folder takes another's place.
//!
//! The folder appears whole or not at all: everything is written and synced into a hidden sibling, which is then
//! renamed. Where a checkpoint is replaced there are two renames, with the old folder as `.NAME.old-PID` in between; a
//! failure of the second takes the first back. A process that is killed exactly between them leaves the old folder
//! under that name.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::{CONFIG, CheckpointError, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG};

type Result<T> = std::result::Result<T, CheckpointError>;

/// A folder about to take another's place.
pub(super) struct Swap {
    parent: PathBuf,
    /// Where the new folder grows.
    pub(super) partial: PathBuf,
    /// Where the old folder goes meanwhile.
    old: PathBuf,
}

impl Swap {
    pub(super) fn new(dir: &Path) -> Result<Self> {
        let name = dir.file_name().and_then(|name| name.to_str()).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| CheckpointError::malformed(dir, "not a name for a new folder"))?;
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")).to_path_buf();
        refuse_foreign_folder(dir)?;
        fs::create_dir_all(&parent).map_err(|e| CheckpointError::io(&parent, e))?;
        let sibling = |kind: &str| parent.join(format!(".{name}.{kind}-{}", std::process::id()));
        let swap = Self { partial: sibling("partial"), old: sibling("old"), parent: parent.clone() };
        // From a process of the same id that was killed.
        if swap.partial.exists() {
            fs::remove_dir_all(&swap.partial).map_err(|e| CheckpointError::io(&swap.partial, e))?;
        }
        fs::create_dir(&swap.partial).map_err(|e| CheckpointError::io(&swap.partial, e))?;
        Ok(swap)
    }

    pub(super) fn commit(&self, dir: &Path) -> Result<()> {
        sync_dir(&self.partial)?;
        let replaced = dir.exists();
        if replaced {
            fs::rename(dir, &self.old).map_err(|e| CheckpointError::io(dir, e))?;
        }
        if let Err(e) = fs::rename(&self.partial, dir) {
            if replaced {
                fs::rename(&self.old, dir).map_err(|e| CheckpointError::io(&self.old, e))?;
            }
            return Err(CheckpointError::io(dir, e));
        }
        sync_dir(&self.parent)?;
        if replaced {
            self.keep_other_files(dir)?;
            fs::remove_dir_all(&self.old).map_err(|e| CheckpointError::io(&self.old, e))?;
        }
        Ok(())
    }

    /// Moves what is no part of a checkpoint from the old folder to the new one.
    fn keep_other_files(&self, dir: &Path) -> Result<()> {
        for name in entries(&self.old)?.into_iter().filter(|name| !is_checkpoint_file(&name.to_string_lossy())) {
            let (from, to) = (self.old.join(&name), dir.join(&name));
            fs::rename(&from, &to).map_err(|e| CheckpointError::io(&from, e))?;
        }
        sync_dir(dir)
    }
}

/// Fails where [`super::save()`] to `dir` would, for what is there or may not be written; leaves nothing but folders above it.
pub fn check_target(dir: &Path) -> Result<()> {
    let partial = Swap::new(dir)?.partial;
    fs::remove_dir(&partial).map_err(|e| CheckpointError::io(&partial, e))
}

fn refuse_foreign_folder(dir: &Path) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    if !dir.is_dir() || dir.is_symlink() {
        return Err(CheckpointError::malformed(dir, "is there and not a folder; choose another name"));
    }
    let names = entries(dir)?;
    match names.is_empty() || names.contains(OsStr::new(CONFIG)) {
        true => Ok(()),
        false => Err(CheckpointError::malformed(dir, "is there and neither empty nor a checkpoint; choose another name")),
    }
}

fn entries(dir: &Path) -> Result<BTreeSet<OsString>> {
    let io = |e| CheckpointError::io(dir, e);
    let names = fs::read_dir(dir).map_err(io)?.map(|entry| Ok(entry.map_err(io)?.file_name()));
    names.collect()
}

/// Files that a checkpoint consists of, of whatever program: the new ones take their place.
fn is_checkpoint_file(name: &str) -> bool {
    let json = [CONFIG, GENERATION_CONFIG, TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"];
    let weights = name.starts_with("model") && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"));
    weights || json.contains(&name)
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| CheckpointError::io(dir, e))
}
