//! The training of the small net: steps, auxiliary losses, balancing, remedies, and what is noted down on the way.

use std::path::Path;

use super::{
    adam::{Adam, clip, norm},
    arm::{Arm, Route},
    clock::cpu_time,
    cost::{self, Rows},
    evaluate::Model,
    expert::ExpertShape,
    net::{Gradients, Means, Net, Shape},
    probe,
    record::{Record, Update},
    results::{CellResult, finite},
    spec::CellSpec,
    step::{Step, StepInput, step},
    task::{Batch, Task},
    teacher::Teacher,
};
use crate::{
    error::Result,
    memory::Watermark,
    moe::{
        balance_bias,
        collapse::Monitor,
        draw::Draw,
        estimator::{Baseline, Combine, Estimator, EstimatorSpec, Gradient, Purpose, RoutedBatch, StepContext},
        loss::{LossInput, LossNoise, LossTerm},
        remedy::{Action, Evidence, Remedies, Treatment, renewed},
    },
    train::routing::RoutingPlan,
};

/// Largest norm of the router's gradient.
const ROUTER_CLIP: f64 = 1.0;
/// Test rows of a point of the curves, and of a probe.
const POINT_ROWS: usize = 512;
/// Training rows by which the teacher's experts are matched to regions.
const MATCHING_ROWS: usize = 1024;
/// Points at which the quality of the router's gradient is measured.
const PROBES: usize = 5;
/// Tokens over which the monitor of collapse forgets.
const MONITOR_WINDOW: usize = 4096;

/// A cell of the small net while it trains.
#[allow(missing_debug_implementations, reason = "holds a task behind a trait, which has no use for Debug")]
pub struct Training<'a> {
    spec: &'a CellSpec,
    task: &'a dyn Task,
    /// The arm's estimator.
    own: EstimatorSpec,
    /// What trains everything before [`Route::ExpertsAfter`] begins.
    soft: EstimatorSpec,
    losses: Vec<LossTerm>,
    remedies: Remedies,
    teacher: Option<Teacher>,
    memory: Watermark,
    state: State,
    record: Record,
    probes: Vec<probe::Quality>,
}

/// What a step changes.
struct State {
    net: Net,
    router: Adam,
    experts: Adam,
    means: Means,
    /// `[E]`; empty where nothing biases the choice.
    bias: Vec<f64>,
    monitor: Monitor,
    treatment: Treatment,
    average_loss: Option<f64>,
    /// Weight of what the estimator itself adds to the loss.
    own_weight: f64,
}

impl State {
    /// Makes an expert anew from its donor.
    fn renew(&mut self, draw: &Draw, [expert, donor]: [usize; 2], noise: f64) {
        let Shape { experts, expert: shape, .. } = self.net.shape;
        let parts =
            [(&mut self.net.router, &mut self.router, shape.features), (&mut self.net.experts, &mut self.experts, shape.parameters())];
        for (number, (values, adam, size)) in parts.into_iter().enumerate() {
            let of = |expert: usize| expert * size..(expert + 1) * size;
            let new = renewed(&values[of(donor)], noise, draw, number * experts + expert);
            values[of(expert)].copy_from_slice(&new);
            adam.renew(of(expert), of(donor));
        }
    }
}

impl<'a> Training<'a> {
    /// Prepares the cell; its settings are checked here. `cells` is where a teacher's weights are.
    pub fn new(spec: &'a CellSpec, task: &'a dyn Task, cells: &Path) -> Result<Self> {
        let memory = Watermark::set();
        let (arm, steps, experts) = (&spec.arm, spec.size.steps, spec.task.experts());
        let RoutingPlan { estimator: own, losses, remedies, .. } = arm.check(experts, steps, spec.mode)?;
        let soft = EstimatorSpec::new(&Arm::teacher().estimator, experts, steps, Purpose::Laboratory)?;
        let estimator = own.at(0, steps);
        let shape = Shape {
            experts,
            router_width: estimator.router_width(experts),
            expert: ExpertShape { features: task.features(), hidden: task.hidden(), outputs: task.outputs() },
        };
        let teacher = match spec.teacher() {
            Some(teacher) => {
                Some(Teacher::read(&teacher.weights(cells)?, Shape { router_width: experts, ..shape }, soft.at(steps, steps))?)
            }
            None => None,
        };

        let mut net = Net::new(shape, spec.seed, &task.handicap());
        net.zero_router_rows(estimator.noise_outputs(experts));
        if let Some(teacher) = &teacher {
            teacher.copy_to(&mut net, arm.route, &estimator, &task.batch(0, MATCHING_ROWS));
        }
        let biased = arm.bias_rate > 0.0 || !remedies.is_empty();
        let state = State {
            router: Adam::new(net.router.len()),
            experts: Adam::new(net.experts.len()),
            means: Means::new(experts, task.outputs()),
            bias: if biased { vec![0.0; experts] } else { Vec::new() },
            monitor: Monitor::new(experts, estimator.k(), MONITOR_WINDOW),
            treatment: Treatment::default(),
            average_loss: None,
            own_weight: own.regulariser(0, steps).initial_weight(),
            net,
        };
        Ok(Self { spec, task, own, soft, losses, remedies, teacher, memory, state, record: Record::default(), probes: Vec::new() })
    }

