//! The flags that say which series /metrics has.

use clap::Args;

use crate::telemetry::metrics::{ExpertMetrics, MetricsAliases, SeriesOptions};

/// Which series are exported.
#[derive(Args, Clone, Copy, Debug)]
pub struct SeriesArgs {
    /// How finely /metrics shows the load of experts. `auto` is per expert, and per layer where that would be more series than
    /// --expert-metrics-limit. `off` leaves out the fidelity gap of each layer as well.
    #[arg(long, env = "HARDMAX_EXPERT_METRICS", value_enum, default_value_t)]
    pub expert_metrics: ExpertMetrics,
    /// Most per-expert series (MoE layers x experts x families) that `--expert-metrics auto` exports.
    #[arg(long, env = "HARDMAX_EXPERT_METRICS_LIMIT", value_name = "SERIES", default_value_t = SeriesOptions::default().expert_limit)]
    pub expert_metrics_limit: usize,
    /// Also export what gateways scrape under the names that vLLM gives it.
    #[arg(long, env = "HARDMAX_METRICS_ALIASES", value_enum, default_value_t)]
    pub metrics_aliases: MetricsAliases,
}

impl SeriesArgs {
    pub(super) fn options(&self) -> SeriesOptions {
        SeriesOptions { experts: self.expert_metrics, expert_limit: self.expert_metrics_limit, aliases: self.metrics_aliases }
    }
}
