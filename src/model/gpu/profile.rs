//! Where the time of a step goes, by kinds of kernels: events around what is launched.

use hardmax_kernels::{Event, Stream};

use crate::error::Result;

/// A kind of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Embedding and RMSNorm.
    Norm,
    /// Products of attention: queries, keys, values and output.
    Projection,
    /// Bias, norm, rotation, the cache, and attention over it.
    Attention,
    /// Router logits, the choice of experts, and the dispatch plan.
    Routing,
    /// Products of routed experts, and what lies between them.
    Experts,
    /// Products of dense layers and of shared experts.
    Dense,
    /// What experts made, summed per token.
    Combine,
    /// Logits and what is drawn of them.
    Head,
}

impl Class {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Norm => "norm",
            Self::Projection => "projections",
            Self::Attention => "attention",
            Self::Routing => "routing",
            Self::Experts => "experts",
            Self::Dense => "dense",
            Self::Combine => "combine",
            Self::Head => "head",
        }
    }
}

/// Milliseconds by class, in the order of classes, over all steps that were measured.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Profile {
    /// What was seen.
    pub milliseconds: Vec<(Class, f64)>,
    /// Steps.
    pub steps: usize,
}

/// Measures, or does nothing.
#[derive(Debug, Default)]
pub(super) struct Clock {
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    /// An event of the beginning, and then one at the end of each piece of work.
    events: Vec<Event>,
    marks: Vec<Class>,
    profile: Profile,
}

impl Clock {
    pub(super) fn running() -> Result<Self> {
        Ok(Self { running: Some(Running { events: vec![Event::new()?], marks: Vec::new(), profile: Profile::default() }) })
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// A step begins.
    pub(super) fn start(&mut self, stream: Stream) -> Result<()> {
        if let Some(running) = &mut self.running {
            running.marks.clear();
            running.events[0].record(stream)?;
        }
        Ok(())
    }

    /// What was launched since the last mark is of this class.
    pub(super) fn mark(&mut self, stream: Stream, class: Class) -> Result<()> {
        if let Some(running) = &mut self.running {
            running.marks.push(class);
            if running.events.len() <= running.marks.len() {
                running.events.push(Event::new()?);
            }
            running.events[running.marks.len()].record(stream)?;
        }
        Ok(())
    }

    /// The stream was waited for: adds what the step took.
    pub(super) fn settle(&mut self) -> Result<()> {
        let Some(Running { events, marks, profile }) = &mut self.running else { return Ok(()) };
        for (pair, class) in events.windows(2).zip(marks.drain(..)) {
            let took = f64::from(pair[0].milliseconds_to(&pair[1])?);
            match profile.milliseconds.binary_search_by_key(&class, |entry| entry.0) {
                Ok(at) => profile.milliseconds[at].1 += took,
                Err(at) => profile.milliseconds.insert(at, (class, took)),
            }
        }
        profile.steps += 1;
        Ok(())
    }

    /// What was measured; from now on anew.
    pub(super) fn take(&mut self) -> Profile {
        self.running.as_mut().map(|running| std::mem::take(&mut running.profile)).unwrap_or_default()
    }
}
