//! Consumer groups: who is a member, and who hands out the partitions.
//!
//! The state of a group and its rules are in `state.rs`; here are all groups, their bounds and their time. What
//! members say to each other (their subscriptions and assignments) is opaque to the broker.

mod membership;
mod state;

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::storage::lock;
pub(crate) use state::{Description, Joined};
use state::{Group, Join};

/// Groups with members at once.
const MAX_GROUPS: usize = 10_000;
const MAX_SESSION_TIMEOUT: Duration = Duration::from_secs(30 * 60);
const MIN_REBALANCE_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_REBALANCE_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);
/// Bytes that a member says about itself when it joins (names and subscriptions), and bytes of an assignment.
const MAX_MEMBER_BYTES: usize = 1 << 20;
/// Ways to hand out partitions that a member offers; clients have one to four. Each is looked for in those of all members.
const MAX_PROTOCOLS: usize = 100;
/// With no deadline to wait for, the groups are looked at this often.
const IDLE_SWEEP: Duration = Duration::from_secs(60);

/// The coordinator of all groups.
#[derive(Debug)]
pub(crate) struct Groups {
    by_id: Mutex<HashMap<String, Group>>,
    /// Something has a nearer deadline now.
    changed: Notify,
    min_session_timeout: Duration,
    rebalance_delay: Duration,
}

/// A request to join, as the protocol has it.
#[derive(Debug)]
pub(crate) struct JoinRequest {
    pub(crate) group: String,
    /// Empty: not a member yet.
    pub(crate) member: String,
    pub(crate) instance: Option<String>,
    pub(crate) client_id: String,
    pub(crate) client_host: String,
    pub(crate) session_timeout_ms: i32,
    pub(crate) rebalance_timeout_ms: i32,
    pub(crate) protocol_type: String,
    /// Name and subscription, the preferred first.
    pub(crate) protocols: Vec<(String, Bytes)>,
    /// Whether a newcomer is told its id first and joins with it (protocol version 4 and later).
    pub(crate) needs_id: bool,
}

/// Who asks: a member in a generation, with its instance id if it is a static one.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) member: String,
    pub(crate) instance: Option<String>,
    pub(crate) generation: i32,
}

/// A refused join: the error, and the member id to go on with.
pub(crate) type JoinRefused = (ResponseError, String);

