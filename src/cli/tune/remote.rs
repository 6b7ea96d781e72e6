//! `hardmax tune --server`: the same run inside a server, over what it serves, watched from here.

use std::{fmt::Write as _, str::FromStr};

use clap::{ArgGroup, Args};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::{
    TuneArgs,
    args::RunArgs,
    print,
    show::{Progress, table},
};
use crate::{
    cli::client::{block_on, connect_to, refused},
    error::{Error, Result},
    service::{
        proto::{
            self, InFlight, TuningJob, TuningState, start_tuning_request::Part, tuning_client::TuningClient,
            watch_tuning_response::Event as Told,
        },
        read_event, read_figures, read_phase, read_verdicts, tuning_message,
    },
    tune::{data::Document, tuner::Event},
};

/// Text is sent in documents of at most so many bytes: a server takes messages of 4 MiB unless told otherwise.
const MOST_BYTES: usize = 1 << 20;

/// Documents that are read ahead of the socket.
const READ_AHEAD: usize = 4;

/// A server, and what is to be done there.
#[derive(Args, Debug, Default)]
#[command(
    next_help_heading = "Inside a server",
    group(
        ArgGroup::new("action")
            .args(["watch", "pause", "resume_job", "stop", "rollback", "list"])
            .conflicts_with_all(["data", "server_data"])
    )
)]
pub struct RemoteArgs {
    /// Tune what the server at this address serves, which must have been started with --tuning-dir, and show how it goes. Ctrl-C ends the
    /// showing, not the job. The text of --data is sent to the server.
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Files of the server to learn from, below a folder of its --tuning-data, instead of --data.
    #[arg(long, num_args = 1.., value_name = "PATH", requires = "server", conflicts_with = "data")]
    pub server_data: Vec<String>,
    /// Files of the server to measure on. Default: a part of the text.
    #[arg(long, num_args = 1.., value_name = "PATH", requires = "server_data")]
    pub server_heldout: Vec<String>,
    /// Share of the machine: `exclusive`, and requests are refused meanwhile, or the share of the time while there are any, above 0 and
    /// below 1. Default: 0.25. With --resume-job, also changes that of a running job.
    #[arg(long, value_name = "SHARE", requires = "server")]
    pub share: Option<ShareArg>,
    /// Put the result in force; status 1 where that is refused.
    #[arg(long, requires = "server", conflicts_with_all = ["pause", "resume_job", "stop", "rollback", "list"])]
    pub publish: bool,
    /// With --publish or --rollback: continuations that are inside go on under the new weights. Default: they end on the old ones.
    #[arg(long, requires = "server")]
    pub migrate: bool,
    /// With --publish: how long the server watches the new weights and goes back by itself if they are worse. Default: its
    /// --publish-watch.
    #[arg(long, value_name = "SECONDS", requires = "publish")]
    pub watch_seconds: Option<f64>,
    /// Show a job that was started before.
    #[arg(long, value_name = "ID", requires = "server")]
    pub watch: Option<String>,
    /// Pause a job.
    #[arg(long, value_name = "ID", requires = "server")]
    pub pause: Option<String>,
    /// Let a paused job go on.
    #[arg(long, value_name = "ID", requires = "server")]
    pub resume_job: Option<String>,
    /// End a job; what it has learned is lost, unless --keep is given.
    #[arg(long, value_name = "ID", requires = "server")]
    pub stop: Option<String>,
    /// With --stop: what it has learned so far is the result.
    #[arg(long, requires = "stop")]
    pub keep: bool,
    /// Put an older generation in force again; without a number the one before.
    #[arg(long, value_name = "GENERATION", num_args = 0..=1, requires = "server")]
    pub rollback: Option<Option<u64>>,
    /// Show all jobs and generations.
    #[arg(long, requires = "server")]
    pub list: bool,
    /// Who asks, for the server's audit log.
    #[arg(long, value_name = "NAME", requires = "server", default_value = "")]
    pub actor: String,
}

/// A value of `--share`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShareArg(proto::tuning_share::Share);

/// A server that is asked.
struct Remote<'a> {
    client: TuningClient<Channel>,
    url: &'a str,
    args: &'a TuneArgs,
}

