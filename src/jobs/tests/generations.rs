//! Candidates come into force, and are taken back.

use std::{collections::BTreeMap, fs};

use super::*;
use crate::{checkpoint::Delta, tune::select::Target};

#[tokio::test]
async fn a_candidate_comes_into_force_and_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let (first, _) = server.say().await;
    let before = kind(server.rollback(None).await);
    assert_eq!(before, (ErrorKind::FailedPrecondition, "there is no generation before 1 to roll back to: name one".into()));
    let id = server.done(|config| config.optimizer.learning_rate = 0.5).await;
    let published = server.publish(id, false).await.unwrap();
    assert_eq!((published.generation, published.previous, published.verdicts.is_empty()), (2, 1, false));
    let (second, by) = server.say().await;
    assert!(by == 2 && second != first, "a router that has gone far says something else: {first:?}");
    assert_eq!((server.jobs.get(id).unwrap().generation, server.jobs.previous()), (Some(2), Some(1)));
    let twice = kind(server.publish(id, true).await);
    assert_eq!(twice, (ErrorKind::FailedPrecondition, "job t1 was published as generation 2: roll back to that one".into()));
    assert_eq!(kind(server.rollback(Some(2)).await).1, "generation 2 is in force already");
    assert_eq!(kind(server.rollback(Some(3)).await).0, ErrorKind::NotFound);
    let back = server.rollback(None).await.unwrap();
    assert_eq!((back.generation, back.previous, server.say().await), (1, 2, (first.clone(), 1)));
    assert_eq!(server.rollback(Some(2)).await.unwrap().generation, 2);
    let records = server.jobs.generations();
    let told: Vec<_> = records.iter().map(|r| (r.number, r.parent, r.job, r.tensors, r.current, r.resident)).collect();
    assert_eq!(told, [(1, None, None, 0, false, true), (2, Some(1), Some(id), 2, true, true)]);
    assert!(records[1].figures.is_some() && records[1].bytes == 2 * 5 * 24 * 4 && records[0].requests == 2);
    for (what, count) in
        [("publishes_total{model=\"tiny\",outcome=\"published\"}", 1.0), ("rollbacks_total{model=\"tiny\",reason=\"asked\"}", 2.0)]
    {
        assert_eq!(series(&server.metrics, &format!("hardmax_{what}")), count);
    }
    server.leave().await;
    // A restart goes on with it.
    let server = serve(setup(dir.path()));
    assert_eq!((server.say().await, server.jobs.previous()), ((second, 2), Some(1)));
    server.leave().await;
    let audit = fs::read_to_string(dir.path().join("tuning/audit.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = audit.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let what: Vec<&str> = lines.iter().map(|line| line["what"].as_str().unwrap()).collect();
    assert_eq!(what, ["start", "job ended", "publish", "rollback", "rollback"]);
    assert_eq!((lines[2]["who"]["actor"].as_str(), lines[2]["about"]["generation"].as_u64()), (Some("test"), Some(2)));
}

#[tokio::test]
async fn gates_refuse_unless_they_are_overridden() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|config| config.gates.max_perplexity_ratio = 0.001).await;
    let (found, message) = kind(server.publish(id, false).await);
    assert!(
        found == ErrorKind::FailedPrecondition && message.starts_with("the candidate of job t1 is not better: perplexity is "),
        "{message}"
    );
    assert_eq!(server.engine.status().generation, 1);
    let seconds = Publish { override_gates: true, watch_seconds: Some(-1.0), ..publish(id) };
    assert_eq!(kind(server.jobs.publish(seconds).await).0, ErrorKind::InvalidArgument);
    let published = server.publish(id, true).await.unwrap();
    assert!(published.generation == 2 && published.verdicts.iter().any(|verdict| !verdict.passed));
    let of = |outcome: &str| series(&server.metrics, &format!("hardmax_publishes_total{{model=\"tiny\",outcome=\"{outcome}\"}}"));
    assert_eq!(["published", "refused", "overridden", "failed"].map(of), [0.0, 1.0, 1.0, 0.0]);
    server.leave().await;
}

