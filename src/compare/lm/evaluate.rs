//! A language model on test windows, under the training routing without noise and under hard routing.

use std::sync::Arc;

use candle_core::{Device, Tensor};

use super::{
    routes::FixedRoute,
    text::{DOMAIN_NAMES, DOMAINS, LENGTH, VOCABULARY, Windows},
};
use crate::{
    compare::{
        evaluate::{Point, load, missed_mass, of_classes},
        metric::{Confusion, Distance},
        results::{ByRouting, CellResult, DomainLoss, Hardened, finite},
        task::Targets,
    },
    error::{Error, Result},
    model::{Batch, Decoder, LogitRows},
    moe::{
        LayerState, Routing, RoutingMode, RoutingStats, TrainState,
        collapse::DEAD,
        estimator::{Estimator, RoutedBatch},
        policy::{RoutingChoice, RoutingPolicy},
    },
};

/// What is evaluated.
#[derive(Debug)]
pub(super) struct Model<'a> {
    /// On weights that are not tracked.
    pub(super) decoder: &'a Decoder,
    /// As in the present step.
    pub(super) estimator: Estimator,
    /// Selection bias that is served too, and running means, by decoder layer.
    pub(super) layers: Vec<LayerState>,
    /// Expert of each token of some windows, in the place of the router.
    pub(super) route: Option<&'a dyn FixedRoute>,
}

/// One routing of test windows.
#[derive(Debug)]
pub(super) struct Evaluated {
    /// `[T, V]`.
    pub(super) logits: Vec<f64>,
    /// Mean loss, nats per byte.
    pub(super) loss: f64,
    /// The same, of each domain.
    domains: [f64; DOMAINS],
    /// Share of bytes that were the most probable ones.
    pub(super) accuracy: f64,
    /// By MoE layer.
    layers: Vec<Layer>,
}

/// One layer in all forwards of an evaluation.
#[derive(Debug)]
struct Layer {
    stats: RoutingStats,
    /// Of each forward.
    routed: Vec<Arc<RoutedBatch>>,
}

/// Windows of a forward: as many as a training step has, so that evaluating takes no more memory than training.
const AT_ONCE: usize = 8;

impl Model<'_> {
    /// A point of the curves: the same figures as those of the end ([`Self::measure`]), of any windows, a part at a time, so
    /// that it takes no more memory than training.
    pub(super) fn point(&self, test: &Windows) -> Result<Point> {
        let count = test.inputs.len() / LENGTH;
        let mut point = Point::default();
        for first in (0..count).step_by(AT_ONCE) {
            let windows = test.part(first..first + AT_ONCE);
            let (soft, hard) = (self.soft(&windows)?, self.hard(&windows, 1)?);
            let part = Point { soft: soft.loss, hard: hard.loss, apart: Distance::of(&soft.logits, &hard.logits), load: hard.load() };
            point.add(part, windows.inputs.len() as f64 / test.inputs.len() as f64);
        }
        Ok(point)
    }

    /// Under the training routing without noise.
    pub(super) fn soft(&self, windows: &Windows) -> Result<Evaluated> {
        self.under(windows, self.estimator)
    }

    /// Under hard top-k.
    pub(super) fn hard(&self, windows: &Windows, k: usize) -> Result<Evaluated> {
        self.under(windows, self.estimator.hard(k))
    }

    fn under(&self, windows: &Windows, estimator: Estimator) -> Result<Evaluated> {
        let (mut logits, mut layers) = (Vec::with_capacity(windows.inputs.len() * VOCABULARY), Vec::new());
        for first in (0..windows.inputs.len() / LENGTH).step_by(AT_ONCE) {
            self.add_forward(&windows.part(first..first + AT_ONCE), estimator, &mut logits, &mut layers)?;
        }
        let targets = Targets::Classes(windows.targets.iter().map(|&byte| byte as usize).collect());
        let mut unused = vec![0.0; logits.len()];
        let losses = targets.loss(&logits, VOCABULARY, &mut unused);
        let loss = losses.iter().sum::<f64>() / losses.len().max(1) as f64;
        let accuracy = targets.accuracy(&logits, VOCABULARY).unwrap_or(f64::NAN);
        let domains = by_domain(&losses, &windows.domains);
        Ok(Evaluated { logits, loss, domains, accuracy, layers })
    }

    fn add_forward(&self, windows: &Windows, estimator: Estimator, logits: &mut Vec<f64>, layers: &mut Vec<Layer>) -> Result<()> {
        let mut batch = Batch::default();
        for window in windows.inputs.chunks(LENGTH) {
            batch.push(&[], window, 0, RoutingChoice::Native, LogitRows::All);
        }
        let mut state = TrainState::evaluation(self.layers.clone());
        state.fixed = self.route.map(|route| route.of(windows).into());
        let mode = &mut RoutingMode::Train { policy: RoutingPolicy::Estimator(estimator), state: &mut state };
        let forward = self.decoder.forward(&batch, mode, None)?;
        forward.read_logits(|values| logits.extend(values.iter().map(|&z| f64::from(z))))?;
        for (index, layer) in forward.layers.into_iter().enumerate() {
            let Routing::Dense { routed, .. } = layer.routing else {
                return Err(Error::Internal("a training forward routed as serving does".into()));
            };
            if layers.len() <= index {
                layers.push(Layer { stats: RoutingStats::new(routed.experts), routed: Vec::new() });
            }
            layers[index].stats.add(&layer.stats);
            layers[index].routed.push(routed);
        }
        Ok(())
    }

    /// Everything about quality, load and routing; the rest of the result is left as it is by default. `teacher` are its
    /// logits.
    pub(super) fn measure(&self, test: &Windows, teacher: Option<&[f64]>) -> Result<CellResult> {
        let (soft, hard1) = (self.soft(test)?, self.hard(test, 1)?);
        let has_router = self.route.is_none();
        let hard2 = if has_router { Some(self.hard(test, 2)?) } else { None };
        let by_routing = |value: &dyn Fn(&Evaluated) -> f64| ByRouting {
            train: finite(value(&soft)),
            hard1: finite(value(&hard1)),
            hard2: hard2.as_ref().map(value).and_then(finite),
        };
        let pairs = || soft.layers.iter().zip(&hard1.layers).flat_map(|(soft, hard1)| soft.routed.iter().zip(&hard1.routed));
        let missed = || mean(pairs().map(|(soft, hard1)| Some(missed_mass(soft, hard1))));
        let confusions = hard1.confusions(&test.domains);
        let stats = || hard1.layers.iter().map(|layer| &layer.stats);
        let worst = |value: fn(&RoutingStats) -> f64| finite(stats().map(value).fold(f64::NEG_INFINITY, f64::max));
        Ok(CellResult {
            loss: by_routing(&|evaluated| evaluated.loss),
            accuracy: Some(by_routing(&|evaluated| evaluated.accuracy)),
            domains: (DOMAIN_NAMES.iter().enumerate())
                .map(|(i, name)| DomainLoss { domain: (*name).to_owned(), loss: by_routing(&|evaluated| evaluated.domains[i]) })
                .collect(),
            rel_l2: Hardened {
                hard1: Distance::of(&soft.logits, &hard1.logits).relative(),
                hard2: hard2.as_ref().and_then(|hard2| Distance::of(&soft.logits, &hard2.logits).relative()),
            },
            missed_mass: if has_router { missed() } else { None },
            agreement: mean(confusions.iter().map(Confusion::agreement)),
            nmi: mean(confusions.iter().map(Confusion::nmi)),
            utilisation: mean_rows(stats().map(RoutingStats::utilization).collect()),
            dead: stats().map(|stats| stats.below(DEAD)).sum(),
            max_vio: worst(RoutingStats::max_vio),
            gini: worst(RoutingStats::gini),
            load_entropy: finite(stats().map(RoutingStats::load_entropy).fold(f64::INFINITY, f64::min)),
            router_entropy: if has_router { mean(stats().map(|stats| Some(stats.router_entropy()))) } else { None },
            fidelity: teacher.map(|teacher| of_classes(teacher, &hard1.logits, VOCABULARY)),
            ..CellResult::default()
        })
    }
}

