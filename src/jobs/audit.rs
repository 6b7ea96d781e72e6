//! Who did what: a line for each thing that was done, on disk before the next one.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};

use super::job::Who;
use crate::error::{Error, Result};

/// The log. It is never cut.
#[derive(Debug)]
pub(super) struct Audit {
    path: PathBuf,
    file: Mutex<File>,
}

impl Audit {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(path).map_err(|error| Error::io(path, error))?;
        Ok(Self { path: path.to_owned(), file: Mutex::new(file) })
    }

    /// Notes that `who` did `what`. That it cannot be written undoes nothing: it is in the server's log all the same.
    pub(super) fn note(&self, what: &'static str, who: &Who, about: Value) {
        tracing::info!(target: "hardmax::audit", what, peer = who.peer, actor = who.actor, request_id = who.request_id, %about);
        let line = format!("{}\n", json!({ "time": now(), "what": what, "who": who, "about": about }));
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write_all(line.as_bytes()).and_then(|()| file.sync_data()) {
            tracing::error!(path = %self.path.display(), %error, "the audit log cannot be written");
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}