#[tokio::test]
async fn a_publish_that_fails_leaves_a_gap_in_the_numbers_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    server.engine.shutdown();
    assert_eq!(kind(server.publish(id, true).await).0, ErrorKind::Unavailable);
    assert_eq!((server.jobs.generations().len(), server.jobs.get(id).unwrap().generation), (1, None));
    assert!(!dir.path().join("tuning/generations/2").exists());
    assert_eq!(series(&server.metrics, "hardmax_publishes_total{model=\"tiny\",outcome=\"failed\"}"), 1.0);
    server.leave().await;
    let server = serve(setup(dir.path()));
    assert_eq!(server.say().await.1, 1);
    assert_eq!(server.publish(id, false).await.unwrap().generation, 3);
    server.leave().await;
}

/// A candidate is measured under the routing that it is to be served under.
#[tokio::test]
async fn gates_of_another_routing_say_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|config| config.run.serving = Some("soft".into())).await;
    server.say().await;
    let (found, message) = kind(server.publish(id, false).await);
    let expected = "the candidate of job t1 was measured under soft, and top-1 is in force: tune for top-1, put soft in force, or override \
                    the gates";
    assert_eq!((found, message.as_str()), (ErrorKind::FailedPrecondition, expected));
    assert_eq!(server.publish(id, true).await.unwrap().generation, 2);
    let of = |outcome: &str| series(&server.metrics, &format!("hardmax_publishes_total{{model=\"tiny\",outcome=\"{outcome}\"}}"));
    assert_eq!(["published", "refused", "overridden"].map(of), [0.0, 1.0, 1.0]);
    server.leave().await;
}

/// A write that fails may have been done: what the disk may name is there.
#[tokio::test]
async fn a_generation_that_the_disk_may_name_stays() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    let inner = Arc::clone(&server.jobs.0);
    let prepared = inner.prepare(&server.jobs.get(id).unwrap(), None).unwrap();
    let path = |name: &str| dir.path().join("tuning").join(name);
    // No file takes the place of a folder.
    fs::rename(path("current.json"), path("aside.json")).unwrap();
    fs::create_dir(path("current.json")).unwrap();
    assert!(inner.switch(2, prepared.model, InFlight::Finish, Some(prepared.record)).await.is_err());
    assert_eq!((server.engine.status().generation, server.jobs.generations().len(), server.say().await.1), (1, 1, 1));
    assert!(inner.remove_pending().is_err() && path("generations/2/generation.json").exists());
    fs::remove_dir(path("current.json")).unwrap();
    fs::rename(path("aside.json"), path("current.json")).unwrap();
    assert_eq!(server.publish(id, true).await.unwrap().generation, 3);
    assert!(!path("generations/2").exists(), "now nothing names it");
    drop(inner);
    server.leave().await;
    let server = serve(setup(dir.path()));
    assert_eq!((server.say().await.1, server.jobs.generations().len()), (3, 2));
    server.leave().await;
}