    /// Trains to the end and measures. Returns the trained net too, for those who start from it.
    pub fn run(mut self) -> Result<(CellResult, Net)> {
        let rows = self.task.test().part(0..POINT_ROWS);
        let (mut next_point, mut next_probe) = (0, 0);
        while let Some(clock) = self.record.clock(self.spec) {
            if reached(clock, self.spec.size.steps, next_point, self.spec.size.points) {
                self.note_point(clock, &rows);
                next_point += 1;
            }
            if reached(clock, self.spec.size.steps, next_probe, PROBES) {
                self.note_probe(clock, &rows);
                next_probe += 1;
            }
            if !self.advance(clock)? {
                self.record.diverged = true;
                break;
            }
        }
        self.record.peak_bytes = self.memory.growth();
        self.note_point(self.spec.size.steps, &rows);
        let measured = self.measured()?;
        Ok((self.record.result(measured), self.state.net))
    }

    fn estimator(&self, clock: usize) -> Estimator {
        let steps = self.spec.size.steps;
        if self.experts_only(clock).unwrap_or(true) { self.own.at(clock, steps) } else { self.soft.at(clock, steps) }
    }

    /// Whether experts learn alone by now; `None` where the arm has no such phase.
    fn experts_only(&self, clock: usize) -> Option<bool> {
        match self.spec.arm.route {
            Route::ExpertsAfter { share } => Some(clock as f64 >= share * self.spec.size.steps as f64),
            _ => None,
        }
    }

    fn router_learns(&self, clock: usize) -> bool {
        match self.spec.arm.route {
            Route::Learned => true,
            Route::Frozen | Route::Hash | Route::Oracle | Route::Untouched => false,
            Route::ExpertsAfter { .. } => self.experts_only(clock) == Some(false),
        }
    }

    fn draw(&self) -> Draw {
        Draw::new(self.spec.seed, self.record.updates, 0)
    }

    /// One update; false if something was not finite.
    fn advance(&mut self, clock: usize) -> Result<bool> {
        let started = cpu_time();
        let estimator = self.estimator(clock);
        let batch = self.task.batch(self.record.updates, self.spec.size.batch);
        let (Step { mut gradients, loss, router_x, z, routed, forward }, teacher_rows) = self.step(&estimator, &batch);
        let task_norm = norm(&gradients.router);
        if !(loss.is_finite() && task_norm.is_finite() && gradients.experts.iter().all(|g| g.is_finite())) {
            return Ok(false);
        }
        let mut dz = vec![0.0; z.len()];
        if self.router_learns(clock) {
            self.add_losses(clock, &estimator, &batch, &z, &routed, &mut dz)?;
        }
        self.regularise(clock, &z, &routed, &mut dz)?;
        let auxiliary_norm = self.update(&mut gradients, &router_x, &dz, clock);

        if let Combine::Means { decay } = estimator.combine {
            self.state.means.update(&forward, decay);
        }
        if let Gradient::Score { baseline: Baseline::MovingAverage { decay }, .. } = estimator.gradient {
            let average = self.state.average_loss.map_or(loss, |average| decay * average + (1.0 - decay) * loss);
            self.state.average_loss = Some(average);
        }
        self.balance(&estimator, &z, &routed, [task_norm, auxiliary_norm], clock);

        let rows = Rows { forward: forward.executed as u64, backward: gradients.rows as u64, teacher: teacher_rows as u64 };
        let products = rows.products(&estimator, routed.experts);
        self.record.update(Update {
            rows: batch.rows() as u64,
            executed: forward.executed as u64,
            products,
            norm: task_norm,
            milliseconds: (cpu_time() - started).as_secs_f64() * 1e3,
        });
        Ok(true)
    }

