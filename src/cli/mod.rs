//! The commands of the command line, one file each.

pub mod forward;
pub mod inspect;
pub mod train;
