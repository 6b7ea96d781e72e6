//! The whole of an offline study: gaps, noise, experts, advice.

use super::{
    advice::{LayerCost, Plan, factor, opposite, plan, predict},
    case::Case,
    corpus::{Corpus, most_frequent, occurrences},
    floor::{Floor, floor},
    probe::Probe,
    report::{
        AdviceReport, ExpertReport, FloorReport, LayerBlame, LayerReport, ModelFacts, PlanReport, PolicyReport, ReferenceFacts, Report,
    },
    run::{OutputGaps, run},
    verdict::Verdict,
};
use crate::{
    error::{Error, Result},
    model::{ModelSpec, ReferenceRouting, load::ServingModel},
    moe::policy::RoutingChoice,
};

/// Tokens that are followed one by one.
const FOLLOWED: usize = 24;
/// Tokens that are told of each expert.
const TYPICAL: usize = 8;
/// Served routings in one forward.
const SIDE_BY_SIDE: usize = 6;
/// The largest k that advice looks at, where the model has none larger.
const LADDER: usize = 4;
/// A KL that is rounding.
const NOTHING: f64 = 1e-9;

/// What to study.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to compare with; `None`: what the checkpoint was trained under.
    pub reference: Option<RoutingChoice>,
    /// Served routings.
    pub cases: Vec<Case>,
    /// Most tokens of the text.
    pub max_tokens: usize,
    /// Tokens for the noise floor; 0 leaves it out.
    pub floor_tokens: usize,
    /// Tokens to choose on and as many to check on, for advice; 0 leaves it out.
    pub advice_tokens: usize,
    /// Budgets of mean k to advise on.
    pub mean_k: Vec<f64>,
}

/// A model, and the same in other arithmetic for the noise floor.
#[derive(Clone, Debug)]
pub struct Models {
    /// As it is to be judged.
    pub served: ServingModel,
    /// With what they are, for people.
    pub others: Vec<(ServingModel, String)>,
}

/// What is running, and how many tokens were added.
pub type Progress<'a> = &'a mut dyn FnMut(&str, usize);

/// Measures all of it. `decode` makes text of a token.
///
/// Fails with `InvalidArgument` where the text has fewer than two tokens or a layer cannot do what a case asks for, and where the model
/// fails.
pub fn study(
    models: &Models,
    corpus: &Corpus,
    options: &Options,
    decode: &dyn Fn(u32) -> String,
    progress: Progress<'_>,
) -> Result<Report> {
    let spec = models.served.spec();
    let windows = corpus.windows(options.max_tokens);
    if windows.is_empty() {
        return Err(Error::invalid("--text", "the files hold fewer than two tokens"));
    }
    let sides = Sides::new(spec, options)?;
    let counts = occurrences(&windows);
    let followed = most_frequent(&counts, FOLLOWED);
    let mut probe = Probe::new(spec, &sides.cases, 0, sides.watched, &followed)?;
    let outputs = run(&models.served, &sides.cases, &windows, Some(&mut probe), &mut |tokens| progress("gap", tokens))?;

    let mut forms = Vec::new();
    for (other, form) in models.others.iter().filter(|_| options.floor_tokens > 0) {
        progress(&format!("noise: {form}"), 0);
        forms.push(floor(&models.served, (other, form), &RoutingChoice::Native.into(), &corpus.windows(options.floor_tokens))?);
    }
    let noise = (!forms.is_empty()).then(|| Floor::of(&forms));
    let policies = (0..outputs.len()).map(|served| sides.policy(spec, &probe, served, &outputs[served], noise.as_ref()));
    let experts = probe.layers.iter().map(|layer| ExpertReport::new(layer, sides.watched, TYPICAL, &counts, decode));
    Ok(Report {
        model: ModelFacts::new(spec, models.served.dtype()),
        corpus: corpus.facts(&windows),
        reference: sides.reference_facts(),
        policies: policies.collect::<Result<_>>()?,
        floor: noise.map(|floor| FloorReport { floor, forms }),
        watched: sides.name(sides.watched),
        followed: followed.iter().map(|&token| decode(token)).collect(),
        experts: experts.collect(),
        advice: advise(&models.served, &windows, options, sides.reference, progress)?,
    })
}

/// The routings that run side by side, those that are the same once.
struct Sides {
    reference: RoutingChoice,
    /// The checkpoint does not say that it was trained under the reference.
    assumed: bool,
    /// The reference first.
    cases: Vec<Case>,
    /// Other names of each.
    aliases: Vec<Vec<String>>,
    /// The case whose experts are told: the native one where it is there.
    watched: usize,
}

impl Sides {
    fn new(spec: &ModelSpec, options: &Options) -> Result<Self> {
        let trained = spec.reference.choice();
        let reference = options.reference.unwrap_or(trained);
        let policies = |choice: RoutingChoice| Case::from(choice).policies(spec);
        let (native, mut known) = (policies(RoutingChoice::Native)?, vec![policies(reference)?]);
        let unsaid = spec.reference == ReferenceRouting::OwnTopK { assumed: true };
        let assumed = unsaid || known[0] != policies(trained)?;
        let mut sides = Self { reference, assumed, cases: vec![reference.into()], aliases: vec![Vec::new()], watched: 0 };
        for case in &options.cases {
            let policies = case.policies(spec)?;
            match known.iter().position(|other| *other == policies) {
                Some(same) if sides.cases[same].name == case.name => {}
                Some(same) => sides.aliases[same].push(case.name.clone()),
                None => {
                    sides.cases.push(case.clone());
                    sides.aliases.push(Vec::new());
                    known.push(policies);
                }
            }
        }
        sides.watched = known.iter().position(|policies| *policies == native).unwrap_or(sides.cases.len() - 1);
        Ok(sides)
    }

