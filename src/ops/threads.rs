//! The threads that compute.

use std::num::NonZeroUsize;

use crate::error::{Error, Result};

/// Their name, as the system shows it.
pub const COMPUTE_THREADS: &str = "hardmax-compute";

/// Starts as many as `--threads` says, or one for each core. To be called once, before anything is computed.
pub fn start_compute_threads(count: Option<NonZeroUsize>) -> Result<()> {
    // To rayon 0 is a thread for each core.
    let count = count.map_or(0, NonZeroUsize::get);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(count).thread_name(|_| COMPUTE_THREADS.into()).build_global();
    pool.map_err(|error| Error::Internal(format!("--threads: {error}")))
}
