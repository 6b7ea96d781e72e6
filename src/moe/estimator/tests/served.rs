//! What becomes of a trained router: its reference, its folding, its hard weights.

use super::*;
use crate::{model::ReferenceRouting, moe::estimator::StepContext};

#[test]
fn the_reference_has_as_many_experts_as_the_training() {
    let own = ReferenceRouting::OwnTopK { assumed: false };
    for name in ["steep_sigmoid", "soft_topk", "gumbel_topk", "raw_topk", "default_moe"] {
        let of = |k| spec(name, Some(k), &[], 8).at(STEPS, STEPS);
        assert_eq!(of(2).reference(1), ReferenceRouting::TopK { k: 2 }, "{name}");
        assert_eq!(of(1).reference(2), ReferenceRouting::TopK { k: 1 }, "{name}");
        assert_eq!([of(1).reference(1), of(2).reference(2)], [own, own], "{name}");
    }
    for name in ["soft", "steep", "gumbel_soft"] {
        assert_eq!(spec(name, None, &[], 8).at(STEPS, STEPS).reference(2), ReferenceRouting::Soft { temperature: 1.0 }, "{name}");
    }
    assert_eq!(spec("entmax", None, &[], 8).at(STEPS, STEPS).reference(1), own);
}

#[test]
fn a_router_is_divided_by_the_temperature_of_its_softmax() {
    let folding = |name, temperature| spec(name, None, &[("temperature", number(temperature))], 8).at(0, 1).folding();
    assert_eq!([folding("soft", 0.5), folding("ste", 2.0), folding("gumbel_soft", 0.3)], [0.5, 2.0, 0.3]);
    assert_eq!([folding("reinmax", 1.5), folding("steep_sigmoid", 0.1), folding("entmax", 0.5)], [1.0; 3]);
}

/// What draws its experts is saved, and its losses are taken, with the probabilities that it draws with.
#[test]
fn a_temperature_that_shapes_the_gradient_alone_is_not_folded() {
    let drawn = |name, k, noise: f64| {
        let estimator = spec(name, k, &[("temperature", number(0.3)), ("noise", number(noise))], 8).at(0, 1);
        (estimator.folding(), estimator.temperature())
    };
    assert_eq!([drawn("gumbel_st", None, 1.0), drawn("gumbel_st", None, 2.5)], [(1.0, 1.0), (2.5, 2.5)]);
    assert_eq!(drawn("gumbel_st", None, 0.0), (0.3, 0.3), "without noise it is ste");
    assert_eq!(drawn("gumbel_soft", None, 1.0), (0.3, 0.3), "a mixture");
    assert_eq!([drawn("gumbel_topk", Some(2), 2.0), drawn("gumbel_topk", Some(2), 0.0)], [(1.0, 2.0), (1.0, 0.3)]);
    let at = |name, params: &[(&str, Param)]| spec(name, None, params, 8).at(0, 1).temperature();
    assert_eq!(at("ste", &[("temperature", number(2.0)), ("sampled", Param::Flag(true))]), 2.0);
    assert_eq!([at("reinmax", &[("temperature", number(1.5))]), at("raw_topk", &[]), at("reinforce", &[])], [1.0; 3]);
    assert_eq!([at("sparsemixer_v2", &[]), at("sparsemixer_v2", &[("star", Param::Flag(true))])], [1.0, 2.0]);
}

/// At top-2, where the probabilities show, what is evaluated is what is saved.
#[test]
fn hard_weights_are_those_of_the_saved_router() {
    let z = [0.4, -0.3, 1.1, 0.0];
    for name in ["reinmax", "ste", "gumbel_st"] {
        let estimator = spec(name, None, &[("temperature", number(1.5))], 4).at(0, 1);
        let routed = estimator.hard(2).route(&z, 4, &StepContext::evaluate(Draw::new(0, 0, 0)));
        let odds = ((z[0] - z[2]) / estimator.folding()).exp();
        assert!((routed.weights[0] / routed.weights[2] - odds).abs() < 1e-12, "{name}");
    }
}
