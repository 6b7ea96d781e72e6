//! The flags of `hardmax tune`, and the run that they describe.

use std::{collections::BTreeMap, fs, path::PathBuf, str::FromStr};

use clap::Args;

use super::remote::RemoteArgs;
use crate::{
    checkpoint,
    cli::compute::ComputeArgs,
    error::{Error, Result},
    moe::estimator::Param,
    tune::{
        config::{Recompute, TuneConfig},
        data::Sources,
        select::Target,
    },
};

/// Tune a checkpoint: train its routers, or more of it, under soft routing on your text, so that it loses less when served hard.
///
/// Measures before and after on held-out text: perplexity, the gap to the model's own soft routing and to that of the model before,
/// dead experts. Ends with status 1 where the result is not better, as the gates have it. Nothing is changed in place: the result is
/// a small file over the checkpoint (--delta), a checkpoint of its own (--output), or both. The table goes to standard output, progress
/// to standard error. Every setting is in the recipe too; flags come before it.
///
/// With --server the run is a job inside a server, and the result comes into force there with --publish.
#[derive(Args, Debug)]
pub struct TuneArgs {
    /// Checkpoint folder in Hugging Face layout.
    #[arg(long, env = "HARDMAX_MODEL", required_unless_present = "server")]
    pub model: Option<PathBuf>,
    /// Text files to learn from, UTF-8.
    #[arg(long, num_args = 1.., value_name = "FILE", required_unless_present_any = ["server_data", "action"])]
    pub data: Vec<PathBuf>,
    /// Text files to measure on. Default: a part of the others (run.heldout_share, 0.05).
    #[arg(long, num_args = 1.., value_name = "FILE")]
    pub heldout: Vec<PathBuf>,
    /// What is between two documents of a file; `\n` stands for the end of a line. Default: a file is one document.
    #[arg(long, value_name = "TEXT")]
    pub separator: Option<String>,
    /// A recipe, a TOML file; without it every setting has its default.
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Where to write a checkpoint with the result.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["delta", "json", "server"])]
    pub output: Option<PathBuf>,
    /// Where to write what changed, over this very checkpoint.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["output", "json", "server"])]
    pub delta: Option<PathBuf>,
    /// Where to write everything that was measured, as one JSON object.
    #[arg(long, value_name = "FILE", required_unless_present_any = ["output", "delta", "server"])]
    pub json: Option<PathBuf>,
    /// Folder of the states of the run, from which --resume goes on.
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Go on from the newest state in --work, with the same settings, text and model: the result is that of a run that was not interrupted.
    #[arg(long, requires = "work")]
    pub resume: bool,
    /// End with status 0 though a gate does not hold.
    #[arg(long = "override")]
    pub override_gates: bool,
    /// What learns.
    #[command(flatten)]
    pub run: RunArgs,
    /// Where the model runs, and how.
    #[command(flatten)]
    pub compute: ComputeArgs,
    /// A server that does it instead.
    #[command(flatten)]
    pub remote: RemoteArgs,
}

