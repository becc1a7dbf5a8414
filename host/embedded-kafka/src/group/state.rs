//! One group: its generation, and the steps of a rebalance.
//!
//! Members join (`Preparing`), the broker picks a protocol and a leader, members ask for their assignment while the
//! leader works it out (`Completing`), and then all consume (`Stable`).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use bytes::Bytes;
use kafka_protocol::ResponseError;
use tokio::sync::oneshot;

use super::{Caller, JoinRefused};

/// The protocol type of groups that consume.
const CONSUMER: &str = "consumer";

/// One group. Methods are told the time.
#[derive(Debug)]
pub(crate) struct Group {
    pub(super) phase: Phase,
    pub(super) generation: i32,
    pub(super) protocol_type: String,
    pub(super) protocol: Option<String>,
    pub(super) leader: Option<String>,
    pub(super) members: BTreeMap<String, Member>,
    /// Member id by instance id.
    pub(super) instances: HashMap<String, String>,
    /// Ids handed out to newcomers that have not joined with them yet, and until when they hold.
    pub(super) newcomers: HashMap<String, Instant>,
    pub(super) rebalance_delay: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Empty,
    /// Members join. A group that was empty waits until `deadline` in any case, since nobody knows who is coming.
    Preparing {
        deadline: Instant,
        from_empty: bool,
    },
    /// The leader assigns.
    Completing {
        deadline: Instant,
    },
    Stable,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) instance: Option<String>,
    pub(super) client_id: String,
    pub(super) client_host: String,
    pub(super) session_timeout: Duration,
    pub(super) rebalance_timeout: Duration,
    pub(super) protocols: Vec<(String, Bytes)>,
    pub(super) assignment: Bytes,
    pub(super) expires: Instant,
    pub(super) joining: Option<oneshot::Sender<Result<Joined, JoinRefused>>>,
    pub(super) syncing: Option<oneshot::Sender<Result<Bytes, ResponseError>>>,
}

/// A request to join, and where its answer goes.
#[derive(Debug)]
pub(super) struct Join {
    pub(super) member: String,
    pub(super) instance: Option<String>,
    pub(super) client_id: String,
    pub(super) client_host: String,
    pub(super) session_timeout: Duration,
    pub(super) rebalance_timeout: Duration,
    pub(super) protocol_type: String,
    pub(super) protocols: Vec<(String, Bytes)>,
    pub(super) needs_id: bool,
    pub(super) answer: oneshot::Sender<Result<Joined, JoinRefused>>,
}

/// The answer to a join: the generation, and for its leader all members with their subscriptions.
#[derive(Debug)]
pub(crate) struct Joined {
    pub(crate) generation: i32,
    pub(crate) protocol: String,
    pub(crate) leader: String,
    pub(crate) member: String,
    pub(crate) members: Vec<JoinedMember>,
}

/// A member as its leader sees it.
#[derive(Debug)]
pub(crate) struct JoinedMember {
    pub(crate) id: String,
    pub(crate) instance: Option<String>,
    pub(crate) subscription: Bytes,
}

/// A group as tools see it.
#[derive(Debug)]
pub(crate) struct Description {
    pub(crate) state: &'static str,
    pub(crate) protocol_type: String,
    pub(crate) protocol: String,
    pub(crate) members: Vec<DescribedMember>,
}

/// A member as tools see it.
#[derive(Debug)]
pub(crate) struct DescribedMember {
    pub(crate) id: String,
    pub(crate) client_id: String,
    pub(crate) client_host: String,
    pub(crate) subscription: Bytes,
    pub(crate) assignment: Bytes,
}

impl Description {
    /// Whether a member reads a topic, as far as can be told: what members of other kinds say is not known.
    pub(crate) fn reads(&self, topic: &str) -> bool {
        self.members.iter().any(|member| {
            self.protocol_type != CONSUMER
                || subscribed(&member.subscription)
                    .is_none_or(|topics| topics.contains(&topic.as_bytes()))
        })
    }
}

