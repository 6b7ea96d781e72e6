//! `docs/estimators-reference.md` says what the catalogue says and what the checks refuse.

use super::*;
use crate::{
    compare::list::default_in_words,
    model::ReferenceRouting,
    moe::{
        estimator::{
            Estimator, Expected, Needs,
            catalog::{ParamRow, Row},
        },
        loss::AuxLoss,
        policy::WeightForm,
        remedy::CAP,
    },
    train::routing::{RoutingConfig, RunShape},
};

/// No k of a row is as many.
const EXPERTS: usize = 7;

fn page() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/estimators-reference.md")).unwrap()
}

/// Cells of the rows of all tables in a part of the page, without their heads.
fn tables(part: &str) -> Vec<Vec<&str>> {
    let lines: Vec<&str> = part.lines().collect();
    let head = |i: usize| lines.get(i + 1).is_some_and(|next| next.starts_with("|-"));
    let rows = lines.iter().enumerate().filter(|(i, _)| !head(*i)).filter_map(|(_, line)| line.strip_prefix("| ")?.strip_suffix(" |"));
    rows.map(|row| row.split(" | ").collect()).collect()
}

/// A word or a flag, and the parameter that sets it.
type Variant = (&'static str, [(&'static str, Param); 1]);

/// Every word and flag of a row in turn that is not its default at two experts.
fn variants(row: &Row) -> Vec<Variant> {
    let of_param = |param: &ParamRow| -> Vec<Variant> {
        match param.kind {
            Kind::Flag => vec![(param.name, [(param.name, Param::Flag(true))])],
            Kind::Choice { options, default } => {
                let others = options.iter().filter(|option| **option != default[1]);
                others.map(|option| (*option, [(param.name, word(option))])).collect()
            }
            Kind::Number { .. } | Kind::Scheduled { .. } => Vec::new(),
        }
    };
    row.params.iter().flat_map(of_param).collect()
}

/// Half-way through a run, with two experts where the row lets one choose.
fn at(row: &Row, params: &[(&str, Param)]) -> Estimator {
    let k = matches!(row.k, KRange::From { .. } | KRange::BelowExperts).then_some(2);
    spec(row.name, k, params, EXPERTS).at(STEPS / 2, STEPS)
}

/// `words` of a row with its defaults, and of those variants where they differ.
fn in_words(row: &Row, words: impl Fn(&Estimator) -> String) -> String {
    let usual = words(&at(row, &[]));
    let other = |(name, params): Variant| Some((name, words(&at(row, &params)))).filter(|(_, words)| *words != usual);
    let others = variants(row).into_iter().filter_map(other).map(|(name, words)| format!("; with `{name}` {words}"));
    usual.clone() + &others.collect::<String>()
}

fn k(k: KRange) -> String {
    match k {
        KRange::None => "none".into(),
        KRange::One => "1".into(),
        KRange::From { from } => format!("1 to E, {from} unless stated"),
        KRange::BelowExperts => "1 to E - 1, 1 unless stated".into(),
    }
}

fn executed(estimator: &Estimator) -> String {
    let (copies, samples) = (estimator.copies(), estimator.gradient.samples());
    let of_copy = match estimator.executed_per_token(EXPERTS) {
        Expected::Exactly(n) if n == EXPERTS * copies => "E",
        Expected::Exactly(n) if n == estimator.k() * copies => "k",
        Expected::AtMost(_) => "those with a weight above 0",
        Expected::Merged => "1, merged from all E",
        Expected::Exactly(n) => panic!("{n} experts: the page has no words for it"),
    };
    match (copies, samples) {
        (1, 1) => of_copy.into(),
        _ if copies == samples => format!("{of_copy} for each of the `samples` draws"),
        _ => format!("{of_copy} for each of the `samples` draws and for the greedy copy"),
    }
}

fn needs(estimator: &Estimator) -> String {
    let Needs { dense, noise, state, outputs, backward, merge } = estimator.needs();
    let all = [
        (dense, "dense execution"),
        (noise, "noise"),
        (state, "state"),
        (outputs, "further router outputs"),
        (backward, "its own backward"),
        (merge, "merged parameters"),
    ];
    let needed: Vec<&str> = all.into_iter().filter_map(|(needed, words)| needed.then_some(words)).collect();
    if needed.is_empty() { "nothing".into() } else { needed.join(", ") }
}

