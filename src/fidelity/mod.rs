//! The fidelity gap: how far hard serving is from the routing that a model was trained under, layer by layer and at the logits.
//!
//! [`measure`] has the measures, one token at a time, and [`summary`] makes few numbers of many: both are pure, and whoever has two
//! outputs can use them. [`probe`] looks into the layers of a forward in which several routings ([`case`]) run side by side, [`run`]
//! drives such forwards over windows of text, [`floor`] measures the noise. [`verdict`] and [`advice`] decide, [`study`] puts all of it
//! together for `hardmax fidelity`, and [`report`] shows it. [`shadow`] and [`pacing`] decide what is measured while requests are served,
//! and when: the engine does it.
//!
//! **Local and free-running.** Local: every layer gets the hidden state of the reference run, and both forms are computed from it, so
//! the gap is that layer's own. Free-running: each routing keeps its own hidden state, and gaps compound; that is what a client sees.
//!
//! **The identity.** For one token with reference weights that sum to W, served experts S with `r` of that weight outside of them,
//! and the weighted means `ŷ_S`, `ŷ_R` of the expert outputs inside and outside of S: weights renormalised to W give a difference of
//! exactly `r (ŷ_R - ŷ_S)`, weights left as they are `r ŷ_R`. The gap is missed mass times disagreement. Outputs are those of the
//! routed experts; a shared expert is the same on both sides and is left out of numerator and denominator.

pub mod advice;
pub mod case;
pub mod corpus;
pub mod experts;
pub mod floor;
pub mod measure;
pub mod pacing;
pub mod probe;
pub mod report;
pub mod run;
pub mod shadow;
pub mod study;
pub mod summary;
pub mod verdict;

#[cfg(test)]
mod tests;
