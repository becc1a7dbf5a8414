//! The requests of consumer groups, and of those who look at groups.

use std::collections::BTreeMap;

use kafka_protocol::ResponseError;
use kafka_protocol::messages::delete_groups_response::DeletableGroupResult;
use kafka_protocol::messages::describe_groups_response::{DescribedGroup, DescribedGroupMember};
use kafka_protocol::messages::join_group_response::JoinGroupResponseMember;
use kafka_protocol::messages::leave_group_response::MemberResponse;
use kafka_protocol::messages::list_groups_response::ListedGroup;
use kafka_protocol::messages::{
    ConsumerGroupHeartbeatRequest, ConsumerGroupHeartbeatResponse, DeleteGroupsRequest,
    DeleteGroupsResponse, DescribeGroupsRequest, DescribeGroupsResponse, GroupId, HeartbeatRequest,
    HeartbeatResponse, JoinGroupRequest, JoinGroupResponse, LeaveGroupRequest, LeaveGroupResponse,
    ListGroupsRequest, ListGroupsResponse, SyncGroupRequest, SyncGroupResponse,
};

use kafka_protocol::protocol::StrBytes;

use super::{Call, code, once, text, wire};
use crate::group::{Caller, Description, JoinRequest, Joined};
use crate::node::NO_CONSUMER_GROUPS;
use crate::storage::journal_state::Entry;

/// The first version of JoinGroup in which a newcomer is told its id before it joins.
const FIRST_WITH_ID: i16 = 4;
/// The first version of JoinGroup with a timeout for rebalances of its own.
const FIRST_WITH_REBALANCE_TIMEOUT: i16 = 1;
/// The first version of LeaveGroup that names several members.
const FIRST_WITH_MEMBERS: i16 = 3;

/// What groups without members are for, as far as anybody can tell from their offsets.
const CONSUMER: &str = "consumer";
const EMPTY: &str = "Empty";
/// The only way to be a group here.
const CLASSIC: &str = "classic";
/// The first versions of ListGroups that tell states and types.
const FIRST_WITH_STATES: i16 = 4;
const FIRST_WITH_TYPES: i16 = 5;

pub(super) async fn join(call: &Call, request: JoinGroupRequest) -> JoinGroupResponse {
    let rebalance_timeout_ms = match call.version {
        ..FIRST_WITH_REBALANCE_TIMEOUT => request.session_timeout_ms,
        _ => request.rebalance_timeout_ms,
    };
    let protocols = request
        .protocols
        .into_iter()
        .map(|protocol| (text(protocol.name), protocol.metadata));
    let joined = call.node.groups.join(JoinRequest {
        group: text(request.group_id.0),
        member: text(request.member_id),
        instance: request.group_instance_id.map(text),
        client_id: call.client_id.clone(),
        client_host: format!("/{}", call.peer.ip()),
        session_timeout_ms: request.session_timeout_ms,
        rebalance_timeout_ms,
        protocol_type: text(request.protocol_type),
        protocols: protocols.collect(),
        needs_id: call.version >= FIRST_WITH_ID,
    });
    match joined.await {
        Ok(joined) => joined_response(joined),
        Err((error, member)) => JoinGroupResponse::default()
            .with_error_code(error.code())
            .with_generation_id(-1)
            .with_protocol_name(Some(wire("")))
            .with_member_id(wire(member)),
    }
}

fn joined_response(joined: Joined) -> JoinGroupResponse {
    let members = joined.members.into_iter().map(|member| {
        JoinGroupResponseMember::default()
            .with_member_id(wire(member.id))
            .with_group_instance_id(member.instance.map(wire))
            .with_metadata(member.subscription)
    });
    JoinGroupResponse::default()
        .with_generation_id(joined.generation)
        .with_protocol_name(Some(wire(joined.protocol)))
        .with_leader(wire(joined.leader))
        .with_member_id(wire(joined.member))
        .with_members(members.collect())
}

pub(super) async fn sync(call: &Call, request: SyncGroupRequest) -> SyncGroupResponse {
    let caller = Caller {
        member: text(request.member_id),
        instance: request.group_instance_id.map(text),
        generation: request.generation_id,
    };
    let assignments = request
        .assignments
        .into_iter()
        .map(|each| (text(each.member_id), each.assignment))
        .collect();
    let assigned = call
        .node
        .groups
        .sync(&request.group_id, &caller, assignments)
        .await;
    SyncGroupResponse::default()
        .with_error_code(code(&assigned))
        .with_assignment(assigned.unwrap_or_default())
}

pub(super) fn heartbeat(call: &Call, request: HeartbeatRequest) -> HeartbeatResponse {
    let caller = Caller {
        member: text(request.member_id),
        instance: request.group_instance_id.map(text),
        generation: request.generation_id,
    };
    let alive = call.node.groups.heartbeat(&request.group_id, &caller);
    HeartbeatResponse::default().with_error_code(code(&alive))
}

