//! One cell, start to end, in this process: `hardmax compare --cell`.

use std::{fs, path::Path, time::Instant};

use super::{
    files, gradient, lm,
    results::{CellRecord, Outcome},
    spec::{CellSpec, TaskName},
    task,
    teacher::Teacher,
    training::Training,
};
use crate::error::Result;

/// Exit status of a cell that could not write its files: `EX_IOERR` of sysexits.h.
pub const UNWRITABLE: u8 = 74;

/// Runs a cell and writes its file into `cells`, and the weights of a teacher. A cell that cannot run leaves a file that
/// says so; only files that cannot be written are errors here.
pub fn run(spec: &CellSpec, cells: &Path) -> Result<Outcome> {
    let outcome = match measure(spec, cells) {
        Err(error) if files::is_full(&error) => return Err(error),
        measured => measured.unwrap_or_else(|error| Outcome::Failed(error.to_string())),
    };
    let record = CellRecord { spec: spec.clone(), outcome };
    files::write_json(&spec.file(cells)?, &record)?;
    Ok(record.outcome)
}

/// What an earlier run left of this cell, if it is of this very specification and did not fail.
pub fn finished(spec: &CellSpec, cells: &Path) -> Result<Option<Outcome>> {
    let Ok(text) = fs::read(spec.file(cells)?) else { return Ok(None) };
    let usable = |record: &CellRecord| record.spec == *spec && !matches!(record.outcome, Outcome::Failed(_));
    Ok(serde_json::from_slice::<CellRecord>(&text).ok().filter(usable).map(|record| record.outcome))
}

fn measure(spec: &CellSpec, cells: &Path) -> Result<Outcome> {
    let started = Instant::now();
    let mut result = match spec.task {
        TaskName::Gradient => return gradient::run(spec).map(Outcome::Gradient),
        TaskName::Text => lm::run(spec, cells)?,
        TaskName::Equal | TaskName::Unequal | TaskName::Collapsed | TaskName::Digits | TaskName::Rates => {
            let task = task::open(spec.task, spec.seed, spec.size)?;
            let (result, net) = Training::new(spec, &*task, cells)?.run()?;
            if spec.is_teacher() {
                Teacher::write(&net, &spec.weights(cells)?)?;
            }
            result
        }
    };
    result.seconds = started.elapsed().as_secs_f64();
    Ok(Outcome::Trained(Box::new(result)))
}
