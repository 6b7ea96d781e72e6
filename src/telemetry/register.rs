//! From the catalogue to the handles of the `metrics` crate.

use ::metrics::{Counter, Gauge, Histogram, Label};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusRecorder};

use super::catalog::{self, Buckets, Family};

/// A recorder with the buckets of the catalogue.
pub(super) fn recorder(max_context: usize) -> Result<PrometheusRecorder, BuildError> {
    let sizes = sizes_up_to(max_context);
    let builder = catalog::families().try_fold(PrometheusBuilder::new(), |builder, family| {
        let buckets = match family.buckets {
            Buckets::None => return Ok(builder),
            Buckets::Fixed(buckets) => buckets,
            Buckets::UpToContext => &sizes,
        };
        builder.set_buckets_for_metric(Matcher::Full(family.name.to_owned()), buckets)
    });
    Ok(builder?.build_recorder())
}

/// A counter of `family` with a value for each of its labels, in the recorder in force.
pub(super) fn counter(family: &Family, values: &[&str]) -> Counter {
    ::metrics::describe_counter!(family.name, family.help);
    ::metrics::counter!(family.name, labels(family, values))
}

/// As [`counter`].
pub(super) fn gauge(family: &Family, values: &[&str]) -> Gauge {
    ::metrics::describe_gauge!(family.name, family.help);
    ::metrics::gauge!(family.name, labels(family, values))
}

/// As [`counter`].
pub(super) fn histogram(family: &Family, values: &[&str]) -> Histogram {
    ::metrics::describe_histogram!(family.name, family.help);
    ::metrics::histogram!(family.name, labels(family, values))
}

fn labels(family: &Family, values: &[&str]) -> Vec<Label> {
    debug_assert_eq!(values.len(), family.labels.len(), "labels of {}", family.name);
    family.labels.iter().zip(values).map(|(label, value)| Label::new(label.name, (*value).to_owned())).collect()
}

/// 1, 2, 5, 10, 20, ... and then `limit`.
fn sizes_up_to(limit: usize) -> Vec<f64> {
    let limit = limit.max(1) as f64;
    let series = (0..).flat_map(|power| [1.0, 2.0, 5.0].map(|step| step * 10f64.powi(power)));
    series.take_while(|&size| size < limit).chain([limit]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_end_at_the_context() {
        assert_eq!(sizes_up_to(30), [1.0, 2.0, 5.0, 10.0, 20.0, 30.0]);
        assert_eq!(sizes_up_to(20), [1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!(sizes_up_to(0), [1.0]);
    }
}
