//! Perplexities by domain, for text.

use super::{framed, line, or_dash, tables::named};
use crate::compare::{
    results::{ByRouting, CellResult},
    spec::TaskName,
    table::{Runs, Table, figure},
};

/// A table of what each kind of text costs the hard model; empty for other tasks.
pub(super) fn block(table: &Table<'_>) -> String {
    let any = table.all().flat_map(|runs| &runs.steps.sound).map(|(_, result)| result).find(|result| !result.domains.is_empty());
    if table.task != TaskName::Text {
        return String::new();
    }
    let domains: Vec<&str> = any.map_or_else(Vec::new, |result| result.domains.iter().map(|of| of.domain.as_str()).collect());
    let titles: Vec<&str> = ["arm", "all text"].into_iter().chain(domains.iter().copied()).collect();
    let row = |runs: &Runs<'_>| {
        let all = perplexity(runs, |result| Some(result.loss));
        let own = |domain: &&str| perplexity(runs, |result| Some(result.domains.iter().find(|of| of.domain == **domain)?.loss));
        line([named(runs), all].into_iter().chain(domains.iter().map(own)))
    };
    format!(
        "### Perplexity\n\nPer byte under hard top-1, medians; in brackets what hardening costs: how much more that is than under the training \
         routing.\n\n{}",
        framed(table, &titles, row)
    )
}

/// Median under hard top-1, and by how much it is above that of the training routing.
fn perplexity(runs: &Runs<'_>, loss: impl Fn(&CellResult) -> Option<ByRouting>) -> String {
    let hard = runs.steps.spread(|result| Some(loss(result)?.hard1?.exp()));
    let more = runs.steps.spread(|result| loss(result).and_then(|loss| Some((loss.hard1? - loss.train?).exp_m1())));
    or_dash(hard.zip(more).map(|(hard, more)| format!("{} ({:+.1} %)", figure(hard.median), more.median * 100.0)))
}
