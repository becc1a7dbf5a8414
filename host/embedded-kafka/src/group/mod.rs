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
            protocols: request.protocols,
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

    /// The groups with members: id and protocol type.
    pub(crate) fn list(&self) -> Vec<(String, String)> {
        lock(&self.by_id)
            .iter()
            .map(|(id, group)| (id.clone(), group.protocol_type().to_owned()))
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

fn millis(ms: i32) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0))
}
