//! The statements that a session has prepared.

use std::collections::HashMap;
use std::sync::Arc;

use postgres_protocol::Oid;

use super::super::done::Noted;
use super::value::Column;

/// Statements that a session keeps of one owner.
const MAX_PLANS: usize = 256;
/// Bytes of the longest text that is kept, so that the texts of a pool have a bound.
pub(super) const MAX_KEPT_TEXT: usize = 16 * 1024;

/// A prepared statement.
pub(super) struct Plan {
    /// Empty for one that is run as soon as it is prepared.
    pub(super) name: String,
    pub(super) columns: Vec<Column>,
    /// Where it is a guest's: whether it is noted that it has run.
    pub(super) noted: Noted,
}

impl Plan {
    /// A plan of the host's own.
    pub(super) fn new(name: String, columns: Vec<Column>) -> Self {
        Self::of_guest(name, columns, "")
    }

    /// A plan of a guest's statement of this text.
    pub(super) fn of_guest(name: String, columns: Vec<Column>, text: &str) -> Self {
        Self {
            name,
            columns,
            noted: Noted::new(text),
        }
    }
}

/// Prepared statements, by their texts and their parameters' types: what the server has prepared depends on both.
pub(super) struct Plans {
    /// Of all names.
    prefix: String,
    named: u64,
    /// How often one was found, as a clock.
    now: u64,
    count: usize,
    texts: HashMap<Box<str>, Vec<Kept>>,
}

struct Kept {
    types: Box<[Oid]>,
    plan: Arc<Plan>,
    used: u64,
}

impl Plans {
    pub(super) fn new(prefix: String) -> Self {
        Self {
            prefix,
            named: 0,
            now: 0,
            count: 0,
            texts: HashMap::new(),
        }
    }

    pub(super) fn find(&mut self, text: &str, types: &[Oid]) -> Option<Arc<Plan>> {
        self.now += 1;
        let kept = self.texts.get_mut(text)?.iter_mut();
        let kept = kept.into_iter().find(|kept| *kept.types == *types)?;
        kept.used = self.now;
        Some(kept.plan.clone())
    }

    /// A name for one more, and that of the one to be closed for it, which was not used for the longest time.
    pub(super) fn make_room(&mut self) -> (String, Option<String>) {
        self.named += 1;
        let name = format!("{}{}", self.prefix, self.named);
        let evicted = (self.count >= MAX_PLANS).then(|| self.evict()).flatten();
        (name, evicted)
    }

    /// The name of one that is not kept: the next of this kind takes its place.
    pub(super) fn unkept(&self) -> String {
        format!("{}0", self.prefix)
    }

    fn evict(&mut self) -> Option<String> {
        let all = self.texts.iter();
        let all = all.flat_map(|(text, kept)| kept.iter().map(move |kept| (kept.used, text)));
        let (used, text) = all.min_by_key(|(used, _)| *used)?;
        let text = text.clone();
        let kept = self.texts.get_mut(&text)?;
        let at = kept.iter().position(|kept| kept.used == used)?;
        let evicted = kept.swap_remove(at);
        if kept.is_empty() {
            self.texts.remove(&text);
        }
        self.count -= 1;
        Some(evicted.plan.name.clone())
    }

    pub(super) fn insert(&mut self, text: &str, types: &[Oid], plan: Arc<Plan>) {
        self.now += 1;
        self.count += 1;
        let kept = Kept {
            types: types.into(),
            plan,
            used: self.now,
        };
        match self.texts.get_mut(text) {
            Some(all) => all.push(kept),
            None => {
                self.texts.insert(text.into(), vec![kept]);
            }
        }
    }

    /// The names of all, which are kept no longer.
    pub(super) fn take_names(&mut self) -> Vec<String> {
        self.count = 0;
        let all = self.texts.drain().flat_map(|(_, kept)| kept);
        all.map(|kept| kept.plan.name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_used_makes_room() {
        let mut plans = Plans::new("g".to_owned());
        let insert = |plans: &mut Plans, text: &str, types: &[Oid]| {
            let (name, evicted) = plans.make_room();
            let columns = Vec::new();
            plans.insert(text, types, Arc::new(Plan::new(name, columns)));
            evicted
        };
        for types in [&[20][..], &[25]] {
            assert_eq!(insert(&mut plans, "first", types), None);
        }
        for n in 2..MAX_PLANS {
            assert_eq!(insert(&mut plans, &n.to_string(), &[]), None);
        }
        let name = |plan: Option<Arc<Plan>>| plan.map(|plan| plan.name.clone());
        assert_eq!(name(plans.find("first", &[20])).as_deref(), Some("g1"));
        assert_eq!(insert(&mut plans, "one more", &[]).as_deref(), Some("g2"));
        assert_eq!(name(plans.find("first", &[25])), None);
        assert_eq!(name(plans.find("first", &[20])).as_deref(), Some("g1"));
        assert_eq!(insert(&mut plans, "another", &[]).as_deref(), Some("g3"));
        assert_eq!(plans.take_names().len(), MAX_PLANS);
        assert_eq!(name(plans.find("first", &[20])), None);
    }
}