/// Settings of the recipe.
#[derive(Args, Debug, Default, PartialEq)]
#[command(next_help_heading = "Training")]
pub struct RunArgs {
    /// `router`, `router+experts`, `all`, or names of tensors as layers.0.router,layers.3 [target; default: router].
    #[arg(long)]
    pub target: Option<Target>,
    /// How routers learn: a row of the catalogue, docs/estimators.md [routing.estimator; default: soft, its temperature falling from 1 to 0.1
    /// unless it is set].
    #[arg(long, value_name = "NAME")]
    pub estimator: Option<String>,
    /// A parameter of the estimator as a recipe writes it, as temperature=1 or 'temperature={ init = 1.0, final = 0.3 }'. May be given
    /// more than once [routing.KEY].
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<Setting>,
    /// Optimizer steps [run.steps; default: 300].
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Windows of text per step [run.windows; default: 16].
    #[arg(long, value_name = "N")]
    pub windows: Option<usize>,
    /// Windows that are run together; fewer take less memory, and a server waits for less [run.micro_windows; default: 1].
    #[arg(long, value_name = "N")]
    pub micro_windows: Option<usize>,
    /// Tokens of a window [run.window_tokens; default: the context of the model, at most 512].
    #[arg(long, value_name = "N")]
    pub window_tokens: Option<usize>,
    /// Peak learning rate [optimizer.learning_rate; default: 0.001].
    #[arg(long, value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// Learning rate of routers over it [optimizer.router_rate; default: 1].
    #[arg(long, value_name = "FACTOR")]
    pub router_rate: Option<f64>,
    /// Learning rate of experts over it [optimizer.expert_rate; default: 0.3].
    #[arg(long, value_name = "FACTOR")]
    pub expert_rate: Option<f64>,
    /// Learn from the model as it is, under its reference routing, with this weight [distill.weight; default: not].
    #[arg(long, value_name = "WEIGHT")]
    pub distill: Option<f64>,
    /// Weight of the text's own next tokens beside it; 0 learns from the model alone [distill.lm_weight; default: 1].
    #[arg(long, value_name = "WEIGHT")]
    pub lm_weight: Option<f64>,
    /// End after so many minutes of training, whatever the step [run.max_seconds; default: never].
    #[arg(long, value_name = "MINUTES")]
    pub max_minutes: Option<f64>,
    /// End after so many evaluations in a row that were not better than the best, whose weights are the result then [stop.patience;
    /// default: never, and the last weights are].
    #[arg(long, value_name = "N")]
    pub patience: Option<usize>,
    /// What of a forward is worked out again for the backward instead of kept: with `layer`, a third more time for far less memory
    /// [run.recompute; default: none].
    #[arg(long, value_name = "WHAT")]
    pub recompute: Option<Recompute>,
    /// Refuse to begin a run that would take more memory, in MiB, beside the model itself [run.max_memory_bytes; default: what the
    /// machine has].
    #[arg(long, value_name = "MIB")]
    pub max_memory: Option<u64>,
    /// Of everything random [run.seed; default: 0].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// The routing that the result is to be served with [run.serving; default: that of the checkpoint].
    #[arg(long, value_name = "ROUTING")]
    pub serving: Option<String>,
    /// The routing that it is to be true to [run.reference; default: what the checkpoint was trained under].
    #[arg(long, value_name = "ROUTING")]
    pub reference: Option<String>,
}

/// A value of `--set`.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    key: String,
    value: Param,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let (key, value) = text.split_once('=').ok_or_else(|| format!("'{text}' is not KEY=VALUE"))?;
        let read = |value: &str| toml::from_str::<BTreeMap<String, Param>>(&format!("value = {value}"));
        // A word needs no quotes here.
        let table = read(value).or_else(|error| read(&format!("{value:?}")).map_err(|_| error));
        let mut table = table.map_err(|error| format!("'{value}': {}", error.message()))?;
        let value = table.remove("value").ok_or_else(|| format!("'{value}' is no value"))?;
        Ok(Self { key: key.trim().to_owned(), value })
    }
}

impl TuneArgs {
    /// The recipe with the flags over it.
    pub(super) fn config(&self) -> Result<TuneConfig> {
        let mut config = match &self.recipe {
            None => TuneConfig::default(),
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|source| Error::io(path, source))?;
                toml::from_str(&text).map_err(|error| Error::invalid(path.display().to_string(), error.to_string()))?
            }
        };
        self.run.apply(&mut config)?;
        Ok(config)
    }

    /// The text.
    pub(super) fn sources(&self) -> Sources {
        let separator = self.separator.as_ref().map(|text| text.replace("\\n", "\n"));
        Sources { train: self.data.clone(), heldout: self.heldout.clone(), separator: separator.filter(|text| !text.is_empty()) }
    }

    /// Fails where what was asked for could not be written in the end.
    pub(super) fn check_results(&self) -> Result<()> {
        if let Some(dir) = &self.output {
            checkpoint::check_target(dir)?;
        }
        for (flag, file) in [("--delta", &self.delta), ("--json", &self.json)] {
            let Some(file) = file else { continue };
            let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
            if folder.is_some_and(|folder| !folder.is_dir()) || file.is_dir() {
                return Err(Error::invalid(flag, format!("{}: give a file in a folder that is there", file.display())));
            }
        }
        Ok(())
    }
}

