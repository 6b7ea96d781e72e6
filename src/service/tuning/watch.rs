//! What a job does, as messages.

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::convert::Scribe;
use crate::{
    engine::Share,
    error::Error,
    jobs::{Job, Watch, What},
    service::{call::Call, proto},
};

/// Messages that wait for their reader. What does not fit stays where it is: in the job's history.
const BUFFERED: usize = 16;

/// What `job` did, and what it does until it ends. Dropping the stream ends the watch.
pub(super) fn messages(job: &Job, watch: Watch, scribe: Scribe, call: Call) -> ReceiverStream<Result<proto::WatchTuningResponse, Status>> {
    let (sender, receiver) = mpsc::channel(BUFFERED);
    let seen = Seen { share: duty(job.share), ended: job.state.is_final() };
    tokio::spawn(forward(watch, scribe, call, seen, sender));
    ReceiverStream::new(receiver)
}

/// What a watch knows of its job.
struct Seen {
    share: f64,
    ended: bool,
}

async fn forward(
    mut watch: Watch,
    scribe: Scribe,
    call: Call,
    mut seen: Seen,
    to: mpsc::Sender<Result<proto::WatchTuningResponse, Status>>,
) {
    loop {
        let entry = tokio::select! {
            entry = watch.next() => entry,
            () = to.closed() => return,
        };
        let Some(entry) = entry else { break };
        if let What::Job(job) = &entry.what {
            seen = Seen { share: duty(job.share), ended: job.state.is_final() };
        }
        if let Some(message) = scribe.entry(&entry, seen.share)
            && to.send(Ok(message)).await.is_err()
        {
            return;
        }
    }
    if !seen.ended {
        // The job goes on when the server is started again.
        let _ = to.send(Err(call.status(&Error::Draining))).await;
    }
}

fn duty(share: Share) -> f64 {
    match share {
        Share::Exclusive => 1.0,
        Share::Background { duty } => duty,
    }
}
