//! A key-value store whose values carry versions.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::World;
use super::lock;
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

    pub(crate) fn is_up(&self) -> bool {
        !lock(&self.state).is_down
    }

    pub(crate) fn set_up(&self, is_up: bool) {
        lock(&self.state).is_down = !is_up;
        self.world
            .note(0, "store", Subject::None, [i64::from(is_up), 0]);
    }

    /// Writes a value, unless there is a newer one. Answers whether the store is there.
    pub(crate) fn put(&self, stage: usize, key: Arc<str>, version: i64, id: Arc<str>) -> bool {
        let mut state = lock(&self.state);
        if state.is_down {
            return false;
        }
        let known = state.values.get(&key).map(|(version, _)| *version);
        if self.without_versions || known.is_none_or(|known| known <= version) {
            state.values.insert(key, (version, id.clone()));
        }
        drop(state);
        self.world.evidence().effect(stage, &id);
        self.world
            .note(0, "  value", Subject::Name(id), [version, 0]);
        true
    }

    pub(crate) fn values(&self) -> BTreeMap<Arc<str>, (i64, Arc<str>)> {
        lock(&self.state).values.clone()
    }
}
