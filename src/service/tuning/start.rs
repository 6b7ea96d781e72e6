//! The start of a job: its settings, then its text, which is tokenised while it arrives.

use std::{path::PathBuf, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::{Instant, timeout_at},
};
use tonic::{Code, Status, Streaming};

use crate::{
    engine::Engine,
    error::{Error, Result},
    jobs::Jobs,
    service::proto::{self, start_tuning_request::Part},
    tune::data::{Corpus, DataShape, Document, documents},
};

/// Documents between the socket and the tokeniser; each is a message at most.
const BUFFERED: usize = 4;

/// A client that sends nothing for so long has gone.
const IDLE: Duration = Duration::from_secs(60);

/// All of the text must be there after so long: others cannot start meanwhile.
const WHOLE: Duration = Duration::from_secs(3600);

/// Files that one start may name.
const MAX_FILES: usize = 4096;

/// The messages of a start.
pub(super) struct Arriving {
    messages: Streaming<proto::StartTuningRequest>,
    until: Instant,
}

/// Where the text comes from.
pub(super) enum Source {
    /// Files of the server.
    Files { train: Vec<PathBuf>, heldout: Vec<PathBuf>, separator: Option<String> },
    /// The messages that follow.
    Messages,
}

/// The end that the tokeniser reads: a document, `None` at the end, or why there is none.
struct Documents(mpsc::Receiver<Result<Option<Document>>>);

// === impl Arriving ===

impl Arriving {
    pub(super) fn new(messages: Streaming<proto::StartTuningRequest>) -> Self {
        Self { messages, until: Instant::now() + WHOLE }
    }

    /// The first message.
    pub(super) async fn config(&mut self) -> Result<proto::TuningConfig> {
        match self.next().await? {
            Some(Part::Config(config)) => Ok(config),
            _ => Err(Error::invalid("config", "is not set: the first message says what to do, the others are text")),
        }
    }

    /// The tokens of `source`. A text that is too long is refused while it arrives. The permit is given back with them.
    pub(super) async fn corpus(
        mut self,
        source: Source,
        engine: &Engine,
        shape: DataShape,
        permit: OwnedSemaphorePermit,
    ) -> Result<(Corpus, OwnedSemaphorePermit)> {
        let streamed = matches!(source, Source::Messages);
        if !streamed && self.next().await?.is_some() {
            return Err(Error::invalid("text", "config.data.paths says already what to learn from: send no text, or name no files"));
        }
        let (sender, receiver) = mpsc::channel(BUFFERED);
        let tokenizer = engine.tokenizer().clone();
        let reading = tokio::task::spawn_blocking(move || {
            let corpus = match source {
                Source::Messages => Corpus::build(Documents(receiver), std::iter::empty(), &tokenizer, shape),
                Source::Files { train, heldout, separator } => {
                    let read = |field, files| all(field, files, separator.as_deref(), shape.most_tokens);
                    let (train, heldout) = (read("config.data.paths", train), read("config.data.heldout_paths", heldout));
                    Corpus::build(train, heldout, &tokenizer, shape)
                }
            };
            Ok((corpus?, permit))
        });
        if streamed {
            self.forward(sender).await;
        }
        reading.await.map_err(|error| Error::Internal(format!("tokenising failed: {error}")))?
    }

    /// Hands documents on to their end, or until there is nobody to take them: who tokenises says why.
    async fn forward(&mut self, to: mpsc::Sender<Result<Option<Document>>>) {
        loop {
            let document = self.next().await.and_then(|part| part.map(document).transpose());
            let last = !matches!(document, Ok(Some(_)));
            if to.send(document).await.is_err() || last {
                return;
            }
        }
    }

    async fn next(&mut self) -> Result<Option<Part>> {
        let message = timeout_at(self.until.min(Instant::now() + IDLE), self.messages.message()).await;
        let message = message.map_err(|_| Error::DeadlineExceeded { phase: "the text arrives" })?.map_err(|status| unreadable(&status))?;
        let part = message.map(|message| message.part.ok_or_else(|| Error::invalid("part", "none of config, text, token_ids is set")));
        part.transpose()
    }
}

fn document(part: Part) -> Result<Document> {
    match part {
        Part::Text(text) if text.is_empty() => Err(Error::invalid("text", "is empty: leave such documents out")),
        Part::TokenIds(tokens) if tokens.ids.is_empty() => Err(Error::invalid("token_ids", "is empty: leave such documents out")),
        Part::Text(text) => Ok(Document::Text(text)),
        Part::TokenIds(tokens) => Ok(Document::Tokens(tokens.ids)),
        Part::Config(_) => Err(Error::invalid("config", "comes once, in the first message")),
    }
}

/// Why a message could not be read, as far as its sender can do something about it.
fn unreadable(status: &Status) -> Error {
    match status.code() {
        Code::Internal => Error::invalid("data", format!("a message is binary or damaged: {}", status.message())),
        Code::OutOfRange => Error::out_of_range("data", format!("{}: send shorter documents", status.message())),
        _ => Error::Cancelled,
    }
}

/// The documents of `files`, one file in memory at a time.
fn all(field: &'static str, files: Vec<PathBuf>, separator: Option<&str>, most_tokens: usize) -> impl Iterator<Item = Result<Document>> {
    files.into_iter().enumerate().flat_map(move |(index, file)| documents(&format!("{field}[{index}]"), &file, separator, most_tokens))
}

// === impl Source ===

impl Source {
    /// What `data` names.
    pub(super) fn new(jobs: &Jobs, data: proto::TuningData) -> Result<Self> {
        let proto::TuningData { paths, heldout_paths, separator, heldout_share: _ } = data;
        if paths.is_empty() {
            for (field, said) in [("heldout_paths", !heldout_paths.is_empty()), ("separator", !separator.is_empty())] {
                if said {
                    return Err(Error::invalid(format!("config.data.{field}"), "has no effect without config.data.paths"));
                }
            }
            return Ok(Self::Messages);
        }
        for (field, files) in [("paths", &paths), ("heldout_paths", &heldout_paths)] {
            if files.len() > MAX_FILES {
                return Err(Error::invalid(format!("config.data.{field}"), format!("names more than {MAX_FILES} files")));
            }
        }
        Ok(Self::Files {
            train: jobs.files("config.data.paths", &paths)?,
            heldout: if heldout_paths.is_empty() { Vec::new() } else { jobs.files("config.data.heldout_paths", &heldout_paths)? },
            separator: Some(separator).filter(|separator| !separator.is_empty()),
        })
    }
}

// === impl Documents ===

impl Iterator for Documents {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        // Nothing comes any more, and it was not the end: the call is gone.
        self.0.blocking_recv().unwrap_or(Err(Error::Cancelled)).transpose()
    }
}
