//! What tasks read besides their specification: files that are compiled in.
//!
//! Their digest is a part of what a cell is ([`super::spec::Settings`]), so that a file that changed is measured anew.

use std::sync::LazyLock;

use sha2::{Digest as _, Sha256};

use super::spec::TaskName;
use crate::durable::hex;

/// Handwritten digits: 64 pixels of 0 to 16, then the class; a line each.
pub const DIGITS: &str = include_str!("data/digits.csv");
/// Text that people read.
pub const PROSE: &[u8] = include_bytes!("../../models/demo/data/heldout.txt");
/// Rust.
pub const CODE: &[u8] = include_bytes!("data/code.txt");
/// Lines of a log.
pub const RECORDS: &[u8] = include_bytes!("data/records.txt");

/// The first digits of the SHA-256 of the files that a task reads; `None` of one that reads none.
pub fn digest(task: TaskName) -> Option<&'static str> {
    static OF_DIGITS: LazyLock<String> = LazyLock::new(|| brief(&[DIGITS.as_bytes()]));
    static OF_TEXT: LazyLock<String> = LazyLock::new(|| brief(&[PROSE, CODE, RECORDS]));
    match task {
        TaskName::Digits => Some(&OF_DIGITS),
        TaskName::Text => Some(&OF_TEXT),
        TaskName::Equal | TaskName::Unequal | TaskName::Collapsed | TaskName::Rates | TaskName::Gradient => None,
    }
}

fn brief(files: &[&[u8]]) -> String {
    let digest = files.iter().fold(Sha256::new(), |digest, file| digest.chain_update(Sha256::digest(file)));
    hex(&digest.finalize()[..4])
}