/// The topics that the subscription of a consumer names.
fn subscribed(mut subscription: &[u8]) -> Option<Vec<&[u8]>> {
    let mut take = |len: usize| -> Option<&[u8]> {
        let (taken, rest) = subscription.split_at_checked(len)?;
        subscription = rest;
        Some(taken)
    };
    let _version = take(2)?;
    let count = i32::from_be_bytes(take(4)?.try_into().ok()?);
    (0..count)
        .map(|_| {
            let len = i16::from_be_bytes(take(2)?.try_into().ok()?);
            take(usize::try_from(len).ok()?)
        })
        .collect()
}

impl Group {
    pub(super) fn new(rebalance_delay: Duration) -> Self {
        Self {
            phase: Phase::Empty,
            generation: 0,
            protocol_type: String::new(),
            protocol: None,
            leader: None,
            members: BTreeMap::new(),
            instances: HashMap::new(),
            newcomers: HashMap::new(),
            rebalance_delay,
        }
    }

    pub(super) fn protocol_type(&self) -> &str {
        &self.protocol_type
    }

    /// The state as tools know it.
    pub(super) fn state_name(&self) -> &'static str {
        match self.phase {
            Phase::Empty => "Empty",
            Phase::Preparing { .. } => "PreparingRebalance",
            Phase::Completing { .. } => "CompletingRebalance",
            Phase::Stable => "Stable",
        }
    }

    /// Whether nothing would be lost by forgetting the group.
    pub(super) fn is_forgettable(&self) -> bool {
        self.phase == Phase::Empty && self.newcomers.is_empty()
    }

    pub(super) fn describe(&self) -> Description {
        let protocol = self.protocol.clone().unwrap_or_default();
        let members = self.members.iter().map(|(id, member)| DescribedMember {
            id: id.clone(),
            client_id: member.client_id.clone(),
            client_host: member.client_host.clone(),
            subscription: member.subscription(&protocol),
            assignment: member.assignment.clone(),
        });
        Description {
            state: self.state_name(),
            protocol_type: self.protocol_type.clone(),
            members: members.collect(),
            protocol,
        }
    }

    /// Takes the leader's assignments, or a member's wish for its own.
    pub(super) fn sync(
        &mut self,
        caller: &Caller,
        assignments: Vec<(String, Bytes)>,
        answer: oneshot::Sender<Result<Bytes, ResponseError>>,
        now: Instant,
    ) {
        if let Err(error) = self.check(caller) {
            let _ = answer.send(Err(error));
            return;
        }
        let Some(member) = self.members.get_mut(&caller.member) else {
            return;
        };
        match self.phase {
            Phase::Empty => drop(answer.send(Err(ResponseError::UnknownMemberId))),
            Phase::Preparing { .. } => drop(answer.send(Err(ResponseError::RebalanceInProgress))),
            Phase::Stable => {
                member.renew(now);
                let _ = answer.send(Ok(member.assignment.clone()));
            }
            Phase::Completing { .. } => {
                member.syncing = Some(answer);
                if self.leader.as_ref() == Some(&caller.member) {
                    self.assign(assignments, now);
                }
            }
        }
    }

    pub(super) fn heartbeat(&mut self, caller: &Caller, now: Instant) -> Result<(), ResponseError> {
        self.check(caller)?.renew(now);
        match self.phase {
            Phase::Empty => Err(ResponseError::UnknownMemberId),
            Phase::Preparing { .. } => Err(ResponseError::RebalanceInProgress),
            Phase::Completing { .. } | Phase::Stable => Ok(()),
        }
    }

    pub(super) fn may_commit(
        &mut self,
        caller: &Caller,
        now: Instant,
    ) -> Result<(), ResponseError> {
        if caller.generation < 0 && self.phase == Phase::Empty {
            return Ok(());
        }
        self.check(caller)?.renew(now);
        match self.phase {
            Phase::Completing { .. } => Err(ResponseError::RebalanceInProgress),
            Phase::Empty | Phase::Preparing { .. } | Phase::Stable => Ok(()),
        }
    }

    /// Does what is due, and says when to look again.
    pub(super) fn sweep(&mut self, now: Instant) -> Option<Instant> {
        self.newcomers.retain(|_, until| *until > now);
        let expired = |(id, member): (&String, &Member)| {
            (!member.waits() && member.expires <= now).then(|| id.clone())
        };
        let expired: Vec<String> = self.members.iter().filter_map(expired).collect();
        for id in expired {
            tracing::info!(
                member = id,
                "a group member was not heard of for its session timeout"
            );
            self.remove(&id, now);
        }
        match self.phase {
            Phase::Preparing { .. } => self.try_complete(now),
            Phase::Completing { deadline } if deadline <= now => self.drop_unsynced(now),
            Phase::Completing { .. } | Phase::Empty | Phase::Stable => {}
        }
        let deadline = match self.phase {
            Phase::Preparing { deadline, .. } | Phase::Completing { deadline } => Some(deadline),
            Phase::Empty | Phase::Stable => None,
        };
        let members = self
            .members
            .values()
            .filter(|member| !member.waits())
            .map(|member| member.expires);
        members
            .chain(self.newcomers.values().copied())
            .chain(deadline)
            .min()
    }

    /// Begins a rebalance: all members are to join again.
    pub(super) fn rebalance(&mut self, now: Instant) {
        for member in self.members.values_mut() {
            if let Some(syncing) = member.syncing.take() {
                let _ = syncing.send(Err(ResponseError::RebalanceInProgress));
                member.renew(now);
            }
        }
        let from_empty = self.phase == Phase::Empty;
        let wait = if from_empty {
            self.rebalance_delay
        } else {
            self.rebalance_timeout()
        };
        self.phase = Phase::Preparing {
            deadline: now + wait,
            from_empty,
        };
        self.try_complete(now);
    }

    /// Ends the joining when all are there or the time is over.
    pub(super) fn try_complete(&mut self, now: Instant) {
        let Phase::Preparing {
            deadline,
            from_empty,
        } = self.phase
        else {
            return;
        };
        let all_joined = self.newcomers.is_empty()
            && self.members.values().all(|member| member.joining.is_some());
        if self.members.is_empty() || (all_joined && !from_empty) || now >= deadline {
            self.complete(now);
        }
    }

    fn complete(&mut self, now: Instant) {
        // Static members may be away until their session ends; the others had their time.
        let late = |member: &Member| member.joining.is_none() && member.instance.is_none();
        self.members.retain(|_, member| !late(member));
        self.generation = self.generation.checked_add(1).unwrap_or(1);
        if self.members.is_empty() {
            self.phase = Phase::Empty;
            self.protocol = None;
            self.leader = None;
            return;
        }
        let joined = |id: &&String| {
            self.members
                .get(*id)
                .is_some_and(|member| member.joining.is_some())
        };
        let leader = self
            .leader
            .iter()
            .find(joined)
            .or_else(|| self.members.keys().find(joined))
            .cloned();
        let Some(leader) = leader else {
            // Only static members are left, none of them here: wait for one, or for the end of their sessions.
            let deadline = now + self.rebalance_timeout();
            self.phase = Phase::Preparing {
                deadline,
                from_empty: false,
            };
            return;
        };
        self.leader = Some(leader);
        self.protocol = self.choose_protocol();
        self.phase = Phase::Completing {
            deadline: now + self.rebalance_timeout(),
        };
        self.answer_joins(now);
    }

    fn answer_joins(&mut self, now: Instant) {
        let ids: Vec<String> = self.members.keys().cloned().collect();
        for id in ids {
            let answer = self.joined(&id);
            if let Some(member) = self.members.get_mut(&id)
                && let Some(joining) = member.joining.take()
            {
                member.renew(now);
                // A client that went away is found by its session timeout.
                let _ = joining.send(Ok(answer));
            }
        }
    }

    /// What a member is told of the current generation.
    pub(super) fn joined(&self, id: &str) -> Joined {
        let protocol = self.protocol.clone().unwrap_or_default();
        let leader = self.leader.clone().unwrap_or_default();
        let members = if leader == id {
            self.joined_members(&protocol)
        } else {
            Vec::new()
        };
        Joined {
            generation: self.generation,
            protocol,
            leader,
            member: id.to_owned(),
            members,
        }
    }

    fn joined_members(&self, protocol: &str) -> Vec<JoinedMember> {
        let joined = self.members.iter().map(|(id, member)| JoinedMember {
            id: id.clone(),
            instance: member.instance.clone(),
            subscription: member.subscription(protocol),
        });
        joined.collect()
    }

    /// The protocol that all know and most prefer.
    pub(super) fn choose_protocol(&self) -> Option<String> {
        let mut votes: BTreeMap<&str, usize> = BTreeMap::new();
        for member in self.members.values() {
            let favourite = member
                .protocols
                .iter()
                .map(|(name, _)| name.as_str())
                .find(|name| self.all_know(name));
            *votes.entry(favourite?).or_default() += 1;
        }
        votes
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(name, _)| name.to_owned())
    }

    fn all_know(&self, protocol: &str) -> bool {
        self.members
            .values()
            .all(|member| member.protocols.iter().any(|(name, _)| name == protocol))
    }

    /// Whether a newcomer speaks what the members speak.
    pub(super) fn accepts(&self, protocol_type: &str, protocols: &[(String, Bytes)]) -> bool {
        if protocol_type.is_empty() || protocols.is_empty() {
            return false;
        }
        let same_type = self.members.is_empty() || self.protocol_type == protocol_type;
        same_type
            && (self.members.is_empty() || protocols.iter().any(|(name, _)| self.all_know(name)))
    }

    fn assign(&mut self, assignments: Vec<(String, Bytes)>, now: Instant) {
        let mut assignments: HashMap<String, Bytes> = assignments.into_iter().collect();
        for (id, member) in &mut self.members {
            member.assignment = assignments.remove(id).unwrap_or_default();
            if let Some(syncing) = member.syncing.take() {
                member.renew(now);
                let _ = syncing.send(Ok(member.assignment.clone()));
            }
        }
        self.phase = Phase::Stable;
    }

    /// Members that joined and then did not ask for their assignment hold the others up.
    fn drop_unsynced(&mut self, now: Instant) {
        let unsynced: HashSet<String> = self
            .members
            .iter()
            .filter(|(_, member)| member.syncing.is_none())
            .map(|(id, _)| id.clone())
            .collect();
        for id in &unsynced {
            self.remove(id, now);
        }
        if let Phase::Completing { .. } = self.phase {
            self.rebalance(now);
        }
    }

    fn rebalance_timeout(&self) -> Duration {
        self.members
            .values()
            .map(|member| member.rebalance_timeout)
            .max()
            .unwrap_or_default()
    }

    /// The member that calls, if it is one of this generation.
    fn check(&mut self, caller: &Caller) -> Result<&mut Member, ResponseError> {
        self.check_instance(&caller.member, caller.instance.as_deref())?;
        let generation = self.generation;
        let member = self
            .members
            .get_mut(&caller.member)
            .ok_or(ResponseError::UnknownMemberId)?;
        if caller.generation == generation {
            Ok(member)
        } else {
            Err(ResponseError::IllegalGeneration)
        }
    }

    /// Whether another process has taken over the instance id.
    pub(super) fn check_instance(
        &self,
        member: &str,
        instance: Option<&str>,
    ) -> Result<(), ResponseError> {
        match instance.map(|instance| self.instances.get(instance)) {
            Some(None) => Err(ResponseError::UnknownMemberId),
            Some(Some(known)) if known != member => Err(ResponseError::FencedInstanceId),
            Some(Some(_)) | None => Ok(()),
        }
    }
}

impl Member {
    pub(super) fn renew(&mut self, now: Instant) {
        self.expires = now + self.session_timeout;
    }

    /// Whether it waits for an answer, which is a sign of life.
    pub(super) fn waits(&self) -> bool {
        self.joining.is_some() || self.syncing.is_some()
    }

    fn subscription(&self, protocol: &str) -> Bytes {
        let found = self.protocols.iter().find(|(name, _)| name == protocol);
        found
            .map(|(_, subscription)| subscription.clone())
            .unwrap_or_default()
    }
}