impl FromStr for ShareArg {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        use proto::tuning_share::{Exclusive, Share};
        if text == "exclusive" {
            return Ok(Self(Share::Exclusive(Exclusive {})));
        }
        match text.parse() {
            Ok(duty) if duty > 0.0 && duty < 1.0 => Ok(Self(Share::DutyCycle(duty))),
            _ => Err("neither `exclusive` nor a number above 0 and below 1".into()),
        }
    }
}

/// Does what is asked of the server at `url`.
///
/// # Errors
/// What the server refuses; `FailedPrecondition` where a job ends without a result, or a gate does not hold and `--override` is not given.
pub(super) fn run(args: &TuneArgs, url: &str) -> Result<()> {
    check(args)?;
    block_on(async {
        // Jobs of large models have long figures.
        let client = TuningClient::new(connect_to(url, "--server").await?).max_decoding_message_size(usize::MAX);
        let mut remote = Remote { client, url, args };
        let asked = &args.remote;
        if asked.list {
            remote.list().await
        } else if let Some(generation) = asked.rollback {
            remote.rollback(generation).await
        } else if let Some(id) = &asked.pause {
            remote.pause(id).await
        } else if let Some(id) = &asked.resume_job {
            remote.resume(id).await
        } else if let Some(id) = &asked.stop {
            remote.stop(id).await
        } else {
            let id = match &asked.watch {
                Some(id) => id.clone(),
                None => remote.start().await?,
            };
            remote.follow(&id).await
        }
    })
}

/// Fails on what is of a run here.
fn check(args: &TuneArgs) -> Result<()> {
    let instead = "the result is on the server: put it in force with --publish";
    for (flag, given, instead) in [
        ("--heldout", !args.heldout.is_empty(), "name files of the server with --server-data and --server-heldout"),
        ("--output", args.output.is_some(), instead),
        ("--delta", args.delta.is_some(), instead),
        ("--json", args.json.is_some(), "the server keeps what was measured"),
        ("--work", args.work.is_some(), "the server keeps the states of its jobs"),
    ] {
        if given {
            return Err(Error::invalid(flag, format!("has no effect with --server; {instead}")));
        }
    }
    check_action(args)
}

/// Fails on what has no effect on what is asked for.
fn check_action(args: &TuneArgs) -> Result<()> {
    let asked = &args.remote;
    let (resumes, switches) = (asked.resume_job.is_some(), asked.publish || asked.rollback.is_some());
    let acts = resumes || asked.pause.is_some() || asked.stop.is_some() || asked.rollback.is_some() || asked.list;
    let starts = !acts && asked.watch.is_none();
    for (flag, given, used, of) in [
        ("settings of a run", args.recipe.is_some() || args.run != RunArgs::default(), starts, "a start: those of a job stay as they are"),
        ("--separator", args.separator.is_some(), starts, "a start"),
        ("--share", asked.share.is_some(), starts || resumes, "a start or --resume-job"),
        ("--migrate", asked.migrate, switches, "--publish or --rollback"),
        ("--override", args.override_gates, !acts, "a start, --watch or --publish"),
    ] {
        if given && !used {
            return Err(Error::invalid(flag, format!("is only of effect with {of}")));
        }
    }
    Ok(())
}

// === impl Remote ===

