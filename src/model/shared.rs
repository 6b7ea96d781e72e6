//! Weights that one model hands to another.

use std::{any::Any, fmt, sync::Arc};

/// What a running model computes with besides its cache, whatever its kind: a handle that costs nothing to clone.
///
/// It is erased so that whoever passes it on knows nothing of models, and the fakes of tests have it too. A model takes only the kind that
/// it has itself: see [`LanguageModel::exchange`](super::LanguageModel::exchange).
#[derive(Clone)]
pub struct SharedWeights(Arc<dyn Any + Send + Sync>);

impl SharedWeights {
    /// A handle to `weights`.
    pub fn new<W: Any + Send + Sync>(weights: Arc<W>) -> Self {
        Self(weights)
    }

    /// The weights, if they are of this kind.
    pub fn get<W: Any + Send + Sync>(&self) -> Option<Arc<W>> {
        Arc::clone(&self.0).downcast().ok()
    }
}

impl fmt::Debug for SharedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SharedWeights").field(&Arc::as_ptr(&self.0).cast::<()>()).finish()
    }
}
