//! `hardmax.v1.Tuning`: jobs that train beside serving, and the generations of weights that come of them.

mod config;
mod convert;
mod read;
mod start;
mod watch;

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub use self::{
    config::tuning_message,
    read::{read_event, read_figures, read_phase, read_verdicts},
};
use self::{
    config::{config, in_message, share},
    convert::{Scribe, published},
    start::{Arriving, Source},
};
use super::{
    call::Call,
    context::Context,
    proto::{self, tuning_server::Tuning},
};
use crate::{
    engine::{InFlight, Share},
    error::{Error, Result},
    jobs::{Export, GenerationRecord, Job, JobId, Jobs, Publish, Rollback, Who},
};

/// What a job has of the machine unless its start says otherwise.
const DEFAULT_SHARE: Share = Share::Background { duty: 0.25 };

/// Longest name of who asks, in bytes: it is kept for ever.
const MAX_ACTOR: usize = 256;

/// The implementation of [`Tuning`] over the jobs of a server.
#[derive(Clone, Debug)]
pub struct TuningService {
    context: Arc<Context>,
    scribe: Scribe,
    /// One text arrives at a time: there is one job, and a text is large.
    starting: Arc<Semaphore>,
}

// === impl TuningService ===

impl TuningService {
    pub(super) fn new(context: Arc<Context>) -> Self {
        let scribe = Scribe::new(context.engine.spec());
        Self { context, scribe, starting: Arc::new(Semaphore::new(1)) }
    }

    fn jobs(&self) -> Result<&Jobs> {
        let refused = || Error::FailedPrecondition("this server does not tune: start it with --tuning-dir DIR".into());
        self.context.jobs.as_ref().ok_or_else(refused)
    }

    async fn first(&self, arriving: &mut Arriving) -> Result<proto::TuningConfig> {
        self.jobs()?;
        arriving.config().await
    }

    async fn start(&self, caller: &Caller, message: proto::TuningConfig, arriving: Arriving) -> Result<Job> {
        let jobs = self.jobs()?;
        let who = caller.who(&message.actor).map_err(|error| error.rooted("actor", "config.actor"))?;
        self.context.check_model(&message.model)?;
        let config = config(&message, &self.context.serving().rule)?;
        let placed = |error| in_message(error, &config);
        let share = message.share.map_or(Ok(DEFAULT_SHARE), |asked| share(asked, "config.share"))?;
        let permit = self.starting.clone().try_acquire_owned();
        let permit = permit.map_err(|_| Error::FailedPrecondition("another job is being started: try again when it runs".into()))?;
        let (asked, of, data) = (jobs.clone(), config.clone(), message.data.unwrap_or_default());
        // It looks at files.
        let looking = tokio::task::spawn_blocking(move || {
            asked.check(&of, share)?;
            Ok((Source::new(&asked, data)?, asked.shape(&of)?))
        });
        let looked = looking.await.map_err(|error| Error::Internal(format!("checking a start failed: {error}")))?;
        let (source, shape) = looked.map_err(placed)?;
        let (corpus, _permit) = arriving.corpus(source, &self.context.engine, shape, permit).await.map_err(placed)?;
        jobs.start(config.clone(), share, corpus, who).await.map_err(placed)
    }

    async fn pause(&self, caller: &Caller, request: proto::PauseTuningRequest) -> Result<proto::TuningJob> {
        let jobs = self.jobs()?;
        Ok(self.scribe.job(&jobs.pause(request.id.parse()?, caller.who(&request.actor)?).await?))
    }

    async fn resume(&self, caller: &Caller, request: proto::ResumeTuningRequest) -> Result<proto::TuningJob> {
        let jobs = self.jobs()?;
        let share = request.share.map(|asked| share(asked, "share")).transpose()?;
        Ok(self.scribe.job(&jobs.resume(request.id.parse()?, share, caller.who(&request.actor)?).await?))
    }

    async fn stop(&self, caller: &Caller, request: proto::StopTuningRequest) -> Result<proto::TuningJob> {
        let jobs = self.jobs()?;
        Ok(self.scribe.job(&jobs.stop(request.id.parse()?, request.keep_candidate, caller.who(&request.actor)?).await?))
    }