impl Groups {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            by_id: Mutex::default(),
            changed: Notify::new(),
            min_session_timeout: config.min_session_timeout,
            rebalance_delay: config.rebalance_delay,
        }
    }

    /// Joins, and waits until the group has a new generation.
    pub(crate) async fn join(&self, request: JoinRequest) -> Result<Joined, JoinRefused> {
        let member = request.member.clone();
        let refuse = |error| Err((error, member.clone()));
        if request.group.is_empty() {
            return refuse(ResponseError::InvalidGroupId);
        }
        let session_timeout = millis(request.session_timeout_ms);
        if !(self.min_session_timeout..=MAX_SESSION_TIMEOUT).contains(&session_timeout) {
            return refuse(ResponseError::InvalidSessionTimeout);
        }
        let said = request
            .protocols
            .iter()
            .map(|(name, subscription)| name.len() + subscription.len());
        if said.sum::<usize>() > MAX_MEMBER_BYTES || request.protocols.len() > MAX_PROTOCOLS {
            return refuse(ResponseError::InvalidRequest);
        }
        let protocols = request.protocols.into_iter();
        let (answer, answered) = oneshot::channel();
        let join = Join {
            member: request.member,
            instance: request.instance,
            client_id: request.client_id,
            client_host: request.client_host,
            session_timeout,
            rebalance_timeout: millis(request.rebalance_timeout_ms)
                .clamp(MIN_REBALANCE_TIMEOUT, MAX_REBALANCE_TIMEOUT),
            protocol_type: request.protocol_type,
            protocols: protocols
                .map(|(name, subscription)| (name, own(&subscription)))
                .collect(),
            needs_id: request.needs_id,
            answer,
        };
        {
            let mut groups = lock(&self.by_id);
            if !groups.contains_key(&request.group) {
                if !join.member.is_empty() {
                    return refuse(ResponseError::UnknownMemberId);
                }
                if groups.len() >= MAX_GROUPS {
                    return refuse(ResponseError::CoordinatorNotAvailable);
                }
            }
            let group = groups
                .entry(request.group)
                .or_insert_with(|| Group::new(self.rebalance_delay));
            group.join(join, Instant::now());
        }
        self.changed.notify_one();
        answered
            .await
            .unwrap_or_else(|_| refuse(ResponseError::UnknownMemberId))
    }

    /// Hands in the assignments (the leader) and waits for one's own.
    pub(crate) async fn sync(
        &self,
        group: &str,
        caller: &Caller,
        assignments: Vec<(String, Bytes)>,
    ) -> Result<Bytes, ResponseError> {
        if assignments
            .iter()
            .any(|(_, assignment)| assignment.len() > MAX_MEMBER_BYTES)
        {
            return Err(ResponseError::InvalidRequest);
        }
        let assignments = assignments
            .into_iter()
            .map(|(member, assignment)| (member, own(&assignment)))
            .collect();
        let (answer, answered) = oneshot::channel();
        self.with(group, |group| {
            group.sync(caller, assignments, answer, Instant::now());
            Ok(())
        })?;
        answered
            .await
            .unwrap_or(Err(ResponseError::UnknownMemberId))
    }

    /// Says that a member lives; the answer may be that the group is being rebalanced.
    pub(crate) fn heartbeat(&self, group: &str, caller: &Caller) -> Result<(), ResponseError> {
        self.with(group, |group| group.heartbeat(caller, Instant::now()))
    }

    /// Takes a member out; a static one can be named by its instance id alone.
    pub(crate) fn leave(
        &self,
        group: &str,
        member: &str,
        instance: Option<&str>,
    ) -> Result<(), ResponseError> {
        let left = self.with(group, |group| group.leave(member, instance, Instant::now()));
        self.changed.notify_one();
        left
    }

    /// Whether this caller may commit offsets for the group now.
    pub(crate) fn may_commit(&self, group: &str, caller: &Caller) -> Result<(), ResponseError> {
        match lock(&self.by_id).get_mut(group) {
            Some(group) => group.may_commit(caller, Instant::now()),
            // Who commits without being a member can do so when there are none.
            None if caller.generation < 0 => Ok(()),
            None => Err(ResponseError::UnknownMemberId),
        }
    }

    /// The groups with members: id, protocol type and state.
    pub(crate) fn list(&self) -> Vec<(String, (String, &'static str))> {
        lock(&self.by_id)
            .iter()
            .map(|(id, group)| {
                let protocol_type = group.protocol_type().to_owned();
                (id.clone(), (protocol_type, group.state_name()))
            })
            .collect()
    }

    /// A group with members.
    pub(crate) fn describe(&self, group: &str) -> Option<Description> {
        lock(&self.by_id).get(group).map(Group::describe)
    }

    /// Removes members whose session ended and completes rebalances that waited long enough, until `shutdown`.
    pub(crate) async fn keep_time(&self, shutdown: CancellationToken) {
        loop {
            let next = self.sweep(Instant::now());
            // All three are cancel-safe: `notify_one` leaves a permit when nobody waits.
            tokio::select! {
                () = tokio::time::sleep_until(next.into()) => {}
                () = self.changed.notified() => {}
                () = shutdown.cancelled() => return,
            }
        }
    }

    fn sweep(&self, now: Instant) -> Instant {
        let mut next = now + IDLE_SWEEP;
        lock(&self.by_id).retain(|_, group| {
            if let Some(deadline) = group.sweep(now) {
                next = next.min(deadline);
            }
            !group.is_forgettable()
        });
        next
    }

    fn with<T>(
        &self,
        group: &str,
        act: impl FnOnce(&mut Group) -> Result<T, ResponseError>,
    ) -> Result<T, ResponseError> {
        if group.is_empty() {
            return Err(ResponseError::InvalidGroupId);
        }
        let mut groups = lock(&self.by_id);
        act(groups
            .get_mut(group)
            .ok_or(ResponseError::UnknownMemberId)?)
    }
}

/// A copy: what is kept must not keep the request that it came in.
fn own(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn millis(ms: i32) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(subscription: Bytes) -> JoinRequest {
        JoinRequest {
            group: "g".to_owned(),
            member: String::new(),
            instance: None,
            client_id: "c".to_owned(),
            client_host: "/127.0.0.1".to_owned(),
            session_timeout_ms: 10_000,
            rebalance_timeout_ms: 10_000,
            protocol_type: "consumer".to_owned(),
            protocols: vec![("range".to_owned(), subscription)],
            needs_id: false,
        }
    }

    #[tokio::test]
    async fn what_a_member_says_is_bounded_and_does_not_hold_its_request() {
        let mut config = Config::new("unused");
        config.rebalance_delay = Duration::ZERO;
        let groups = Groups::new(&config);
        let refused = groups.join(request(vec![0; MAX_MEMBER_BYTES].into())).await;
        assert_eq!(refused.unwrap_err().0, ResponseError::InvalidRequest);
        let bytes = Bytes::from(vec![0; 1000]);
        let join = groups.join(request(bytes.slice(..10)));
        let sweep = async { groups.sweep(Instant::now()) };
        let joined = tokio::join!(join, sweep).0.unwrap();
        assert!(bytes.is_unique(), "a subscription holds its request");
        let caller = Caller {
            member: joined.member.clone(),
            instance: None,
            generation: joined.generation,
        };
        let assign = |assignment| vec![(joined.member.clone(), assignment)];
        let refused = groups
            .sync("g", &caller, assign(vec![0; MAX_MEMBER_BYTES + 1].into()))
            .await;
        assert_eq!(refused.unwrap_err(), ResponseError::InvalidRequest);
        let assigned = groups.sync("g", &caller, assign(bytes.slice(..10))).await;
        assert_eq!(assigned.unwrap().len(), 10);
        assert!(bytes.is_unique(), "an assignment holds its request");
    }
}
