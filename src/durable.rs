//! Files that are there whole or not at all: whoever is killed while writing leaves no half of one.

use std::{
    fs::{self, File, TryLockError},
    io::{self, BufWriter},
    path::{Path, PathBuf},
};

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Writes beside the file, waits until the disk has it, renames, and waits until the disk has the name.
///
/// # Errors
/// [`Error::DiskFull`] where there is no room, else `Io`; then nothing is left, and what was there before still is, unless it was the
/// disk that failed after the rename.
pub fn write(path: &Path, content: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(content))
}

/// [`write()`] of what `fill` writes.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> Result<()> {
    let partial = partial(path);
    let written = whole(&partial, fill).and_then(|()| {
        // All that may be refused comes before the rename.
        let folder = File::open(folder_of(path))?;
        fs::rename(&partial, path)?;
        folder.sync_all()
    });
    written.map_err(|error| {
        // Room for whoever tries again; that it cannot be removed says nothing new.
        let _ = fs::remove_file(&partial);
        failed(path, error)
    })
}

/// Beside the file, and of no other file.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.partial", std::process::id()));
    name.into()
}

fn whole(path: &Path, fill: impl FnOnce(&mut dyn io::Write) -> io::Result<()>) -> io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    fill(&mut file)?;
    file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()
}

/// What it means that a file could not be written.
fn failed(path: &Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::DiskFull { path: path.into() },
        _ => Error::io(path, error),
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// As JSON.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_vec(value).map_err(|error| Error::Internal(format!("{} has no JSON form: {error}", path.display())))?;
    write(path, &json)
}

/// SHA-256 of a file of any size, in hexadecimal.
pub fn sha256(path: &Path) -> Result<String> {
    let mut hasher = Sha256::new();
    let read = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hasher));
    read.map_err(|error| Error::io(path, error))?;
    Ok(hex(&hasher.finalize()))
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether nothing can be written any more, so that to try again with another file is in vain.
pub fn is_full(error: &Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    match error {
        Error::DiskFull { .. } => true,
        Error::Io { source, .. } => matches!(source.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem),
        _ => false,
    }
}

/// The right to write to a folder, until it is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock that the file `path` stands for.
    ///
    /// # Errors
    /// [`Error::FailedPrecondition`] if another process has it; `else_` says what to do instead of waiting.
    pub fn take(path: &Path, else_: &str) -> Result<Self> {
        let file = File::options().create(true).truncate(false).write(true).open(path).map_err(|error| Error::io(path, error))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::FailedPrecondition(format!(
                "{}: another run writes to this folder; wait for its end, or {else_}",
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
    fn two_files_of_one_stem_are_written_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let (one, other) = (folder.path().join("a.v1"), folder.path().join("a.v2"));
        let both = write_with(&one, |file| {
            write(&other, b"other").expect("writable");
            file.write_all(b"one")
        });
        both.expect("each has a place of its own to grow in");
        assert_eq!((fs::read(&one).expect("there"), fs::read(&other).expect("there")), (b"one".to_vec(), b"other".to_vec()));
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_cannot_be_synced_keeps_what_it_has() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("current.json");
        write(&path, b"before").expect("writable");
        let mode = |bits| fs::set_permissions(folder.path(), fs::Permissions::from_mode(bits)).expect("ours");
        // Names in it may be changed, but it cannot be opened: by anybody but root.
        mode(0o300);
        let is_root = File::open(folder.path()).is_ok();
        let written = write(&path, b"after");
        mode(0o700);
        assert!(is_root || written.is_err() && fs::read(&path).expect("there") == b"before");
    }

    #[test]
    fn the_hash_of_a_file_is_that_of_its_bytes() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("million");
        // The third example of FIPS 180-2: more than a buffer.
        fs::write(&path, vec![b'a'; 1_000_000]).expect("writable");
        let expected = "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0";
        assert_eq!(sha256(&path).expect("readable"), expected);
        assert!(sha256(&folder.path().join("none")).is_err());
    }

    #[test]
    fn a_folder_has_one_writer() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("lock");
        let first = Lock::take(&path, "go elsewhere").expect("nobody has it");
        let second = Lock::take(&path, "go elsewhere").expect_err("somebody has it").to_string();
        assert!(second.contains("another run writes to this folder") && second.ends_with("or go elsewhere"), "{second}");
        drop(first);
        assert!(Lock::take(&path, "go elsewhere").is_ok());
    }

    #[test]
    fn a_full_disk_is_told_from_other_errors() {
        let full = |kind: io::ErrorKind| is_full(&Error::io("x", io::Error::from(kind)));
        assert!(full(io::ErrorKind::StorageFull) && full(io::ErrorKind::ReadOnlyFilesystem));
        assert!(!full(io::ErrorKind::NotFound) && !is_full(&Error::NonFinite));
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("state");
        let error = write_with(&path, |_| Err(io::ErrorKind::StorageFull.into())).expect_err("no room");
        assert!(matches!(error, Error::DiskFull { .. }) && is_full(&error) && error.kind() == crate::ErrorKind::ResourceExhausted);
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0, "room for whoever tries again");
    }
}
