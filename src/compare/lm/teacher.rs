//! The soft-trained model that tuning starts from: kept in a file, copied into the student, run for its logits.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use candle_core::{Device, Tensor};

use super::{
    evaluate::{Evaluated, Model},
    model::{model_spec, optimizer, plan},
    text::Windows,
};
use crate::{
    compare::{
        arm::{Arm, Route},
        spec::CellSpec,
        teacher::permutation,
    },
    durable,
    error::{Error, Result},
    model::Decoder,
    moe::{
        estimator::{Estimator, Relaxation},
        policy::RoutingPolicy,
    },
    train::{
        learner::{Learner, Setup},
        trainable::{Part, Trainable},
    },
};

/// A teacher under its own soft routing.
pub(super) fn soft(teacher: &Decoder, windows: &Windows) -> Result<Evaluated> {
    model(teacher).soft(windows)
}

/// By layer, the teacher's expert that is most at home in each domain, `[E]`: a permutation.
pub(super) fn order(teacher: &Decoder, windows: &Windows, experts: usize) -> Result<Vec<Vec<usize>>> {
    let confusions = model(teacher).hard(windows, 1)?.confusions(&windows.domains);
    Ok(confusions.iter().map(|confusion| permutation(&confusion.matching().unwrap_or_default(), experts)).collect())
}

fn model(teacher: &Decoder) -> Model<'_> {
    let estimator = RoutingPolicy::Soft { temperature: 1.0 }.estimator();
    Model { decoder: teacher, estimator, layers: Vec::new(), route: None }
}

/// Parameters by name.
pub(super) type Weights = BTreeMap<String, Tensor>;

pub(super) fn write(model: &Trainable, path: &Path) -> Result<()> {
    let weights: Weights = model.parameters().iter().map(|p| (p.name.clone(), p.var.as_detached_tensor())).collect();
    let bytes = safetensors::serialize(weights.iter(), None).map_err(|error| Error::Internal(format!("{}: {error}", path.display())))?;
    durable::write(path, &bytes)
}

pub(super) fn read(path: &Path) -> Result<Weights> {
    let bytes = std::fs::read(path).map_err(|error| Error::io(path, error))?;
    Ok(candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?.into_iter().collect())
}

pub(super) fn decoder(spec: &CellSpec, weights: &Weights) -> Result<Decoder> {
    let plan = plan(spec, &Arm::teacher())?;
    let learner = Learner::new(Setup { spec: Arc::new(model_spec(spec)), plan, optimizer: optimizer(spec), seed: spec.seed })?;
    for (name, value) in weights {
        learner.model().set(name, value)?;
    }
    Decoder::new(Arc::clone(learner.spec()), learner.model().detached(), learner.kernel())
}

/// Starts a student from the teacher: all weights, and the router where one learns that has the teacher's outputs.
///
/// A frozen random router stays random; further outputs (learned noise) stay as they are made; a router whose outputs are
/// no logits (DSelect-k) begins anew. `order` puts the experts of each layer into other places ([`order()`]).
pub(super) fn copy(teacher: &Weights, student: &Learner, route: Route, estimator: Estimator, order: Option<&[Vec<usize>]>) -> Result<()> {
    let logits = !matches!(estimator.relaxation, Relaxation::SmoothStep { .. });
    let routers = logits && matches!(route, Route::Learned | Route::ExpertsAfter { .. } | Route::Untouched);
    for parameter in student.model().parameters() {
        let Some(value) = teacher.get(&parameter.name) else {
            return Err(Error::NotFound(format!("the teacher has no {}", parameter.name)));
        };
        if parameter.part == Part::Experts
            && let Some(order) = order.and_then(|order| of_layer(order, &parameter.name))
        {
            let order: Vec<u32> = order.iter().map(|&expert| expert as u32).collect();
            student.model().set(&parameter.name, &value.index_select(&Tensor::new(&order[..], value.device())?, 0)?)?;
        } else if parameter.part != Part::Router {
            student.model().set(&parameter.name, value)?;
        } else if routers {
            let (rows, all) = (value.dim(0)?, parameter.var.dim(0)?);
            let whole = match all > rows {
                true => Tensor::cat(&[value, &parameter.var.as_detached_tensor().narrow(0, rows, all - rows)?], 0)?,
                false => value.clone(),
            };
            student.model().set(&parameter.name, &whole)?;
        }
    }
    Ok(())
}

/// What a parameter's layer has; parameters of layers are named `layers.<index>.`.
fn of_layer<'a, T>(layers: &'a [T], name: &str) -> Option<&'a T> {
    let (index, _) = name.strip_prefix("layers.")?.split_once('.')?;
    layers.get(index.parse::<usize>().ok()?)
}
