//! What decides which series there are, and the facts that some of them show.

use std::fmt;

use clap::ValueEnum;

use super::catalog::{self, Presence};

/// The facts that `_info` series show, and what decides which series there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Name of the served model; the `model` label of all series.
    pub model: String,
    /// Version of the server.
    pub version: String,
    /// Commit that the server was built from; `unknown` outside a repository.
    pub git: String,
    /// Where the model runs, for example `cpu`.
    pub device: String,
    /// Element type of the weights, for example `f32`.
    pub dtype: String,
    /// How the router was trained (`train.estimator` of the checkpoint).
    pub estimator: String,
    /// Routing in force when a request says nothing.
    pub serving: String,
    /// Routing that the checkpoint was trained under.
    pub reference: String,
    /// Of the weights in force; the engine says it ([`Metrics::set_generation`](super::metrics::Metrics::set_generation)).
    pub generation: u64,
    /// Decoder layers.
    pub num_layers: usize,
    /// MoE layers, as (decoder layer from 0, number of experts).
    pub layers: Vec<(usize, usize)>,
    /// Experts per token under the serving routing, the most of any layer.
    pub top_k: usize,
    /// Longest sequence, in tokens: the last bucket of the size histograms.
    pub max_context: usize,
    /// Tokens of a block of the cache.
    pub cache_block_tokens: usize,
    /// Blocks of the cache.
    pub cache_blocks: usize,
    /// Requests can be measured against the reference routing.
    pub shadow: bool,
    /// The model can be tuned.
    pub tuning: bool,
    /// Which of the optional series there are.
    pub series: SeriesOptions,
}

/// Which of the optional series are exported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeriesOptions {
    /// Those of experts and layers.
    pub experts: ExpertMetrics,
    /// Most per-expert series under [`ExpertMetrics::Auto`].
    pub expert_limit: usize,
    /// Further names.
    pub aliases: MetricsAliases,
}

/// How finely the load of experts is exported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum ExpertMetrics {
    /// Per expert as long as there are not too many series, else per layer.
    #[default]
    Auto,
    /// For each expert and each layer.
    PerExpert,
    /// For each layer.
    PerLayer,
    /// Neither.
    Off,
}

/// Under which other names gauges are exported as well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum MetricsAliases {
    /// None.
    #[default]
    None,
    /// What gateways read of vLLM.
    Vllm,
}

/// What [`ExpertMetrics`] comes to for a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Detail {
    Off,
    PerLayer,
    PerExpert,
}

impl Default for SeriesOptions {
    fn default() -> Self {
        Self { experts: ExpertMetrics::default(), expert_limit: 10_000, aliases: MetricsAliases::default() }
    }
}

impl SeriesOptions {
    /// What to export of `layers`, which are (decoder layer, number of experts). Warns where `auto` leaves experts out.
    pub(super) fn detail(&self, layers: &[(usize, usize)]) -> Detail {
        match self.experts {
            ExpertMetrics::PerExpert => Detail::PerExpert,
            ExpertMetrics::PerLayer => Detail::PerLayer,
            ExpertMetrics::Off => Detail::Off,
            ExpertMetrics::Auto => {
                let (series, limit) = (per_expert_series(layers), self.expert_limit);
                if series <= limit {
                    return Detail::PerExpert;
                }
                tracing::warn!(
                    series,
                    limit,
                    "too many per-expert series: /metrics has the load per layer. --expert-metrics-limit raises the limit, \
                     --expert-metrics per-expert ignores it"
                );
                Detail::PerLayer
            }
        }
    }
}

/// Series of all per-expert families together.
fn per_expert_series(layers: &[(usize, usize)]) -> usize {
    let families = catalog::families().filter(|family| family.presence == Presence::PerExpert).count();
    layers.iter().map(|&(_, experts)| experts * families).sum()
}

impl Detail {
    /// Whether a family of this presence is on the page, where it is at all.
    pub(super) fn shows(self, presence: Presence) -> bool {
        match presence {
            Presence::PerExpert => self >= Self::PerExpert,
            Presence::PerLayer | Presence::ShadowPerLayer => self >= Self::PerLayer,
            Presence::Always | Presence::Shadow | Presence::Tuning | Presence::VllmAlias => true,
        }
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::PerLayer => "per-layer",
            Self::PerExpert => "per-expert",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_keeps_to_the_limit() {
        let layers = [(0, 8), (2, 4)];
        assert_eq!(per_expert_series(&layers), 3 * 12);
        let detail = |experts, expert_limit| SeriesOptions { experts, expert_limit, ..SeriesOptions::default() }.detail(&layers);
        assert_eq!(detail(ExpertMetrics::Auto, 36), Detail::PerExpert);
        assert_eq!(detail(ExpertMetrics::Auto, 35), Detail::PerLayer);
        assert_eq!(detail(ExpertMetrics::PerExpert, 0), Detail::PerExpert);
        assert_eq!(detail(ExpertMetrics::PerLayer, 36), Detail::PerLayer);
        assert_eq!(detail(ExpertMetrics::Off, 36), Detail::Off);
        assert_eq!(SeriesOptions::default().detail(&[]), Detail::PerExpert, "a model without experts has no series of them");
    }
}