/// A job over a generation leaves all that differs from the checkpoint, and only fits what it was begun on.
#[tokio::test]
async fn a_second_job_goes_on_from_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let layer = |layer: usize| move |config: &mut TuneConfig| config.target = Target::Named(vec![format!("layers.{layer}.router")]);
    let (first, other) = (server.done(layer(0)).await, server.done(layer(1)).await);
    server.publish(first, true).await.unwrap();
    let (found, message) = kind(server.publish(other, true).await);
    let expected = "job t2 was begun on generation 1, and 2 is in force: start another job, or roll back to 1";
    assert_eq!((found, message.as_str()), (ErrorKind::FailedPrecondition, expected));
    let third = server.done(layer(1)).await;
    assert_eq!((server.jobs.get(third).unwrap().base_generation, server.publish(third, true).await.unwrap().generation), (2, 3));
    let delta = |number: u64| Delta::read(&dir.path().join(format!("tuning/generations/{number}/delta.safetensors"))).unwrap();
    let values = |number: u64| -> BTreeMap<String, Vec<f32>> {
        let tensors = delta(number).tensors.into_iter();
        tensors.map(|(name, tensor)| (name, tensor.flatten_all().unwrap().to_vec1().unwrap())).collect()
    };
    let (second, third) = (values(2), values(3));
    assert_eq!(second.keys().collect::<Vec<_>>(), ["layers.0.router"]);
    assert_eq!(third.keys().collect::<Vec<_>>(), ["layers.0.router", "layers.1.router"]);
    assert_eq!(second["layers.0.router"], third["layers.0.router"]);
    // Steps of both jobs.
    assert_eq!(delta(3).routing.train.unwrap().steps, Some(12));
    // Each after the other.
    let (of_third, _) = server.say().await;
    assert_eq!((server.rollback(None).await.unwrap().generation, server.jobs.previous()), (2, Some(1)));
    assert_eq!((server.rollback(None).await.unwrap().generation, server.jobs.previous()), (1, None));
    server.rollback(Some(3)).await.unwrap();
    assert_eq!(server.say().await, (of_third, 3));
    server.leave().await;
}

/// Jobs, publications and rollbacks in turns, under requests that all end as what they began on.
#[tokio::test]
async fn fifty_times_other_weights() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(Setup { keep: 4, ..setup(dir.path()) });
    let short = |config: &mut TuneConfig| {
        (config.run.steps, config.run.windows, config.optimizer.learning_rate) = (1, 1, 0.5);
        (config.run.eval_every, config.run.heldout_share) = (9, 0.05);
    };
    let mut said = BTreeMap::new();
    let mut numbers = Vec::new();
    for round in 0..25 {
        let id = server.done(short).await;
        let published = server.publish(id, true).await.unwrap();
        numbers.push(published.generation);
        let (tokens, by) = server.say().await;
        assert_eq!(by, published.generation);
        assert!(said.insert(by, tokens).is_none(), "a number names one set of weights");
        // Every other one stays.
        if round % 2 == 0 {
            let back = server.rollback(None).await.unwrap().generation;
            let (tokens, by) = server.say().await;
            assert_eq!((by, said.get(&by).unwrap_or(&tokens)), (back, &tokens));
            said.entry(by).or_insert(tokens);
        }
    }
    assert_eq!(numbers, (2..27).collect::<Vec<u64>>());
    assert!(server.jobs.list().len() == 4 && server.jobs.generations().len() <= 7, "{:?}", server.jobs.generations());
    let count = |folder: &str| fs::read_dir(dir.path().join("tuning").join(folder)).unwrap().count();
    assert_eq!((count("jobs"), count("generations")), (4, server.jobs.generations().len() - 1));
    let current = server.engine.status().generation;
    let last = server.say().await;
    server.leave().await;
    let server = serve(Setup { keep: 4, ..setup(dir.path()) });
    assert_eq!((server.engine.status().generation, server.say().await), (current, last));
    server.leave().await;
}

