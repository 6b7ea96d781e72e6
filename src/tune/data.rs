//! The text of a run: what is learned from, and what is held out.

use std::{
    fs,
    io::{self, Read as _, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use tokenizers::Tokenizer;

use crate::{
    durable::{self, hex},
    error::{Error, Result},
    train::data::tokenize,
};

/// Windows of a block: of every few blocks one is held out, so that held-out text is of all parts of the files, and whole.
const BLOCK: usize = 4;

/// Bytes of documents that are tokenised at once.
const CHUNK: usize = 1 << 20;

/// More bytes than any text has for each of its tokens: what is longer is not read.
const BYTES_PER_TOKEN: u64 = 16;

/// First bytes of tokens on disk.
const MAGIC: &[u8; 8] = b"HMXTOK1\n";

/// Tokens to learn from and to measure on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    /// One stream.
    pub train: Vec<u32>,
    /// One stream, of which no token is in the other.
    pub heldout: Vec<u32>,
    /// Of both, in hexadecimal.
    pub sha256: String,
}

/// A text that stands for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    /// To be tokenised.
    Text(String),
    /// Tokenised.
    Tokens(Vec<u32>),
}

/// Where text comes from.
#[derive(Clone, Debug)]
pub struct Sources {
    /// To learn from, UTF-8.
    pub train: Vec<PathBuf>,
    /// To measure on; none: a part of the others.
    pub heldout: Vec<PathBuf>,
    /// Separates documents inside a file; none: every file is one.
    pub separator: Option<String>,
}

/// How text is cut.
#[derive(Clone, Copy, Debug)]
pub struct DataShape {
    /// Tokens of a window.
    pub window: usize,
    /// Of the tokens to learn from, where there is no held-out text.
    pub heldout_share: f64,
    /// Put after every document, where there is such a token.
    pub end: Option<u32>,
    /// Tokens that the model knows.
    pub vocab: usize,
    /// Of both streams together.
    pub most_tokens: usize,
}

impl Sources {
    /// The documents of the files, one after the other.
    ///
    /// # Errors
    /// Of the iterator: `InvalidArgument` on `data[N]` or `heldout[N]` where a file is not text, `Io` where it cannot be read.
    pub fn documents(&self, most_tokens: usize) -> [impl Iterator<Item = Result<Document>> + use<'_>; 2] {
        [("data", &self.train), ("heldout", &self.heldout)].map(|(field, files)| {
            let separator = self.separator.as_deref();
            files.iter().enumerate().flat_map(move |(index, file)| documents(&format!("{field}[{index}]"), file, separator, most_tokens))
        })
    }
}

/// The documents of one file; `field` is what names it.
///
/// # Errors
/// Of the first item: `InvalidArgument` on `field` where it is not text, `OutOfRange` where it must be of more than `most_tokens`, `Io` where
/// it cannot be read.
pub fn documents(field: &str, file: &Path, separator: Option<&str>, most_tokens: usize) -> impl Iterator<Item = Result<Document>> + use<> {
    let (text, error) = match read(field, file, most_tokens) {
        Ok(text) => (Some(text), None),
        Err(error) => (None, Some(error)),
    };
    let parts = text.map(|text| Parts { text, separator: separator.map(str::to_owned), at: Some(0) });
    error.map(Err).into_iter().chain(parts.into_iter().flatten().map(|part| Ok(Document::Text(part))))
}

/// The parts of a text, made one after the other: there may be as many as letters.
struct Parts {
    text: String,
    separator: Option<String>,
    /// Where the next one begins.
    at: Option<usize>,
}

impl Iterator for Parts {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let Some(separator) = &self.separator else { return self.at.take().map(|_| std::mem::take(&mut self.text)) };
        let rest = &self.text[self.at?..];
        let end = rest.find(separator.as_str());
        let part = rest[..end.unwrap_or(rest.len())].trim_matches('\n').to_owned();
        self.at = end.and_then(|end| Some(self.at? + end + separator.len()));
        Some(part)
    }
}

fn read(field: &str, file: &Path, most_tokens: usize) -> Result<String> {
    let io = |source| Error::io(file, source);
    let most = (most_tokens as u64).saturating_mul(BYTES_PER_TOKEN);
    let mut bytes = Vec::new();
    fs::File::open(file).map_err(io)?.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > most {
        return Err(Error::out_of_range(field, format!("{} is of more than {most_tokens} tokens: give less text", file.display())));
    }
    let text = String::from_utf8(bytes).ok().filter(|text| !text.contains('\0'));
    text.ok_or_else(|| Error::invalid(field, format!("{} is binary: text is UTF-8 without NUL", file.display())))
}

