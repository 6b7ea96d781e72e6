//! The rows of the catalogue.

use super::{KRange, Kind, ParamRow, Range, Row, Way};
use crate::{
    moe::{
        estimator::{
            Baseline, Combine, Estimator, Execution, Gradient, Kernel, Mask, Noise, NoiseKind, Regulariser, Relaxation, Scope, Selection,
            Weights, values::Values,
        },
        policy::WeightForm,
    },
    schedule::Shape,
};

/// Hard top-k of a plain softmax, executed as chosen: what rows below differ from.
const TOP_K: Estimator = Estimator {
    relaxation: Relaxation::Softmax { temperature: 1.0 },
    noise: Noise::NONE,
    selection: Selection::TopK { k: 1 },
    weights: Weights::Chosen,
    gradient: Gradient::Exact,
    combine: Combine::Mixture(Execution::Chosen),
    serve: WeightForm::Renorm,
};

/// The relaxation itself, all experts executed.
const DENSE: Estimator =
    Estimator { selection: Selection::All, weights: Weights::Relaxed, combine: Combine::Mixture(Execution::All), ..TOP_K };

/// The hard forward with the backward of the relaxation, all experts executed.
const STRAIGHT: Estimator = Estimator {
    weights: Weights::Renorm,
    gradient: Gradient::StraightThrough { normalised: false },
    combine: Combine::Mixture(Execution::All),
    ..TOP_K
};

const TEMPERATURE: ParamRow = ParamRow {
    name: "temperature",
    kind: Kind::Scheduled { default: Way::Constant(1.0), range: Range::Positive },
    doc: "of the relaxation; smaller is steeper",
};

const fn temperature(init: f64, end: f64) -> ParamRow {
    ParamRow { kind: Kind::Scheduled { default: Way::Along(Shape::Exp, init, end), range: Range::Positive }, ..TEMPERATURE }
}

const NOISE: ParamRow = ParamRow {
    name: "noise",
    kind: Kind::Scheduled { default: Way::Constant(1.0), range: Range::NotNegative },
    doc: "factor on the Gumbel noise; 1 samples the softmax",
};

fn softmax(values: &Values<'_>) -> Relaxation {
    Relaxation::Softmax { temperature: values.number("temperature") }
}

fn top_k(values: &Values<'_>) -> Selection {
    Selection::TopK { k: values.k }
}

fn gumbel(scale: f64, scope: Scope) -> Noise {
    Noise { kind: NoiseKind::Gumbel, scale, scope, dropout: 0.0 }
}

/// Most methods add nothing to the loss.
fn none(_: &Values<'_>) -> Regulariser {
    Regulariser::None
}

/// Weights over the chosen by the words `raw` and `renorm`, and the form that serves them.
fn form(word: &str) -> (Weights, WeightForm) {
    if word == "raw" { (Weights::Chosen, WeightForm::Raw) } else { (Weights::Renorm, WeightForm::Renorm) }
}