impl Remote<'_> {
    /// Sends settings and text; the id of the job.
    async fn start(&mut self) -> Result<String> {
        let config = self.config()?;
        let (sender, receiver) = mpsc::channel(READ_AHEAD);
        let call = async { self.client.start_tuning(ReceiverStream::new(receiver)).await.map_err(|status| refused(&status)) };
        // Where a file cannot be read the call is dropped: the server must not begin on half a text.
        let ((), response) = tokio::try_join!(send(self.args, config, sender), call)?;
        let job = response.into_inner().job.unwrap_or_default();
        let mib = job.memory.map_or(0, |memory| memory.total) >> 20;
        let (id, tokens, heldout) = (&job.id, job.train_tokens, job.heldout_tokens);
        tracing::info!("job {id}: {tokens} tokens to learn from, {heldout} held out; {mib} MiB at most");
        tracing::info!("{} values of {} tensors learn", job.trained_parameters, job.trained.len());
        Ok(job.id)
    }

    fn config(&self) -> Result<proto::TuningConfig> {
        let (args, remote) = (self.args, &self.args.remote);
        let mut config = tuning_message(&args.config()?);
        let data = config.data.get_or_insert_default();
        data.paths.clone_from(&remote.server_data);
        data.heldout_paths.clone_from(&remote.server_heldout);
        if !remote.server_data.is_empty() {
            data.separator = args.sources().separator.unwrap_or_default();
        }
        Ok(proto::TuningConfig { actor: remote.actor.clone(), share: share(remote), ..config })
    }

    /// Shows a job until it ends, and publishes what it leaves where that is asked for.
    async fn follow(&mut self, id: &str) -> Result<()> {
        let job = tokio::select! {
            job = self.watch(id) => job?,
            _ = tokio::signal::ctrl_c() => {
                tracing::info!("job {id} goes on; see it with --server {} --watch {id}", self.url);
                return Err(Error::Cancelled);
            }
        };
        let state = job.state();
        if state != TuningState::Done {
            let name = state.as_str_name().trim_start_matches("TUNING_STATE_").to_lowercase();
            return Err(Error::FailedPrecondition(format!("job {id} has left nothing, it is {name}: {}", job.detail)));
        }
        let (before, after) = (job.before.clone().unwrap_or_default(), job.latest.clone().unwrap_or_default());
        let verdicts = read_verdicts(&job.verdicts);
        print(&table(&read_figures(&before), &read_figures(&after), &verdicts, job.step as usize))?;
        if self.args.remote.publish {
            return self.publish(id).await;
        }
        super::check_gates(&verdicts, self.args.override_gates)
    }

    /// The job as it is at its end.
    async fn watch(&mut self, id: &str) -> Result<TuningJob> {
        let request = proto::GetTuningRequest { id: id.into() };
        let mut job = self.client.get_tuning(request).await.map_err(|status| refused(&status))?.into_inner();
        let request = proto::WatchTuningRequest { id: id.into(), after: 0 };
        let mut stream = self.client.watch_tuning(request).await.map_err(|status| refused(&status))?.into_inner();
        let mut progress = Progress::new(job.steps as usize);
        while let Some(message) = stream.message().await.map_err(|status| refused(&status))? {
            match message.event {
                Some(Told::Job(now)) => {
                    progress.state(&now);
                    job = now;
                }
                Some(event) => progress.show_all(read_event(&event)),
                None => {}
            }
        }
        progress.finish();
        Ok(job)
    }

    async fn publish(&mut self, id: &str) -> Result<()> {
        let remote = &self.args.remote;
        let request = proto::PublishRequest {
            id: id.into(),
            override_gates: self.args.override_gates,
            in_flight: in_flight(remote),
            watch_seconds: remote.watch_seconds,
            actor: remote.actor.clone(),
        };
        let published = self.client.publish(request).await.map_err(|status| refused(&status))?;
        told(&published.into_inner())
    }

    async fn rollback(&mut self, generation: Option<u64>) -> Result<()> {
        let remote = &self.args.remote;
        let request = proto::RollbackRequest { generation, in_flight: in_flight(remote), actor: remote.actor.clone() };
        let published = self.client.rollback(request).await.map_err(|status| refused(&status))?;
        told(&published.into_inner())
    }

    async fn pause(&mut self, id: &str) -> Result<()> {
        let request = proto::PauseTuningRequest { id: id.into(), actor: self.args.remote.actor.clone() };
        let job = self.client.pause_tuning(request).await.map_err(|status| refused(&status))?;
        print(&jobs(&[job.into_inner()]))
    }

    async fn resume(&mut self, id: &str) -> Result<()> {
        let remote = &self.args.remote;
        let request = proto::ResumeTuningRequest { id: id.into(), share: share(remote), actor: remote.actor.clone() };
        let job = self.client.resume_tuning(request).await.map_err(|status| refused(&status))?;
        print(&jobs(&[job.into_inner()]))
    }

    async fn stop(&mut self, id: &str) -> Result<()> {
        let remote = &self.args.remote;
        let request = proto::StopTuningRequest { id: id.into(), keep_candidate: remote.keep, actor: remote.actor.clone() };
        let job = self.client.stop_tuning(request).await.map_err(|status| refused(&status))?;
        print(&jobs(&[job.into_inner()]))
    }

    async fn list(&mut self) -> Result<()> {
        let all = self.client.list_tunings(proto::ListTuningsRequest {}).await.map_err(|status| refused(&status))?;
        let there = self.client.list_generations(proto::ListGenerationsRequest {}).await.map_err(|status| refused(&status))?;
        print(&format!("{}\n{}", jobs(&all.into_inner().jobs), generations(&there.into_inner().generations)))
    }
}

