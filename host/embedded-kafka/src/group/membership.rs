//! Who comes into a group and who goes.

use std::time::Instant;

use kafka_protocol::ResponseError;
use uuid::Uuid;

use super::state::{Group, Join, Member, Phase};

/// Members and newcomers of a group.
const MAX_MEMBERS: usize = 1000;
/// Of a client's name, this much goes into its member id.
const MAX_NAME_LEN: usize = 249;

impl Group {
    /// Takes a join; its answer comes when the rebalance that it begins, or that goes on, is complete.
    pub(super) fn join(&mut self, join: Join, now: Instant) {
        if !self.accepts(&join.protocol_type, &join.protocols) {
            return join.refuse(ResponseError::InconsistentGroupProtocol);
        }
        if join.member.is_empty() {
            return self.join_new(join, now);
        }
        if self.newcomers.remove(&join.member).is_some() {
            let id = join.member.clone();
            return self.add(id, join, now);
        }
        if let Err(error) = self.check_instance(&join.member, join.instance.as_deref()) {
            return join.refuse(error);
        }
        if self.members.contains_key(&join.member) {
            self.rejoin(join, now);
        } else {
            join.refuse(ResponseError::UnknownMemberId);
        }
    }

    /// Takes a member, or a newcomer, out.
    pub(super) fn leave(
        &mut self,
        member: &str,
        instance: Option<&str>,
        now: Instant,
    ) -> Result<(), ResponseError> {
        let id = match instance.map(|instance| self.instances.get(instance)) {
            Some(None) => return Err(ResponseError::UnknownMemberId),
            Some(Some(known)) if !member.is_empty() && known != member => {
                return Err(ResponseError::FencedInstanceId);
            }
            Some(Some(known)) => known.clone(),
            None => member.to_owned(),
        };
        if self.newcomers.remove(&id).is_some() {
            self.try_complete(now);
            return Ok(());
        }
        if !self.members.contains_key(&id) {
            return Err(ResponseError::UnknownMemberId);
        }
        self.remove(&id, now);
        Ok(())
    }

    pub(super) fn remove(&mut self, id: &str, now: Instant) {
        let Some(mut member) = self.members.remove(id) else {
            return;
        };
        member.dismiss(ResponseError::UnknownMemberId, id);
        if let Some(instance) = &member.instance {
            self.instances.remove(instance);
        }
        if self.leader.as_deref() == Some(id) {
            self.leader = None;
        }
        match self.phase {
            Phase::Preparing { .. } => self.try_complete(now),
            Phase::Completing { .. } | Phase::Stable => self.rebalance(now),
            Phase::Empty => {}
        }
    }

    fn join_new(&mut self, join: Join, now: Instant) {
        let known = join
            .instance
            .as_ref()
            .and_then(|instance| self.instances.get(instance))
            .cloned();
        if let Some(old) = known {
            return self.replace(&old, join, now);
        }
        if self.members.len() + self.newcomers.len() >= MAX_MEMBERS {
            return join.refuse(ResponseError::GroupMaxSizeReached);
        }
        let id = new_id(&join);
        if join.instance.is_none() && join.needs_id {
            self.newcomers
                .insert(id.clone(), now + join.session_timeout);
            let _ = join.answer.send(Err((ResponseError::MemberIdRequired, id)));
        } else {
            self.add(id, join, now);
        }
    }

    fn add(&mut self, id: String, join: Join, now: Instant) {
        if self.members.is_empty() {
            self.protocol_type.clone_from(&join.protocol_type);
        }
        if let Some(instance) = &join.instance {
            self.instances.insert(instance.clone(), id.clone());
        }
        self.members.insert(id, Member::new(join, now));
        match &mut self.phase {
            // More may come, as this one did.
            Phase::Preparing {
                deadline,
                from_empty: true,
            } => {
                *deadline = now + self.rebalance_delay;
                self.try_complete(now);
            }
            Phase::Preparing { .. } => self.try_complete(now),
            Phase::Empty | Phase::Completing { .. } | Phase::Stable => self.rebalance(now),
        }
    }

    fn rejoin(&mut self, join: Join, now: Instant) {
        let id = join.member.clone();
        let is_leader = self.leader.as_ref() == Some(&id);
        let answer = self.joined(&id);
        let Some(member) = self.members.get_mut(&id) else {
            return;
        };
        let same = member.protocols == join.protocols;
        let lost_answer = match self.phase {
            Phase::Completing { .. } => same,
            Phase::Stable => same && !is_leader,
            Phase::Empty | Phase::Preparing { .. } => false,
        };
        member.renew(now);
        if lost_answer {
            let _ = join.answer.send(Ok(answer));
            return;
        }
        member.update(join);
        match self.phase {
            Phase::Preparing { .. } => self.try_complete(now),
            Phase::Empty | Phase::Completing { .. } | Phase::Stable => self.rebalance(now),
        }
    }

    /// A static member came back as a new process: it takes the place of the old one.
    fn replace(&mut self, old: &str, join: Join, now: Instant) {
        let Some(mut member) = self.members.remove(old) else {
            return;
        };
        let id = new_id(&join);
        member.dismiss(ResponseError::FencedInstanceId, old);
        if let Some(instance) = &join.instance {
            self.instances.insert(instance.clone(), id.clone());
        }
        let old_leader = self.leader.clone();
        if self.leader.as_deref() == Some(old) {
            self.leader = Some(id.clone());
        }
        member.renew(now);
        member.update(join);
        self.members.insert(id.clone(), member);
        match self.phase {
            Phase::Stable if self.choose_protocol() == self.protocol => {
                // Its assignment is kept. The former leader's id keeps this one from handing out partitions.
                let mut answer = self.joined(&id);
                answer.leader = old_leader.unwrap_or_default();
                answer.members.clear();
                if let Some(joining) = self
                    .members
                    .get_mut(&id)
                    .and_then(|member| member.joining.take())
                {
                    let _ = joining.send(Ok(answer));
                }
            }
            Phase::Preparing { .. } => self.try_complete(now),
            Phase::Empty | Phase::Completing { .. } | Phase::Stable => self.rebalance(now),
        }
    }
}

impl Join {
    fn refuse(self, error: ResponseError) {
        // A client that went away needs no answer.
        let _ = self.answer.send(Err((error, self.member)));
    }
}

impl Member {
    fn new(join: Join, now: Instant) -> Self {
        Self {
            expires: now + join.session_timeout,
            instance: join.instance,
            client_id: join.client_id,
            client_host: join.client_host,
            session_timeout: join.session_timeout,
            rebalance_timeout: join.rebalance_timeout,
            protocols: join.protocols,
            assignment: bytes::Bytes::new(),
            joining: Some(join.answer),
            syncing: None,
        }
    }

    fn update(&mut self, join: Join) {
        self.protocols = join.protocols;
        self.session_timeout = join.session_timeout;
        self.rebalance_timeout = join.rebalance_timeout;
        self.joining = Some(join.answer);
    }

    fn dismiss(&mut self, error: ResponseError, id: &str) {
        if let Some(joining) = self.joining.take() {
            let _ = joining.send(Err((error, id.to_owned())));
        }
        if let Some(syncing) = self.syncing.take() {
            let _ = syncing.send(Err(error));
        }
    }
}

fn new_id(join: &Join) -> String {
    let name = join.instance.as_deref().unwrap_or(&join.client_id);
    let name: String = name.chars().take(MAX_NAME_LEN).collect();
    format!("{name}-{}", Uuid::new_v4())
}