/// Every estimator, in the order in which they are listed to people.
pub const CATALOG: &[Row] = &[
    Row {
        name: "onehot",
        title: "un-weighted one-hot",
        forward: "1/k for the k largest logits",
        backward: "0",
        source: "-",
        note: "The broken baseline: only auxiliary losses move the router.",
        k: KRange::From { from: 1 },
        params: &[],
        laboratory_only: Some("its router gets no gradient: it is a baseline of `hardmax compare`"),
        regulariser: none,
        build: |v| Estimator { selection: top_k(v), weights: Weights::Unit, gradient: Gradient::Zero, serve: WeightForm::Unit, ..TOP_K },
    },
    Row {
        name: "renorm_topk",
        title: "renormalised top-k",
        forward: "g = p over its sum, of the k largest",
        backward: "g ⊙ (c - <g,c>) of the chosen, 0 elsewhere; identically 0 at k = 1",
        source: "Shazeer et al. 2017 (1701.06538); Mixtral (2401.04088)",
        note: "At k = 1 the weight is 1 for every router: the other broken baseline.",
        k: KRange::From { from: 2 },
        params: &[],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator { selection: top_k(v), weights: Weights::Renorm, ..TOP_K },
    },
    Row {
        name: "raw_topk",
        title: "top-k weighted by the softmax (Switch at k = 1)",
        forward: "p of the k largest",
        backward: "J (c ⊙ m): not 0 for any logit, through the normaliser",
        source: "Shazeer et al. 2017 (1701.06538); Switch Transformer (2101.03961)",
        note: "The gradient is that of the weight, standing in for that of the choice: no counterfactual.",
        k: KRange::From { from: 1 },
        params: &[],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator { selection: top_k(v), serve: WeightForm::Raw, ..TOP_K },
    },
    Row {
        name: "noisy_topk",
        title: "noisy top-k",
        forward: "softmax of the noisy logits of the k largest; the deviation of the normal noise is learned, softplus of E further router outputs and 0.01",
        backward: "exact at the draw, for the noise outputs too",
        source: "Shazeer et al. 2017 (1701.06538)",
        note: "The noise outputs begin at 0, as in the paper, and the deviation at ln 2 + 0.01. A checkpoint has the first E rows of its router only, the logits.",
        k: KRange::From { from: 1 },
        params: &[ParamRow {
            name: "weights",
            kind: Kind::Choice { options: &["raw", "renorm"], default: ["raw", "renorm"] },
            doc: "the softmax as it is, or over its sum of the chosen; renorm at k = 1 has no gradient",
        }],
        laboratory_only: None,
        regulariser: none,
        build: |v| {
            let (weights, serve) = form(v.word("weights"));
            let noise = Noise { kind: NoiseKind::Learned, scale: 1.0, scope: Scope::Both, dropout: 0.0 };
            Estimator { noise, selection: top_k(v), weights, serve, ..TOP_K }
        },
    },
    Row {
        name: "ste",
        title: "straight-through, dense backward",
        forward: "as served: 1 at k = 1, p over its sum of the k largest above",
        backward: "J c",
        source: "Bengio, Léonard and Courville 2013 (1308.3432)",
        note: "To be served hard: its mixture was never trained.",
        k: KRange::From { from: 1 },
        params: &[
            TEMPERATURE,
            ParamRow { name: "sampled", kind: Kind::Flag, doc: "draw the experts from the softmax instead of taking the largest" },
        ],
        laboratory_only: None,
        regulariser: none,
        build: |v| {
            let temperature = v.number("temperature");
            let noise = if v.flag("sampled") { gumbel(temperature, Scope::Selection) } else { Noise::NONE };
            Estimator { relaxation: softmax(v), noise, selection: top_k(v), ..STRAIGHT }
        },
    },
    Row {
        name: "ste_sparse",
        title: "straight-through, only the chosen executed",
        forward: "as ste",
        backward: "J (c ⊙ m)",
        source: "Bengio, Léonard and Courville 2013 (1308.3432), restricted to what ran",
        note: "The weights of serving at the cost of serving; unstable over seeds.",
        k: KRange::From { from: 1 },
        params: &[TEMPERATURE],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator { relaxation: softmax(v), selection: top_k(v), combine: Combine::Mixture(Execution::Chosen), ..STRAIGHT },
    },
    Row {
        name: "densemixer",
        title: "DenseMixer",
        forward: "raw: p of the k largest; renorm: that over its sum n",
        backward: "raw: J c; renorm: J v, v = (c - <g,c>)/n of the chosen and c/n elsewhere, there with the n of the k most probable",
        source: "Yao et al. 2025 (OpenReview 4HGIIekCx3)",
        note: "The forward of the conventional router with credit for every expert.",
        k: KRange::From { from: 1 },
        params: &[ParamRow {
            name: "form",
            kind: Kind::Choice { options: &["raw", "renorm"], default: ["raw", "raw"] },
            doc: "weights of the forward, and of serving",
        }],
        laboratory_only: None,
        regulariser: none,
        build: |v| {
            let (weights, serve) = form(v.word("form"));
            Estimator { selection: top_k(v), weights, serve, gradient: Gradient::StraightThrough { normalised: true }, ..STRAIGHT }
        },
    },
    Row {
        name: "reinmax",
        title: "ReinMax",
        forward: "one-hot, drawn from softmax(z)",
        backward: "2 J(π) c - ½ J(p) c, π = ½ (softmax(z / temperature) + one-hot)",
        source: "Liu et al. 2023 (2304.08612)",
        note: "Second order: exact in expectation for a quadratic loss at temperature 1. High variance.",
        k: KRange::One,
        params: &[ParamRow {
            kind: Kind::Scheduled { default: Way::Constant(1.0), range: Range::AtLeast(1.0) },
            doc: "of the softmax in π; the draw is at 1 whatever it is",
            ..TEMPERATURE
        }],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator {
            relaxation: softmax(v),
            noise: gumbel(1.0, Scope::Selection),
            weights: Weights::Unit,
            gradient: Gradient::ReinMax,
            ..STRAIGHT
        },
    },
    Row {
        name: "sparsemixer_v2",
        title: "SparseMixer-v2",
        forward: "s p̃ at each of k draws from the masked softmax p̃; s = 1 for the largest logit, else 1 or ⅓ by a coin",
        backward: "J (c ⊙ m) of each draw, twice that for the starred variant",
        source: "Liu et al. 2024, GRIN (2409.12136, appendix A); released PhiMoE code for the mask",
        note: "Served with its masked softmaxes, which do not sum to 1 at k = 2.",
        k: KRange::From { from: 1 },
        params: &[
            ParamRow {
                name: "r",
                kind: Kind::Scheduled { default: Way::Constant(0.1), range: Range::Positive },
                doc: "logits farther than this from the largest, relatively, are masked",
            },
            ParamRow {
                name: "mask",
                kind: Kind::Choice { options: &["code", "paper"], default: ["code", "code"] },
                doc: "how far is measured as the released code does it, or the paper",
            },
            ParamRow { name: "star", kind: Kind::Flag, doc: "the variant v2*: softmax of z/2, and a coin of 5/8 instead of 1/4" },
        ],
        laboratory_only: Some("a checkpoint in the layout of Mixtral cannot say that it is served with masked softmaxes"),
        regulariser: none,
        build: |v| {
            let star = v.flag("star");
            let temperature = if star { 2.0 } else { 1.0 };
            let mask = if v.word("mask") == "paper" { Mask::Paper } else { Mask::Code };
            Estimator {
                relaxation: Relaxation::MaskedSoftmax { r: v.number("r"), temperature, mask },
                noise: gumbel(temperature, Scope::Selection),
                selection: top_k(v),
                weights: Weights::Corrected { star },
                gradient: Gradient::Corrected { star },
                serve: WeightForm::Raw,
                ..TOP_K
            }
        },
    },
    Row {
        name: "default_moe",
        title: "Default MoE",
        forward: "p of all; for experts that are not among the k largest the running mean of their outputs stands in",
        backward: "J ĉ, ĉ with the running means",
        source: "Panda et al. 2025 (2504.12463)",
        note: "Dense credit at sparse cost. The means are not served: that is its gap.",
        k: KRange::From { from: 1 },
        params: &[ParamRow {
            name: "ema",
            kind: Kind::Number { default: 0.95, range: Range::Between(0.0, 1.0) },
            doc: "weight of the past in the running means",
        }],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator {
            selection: top_k(v),
            weights: Weights::Relaxed,
            combine: Combine::Means { decay: v.number("ema") },
            serve: WeightForm::Raw,
            ..TOP_K
        },
    },
    Row {
        name: "gumbel_soft",
        title: "Gumbel-softmax",
        forward: "softmax((z + noise · G) / temperature)",
        backward: "exact at the draw",
        source: "Jang et al. 2017 (1611.01144); Maddison et al. 2017 (1611.00712)",
        note: "Bias falls and variance grows as the temperature falls.",
        k: KRange::None,
        params: &[
            temperature(2.0, 0.3),
            ParamRow { kind: Kind::Scheduled { default: Way::Along(Shape::Linear, 1.0, 0.0), range: Range::NotNegative }, ..NOISE },
        ],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator { relaxation: softmax(v), noise: gumbel(v.number("noise"), Scope::Both), ..DENSE },
    },
    Row {
        name: "gumbel_st",
        title: "straight-through Gumbel-softmax",
        forward: "one-hot at the largest of z + noise · G",
        backward: "J c of softmax((z + noise · G) / temperature)",
        source: "Jang et al. 2017 (1611.01144)",
        note: "An exact sample forward; biased, and noisier as the temperature falls.",
        k: KRange::One,
        params: &[temperature(2.0, 0.3), NOISE],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator { relaxation: softmax(v), noise: gumbel(v.number("noise"), Scope::Both), weights: Weights::Unit, ..STRAIGHT },
    },
    Row {
        name: "gumbel_topk",
        title: "Gumbel top-k",
        forward: "1/k for the k largest of z + noise · G: a draw without replacement",
        backward: "J c of the k-hot relaxation, over k",
        source: "Kool et al. 2019 (1903.06059); Xie and Ermon 2019 (1901.10517)",
        note: "At k = 1 it is gumbel_st, whose temperature begins at 2.",
        k: KRange::From { from: 1 },
        params: &[temperature(1.0, 0.3), NOISE],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator {
            relaxation: Relaxation::KHot { temperature: v.number("temperature"), k: v.k },
            noise: gumbel(v.number("noise"), Scope::Both),
            selection: top_k(v),
            weights: Weights::Unit,
            serve: WeightForm::Unit,
            ..STRAIGHT
        },
    },
    Row {
        name: "soft",
        title: "dense softmax mixture",
        forward: "softmax(z / temperature)",
        backward: "exact",
        source: "Jacobs et al. 1991",
        note: "Exact for its own objective; the gap to hard routing is the whole story.",
        k: KRange::None,
        params: &[TEMPERATURE],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator { relaxation: softmax(v), ..DENSE },
    },
    Row {
        name: "steep",
        title: "steep softmax: the dense mixture, annealed",
        forward: "softmax(z / temperature)",
        backward: "exact",
        source: "2605.02124 for the bound on the gap",
        note: "soft with another default: the mixture becomes hard while it trains.",
        k: KRange::None,
        params: &[temperature(2.0, 0.1)],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator { relaxation: softmax(v), ..DENSE },
    },
    Row {
        name: "steep_sigmoid",
        title: "steep sigmoid",
        forward: "σ((z - θ) / temperature) over its sum, θ between the k-th logit and the next",
        backward: "exact, through θ too",
        source: "-",
        note: "Becomes top-k with weights 1/k.",
        k: KRange::BelowExperts,
        params: &[temperature(1.0, 0.1)],
        laboratory_only: None,
        regulariser: none,
        build: |v| Estimator {
            relaxation: Relaxation::SteepSigmoid { temperature: v.number("temperature"), k: v.k },
            serve: WeightForm::Unit,
            ..DENSE
        },
    },
    Row {
        name: "sparsemax",
        title: "sparsemax",
        forward: "[z / temperature - t]_+, t such that the sum is 1",
        backward: "exact: v minus its mean, on the support",
        source: "Martins and Astudillo 2016 (1602.02068)",
        note: "One-hot, and so without a gap, where the largest logit leads by the temperature.",
        k: KRange::None,
        params: &[TEMPERATURE],
        laboratory_only: None,
        regulariser: none,
        build: |v| entmax(2.0, v.number("temperature")),
    },
    Row {
        name: "entmax",
        title: "α-entmax",
        forward: "[(α-1) z / temperature - t]_+^(1/(α-1)), t such that the sum is 1",
        backward: "exact: s ⊙ (v - <s,v>/<s,1>), s = p^(2-α) on the support",
        source: "Peters, Niculae and Martins 2019 (1905.05702)",
        note: "One-hot where the largest logit leads by temperature/(α-1). Served with one expert: over two, a checkpoint would weigh by the softmax.",
        k: KRange::None,
        params: &[
            ParamRow {
                name: "alpha",
                kind: Kind::Number { default: 1.5, range: Range::Alpha },
                doc: "2 is sparsemax, towards 1 it becomes the softmax",
            },
            TEMPERATURE,
        ],
        laboratory_only: None,
        regulariser: none,
        build: |v| entmax(v.number("alpha"), v.number("temperature")),
    },
    Row {
        name: "soft_topk",
        title: "soft top-k with a shared threshold",
        forward: "F((z - b) / width) / k, b such that the sum is 1",
        backward: "exact: q ⊙ (v - <q,v>/<q,1>) / (width k), q the density",
        source: "LapSum: Struski et al. 2025 (2503.06242); logistic: Xie et al. 2020 (2002.06504); clipped: SparseK, Lou et al. 2024 (2406.16747)",
        note: "Becomes top-k with weights 1/k.",
        k: KRange::BelowExperts,
        params: &[
            ParamRow {
                name: "kernel",
                kind: Kind::Choice { options: &["laplace", "logistic", "clip"], default: ["laplace", "laplace"] },
                doc: "F; clip gives exact zeros, and only experts above 0 run",
            },
            ParamRow {
                name: "width",
                kind: Kind::Scheduled { default: Way::Along(Shape::Exp, 0.5, 0.1), range: Range::Positive },
                doc: "of the step; smaller is steeper",
            },
        ],
        laboratory_only: None,
        regulariser: none,
        build: |v| {
            let kernel = match v.word("kernel") {
                "logistic" => Kernel::Logistic,
                "clip" => Kernel::Clip,
                _ => Kernel::Laplace,
            };
            let (selection, execution) =
                if kernel == Kernel::Clip { (Selection::Support, Execution::Chosen) } else { (Selection::All, Execution::All) };
            Estimator {
                relaxation: Relaxation::SoftTopK { kernel, width: v.number("width"), k: v.k },
                selection,
                combine: Combine::Mixture(execution),
                serve: WeightForm::Unit,
                ..DENSE
            }
        },
    },
    Row {
        name: "dselect_k",
        title: "DSelect-k",
        forward: "Σ_s softmax(v)_s r_s: k selectors of ⌈log2 E⌉ smoothed bits each",
        backward: "exact",
        source: "Hazimeh et al. 2021 (2106.03760)",
        note: "Ends with exact zeros; a saturated bit never moves again.",
        k: KRange::From { from: 1 },
        params: &[
            ParamRow {
                name: "gamma",
                kind: Kind::Number { default: 1.0, range: Range::Positive },
                doc: "width of the smoothed step of a bit",
            },
            ParamRow {
                name: "entropy",
                kind: Kind::Scheduled { default: Way::Constant(1e-6), range: Range::NotNegative },
                doc: "weight of the selectors' entropy in the loss, which drives them to single experts",
            },
        ],
        laboratory_only: Some("a checkpoint cannot hold its router, whose outputs are not one logit per expert"),
        regulariser: |v| Regulariser::Selectors { weight: v.number("entropy"), gamma: v.number("gamma"), k: v.k },
        build: |v| Estimator {
            relaxation: Relaxation::SmoothStep { gamma: v.number("gamma"), k: v.k },
            selection: Selection::Support,
            combine: Combine::Mixture(Execution::Chosen),
            ..DENSE
        },
    },
    Row {
        name: "reinforce",
        title: "REINFORCE",
        forward: "p over its sum, of k experts drawn without replacement",
        backward: "(L - b) ∇ log π of the draw, and the exact gradient of the weights",
        source: "Williams 1992; leave-one-out: Kool et al. 2019; self-critical: Rennie et al. 2017 (1612.00563)",
        note: "Unbiased where L is the loss of the token; high variance, and `samples` forward passes.",
        k: KRange::From { from: 1 },
        params: &[
            ParamRow {
                name: "baseline",
                kind: Kind::Choice { options: BASELINES, default: ["leave_one_out", "leave_one_out"] },
                doc: "b: nothing, a moving average, the mean of the other draws, or the loss without noise (one more forward pass)",
            },
            ParamRow { name: "samples", kind: Kind::Number { default: 4.0, range: Range::Count(1) }, doc: "draws per token" },
            ParamRow {
                name: "decay",
                kind: Kind::Number { default: 0.99, range: Range::Between(0.0, 1.0) },
                doc: "weight of the past in the moving average",
            },
            ParamRow {
                name: "bonus",
                kind: Kind::Scheduled { default: Way::Along(Shape::Linear, 0.01, 0.0), range: Range::NotNegative },
                doc: "weight of the softmax's entropy, subtracted from the loss",
            },
        ],
        laboratory_only: None,
        regulariser: |v| Regulariser::EntropyBonus { weight: v.number("bonus") },
        build: |v| {
            let baseline = match v.word("baseline") {
                "none" => Baseline::None,
                "moving_average" => Baseline::MovingAverage { decay: v.number("decay") },
                "self_critical" => Baseline::SelfCritical,
                _ => Baseline::LeaveOneOut,
            };
            Estimator {
                noise: gumbel(1.0, Scope::Selection),
                selection: top_k(v),
                weights: Weights::Renorm,
                gradient: Gradient::Score { baseline, samples: v.number("samples") as usize },
                ..TOP_K
            }
        },
    },
    Row {
        name: "smear",
        title: "SMEAR: merged experts",
        forward: "one expert with the parameters Σ p θ",
        backward: "exact",
        source: "Muqeeth et al. 2023 (2306.03745)",
        note: "Another function than any mixture of outputs, except for linear experts. Here a token at a time: the mean over a sequence would see what comes after.",
        k: KRange::None,
        params: &[
            TEMPERATURE,
            ParamRow {
                name: "dropout",
                kind: Kind::Number { default: 0.1, range: Range::Probability },
                doc: "probability that an expert is left out for a token",
            },
        ],
        laboratory_only: Some("a merged expert per token is another function than what a checkpoint is served with"),
        regulariser: none,
        build: |v| Estimator {
            relaxation: softmax(v),
            noise: Noise { dropout: v.number("dropout"), ..Noise::NONE },
            combine: Combine::Merged,
            ..DENSE
        },
    },
    Row {
        name: "remoe",
        title: "ReMoE: ReLU routing",
        forward: "max(z, 0)",
        backward: "exact, on the active experts",
        source: "Wang et al. 2024 (2412.14711)",
        note: "Trained as served; a penalty with its own controller makes the mean number of experts k. A token may have none.",
        k: KRange::BelowExperts,
        params: &[
            ParamRow {
                name: "penalty",
                kind: Kind::Number { default: 1e-8, range: Range::Positive },
                doc: "first weight of the penalty on active experts",
            },
            ParamRow {
                name: "factor",
                kind: Kind::Number { default: 1.2, range: Range::AtLeast(1.0) },
                doc: "by which the weight grows or falls each step, towards k active experts",
            },
        ],
        laboratory_only: Some("a checkpoint in the layout of Mixtral cannot say that its weights are a ReLU"),
        regulariser: |v| Regulariser::Sparsity { initial: v.number("penalty"), factor: v.number("factor"), k: v.k },
        build: |_| Estimator {
            relaxation: Relaxation::Relu,
            selection: Selection::Support,
            combine: Combine::Mixture(Execution::Chosen),
            serve: WeightForm::Raw,
            ..DENSE
        },
    },
    Row {
        name: "sigmoid_topk",
        title: "top-k weighted by sigmoids",
        forward: "σ(z) of the k largest; renorm: over its sum",
        backward: "exact; renorm at k = 1: 0",
        source: "DeepSeek-V3 (2412.19437) for the normalised form",
        note: "Experts do not compete in the weights.",
        k: KRange::From { from: 1 },
        params: &[
            TEMPERATURE,
            ParamRow {
                name: "weights",
                kind: Kind::Choice { options: &["raw", "renorm"], default: ["raw", "renorm"] },
                doc: "the sigmoid as it is, or over its sum of the chosen; renorm at k = 1 has no gradient",
            },
        ],
        laboratory_only: Some("a checkpoint in the layout of Mixtral cannot say that its weights are sigmoids"),
        regulariser: none,
        build: |v| {
            let (weights, serve) = form(v.word("weights"));
            Estimator {
                relaxation: Relaxation::Sigmoid { temperature: v.number("temperature") },
                selection: top_k(v),
                weights,
                serve,
                ..TOP_K
            }
        },
    },
];

/// Words of the setting `baseline`.
const BASELINES: &[&str] = &["none", "moving_average", "leave_one_out", "self_critical"];

fn entmax(alpha: f64, temperature: f64) -> Estimator {
    Estimator {
        relaxation: Relaxation::Entmax { alpha, temperature },
        selection: Selection::Support,
        combine: Combine::Mixture(Execution::Chosen),
        ..DENSE
    }
}
