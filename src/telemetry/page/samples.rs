//! Reads the Prometheus text format back, so that the page shows what Prometheus is told and nothing is counted twice.

use std::collections::BTreeMap;

use serde::Serialize;

/// One line of the format.
#[derive(Debug, PartialEq)]
pub(super) struct Sample<'a> {
    pub(super) name: &'a str,
    pub(super) labels: BTreeMap<&'a str, String>,
    pub(super) value: f64,
}

/// The buckets of a histogram, as the format has them: counts include those of smaller bounds.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Buckets {
    /// Upper bounds, ascending. The last is infinite, which JSON writes as null.
    pub(super) le: Vec<f64>,
    /// As many.
    pub(super) count: Vec<f64>,
}

/// The samples of a text. Comments and lines that cannot be read are left out.
pub(super) fn samples(text: &str) -> impl Iterator<Item = Sample<'_>> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(sample)
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let (name, mut rest) = line.split_at(line.find(['{', ' '])?);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, quoted) = rest.split_once("=\"")?;
            let (value, after) = unquote(quoted)?;
            labels.insert(label.trim_start_matches([',', ' ']), value);
            rest = after;
        }
        rest = &rest[1..];
    }
    let value = rest.split_whitespace().next()?.parse().ok()?;
    Some(Sample { name, labels, value })
}

/// A label's value up to the quote that closes it, and what follows.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match chars.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

impl Buckets {
    /// Takes the next bucket, of the same histogram.
    pub(super) fn push(&mut self, sample: &Sample<'_>) {
        if let Some(bound) = sample.labels.get("le").and_then(|bound| bound.parse().ok()) {
            self.le.push(bound);
            self.count.push(sample.value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_exporters_write() {
        let text = concat!(
            "# HELP a_total Text.\n# TYPE a_total counter\n",
            "a_total 3\n",
            "b{model=\"x\\\"\\\\\\ny}\",layer=\"3\"} 0.5\n",
            "c_bucket{le=\"+Inf\"} 7 1700000000\n",
            "\nbroken{a=\"1\n broken\nbroken{} x\n",
        );
        let found: Vec<_> = samples(text).collect();
        assert_eq!(found.len(), 3, "{found:?}");
        assert_eq!((found[0].name, found[0].value), ("a_total", 3.0));
        assert_eq!(found[1].labels, BTreeMap::from([("model", "x\"\\\ny}".to_owned()), ("layer", "3".to_owned())]));
        assert_eq!((found[2].labels["le"].as_str(), found[2].value), ("+Inf", 7.0));
    }

    #[test]
    fn buckets_end_at_infinity() {
        let mut buckets = Buckets::default();
        samples("h_bucket{le=\"0.5\"} 2\nh_bucket{le=\"+Inf\"} 3\nh_sum 9\n").for_each(|sample| buckets.push(&sample));
        assert_eq!(serde_json::to_string(&buckets).unwrap(), r#"{"le":[0.5,null],"count":[2.0,3.0]}"#);
    }
}