    /// The step, and the rows that a teacher's experts ran for it.
    fn step(&self, estimator: &Estimator, batch: &Batch) -> (Step, usize) {
        let arm = &self.spec.arm;
        let teacher = self.teacher.as_ref().filter(|_| arm.distill > 0.0).map(|teacher| teacher.forward(batch));
        let bias = (!self.state.bias.is_empty()).then_some(&self.state.bias[..]);
        let step = step(&StepInput {
            net: &self.state.net,
            estimator,
            route: arm.route,
            batch,
            context: StepContext { bias, explore: arm.explore, capacity: arm.capacity, ..StepContext::train(self.draw()) },
            jitter: arm.jitter,
            means: &self.state.means,
            average_loss: self.state.average_loss.unwrap_or(0.0),
            teacher: teacher.as_ref().map(|forward| (&forward.y[..], arm.distill)),
        });
        (step, teacher.map_or(0, |forward| forward.executed))
    }

    /// Auxiliary losses on router outputs `z` and what they were routed to; `dz += ∂/∂z`.
    fn add_losses(
        &self,
        clock: usize,
        estimator: &Estimator,
        batch: &Batch,
        z: &[f64],
        routed: &RoutedBatch,
        dz: &mut [f64],
    ) -> Result<()> {
        let router = self.teacher.as_ref().filter(|_| self.spec.arm.follows_router());
        let router = router.map(|teacher| teacher.router(batch).repeat(estimator.copies()));
        let input = LossInput {
            z,
            experts: routed.experts,
            temperature: estimator.temperature(),
            choices: routed.wanted(),
            k: estimator.k(),
            sequences: &[],
            global_load: None,
            noise: routed.deviation().map(|std| LossNoise { seen: routed.seen(), std }),
            teacher: router.as_deref(),
        };
        for term in &self.losses {
            let weight = term.weight.at(clock, self.spec.size.steps);
            let weight = if term.loss.balances() { self.state.treatment.balance_weight(weight) } else { weight };
            term.loss.value_and_grad(&input, weight, dz)?;
        }
        Ok(())
    }

    /// What the estimator itself adds to the loss.
    fn regularise(&mut self, clock: usize, z: &[f64], routed: &RoutedBatch, dz: &mut [f64]) -> Result<()> {
        if self.spec.arm.route.is_control() {
            return Ok(());
        }
        let own = self.own.regulariser(clock, self.spec.size.steps);
        own.value_and_grad(self.state.own_weight, z, routed, dz)?;
        self.state.own_weight = own.adapt(self.state.own_weight, routed.active(z));
        Ok(())
    }

    /// Adds the auxiliary gradient, clips and moves the weights; returns the norm of the auxiliary gradient.
    fn update(&mut self, gradients: &mut Gradients, router_x: &[f64], dz: &[f64], clock: usize) -> f64 {
        let mut auxiliary = Gradients { router: vec![0.0; gradients.router.len()], experts: Vec::new(), rows: 0 };
        self.state.net.backward_router(router_x, dz, &mut auxiliary);
        let auxiliary_norm = norm(&auxiliary.router);
        gradients.router.iter_mut().zip(&auxiliary.router).for_each(|(g, a)| *g += a);
        let share = clock as f64 / self.spec.size.steps.max(1) as f64;
        let rate = self.spec.size.rate * 0.5 * (1.0 + (std::f64::consts::PI * share).cos());
        if self.router_learns(clock) {
            clip(&mut gradients.router, ROUTER_CLIP);
            self.state.router.step(&mut self.state.net.router, &gradients.router, self.spec.router_share() * rate);
        }
        self.state.experts.step(&mut self.state.net.experts, &gradients.experts, rate);
        auxiliary_norm
    }

