//! The catalogue and the arms in words: `hardmax compare --list`.

use std::fmt::{self, Write as _};

use super::{
    arms::{arms, left_out},
    spec::TaskName,
};
use crate::{
    moe::estimator::catalog::{CATALOG, KRange, Kind, Row, Way},
    schedule::Shape,
};

/// Everything that can be compared.
pub fn list() -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text);
    text
}

fn write(text: &mut String) -> fmt::Result {
    CATALOG.iter().try_for_each(|row| write_row(text, row))?;
    for task in TaskName::ALL {
        for mode in task.modes() {
            let names: Vec<String> = arms(task, *mode).into_iter().map(|arm| arm.name).collect();
            writeln!(text, "arms of {}, {}:\n    {}", task.id(), mode.id(), names.join(" "))?;
        }
        for (estimator, reason) in left_out(task) {
            writeln!(text, "    without {estimator}: {reason}")?;
        }
    }
    Ok(())
}

fn write_row(text: &mut String, row: &Row) -> fmt::Result {
    writeln!(text, "{}: {}", row.name, row.title)?;
    for (name, value) in [("forward", row.forward), ("backward", row.backward), ("source", row.source), ("note", row.note)] {
        writeln!(text, "    {name:<9} {value}")?;
    }
    writeln!(text, "    {:<9} {}", "k", k_in_words(row.k))?;
    for param in row.params {
        writeln!(text, "    {:<9} {}; {}", param.name, default_in_words(param.kind), param.doc)?;
    }
    writeln!(text)
}

fn k_in_words(k: KRange) -> String {
    match k {
        KRange::None => "none: all experts are weighed".into(),
        KRange::One => "1".into(),
        KRange::From { from } => format!("{from} unless stated"),
        KRange::BelowExperts => "1 unless stated, fewer than all".into(),
    }
}

/// The default of a setting.
pub fn default_in_words(kind: Kind) -> String {
    match kind {
        Kind::Scheduled { default: Way::Constant(value), .. } => format!("{value} (may be a schedule)"),
        Kind::Scheduled { default: Way::Along(shape, from, to), .. } => format!("{from} to {to}, {} (may be a number)", form(shape)),
        Kind::Number { default, .. } => format!("{default}"),
        Kind::Choice { options, default: [one, more] } if one == more => format!("{one}, of {}", options.join(", ")),
        Kind::Choice { options, default: [one, more] } => format!("{one}, at k above 1 {more}, of {}", options.join(", ")),
        Kind::Flag => "false".into(),
    }
}

fn form(shape: Shape) -> &'static str {
    match shape {
        Shape::Constant => "constant",
        Shape::Linear => "straight",
        Shape::Exp => "geometric",
        Shape::Cosine => "half a cosine",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_and_every_setting_is_listed() {
        let text = list();
        for row in CATALOG {
            assert!(text.contains(&format!("{}: {}", row.name, row.title)), "{}", row.name);
            assert!(row.params.iter().all(|param| text.contains(param.doc)), "{}", row.name);
        }
        assert!(text.contains("2 to 0.3, geometric") && text.contains("experts_only"));
        assert!(text.contains("    without dselect_k: its router has no output for each expert"));
    }
}
