//! The report for a terminal.

use std::fmt::{self, Display, Formatter};

use super::{
    super::verdict::{Direction, MATERIAL},
    AdviceReport, ExpertReport, PlanReport, PolicyReport, Report,
};

/// Columns of a terminal table, as wide as their widest cell, numbers to the right.
#[derive(Default)]
struct Table(Vec<Vec<String>>);

impl Table {
    fn new(head: &[&str]) -> Self {
        Self(vec![head.iter().map(|&cell| cell.to_owned()).collect()])
    }

    fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.0.push(cells.into_iter().collect());
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.0.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.0 {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let number = |row: &Vec<String>| {
                    row.get(column).is_some_and(|cell| cell.starts_with(|c: char| c.is_ascii_digit() || "+-".contains(c)))
                };
                let pad = " ".repeat(width - cell.chars().count());
                line += &if column > 0 && self.0.last().is_some_and(number) { format!("  {pad}{cell}") } else { format!("  {cell}{pad}") };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let assumed = if self.reference.assumed { " (assumed: the checkpoint does not say so)" } else { "" };
        writeln!(f, "reference  {}{assumed}", names(&self.reference.name, &self.reference.aliases))?;
        let corpus = &self.corpus;
        writeln!(f, "text       {} tokens in {} windows of at most {}", corpus.tokens, corpus.windows, corpus.window)?;
        match &self.floor {
            None => writeln!(f, "noise      not measured: thresholds are taken as they are")?,
            Some(noise) => {
                let forms: Vec<&str> = noise.forms.iter().map(|form| form.form.as_str()).collect();
                writeln!(
                    f,
                    "noise      KL {}, other likeliest token {}, perplexity {}, other experts {} of tokens; a gap counts above {MATERIAL} \
                     times that ({})",
                    number(noise.floor.kl),
                    percent(noise.floor.top1_disagree),
                    percent(noise.floor.perplexity_gap),
                    percent(noise.floor.tokens_flipped),
                    forms.join("; ")
                )?;
            }
        }
        writeln!(f, "\nAt the logits, free-running\n{}", outputs(&self.policies))?;
        for policy in &self.policies {
            writeln!(f, "Layers under {}\n{}", names(&policy.name, &policy.aliases), layers(policy))?;
        }
        if let Some(advice) = &self.advice {
            write!(f, "{advice}")?;
        }
        write_experts(f, &self.watched, &self.experts)?;
        writeln!(f, "Verdict")?;
        for policy in &self.policies {
            let verdict = &policy.verdict;
            let direction = match verdict.quality.direction {
                Direction::Better => "better",
                Direction::Same => "the same",
                Direction::Worse => "worse",
            };
            let name = names(&policy.name, &policy.aliases);
            writeln!(f, "  {name}: fidelity {}, quality {} ({direction})", verdict.fidelity.level.name(), verdict.quality.level.name())?;
            writeln!(f, "    {}", verdict.sentence(&policy.name))?;
        }
        Ok(())
    }
}

fn outputs(policies: &[PolicyReport]) -> Table {
    let mut table =
        Table::new(&["routing", "mean k", "KL", "p95", "JS", "same top-1", "of top-5", "perplexity", "gap", "95 % interval", "flipped"]);
    for policy in policies {
        let (output, perplexity) = (&policy.output, &policy.output.perplexity);
        table.row([
            names(&policy.name, &policy.aliases),
            format!("{:.2}", policy.mean_k()),
            number(output.kl.mean),
            number(output.kl.p95),
            number(output.js.mean),
            percent(output.top1_agree),
            percent(output.top5_overlap),
            format!("{:.3} of {:.3}", perplexity.served, perplexity.reference),
            signed(perplexity.gap),
            perplexity.interval.map_or_else(|| "-".into(), |[low, high]| format!("{} to {}", signed(low), signed(high))),
            percent(policy.tokens_flipped),
        ]);
    }
    table
}

