//! What is found about the routing of a layer while it trains, and when that is news.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::moe::collapse::{Health, Monitor};

/// What is known about one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The last verdict on its load; `None` until there is one.
    pub health: Option<Health>,
    /// Only auxiliary losses have moved its router for so long that the task does not teach it anything.
    pub dead_router: bool,
}

impl Finding {
    /// What `monitor` says after this one. A load that it does not judge, because it has seen too little of it, is as it
    /// was found before. A router that is not to learn (`learns` is false) is frozen, not dead.
    pub fn next(self, monitor: &Monitor, learns: bool) -> Self {
        Self { health: monitor.health().or(self.health), dead_router: learns && monitor.router_is_dead() }
    }

    /// Nothing is wrong, as far as is known.
    pub fn is_sound(self) -> bool {
        !self.dead_router && self.load() == Health::Healthy
    }

    /// Whether it says something else than the one before. That a layer which has just been judged is healthy is no news.
    pub fn is_news(self, before: Self) -> bool {
        (self.load(), self.dead_router) != (before.load(), before.dead_router)
    }

    fn load(self) -> Health {
        self.health.unwrap_or(Health::Healthy)
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.load() {
            Health::Healthy => "the load is healthy",
            Health::Skewed => "the load is skewed",
            Health::Collapsing => "the load is collapsing: a balance loss or remedies may even it out",
            Health::Collapsed => "the load has collapsed: a balance loss or remedies may even it out",
        })?;
        if self.dead_router {
            f.write_str("; the task no longer moves the router, only auxiliary losses do: an even load is then no sign of health")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::choices::Choices;

    #[test]
    fn only_changes_are_news() {
        let (mut monitor, mut finding, mut news) = (Monitor::new(2, 1, 100), Finding::default(), Vec::new());
        for step in 0..200 {
            let rows = if (20..40).contains(&step) { [20, 0] } else { [10, 10] };
            observe(&mut monitor, rows);
            monitor.observe_gradients(if step < 100 { 1.0 } else { 0.0 }, 0.1);
            let before = finding;
            finding = before.next(&monitor, true);
            if finding.is_news(before) {
                news.push((step, finding.health, finding.dead_router));
            }
        }
        let (first, last) = (news[0], news[news.len() - 1]);
        assert!((20..40).contains(&first.0) && first.1 > Some(Health::Healthy), "{news:?}");
        assert_eq!(last, (149, Some(Health::Healthy), true), "{news:?}");
        assert!(news.len() < 10 && news.windows(2).all(|pair| (pair[0].1, pair[0].2) != (pair[1].1, pair[1].2)), "{news:?}");
        assert!(!finding.is_sound() && finding.to_string().contains("only auxiliary losses"));
        assert!(finding.next(&monitor, false).is_sound(), "frozen, not dead");
    }

    #[test]
    fn an_unjudged_load_is_as_it_was() {
        let mut monitor = Monitor::new(2, 1, 1000);
        assert_eq!(Finding::default().next(&monitor, true), Finding::default());
        let collapsed = Finding { health: Some(Health::Collapsed), dead_router: false };
        assert_eq!(collapsed.next(&monitor, true), collapsed);
        observe(&mut monitor, [100, 100]);
        assert!(collapsed.next(&monitor, true).is_sound());
    }

    /// That so many tokens went to each expert.
    fn observe(monitor: &mut Monitor, counts: [usize; 2]) {
        let rows = counts.iter().enumerate().flat_map(|(e, &n)| std::iter::repeat_n([e as u32], n));
        monitor.observe(Choices::from_rows(rows).rows());
    }
}
