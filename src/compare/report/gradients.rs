//! Gradients of one token: the task on which nothing is trained.

use super::{heading, line, or_dash};
use crate::compare::{
    quality::{OneToken, Quality, cross_entropy, one_token, quadratic},
    results::Results,
    spec::TaskName,
    table::figure,
};

/// The section; it says so if its cells were not run.
pub(super) fn section(results: &Results) -> String {
    let arms = one_token(results);
    let title = "## Gradients of one token\n\n";
    let Some(size) = arms.first().map(|arm| arm.spec.size) else {
        return format!("{title}Not run: the task `{}` was not asked for.\n\n", TaskName::Gradient.id());
    };
    let rows = arms.iter().map(row).collect::<String>();
    format!(
        "{title}{} experts with fixed outputs, everything enumerated; {} random problems, {} draws each of an estimator that draws. Medians over the \
         problems with [first..third quartile], for squared error / cross-entropy; least bias first.\n\n{}{rows}\n",
        TaskName::Gradient.experts(),
        size.test,
        size.batch,
        heading(&["arm", "in force", "relative bias", "cosine", "relative std of one draw"]),
    )
}

fn row(arm: &OneToken<'_>) -> String {
    let name = match arm.failed {
        0 => format!("`{}`", arm.arm().name),
        failed => format!("`{}` ({} of {} seeds: {failed} failed)", arm.arm().name, arm.found.len(), arm.found.len() + failed),
    };
    let both = [arm.quality(quadratic), arm.quality(cross_entropy)];
    let pair = |of: fn(&Quality) -> Option<String>| both.each_ref().map(|quality| or_dash(quality.as_ref().and_then(of))).join(" / ");
    line([
        name,
        in_force(arm),
        pair(|quality| Some(ranging(quality.bias.to_string(), quality.quartiles.map(|of| of.bias.map(|bias| figure(bias.most())))))),
        pair(|quality| quality.cosine.map(figure)),
        pair(|quality| Some(ranging(figure(quality.std), quality.quartiles.map(|of| of.std.map(figure))))),
    ])
}

/// With its quartiles, where they are apart.
fn ranging(middle: String, quartiles: Option<[String; 2]>) -> String {
    match quartiles {
        Some([low, high]) if low != high => format!("{middle} [{low}..{high}]"),
        _ => middle,
    }
}

/// Where schedules stand.
fn in_force(arm: &OneToken<'_>) -> String {
    let Some(result) = arm.found.first() else { return or_dash(None) };
    let number = |name: &str, value: Option<f64>| value.map(|value| format!("{name} {}", figure(value)));
    let words: Vec<String> = [number("temperature", result.sharpness), number("noise", result.noise)].into_iter().flatten().collect();
    if words.is_empty() { or_dash(None) } else { words.join(", ") }
}