impl Evaluated {
    /// Rows that were pushed through experts, of all layers.
    pub(super) fn executed(&self) -> u64 {
        self.layers.iter().map(|layer| layer.stats.executed).sum()
    }

    /// `[T, V]`, in the element type that a forward has them in.
    pub(super) fn logits(&self) -> Result<Tensor> {
        let narrow: Vec<f32> = self.logits.iter().map(|&z| z as f32).collect();
        Ok(Tensor::from_vec(narrow, (self.logits.len() / VOCABULARY, VOCABULARY), &Device::Cpu)?)
    }

    /// Relaxed weights of the experts by layer, `[T, E]` each.
    pub(super) fn routers(&self) -> Vec<Vec<f64>> {
        self.layers.iter().map(|layer| layer.routed.iter().flat_map(|routed| routed.relaxed()).copied().collect()).collect()
    }

    /// Top-1 against domains, by layer.
    pub(super) fn confusions(&self, domains: &[u32]) -> Vec<Confusion> {
        self.layers.iter().map(|layer| confusion(layer, domains)).collect()
    }

    /// Share of tokens per expert, in the first routed layer.
    fn load(&self) -> Vec<f64> {
        self.layers.first().map_or_else(Vec::new, |layer| mean_rows(layer.routed.iter().map(|routed| load(routed)).collect()))
    }
}

/// Mean losses of the bytes of each domain; NaN for one without a byte.
fn by_domain(losses: &[f64], domains: &[u32]) -> [f64; DOMAINS] {
    std::array::from_fn(|domain| {
        let own: Vec<f64> = losses.iter().zip(domains).filter(|(_, of)| **of as usize == domain).map(|(loss, _)| *loss).collect();
        own.iter().sum::<f64>() / own.len() as f64
    })
}

/// Top-1 against domains.
fn confusion(hard1: &Layer, domains: &[u32]) -> Confusion {
    let experts = hard1.stats.expert_tokens.len();
    let chosen = hard1.routed.iter().flat_map(|routed| (0..routed.tokens).map(|t| routed.rows().of(t).first().copied()));
    let pairs = chosen.zip(domains).filter_map(|(expert, &domain)| Some((expert? as usize, domain as usize)));
    Confusion::new(experts, DOMAINS, pairs)
}

/// Of those that are there.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let values: Vec<f64> = values.flatten().collect();
    if values.is_empty() { None } else { finite(values.iter().sum::<f64>() / values.len() as f64) }
}

fn mean_rows(rows: Vec<Vec<f64>>) -> Vec<f64> {
    let width = rows.first().map_or(0, Vec::len);
    (0..width).map(|i| rows.iter().filter_map(|row| row.get(i)).sum::<f64>() / rows.len() as f64).collect()
}
