//! Foreign work on the engine's machine: beside it no step runs, requests feel no more of it than they were told, and it cannot harm them.

use std::{
    sync::{Mutex, mpsc},
    thread,
};

use super::{
    cache::{nothing_is_left, sums},
    *,
};

/// A thread that takes turns until the engine stops; how many it had.
fn worker(turns: Turns, work: impl Fn() + Send + 'static) -> thread::JoinHandle<u64> {
    thread::spawn(move || {
        let mut had = 0;
        while turns.run(&work).is_ok() {
            had += 1;
        }
        had
    })
}

#[tokio::test]
async fn no_step_runs_in_a_turn_and_no_turn_in_a_step() {
    let busy = Arc::new(Mutex::new(()));
    let (in_steps, in_turns) = (busy.clone(), busy.clone());
    let metrics = metrics();
    let model = FakeModel::new(move |history| {
        let _alone = in_steps.try_lock().expect("a turn runs beside a step");
        fake::one_hot(history.iter().sum::<u32>() % 256)
    });
    let engine = start_with(model, fake::config(), metrics.clone());
    let turn = move || drop(in_turns.try_lock().expect("a step or another turn runs beside a turn"));
    let workers = [worker(engine.turns(), turn.clone()), worker(engine.turns(), turn)];
    for share in [None, Some(Share::Background { duty: 0.5 }), Some(Share::Background { duty: 0.1 })] {
        engine.set_share(share).unwrap();
        for n in 0..20 {
            let streams: Vec<EventStream> = (0..4).map(|i| engine.submit(tokens(&[n, i], 9)).unwrap()).collect();
            for (stream, i) in streams.into_iter().zip(0..) {
                assert_eq!(collect(stream).await.ids, sums(&[n, i], 9));
            }
        }
    }
    nothing_is_left(&engine, &metrics).await;
    engine.shutdown();
    let had: u64 = workers.into_iter().map(|worker| worker.join().unwrap()).sum();
    assert!(had > 0, "{had} turns");
}

/// Beside requests a turn is given only where a share of the time pays for it; where nobody can go on, always.
#[tokio::test]
async fn a_turn_beside_requests_needs_a_share() {
    let (model, control) = FakeModel::sum().gated();
    let engine = start(model, fake::config());
    let counter = Arc::new(AtomicU32::new(0));
    let counted = counter.clone();
    let worker = worker(engine.turns(), move || {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let had = || counter.load(Ordering::SeqCst);
    let until = |turns: u32| {
        while had() < turns {
            thread::yield_now();
        }
    };
    until(3);
    let stream = engine.submit(tokens(&[1], 32)).unwrap();
    control.step();
    let before = had();
    for _ in 0..4 {
        control.decide(Verdict::Go);
        control.step();
    }
    assert_eq!(had(), before, "nothing of the time of requests");
    engine.set_share(Some(Share::Background { duty: 0.9 })).unwrap();
    // Steps pay for it; the test itself takes its time between two of them.
    while had() == before {
        control.decide(Verdict::Go);
        control.step();
    }
    drop(control);
    assert_eq!(collect(stream).await.ids, sums(&[1], 32));
    until(had() + 10);
    engine.drain();
    worker.join().unwrap();
}

#[tokio::test]
async fn with_all_of_the_machine_new_requests_are_refused_and_old_ones_end_first() {
    let metrics = metrics();
    let (model, control) = FakeModel::sum().gated();
    let engine = start_with(model, fake::config(), metrics.clone());
    let inside = engine.submit(tokens(&[1], 4)).unwrap();
    control.step();
    assert_eq!(engine.status().mode, Mode::Serve);
    engine.set_share(Some(Share::Exclusive)).unwrap();
    assert_eq!(engine.status().mode, Mode::TuneExclusive);
    assert_eq!(series(&metrics, "hardmax_mode{model=\"fake\",mode=\"tune_exclusive\"}"), 1.0);
    let refused = engine.submit(tokens(&[2], 1)).unwrap_err();
    assert!(matches!(refused, Error::Tuning) && refused.kind() == ErrorKind::Unavailable);
    assert_eq!(series(&metrics, "hardmax_admission_rejections_total{reason=\"tuning\"}"), 1.0);

    let (watching, turns) = (engine.clone(), engine.turns());
    let turn = thread::spawn(move || turns.run(|| watching.status().running).unwrap());
    drop(control);
    assert_eq!(collect(inside).await.ids, sums(&[1], 4));
    assert_eq!(turn.join().unwrap(), 0, "it comes last");

    for (share, mode) in [(Some(Share::Background { duty: 0.25 }), Mode::Tune), (None, Mode::Serve)] {
        engine.set_share(share).unwrap();
        assert_eq!(engine.status().mode, mode);
        assert_eq!(ask(&engine, tokens(&[2], 2)).await.ids, sums(&[2], 2));
    }
    let error = engine.set_share(Some(Share::Background { duty: 1.0 })).unwrap_err();
    assert_eq!((error.kind(), engine.status().mode), (ErrorKind::InvalidArgument, Mode::Serve));
    nothing_is_left(&engine, &metrics).await;
}

/// Work that panics ends its turn and nothing else.
#[tokio::test]
async fn a_panic_in_a_turn_is_its_own() {
    let metrics = metrics();
    let engine = start_with(FakeModel::sum(), fake::config(), metrics.clone());
    let turns = engine.turns();
    let panicked = thread::spawn(move || turns.run(|| panic!("as the test wished"))).join();
    assert!(panicked.is_err());
    assert_eq!(ask(&engine, tokens(&[1, 2], 3)).await.ids, sums(&[1, 2], 3));
    assert_eq!(engine.turns().run(|| 5).unwrap(), 5);
    nothing_is_left(&engine, &metrics).await;
}

/// Whoever waits for a turn, or asks for one, when the engine stops is told so.
#[expect(clippy::disallowed_methods, reason = "a test sends a handful of messages")]
#[tokio::test]
async fn no_turn_is_given_while_the_server_stops() {
    let (engine, control, inside) = occupied(fake::config());
    let waiting = worker(engine.turns(), || ());
    engine.drain();
    control.decide(Verdict::Go);
    drop(control);
    assert_eq!(collect(inside).await.ids.len(), 8);
    tokio::time::timeout(PATIENCE, engine.drained()).await.unwrap();
    waiting.join().unwrap();
    assert!(matches!(engine.turns().run(|| ()), Err(Error::Draining)));

    // A shutdown waits for the turn that is under way.
    let engine = start(FakeModel::sum(), fake::config());
    let ((began, begins), (go, gate)) = (mpsc::channel(), mpsc::channel::<()>());
    let turns = engine.turns();
    let turn = thread::spawn(move || {
        turns.run(|| {
            began.send(()).unwrap();
            gate.recv_timeout(PATIENCE).unwrap();
        })
    });
    begins.recv_timeout(PATIENCE).unwrap();
    let closing = engine.clone();
    let shutdown = thread::spawn(move || closing.shutdown());
    while !engine.status().draining {
        thread::yield_now();
    }
    assert!(engine.status().alive);
    go.send(()).unwrap();
    shutdown.join().unwrap();
    assert!(turn.join().unwrap().is_ok() && !engine.status().alive);
    assert!(matches!(engine.turns().run(|| ()), Err(Error::Draining)));
    assert!(matches!(engine.set_share(None), Err(Error::Draining)));
}
