//! Servers that are there, and sick: they answer, and do not do what they are asked for.

use std::sync::Arc;

use host::capability::{Action, Away, StoreName};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sickness {
    /// It takes no writes: it is read-only, or full.
    TakesNoWrites,
    /// It refuses stages what it did for them before.
    Refuses,
}

impl Sickness {
    /// What is told of a server that has not done what a stage asked for.
    pub(crate) fn away(self, store: StoreName) -> Away {
        let action = match (self, &store) {
            (Self::TakesNoWrites, _) => Action::Write,
            (Self::Refuses, StoreName::Sql(_)) => Action::Statement("INSERT".into(), Arc::new([])),
            (Self::Refuses, StoreName::Redis(_)) => Action::Command("SET"),
        };
        Away {
            store,
            action,
            why: format!("it is sick: {self:?}"),
            was_gone: false,
        }
    }

    /// Whether a server does this though it is sick.
    pub(crate) fn does(self, action: &Action) -> bool {
        match self {
            Self::TakesNoWrites => matches!(action, Action::Answer | Action::Read),
            Self::Refuses => !action.had_been_done(),
        }
    }
}
