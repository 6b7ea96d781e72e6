//! Markdown tables.

use std::fmt;

/// A table in the making.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    title: String,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With a title and the names of its columns.
    pub(super) fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        Self { title: title.into(), rows: vec![columns.iter().map(|&column| column.to_owned()).collect()] }
    }

    /// One more row.
    pub(super) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(|column| width(column).max(3)).collect();
        writeln!(f, "{}\n", self.title)?;
        for (index, row) in self.rows.iter().enumerate() {
            for (cell, width) in row.iter().zip(&widths) {
                if cell.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
                    write!(f, "| {cell:>width$} ")?
                } else {
                    write!(f, "| {cell:<width$} ")?
                }
            }
            writeln!(f, "|")?;
            if index == 0 {
                widths.iter().try_for_each(|width| write!(f, "|{}", "-".repeat(width + 2)))?;
                writeln!(f, "|")?;
            }
        }
        Ok(())
    }
}

/// Three digits that say something, `-` for nothing.
pub(super) fn number(value: impl Into<Option<f64>>) -> String {
    match value.into() {
        None => "-".into(),
        Some(0.0) => "0".into(),
        Some(value) => {
            let decimals = (2 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
            format!("{value:.decimals$}")
        }
    }
}

/// As `number`, in percent.
pub(super) fn percent(share: impl Into<Option<f64>>) -> String {
    share.into().map_or_else(|| "-".into(), |share| format!("{:.1} %", share * 100.0))
}

/// Seconds as milliseconds.
pub(super) fn milliseconds(seconds: impl Into<Option<f64>>) -> String {
    number(seconds.into().map(|seconds| seconds * 1e3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new("Title.", &["name", "n"]);
        table.row(["a".into(), "12345".into()]);
        let expected = "Title.\n\n| name | n     |\n|------|-------|\n| a    | 12345 |\n";
        assert_eq!(table.to_string(), expected);
    }

    #[test]
    fn numbers_have_three_digits() {
        assert_eq!(
            [1234.5, 123.4, 12.34, 1.234, 0.01234, 0.0].map(number),
            ["1234", "123", "12.3", "1.23", "0.0123", "0"].map(String::from)
        );
        assert_eq!((number(None), percent(0.123), milliseconds(0.0015)), ("-".into(), "12.3 %".into(), "1.50".into()));
    }
}
