//! Tuning: a trained model learns under soft routing what it loses under hard routing, on some of its tensors.
//!
//! [`config`] is what a run is told and [`plan`] that, checked against a model; [`select`] says which tensors learn, [`data`] on which
//! tokens. [`tuner`] trains copies of those tensors over the shared rest, [`teacher`] being the model as it was. What comes out is a
//! [`candidate`]: a few tensors, how good they are ([`evaluate`]), and whether that is good enough to be served ([`gates`]). Until
//! then it is in a [`store`], from which a run goes on after whatever ended it. What it does meanwhile is told as [`record`]s.
//!
//! **Two gaps.** The *own* gap is between the served routing and the reference routing of the same weights: what hard routing costs.
//! A router that has only become sharper closes it too, by giving up the mixture. So the distance from the reference routing of the
//! model *before* stands beside it everywhere, and perplexity is a gate.

pub mod candidate;
pub mod config;
pub mod data;
pub mod evaluate;
pub mod gates;
pub mod memory;
pub mod plan;
pub mod record;
pub mod select;
pub mod store;
pub mod teacher;
pub mod tuner;

#[cfg(test)]
mod tests;