fn serving(row: &Row) -> String {
    if let Some(reason) = row.laboratory_only {
        return format!("not saved: {reason}");
    }
    // What moves the folding is what the router is divided by.
    let folding = |name, value| at(row, &[(name, number(value))]).folding();
    let scheduled = row.params.iter().filter(|param| matches!(param.kind, Kind::Scheduled { .. })).map(|param| param.name);
    let divided = scheduled.filter(|name| folding(name, 1.5) != folding(name, 2.5)).map(|name| format!(", the router divided by `{name}`"));
    let reference = match at(row, &[]).reference(1) {
        ReferenceRouting::Soft { temperature: 1.0 } => "the mixture of all experts",
        ReferenceRouting::TopK { k: 2 } => "hard top-k",
        ReferenceRouting::OwnTopK { .. } => "hard top-1",
        other => panic!("{other:?}: the page has no words for it"),
    };
    let form = |serve| match serve {
        WeightForm::Raw => "are the softmax as it is",
        WeightForm::Renorm => "renormalised over the chosen",
        WeightForm::Unit => "1/k",
    };
    let usual = at(row, &[]).serve;
    let said_by = variants(row).into_iter().map(|(_, params)| params).find(|params| at(row, params).serve != usual).map(|[(name, _)]| name);
    let weights = said_by.map_or(form(usual).to_owned(), |param| format!("as `{param}` says"));
    format!("saved{}; compared with {reference}; weights {weights}", divided.collect::<String>())
}

/// Rows of the two tables of a section; what the page adds to one of the last kind comes after a full stop.
fn wanted(row: &Row) -> Vec<(Vec<String>, bool)> {
    let source = if row.source == "-" { "none" } else { row.source };
    let mut wanted: Vec<(Vec<String>, bool)> = [
        ("forward", row.forward.to_owned(), false),
        ("backward", row.backward.to_owned(), false),
        ("k", k(row.k), false),
        ("experts in training", in_words(row, executed), true),
        ("needs", in_words(row, needs), false),
        ("serving", serving(row), true),
        ("source", source.to_owned(), false),
    ]
    .map(|(name, words, remark)| (vec![name.to_owned(), words], remark))
    .into();
    wanted.extend(row.params.iter().map(|param| {
        let must = match param.kind {
            Kind::Scheduled { range, .. } | Kind::Number { range, .. } => range.to_string(),
            Kind::Choice { .. } => "one of these words".into(),
            Kind::Flag => "true or false".into(),
        };
        (vec![format!("`{}`", param.name), default_in_words(param.kind), must, param.doc.to_owned()], false)
    }));
    wanted
}

#[test]
fn the_reference_page_is_that_of_the_catalogue() {
    let page = page();
    let sections: Vec<(&str, &str)> = page.split("\n### ").skip(1).filter_map(|section| section.split_once("\n\n")).collect();
    let names: Vec<&str> = sections.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, CATALOG.iter().map(|row| format!("`{}`: {}", row.name, row.title)).collect::<Vec<_>>());
    for (row, (name, section)) in CATALOG.iter().zip(sections) {
        assert!(section.starts_with(row.note), "{name}: {}", row.note);
        let (found, wanted) = (tables(section), wanted(row));
        assert_eq!(found.len(), wanted.len(), "{name}: {found:?}");
        for (found, (wanted, remark)) in found.iter().zip(wanted) {
            let (last, words) = (found[found.len() - 1], &wanted[wanted.len() - 1]);
            let same = last == words || remark && last.starts_with(&format!("{words}. "));
            assert!(
                same && found.len() == wanted.len() && found.iter().zip(&wanted).rev().skip(1).all(|(a, b)| a == b),
                "{name}: {wanted:?}"
            );
        }
    }
}

/// The estimators that a check refuses, as the page lists them.
fn listed(refuses: impl Fn(&Row, &[(&str, Param)]) -> bool) -> String {
    let names = |wanted: bool| {
        let name = |row: &Row| {
            let usual = refuses(row, &[]) == wanted;
            let others: Vec<String> = variants(row)
                .into_iter()
                .filter(|(_, params)| (refuses(row, params) == wanted) != usual)
                .map(|(name, _)| format!("`{name}`"))
                .collect();
            let with = if usual { "without" } else { "with" };
            match (usual, others.is_empty()) {
                (_, false) => Some(format!("`{}` {with} {}", row.name, others.join(" and "))),
                (true, true) => Some(format!("`{}`", row.name)),
                (false, true) => None,
            }
        };
        CATALOG.iter().filter_map(name).collect::<Vec<_>>()
    };
    let (refused, accepted) = (names(true), names(false));
    if accepted.len() < refused.len() { format!("all but {}", accepted.join(", ")) } else { refused.join(", ") }
}

/// What the check of a recipe says to lines of its table `[routing]`.
fn refusal(row: &Row, params: &[(&str, Param)], lines: &str, purpose: Purpose, teacher: bool) -> Option<String> {
    let mut config: RoutingConfig = toml::from_str(&format!("estimator = \"{}\"\n{lines}", row.name)).unwrap();
    config.params = params.iter().map(|(name, param)| ((*name).to_owned(), param.clone())).collect();
    config.plan(RunShape { experts: EXPERTS, steps: STEPS, purpose, teacher }).err().map(|error| error.to_string())
}

