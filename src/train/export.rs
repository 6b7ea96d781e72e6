//! A finished run as a checkpoint folder: Mixtral layout, router divided by its temperature, `routing` block.

use candle_core::DType;

use super::{
    config::TrainConfig,
    log, plot,
    routing::RoutingPlan,
    tokenizer,
    trainable::Learning,
    trainer::{Trained, folded, log_path},
};
use crate::{
    checkpoint::{
        self, GenerationDefaults, LossRecord, NoiseRecord, ReferenceMode, ReferenceRecord, RoutingBlock, SaveRequest, ServeRecord,
        TemperatureRecord, TrainRecord,
    },
    error::{Error, Result},
    model::ReferenceRouting,
    moe::{
        estimator::{Relaxation, Weights},
        loss::AuxLoss,
        policy::WeightForm,
    },
};

/// Saves `trained` to `config.output`, and its curves to `config.work`.
pub fn export(config: &TrainConfig, trained: &Trained) -> Result<()> {
    let end = trained
        .tokenizer
        .token_to_id(tokenizer::END_OF_TEXT)
        .ok_or_else(|| Error::Internal("the tokenizer lost its end-of-text token".into()))?;
    let generation = GenerationDefaults {
        eos_token_ids: vec![end],
        temperature: config.generation.temperature,
        top_p: config.generation.top_p,
        do_sample: config.generation.temperature.map(|temperature| temperature > 0.0),
        ..GenerationDefaults::default()
    };
    let weights = folded(&trained.model, trained.folding)?;
    let plan = config.plan()?;
    checkpoint::save(
        &config.output,
        &SaveRequest {
            spec: &trained.spec,
            weights: &weights,
            routing: Some(&routing_block(&plan, config, trained)),
            tokenizer: Some(&trained.tokenizer),
            generation: &generation,
            dtype: DType::F32,
        },
    )?;
    let picture = config.work.join("curves.svg");
    plot::curves(&log::read(&log_path(config))?, &picture)
}

fn routing_block(plan: &RoutingPlan, config: &TrainConfig, trained: &Trained) -> RoutingBlock {
    RoutingBlock {
        version: RoutingBlock::VERSION,
        train: Some(train_record(plan, &config.routing.estimator, config.run.steps)),
        reference: Some(match trained.spec.reference {
            ReferenceRouting::Soft { temperature } => reference(ReferenceMode::Soft, Some(f64::from(temperature)), None),
            ReferenceRouting::TopK { k } => reference(ReferenceMode::Hard, None, Some(k)),
            ReferenceRouting::OwnTopK { .. } => reference(ReferenceMode::Hard, None, None),
        }),
        serve: Some(ServeRecord {
            mode: Some("hard".into()),
            k: Some(config.routing.serve_k),
            weight_form: Some(trained.estimator.serve),
            ..ServeRecord::default()
        }),
        per_layer: Default::default(),
        fidelity: None,
    }
}

/// How routers were trained by `estimator` under `plan`, `at` so many steps, with [`RoutingPlan::folding`] of them done at saving.
pub fn train_record(plan: &RoutingPlan, estimator: &str, at: usize) -> TrainRecord {
    let last = plan.estimator(at);
    let softmax = matches!(last.relaxation, Relaxation::Softmax { .. });
    TrainRecord {
        estimator: estimator.to_owned(),
        k: plan.estimator.k(),
        // Another score function leaves no trace in what is served: it orders experts as their logits do.
        score: softmax.then(|| "softmax".into()),
        temperature: plan.estimator.schedule("temperature").map(|schedule| TemperatureRecord {
            schedule: Some(schedule.schedule.id().into()),
            init: Some(schedule.init),
            end: Some(schedule.last()),
            at_save: Some(schedule.at(at, plan.steps)),
            folded: Some(softmax && plan.folding(at) == schedule.at(at, plan.steps)),
        }),
        noise: Some(NoiseRecord { kind: Some(log::noise_kind(last.noise.kind).into()), scale_at_save: Some(last.noise.scale) }),
        weight_form: Some(match last.weights {
            Weights::Renorm => WeightForm::Renorm,
            Weights::Unit => WeightForm::Unit,
            Weights::Relaxed | Weights::Chosen | Weights::Corrected { .. } => WeightForm::Raw,
        }),
        loss: Some(loss_record(plan)),
        capacity_factor: plan.capacity.map(|capacity| capacity.factor),
        steps: Some(at),
        frozen_router: Some(plan.learning == Learning::Experts),
        ..TrainRecord::default()
    }
}

fn reference(mode: ReferenceMode, temperature: Option<f64>, k: Option<usize>) -> ReferenceRecord {
    ReferenceRecord { mode, temperature, k, noise: Some("none".into()) }
}

/// The losses at the end of the run, as far as the block has a place for them: the balance loss with the largest
/// weight, and the z-loss.
fn loss_record(plan: &RoutingPlan) -> LossRecord {
    let balance = plan.balance(plan.steps);
    let z = plan.losses.iter().find(|term| term.loss == AuxLoss::RouterZ).map_or(0.0, |term| term.weight.last());
    LossRecord {
        balance: balance.map(|(loss, _)| loss.id().into()),
        convention: balance.and_then(|(loss, _)| loss.convention()).map(Into::into),
        balance_coef: Some(balance.map_or(0.0, |(_, weight)| weight)),
        z_coef: Some(z),
        bias_rate: Some(plan.bias_rate),
    }
}