    /// Moves the bias of the choice and lets remedies act.
    fn balance(&mut self, estimator: &Estimator, z: &[f64], routed: &RoutedBatch, norms: [f64; 2], clock: usize) {
        let rate = self.spec.arm.bias_rate;
        if rate == 0.0 && self.remedies.is_empty() {
            return;
        }
        if rate > 0.0 {
            balance_bias::update(&mut self.state.bias, routed.wanted(), rate);
        } else {
            balance_bias::fade(&mut self.state.bias, balance_bias::FADE);
        }
        if self.remedies.is_empty() {
            return;
        }
        let preference = estimator.preference(z, routed);
        self.state.monitor.observe(preference.choices.rows());
        self.state.monitor.observe_gradients(norms[0], norms[1]);
        let balance_weight = self
            .losses
            .iter()
            .filter(|term| term.loss.balances())
            .map(|term| self.state.treatment.balance_weight(term.weight.at(clock, self.spec.size.steps)))
            .fold(0.0, f64::max);
        let evidence = Evidence { scores: &preference.scores, bias: &self.state.bias, balance_weight };
        for action in self.remedies.decide(&mut self.state.monitor, &evidence, &mut self.state.treatment, self.record.updates) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        action.apply_to(&mut self.state.bias);
        // What raises the balance weight is in force through the treatment.
        if let Action::Reinit { expert, donor, noise } = action {
            self.state.renew(&self.draw(), [expert, donor], noise);
        }
        self.record.remedy("", &action);
    }

    fn model<'m>(&'m self, estimator: &'m Estimator) -> Model<'m> {
        let served = if self.spec.arm.bias_rate > 0.0 { &self.state.bias[..] } else { &[] };
        Model { net: &self.state.net, estimator, route: self.spec.arm.route, means: &self.state.means, bias: served }
    }

    fn note_point(&mut self, clock: usize, rows: &Batch) {
        let estimator = self.estimator(clock);
        let point = self.model(&estimator).point(rows);
        self.record.point(point, &self.own, clock, self.spec.size.steps);
    }

    fn note_probe(&mut self, clock: usize, rows: &Batch) {
        let estimator = self.estimator(clock);
        if !self.router_learns(clock) || self.spec.arm.changes_choice() {
            return;
        }
        let state = &self.state;
        let quality = probe::quality(&probe::Probe {
            net: &state.net,
            estimator: &estimator,
            rows,
            means: &state.means,
            average_loss: state.average_loss.unwrap_or(0.0),
            seed: self.spec.seed,
        });
        self.probes.extend(quality);
    }

    /// The trained net on all test rows, and what its settings are.
    fn measured(&self) -> Result<CellResult> {
        let estimator = self.estimator(self.spec.size.steps);
        let (test, model) = (self.task.test(), self.model(&estimator));
        let teacher = self.teacher.as_ref().map(|teacher| teacher.forward(test).y);
        Ok(CellResult {
            settings: self.spec.settings()?,
            validation: self.task.validation().and_then(|rows| finite(model.hard(rows, 1).loss)),
            trivial: self.task.trivial(),
            router_grad: probe::summary(&self.probes),
            executed_expected: cost::expected(self.spec, &estimator, self.record.updates),
            ..model.measure(test, teacher.as_deref())
        })
    }
}