/// Estimators that refuse `setting`, and nothing but it.
fn refusing(setting: &str) -> String {
    listed(|row, params| {
        let refusal = |lines: &str| refusal(row, params, lines, Purpose::Laboratory, true);
        assert_eq!(refusal("serve_k = 1"), None);
        refusal(&format!("serve_k = 1\n{setting}")).is_some()
    })
}

/// Losses with the same list of estimators together, in the order of the first of each.
fn losses() -> Vec<[String; 2]> {
    let mut groups: Vec<(Vec<String>, String)> = Vec::new();
    for loss in AuxLoss::ALL {
        let list = refusing(&format!("losses = {{ {loss} = 0.01 }}"));
        match groups.iter_mut().find(|(_, known)| *known == list) {
            Some((losses, _)) => losses.push(format!("`{loss}`")),
            None => groups.push((vec![format!("`{loss}`")], list)),
        }
    }
    let named = |losses: Vec<String>| format!("{} {}", if losses.len() == 1 { "loss" } else { "losses" }, losses.join(", "));
    groups.into_iter().map(|(losses, list)| [named(losses), list]).collect()
}

/// `serve_k` = 2 of an estimator that is saved, trained with two experts where it lets one choose.
fn two_cannot_be_served(row: &Row, params: &[(&str, Param)]) -> bool {
    let k = if matches!(row.k, KRange::From { .. } | KRange::BelowExperts) { "k = 2" } else { "" };
    let refusal = |serve_k: usize| refusal(row, params, &format!("serve_k = {serve_k}\n{k}"), Purpose::Train, false);
    assert_eq!(refusal(1).is_none(), row.exports(), "{}", row.name);
    row.exports() && refusal(2).is_some_and(|error| error.starts_with("routing.serve_k: "))
}

#[test]
fn the_reference_page_lists_what_each_setting_is_refused_with() {
    let mut wanted = losses();
    for (name, settings) in [
        ("`bias_rate`, remedy `bias_bump`", &["bias_rate = 0.1", "remedies = [\"bias_bump\"]"][..]),
        ("`epsilon` of `explore`", &["explore = { epsilon = 0.1 }"]),
        ("`dropout` of `explore`", &["explore = { dropout = 0.1 }"]),
        ("`capacity`", &["capacity = { factor = 1.25 }"]),
        ("remedy `reinit`", &["remedies = [\"reinit\"]"]),
    ] {
        let mut lists: Vec<String> = settings.iter().map(|setting| refusing(setting)).collect();
        lists.dedup();
        assert_eq!(lists.len(), 1, "{name}");
        wanted.extend(lists.pop().map(|list| [name.to_owned(), list]));
    }
    wanted.push(["`serve_k` = 2".to_owned(), listed(two_cannot_be_served)]);
    let most = format!("no balance loss with a weight above 0, or one that has the most it is raised to already, {CAP}");
    for (name, with, settings) in [
        (
            "remedy `reinit`",
            "`train` other than `all`",
            &["remedies = ['reinit']\ntrain = 'experts'", "remedies = ['reinit']\ntrain = 'router'"][..],
        ),
        (
            "remedy `raise_balance`",
            &most,
            &[
                "remedies = ['raise_balance']\nlosses = { router_z = 0.01 }",
                "remedies = ['raise_balance']\nlosses = { switch = 0.0 }",
                &format!("remedies = ['raise_balance']\nlosses = {{ switch = {CAP} }}"),
            ],
        ),
        ("loss `router_kl`", "a run without a teacher, which every one of `hardmax train` is", &["losses = { router_kl = 0.01 }"]),
        (
            "`bias_rate`, remedy `bias_bump`, `router_rate` other than 1",
            "`train` = `experts`, which keeps routers as they are",
            &["train = 'experts'\nbias_rate = 0.1", "train = 'experts'\nremedies = ['bias_bump']", "train = 'experts'\nrouter_rate = 0.5"],
        ),
    ] {
        let ste = CATALOG.iter().find(|row| row.name == "ste").unwrap();
        let refused = |setting: &&str| refusal(ste, &[], &format!("serve_k = 1\n{setting}"), Purpose::Train, false).is_some();
        assert!(settings.iter().all(refused), "{name}: {settings:?}");
        wanted.push([name.to_owned(), with.to_owned()]);
    }
    let page = page();
    let part = page.split("\n## ").find(|part| part.starts_with("What goes with what\n")).expect("the part on settings");
    let found: Vec<[&str; 2]> = tables(part).iter().map(|cells| [cells[0], cells[1]]).collect();
    assert_eq!(found, wanted);
}
