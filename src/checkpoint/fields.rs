//! Typed reading of JSON objects: errors carry file and JSON path, and every key asked for is recorded, so that what
//! nobody asked for can be named.

use std::{cell::RefCell, collections::BTreeSet, fs, io, path::Path};

use serde_json::{Map, Value};

use super::CheckpointError;

type Result<T> = std::result::Result<T, CheckpointError>;

/// Largest count or size that a field may state. No real model is near it, and products of a few stay inside u128.
const LIMIT: usize = 1 << 31;

/// Largest JSON file that is read into memory.
const FILE_LIMIT: u64 = 256 << 20;

/// A JSON object being read. Getters treat `null` like an absent key.
#[derive(Debug)]
pub(super) struct Fields<'a> {
    file: &'a Path,
    /// JSON path of the object with a final dot; empty at the top.
    prefix: String,
    map: &'a Map<String, Value>,
    used: RefCell<BTreeSet<String>>,
}

/// Reads a JSON file.
pub(super) fn read_json(path: &Path) -> Result<Value> {
    let length = fs::metadata(path).map_err(|e| CheckpointError::io(path, e))?.len();
    if length > FILE_LIMIT {
        return Err(CheckpointError::malformed(path, format!("{length} bytes, expected at most {FILE_LIMIT}")));
    }
    let bytes = fs::read(path).map_err(|e| CheckpointError::io(path, e))?;
    serde_json::from_slice(&bytes).map_err(|e| CheckpointError::malformed(path, format!("not valid JSON: {e}")))
}

/// As [`read_json`], `None` where the file does not exist.
pub(super) fn read_optional_json(path: &Path) -> Result<Option<Value>> {
    match read_json(path) {
        Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

/// A value as a message shows it.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 { text } else { text.chars().take(77).chain("...".chars()).collect() }
}

impl<'a> Fields<'a> {
    /// The top-level object of a file.
    pub(super) fn new(file: &'a Path, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(map) => Ok(Self { file, prefix: String::new(), map, used: RefCell::default() }),
            other => Err(CheckpointError::malformed(file, format!("{} at the top, expected a JSON object", shown(other)))),
        }
    }

    pub(super) fn file(&self) -> &'a Path {
        self.file
    }

    /// JSON path of a key of this object.
    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// The value at `key`; marks the key as used.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.used.borrow_mut().insert(key.to_string());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is there, be it with `null`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// Keys that nobody asked for.
    pub(super) fn unused(&self) -> Vec<&'a str> {
        let used = self.used.borrow();
        self.map.keys().map(String::as_str).filter(|key| !used.contains(*key)).collect()
    }

    /// Warns of keys that nobody asked for.
    pub(super) fn warn_unused(&self) {
        let unused: Vec<_> = self.unused().into_iter().map(|key| self.path(key)).collect();
        if !unused.is_empty() {
            tracing::warn!(file = %self.file.display(), keys = unused.join(", "), "unknown keys have no effect");
        }
    }

    /// "The field at `key` has a value that can never be right."
    pub(super) fn wrong(&self, key: &str, expected: impl Into<String>) -> CheckpointError {
        CheckpointError::Field { path: self.file.into(), field: self.path(key), found: self.found(key), expected: expected.into() }
    }

    /// "The field at `key` asks for something that hardmax does not do."
    pub(super) fn unsupported(&self, key: &str, supported: impl Into<String>) -> CheckpointError {
        CheckpointError::Unsupported { path: self.file.into(), field: self.path(key), found: self.found(key), supported: supported.into() }
    }

    fn found(&self, key: &str) -> String {
        self.map.get(key).map_or_else(|| "absent".into(), shown)
    }

    /// Converts the value at `key`, if there is one.
    pub(super) fn read<T>(&self, key: &str, expected: &str, convert: impl FnOnce(&'a Value) -> Option<T>) -> Result<Option<T>> {
        self.get(key).map(|value| convert(value).ok_or_else(|| self.wrong(key, expected))).transpose()
    }

    pub(super) fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.read(key, "a string", Value::as_str)
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.read(key, "true or false", Value::as_bool)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number", Value::as_f64)
    }

    /// A number above 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number above 0", |value| value.as_f64().filter(|n| n.is_finite() && *n > 0.0))
    }

    /// A number above 0 in f32 too, the precision in which it is used.
    pub(super) fn positive_f32(&self, key: &str) -> Result<Option<f64>> {
        self.read(key, "a number above 0", |value| value.as_f64().filter(|n| (*n as f32).is_finite() && *n as f32 >= f32::MIN_POSITIVE))
    }

    /// An integer from 0.
    pub(super) fn integer(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, &format!("an integer from 0 to {LIMIT}"), as_size)
    }

    /// An integer from 1.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.read(key, &format!("an integer from 1 to {LIMIT}"), |value| as_size(value).filter(|n| *n > 0))
    }

    /// A list, every item converted.
    pub(super) fn list<T>(&self, key: &str, expected: &str, item: impl Fn(&'a Value) -> Option<T>) -> Result<Option<Vec<T>>> {
        self.read(key, expected, |value| value.as_array()?.iter().map(item).collect())
    }

    /// A list of integers from 0.
    pub(super) fn integers(&self, key: &str) -> Result<Option<Vec<usize>>> {
        self.list(key, "a list of integers from 0", as_size)
    }

    /// One of the named values.
    pub(super) fn choice<T: Copy>(&self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
        let names: Vec<_> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        self.read(key, &names.join(" or "), |value| {
            let text = value.as_str()?;
            choices.iter().find(|(name, _)| *name == text).map(|(_, choice)| *choice)
        })
    }

    /// A nested object.
    pub(super) fn object(&self, key: &str) -> Result<Option<Self>> {
        let map = self.read(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Self { file: self.file, prefix: format!("{}.", self.path(key)), map, used: RefCell::default() }))
    }

    /// Keys of this object, in order.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.map.keys().map(String::as_str)
    }
}

fn as_size(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|n| usize::try_from(n).ok()).filter(|n| *n <= LIMIT)
}
