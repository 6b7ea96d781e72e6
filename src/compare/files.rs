//! Files that are there whole or not at all: an interrupted run leaves no half of one.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Write as _},
    path::Path,
};

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Writes beside the file, waits until the disk has it, then renames.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    let written = whole(&partial, content).and_then(|()| fs::rename(&partial, path));
    written.map_err(|error| {
        // Room for whoever tries again; that it cannot be removed says nothing new.
        let _ = fs::remove_file(&partial);
        Error::io(path, error)
    })
}

fn whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// As JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(value).map_err(|error| Error::Internal(format!("{} has no JSON form: {error}", path.display())))?;
    write(path, &json)
}

/// SHA-256 of a file, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let bytes = fs::read(path).map_err(|error| Error::io(path, error))?;
    Ok(hex(&Sha256::digest(bytes)))
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether nothing can be written any more, so that to try again with another file is in vain.
pub fn is_full(error: &Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error, Error::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem))
}

/// The right to write to a folder, until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock that the file `path` stands for.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] if another process has it.
    pub fn take(path: &Path) -> Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(path).map_err(|error| Error::io(path, error))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::FailedPrecondition(format!(
                "{}: another run writes to this folder; wait for it, or choose another one with --out",
                path.display()
            ))),
            Err(TryLockError::Error(error)) => Err(Error::io(path, error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_whole_or_not_at_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("cell.json");
        write_json(&path, &[1, 2]).expect("writable");
        write_json(&path, &[3]).expect("writable");
        assert_eq!(fs::read_to_string(&path).expect("there"), "[3]");
        // A folder in its place cannot be replaced by a file.
        fs::create_dir(folder.path().join("other.json")).expect("writable");
        assert!(write(&folder.path().join("other.json"), b"x").is_err());
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 2, "nothing half-written is left");
    }

    #[test]
    fn a_folder_has_one_writer() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lock");
        let first = Lock::take(&path).expect("nobody has it");
        let second = Lock::take(&path).expect_err("somebody has it").to_string();
        assert!(second.contains("another run writes to this folder"), "{second}");
        drop(first);
        assert!(Lock::take(&path).is_ok());
    }

    #[test]
    fn a_full_disk_is_told_from_other_errors() {
        let full = |kind: io::ErrorKind| is_full(&Error::io("x", io::Error::from(kind)));
        assert!(full(io::ErrorKind::StorageFull) && full(io::ErrorKind::ReadOnlyFilesystem));
        assert!(!full(io::ErrorKind::NotFound) && !is_full(&Error::NonFinite));
    }
}
