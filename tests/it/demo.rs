//! The shipped model keeps what its card promises.

use std::path::Path;

use hardmax::{
    model::{
        ReferenceRouting,
        load::{DeviceKind, Loaded, WeightType, load},
    },
    moe::policy::RoutingChoice,
    train::{data, evaluate::evaluate, tokenizer::END_OF_TEXT},
};

fn demo() -> Loaded {
    load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo"), DeviceKind::Cpu, WeightType::Auto, false).unwrap()
}

/// The first held-out tokens.
fn heldout(loaded: &Loaded, tokens: usize) -> Vec<u32> {
    let file = loaded.checkpoint.dir().join("data/heldout.txt");
    let tokenizer = loaded.checkpoint.tokenizer().unwrap();
    let documents = data::read_documents(&[file], "\n\n").unwrap();
    let mut ids = data::tokenize(&documents[..3], &tokenizer, tokenizer.token_to_id(END_OF_TEXT).unwrap()).unwrap();
    ids.truncate(tokens);
    ids
}

#[test]
fn it_was_trained_soft_and_is_served_hard() {
    let loaded = demo();
    let spec = loaded.decoder.spec();
    assert_eq!((spec.estimator.as_str(), spec.reference), ("gumbel_soft", ReferenceRouting::Soft { temperature: 1.0 }));
    assert!(spec.moe_layers().count() >= 4 && spec.moe_layers().all(|(_, moe)| moe.num_experts >= 8 && moe.top_k == 1));
}

#[test]
fn hard_routing_costs_less_than_three_percent_and_no_expert_is_dead() {
    let loaded = demo();
    let tokens = heldout(&loaded, 2048);
    assert_eq!(tokens.len(), 2048);
    let under = |routing| evaluate(&loaded.decoder, &tokens, loaded.decoder.spec().max_context, routing).unwrap();
    let soft = under(RoutingChoice::Soft { temperature: None });
    let hard = under(RoutingChoice::Native);
    assert!(soft.perplexity < 40.0, "soft perplexity {}", soft.perplexity);
    assert!(hard.perplexity < 1.03 * soft.perplexity, "{} hard, {} soft", hard.perplexity, soft.perplexity);
    assert!(hard.layers.iter().all(|layer| layer.dead() == 0), "{:?}", hard.layers);
}