    fn list(&self) -> Result<proto::ListTuningsResponse> {
        Ok(proto::ListTuningsResponse { jobs: self.jobs()?.list().iter().map(|job| self.scribe.job(job)).collect() })
    }

    fn get(&self, id: &str) -> Result<proto::TuningJob> {
        Ok(self.scribe.job(&self.jobs()?.get(id.parse()?)?))
    }

    fn watch(&self, call: &Call, request: &proto::WatchTuningRequest) -> Result<<Self as Tuning>::WatchTuningStream> {
        let (jobs, id) = (self.jobs()?, request.id.parse::<JobId>()?);
        let watch = jobs.watch(id, request.after)?;
        Ok(watch::messages(&jobs.get(id)?, watch, self.scribe.clone(), call.clone()))
    }

    async fn put_in_force(&self, caller: &Caller, request: proto::PublishRequest) -> Result<proto::PublishResponse> {
        let jobs = self.jobs()?;
        let request = Publish {
            id: request.id.parse()?,
            override_gates: request.override_gates,
            in_flight: in_flight(request.in_flight)?,
            watch_seconds: request.watch_seconds,
            serving: self.context.serving().rule.to_string(),
            who: caller.who(&request.actor)?,
        };
        Ok(published(&jobs.publish(request).await?))
    }

    async fn put_back(&self, caller: &Caller, request: proto::RollbackRequest) -> Result<proto::PublishResponse> {
        let jobs = self.jobs()?;
        let request =
            Rollback { generation: request.generation, in_flight: in_flight(request.in_flight)?, who: caller.who(&request.actor)? };
        Ok(published(&jobs.rollback(request).await?))
    }

    /// Without jobs there is one.
    fn generations(&self) -> proto::ListGenerationsResponse {
        let records = match &self.context.jobs {
            Some(jobs) => jobs.generations(),
            None => vec![self.loaded()],
        };
        proto::ListGenerationsResponse { generations: records.iter().map(|record| self.scribe.generation(record)).collect() }
    }

    fn loaded(&self) -> GenerationRecord {
        let number = self.context.engine.status().generation;
        GenerationRecord {
            number,
            parent: None,
            job: None,
            published: 0.0,
            tensors: 0,
            bytes: 0,
            figures: None,
            current: true,
            resident: true,
            requests: self.context.engine.tally(number).finished,
        }
    }

    async fn export(&self, caller: &Caller, request: proto::ExportGenerationRequest) -> Result<proto::ExportGenerationResponse> {
        use proto::export_generation_request::Form;
        let jobs = self.jobs()?;
        let form = match Form::try_from(request.form) {
            Ok(Form::Checkpoint) => Export::Checkpoint,
            Ok(Form::Delta) => Export::Delta,
            Err(_) => {
                let message = format!("{} is not a value of hardmax.v1.ExportGenerationRequest.Form", request.form);
                return Err(Error::invalid("form", message));
            }
        };
        let exported = jobs.export(request.generation, form, &request.name, caller.who(&request.actor)?).await?;
        Ok(proto::ExportGenerationResponse { path: exported.path.display().to_string(), bytes: exported.bytes, sha256: exported.sha256 })
    }
}

fn in_flight(value: i32) -> Result<InFlight> {
    match proto::InFlight::try_from(value) {
        Ok(proto::InFlight::Finish) => Ok(InFlight::Finish),
        Ok(proto::InFlight::Migrate) => Ok(InFlight::Migrate),
        Err(_) => Err(Error::invalid("in_flight", format!("{value} is not a value of hardmax.v1.InFlight"))),
    }
}

/// A call, and the address that it comes from.
struct Caller {
    call: Call,
    peer: String,
}

impl Caller {
    fn new<T>(request: &Request<T>, request_id: &str) -> Result<Self, Status> {
        let call = Call::new(request_id, request.metadata(), request.extensions())?;
        Ok(Self { call, peer: request.remote_addr().map(|address| address.to_string()).unwrap_or_default() })
    }

