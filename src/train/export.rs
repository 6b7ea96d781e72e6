//! A finished run as a checkpoint folder: Mixtral layout, router divided by its temperature, `routing` block.

use candle_core::DType;

use super::{
    config::{Estimator, TrainConfig},
    log, plot, tokenizer,
    trainer::{Trained, folded, log_path},
};
use crate::{
    checkpoint::{
        self, GenerationDefaults, LossRecord, NoiseRecord, ReferenceMode, ReferenceRecord, RoutingBlock, SaveRequest, ServeRecord,
        TemperatureRecord, TrainRecord,
    },
    error::{Error, Result},
    moe::policy::WeightForm,
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
    let weights = folded(&trained.model, trained.temperature)?;
    checkpoint::save(
        &config.output,
        &SaveRequest {
            spec: &trained.spec,
            weights: &weights,
            routing: Some(&routing_block(config, trained)),
            tokenizer: Some(&trained.tokenizer),
            generation: &generation,
            dtype: DType::F32,
        },
    )?;
    let picture = config.work.join("curves.svg");
    plot::curves(&log::read(&log_path(config))?, &picture)
}

fn routing_block(config: &TrainConfig, trained: &Trained) -> RoutingBlock {
    let routing = &config.routing;
    let schedule = routing.temperature;
    let noisy = routing.estimator == Estimator::GumbelSoft;
    RoutingBlock {
        version: RoutingBlock::VERSION,
        train: Some(TrainRecord {
            estimator: routing.estimator.id().into(),
            score: Some("softmax".into()),
            temperature: Some(TemperatureRecord {
                schedule: Some(schedule.schedule.id().into()),
                init: Some(schedule.init),
                end: Some(schedule.last()),
                at_save: Some(trained.temperature),
                folded: Some(true),
            }),
            noise: Some(NoiseRecord { kind: Some(if noisy { "gumbel" } else { "none" }.into()), scale_at_save: Some(trained.noise) }),
            weight_form: Some(WeightForm::Raw),
            loss: Some(LossRecord {
                balance: Some("switch".into()),
                convention: Some("normalised".into()),
                balance_coef: Some(routing.balance_coef),
                z_coef: Some(routing.z_coef),
                bias_rate: Some(0.0),
            }),
            steps: Some(config.run.steps),
            frozen_router: Some(false),
            ..TrainRecord::default()
        }),
        reference: Some(ReferenceRecord { mode: ReferenceMode::Soft, temperature: Some(1.0), k: None, noise: Some("none".into()) }),
        serve: Some(ServeRecord {
            mode: Some("hard".into()),
            k: Some(routing.serve_k),
            weight_form: Some(WeightForm::Renorm),
            ..ServeRecord::default()
        }),
        per_layer: Default::default(),
        fidelity: None,
    }
}
