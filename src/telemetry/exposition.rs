//! Writes the Prometheus text format, for series that the `metrics` crate has no type for.

use std::fmt::{Display, Write};

use super::catalog::Family;

/// Text in the making.
#[derive(Debug, Default)]
pub(super) struct Exposition {
    text: String,
}

/// A histogram with fixed buckets. Unlike those of the `metrics` crate it keeps no observation, so that thousands a step cost little.
#[derive(Clone, Debug)]
pub(super) struct FixedHistogram {
    bounds: &'static [f64],
    /// One more than `bounds`: the last is what is above all.
    counts: Vec<u64>,
    sum: f64,
}

impl Exposition {
    /// Opens a family; its samples follow.
    pub(super) fn family(&mut self, family: &Family) {
        let Family { name, help, kind, .. } = family;
        // Writing to a String does not fail, here and below.
        let _ = writeln!(self.text, "# HELP {name} {}\n# TYPE {name} {}", escape(help), kind.exported());
    }

    /// One sample of the family above, with a value for each of its labels.
    pub(super) fn sample(&mut self, family: &Family, labels: &[&dyn Display], value: f64) {
        self.line(family, "", labels, None, value);
    }

    /// A family that has one sample.
    pub(super) fn single(&mut self, family: &Family, labels: &[&dyn Display], value: f64) {
        self.family(family);
        self.sample(family, labels, value);
    }

    /// One histogram of the family above.
    pub(super) fn histogram(&mut self, family: &Family, labels: &[&dyn Display], histogram: &FixedHistogram) {
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().chain([&f64::INFINITY]).zip(&histogram.counts) {
            below += count;
            let bound = if bound.is_infinite() { "+Inf".to_owned() } else { bound.to_string() };
            self.line(family, "_bucket", labels, Some(&bound), below as f64);
        }
        self.line(family, "_sum", labels, None, histogram.sum);
        self.line(family, "_count", labels, None, below as f64);
    }

    fn line(&mut self, family: &Family, suffix: &str, values: &[&dyn Display], le: Option<&str>, value: f64) {
        debug_assert_eq!(values.len(), family.labels.len(), "labels of {}", family.name);
        self.text.push_str(family.name);
        self.text.push_str(suffix);
        let labels = family.labels.iter().zip(values).map(|(label, value)| (label.name, value.to_string()));
        let mut open = '{';
        for (label, value) in labels.chain(le.map(|le| ("le", le.to_owned()))) {
            let _ = write!(self.text, "{open}{label}=\"{}\"", escape(&value).replace('"', "\\\""));
            open = ',';
        }
        let close = if open == '{' { "" } else { "}" };
        let _ = writeln!(self.text, "{close} {value}");
    }

    pub(super) fn finish(self) -> String {
        self.text
    }
}

impl FixedHistogram {
    /// Nothing observed.
    pub(super) fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    /// One observation.
    pub(super) fn record(&mut self, value: f64) {
        self.sum += value;
        self.counts[self.bounds.partition_point(|&bound| bound < value)] += 1;
    }

    /// Observations with a sum that is known more exactly than they are.
    pub(super) fn record_all(&mut self, values: impl Iterator<Item = f64>, sum: f64) {
        let sum = self.sum + sum;
        values.for_each(|value| self.record(value));
        self.sum = sum;
    }

    /// Observations.
    pub(super) fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Of all of them.
    pub(super) fn sum(&self) -> f64 {
        self.sum
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::{
        super::catalog::{Buckets, Kind, Label, Presence, Values},
        *,
    };

    const LABELS: &[Label] = &[Label { name: "model", values: Values::Fact("x") }, Label { name: "layer", values: Values::Fact("y") }];

    fn family(kind: Kind, labels: &'static [Label]) -> Family {
        let (name, help) = ("a", "Two\nlines.");
        Family { name, kind, labels, unit: "", help, moves: "", presence: Presence::Always, buckets: Buckets::None }
    }

    #[test]
    fn lines_and_escapes() {
        let mut page = Exposition::default();
        page.single(&family(Kind::Counter, LABELS), &[&"x\"\\\n", &3], 1.5);
        page.sample(&family(Kind::Counter, &[]), &[], 0.0);
        let expected = "# HELP a Two\\nlines.\n# TYPE a counter\na{model=\"x\\\"\\\\\\n\",layer=\"3\"} 1.5\na 0\n";
        assert_eq!(page.finish(), expected);
    }

    #[test]
    fn buckets_add_up() {
        let mut sizes = FixedHistogram::new(&[1.0, 2.0]);
        [1.0, 1.5, 2.0, 7.0].into_iter().for_each(|value| sizes.record(value));
        let mut page = Exposition::default();
        page.histogram(&family(Kind::Histogram, &[]), &[], &sizes);
        assert_eq!(page.finish(), "a_bucket{le=\"1\"} 1\na_bucket{le=\"2\"} 3\na_bucket{le=\"+Inf\"} 4\na_sum 11.5\na_count 4\n");
    }
}
