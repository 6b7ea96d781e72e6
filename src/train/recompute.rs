//! Backward by running each layer again from its input (Chen et al. 2016, arXiv:1604.06174): a third more time, and the graph of one
//! layer at a time instead of all.
//!
//! The input of a layer is a variable of its own exactly where the undivided forward has a tracked tensor there: operations are
//! chosen by what is tracked, so both passes take those of the undivided forward, and choose the same experts to the bit.

use candle_core::{Tensor, Var, backprop::GradStore};

use super::{
    gradients::Gradients,
    learner::{Turn, in_turn},
    trainable::{Learning, Parameter},
};
use crate::{
    error::Result,
    model::{Forward, ForwardTime, Layerwise},
    moe::{LayerRouting, RoutingMode, TrainState, policy::RoutingPolicy},
    ops,
};

/// Both passes over one batch.
pub(super) struct Passes<'a> {
    pub(super) layers: Layerwise<'a>,
    pub(super) policy: RoutingPolicy,
    pub(super) parameters: &'a [Parameter],
    pub(super) learning: Learning,
}

/// What the first pass leaves.
pub(super) struct Kept {
    /// Of each layer, and of the head: `[T, D]`, without a graph.
    inputs: Vec<Tensor>,
    /// By layer, without a graph.
    routings: Vec<Option<LayerRouting>>,
}

impl Kept {
    /// The input of the head.
    pub(super) fn top(&self) -> &Tensor {
        &self.inputs[self.inputs.len() - 1]
    }

    /// As if the undivided forward had left these logits, but for its graph.
    pub(super) fn forward(&self, logits: Tensor) -> Forward {
        let layers = self.routings.iter().flatten().cloned().collect();
        Forward { logits, drawn: Vec::new(), layers, time: ForwardTime::default() }
    }
}

impl Passes<'_> {
    /// First pass: each layer in a turn.
    pub(super) fn forward(&self, state: &mut TrainState, turn: &mut Turn<'_>) -> Result<Kept> {
        let mut kept = Kept { inputs: vec![in_turn(turn, || leaf(self.layers.embedded()))?], routings: Vec::new() };
        for index in 0..self.layers.len() {
            let (x, routing) = in_turn(turn, || {
                let (y, routing) = self.layer(index, kept.top(), state)?;
                Ok((leaf(&y)?, routing.map(LayerRouting::detached)))
            })?;
            kept.inputs.push(x);
            kept.routings.push(routing);
        }
        Ok(kept)
    }

    /// Second pass, from the last layer to the first that learns, each in a turn: adds the gradients of the parameters, and returns how
    /// layers routed. `above` is the gradient of the input of the head, where anything below it learns; `dz` by MoE layer what comes to its
    /// router outputs beside that, `state` that from before the first pass.
    pub(super) fn backward(
        self,
        kept: Kept,
        (mut above, mut dz): (Option<Tensor>, Vec<Option<Vec<f64>>>),
        state: &mut TrainState,
        gradients: &mut Gradients,
        turn: &mut Turn<'_>,
    ) -> Result<Vec<LayerRouting>> {
        let Kept { mut inputs, mut routings } = kept;
        for index in (0..self.layers.len()).rev() {
            let Some(gradient) = above.take() else { break };
            let dz = if routings[index].is_some() { dz.pop().flatten() } else { None };
            above = in_turn(turn, || {
                // The layer above has had its input.
                inputs.truncate(index + 1);
                let (y, routing) = self.layer(index, &inputs[index], state)?;
                let mut sum = (&y * &gradient)?.sum_all()?;
                if let (Some(routing), Some(dz)) = (&routing, dz) {
                    sum = (sum + ops::known(&routing.router_logits, 0.0, dz)?)?;
                }
                let store = sum.backward()?;
                routings[index] = routing.map(LayerRouting::detached);
                drop((y, sum, gradient));
                self.taken(store, inputs.last(), gradients)
            })?;
        }
        in_turn(turn, move || {
            drop(inputs);
            let Self { layers, parameters, learning, .. } = self;
            let Some(gradient) = above else { return Ok(()) };
            let store = (layers.embedded() * &gradient)?.sum_all()?.backward()?;
            gradients.add(parameters, learning, store)
        })?;
        Ok(routings.into_iter().flatten().collect())
    }

    fn layer(&self, index: usize, x_td: &Tensor, state: &mut TrainState) -> Result<(Tensor, Option<LayerRouting>)> {
        self.layers.layer(index, x_td, &mut RoutingMode::Train { policy: self.policy, state })
    }

    /// Adds the gradients of parameters; returns that of `input`, where it has one: nothing learns below otherwise.
    pub(super) fn taken(&self, mut store: GradStore, input: Option<&Tensor>, gradients: &mut Gradients) -> Result<Option<Tensor>> {
        let of_input = input.filter(|input| input.is_variable()).and_then(|input| store.remove(input));
        gradients.add(self.parameters, self.learning, store)?;
        Ok(of_input.map(|gradient| gradient.detach()))
    }
}

/// The same values without a graph: a variable, where `x` is tracked.
fn leaf(x: &Tensor) -> Result<Tensor> {
    let values = x.detach();
    Ok(if x.track_op() { Var::from_tensor(&values)?.as_tensor().clone() } else { values })
}
