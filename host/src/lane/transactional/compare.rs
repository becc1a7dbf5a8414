//! The lane's row against what its group has committed, and against what the lane has known of it: whether somebody has set
//! the group's offset, and whether the database is the one that it was.

use std::fmt;

use crate::delivery::progress::{Claim, LaneId};
use crate::log::committed::{Committed, RowMark};

/// What of the row is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// Of the last claim; of a row that was claimed just now, the one before.
    pub(super) epoch: i64,
    pub(super) generation: i64,
    pub(super) commits: i64,
    /// `None` where the lane has never committed.
    pub(super) next_offset: Option<i64>,
}

impl Row {
    /// The row as it was found.
    pub(super) fn of(claim: &Claim) -> Self {
        Self {
            epoch: claim.epoch,
            generation: claim.generation,
            commits: claim.commits,
            next_offset: claim.checkpoint.next_offset,
        }
    }

    /// What is written of it beside the group's offset.
    pub(super) fn mark(self) -> Option<RowMark> {
        Some(RowMark {
            generation: self.generation,
            commits: self.commits,
            next_offset: self.next_offset?,
        })
    }

    /// What grows with each commit, whoever makes it.
    fn age(self) -> (i64, i64) {
        (self.generation, self.commits)
    }

    /// The one of the two that has seen more.
    pub(super) fn newest(self, other: Option<Self>) -> Self {
        other
            .filter(|other| other.age() > self.age())
            .unwrap_or(self)
    }

    /// Whether it has commits that its lane has not made, by an epoch that was the lane's own or an older one: nobody else
    /// can have made them, unless in another copy of the database.
    fn is_of_another_copy(self, known: Self) -> bool {
        self.epoch <= known.epoch
            && self.generation == known.generation
            && self.commits > known.commits
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            epoch,
            generation,
            commits,
            next_offset,
        } = self;
        write!(
            f,
            "{commits} commits of generation {generation} and epoch {epoch}"
        )?;
        next_offset.map_or(Ok(()), |next| write!(f, ", going on at {next}"))
    }
}

/// What has become of a row that was left as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is as it was left.
    Kept,
    /// Another host has claimed it.
    Taken,
    /// It is another one: the database went back or forth, or somebody has written into it.
    Changed,
}

impl Fate {
    pub(super) fn of(known: Row, found: Option<Row>) -> Self {
        match found {
            Some(row) if row.epoch == known.epoch && row.age() == known.age() => Self::Kept,
            Some(row) if row.epoch > known.epoch && row.age() >= known.age() => Self::Taken,
            _ => Self::Changed,
        }
    }
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
    /// The stage was delivered to at least once meanwhile, without the row.
    Passed { offset: i64, next_offset: i64 },
    /// Somebody has set the group's offset.
    Set { offset: i64, next_offset: i64 },
    /// There was no row, and the group's offset, if it has one, is that of one: the database was emptied, or is another one.
    Emptied {
        offset: Option<i64>,
        before: RowMark,
    },
    /// The row is older than what was committed by it: the database is an older copy.
    Older { before: RowMark },
    /// The row has commits of its lane's that the lane has not made: the database is another copy.
    Another { before: RowMark },
}

/// Compares the row with what the group has committed, and with what the lane has known of it before, if it has.
pub(super) fn compare(row: Row, committed: Option<&Committed>, known: Option<Row>) -> Verdict {
    let mark = committed.and_then(Committed::row);
    let before = newest(mark, known.and_then(Row::mark));
    if let Some(before) = before {
        let offset = committed.map(|committed| committed.offset);
        match row.next_offset {
            None => return Verdict::Emptied { offset, before },
            Some(_) if (before.generation, before.commits) > row.age() => {
                return Verdict::Older { before };
            }
            Some(_) if known.is_some_and(|known| row.is_of_another_copy(known)) => {
                return Verdict::Another { before };
            }
            Some(_) => {}
        }
    }
    match (row.next_offset, committed) {
        (None, None) => Verdict::Agree,
        (None, Some(Committed { offset, .. })) => Verdict::Begins { offset: *offset },
        (Some(_), None) if known.is_some() => Verdict::Agree,
        (Some(next_offset), None) => Verdict::Unset { next_offset },
        (Some(next_offset), Some(Committed { offset, mark })) => match mark {
            Some(mark) if mark.row.is_some() => Verdict::Agree,
            // A host of an earlier version commits without words, as somebody with a tool does.
            None if *offset == next_offset => Verdict::Agree,
            Some(mark) if mark.at_least_once && *offset > next_offset => Verdict::Passed {
                offset: *offset,
                next_offset,
            },
            // The host's own words, from before the lane had a row.
            Some(_) => Verdict::Agree,
            None => Verdict::Set {
                offset: *offset,
                next_offset,
            },
        },
    }
}

