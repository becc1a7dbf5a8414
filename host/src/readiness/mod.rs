//! Whether the host can do its work, and what it waits for where it can't: conditions by name, and one value a lane.
//! `/readyz`, the log and the metrics are told from it.

mod lanes;

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use self::lanes::{LaneStatus, LaneWait, Lanes, Wait, Waiting};
use crate::log_output::escaped;

/// What must be so before the host is ready, each condition by name (`log`, `stage publisher`), and what its lanes wait for.
/// Ready when all conditions hold and no lane waits, so a condition should be named before the first question, with the
/// reason `starting`.
#[derive(Debug, Default)]
pub struct Readiness {
    /// The reason why not, where it is not.
    conditions: Mutex<BTreeMap<String, Option<String>>>,
    lanes: Lanes,
}

impl Readiness {
    /// The condition holds. Answers whether it did not before.
    pub fn ready(&self, name: &str) -> bool {
        let before = self.conditions().insert(name.to_owned(), None);
        before.flatten().is_some()
    }

    /// The condition does not hold, and why, in a line. Answers whether it did before.
    pub fn not_ready(&self, name: &str, reason: impl Into<String>) -> bool {
        let before = self
            .conditions()
            .insert(name.to_owned(), Some(reason.into()));
        before.flatten().is_none()
    }

    /// What the host's lanes wait for.
    pub fn lanes(&self) -> &Lanes {
        &self.lanes
    }

    /// Why the host is not ready, `name: reason` each; empty when it is.
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons: Vec<_> = self
            .conditions()
            .iter()
            .filter_map(|(name, reason)| Some(format!("{name}: {}", one_line(reason.as_deref()?))))
            .collect();
        let waits = self.lanes.waits();
        let waits = waits.iter().filter(|wait| wait.is_trouble());
        reasons.extend(waits.map(|wait| one_line(&wait.to_string())));
        reasons
    }

    fn conditions(&self) -> MutexGuard<'_, BTreeMap<String, Option<String>>> {
        self.conditions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reasons come from libraries, and some of those write over several lines.
fn one_line(reason: &str) -> String {
    escaped(&reason.split_whitespace().collect::<Vec<_>>().join(" "))
}
