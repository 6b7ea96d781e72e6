//! From the start of a job to its end, by all ways.

use std::fs;

use super::*;

fn steps(entries: &[Entry]) -> Vec<usize> {
    let step = |entry: &Entry| if let What::Event(Event::Step(step)) = &entry.what { Some(step.step) } else { None };
    entries.iter().filter_map(step).collect()
}

/// The candidate of a run that nothing has disturbed.
async fn undisturbed() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    let bytes = candidate(dir.path(), id);
    server.leave().await;
    bytes
}

fn candidate(dir: &Path, id: JobId) -> Vec<u8> {
    fs::read(folder::candidate(&dir.join("tuning/jobs").join(id.to_string()))).unwrap()
}

#[tokio::test]
async fn a_job_comes_to_a_candidate_and_tells_what_it_does() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let memory = server.jobs.check(&config(|_| {}), BACKGROUND).unwrap();
    let id = server.start(|_| {}).await;
    assert_eq!(id.to_string(), "t1");
    let entries = server.all_of(id).await;
    assert_eq!(steps(&entries), [1, 2, 3, 4, 5, 6]);
    assert!(entries.is_sorted_by(|a, b| a.sequence < b.sequence));
    let What::Job(last) = &entries.last().unwrap().what else { panic!("the last entry is the job") };
    let job = server.jobs.get(id).unwrap();
    assert_eq!(**last, job);
    assert_eq!((job.state, job.phase, job.step, job.base_generation, job.generation), (JobState::Done, None, 6, 1, None));
    assert_eq!(job.detail, "ended after 6 steps: steps");
    assert_eq!(
        (job.trained.as_slice(), job.trained_parameters),
        (&["layers.0.router".to_owned(), "layers.1.router".into()][..], 2 * 5 * 24)
    );
    assert!(job.before.is_some() && job.latest.is_some() && job.before != job.latest);
    assert!(!job.verdicts.is_empty() && job.verdicts.iter().all(|verdict| verdict.passed));
    assert!(job.memory.total >= memory.total && job.train_tokens + job.heldout_tokens == 400);
    assert_eq!((server.jobs.list(), server.jobs.running()), (vec![job], None));
    assert_eq!(server.engine.status().mode, crate::engine::Mode::Serve, "the machine is the requests' again");
    // One who comes late reads the same, and one who goes on the rest.
    let late = server.all_of(id).await;
    assert!(steps(&late) == steps(&entries) && late.iter().all(|entry| entry.history));
    let third = entries.iter().find(|entry| steps(std::slice::from_ref(entry)) == [3]).unwrap().sequence;
    let mut rest = server.jobs.watch(id, third).unwrap();
    let mut after = Vec::new();
    while let Some(entry) = rest.next().await {
        after.push(entry);
    }
    assert_eq!(steps(&after), [4, 5, 6]);
    // Neither text nor states stay.
    let mut files: Vec<_> = fs::read_dir(dir.path().join("tuning/jobs/t1")).unwrap().map(|f| f.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["candidate.safetensors", "job.json", "progress.jsonl"]);
    let of = |name: &str| series(&server.metrics, name);
    assert_eq!((of("hardmax_tuning_step{"), of("hardmax_tuning_tokens_total")), (6.0, 6.0 * 32.0));
    assert_eq!(
        (of("hardmax_tuning_jobs{model=\"tiny\",state=\"done\"}"), of("hardmax_tuning_jobs{model=\"tiny\",state=\"running\"}")),
        (1.0, 0.0)
    );
    server.leave().await;
}