pub(super) fn leave(call: &Call, request: LeaveGroupRequest) -> LeaveGroupResponse {
    let groups = &call.node.groups;
    if call.version < FIRST_WITH_MEMBERS {
        let left = groups.leave(&request.group_id, &request.member_id, None);
        return LeaveGroupResponse::default().with_error_code(code(&left));
    }
    let members = request.members.into_iter().map(|member| {
        let instance = member.group_instance_id.as_deref();
        let left = groups.leave(&request.group_id, &member.member_id, instance);
        MemberResponse::default()
            .with_error_code(code(&left))
            .with_member_id(member.member_id.clone())
            .with_group_instance_id(member.group_instance_id.clone())
    });
    LeaveGroupResponse::default().with_members(members.collect())
}

/// Refuses KIP-848's protocol with an error that clients take as final.
pub(super) fn consumer_heartbeat(
    call: &Call,
    request: ConsumerGroupHeartbeatRequest,
) -> ConsumerGroupHeartbeatResponse {
    call.node.tell_of_consumer_groups();
    ConsumerGroupHeartbeatResponse::default()
        .with_error_code(ResponseError::UnsupportedVersion.code())
        .with_error_message(Some(wire(NO_CONSUMER_GROUPS)))
        .with_member_id(Some(request.member_id))
}

/// Groups with members, and groups with nothing but offsets.
pub(super) fn list(call: &Call, request: ListGroupsRequest) -> ListGroupsResponse {
    let with_offsets = call
        .node
        .journal
        .look(|state| state.offsets.keys().cloned().collect::<Vec<_>>());
    let mut groups: BTreeMap<String, (String, &str)> = with_offsets
        .into_iter()
        .map(|group| (group, (CONSUMER.to_owned(), EMPTY)))
        .collect();
    groups.extend(call.node.groups.list());
    let is_wanted = |filter: &[StrBytes], is: &str| {
        filter.is_empty() || filter.iter().any(|wanted| wanted.eq_ignore_ascii_case(is))
    };
    let listed = groups
        .into_iter()
        .filter(|(_, (_, state))| is_wanted(&request.states_filter, state))
        .filter(|_| is_wanted(&request.types_filter, CLASSIC))
        .map(|(group, (protocol_type, state))| {
            let listed = ListedGroup::default()
                .with_group_id(wire(group).into())
                .with_protocol_type(wire(protocol_type));
            match call.version {
                FIRST_WITH_TYPES.. => listed
                    .with_group_state(wire(state))
                    .with_group_type(wire(CLASSIC)),
                FIRST_WITH_STATES.. => listed.with_group_state(wire(state)),
                _ => listed,
            }
        });
    ListGroupsResponse::default().with_groups(listed.collect())
}

pub(super) fn describe(call: &Call, request: DescribeGroupsRequest) -> DescribeGroupsResponse {
    let describe = |id: GroupId| {
        let group = DescribedGroup::default().with_group_id(id.clone());
        if let Some(described) = call.node.groups.describe(&id) {
            return described_group(group, described);
        }
        let has_offsets = call
            .node
            .journal
            .look(|state| state.offsets.contains_key(id.as_str()));
        let (state, protocol_type) = if has_offsets {
            (EMPTY, CONSUMER)
        } else {
            ("Dead", "")
        };
        group
            .with_group_state(wire(state))
            .with_protocol_type(wire(protocol_type))
    };
    DescribeGroupsResponse::default().with_groups(once(request.groups).map(describe).collect())
}

fn described_group(group: DescribedGroup, described: Description) -> DescribedGroup {
    let members = described.members.into_iter().map(|member| {
        DescribedGroupMember::default()
            .with_member_id(wire(member.id))
            .with_client_id(wire(member.client_id))
            .with_client_host(wire(member.client_host))
            .with_member_metadata(member.subscription)
            .with_member_assignment(member.assignment)
    });
    group
        .with_group_state(wire(described.state))
        .with_protocol_type(wire(described.protocol_type))
        .with_protocol_data(wire(described.protocol))
        .with_members(members.collect())
}

/// Deletes the offsets of groups without members.
pub(super) async fn delete(call: &Call, request: DeleteGroupsRequest) -> DeleteGroupsResponse {
    let mut results = Vec::with_capacity(request.groups_names.len());
    for id in request.groups_names {
        let deleted = delete_one(call, &id).await;
        results.push(
            DeletableGroupResult::default()
                .with_error_code(code(&deleted))
                .with_group_id(id),
        );
    }
    DeleteGroupsResponse::default().with_results(results)
}

async fn delete_one(call: &Call, group: &str) -> Result<(), ResponseError> {
    if call
        .node
        .groups
        .describe(group)
        .is_some_and(|described| !described.members.is_empty())
    {
        return Err(ResponseError::NonEmptyGroup);
    }
    if !call
        .node
        .journal
        .look(|state| state.offsets.contains_key(group))
    {
        return Err(ResponseError::GroupIdNotFound);
    }
    let entry = Entry::GroupDeleted {
        group: group.to_owned(),
    };
    call.node
        .journal
        .write(vec![entry])
        .await
        .map_err(|_| ResponseError::CoordinatorNotAvailable)
}
