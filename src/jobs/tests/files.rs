//! What a folder may look like when a server opens it.

use std::fs;

use super::*;

fn path(dir: &Path, name: &str) -> PathBuf {
    dir.join("tuning").join(name)
}

#[tokio::test]
async fn a_folder_has_one_server_and_one_base() {
    let dir = tempfile::tempdir().unwrap();
    let first = registry(setup(dir.path())).unwrap();
    assert_eq!(first.current().0, 1);
    let (found, message) = kind(registry(setup(dir.path())));
    assert!(found == ErrorKind::FailedPrecondition && message.ends_with("or choose another one with --tuning-dir"), "{message}");
    drop(first);
    let base = fs::read_to_string(path(dir.path(), "base.json")).unwrap();
    let digest = registry(setup(dir.path())).unwrap().shelf.digest;
    fs::write(path(dir.path(), "base.json"), base.replace(&digest, "another")).unwrap();
    let (found, message) = kind(registry(setup(dir.path())));
    assert!(found == ErrorKind::FailedPrecondition && message.contains("(digest another)") && message.contains(&digest), "{message}");
    let missing = Setup { data: vec![dir.path().join("none")], ..setup(&dir.path().join("other")) };
    assert!(kind(registry(missing)).1.starts_with("--tuning-data: "));
}

#[tokio::test]
async fn a_damaged_job_is_passed_over_and_a_killed_start_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let (first, second) = (server.done(|_| {}).await, server.done(|_| {}).await);
    server.leave().await;
    let json = path(dir.path(), "jobs/t1/job.json");
    let whole = fs::read(&json).unwrap();
    for damaged in [&whole[..whole.len() / 2], b"", b"{}"] {
        fs::write(&json, damaged).unwrap();
        let server = serve(setup(dir.path()));
        assert_eq!(kind(server.jobs.get(first)).0, ErrorKind::NotFound);
        assert_eq!(server.jobs.get(second).unwrap().state, JobState::Done);
        server.leave().await;
    }
    assert!(json.exists(), "it may be of use to somebody");
    fs::create_dir(path(dir.path(), "jobs/t7")).unwrap();
    fs::write(path(dir.path(), "jobs/t7/tokens.bin"), "half").unwrap();
    let server = serve(setup(dir.path()));
    assert!(!path(dir.path(), "jobs/t7").exists());
    assert_eq!(server.start(|config| config.run.steps = 1).await.to_string(), "t3");
    server.leave().await;
}

#[tokio::test]
async fn a_history_that_is_cut_anywhere_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    server.leave().await;
    let file = path(dir.path(), "jobs/t1/progress.jsonl");
    let whole = fs::read(&file).unwrap();
    let server = serve(setup(dir.path()));
    let all = server.all_of(id).await.len();
    server.leave().await;
    for cut in [whole.len() - 10, whole.len() / 2, 1, 0] {
        fs::write(&file, &whole[..cut]).unwrap();
        let server = serve(setup(dir.path()));
        let entries = server.all_of(id).await;
        assert!(entries.len() < all || cut > whole.len() / 2);
        assert!(matches!(entries.last().unwrap().what, What::Job(_)));
        server.leave().await;
    }
}

#[tokio::test]
async fn numbers_are_not_given_out_twice_whatever_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    server.publish(id, true).await.unwrap();
    server.leave().await;
    let file = path(dir.path(), "current.json");
    let whole = fs::read_to_string(&file).unwrap();
    for damaged in [Some("{"), Some(""), None] {
        match damaged {
            Some(text) => fs::write(&file, text).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
        let (found, message) = kind(registry(setup(dir.path())));
        assert!(found == ErrorKind::FailedPrecondition && message.contains("current.json") && message.contains("\"next\":3"), "{message}");
        // What it says is right.
        let (_, begin) = message.split_once("as it is, write ").unwrap();
        fs::write(&file, begin.strip_suffix(" to it").unwrap()).unwrap();
        assert_eq!(registry(setup(dir.path())).unwrap().current().0, 1);
    }
    fs::write(&file, &whole).unwrap();
    assert_eq!(registry(setup(dir.path())).unwrap().current().0, 2);
    // The generation in force must be whole.
    let delta = path(dir.path(), "generations/2/delta.safetensors");
    let mut bytes = fs::read(&delta).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&delta, bytes).unwrap();
    let (found, message) = kind(registry(setup(dir.path())));
    assert!(found == ErrorKind::FailedPrecondition && message.contains("damaged"), "{message}");
    fs::remove_file(path(dir.path(), "generations/2/generation.json")).unwrap();
    assert!(kind(registry(setup(dir.path()))).1.contains("2 is in force"));
}

/// A server that is killed between any two of the files that a publish writes.
#[tokio::test]
async fn a_publish_that_was_killed_has_happened_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let server = serve(setup(dir.path()));
    let id = server.done(|_| {}).await;
    let before = fs::read_to_string(path(dir.path(), "current.json")).unwrap();
    server.publish(id, true).await.unwrap();
    server.leave().await;
    let after = fs::read_to_string(path(dir.path(), "current.json")).unwrap();
    let job = path(dir.path(), "jobs/t1/job.json");
    let published = fs::read_to_string(&job).unwrap();
    fs::write(&job, published.replace("\"generation\":2", "\"generation\":null")).unwrap();
    // After current.json: the generation is in force, and the job's.
    let server = serve(setup(dir.path()));
    assert_eq!((server.say().await.1, server.jobs.get(id).unwrap().generation), (2, Some(2)));
    server.leave().await;
    // Before: all of the generation is there, but it is not in force; or half of it.
    let reserved = before.replace("\"next\":2", "\"next\":3").replace("\"pending\":null", "\"pending\":2");
    assert_ne!(before, reserved);
    for whole in [true, false] {
        fs::write(path(dir.path(), "current.json"), &reserved).unwrap();
        if !whole {
            fs::create_dir(path(dir.path(), "generations/2")).unwrap();
            fs::write(path(dir.path(), "generations/2/delta.safetensors"), "half").unwrap();
        }
        let server = serve(setup(dir.path()));
        assert_eq!((server.say().await.1, server.jobs.generations().len(), server.jobs.get(id).unwrap().generation), (1, 1, None));
        assert!(!path(dir.path(), "generations/2").exists());
        if !whole {
            assert_eq!(server.publish(id, true).await.unwrap().generation, 3, "2 may have been seen by somebody");
        }
        server.leave().await;
    }
    assert_ne!(fs::read_to_string(path(dir.path(), "current.json")).unwrap(), after);
}
