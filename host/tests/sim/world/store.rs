//! A key-value store whose values carry versions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use host::capability::Action;

use super::World;
use super::database::Denial;
use super::lock;
use super::sickness::Sickness;
use super::trace::Subject;

pub(crate) struct Store {
    world: World,
    /// Planted: any write counts, whatever its version.
    pub(crate) without_versions: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    is_down: bool,
    sickness: Option<Sickness>,
    values: BTreeMap<Arc<str>, (i64, Arc<str>)>,
}

impl Store {
    pub(crate) fn new(world: World, without_versions: bool) -> Arc<Self> {
        Arc::new(Self {
            world,
            without_versions,
            state: Mutex::default(),
        })
    }

    pub(crate) fn set_up(&self, is_up: bool) {
        lock(&self.state).is_down = !is_up;
        self.world
            .note(0, "store", Subject::None, [i64::from(is_up), 0]);
    }

    /// It is sick from now on, or well again.
    pub(crate) fn set_sick(&self, sickness: Option<Sickness>) {
        lock(&self.state).sickness = sickness;
        let is_sick = i64::from(sickness.is_some());
        self.world
            .note(0, "store sick", Subject::None, [is_sick, 0]);
    }

    /// Whether it does this.
    pub(crate) fn does(&self, action: &Action) -> bool {
        let state = lock(&self.state);
        let does = |sickness: Sickness| sickness.does(action);
        !state.is_down && state.sickness.is_none_or(does)
    }

    /// Writes a value, unless there is a newer one.
    pub(crate) fn put(
        &self,
        stage: usize,
        key: Arc<str>,
        version: i64,
        id: Arc<str>,
    ) -> Result<(), Denial> {
        let mut state = lock(&self.state);
        match state.sickness {
            _ if state.is_down => return Err(Denial::Gone),
            Some(sickness) => return Err(Denial::Sick(sickness)),
            None => {}
        }
        let known = state.values.get(&key).map(|(version, _)| *version);
        if self.without_versions || known.is_none_or(|known| known <= version) {
            state.values.insert(key, (version, id.clone()));
        }
        drop(state);
        self.world.evidence().effect(stage, &id);
        self.world
            .note(0, "  value", Subject::Name(id), [version, 0]);
        Ok(())
    }

    pub(crate) fn values(&self) -> BTreeMap<Arc<str>, (i64, Arc<str>)> {
        lock(&self.state).values.clone()
    }
}
