//! Files that are there whole or not at all: an interrupted run leaves no half of one.

use std::{fs, path::Path};

use serde::Serialize;

use crate::error::{Error, Result};

/// Writes beside the file, then renames.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    fs::write(&partial, content).map_err(|error| Error::io(&partial, error))?;
    fs::rename(&partial, path).map_err(|error| Error::io(path, error))
}

/// As JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(value).map_err(|error| Error::Internal(format!("{} has no JSON form: {error}", path.display())))?;
    write(path, &json)
}