    fn name(&self, case: usize) -> String {
        self.cases[case].name.clone()
    }

    fn reference_facts(&self) -> ReferenceFacts {
        ReferenceFacts { name: self.name(0), aliases: self.aliases[0].clone(), assumed: self.assumed }
    }

    fn policy(&self, spec: &ModelSpec, probe: &Probe, served: usize, output: &OutputGaps, floor: Option<&Floor>) -> Result<PolicyReport> {
        let case = &self.cases[served + 1];
        Ok(PolicyReport {
            name: case.name.clone(),
            aliases: self.aliases[served + 1].clone(),
            k: case.experts_per_token(spec)?,
            output: *output,
            tokens_flipped: probe.flipped[served] as f64 / probe.tokens.max(1) as f64,
            layers: probe.layers.iter().map(|layer| LayerReport::new(layer, served, probe.tokens)).collect(),
            verdict: Verdict::new(output, floor),
        })
    }
}

/// Chooses on every second window and checks on the others. `None` where there is nothing to gain.
fn advise(
    model: &ServingModel,
    windows: &[&[u32]],
    options: &Options,
    reference: RoutingChoice,
    progress: Progress<'_>,
) -> Result<Option<AdviceReport>> {
    if options.advice_tokens == 0 || options.mean_k.is_empty() {
        return Ok(None);
    }
    let half = |first: usize| up_to(windows.iter().skip(first).step_by(2).copied(), options.advice_tokens);
    let (choose_on, check_on) = (half(0), if windows.len() > 1 { half(1) } else { half(0) });
    let (costs, together) = costs(model, &choose_on, reference, progress)?;
    if together < NOTHING {
        return Ok(None);
    }
    let factor = factor(&costs, together);
    let plans: Vec<Plan> = options.mean_k.iter().map(|&mean_k| plan(&costs, mean_k, factor)).collect();
    let top = |k: usize| costs.iter().map(|cost| k.min(cost.squared.len().max(1))).collect::<Vec<_>>();
    let others = plans.iter().map(|plan| opposite(&plan.k));
    let others = [top(1), top(2)].into_iter().chain(others).map(|k| Plan { predicted_kl: predict(&costs, &k, factor), k });
    let all: Vec<Plan> = plans.iter().cloned().chain(others).collect();
    let outputs = run_plans(model, &check_on, reference, &all, progress)?;
    let told = |at: usize| PlanReport::new(&all[at], &outputs[at]);
    let n = plans.len();
    let blame: Vec<LayerBlame> = costs.iter().map(|cost| LayerBlame::new(cost, &costs)).collect();
    Ok(Some(AdviceReport {
        chosen_on: choose_on.iter().map(|window| window.len()).sum(),
        checked_on: check_on.iter().map(|window| window.len()).sum(),
        held_out: windows.len() > 1,
        stands_out: AdviceReport::outstanding(&blame),
        blame,
        top_1: told(n),
        top_2: told(n + 1),
        plans: (0..n).map(told).collect(),
        opposites: (n + 2..all.len()).map(told).collect(),
    }))
}

/// What each layer costs alone, and all of them together, at k = 1.
fn costs(model: &ServingModel, windows: &[&[u32]], reference: RoutingChoice, progress: Progress<'_>) -> Result<(Vec<LayerCost>, f64)> {
    let spec = model.spec();
    let hard = RoutingChoice::TopK { k: 1, weight_form: None };
    let ladder = spec.moe_layers().map(|(_, moe)| moe.top_k).max().unwrap_or(1).max(LADDER);
    let first = [Case::from(reference), Case::from(hard)];
    let mut probe = Probe::new(spec, &first, ladder, 0, &[])?;
    let together = run(model, &first, windows, Some(&mut probe), &mut |tokens| progress("advice: local gaps", tokens))?[0].kl.mean;
    let alone: Vec<Case> = spec.moe_layers().map(|(layer, _)| Case::only(layer, hard, reference, spec)).collect();
    let mut costs = Vec::new();
    for (group, layers) in alone.chunks(SIDE_BY_SIDE).zip(probe.layers.chunks(SIDE_BY_SIDE)) {
        let cases: Vec<Case> = std::iter::once(reference.into()).chain(group.iter().cloned()).collect();
        let outputs = run(model, &cases, windows, None, &mut |tokens| progress("advice: one layer hard", tokens))?;
        costs.extend(layers.iter().zip(outputs).map(|(layer, output)| LayerCost {
            layer: layer.layer,
            alone: output.kl.mean,
            squared: layer.ladder.iter().map(|gap| gap.l2_rel().powi(2)).collect(),
        }));
    }
    Ok((costs, together))
}

fn run_plans(
    model: &ServingModel,
    windows: &[&[u32]],
    reference: RoutingChoice,
    plans: &[Plan],
    progress: Progress<'_>,
) -> Result<Vec<OutputGaps>> {
    let mut outputs = Vec::new();
    for group in plans.chunks(SIDE_BY_SIDE) {
        let cases = group.iter().map(|plan| Case::layer_k("--mean-k", model.spec(), &plan.k));
        let cases: Vec<Case> = std::iter::once(Ok(reference.into())).chain(cases).collect::<Result<_>>()?;
        outputs.extend(run(model, &cases, windows, None, &mut |tokens| progress("advice: applied", tokens))?);
    }
    Ok(outputs)
}

/// Windows with so many tokens at most, together; at least one.
fn up_to<'a>(windows: impl Iterator<Item = &'a [u32]>, tokens: usize) -> Vec<&'a [u32]> {
    let mut taken = 0;
    let fits = |window: &&[u32]| {
        let first = taken == 0;
        taken += window.len();
        first || taken <= tokens
    };
    windows.take_while(fits).collect()
}
