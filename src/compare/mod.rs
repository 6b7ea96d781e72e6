//! The laboratory: every estimator on small tasks with a known answer, side by side.
//!
//! A run is planned as cells ([`spec::CellSpec`]): one arm on one task with one seed. Every cell is a process of its own
//! and leaves one file; what is there already is not run again. From the cells come `results.json`, pictures and the report.
//!
//! | file | what it is for |
//! |---|---|
//! | [`spec`], [`arm`] | what one cell is: task, mode, budget, seed, size; estimator, losses, controls |
//! | [`task`] | data with regions, their optimal routing, the loss |
//! | [`results`] | what a cell leaves behind; `results.json` |

pub mod adam;
pub mod arm;
pub mod arms;
pub mod cell;
pub mod evaluate;
pub mod expert;
pub mod files;
pub mod gradient;
pub mod list;
pub mod lm;
pub mod memory;
pub mod metric;
pub mod net;
pub mod plan;
pub mod probe;
pub mod random;
pub mod results;
pub mod spec;
pub mod step;
pub mod task;
pub mod teacher;
#[cfg(test)]
mod tests;
pub mod training;
