//! Checked settings of an estimator, and their values at a step.

use crate::schedule::Schedule;

/// A checked setting.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Setting {
    Number(Schedule),
    Word(&'static str),
    Flag(bool),
}

/// Settings of a catalogue row at one step of a run. Every parameter of the row is there.
#[derive(Clone, Copy, Debug)]
pub(in crate::moe::estimator) struct Values<'a> {
    /// Experts per token; 1 where the row has no k.
    pub(super) k: usize,
    pub(super) settings: &'a [(&'static str, Setting)],
    pub(super) step: usize,
    /// Length of the run.
    pub(super) steps: usize,
}

impl Values<'_> {
    fn get(&self, name: &str) -> Setting {
        let found = self.settings.iter().find(|(known, _)| *known == name);
        found.map(|(_, setting)| *setting).expect("a row builds from its own parameters only (this is a bug in hardmax)")
    }

    pub(super) fn number(&self, name: &str) -> f64 {
        match self.get(name) {
            Setting::Number(schedule) => schedule.at(self.step, self.steps),
            Setting::Word(_) | Setting::Flag(_) => unreachable!("{name} is a number in the catalogue (this is a bug in hardmax)"),
        }
    }

    pub(super) fn word(&self, name: &str) -> &'static str {
        match self.get(name) {
            Setting::Word(word) => word,
            Setting::Number(_) | Setting::Flag(_) => unreachable!("{name} is a word in the catalogue (this is a bug in hardmax)"),
        }
    }

    pub(super) fn flag(&self, name: &str) -> bool {
        self.get(name) == Setting::Flag(true)
    }
}