impl RunArgs {
    fn apply(&self, config: &mut TuneConfig) -> Result<()> {
        fn set<T: Clone>(field: &mut T, flag: &Option<T>) {
            if let Some(value) = flag {
                field.clone_from(value);
            }
        }
        let TuneConfig { target, routing, optimizer, run, distill, stop, .. } = config;
        set(target, &self.target);
        if let Some(estimator) = &self.estimator {
            // Parameters of another one have no meaning for it.
            if *estimator != routing.estimator {
                routing.params.clear();
                routing.k = None;
            }
            routing.estimator.clone_from(estimator);
        }
        for Setting { key, value } in &self.set {
            match (key.as_str(), value) {
                ("k", Param::Number(k)) if *k >= 0.0 && k.fract() == 0.0 => routing.k = Some(*k as usize),
                ("estimator" | "losses" | "k", _) => {
                    return Err(Error::invalid("--set", format!("{key}: is no parameter of an estimator; use --estimator, or a recipe")));
                }
                _ => _ = routing.params.insert(key.clone(), value.clone()),
            }
        }
        set(&mut run.steps, &self.steps);
        set(&mut run.windows, &self.windows);
        set(&mut run.micro_windows, &self.micro_windows);
        set(&mut run.seed, &self.seed);
        run.window_tokens = self.window_tokens.or(run.window_tokens);
        set(&mut run.recompute, &self.recompute);
        run.max_memory_bytes = self.max_memory.map(|mib| mib << 20).or(run.max_memory_bytes);
        if let Some(patience) = self.patience {
            stop.get_or_insert_default().patience = patience;
        }
        run.max_seconds = self.max_minutes.map(|minutes| 60.0 * minutes).or(run.max_seconds);
        run.serving = self.serving.clone().or(run.serving.take());
        run.reference = self.reference.clone().or(run.reference.take());
        set(&mut optimizer.learning_rate, &self.learning_rate);
        set(&mut optimizer.router_rate, &self.router_rate);
        set(&mut optimizer.expert_rate, &self.expert_rate);
        if let Some(weight) = self.distill {
            distill.get_or_insert_default().weight = weight;
        }
        match (self.lm_weight, distill) {
            (Some(weight), Some(distill)) => distill.lm_weight = weight,
            (Some(_), None) => return Err(Error::invalid("--lm-weight", "has no effect without --distill, which it is weighed against")),
            (None, _) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::tune::config::Distill;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        tune: TuneArgs,
    }

    fn config(flags: &[&str]) -> std::result::Result<TuneConfig, String> {
        let line = ["tune", "--model", "m", "--data", "a.txt", "--json", "x.json"].into_iter().chain(flags.iter().copied());
        Line::try_parse_from(line).map_err(|error| error.to_string())?.tune.config().map_err(|error| error.to_string())
    }

    #[test]
    fn flags_come_before_the_recipe() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("tune.toml");
        fs::write(&recipe, "target = \"all\"\n[routing]\nestimator = \"entmax\"\nalpha = 1.2\n[run]\nsteps = 7\nseed = 3\n[distill]\n")
            .unwrap();
        let recipe = recipe.to_str().unwrap();
        let read = config(&["--recipe", recipe]).unwrap();
        assert_eq!((read.target, read.run.steps, read.run.seed), (Target::All, 7, 3));
        assert_eq!(read.routing.params, BTreeMap::from([("alpha".to_owned(), Param::Number(1.2))]));
        assert_eq!(read.distill, Some(Distill { weight: 1.0, lm_weight: 1.0 }));
        let mixed =
            config(&["--recipe", recipe, "--steps", "9", "--estimator", "ste", "--lm-weight", "0", "--target", "layers.1,head"]).unwrap();
        assert_eq!((mixed.run.steps, mixed.run.seed, mixed.routing.estimator.as_str()), (9, 3, "ste"));
        assert!(mixed.routing.params.is_empty(), "alpha is entmax's");
        assert_eq!(mixed.distill.unwrap().lm_weight, 0.0);
        assert_eq!(mixed.target, Target::Named(vec!["layers.1".into(), "head".into()]));
    }

    #[test]
    fn parameters_are_written_as_in_a_recipe() {
        let params = config(&["--set", "temperature={ init = 1.0, final = 0.1 }", "--set", "form=steep", "--set", "k=2"]).unwrap().routing;
        assert!(matches!(params.params["temperature"], Param::Schedule(schedule) if schedule.init == 1.0 && schedule.end == 0.1));
        assert_eq!((params.params["form"].clone(), params.k), (Param::Word("steep".into()), Some(2)));
        for (flags, message) in [
            (&["--set", "temperature"][..], "is not KEY=VALUE"),
            (&["--set", "k=1.5"], "--set: k"),
            (&["--lm-weight", "0.5"], "--lm-weight: has no effect without --distill"),
        ] {
            let error = config(flags).unwrap_err();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn a_run_must_leave_something() {
        assert!(Line::try_parse_from(["tune", "--model", "m", "--data", "a.txt"]).is_err());
        let line = Line::try_parse_from(["tune", "--model", "m", "--data", "a.txt", "--delta", "/nowhere/at/all/d"]).unwrap();
        assert!(line.tune.check_results().unwrap_err().to_string().starts_with("--delta: /nowhere/at/all/d"));
    }
}
