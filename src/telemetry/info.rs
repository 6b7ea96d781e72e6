//! The `_info` series, written from the facts of the moment.

use super::{
    catalog,
    config::{MetricsAliases, MetricsConfig},
    exposition::Exposition,
};

/// Writes every family.
pub(super) fn write(config: &MetricsConfig, page: &mut Exposition) {
    let MetricsConfig { model, version, git, device, dtype, estimator, serving, reference, generation, .. } = config;
    let experts = config.layers.iter().map(|&(_, experts)| experts).max().unwrap_or(0);
    page.single(&catalog::BUILD_INFO, &[version, git], 1.0);
    page.single(&catalog::MODEL_INFO, &[model, generation, dtype, device, &config.num_layers, &experts, &config.top_k], 1.0);
    page.single(&catalog::ROUTING_INFO, &[model, serving, reference, estimator], 1.0);
    page.single(&catalog::CACHE_INFO, &[model, &config.cache_block_tokens, &config.cache_blocks], 1.0);
    if config.series.aliases == MetricsAliases::Vllm {
        page.single(&catalog::VLLM_CACHE_INFO, &[model, &config.cache_block_tokens, &config.cache_blocks], 1.0);
    }
}