fn newest(one: Option<RowMark>, other: Option<RowMark>) -> Option<RowMark> {
    let age = |mark: &RowMark| (mark.generation, mark.commits);
    one.into_iter().chain(other).max_by_key(age)
}

impl Verdict {
    /// What the row was, where the database is not the one that it was. New outputs of the lane must be of a generation above
    /// that of this one.
    pub(super) fn before(self) -> Option<RowMark> {
        match self {
            Self::Emptied { before, .. } | Self::Older { before } | Self::Another { before } => {
                Some(before)
            }
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
            Verdict::Passed {
                offset,
                next_offset,
            } => write!(
                f,
                "the group's offset {offset} in {topic} {partition} was committed by a host that delivered to this stage at least \
                 once, while its row in stagehost_progress stayed at {next_offset}: all below {offset} is done, going on there. To go on elsewhere, set both: the row, and the group's offset"
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
                let there_was = match offset {
                    Some(offset) => format!("the group's committed offset {offset} is that of one"),
                    None => "the group has no committed offset, and there was one".to_owned(),
                };
                // The group's offset may be late, and the lane have known of more.
                let offset = offset.max(Some(before.next_offset)).unwrap_or_default();
                write!(
                    f,
                    "{store} has no row in stagehost_progress for {group}, {topic} {partition}, and {there_was} with {} \
                     commits, of generation {}: the database was emptied, or is another one, and lacks what came of the \
                     records below {offset}. Bring the database back; or, stopped, say where to go on: ",
                    before.commits, before.generation
                )?;
                reset(f, offset)
            }
            Verdict::Older { before } | Verdict::Another { before } => write!(
                f,
                "{store} is {}: its row for {group}, {topic} {partition} has {} commits of generation {} and goes on at {}, \
                 and there was one with {} commits of generation {} that went on at {}. The row counts: records from there on \
                 are processed again, and their outputs are new ones for whoever reads them, of generation {}. /readyz \
                 says so until they are; if another copy is meant, bring that one back",
                match self.verdict {
                    Verdict::Older { .. } => "an older copy",
                    _ => "another copy",
                },
                self.row.commits,
                self.row.generation,
                self.row.next_offset.unwrap_or_default(),
                before.commits,
                before.generation,
                before.next_offset,
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
            epoch: 3,
            generation,
            commits,
            next_offset,
        }
    }

    fn committed(offset: i64, mark: Option<(i64, i64)>) -> Committed {
        let of = |(generation, commits)| Mark {
            row: Some(RowMark {
                generation,
                commits,
                next_offset: offset,
            }),
            ..Mark::default()
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
            assert_eq!(compare(row, Some(&of), None), Verdict::Agree, "{of:?}");
        }
    }

    #[test]
    fn what_others_did_is_told_apart() {
        let known = row(5, 10, Some(100));
        let set = Verdict::Set {
            offset: 0,
            next_offset: 100,
        };
        assert_eq!(compare(known, Some(&committed(0, None)), None), set);
        let unset = Verdict::Unset { next_offset: 100 };
        assert_eq!(compare(known, None, None), unset);
        let new = row(7, 0, None);
        assert_eq!(compare(new, None, None), Verdict::Agree);
        let begins = Verdict::Begins { offset: 3 };
        assert_eq!(compare(new, Some(&committed(3, None)), None), begins);
        let emptied = compare(new, Some(&committed(3, Some((5, 1)))), None);
        assert!(matches!(
            emptied,
            Verdict::Emptied {
                offset: Some(3),
                ..
            }
        ));
        assert_eq!(emptied.before().map(|row| row.generation), Some(5));
        let passed = |offset, at_least_once| {
            let mark = Some(Mark {
                at_least_once,
                ..Mark::default()
            });
            compare(known, Some(&Committed { offset, mark }), None)
        };
        assert_eq!(passed(100, true), Verdict::Agree);
        // Where a lane begins that has no row yet, in the place of one that was lost and is restored.
        assert_eq!(passed(101, false), Verdict::Agree);
        let (offset, next_offset) = (101, 100);
        assert_eq!(
            passed(101, true),
            Verdict::Passed {
                offset,
                next_offset
            }
        );
        for before in [(5, 11), (6, 1)] {
            let older = compare(known, Some(&committed(120, Some(before))), None);
            assert!(matches!(older, Verdict::Older { .. }), "{before:?}");
        }
    }

    /// What the group has committed may be late, and the lane has seen more.
    #[test]
    fn what_the_lane_has_known_counts_as_well() {
        let known = Some(row(5, 10, Some(100)));
        let late = committed(40, Some((5, 4)));
        // Markers are passed behind what the row says.
        let passed = committed(102, Some((5, 10)));
        let verdict = |row, committed| compare(row, committed, known);
        for (commits, next_offset) in [(9, 90), (4, 40)] {
            let older = verdict(row(5, commits, Some(next_offset)), Some(&late));
            assert!(matches!(older, Verdict::Older { .. }), "{commits}");
        }
        let emptied = verdict(row(7, 0, None), None);
        let before = emptied.before().map(|before| before.next_offset);
        assert_eq!(before, Some(100));
        // The mend leads to where the lane was, and not to where the group knows of.
        let id = LaneId {
            group: "g".into(),
            topic: "t".into(),
            partition: 3,
        };
        for (committed, expected) in [(None, 100), (Some(&late), 100), (Some(&passed), 102)] {
            let row = row(7, 0, None);
            let said = Said {
                verdict: compare(row, committed, known),
                row,
                id: &id,
                store: &"SQL store `db`",
            };
            let mend = format!("--to-offset {expected} --execute");
            let said = said.to_string();
            assert!(said.contains(&mend), "{said}");
        }
        assert_eq!(verdict(row(5, 10, Some(100)), None), Verdict::Agree);
        // By another host since, and in another copy.
        let others = Row {
            epoch: 4,
            ..row(5, 12, Some(120))
        };
        assert_eq!(verdict(others, Some(&late)), Verdict::Agree);
        let another = verdict(row(5, 12, Some(80)), Some(&late));
        assert!(matches!(another, Verdict::Another { .. }), "{another:?}");
    }

    #[test]
    fn a_row_that_is_not_as_it_was_left_is_taken_or_changed() {
        let known = row(5, 10, Some(100));
        let found = |epoch, generation, commits| {
            Fate::of(
                known,
                Some(Row {
                    epoch,
                    ..row(generation, commits, Some(100))
                }),
            )
        };
        assert_eq!(found(3, 5, 10), Fate::Kept);
        assert_eq!(found(4, 5, 10), Fate::Taken);
        assert_eq!(found(4, 5, 11), Fate::Taken);
        assert_eq!(Fate::of(known, None), Fate::Changed);
        for (epoch, generation, commits) in [
            // A copy of a moment ago, of before the claim, and of a time in between.
            (3, 5, 9),
            (2, 5, 9),
            (4, 5, 9),
            // One that went on elsewhere, and one that somebody has written into.
            (3, 5, 11),
            (3, 6, 10),
        ] {
            assert_eq!(found(epoch, generation, commits), Fate::Changed);
        }
    }
}
