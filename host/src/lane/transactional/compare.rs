//! The lane's row against what its group has committed: whether somebody has set the group's offset, and whether the
//! database is the one that it was.

use std::fmt;

use crate::delivery::progress::LaneId;
use crate::log::committed::{Committed, RowMark};

/// What of the row is compared.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    pub(super) generation: i64,
    pub(super) commits: i64,
    /// `None` where the lane has never committed.
    pub(super) next_offset: Option<i64>,
}

/// What the two have to say of each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing is amiss: the group's offset is late, as it may be.
    Agree,
    /// There was no row, and the group has an offset of others, or of before there were rows.
    Begins { offset: i64 },
    /// There is a row, and the group has no offset.
    Unset { next_offset: i64 },
    /// Somebody has set the group's offset.
    Set { offset: i64, next_offset: i64 },
    /// There was no row, and the group's offset is that of one: the database was emptied, or is another one.
    Emptied { offset: i64, before: RowMark },
    /// The row is older than what was committed by it: the database is an older copy.
    Older { offset: i64, before: RowMark },
}

/// Compares the row with what the group has committed.
pub(super) fn compare(row: Row, committed: Option<&Committed>) -> Verdict {
    let before = committed.and_then(Committed::row);
    match (row.next_offset, committed) {
        (None, None) => Verdict::Agree,
        (None, Some(Committed { offset, .. })) => match before {
            Some(before) => Verdict::Emptied {
                offset: *offset,
                before,
            },
            None => Verdict::Begins { offset: *offset },
        },
        (Some(next_offset), None) => Verdict::Unset { next_offset },
        (Some(next_offset), Some(Committed { offset, mark })) => match before {
            Some(before) if (before.generation, before.commits) > (row.generation, row.commits) => {
                Verdict::Older {
                    offset: *offset,
                    before,
                }
            }
            Some(_) => Verdict::Agree,
            // A host of an earlier version commits without words, as somebody with a tool does.
            None if *offset == next_offset => Verdict::Agree,
            // The host's own words, from before the lane had a row.
            None if mark.is_some() => Verdict::Agree,
            None => Verdict::Set {
                offset: *offset,
                next_offset,
            },
        },
    }
}

impl Verdict {
    /// A generation that outputs of this lane have had, and that new ones must be above.
    pub(super) fn highest_generation(self) -> Option<i64> {
        match self {
            Self::Emptied { before, .. } | Self::Older { before, .. } => Some(before.generation),
            _ => None,
        }
    }
}

/// Says what is the matter, which position counts, and the mend.
pub(super) struct Said<'a> {
    pub(super) verdict: Verdict,
    pub(super) row: Row,
    pub(super) id: &'a LaneId,
    /// The store's name.
    pub(super) store: &'a dyn fmt::Display,
}

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LaneId {
            group,
            topic,
            partition,
        } = self.id;
        let store = self.store;
        let row = format!(
            "consumer_group = '{}' AND topic = '{topic}' AND partition = {partition}",
            group.replace('\'', "''")
        );
        let reset = |f: &mut fmt::Formatter<'_>, to| {
            write!(
                f,
                "kafka-consumer-groups --group '{group}' --topic {topic}:{partition} --reset-offsets --to-offset {to} \
                 --execute"
            )
        };
        match self.verdict {
            Verdict::Agree => Ok(()),
            Verdict::Begins { offset } => write!(
                f,
                "there was no row in stagehost_progress for {group}, {topic} {partition}: it begins at the group's \
                 committed offset {offset}"
            ),
            Verdict::Unset { next_offset } => write!(
                f,
                "the group {group} has no committed offset in {topic} {partition}: none was committed yet, it has expired, or \
                 somebody has deleted it. The row in stagehost_progress counts, and says {next_offset}: going on there. To go \
                 on elsewhere, stop the stage's hosts, UPDATE stagehost_progress SET next_offset = …, attempts = 0, \
                 generation = generation + 1 WHERE {row}, and start them again"
            ),
            Verdict::Set {
                offset,
                next_offset,
            } => write!(
                f,
                "the group's committed offset {offset} in {topic} {partition} was set by somebody else, such as \
                 kafka-consumer-groups --reset-offsets, or a host of an earlier version. It does not count for a transactional \
                 stage: the row in stagehost_progress does, and says {next_offset}: going on there. If {offset} is meant, stop \
                 the stage's hosts, UPDATE stagehost_progress SET next_offset = {offset}, attempts = 0, generation = \
                 generation + 1 WHERE {row}, and start them again"
            ),
            Verdict::Emptied { offset, before } => {
                write!(
                    f,
                    "{store} has no row in stagehost_progress for {group}, {topic} {partition}, and the group's committed \
                     offset {offset} is that of one with {} commits, of generation {}: the database was emptied, or is \
                     another one, and lacks what came of the records below {offset}. Bring the database back; or, stopped, \
                     say where to go on: ",
                    before.commits, before.generation
                )?;
                reset(f, offset)
            }
            Verdict::Older { offset, before } => write!(
                f,
                "{store} is an older copy: its row for {group}, {topic} {partition} has {} commits of generation {} and goes \
                 on at {}, and the group's committed offset {offset} is that of a row with {} commits of generation {}. The \
                 row counts: records from there on are processed again, and their outputs are new ones for whoever reads \
                 them, of generation {}",
                self.row.commits,
                self.row.generation,
                self.row.next_offset.unwrap_or_default(),
                before.commits,
                before.generation,
                before.generation.max(self.row.generation).saturating_add(1)
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::committed::Mark;

    fn row(generation: i64, commits: i64, next_offset: Option<i64>) -> Row {
        Row {
            generation,
            commits,
            next_offset,
        }
    }

    fn committed(offset: i64, mark: Option<(i64, i64)>) -> Committed {
        let of = |(generation, commits)| Mark {
            topic: None,
            row: Some(RowMark {
                generation,
                commits,
                next_offset: offset,
            }),
        };
        Committed {
            offset,
            mark: mark.map(of),
        }
    }

    #[test]
    fn a_late_hint_is_nothing_to_speak_of() {
        let row = row(5, 10, Some(100));
        for of in [
            committed(40, Some((5, 4))),
            committed(100, Some((5, 10))),
            // A marker was passed.
            committed(101, Some((5, 10))),
            committed(40, Some((4, 90))),
            // A host of an earlier version, which stopped in order.
            committed(100, None),
        ] {
            assert_eq!(compare(row, Some(&of)), Verdict::Agree, "{of:?}");
        }
    }

    #[test]
    fn what_others_did_is_told_apart() {
        let known = row(5, 10, Some(100));
        let set = Verdict::Set {
            offset: 0,
            next_offset: 100,
        };
        assert_eq!(compare(known, Some(&committed(0, None))), set);
        let unset = Verdict::Unset { next_offset: 100 };
        assert_eq!(compare(known, None), unset);
        let new = row(7, 0, None);
        assert_eq!(compare(new, None), Verdict::Agree);
        let begins = Verdict::Begins { offset: 3 };
        assert_eq!(compare(new, Some(&committed(3, None))), begins);
        let emptied = compare(new, Some(&committed(3, Some((5, 1)))));
        assert!(matches!(emptied, Verdict::Emptied { offset: 3, .. }));
        assert_eq!(emptied.highest_generation(), Some(5));
        for before in [(5, 11), (6, 1)] {
            let older = compare(known, Some(&committed(120, Some(before))));
            assert!(
                matches!(older, Verdict::Older { offset: 120, .. }),
                "{before:?}"
            );
        }
    }
}