/// Settings, and then the text of `--data`; less of it where the server no longer listens: its answer says why.
async fn send(args: &TuneArgs, config: proto::TuningConfig, to: mpsc::Sender<proto::StartTuningRequest>) -> Result<()> {
    let message = |part| proto::StartTuningRequest { part: Some(part) };
    if to.send(message(Part::Config(config))).await.is_err() {
        return Ok(());
    }
    let sources = args.sources();
    let [documents, _] = sources.documents(usize::MAX);
    for document in documents {
        let text = match document? {
            Document::Text(text) => text,
            Document::Tokens(ids) => {
                let tokens = proto::TokenIds { ids };
                _ = to.send(message(Part::TokenIds(tokens))).await;
                continue;
            }
        };
        for piece in pieces(&text) {
            if to.send(message(Part::Text(piece.to_owned()))).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// `text` in parts that fit into a message, cut after a line where there is one.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = match rest.floor_char_boundary(MOST_BYTES) {
            0 => return None,
            end if end == rest.len() => end,
            end => rest[..end].rfind('\n').map_or(end, |line| line + 1),
        };
        let (piece, after) = rest.split_at(end);
        rest = after;
        Some(piece)
    })
}

fn share(remote: &RemoteArgs) -> Option<proto::TuningShare> {
    remote.share.map(|ShareArg(share)| proto::TuningShare { share: Some(share) })
}

fn in_flight(remote: &RemoteArgs) -> i32 {
    if remote.migrate { InFlight::Migrate } else { InFlight::Finish }.into()
}

fn told(published: &proto::PublishResponse) -> Result<()> {
    let proto::PublishResponse { generation, previous, staying, migrated, seconds, .. } = published;
    let inside = format!("{staying} requests end on older weights, {migrated} go on under these");
    print(&format!("generation {generation} is in force, before it was {previous}; {inside}; no step for {:.1} ms\n", 1e3 * seconds))
}

/// A table of columns that are as wide as they must be.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: [usize; N] = std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        row.iter().zip(widths).for_each(|(cell, width)| _ = write!(line, "{cell:<width$}  "));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn jobs(jobs: &[TuningJob]) -> String {
    let name = |name: &str, prefix| name.trim_start_matches(prefix).replace('_', " ").to_lowercase();
    let row = |job: &TuningJob| {
        let routing = job.config.clone().unwrap_or_default().routing.unwrap_or_default();
        let phase = name(job.phase().as_str_name(), "TUNING_PHASE_");
        [
            job.id.clone(),
            name(job.state().as_str_name(), "TUNING_STATE_"),
            if job.state() == TuningState::Running { phase } else { String::new() },
            format!("{} of {}", job.step, job.steps),
            routing.estimator,
            job.base_generation.to_string(),
            if job.generation == 0 { String::new() } else { job.generation.to_string() },
            job.detail.clone(),
        ]
    };
    let head = ["job", "state", "phase", "step", "estimator", "from", "published as", "detail"].map(str::to_owned);
    columns(&std::iter::once(head).chain(jobs.iter().map(row)).collect::<Vec<_>>())
}

fn generations(generations: &[proto::Generation]) -> String {
    let row = |generation: &proto::Generation| {
        let serving = generation.figures.as_ref().and_then(|figures| figures.routings.first());
        [
            generation.number.to_string(),
            if generation.current { "in force".into() } else { String::new() },
            if generation.parent == 0 { String::new() } else { generation.parent.to_string() },
            generation.job.clone(),
            generation.tensors.to_string(),
            generation.bytes.to_string(),
            serving.map_or_else(String::new, |serving| format!("{:.3}", serving.perplexity)),
            serving.map_or_else(String::new, |serving| format!("{:.4}", serving.kl)),
        ]
    };
    let head = ["generation", "", "from", "job", "tensors", "bytes", "perplexity", "own gap"].map(str::to_owned);
    columns(&std::iter::once(head).chain(generations.iter().map(row)).collect::<Vec<_>>())
}

