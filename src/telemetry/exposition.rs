//! Writes the Prometheus text format, for series that the `metrics` crate has no type for.

use std::fmt::Write;

/// Text in the making.
#[derive(Debug, Default)]
pub(super) struct Exposition {
    text: String,
}

/// Type of a family.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Counter,
    Gauge,
    Histogram,
}

impl Exposition {
    /// Opens a family; its samples follow.
    pub(super) fn family(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        // Writing to a String does not fail, here and below.
        let _ = writeln!(self.text, "# HELP {name} {}\n# TYPE {name} {kind}", escape(help));
    }

    /// One sample of the family above.
    pub(super) fn sample(&mut self, name: &str, labels: &[(&str, &dyn std::fmt::Display)], value: f64) {
        self.text.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let open = if index == 0 { '{' } else { ',' };
            let _ = write!(self.text, "{open}{label}=\"{}\"", escape(&value.to_string()).replace('"', "\\\""));
        }
        let close = if labels.is_empty() { "" } else { "}" };
        let _ = writeln!(self.text, "{close} {value}");
    }

    pub(super) fn finish(self) -> String {
        self.text
    }
}

fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_escapes() {
        let mut page = Exposition::default();
        page.family("a_total", Kind::Counter, "Two\nlines.");
        page.sample("a_total", &[("model", &"x\"\\\n"), ("layer", &3)], 1.5);
        page.sample("a_total", &[], 0.0);
        let expected = "# HELP a_total Two\\nlines.\n# TYPE a_total counter\na_total{model=\"x\\\"\\\\\\n\",layer=\"3\"} 1.5\na_total 0\n";
        assert_eq!(page.finish(), expected);
    }
}