#[tokio::test]
async fn who_pauses_and_goes_on_comes_to_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.start(|_| {}).await;
    server.until_step(id, 1).await;
    let job = patiently(server.jobs.pause(id, who())).await.unwrap();
    // It may have been faster than we were.
    if job.state == JobState::Paused {
        assert_eq!((job.detail.as_str(), server.jobs.running()), ("paused as asked", None));
        let again = kind(server.jobs.pause(id, who()).await);
        assert_eq!(again, (ErrorKind::FailedPrecondition, "job t1 is paused already: resume or stop it".into()));
        let share = Share::Background { duty: 0.25 };
        let resumed = server.jobs.resume(id, Some(share), who()).await.unwrap();
        assert_eq!((resumed.state, resumed.share), (JobState::Running, share));
    }
    let job = server.end_of(id).await;
    assert_eq!((job.state, job.step), (JobState::Done, 6));
    assert_eq!(steps(&server.all_of(id).await), [1, 2, 3, 4, 5, 6], "no step is told twice");
    assert!(candidate(dir.path(), id) == undisturbed().await);
    server.leave().await;
}

#[tokio::test]
async fn a_job_that_runs_at_the_end_of_the_server_goes_on_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = serve(setup(dir.path()));
    let id = server.start(|_| {}).await;
    let mut restarts = 0;
    while server.jobs.get(id).unwrap().state == JobState::Running && restarts < 4 {
        server.until_step(id, server.jobs.get(id).unwrap().step + 1).await;
        let mut watch = server.jobs.watch(id, 0).unwrap();
        server.leave().await;
        while patiently(watch.next()).await.is_some() {}
        server = serve(setup(dir.path()));
        restarts += 1;
    }
    let job = server.end_of(id).await;
    assert_eq!((job.state, steps(&server.all_of(id).await)), (JobState::Done, vec![1, 2, 3, 4, 5, 6]), "{}", job.detail);
    assert!(candidate(dir.path(), id) == undisturbed().await);
    server.leave().await;
}

#[tokio::test]
async fn a_job_can_be_ended_with_and_without_a_candidate() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let long = |config: &mut TuneConfig| config.run.steps = 100_000;
    // Nothing is left.
    let id = server.start(long).await;
    server.until_step(id, 2).await;
    let job = patiently(server.jobs.stop(id, false, who())).await.unwrap();
    assert_eq!((job.state, job.detail.as_str()), (JobState::Stopped, "stopped without a candidate"));
    assert!(!folder::candidate(&dir.path().join("tuning/jobs/t1")).exists());
    assert_eq!(kind(server.publish(id, true).await).0, ErrorKind::FailedPrecondition);
    assert_eq!(kind(server.jobs.stop(id, false, who()).await).1, "job t1 was stopped: start another job");
    // What it has learned so far.
    let id = server.start(long).await;
    server.until_step(id, 2).await;
    let job = patiently(server.jobs.stop(id, true, who())).await.unwrap();
    assert!(job.state == JobState::Done && job.step >= 2 && job.latest.is_some(), "{job:?}");
    // The same of paused ones.
    for keep in [false, true] {
        let id = server.start(long).await;
        server.until_step(id, 1).await;
        assert_eq!(patiently(server.jobs.pause(id, who())).await.unwrap().state, JobState::Paused);
        let job = patiently(server.jobs.stop(id, keep, who())).await.unwrap();
        assert_eq!(job.state, if keep { JobState::Done } else { JobState::Stopped });
        assert_eq!(folder::candidate(&dir.path().join("tuning/jobs").join(id.to_string())).exists(), keep);
    }
    server.leave().await;
}

/// The oldest go, and that is said of their ends: the candidate of the one that has just ended is there for whoever waited for it.
#[tokio::test]
async fn those_that_ended_last_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(Setup { keep: 1, ..setup(dir.path()) });
    let first = server.start(|config| config.run.steps = 100_000).await;
    server.until_step(first, 1).await;
    assert_eq!(patiently(server.jobs.pause(first, who())).await.unwrap().state, JobState::Paused);
    let second = server.done(|_| {}).await;
    assert!(server.jobs.get(second).unwrap().ended.is_some() && server.jobs.get(first).unwrap().ended.is_none());
    assert_eq!(patiently(server.jobs.stop(first, true, who())).await.unwrap().state, JobState::Done);
    assert_eq!(server.jobs.list().iter().map(|job| job.id).collect::<Vec<_>>(), [first]);
    assert_eq!(server.publish(first, true).await.unwrap().generation, 2);
    server.leave().await;
}

