//! How far a lane has got that finishes messages out of order.

use std::collections::VecDeque;

/// The offsets of the messages that were taken, from the first that is not done on.
#[derive(Default)]
pub(super) struct Window {
    open: VecDeque<Entry>,
    /// The ticket of the first one.
    first: u64,
}

struct Entry {
    offset: i64,
    done: bool,
}

/// All messages up to here are done that were not before.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Advance {
    pub(super) next_offset: i64,
    pub(super) messages: usize,
}

impl Window {
    /// A message is taken, the next one behind those before; answers its ticket.
    pub(super) fn open(&mut self, offset: i64) -> u64 {
        self.open.push_back(Entry {
            offset,
            done: false,
        });
        self.first + (self.open.len() - 1) as u64
    }

    pub(super) fn done(&mut self, ticket: u64) {
        let index = ticket
            .checked_sub(self.first)
            .and_then(|i| usize::try_from(i).ok());
        if let Some(entry) = index.and_then(|index| self.open.get_mut(index)) {
            entry.done = true;
        }
    }

    /// Leaves behind what is done up to the first message that is not.
    pub(super) fn advance(&mut self) -> Option<Advance> {
        let messages = self.open.iter().take_while(|entry| entry.done).count();
        let last = self.open.drain(..messages).next_back()?;
        self.first += messages as u64;
        Some(Advance {
            next_offset: last.offset + 1,
            messages,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advances_over_what_is_done_and_no_further() {
        let mut window = Window::default();
        // Offsets are not consecutive where a topic is compacted.
        let tickets: Vec<_> = [3, 4, 7, 8, 20].map(|offset| window.open(offset)).into();
        let advance = |next_offset, messages| {
            Some(Advance {
                next_offset,
                messages,
            })
        };
        window.done(tickets[1]);
        window.done(tickets[3]);
        assert_eq!(window.advance(), None);
        window.done(tickets[0]);
        assert_eq!(window.advance(), advance(5, 2));
        assert_eq!(window.advance(), None);
        window.done(tickets[4]);
        window.done(tickets[2]);
        assert_eq!(window.advance(), advance(21, 3));
        assert_eq!(window.len(), 0);
        let next = window.open(21);
        window.done(next);
        assert_eq!(window.advance(), advance(22, 1));
    }
}