/// One stream in the making.
struct Stream<'a> {
    field: &'static str,
    tokenizer: &'a Tokenizer,
    shape: DataShape,
    /// Tokens that it may have.
    most: usize,
    tokens: Vec<u32>,
    /// Waiting to be tokenised.
    texts: Vec<String>,
    bytes: usize,
}

impl Stream<'_> {
    fn add(&mut self, index: usize, document: Document) -> Result<()> {
        match document {
            Document::Text(text) if text.is_empty() => Ok(()),
            Document::Text(text) if text.contains('\0') => {
                Err(Error::invalid(self.field, format!("document {index} is binary: text is UTF-8 without NUL")))
            }
            Document::Text(text) => {
                self.bytes += text.len();
                self.texts.push(text);
                if self.bytes >= CHUNK { self.tokenize() } else { Ok(()) }
            }
            Document::Tokens(tokens) => {
                self.tokenize()?;
                if let Some(token) = tokens.iter().find(|&&token| token as usize >= self.shape.vocab) {
                    return Err(unknown(self.field, *token, self.shape.vocab));
                }
                if !tokens.is_empty() {
                    self.tokens.extend(tokens);
                    self.tokens.extend(self.shape.end);
                }
                self.check()
            }
        }
    }

    /// All of `documents`.
    fn of(mut self, documents: impl Iterator<Item = Result<Document>>) -> Result<Vec<u32>> {
        for (index, document) in documents.enumerate() {
            self.add(index, document?)?;
        }
        self.tokenize()?;
        Ok(self.tokens)
    }

    fn tokenize(&mut self) -> Result<()> {
        self.bytes = 0;
        self.tokens.extend(tokenize(&std::mem::take(&mut self.texts), self.tokenizer, self.shape.end)?);
        self.check()
    }

    fn check(&self) -> Result<()> {
        if self.tokens.len() <= self.most {
            return Ok(());
        }
        let most = self.shape.most_tokens;
        Err(Error::out_of_range(self.field, format!("more than {most} tokens, the most that a run takes here: give less text")))
    }
}

/// A token that the model does not know.
pub(super) fn unknown(field: &str, token: u32, vocab: usize) -> Error {
    Error::invalid(field, format!("token {token} is not below {vocab}, the size of the vocabulary"))
}

impl Corpus {
    /// Tokenises `documents`; `heldout` are those to measure on, without any a part of the others.
    ///
    /// # Errors
    /// Those of the documents; `OutOfRange` on `data` or `heldout` above `shape.most_tokens`; `InvalidArgument` on them where there is too
    /// little text, where it is not text, or where a token is none of the model's.
    pub fn build(
        documents: impl Iterator<Item = Result<Document>>,
        heldout: impl Iterator<Item = Result<Document>>,
        tokenizer: &Tokenizer,
        shape: DataShape,
    ) -> Result<Self> {
        let stream = |field, most| Stream { field, tokenizer, shape, most, tokens: Vec::new(), texts: Vec::new(), bytes: 0 };
        let train = stream("data", shape.most_tokens).of(documents)?;
        let mut heldout = heldout.peekable();
        if heldout.peek().is_none() {
            return Self::split(train, shape);
        }
        let heldout = stream("heldout", shape.most_tokens.saturating_sub(train.len())).of(heldout)?;
        Self::new(train, heldout, shape)
    }

    /// Writes the tokens to a file that [`Corpus::load`] reads.
    pub fn write(&self, path: &Path) -> Result<()> {
        let hash = self.hash();
        durable::write_with(path, |file| {
            file.write_all(MAGIC)?;
            self.put(file)?;
            file.write_all(&hash)
        })
    }