/// Whoever can see that a job runs can stop it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_meets_a_start_is_heard() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    for number in 1..=5 {
        let (jobs, id) = (server.jobs.clone(), JobId(number));
        let stop = tokio::spawn(async move {
            while jobs.get(id).is_err() {
                tokio::task::yield_now().await;
            }
            jobs.stop(id, false, who()).await
        });
        server.start(|config| config.run.steps = 100_000).await;
        assert_eq!(patiently(stop).await.unwrap().unwrap().state, JobState::Stopped);
    }
    server.leave().await;
}

#[tokio::test]
async fn one_job_runs_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.start(|config| config.run.steps = 100_000).await;
    let busy = (ErrorKind::FailedPrecondition, "job t1 runs, and one can at a time: pause or stop it, or wait for its end".to_owned());
    assert_eq!(kind(server.jobs.check(&config(|_| {}), BACKGROUND)), busy);
    assert_eq!(kind(server.jobs.start(config(|_| {}), BACKGROUND, corpus(), who()).await), busy);
    assert_eq!(kind(server.jobs.resume(id, None, who()).await).0, ErrorKind::FailedPrecondition);
    // Another share of the machine, while it runs.
    assert_eq!(server.jobs.resume(id, Some(Share::Exclusive), who()).await.unwrap().share, Share::Exclusive);
    assert_eq!(server.engine.status().mode, crate::engine::Mode::TuneExclusive);
    let wrong = kind(server.jobs.resume(id, Some(Share::Background { duty: 1.0 }), who()).await);
    assert_eq!(wrong.0, ErrorKind::InvalidArgument);
    patiently(server.jobs.pause(id, who())).await.unwrap();
    assert_eq!(server.engine.status().mode, crate::engine::Mode::Serve);
    // With all of the machine from the start.
    let second = server.jobs.start(config(|_| {}), Share::Exclusive, corpus(), who()).await.unwrap().id;
    assert_eq!(server.end_of(second).await.state, JobState::Done);
    assert_eq!(server.engine.status().mode, crate::engine::Mode::Serve);
    server.leave().await;
}

#[tokio::test]
async fn what_is_asked_wrongly_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(Setup { max_tokens: 399, ..setup(dir.path()) });
    let check = |edit: fn(&mut TuneConfig)| kind(server.jobs.check(&config(edit), BACKGROUND));
    let (invalid, unmet) = (ErrorKind::InvalidArgument, ErrorKind::FailedPrecondition);
    let (found, message) = check(|config| config.routing.estimator = "none".into());
    assert!(found == invalid && message.starts_with("routing.estimator"), "{message}");
    let (found, message) = check(|config| config.run.max_memory_bytes = Some(1));
    assert!(found == unmet && message.contains("0 MiB are allowed"), "{message}");
    assert_eq!(kind(server.jobs.check(&config(|_| {}), Share::Background { duty: 0.0 })).0, invalid);
    let many = kind(server.jobs.start(config(|_| {}), BACKGROUND, corpus(), who()).await);
    assert_eq!(many, (ErrorKind::OutOfRange, "data: 400 tokens are more than the 399 that this server takes".into()));
    assert_eq!(fs::read_dir(dir.path().join("tuning/jobs")).unwrap().count(), 0, "nothing is left of it");
    let nobody = JobId(9);
    for (found, message) in [
        kind(server.jobs.get(nobody)),
        kind(server.jobs.watch(nobody, 0)),
        kind(server.jobs.pause(nobody, who()).await),
        kind(server.jobs.resume(nobody, None, who()).await),
        kind(server.jobs.stop(nobody, true, who()).await),
        kind(server.publish(nobody, true).await),
    ] {
        assert_eq!((found, message.as_str()), (ErrorKind::NotFound, "no job 't9': ListTunings has those that there are"));
    }
    assert_eq!(kind(server.jobs.files("config.data.paths", &["a".into()])).0, unmet);
    server.leave().await;
}