/// Whether `clock` has come to point `next` of so many.
fn reached(clock: usize, steps: usize, next: usize, points: usize) -> bool {
    next < points && clock * points >= next * steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compare::{
            arms::arms,
            plan::RATE,
            spec::{Budget, LAB_VERSION, Mode, Size, TaskName},
            task,
        },
        moe::{
            estimator::{EstimatorConfig, Param},
            loss::AuxLoss,
        },
        schedule::Schedule,
    };

    /// A cell of the small net before its first step, of a built-in arm.
    fn begun<T>(arm: &str, test: impl FnOnce(&mut Training<'_>) -> T) -> T {
        begun_with(arms(TaskName::Collapsed, Mode::Scratch).into_iter().find(|candidate| candidate.name == arm).expect(arm), test)
    }

    fn begun_with<T>(arm: Arm, test: impl FnOnce(&mut Training<'_>) -> T) -> T {
        let size = Size { steps: 100, batch: 64, test: 512, points: 0, rate: RATE };
        let (task, mode) = (TaskName::Collapsed, Mode::Scratch);
        let spec = CellSpec { lab: LAB_VERSION, task, mode, budget: Budget::Steps, arm, seed: 1, size, teacher_size: None };
        let task = task::open(spec.task, spec.seed, spec.size).expect("a task of the small net");
        test(&mut Training::new(&spec, &*task, Path::new("unused")).expect("sound"))
    }

    #[test]
    fn experts_made_anew_in_one_step_are_no_clones() {
        begun("onehot+remedies", |training| {
            training.state.bias[0] = -1.0;
            training.state.bias[1] = 1.0;
            [1, 2].into_iter().for_each(|expert| training.act(Action::Reinit { expert, donor: 0, noise: 0.02 }));
            let State { net, bias, .. } = &training.state;
            let row = |e: usize| &net.router[e * net.shape.expert.features..][..net.shape.expert.features];
            for (a, b) in [(0, 1), (0, 2), (1, 2)] {
                assert!(row(a).iter().zip(row(b)).all(|(a, b)| a != b), "router rows {a} and {b}");
                assert!(net.expert(a).iter().zip(net.expert(b)).all(|(a, b)| a != b), "experts {a} and {b}");
            }
            assert_eq!(bias[..3], [-1.0; 3], "they begin as their donor is");
        });
    }

    #[test]
    fn a_raised_balance_weight_is_in_force() {
        let router = |factor: f64| {
            begun("raw_topk+switch+raise", |training| {
                training.state.treatment =
                    serde_json::from_value(serde_json::json!({ "last": {}, "factor": factor })).expect("a treatment");
                (0..3).for_each(|clock| assert!(training.advance(clock).expect("sound")));
                training.state.net.router.clone()
            })
        };
        assert_eq!(router(1.0), router(1.0));
        assert_ne!(router(1.0), router(8.0));
    }

    /// Losses are of `softmax(z / τ)`, τ that of the softmax that the method mixes by or draws from: their gradient is that
    /// at z / τ, over τ. `gumbel_st` draws by its noise.
    #[test]
    fn losses_are_of_the_probabilities_that_the_method_routes_by() {
        for (name, params, temperature) in [
            ("soft", &[("temperature", 0.25)][..], 0.25),
            ("ste", &[("temperature", 3.0)], 3.0),
            ("gumbel_st", &[("temperature", 0.5), ("noise", 2.0)], 2.0),
            ("raw_topk", &[], 1.0),
        ] {
            let params = params.iter().map(|(name, value)| ((*name).to_owned(), Param::Number(*value))).collect();
            let losses = [("importance".to_owned(), Schedule::constant(0.1))].into();
            let arm = Arm { losses, ..Arm::new(name, EstimatorConfig { name: name.into(), k: None, params }) };
            begun_with(arm, |training| {
                let estimator = training.estimator(0);
                let batch = training.task.batch(0, 64);
                // Not as the net has it, where expert 0 is far ahead.
                let z: Vec<f64> = (0..64 * training.state.net.shape.experts).map(|i| (0.7 * i as f64).sin()).collect();
                let routed = estimator.route(&z, training.state.net.shape.experts, &StepContext::train(training.draw()));
                let (mut found, mut expected) = (vec![0.0; z.len()], vec![0.0; z.len()]);
                training.add_losses(0, &estimator, &batch, &z, &routed, &mut found).expect("sound");
                let plain = LossInput {
                    z: &z.iter().map(|z| z / temperature).collect::<Vec<_>>(),
                    experts: routed.experts,
                    temperature: 1.0,
                    choices: routed.wanted(),
                    k: 1,
                    sequences: &[],
                    global_load: None,
                    noise: None,
                    teacher: None,
                };
                AuxLoss::Importance.value_and_grad(&plain, 0.1 / temperature, &mut expected).expect("sound");
                let size = norm(&expected);
                assert!(size > 0.0 && found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-12 * size), "{name}");
            });
        }
    }

    /// The head start of expert 0 is 8, and the un-weighted one-hot gives the router no gradient: nothing but the bump
    /// sends a token elsewhere.
    #[test]
    fn a_bump_revives_the_dead() {
        begun("onehot+bump", |training| {
            let alive = |training: &Training<'_>| training.state.monitor.load().iter().filter(|rows| **rows > 0.0).count();
            let mut clock = 0;
            while training.record.remedy_actions == 0 && clock < 50 {
                assert_eq!(alive(training), usize::from(clock > 0), "before the bump");
                training.advance(clock).expect("sound");
                clock += 1;
            }
            assert!(training.state.bias[1..].iter().all(|bias| *bias > 0.0), "{:?}", training.state.bias);
            training.advance(clock).expect("sound");
            assert!(alive(training) > 4, "{:?}", training.state.monitor.load());
        });
    }
}