    /// What [`Corpus::write`] wrote.
    ///
    /// # Errors
    /// `FailedPrecondition` where the file is damaged.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(|source| Error::io(path, source))?;
        let damaged = || Error::FailedPrecondition(format!("{} is damaged: the tokens of the run are gone", path.display()));
        let (content, hash) = bytes.split_last_chunk::<32>().ok_or_else(damaged)?;
        let content = content.strip_prefix(MAGIC).filter(|content| Sha256::digest(content)[..] == hash[..]).ok_or_else(damaged)?;
        let (train, rest) = take(content).ok_or_else(damaged)?;
        let (heldout, rest) = take(rest).ok_or_else(damaged)?;
        if rest.is_empty() { Ok(Self { train, heldout, sha256: hex(hash) }) } else { Err(damaged()) }
    }

    /// Number of tokens and tokens of each stream, little-endian.
    fn put(&self, file: &mut (impl Write + ?Sized)) -> io::Result<()> {
        for stream in [&self.train, &self.heldout] {
            file.write_all(&(stream.len() as u64).to_le_bytes())?;
            stream.iter().try_for_each(|token| file.write_all(&token.to_le_bytes()))?;
        }
        Ok(())
    }

    fn hash(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        for stream in [&self.train, &self.heldout] {
            hash.update((stream.len() as u64).to_le_bytes());
            stream.iter().for_each(|token| hash.update(token.to_le_bytes()));
        }
        hash.finalize().into()
    }

    /// Holds out whole blocks of the stream, evenly.
    pub fn split(tokens: Vec<u32>, shape: DataShape) -> Result<Self> {
        let every = (1.0 / shape.heldout_share).round().max(2.0) as usize;
        let (mut train, mut heldout) = (Vec::with_capacity(tokens.len()), Vec::new());
        // A short text is cut into smaller blocks, so that it has one to hold out at all.
        let block = (BLOCK * shape.window).min(tokens.len() / every).max(1);
        for (index, block) in tokens.chunks(block).enumerate() {
            if index % every == every - 1 { &mut heldout } else { &mut train }.extend_from_slice(block);
        }
        Self::new(train, heldout, shape)
    }

    /// Of streams that are apart.
    pub fn new(train: Vec<u32>, heldout: Vec<u32>, shape: DataShape) -> Result<Self> {
        if train.len() <= shape.window || heldout.len() < 2 {
            let message = format!(
                "{} tokens to learn from and {} held out; needed are more than {}, a window, and at least 2: give more text, or a smaller \
                 run.window_tokens",
                train.len(),
                heldout.len(),
                shape.window
            );
            return Err(Error::invalid("data", message));
        }
        let mut corpus = Self { train, heldout, sha256: String::new() };
        corpus.sha256 = hex(&corpus.hash());
        Ok(corpus)
    }

    /// The first `most` held-out tokens in windows.
    pub fn heldout_windows(&self, window: usize, most: usize) -> Vec<&[u32]> {
        self.heldout[..self.heldout.len().min(most)].chunks(window.max(2)).filter(|window| window.len() > 1).collect()
    }
}

