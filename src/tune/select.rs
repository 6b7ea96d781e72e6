//! Which tensors of a model learn.

use std::{collections::BTreeSet, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    model::{ModelSpec, weights::ModelWeights},
};

/// What is to learn, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum Target {
    /// All routers.
    #[default]
    Router,
    /// All routers and routed experts.
    RouterAndExperts,
    /// Everything.
    All,
    /// Tensors by name, or all below a name: `layers.3.router`, `layers.3`.
    Named(Vec<String>),
}

/// The tensors that learn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Those of [`ModelWeights::named`].
    pub names: BTreeSet<String>,
    /// Decoder layers with experts whose router stays as it is.
    pub frozen_routers: Vec<usize>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Router => f.write_str("router"),
            Self::RouterAndExperts => f.write_str("router+experts"),
            Self::All => f.write_str("all"),
            Self::Named(names) => f.write_str(&names.join(",")),
        }
    }
}

impl From<String> for Target {
    fn from(text: String) -> Self {
        match text.as_str() {
            "router" => Self::Router,
            "router+experts" => Self::RouterAndExperts,
            "all" => Self::All,
            names => Self::Named(names.split(',').map(|name| name.trim().to_owned()).collect()),
        }
    }
}

impl From<Target> for String {
    fn from(target: Target) -> Self {
        target.to_string()
    }
}

impl FromStr for Target {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        Ok(text.to_owned().into())
    }
}

impl Target {
    /// The tensors of `weights` that it means.
    ///
    /// # Errors
    /// `InvalidArgument` on `target` where a name means none, or there is no router to learn.
    pub fn select(&self, spec: &ModelSpec, weights: &ModelWeights) -> Result<Selection> {
        let all: Vec<String> = weights.named().into_iter().map(|(name, _)| name).collect();
        let ending = |endings: &[&str]| all.iter().filter(|name| endings.iter().any(|ending| name.ends_with(ending))).cloned().collect();
        let names: BTreeSet<String> = match self {
            Self::Router => ending(&[".router"]),
            Self::RouterAndExperts => ending(&[".router", ".experts.gate_up", ".experts.down"]),
            Self::All => all.iter().cloned().collect(),
            Self::Named(named) => {
                let mut names = BTreeSet::new();
                if let Some(twice) = named.iter().enumerate().find(|(at, part)| *at >= all.len() || named[..*at].contains(part)) {
                    return Err(Error::invalid("target", format!("'{}' is there twice, or more than there are tensors", twice.1)));
                }
                for part in named {
                    let below =
                        |name: &&String| name.strip_prefix(part.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
                    let found: Vec<&String> = all.iter().filter(below).collect();
                    if part.is_empty() || found.is_empty() {
                        return Err(unknown(part, &all));
                    }
                    names.extend(found.into_iter().cloned());
                }
                names
            }
        };
        if names.is_empty() {
            return Err(Error::invalid("target", format!("{self}: the model has no routed layer")));
        }
        let frozen = |layer: &usize| !names.contains(&format!("layers.{layer}.router"));
        Ok(Selection { frozen_routers: spec.moe_layers().map(|(layer, _)| layer).filter(frozen).collect(), names })
    }
}

fn unknown(part: &str, all: &[String]) -> Error {
    let mut of_first: Vec<&str> =
        all.iter().map(|name| name.strip_prefix("layers.0.").unwrap_or(name)).filter(|n| !n.starts_with("layers.")).collect();
    of_first.dedup();
    let message = format!(
        "'{part}' is none of router, router+experts, all, nor the name of a tensor or the beginning of one, as layers.0: names are {}, \
         those of layers after `layers.N.`",
        of_first.join(", ")
    );
    Error::invalid("target", message)
}
