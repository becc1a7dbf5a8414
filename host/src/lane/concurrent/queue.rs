//! Which of the messages at hand may be handled now.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};

use crate::pipeline::Order;
use crate::record::Record;

/// A message that was taken.
pub(super) struct Message {
    pub(super) record: Record,
    /// Its place in the window.
    pub(super) ticket: u64,
    pub(super) bytes: usize,
    /// It has a dead letter.
    pub(super) given_up: bool,
    /// What it must not run beside, if there is such.
    key: Option<u64>,
}

/// Messages that are not being handled, in their order.
pub(super) struct Queue {
    by_key: bool,
    /// Keys are known by their hash: two keys of one hash wait for each other, which does no harm.
    hasher: RandomState,
    /// Those nobody has looked at yet.
    ready: VecDeque<Message>,
    /// Those whose turn has come; fewer than are handled at a time.
    released: VecDeque<Message>,
    /// Of each key that is being handled, the messages that wait for it.
    busy: HashMap<u64, VecDeque<Message>>,
}

impl Queue {
    pub(super) fn new(order: Order) -> Self {
        Self {
            by_key: order == Order::Key,
            hasher: RandomState::new(),
            ready: VecDeque::new(),
            released: VecDeque::new(),
            busy: HashMap::new(),
        }
    }

    pub(super) fn push(&mut self, record: Record, ticket: u64) {
        // A message without a key is a key of its own.
        let key = record.key.as_ref().filter(|_| self.by_key);
        self.ready.push_back(Message {
            key: key.map(|key| self.hasher.hash_one(key)),
            bytes: record.size(),
            ticket,
            given_up: false,
            record,
        });
    }

    /// The next message that may be handled; its key is busy until it is [`release`](Self::release)d.
    pub(super) fn next(&mut self) -> Option<Message> {
        if let Some(message) = self.released.pop_front() {
            return Some(message);
        }
        while let Some(message) = self.ready.pop_front() {
            let Some(key) = message.key else {
                return Some(message);
            };
            match self.busy.get_mut(&key) {
                Some(waiting) => waiting.push_back(message),
                None => {
                    self.busy.insert(key, VecDeque::new());
                    return Some(message);
                }
            }
        }
        None
    }

    /// The message is handled: the next of its key has its turn.
    pub(super) fn release(&mut self, message: &Message) {
        let Some(key) = message.key else {
            return;
        };
        let Some(waiting) = self.busy.get_mut(&key) else {
            return;
        };
        match waiting.pop_front() {
            Some(next) => self.released.push_back(next),
            None => drop(self.busy.remove(&key)),
        }
    }

    /// Whether some may be handled now. Others may wait for their keys.
    pub(super) fn is_ready(&self) -> bool {
        !self.ready.is_empty() || !self.released.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.ready.clear();
        self.released.clear();
        self.busy.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn queue(order: Order, keys: &[Option<&str>]) -> Queue {
        let mut queue = Queue::new(order);
        for (ticket, key) in (0..).zip(keys) {
            let record = Record {
                topic: Arc::from("t"),
                partition: 0,
                offset: 0,
                timestamp: None,
                key: key.map(|key| key.as_bytes().to_vec()),
                value: None,
                headers: Vec::new(),
            };
            queue.push(record, ticket);
        }
        queue
    }

    fn all(queue: &mut Queue) -> Vec<Message> {
        std::iter::from_fn(|| queue.next()).collect()
    }

    fn tickets(messages: &[Message]) -> Vec<u64> {
        messages.iter().map(|message| message.ticket).collect()
    }

    #[test]
    fn a_key_is_handled_once_at_a_time() {
        let (a, b) = (Some("a"), Some("b"));
        let mut queue = queue(Order::Key, &[a, a, b, None, a, None, b]);
        let first = all(&mut queue);
        assert_eq!(tickets(&first), [0, 2, 3, 5]);
        assert!(!queue.is_ready());
        queue.release(&first[2]);
        assert!(!queue.is_ready(), "nobody waits for one without a key");
        queue.release(&first[0]);
        let second = all(&mut queue);
        assert_eq!(tickets(&second), [1]);
        queue.release(&first[1]);
        queue.release(&second[0]);
        let third = all(&mut queue);
        assert_eq!(tickets(&third), [6, 4]);
        for message in &third {
            queue.release(message);
        }
        assert!(queue.busy.is_empty() && !queue.is_ready());
    }

    #[test]
    fn without_an_order_all_are_handled_at_once() {
        let mut queue = queue(Order::None, &[Some("a"), Some("a"), None]);
        assert_eq!(tickets(&all(&mut queue)), [0, 1, 2]);
    }
}
