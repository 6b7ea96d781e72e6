//! One cell, start to end, in this process: `hardmax compare --cell`.

use std::{fs, path::Path, time::Instant};

use super::{
    gradient, lm,
    results::{By, CellRecord, Outcome},
    spec::{CellSpec, LAB_VERSION, TaskName},
    task,
    teacher::Teacher,
    training::Training,
};
use crate::{
    durable,
    error::{Error, Result},
};

/// Exit status of a cell that could not write its files: `EX_IOERR` of sysexits.h.
pub const UNWRITABLE: u8 = 74;

/// Runs a cell and writes its file into `cells`, and the weights of a teacher. A cell that cannot run leaves a file that
/// says so.
///
/// # Errors
/// Files that cannot be written; [`Error::InvalidArgument`] on a cell of another version of the laboratory, whose figures
/// this program cannot measure.
pub fn run(spec: &CellSpec, cells: &Path) -> Result<Outcome> {
    if spec.lab != LAB_VERSION {
        return Err(Error::invalid("--cell", format!("is of laboratory {}, and this program is laboratory {LAB_VERSION}", spec.lab)));
    }
    let outcome = match measure(spec, cells) {
        Err(error) if durable::is_full(&error) => return Err(error),
        measured => measured.unwrap_or_else(|error| Outcome::Failed(error.to_string())),
    };
    let mut record = CellRecord::new(spec.clone(), By::this(), outcome);
    if spec.is_teacher() && !matches!(record.outcome, Outcome::Failed(_)) {
        record.weights = Some(durable::sha256(&spec.weights(cells)?)?);
    }
    durable::write_json(&spec.file(cells)?, &record)?;
    Ok(record.outcome)
}

/// What an earlier run left of this cell, if it is of this very specification and did not fail, and, of a teacher, if its
/// weights are there as they were written: those who start from them would be another's students.
pub fn finished(spec: &CellSpec, cells: &Path) -> Result<Option<CellRecord>> {
    let Ok(text) = fs::read(spec.file(cells)?) else { return Ok(None) };
    let Ok(record) = serde_json::from_slice::<CellRecord>(&text) else { return Ok(None) };
    let usable = record.spec == *spec && !matches!(record.outcome, Outcome::Failed(_));
    let whole = !spec.is_teacher() || (record.weights.is_some() && durable::sha256(&spec.weights(cells)?).ok() == record.weights);
    Ok((usable && whole).then_some(record))
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