impl Progress {
    fn show_all(&mut self, event: Option<Event>) {
        if let Some(event) = event {
            self.show(&event);
        }
    }

    /// The job has another state or phase.
    fn state(&mut self, job: &TuningJob) {
        match job.state() {
            TuningState::Paused => self.say(&format!("paused: {}", job.detail)),
            TuningState::Running if job.phase() == proto::TuningPhase::Draining => self.say("waits for the requests inside to end"),
            TuningState::Running => self.show_all(read_phase(job.phase()).map(Event::Phase)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        tune: TuneArgs,
    }

    fn line(flags: &[&str]) -> std::result::Result<TuneArgs, String> {
        let line = Line::try_parse_from(["tune"].iter().chain(flags));
        line.map(|line| line.tune).map_err(|error| error.to_string())
    }

    #[test]
    fn a_server_needs_no_checkpoint_and_no_place_for_a_result() {
        let args = line(&["--server", "host:1", "--data", "a.txt", "--share", "0.5", "--steps", "7", "--publish"]).unwrap();
        assert_eq!((args.config().unwrap().run.steps, args.remote.publish), (7, true));
        assert_eq!(args.remote.share, Some(ShareArg(proto::tuning_share::Share::DutyCycle(0.5))));
        assert_eq!(line(&["--server", "host:1", "--rollback"]).unwrap().remote.rollback, Some(None));
        assert_eq!(line(&["--server", "host:1", "--rollback", "3"]).unwrap().remote.rollback, Some(Some(3)));
        for refused in [
            &["--server", "host:1"][..],
            &["--server", "host:1", "--data", "a.txt", "--share", "1"],
            &["--server", "host:1", "--watch", "t1", "--pause", "t1"],
            &["--server", "host:1", "--list", "--publish"],
            &["--watch", "t1"],
            &["--data", "a.txt", "--model", "m", "--json", "x", "--publish"],
        ] {
            assert!(line(refused).is_err(), "{refused:?}");
        }
        let local = line(&["--server", "host:1", "--data", "a.txt", "--delta", "d"]).unwrap();
        assert!(check(&local).unwrap_err().to_string().starts_with("--delta: has no effect with --server"));
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        let told = |flags: &[&str]| check(&line(&[&["--server", "host:1"], flags].concat()).unwrap());
        for good in [
            &["--data", "a", "--share", "0.5", "--steps", "7", "--separator", "x", "--publish", "--migrate", "--override"][..],
            &["--resume-job", "t1", "--share", "0.1"],
            &["--watch", "t1", "--publish", "--override"],
            &["--rollback", "--migrate"],
            &["--list"],
        ] {
            told(good).unwrap();
        }
        for (bad, flag) in [
            (&["--resume-job", "t1", "--steps", "9"][..], "settings of a run"),
            (&["--list", "--recipe", "x"], "settings of a run"),
            (&["--watch", "t1", "--share", "0.1"], "--share"),
            (&["--watch", "t1", "--separator", "x"], "--separator"),
            (&["--data", "a", "--migrate"], "--migrate"),
            (&["--rollback", "--override"], "--override"),
        ] {
            let error = told(bad).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{flag}: is only of effect with")), "{bad:?}: {error}");
        }
    }

    #[test]
    fn long_documents_are_cut_after_a_line() {
        let line = "größer ".repeat(1000) + "\n";
        let text = line.repeat(MOST_BYTES * 2 / line.len());
        let cut: Vec<&str> = pieces(&text).collect();
        assert!(cut.len() > 1 && cut.iter().all(|piece| piece.len() <= MOST_BYTES && piece.ends_with('\n')));
        assert_eq!(cut.concat(), text);
        assert_eq!(pieces("").count(), 0);
        assert_eq!(pieces(&"é".repeat(MOST_BYTES)).map(str::len).sum::<usize>(), 2 * MOST_BYTES);
    }

    #[test]
    fn tables_have_straight_columns() {
        let text = jobs(&[TuningJob { id: "t10".into(), steps: 5, state: TuningState::Done.into(), ..TuningJob::default() }]);
        let [head, row] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
        assert_eq!(head.find("state"), row.find("done"));
        assert_eq!(head.find("step"), row.find("0 of 5"));
    }
}
