//! One step of the small net up to its gradients: route, run, compare with the targets, credit, back to the router.

use super::{
    arm::Route,
    net::{Forward, Gradients, Means, Net, Pass},
    task::Batch,
};
use crate::moe::{
    advantage::Draws,
    draw::Stream,
    estimator::{Estimator, Gradient, RoutedBatch, StepContext},
    explore::jitter,
};

/// What a step reads.
#[derive(Clone, Copy, Debug)]
pub struct StepInput<'a> {
    /// Weights.
    pub net: &'a Net,
    /// How to route and to differentiate.
    pub estimator: &'a Estimator,
    /// Who decides the route.
    pub route: Route,
    /// Rows.
    pub batch: &'a Batch,
    /// Noise, exploration, bias and capacity of the step.
    pub context: StepContext<'a>,
    /// Width of the noise on the router's copy of the features.
    pub jitter: f64,
    /// Running means of the experts' outputs.
    pub means: &'a Means,
    /// Moving average of the loss, for the score function that subtracts it.
    pub average_loss: f64,
    /// Outputs of the teacher `[T, O]` to stay near, and the weight of that.
    pub teacher: Option<(&'a [f64], f64)>,
}

/// What a step gives.
#[derive(Clone, Debug)]
pub struct Step {
    /// Of the task's loss alone, without auxiliary losses.
    pub gradients: Gradients,
    /// Mean loss of the rows.
    pub loss: f64,
    /// What the router saw, `[T', D]`; T' is T times the copies that a score function draws.
    pub router_x: Vec<f64>,
    /// Router outputs `[T', G]`.
    pub z: Vec<f64>,
    /// Routing of the T' rows.
    pub routed: RoutedBatch,
    /// Outputs, and the count of executed rows.
    pub forward: Forward,
}

/// Runs one step.
pub fn step(input: &StepInput<'_>) -> Step {
    let StepInput { net, estimator, batch, means, .. } = *input;
    let (rows, copies) = (batch.rows(), estimator.copies());
    let x = batch.x.repeat(copies);
    let router_x = jittered(input, &x);
    let z = router_outputs(net, input.route, batch, &router_x);
    let routed = estimator.route(&z, net.shape.experts, &StepContext { copy_rows: rows, ..input.context });
    let forward = net.forward(&x, &routed, estimator.combine, means);
    let Compared { losses, dy } = compare(input, &forward.y);

    let mut gradients = Gradients::new(net);
    let pass = Pass { x: &x, routed: &routed, combine: estimator.combine, means, forward: &forward };
    let credit = net.backward(&pass, &dy, &mut gradients);
    let mut dz = vec![0.0; z.len()];
    estimator.vjp(&z, &routed, &credit, &mut dz);
    let draws = Draws { losses: &losses, rows, samples: estimator.gradient.samples() };
    if let Gradient::Score { baseline, .. } = estimator.gradient {
        estimator.score(&z, &routed, &draws.advantages(baseline, input.average_loss), &mut dz);
    }
    net.backward_router(&router_x, &dz, &mut gradients);
    Step { gradients, loss: draws.mean(), router_x, z, routed, forward }
}

/// Router outputs of rows: the router's own, or, where no router decides, a lead of 1 for the expert that is to run.
///
/// `x` are the features that the router sees: those of the batch, or several copies of them.
pub fn router_outputs(net: &Net, route: Route, batch: &Batch, x: &[f64]) -> Vec<f64> {
    let experts = net.shape.experts;
    let copies = x.len() / batch.x.len().max(1);
    let lead = |choices: Vec<usize>| {
        let mut z = vec![0.0; choices.len() * copies * experts];
        z.chunks_exact_mut(experts).zip(choices.iter().cycle()).for_each(|(row, choice)| row[*choice] = 1.0);
        z
    };
    match route {
        Route::Learned | Route::Frozen | Route::ExpertsAfter { .. } | Route::Untouched => net.logits(x),
        Route::Hash => lead(batch.hashes().into_iter().map(|hash| (hash % experts as u64) as usize).collect()),
        Route::Oracle => lead(batch.region.clone()),
    }
}

fn jittered(input: &StepInput<'_>, x: &[f64]) -> Vec<f64> {
    let mut x = x.to_vec();
    let noisy = input.estimator.greedy_from(input.batch.rows());
    jitter(&mut x, input.batch.features, input.jitter, noisy, |row, column| input.context.draw.uniform(Stream::Jitter, row, column));
    x
}

struct Compared {
    /// `[T']`.
    losses: Vec<f64>,
    /// `[T', O]`, gradient of the mean loss; 0 for the greedy copy, which is only looked at.
    dy: Vec<f64>,
}

fn compare(input: &StepInput<'_>, y: &[f64]) -> Compared {
    let (rows, outputs) = (input.batch.rows(), input.batch.outputs);
    let (copies, samples) = (input.estimator.copies(), input.estimator.gradient.samples());
    let share = 1.0 / (rows * samples).max(1) as f64;
    let mut compared = Compared { losses: Vec::with_capacity(rows * copies), dy: vec![0.0; y.len()] };
    for (copy, (y, dy)) in y.chunks_exact(rows * outputs).zip(compared.dy.chunks_exact_mut(rows * outputs)).enumerate() {
        let mut losses = input.batch.targets.loss(y, outputs, dy);
        if let Some((teacher, weight)) = input.teacher {
            input.batch.targets.distill(y, teacher, outputs, weight, &mut losses, dy);
        }
        compared.losses.extend(losses);
        let share = if copy < samples { share } else { 0.0 };
        dy.iter_mut().for_each(|d| *d *= share);
    }
    compared
}
