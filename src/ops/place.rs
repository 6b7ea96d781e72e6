//! Where a tensor is, and what may be done with it there.
//!
//! Operations of this crate that read slices (the fused ones of [`super`], routers, losses known in f64) run on the CPU only, and candle says
//! so when they are met on a device: too late, in somebody's GPU. So they take [`OnHost`], which there are two ways to get: a tensor whose
//! operations run here, which [`runs_here`] told before, or a copy that somebody asked for by name. `tests/it/policy.rs` keeps all else away.

use candle_core::{CustomOp1, CustomOp2, CustomOp3, Device, Tensor};

use crate::error::{Error, Result};

/// Whether what is on `device` is computed by this process, by loops over slices. Elsewhere operations are those of [`super::device`].
pub(crate) fn runs_here(device: &Device) -> bool {
    device.is_cpu() && !elsewhere::pretended()
}

/// A contiguous tensor in the memory of this process.
#[derive(Clone, Debug)]
pub(crate) struct OnHost(Tensor);

impl OnHost {
    /// `tensor`, which runs here.
    ///
    /// # Errors
    /// `Internal` where it does not: whoever asks has not looked.
    pub(crate) fn here(tensor: &Tensor) -> Result<Self> {
        match runs_here(tensor.device()) {
            true => Ok(Self(tensor.contiguous()?)),
            false => Err(Error::Internal(format!("an operation of the CPU met {:?} on {:?}", tensor.shape(), tensor.device().location()))),
        }
    }

    /// A copy of a tensor of any device, which waits for it; nothing is copied on the CPU. Differentiable.
    pub(crate) fn copied(tensor: &Tensor) -> Result<Self> {
        Ok(Self(tensor.to_device(&Device::Cpu)?.contiguous()?))
    }

    pub(crate) fn tensor(&self) -> &Tensor {
        &self.0
    }

    pub(crate) fn apply<C: CustomOp1 + Send + Sync + 'static>(&self, op: C) -> Result<Tensor> {
        Ok(self.0.apply_op1(op)?)
    }

    pub(super) fn apply2<C: CustomOp2 + Send + Sync + 'static>(&self, other: &Self, op: C) -> Result<Tensor> {
        Ok(self.0.apply_op2(&other.0, op)?)
    }

    pub(super) fn apply3<C: CustomOp3 + Send + Sync + 'static>(&self, [second, third]: [&Self; 2], op: C) -> Result<Tensor> {
        Ok(self.0.apply_op3(&second.0, &third.0, op)?)
    }
}

/// `work` on this thread as if CPU tensors were on a device.
#[cfg(test)]
pub(crate) fn as_on_a_device<R>(work: impl FnOnce() -> R) -> R {
    let _before = elsewhere::Before::pretend();
    work()
}

/// Nobody pretends in a program that runs.
#[cfg(not(test))]
mod elsewhere {
    pub(super) fn pretended() -> bool {
        false
    }
}

/// Tests take CPU tensors for those of a device: then every operation has the form that it has there, and one of the CPU is an error.
#[cfg(test)]
mod elsewhere {
    use std::cell::Cell;

    thread_local! {
        static PRETENDED: Cell<bool> = const { Cell::new(false) };
    }

    pub(super) fn pretended() -> bool {
        PRETENDED.get()
    }

    /// Ends it, also where a test panics.
    pub(super) struct Before(bool);

    impl Before {
        pub(super) fn pretend() -> Self {
            Self(PRETENDED.replace(true))
        }
    }

    impl Drop for Before {
        fn drop(&mut self) {
            PRETENDED.set(self.0);
        }
    }
}
