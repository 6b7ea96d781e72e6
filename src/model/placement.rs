//! Which expert lives on which device.
//!
//! Today there is one device, and all experts live on it. With several, tokens travel: after the dispatch plan is known, each device sends the
//! rows of experts that live elsewhere and takes those of its own (an all-to-all over the devices, NCCL's on NVIDIA GPUs), runs its experts,
//! and sends the rows back before they are combined. That is one place in the source, between the plan and the products
//! (`model::gpu::experts`), and this table is all that it has to know.

use super::ModelSpec;
use crate::error::{Error, Result};

/// The device of each expert of each MoE layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertPlacement {
    devices: usize,
    /// For each MoE layer, in order of depth, the device of each expert.
    layers: Vec<Vec<usize>>,
}

impl ExpertPlacement {
    /// All experts on one device.
    pub fn one_device(spec: &ModelSpec) -> Self {
        let layers = spec.moe_layers().map(|(_, moe)| vec![0; moe.num_experts]).collect();
        Self { devices: 1, layers }
    }

    /// Neighbouring experts together, as many on each device as on any other, or one more.
    ///
    /// # Errors
    /// `InvalidArgument` without a device, or with more devices than some layer has experts.
    pub fn contiguous(spec: &ModelSpec, devices: usize) -> Result<Self> {
        let on = |experts: usize| (0..experts).map(|expert| expert * devices / experts).collect();
        let layers = spec.moe_layers().map(|(_, moe)| on(moe.num_experts)).collect();
        Self::new(spec, devices, layers)
    }

    /// For each MoE layer of `spec`, in order of depth, the device of each expert.
    ///
    /// # Errors
    /// `InvalidArgument` where the table is not one for this model, names a device that is not there, or leaves a device without experts.
    pub fn new(spec: &ModelSpec, devices: usize, layers: Vec<Vec<usize>>) -> Result<Self> {
        let refuse = |message: String| Err(Error::invalid("expert_placement", message));
        let wanted: Vec<(usize, usize)> = spec.moe_layers().map(|(layer, moe)| (layer, moe.num_experts)).collect();
        if layers.len() != wanted.len() {
            return refuse(format!("{} layers of experts for the {} of the model", layers.len(), wanted.len()));
        }
        for ((layer, experts), found) in wanted.into_iter().zip(&layers) {
            if found.len() != experts {
                return refuse(format!("layer {layer}: {} experts are placed, it has {experts}", found.len()));
            }
            if let Some(device) = found.iter().find(|&&device| device >= devices) {
                return refuse(format!("layer {layer}: there is no device {device}, {devices} there are"));
            }
            if let Some(idle) = (0..devices).find(|device| !found.contains(device)) {
                return refuse(format!("layer {layer}: device {idle} has no expert; use at most {experts} devices"));
            }
        }
        Ok(Self { devices, layers })
    }

    /// Devices.
    pub fn devices(&self) -> usize {
        self.devices
    }

    /// Where an expert lives: the `layer`th MoE layer, from 0. `None` where there is no such expert.
    pub fn device_of(&self, layer: usize, expert: usize) -> Option<usize> {
        self.layers.get(layer)?.get(expert).copied()
    }

    /// The experts of the `layer`th MoE layer that live on a device, ascending.
    pub fn experts_on(&self, layer: usize, device: usize) -> impl Iterator<Item = usize> + '_ {
        let experts = self.layers.get(layer).into_iter().flatten().enumerate();
        experts.filter(move |(_, on)| **on == device).map(|(expert, _)| expert)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FeedForwardSpec, LayerSpec};

    fn spec() -> ModelSpec {
        let mut spec = crate::model::tests::spec();
        spec.layers.insert(1, LayerSpec { sliding_window: None, feed_forward: FeedForwardSpec::Dense { width: 8 } });
        if let FeedForwardSpec::Moe(moe) = &mut spec.layers[2].feed_forward {
            moe.num_experts = 5;
        }
        spec
    }

    #[test]
    fn neighbours_stay_together() {
        let placement = ExpertPlacement::contiguous(&spec(), 2).unwrap();
        assert_eq!(placement.experts_on(0, 0).collect::<Vec<_>>(), [0, 1]);
        assert_eq!(placement.experts_on(1, 0).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(placement.experts_on(1, 1).collect::<Vec<_>>(), [3, 4]);
        assert_eq!((placement.device_of(1, 3), placement.device_of(1, 5), placement.device_of(2, 0)), (Some(1), None, None));
        assert_eq!(ExpertPlacement::contiguous(&spec(), 1).unwrap(), ExpertPlacement::one_device(&spec()));
        assert_eq!(ExpertPlacement::one_device(&spec()).devices(), 1);
    }

    #[test]
    fn tables_that_are_of_something_else_are_refused() {
        let refused = |devices, layers| ExpertPlacement::new(&spec(), devices, layers).unwrap_err().to_string();
        assert!(refused(1, vec![vec![0; 4]]).contains("1 layers of experts for the 2"));
        assert!(refused(1, vec![vec![0; 4], vec![0; 4]]).contains("layer 2: 4 experts are placed, it has 5"));
        assert!(refused(1, vec![vec![0; 4], vec![1; 5]]).contains("no device 1"));
        assert!(refused(2, vec![vec![0, 1, 0, 1], vec![0; 5]]).contains("device 1 has no expert"));
        assert!(ExpertPlacement::contiguous(&spec(), 5).unwrap_err().to_string().contains("at most 4 devices"));
        assert!(ExpertPlacement::contiguous(&spec(), 0).is_err());
    }
}