/// A stream as [`Corpus::put`] writes it, and what comes after.
fn take(bytes: &[u8]) -> Option<(Vec<u32>, &[u8])> {
    let (count, rest) = bytes.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*count)).ok()?.checked_mul(4)?;
    let (tokens, rest) = rest.split_at_checked(length)?;
    Some((tokens.as_chunks::<4>().0.iter().map(|token| u32::from_le_bytes(*token)).collect(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    const SHAPE: DataShape = DataShape { window: 8, heldout_share: 0.1, end: None, vocab: 1 << 20, most_tokens: usize::MAX };

    #[test]
    fn every_tenth_block_is_held_out_whole() {
        let corpus = Corpus::split((0..1000).collect(), SHAPE).unwrap();
        assert_eq!(corpus.train.len() + corpus.heldout.len(), 1000);
        assert_eq!(corpus.heldout.len(), 3 * 32);
        assert_eq!(corpus.heldout[..3], [288, 289, 290]);
        assert!(corpus.heldout.iter().all(|token| !corpus.train.contains(token)));
        let windows = corpus.heldout_windows(8, 20);
        assert_eq!(windows.iter().map(|window| window.len()).collect::<Vec<_>>(), [8, 8, 4]);
        assert_eq!(corpus.heldout_windows(8, 17).len(), 2, "one token predicts nothing");
    }

    #[test]
    fn a_short_text_has_held_out_tokens_too() {
        let corpus = Corpus::split((0..60).collect(), SHAPE).unwrap();
        assert_eq!(corpus.heldout.len(), 6);
        let short = Corpus::split((0..10).collect(), SHAPE).unwrap_err().to_string();
        assert!(short.starts_with("data: 9 tokens to learn from and 1 held out"), "{short}");
    }

    fn build(documents: Vec<Document>, heldout: Vec<Document>, shape: DataShape) -> Result<Corpus> {
        let tokenizer = Tokenizer::from_file(concat!(env!("CARGO_MANIFEST_DIR"), "/models/demo/tokenizer.json")).unwrap();
        Corpus::build(documents.into_iter().map(Ok), heldout.into_iter().map(Ok), &tokenizer, shape)
    }

    #[test]
    fn a_file_is_cut_at_its_separators_and_not_read_beyond_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.txt");
        fs::write(&file, "one\n--\n\ntwo\n--\n--\nthree").unwrap();
        let of = |separator: Option<&str>, most: usize| -> Result<Vec<String>> {
            let parts = documents("data[0]", &file, separator, most);
            parts.map(|part| part.map(|part| if let Document::Text(text) = part { text } else { panic!("{part:?}") })).collect()
        };
        assert_eq!(of(Some("--"), 9).unwrap(), ["one", "two", "", "three"]);
        assert_eq!(of(Some("none"), 9).unwrap(), of(None, 9).unwrap());
        assert_eq!(of(None, 9).unwrap().concat().len(), 23);
        assert_eq!(of(Some("--"), 1).unwrap_err().kind(), ErrorKind::OutOfRange);
        assert_eq!(of(None, 2).unwrap().len(), 1, "23 bytes may be of 2 tokens");
        fs::write(&file, "").unwrap();
        assert_eq!(of(Some("--"), 0).unwrap(), [""]);
    }

    #[test]
    fn documents_are_text_or_tokens_and_end_alike() {
        let (text, shape) = (Document::Text("one two three".into()), DataShape { end: Some(0), ..SHAPE });
        let tokens = |tokens: std::ops::Range<u32>| Document::Tokens(tokens.collect());
        let heldout = vec![tokens(5..8)];
        let corpus = build(vec![tokens(1..5), text.clone(), Document::Text(String::new()), tokens(7..9)], heldout.clone(), shape).unwrap();
        assert_eq!((corpus.train[..5].to_vec(), corpus.heldout), (vec![1, 2, 3, 4, 0], vec![5, 6, 7, 0]));
        assert!(corpus.train.len() > 10 && corpus.train.ends_with(&[0, 7, 8, 0]), "{:?}", corpus.train);
        let refused = |documents: Vec<Document>, shape: DataShape| build(documents, heldout.clone(), shape).unwrap_err();
        let most = |most_tokens: usize| DataShape { most_tokens, ..shape };
        assert!(build(vec![tokens(1..12)], heldout.clone(), most(16)).is_ok());
        let above = refused(vec![tokens(1..12)], most(11));
        assert_eq!((above.kind(), above.to_string().starts_with("data: more than 11 tokens")), (ErrorKind::OutOfRange, true), "{above}");
        assert!(refused(vec![tokens(1..12)], most(15)).to_string().starts_with("heldout: more than 15 tokens"), "both together");
        let unknown = refused(vec![tokens(1..12)], DataShape { vocab: 11, ..shape });
        assert_eq!(unknown.to_string(), "data: token 11 is not below 11, the size of the vocabulary");
        let binary = refused(vec![text, Document::Text("a\0".into())], shape).to_string();
        assert!(binary.starts_with("data: document 1 is binary"), "{binary}");
        assert!(refused(Vec::new(), shape).to_string().starts_with("data: 0 tokens to learn from"));
    }

    #[test]
    fn tokens_on_disk_are_whole_or_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokens.bin");
        let corpus = Corpus::split((0..100).collect(), SHAPE).unwrap();
        corpus.write(&path).unwrap();
        assert_eq!(Corpus::load(&path).unwrap(), corpus);
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&path, bytes).unwrap();
            assert_eq!(Corpus::load(&path).unwrap_err().kind(), ErrorKind::FailedPrecondition, "byte {at}");
            fs::write(&path, &whole[..at]).unwrap();
            assert_eq!(Corpus::load(&path).unwrap_err().kind(), ErrorKind::FailedPrecondition, "cut at {at}");
        }
    }

    #[test]
    fn the_hash_is_of_both_streams() {
        let hash = |train: std::ops::Range<u32>, heldout: std::ops::Range<u32>| {
            Corpus::new(train.collect(), heldout.collect(), SHAPE).unwrap().sha256
        };
        assert_ne!(hash(0..20, 20..30), hash(0..21, 21..30));
        assert_eq!(hash(0..20, 20..30), hash(0..20, 20..30));
    }
}
