//! Foreign work on the engine's machine, in turns: somebody else's thread computes while the engine's thread waits.
//!
//! Who trains has the same cores and the same pools of threads as who serves. Side by side they would slow each other down by nobody knows
//! how much; so the engine's thread gives the machine away, for one piece of work at a time, after one of its own steps. While requests run,
//! that is as often as their share of the time pays for it, and a request waits for one piece at most. While none does, pieces follow one
//! another.
//!
//! On a GPU both threads launch on one stream, whose order is that of the launches: the work of a turn comes after what the engine has
//! launched and before what it launches next. That the engine launches and records nothing in between is what a turn is there for.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        mpsc::{self, Receiver, SyncSender},
    },
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    background::Load,
    status::{Mode, Shared},
    worker::Command,
};
use crate::{
    error::{Error, Result},
    fidelity::pacing::Credit,
};

/// What is earned beside requests is saved for so long: pieces do not follow one another for longer than their share of it.
const SAVED: Duration = Duration::from_secs(1);

/// How much of the machine turns may have.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Share {
    /// All of it: new requests are refused, those inside end first.
    Exclusive,
    /// What requests leave, and some of their time.
    Background {
        /// Share of the time while requests run, above 0 and below 1.
        duty: f64,
    },
}

/// Asks the engine for turns; clones ask the same engine.
#[derive(Clone, Debug)]
pub struct Turns {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

/// One that waits for its turn.
#[derive(Debug)]
pub(super) struct TurnRequest {
    granted: SyncSender<()>,
    /// Closed when its work is done, or has panicked.
    over: Receiver<()>,
}

/// Who waits, and what may be given to them.
#[derive(Debug)]
pub(super) struct Lane {
    waiting: VecDeque<TurnRequest>,
    credit: Credit,
    /// How long a turn is thought to take.
    cost: Duration,
    shared: Arc<Shared>,
}

// === impl Share ===

impl Share {
    /// Fails with `InvalidArgument` on `share.duty_cycle`.
    pub fn check(self) -> Result<()> {
        match self {
            Self::Background { duty } if !(duty > 0.0 && duty < 1.0) => Err(Error::invalid(
                "share.duty_cycle",
                format!("{duty} is not above 0 and below 1; for all of the machine ask for exclusive"),
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn mode(share: Option<Self>) -> Mode {
        match share {
            None => Mode::Serve,
            Some(Self::Background { .. }) => Mode::Tune,
            Some(Self::Exclusive) => Mode::TuneExclusive,
        }
    }

    /// Of the time of turns over that of requests. With all of the machine nothing runs beside them: they end first.
    fn credit(share: Option<Self>) -> Credit {
        let rate = match share {
            Some(Self::Background { duty }) => duty / (1.0 - duty),
            Some(Self::Exclusive) | None => 0.0,
        };
        Credit::saving(rate, SAVED)
    }
}

// === impl Turns ===

impl Turns {
    pub(super) fn new(commands: mpsc::Sender<Command>, shared: Arc<Shared>) -> Self {
        Self { commands, shared }
    }

    /// Waits for a turn and does `work` in it, on the calling thread, while the engine does nothing.
    ///
    /// Work should be short, because requests wait for it; and it must not wait for anything itself, least of all for the engine. Where it
    /// panics, the turn ends. Fails with `Draining` once the engine drains.
    pub fn run<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let (granted, grant) = mpsc::sync_channel(1);
        let (working, over) = mpsc::sync_channel(1);
        let stopped = || self.shared.why_stopped();
        self.commands.send(Command::Turn(TurnRequest { granted, over })).map_err(|_| stopped())?;
        grant.recv().map_err(|_| stopped())?;
        let done = work();
        drop(working);
        Ok(done)
    }
}

// === impl Lane ===

impl Lane {
    /// Nobody waits, and there is nothing of the time of requests.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { waiting: VecDeque::new(), credit: Share::credit(None), cost: Duration::ZERO, shared }
    }

    pub(super) fn set_share(&mut self, share: Option<Share>) {
        self.credit = Share::credit(share);
    }

    pub(super) fn push(&mut self, request: TurnRequest) {
        self.waiting.push_back(request);
    }

    /// Refuses those that wait.
    pub(super) fn clear(&mut self) {
        self.waiting.clear();
    }

    /// Gives a turn to the one that has waited longest, if it may run now. Whether another one could follow at once.
    pub(super) fn turn(&mut self, load: Load) -> bool {
        if !self.waiting.is_empty() && self.shared.status.borrow().draining {
            self.clear();
        }
        if let Some(request) = self.next(load)
            && request.granted.send(()).is_ok()
        {
            let begun = Instant::now();
            // Nothing is ever sent: an error says that it is over.
            let _ = request.over.recv();
            self.ran(load, begun.elapsed());
        }
        load == Load::Idle && !self.waiting.is_empty()
    }

    fn next(&mut self, load: Load) -> Option<TurnRequest> {
        let may_run = match load {
            Load::Idle => true,
            Load::Busy(worked) => {
                self.credit.earn(worked, self.cost);
                self.credit.affords(self.cost)
            }
        };
        if may_run { self.waiting.pop_front() } else { None }
    }

    /// A turn took so long.
    fn ran(&mut self, load: Load, took: Duration) {
        // Half of what was known: one that took long for other reasons does not keep the next ones away.
        self.cost = if self.cost.is_zero() { took } else { (self.cost + took) / 2 };
        if load != Load::Idle {
            self.credit.spend(took);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::metrics, *};

    fn lane(share: Option<Share>) -> Lane {
        let mut lane = Lane::new(Arc::new(Shared::new(1, metrics())));
        lane.set_share(share);
        lane
    }

    fn request() -> TurnRequest {
        TurnRequest { granted: mpsc::sync_channel(1).0, over: mpsc::sync_channel(1).1 }
    }

    fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Share of the time that turns of `piece` got beside steps of `step`, somebody always waiting.
    fn duty(share: Option<Share>, step: Duration, piece: impl Fn(u64) -> Duration) -> f64 {
        let mut lane = lane(share);
        let (mut worked, mut spent) = (Duration::ZERO, Duration::ZERO);
        lane.push(request());
        for n in 0..100_000 {
            worked += step;
            if lane.next(Load::Busy(step)).is_some() {
                let took = piece(n);
                lane.ran(Load::Busy(step), took);
                spent += took;
                lane.push(request());
            }
        }
        spent.as_secs_f64() / (spent + worked).as_secs_f64()
    }

    #[test]
    fn turns_get_their_duty_of_the_time_and_no_more() {
        for share in [0.05, 0.25, 0.5, 0.9] {
            for (step, piece) in [(3, 90), (30, 90), (200, 20)] {
                let found = duty(Some(Share::Background { duty: share }), ms(step), |n| ms(piece / 2 + n * 7 % piece));
                // One piece after each step is the most.
                let most = piece as f64 / (piece + step) as f64;
                let expected = share.min(most);
                assert!((found - expected).abs() < 0.02, "{share} with steps of {step} ms and pieces of {piece} ms: {found}");
            }
        }
    }

    #[test]
    fn beside_requests_nothing_runs_without_a_share() {
        for share in [None, Some(Share::Exclusive)] {
            assert_eq!(duty(share, ms(10), |_| ms(1)), 0.0);
            let mut lane = lane(share);
            lane.push(request());
            assert!(lane.next(Load::Idle).is_some(), "all of the time that nobody else has");
        }
    }

    #[test]
    fn a_pause_does_not_pay_for_a_long_row_of_turns() {
        let mut lane = lane(Some(Share::Background { duty: 0.5 }));
        for _ in 0..1000 {
            assert!(lane.next(Load::Busy(ms(1000))).is_none(), "nobody waits");
        }
        let mut row = 0;
        (0..100).for_each(|_| lane.push(request()));
        while lane.next(Load::Busy(Duration::ZERO)).is_some() {
            lane.ran(Load::Busy(Duration::ZERO), ms(90));
            row += 1;
        }
        assert_eq!(row, 11, "a second of them");
    }

    #[test]
    fn a_share_is_checked() {
        for duty in [0.0, 1.0, -0.5, 1.5, f64::NAN, f64::INFINITY] {
            let error = Share::Background { duty }.check().unwrap_err();
            assert!(matches!(&error, Error::InvalidArgument { field, .. } if field == "share.duty_cycle"), "{error}");
        }
        assert!(Share::Background { duty: 0.25 }.check().is_ok() && Share::Exclusive.check().is_ok());
    }
}
