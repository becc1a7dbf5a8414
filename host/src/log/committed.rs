//! What a group's commit says beside the offset: enough to tell who made it, and of what.
//!
//! An offset alone does not say whether its topic is still the same, whether a lane's row is the one that it was committed
//! by, or whether somebody else has set it. Who sets it with Kafka's tools takes these words away.

use std::fmt;

/// What the words begin with: how the rest is read.
const FORMAT: &str = "stagehost:1";
/// The word of a lane that keeps no row. Earlier versions pass over it.
const AT_LEAST_ONCE: &str = "delivery=at-least-once";

/// A group's commit in a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// All records below it are done.
    pub offset: i64,
    /// What the host that made it wrote beside; `None` where it was somebody else, or a host of an earlier version.
    pub mark: Option<Mark>,
}

/// What a host writes beside the offset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mark {
    /// The topic's id, where the log tells it.
    pub topic: Option<String>,
    /// The row of a transactional lane.
    pub row: Option<RowMark>,
    /// Whether a lane without a row has delivered all below it.
    pub at_least_once: bool,
}

/// A lane's row as it was when the offset was committed, or newer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowMark {
    /// Its generation.
    pub generation: i64,
    /// How often the lane had committed.
    pub commits: i64,
    /// Where it said to go on.
    pub next_offset: i64,
}

/// A mark as it is written beside an offset.
pub struct Words<'a> {
    /// The offset.
    pub offset: i64,
    /// The topic's id.
    pub topic: Option<&'a str>,
    /// The lane's row.
    pub row: Option<RowMark>,
    /// Whether a lane without a row has delivered all below it.
    pub at_least_once: bool,
}

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{FORMAT} offset={}", self.offset)?;
        if let Some(topic) = self.topic {
            write!(f, " topic={topic}")?;
        }
        if self.at_least_once {
            write!(f, " {AT_LEAST_ONCE}")?;
        }
        match self.row {
            Some(RowMark {
                generation,
                commits,
                next_offset,
            }) => write!(
                f,
                " generation={generation} commits={commits} next={next_offset}"
            ),
            None => Ok(()),
        }
    }
}

impl Committed {
    /// A commit with the words that stand beside it. Those of another offset are not its own: somebody has set it and kept
    /// them.
    pub fn read(offset: i64, words: &str) -> Self {
        let mark = read(words).filter(|(own, _)| *own == offset);
        Self {
            offset,
            mark: mark.map(|(_, mark)| mark),
        }
    }

    /// The row that it was committed by.
    pub fn row(&self) -> Option<RowMark> {
        self.mark.as_ref()?.row
    }

    /// Whether a lane that kept no row has delivered all below it. A lane that has not written its first row yet commits where it
    /// has begun, which says nothing of what is below.
    pub fn is_at_least_once(&self) -> bool {
        self.mark.as_ref().is_some_and(|mark| mark.at_least_once)
    }

    /// The id of the topic that it was committed for.
    pub fn topic(&self) -> Option<&str> {
        self.mark.as_ref()?.topic.as_deref()
    }
}

/// Where to go on: where the lane says, and else where the group has got to. The group may know of markers behind the lane's
/// offset, and that there is nothing else up to its own; and of what a host did that kept no row.
pub fn known(wanted: Option<i64>, committed: Option<&Committed>) -> Option<i64> {
    let Some(wanted) = wanted else {
        return committed.map(|committed| committed.offset);
    };
    let passed = committed.filter(|committed| match committed.row() {
        Some(row) => row.next_offset == wanted,
        None => committed.is_at_least_once(),
    });
    Some(passed.map_or(wanted, |committed| committed.offset.max(wanted)))
}

/// The offset, and what is said of it. What newer versions may add is passed over.
fn read(words: &str) -> Option<(i64, Mark)> {
    let at_least_once = words.split(' ').any(|word| word == AT_LEAST_ONCE);
    let mut words = words.split(' ');
    if words.next() != Some(FORMAT) {
        return None;
    }
    let (mut offset, mut topic) = (None, None);
    let (mut generation, mut commits, mut next) = (None, None, None);
    for (name, value) in words.filter_map(|word| word.split_once('=')) {
        match name {
            "offset" => offset = value.parse().ok(),
            "topic" => topic = Some(value.to_owned()),
            "generation" => generation = value.parse().ok(),
            "commits" => commits = value.parse().ok(),
            "next" => next = value.parse().ok(),
            _ => {}
        }
    }
    let row = generation
        .zip(commits)
        .zip(next)
        .map(|((generation, commits), next_offset)| RowMark {
            generation,
            commits,
            next_offset,
        });
    let mark = Mark {
        topic,
        row,
        at_least_once,
    };
    Some((offset?, mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_reads_as_it_is_written() {
        let row = RowMark {
            generation: 1_795_987_726_368,
            commits: 7,
            next_offset: 41,
        };
        for (topic, row) in [
            (None, None),
            (Some("x4gGFUeTRc-7sbTKbwZcVw"), None),
            (Some("x4gGFUeTRc-7sbTKbwZcVw"), Some(row)),
        ] {
            let at_least_once = row.is_none();
            let written = Words {
                offset: 42,
                topic,
                row,
                at_least_once,
            };
            let mark = Mark {
                topic: topic.map(str::to_owned),
                row,
                at_least_once,
            };
            let read = Committed::read(42, &written.to_string());
            assert_eq!(read.mark, Some(mark), "{written}");
        }
    }

    #[test]
    fn what_others_wrote_is_no_mark() {
        let kept = Words {
            offset: 42,
            topic: None,
            row: None,
            at_least_once: false,
        }
        .to_string();
        for (offset, words) in [(42, ""), (42, "AgAAAY0="), (42, "stagehost:1"), (41, &kept)] {
            assert_eq!(Committed::read(offset, words).mark, None, "{words}");
        }
        let newer = Committed::read(42, &format!("{kept} more=1"));
        assert_eq!(newer.mark, Some(Mark::default()));
    }

    #[test]
    fn a_lane_goes_on_behind_markers_that_its_group_has_passed() {
        let committed = |offset, next_offset| {
            let row = RowMark {
                next_offset,
                ..RowMark::default()
            };
            let mark = Mark {
                row: Some(row),
                ..Mark::default()
            };
            Some(Committed {
                offset,
                mark: Some(mark),
            })
        };
        let set = Some(Committed {
            offset: 9,
            mark: None,
        });
        let without_row = |at_least_once| {
            let mark = Mark {
                at_least_once,
                ..Mark::default()
            };
            Some(Committed {
                offset: 9,
                mark: Some(mark),
            })
        };
        for (wanted, committed, expected) in [
            (None, None, None),
            (None, committed(7, 5), Some(7)),
            (Some(5), None, Some(5)),
            (Some(5), committed(7, 5), Some(7)),
            // The row has gone on since.
            (Some(6), committed(7, 5), Some(6)),
            (Some(8), committed(7, 7), Some(8)),
            // Somebody has set it.
            (Some(5), set, Some(5)),
            // What was delivered at least once meanwhile is done; where another lane has begun says nothing of it.
            (Some(5), without_row(true), Some(9)),
            (Some(12), without_row(true), Some(12)),
            (Some(5), without_row(false), Some(5)),
        ] {
            assert_eq!(known(wanted, committed.as_ref()), expected, "{wanted:?}");
        }
    }
}
