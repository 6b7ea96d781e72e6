//! The laboratory: every estimator on small tasks with a known answer, side by side.
//!
//! A run is planned as cells ([`spec::CellSpec`]): one arm on one task with one seed. Every cell is a process of its own
//! and leaves one file; what is there already is not run again. From the cells come `results.json`, pictures and the report.
//!
//! | module | what it is for |
//! |---|---|
//! | [`spec`], [`arm`] | what one cell is: task, mode, budget, seed, size; estimator, losses, controls |
//! | [`arms`], [`plan()`], [`list`] | the built-in arms; all cells of a run; both in words |
//! | [`run`], [`process`] | a process for every cell, and the folder |
//! | [`cell`], [`clock`], [`cost`] | that process; its CPU time and memory; what it is charged |
//! | [`task`], [`data`] | rows with regions, their optimal routing, the loss; the files they are from |
//! | [`net`], [`expert`], [`step`], [`adam`], [`training`], [`teacher`] | the small net, f64, gradients by hand |
//! | [`record`], [`evaluate`], [`metric`], [`probe`], [`gradient`] | what is noted down and measured |
//! | [`lm`] | language-model cells, on the decoder that is served |
//! | [`results`], [`table`], [`quality`], [`rates`], [`plots`], [`report`] | what is left behind, and shown |

pub mod adam;
pub mod arm;
pub mod arms;
pub mod cell;
pub mod clock;
pub mod cost;
pub mod data;
pub mod evaluate;
pub mod expert;
pub mod gradient;
pub mod list;
pub mod lm;
pub mod metric;
pub mod net;
pub mod plan;
pub mod plots;
pub mod probe;
pub mod process;
pub mod quality;
pub mod random;
pub mod rates;
pub mod record;
pub mod report;
pub mod results;
pub mod run;
pub mod spec;
pub mod step;
pub mod table;
pub mod task;
pub mod teacher;
#[cfg(test)]
mod tests;
pub mod training;

use std::fs;

use self::{
    plan::{Request, plan},
    results::Results,
    run::Run,
};
use crate::{
    durable,
    error::{Error, Result},
};

/// Plans, runs what is missing, and writes results, pictures and report.
///
/// # Errors
/// What is asked wrongly, before a folder is made; files that cannot be written. Failed cells are results.
pub fn compare(request: &Request, run: &Run) -> Result<Results> {
    run.check()?;
    let cells = plan(request)?;
    let _lock = run.lock()?;
    let results = run.run(&cells)?;
    durable::write_json(&run.folder.results(), &results)?;
    let plots = run.folder.plots();
    fs::create_dir_all(&plots).map_err(|error| Error::io(&plots, error))?;
    let pictures = plots::draw(&results, &plots)?;
    durable::write(&run.folder.report(), report::write(&results, &pictures).as_bytes())?;
    Ok(results)
}