    /// Who is said to ask.
    fn who(&self, actor: &str) -> Result<Who> {
        if actor.len() > MAX_ACTOR {
            return Err(Error::invalid("actor", format!("is longer than {MAX_ACTOR} bytes")));
        }
        Ok(Who { peer: self.peer.clone(), actor: actor.into(), request_id: self.call.id.clone() })
    }

    fn answer<T>(&self, result: Result<T>) -> Result<Response<T>, Status> {
        result.map(|message| self.call.response(message)).map_err(|error| self.call.status(&error))
    }
}

#[tonic::async_trait]
impl Tuning for TuningService {
    type WatchTuningStream = ReceiverStream<Result<proto::WatchTuningResponse, Status>>;

    async fn start_tuning(
        &self,
        request: Request<Streaming<proto::StartTuningRequest>>,
    ) -> Result<Response<proto::StartTuningResponse>, Status> {
        let (metadata, extensions, messages) = request.into_parts();
        let mut arriving = Arriving::new(messages);
        let first = self.first(&mut arriving).await;
        let id = first.as_ref().map_or("", |config| &config.request_id);
        let caller = Caller::new(&Request::from_parts(metadata, extensions, ()), id)?;
        let job = match first {
            Ok(config) => self.start(&caller, config, arriving).await,
            Err(error) => Err(error),
        };
        let answer = |job| proto::StartTuningResponse { request_id: caller.call.id.clone(), job: Some(self.scribe.job(&job)) };
        caller.answer(job.map(answer))
    }

    async fn watch_tuning(&self, request: Request<proto::WatchTuningRequest>) -> Result<Response<Self::WatchTuningStream>, Status> {
        let caller = Caller::new(&request, "")?;
        caller.answer(self.watch(&caller.call, request.get_ref()))
    }

    async fn pause_tuning(&self, request: Request<proto::PauseTuningRequest>) -> Result<Response<proto::TuningJob>, Status> {
        let caller = Caller::new(&request, "")?;
        caller.answer(self.pause(&caller, request.into_inner()).await)
    }

    async fn resume_tuning(&self, request: Request<proto::ResumeTuningRequest>) -> Result<Response<proto::TuningJob>, Status> {
        let caller = Caller::new(&request, "")?;
        caller.answer(self.resume(&caller, request.into_inner()).await)
    }

    async fn stop_tuning(&self, request: Request<proto::StopTuningRequest>) -> Result<Response<proto::TuningJob>, Status> {
        let caller = Caller::new(&request, "")?;
        caller.answer(self.stop(&caller, request.into_inner()).await)
    }

    async fn list_tunings(&self, request: Request<proto::ListTuningsRequest>) -> Result<Response<proto::ListTuningsResponse>, Status> {
        Caller::new(&request, "")?.answer(self.list())
    }

    async fn get_tuning(&self, request: Request<proto::GetTuningRequest>) -> Result<Response<proto::TuningJob>, Status> {
        Caller::new(&request, "")?.answer(self.get(&request.get_ref().id))
    }

    async fn publish(&self, request: Request<proto::PublishRequest>) -> Result<Response<proto::PublishResponse>, Status> {
        let caller = Caller::new(&request, "")?;
        caller.answer(self.put_in_force(&caller, request.into_inner()).await)
    }

    async fn rollback(&self, request: Request<proto::RollbackRequest>) -> Result<Response<proto::PublishResponse>, Status> {
        let caller = Caller::new(&request, "")?;
        caller.answer(self.put_back(&caller, request.into_inner()).await)
    }

    async fn list_generations(
        &self,
        request: Request<proto::ListGenerationsRequest>,
    ) -> Result<Response<proto::ListGenerationsResponse>, Status> {
        Caller::new(&request, "")?.answer(Ok(self.generations()))
    }

    async fn export_generation(
        &self,
        request: Request<proto::ExportGenerationRequest>,
    ) -> Result<Response<proto::ExportGenerationResponse>, Status> {
        let caller = Caller::new(&request, "")?;
        caller.answer(self.export(&caller, request.into_inner()).await)
    }
}