/// The samples of its own traffic speak against it.
#[tokio::test]
async fn what_is_worse_in_use_is_taken_back() {
    let dir = tempfile::tempdir().unwrap();
    // As if hardly any gap were let pass.
    let guard = GuardConfig { watch: PATIENCE, max_gap_ratio: 1e-9, max_error_rate: 0.05 };
    let server = serve(Setup { guard, ..setup(dir.path()) });
    let id = server.done(|_| {}).await;
    server.publish(id, true).await.unwrap();
    patiently(async {
        while server.engine.status().generation == 2 {
            server.say().await;
        }
    })
    .await;
    assert_eq!((server.engine.status().generation, server.say().await.1), (1, 1));
    // The metric comes after the switch.
    let line = "hardmax_rollbacks_total{model=\"tiny\",reason=\"gap\"}";
    patiently(async {
        while series(&server.metrics, line) == 0.0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(series(&server.metrics, line), 1.0);
    server.leave().await;
    let audit = fs::read_to_string(dir.path().join("tuning/audit.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(audit.lines().last().unwrap()).unwrap();
    assert_eq!((last["what"].as_str(), last["who"]["actor"].as_str()), (Some("rollback"), Some("guard")));
    assert!(last["about"]["why"]["gap"]["found"].as_f64().unwrap() > 0.0);
}

/// A restart ends no watch; but who asks for a generation has it, whatever came of it before.
#[tokio::test]
async fn a_watch_outlives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let guard = GuardConfig { watch: PATIENCE, max_gap_ratio: 1e-9, max_error_rate: 0.05 };
    let server = serve(Setup { guard, ..setup(dir.path()) });
    let id = server.done(|_| {}).await;
    server.publish(id, true).await.unwrap();
    server.leave().await;
    let server = serve(Setup { guard, ..setup(dir.path()) });
    assert_eq!(server.engine.status().generation, 2);
    patiently(async {
        while server.engine.status().generation == 2 {
            server.say().await;
        }
    })
    .await;
    let file = dir.path().join("tuning/generations/2/guard.json");
    assert!(file.exists());
    assert_eq!(server.rollback(Some(2)).await.unwrap().generation, 2);
    assert!(!file.exists());
    server.leave().await;
}

/// One name is taken once, by one of those who want it at once; other names are nobody else's.
#[tokio::test]
async fn exports_at_once_do_not_meet() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    server.publish(id, true).await.unwrap();
    let names = ["a.v1", "a.v2", "same", "same", "same", "same"];
    let exports: Vec<_> = names
        .into_iter()
        .enumerate()
        .map(|(index, name)| {
            let (jobs, form) = (server.jobs.clone(), if index % 2 == 0 { Export::Delta } else { Export::Checkpoint });
            tokio::spawn(async move { jobs.export(2, form, name, who()).await })
        })
        .collect();
    let mut written = Vec::new();
    for export in exports {
        match patiently(export).await.unwrap() {
            Ok(exported) => written.push(exported.path.file_name().unwrap().to_str().unwrap().to_owned()),
            Err(error) => assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error}"),
        }
    }
    assert_eq!(written, ["a.v1", "a.v2", "same"]);
    assert_eq!(fs::read_dir(dir.path().join("tuning/exports")).unwrap().count(), 3, "no part of one is left");
    server.leave().await;
}

#[tokio::test]
async fn a_generation_can_be_taken_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    server.publish(id, true).await.unwrap();
    let delta = patiently(server.jobs.export(2, Export::Delta, "two.safetensors", who())).await.unwrap();
    assert_eq!(fs::read(&delta.path).unwrap(), fs::read(dir.path().join("tuning/generations/2/delta.safetensors")).unwrap());
    let whole = patiently(server.jobs.export(2, Export::Checkpoint, "two", who())).await.unwrap();
    let (checkpoint, model) = load_to_serve(&whole.path, Default::default(), false).unwrap();
    assert!(checkpoint.routing().is_some() && whole.bytes > delta.bytes);
    let tensors = Delta::read(&delta.path).unwrap().tensors;
    let exported: BTreeMap<String, candle_core::Tensor> =
        model.weights().unwrap().named().into_iter().map(|(n, t)| (n, t.clone())).collect();
    for (name, tensor) in &tensors {
        let values = |tensor: &candle_core::Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(tensor), values(&exported[name]), "{name}");
    }
    let export = async |generation, name: &str| kind(server.jobs.export(generation, Export::Delta, name, who()).await).0;
    for name in ["", ".", "..", "../x", "a/b", "a\\b", "-x", "ä", "a\0"] {
        assert_eq!(export(2, name).await, ErrorKind::InvalidArgument, "{name}");
    }
    assert_eq!((export(2, "two").await, export(1, "one").await), (ErrorKind::FailedPrecondition, ErrorKind::FailedPrecondition));
    assert_eq!(export(3, "three").await, ErrorKind::NotFound);
    server.leave().await;
}