fn layers(policy: &PolicyReport) -> Table {
    let mut table = Table::new(&[
        "layer",
        "level",
        "l2 pooled",
        "p50",
        "p95",
        "p99",
        "cosine",
        "length",
        "missed",
        "disagree",
        "boundary",
        "overlap",
        "drift",
        "dead",
    ]);
    for layer in &policy.layers {
        table.row([
            layer.layer.to_string(),
            layer.level.name().to_owned(),
            number(layer.l2_rel_pooled),
            number(layer.l2_rel.p50),
            number(layer.l2_rel.p95),
            number(layer.l2_rel.p99),
            number(layer.cosine_distance.mean),
            number(layer.norm_ratio.mean),
            number(layer.missed_mass.mean),
            number(layer.disagreement),
            percent(layer.boundary_mass),
            percent(layer.overlap),
            number(layer.input_drift),
            layer.load.dead.to_string(),
        ]);
    }
    table
}

impl Display for AdviceReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "Which layers are to blame: KL where only this one is served with top-1")?;
        let mut table = Table::new(&["layer", "KL alone", "part", "of its squared gap left at k = 2, 3, ..."]);
        for blame in &self.blame {
            let left: Vec<String> = blame.left.iter().skip(1).map(|&left| percent(left)).collect();
            table.row([blame.layer.to_string(), number(blame.kl_alone), percent(blame.share), left.join(", ")]);
        }
        writeln!(f, "{table}")?;
        let where_ = if self.held_out { "other text" } else { "the same text: there is one window only" };
        writeln!(f, "A k for each layer, chosen on {} tokens and run on {} ({where_})", self.chosen_on, self.checked_on)?;
        let mut table = Table::new(&["", "k", "mean k", "KL expected", "KL measured", "same top-1", "perplexity"]);
        let mut row = |name: &str, plan: &PlanReport| {
            table.row([
                name.to_owned(),
                list(&plan.k),
                format!("{:.2}", plan.mean_k),
                number(plan.predicted_kl),
                number(plan.measured_kl),
                percent(plan.top1_agree),
                signed(plan.perplexity.gap),
            ]);
        };
        row("top-1", &self.top_1);
        self.plans.iter().for_each(|plan| row("advice", plan));
        self.opposites.iter().for_each(|plan| row("the wrong way round", plan));
        row("top-2", &self.top_2);
        write!(f, "{table}")?;
        match self.stands_out {
            Some(layer) => writeln!(f, "  Layer {layer} is to blame more than others: a larger k belongs there first.")?,
            None => writeln!(f, "  No layer is to blame much more than others: a larger k buys about the same anywhere.")?,
        }
        if let Some(plan) = self.better_than_top_2() {
            let (mean_k, kl, top_2) = (plan.mean_k, number(plan.measured_kl), number(self.top_2.measured_kl));
            writeln!(
                f,
                "  k {} is closer to the reference than top-2 (KL {kl} against {top_2}) with {mean_k:.2} experts instead of {:.2}.",
                list(&plan.k),
                self.top_2.mean_k
            )?;
        }
        writeln!(f)
    }
}

fn write_experts(f: &mut Formatter<'_>, watched: &str, experts: &[ExpertReport]) -> fmt::Result {
    /// More does not fit a terminal; JSON and pictures have all.
    const SHOWN: usize = 16;
    let more =
        if experts.iter().any(|layer| layer.utilization.len() > SHOWN) { format!(" (first {SHOWN} of a layer)") } else { String::new() };
    writeln!(f, "Load under {watched}, in fair shares, and the tokens that speak most for an expert{more}")?;
    let mut table = Table::new(&["layer", "expert", "load", "tokens"]);
    for layer in experts {
        for (expert, (load, typical)) in layer.utilization.iter().zip(&layer.typical).enumerate().take(SHOWN) {
            let tokens: Vec<String> = typical.iter().map(|token| format!("{:?}", token.text)).collect();
            table.row([layer.layer.to_string(), expert.to_string(), format!("{load:.2}"), tokens.join(" ")]);
        }
    }
    writeln!(f, "{table}")
}

fn names(name: &str, aliases: &[String]) -> String {
    if aliases.is_empty() { name.to_owned() } else { format!("{name} (= {})", aliases.join(" = ")) }
}

fn list(ks: &[usize]) -> String {
    ks.iter().map(usize::to_string).collect::<Vec<_>>().join(",")
}

/// Three digits that say something.
fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    if value.abs() < 1e-4 {
        return format!("{value:.1e}");
    }
    let decimals = (2 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
    format!("{value:.decimals$}")
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn signed(share: f64) -> String {
    format!("{:+.2} %", share * 100.0)
}
