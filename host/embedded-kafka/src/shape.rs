//! Checks the lengths in a request before the codec sees it.
//!
//! The codec sets memory aside for as many elements as an array says it has. So this walks over the request first,
//! and refuses arrays that say more than there is, or than anybody needs.

use kafka_protocol::messages::ApiKey;

/// Elements of all arrays of a request together, and its tagged fields, which the codec keeps though nobody knows them.
const MAX_ELEMENTS: usize = 500_000;

/// A field of a request, and the versions that have it.
struct Field {
    since: i16,
    until: i16,
    kind: Kind,
}

enum Kind {
    /// So many bytes.
    Fixed(usize),
    /// A string, perhaps null.
    Text,
    /// Bytes, perhaps null.
    Blob,
    Array(&'static [Field]),
}

use Kind::{Array, Blob, Fixed, Text};

/// Why a request is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadShape {
    #[error("it ends within a field")]
    Short,
    #[error("it has a length that cannot be")]
    Length,
    #[error("it has more than {MAX_ELEMENTS} elements")]
    TooMany,
}

/// Checks the body of a request (what follows the header).
pub(crate) fn check(key: ApiKey, version: i16, body: &[u8]) -> Result<(), BadShape> {
    walk(key, version, body).map(|_| ())
}

/// Checks the header of a request: key, version and correlation id; in some versions tagged fields follow the client's name.
pub(crate) fn check_header(key: ApiKey, version: i16, request: &[u8]) -> Result<(), BadShape> {
    if key.request_header_version(version) < 2 {
        return Ok(());
    }
    let mut walk = Walk {
        rest: request,
        version,
        flexible: false,
        elements: 0,
    };
    walk.plain_fields(HEADER)?;
    walk.tags()
}

/// Bytes left after the request.
fn walk(key: ApiKey, version: i16, body: &[u8]) -> Result<usize, BadShape> {
    let flexible = key.request_header_version(version) >= 2;
    let mut walk = Walk {
        rest: body,
        version,
        flexible,
        elements: 0,
    };
    walk.fields(fields(key))?;
    Ok(walk.rest.len())
}

const fn all(kind: Kind) -> Field {
    since(0, kind)
}

const fn since(since: i16, kind: Kind) -> Field {
    Field {
        since,
        until: i16::MAX,
        kind,
    }
}

const fn between(since: i16, until: i16, kind: Kind) -> Field {
    Field { since, until, kind }
}

const fn until(until: i16, kind: Kind) -> Field {
    Field {
        since: 0,
        until,
        kind,
    }
}

const INT8: Kind = Fixed(1);
const INT16: Kind = Fixed(2);
const INT32: Kind = Fixed(4);
const INT64: Kind = Fixed(8);

/// The fields of a request, in the versions that this broker takes.
fn fields(key: ApiKey) -> &'static [Field] {
    match key {
        ApiKey::Produce => PRODUCE,
        ApiKey::Fetch => FETCH,
        ApiKey::ListOffsets => LIST_OFFSETS,
        ApiKey::Metadata => METADATA,
        ApiKey::OffsetCommit => OFFSET_COMMIT,
        ApiKey::OffsetFetch => OFFSET_FETCH,
        ApiKey::FindCoordinator => FIND_COORDINATOR,
        ApiKey::JoinGroup => JOIN_GROUP,
        ApiKey::SyncGroup => SYNC_GROUP,
        ApiKey::Heartbeat => HEARTBEAT,
        ApiKey::LeaveGroup => LEAVE_GROUP,
        ApiKey::DescribeGroups | ApiKey::DeleteGroups => GROUP_IDS,
        ApiKey::ApiVersions => API_VERSIONS,
        ApiKey::CreateTopics => CREATE_TOPICS,
        ApiKey::DeleteTopics => DELETE_TOPICS,
        ApiKey::CreatePartitions => CREATE_PARTITIONS,
        ApiKey::DeleteRecords => DELETE_RECORDS,
        ApiKey::DescribeConfigs => DESCRIBE_CONFIGS,
        ApiKey::InitProducerId => INIT_PRODUCER_ID,
        ApiKey::ListGroups => LIST_GROUPS,
        ApiKey::AlterConfigs => ALTER_CONFIGS,
        ApiKey::IncrementalAlterConfigs => INCREMENTAL_ALTER_CONFIGS,
        ApiKey::DescribeLogDirs => DESCRIBE_LOG_DIRS,
        ApiKey::OffsetDelete => OFFSET_DELETE,
        ApiKey::ConsumerGroupHeartbeat => CONSUMER_GROUP_HEARTBEAT,
        // No other request is taken.
        _ => &[],
    }
}

const HEADER: &[Field] = &[all(INT16), all(INT16), all(INT32), all(Text)];
const INDEXES: &[Field] = &[all(INT32)];
const TEXTS: &[Field] = &[all(Text)];

const PRODUCE: &[Field] = {
    const PARTITION: &[Field] = &[all(INT32), all(Blob)];
    const TOPIC: &[Field] = &[all(Text), all(Array(PARTITION))];
    &[since(3, Text), all(INT16), all(INT32), all(Array(TOPIC))]
};
const FETCH: &[Field] = {
    const PARTITION: &[Field] = &[
        all(INT32),
        since(9, INT32),
        all(INT64),
        since(5, INT64),
        all(INT32),
    ];
    const TOPIC: &[Field] = &[all(Text), all(Array(PARTITION))];
    const FORGOTTEN: &[Field] = &[all(Text), all(Array(INDEXES))];
    &[
        all(Fixed(4 + 4 + 4 + 4 + 1)),
        since(7, Fixed(4 + 4)),
        all(Array(TOPIC)),
        since(7, Array(FORGOTTEN)),
        since(11, Text),
    ]
};
const LIST_OFFSETS: &[Field] = {
    const PARTITION: &[Field] = &[all(INT32), since(4, INT32), all(INT64)];
    const TOPIC: &[Field] = &[all(Text), all(Array(PARTITION))];
    &[all(INT32), since(2, INT8), all(Array(TOPIC))]
};
const METADATA: &[Field] = {
    const TOPIC: &[Field] = &[since(10, Fixed(16)), all(Text)];
    &[
        all(Array(TOPIC)),
        since(4, INT8),
        between(8, 10, INT8),
        since(8, INT8),
    ]
};
const OFFSET_COMMIT: &[Field] = {
    const PARTITION: &[Field] = &[all(INT32), all(INT64), since(6, INT32), all(Text)];
    const TOPIC: &[Field] = &[all(Text), all(Array(PARTITION))];
    &[
        all(Text),
        all(INT32),
        all(Text),
        since(7, Text),
        until(4, INT64),
        all(Array(TOPIC)),
    ]
};
const OFFSET_FETCH: &[Field] = {
    const TOPIC: &[Field] = &[all(Text), all(Array(INDEXES))];
    &[all(Text), all(Array(TOPIC)), since(7, INT8)]
};
const FIND_COORDINATOR: &[Field] = &[all(Text), since(1, INT8)];
const JOIN_GROUP: &[Field] = {
    const PROTOCOL: &[Field] = &[all(Text), all(Blob)];
    &[
        all(Text),
        all(INT32),
        since(1, INT32),
        all(Text),
        since(5, Text),
        all(Text),
        all(Array(PROTOCOL)),
    ]
};
const SYNC_GROUP: &[Field] = {
    const ASSIGNMENT: &[Field] = &[all(Text), all(Blob)];
    &[
        all(Text),
        all(INT32),
        all(Text),
        since(3, Text),
        all(Array(ASSIGNMENT)),
    ]
};
const HEARTBEAT: &[Field] = &[all(Text), all(INT32), all(Text), since(3, Text)];
const LEAVE_GROUP: &[Field] = {
    const MEMBER: &[Field] = &[all(Text), all(Text)];
    &[all(Text), until(2, Text), since(3, Array(MEMBER))]
};
const GROUP_IDS: &[Field] = &[all(Array(TEXTS))];
const API_VERSIONS: &[Field] = &[since(3, Text), since(3, Text)];
const CREATE_TOPICS: &[Field] = {
    const ASSIGNMENT: &[Field] = &[all(INT32), all(Array(INDEXES))];
    const CONFIG: &[Field] = &[all(Text), all(Text)];
    const TOPIC: &[Field] = &[
        all(Text),
        all(INT32),
        all(INT16),
        all(Array(ASSIGNMENT)),
        all(Array(CONFIG)),
    ];
    &[all(Array(TOPIC)), all(INT32), all(INT8)]
};
const DELETE_TOPICS: &[Field] = {
    const TOPIC: &[Field] = &[all(Text), all(Fixed(16))];
    &[until(5, Array(TEXTS)), since(6, Array(TOPIC)), all(INT32)]
};
const CREATE_PARTITIONS: &[Field] = {
    const ASSIGNMENT: &[Field] = &[all(Array(INDEXES))];
    const TOPIC: &[Field] = &[all(Text), all(INT32), all(Array(ASSIGNMENT))];
    &[all(Array(TOPIC)), all(INT32), all(INT8)]
};
const DELETE_RECORDS: &[Field] = {
    const PARTITION: &[Field] = &[all(INT32), all(INT64)];
    const TOPIC: &[Field] = &[all(Text), all(Array(PARTITION))];
    &[all(Array(TOPIC)), all(INT32)]
};
const DESCRIBE_CONFIGS: &[Field] = {
    const RESOURCE: &[Field] = &[all(INT8), all(Text), all(Array(TEXTS))];
    &[all(Array(RESOURCE)), since(1, INT8)]
};
const ALTER_CONFIGS: &[Field] = {
    const CONFIG: &[Field] = &[all(Text), all(Text)];
    const RESOURCE: &[Field] = &[all(INT8), all(Text), all(Array(CONFIG))];
    &[all(Array(RESOURCE)), all(INT8)]
};
const INCREMENTAL_ALTER_CONFIGS: &[Field] = {
    const CONFIG: &[Field] = &[all(Text), all(INT8), all(Text)];
    const RESOURCE: &[Field] = &[all(INT8), all(Text), all(Array(CONFIG))];
    &[all(Array(RESOURCE)), all(INT8)]
};
const LIST_GROUPS: &[Field] = &[since(4, Array(TEXTS)), since(5, Array(TEXTS))];
const DESCRIBE_LOG_DIRS: &[Field] = {
    const TOPIC: &[Field] = &[all(Text), all(Array(INDEXES))];
    &[all(Array(TOPIC))]
};
const OFFSET_DELETE: &[Field] = {
    const TOPIC: &[Field] = &[all(Text), all(Array(INDEXES))];
    &[all(Text), all(Array(TOPIC))]
};
const CONSUMER_GROUP_HEARTBEAT: &[Field] = {
    const TOPIC: &[Field] = &[all(Fixed(16)), all(Array(INDEXES))];
    &[
        all(Text),
        all(Text),
        all(INT32),
        all(Text),
        all(Text),
        all(INT32),
        all(Array(TEXTS)),
        since(1, Text),
        all(Text),
        all(Array(TOPIC)),
    ]
};
const INIT_PRODUCER_ID: &[Field] = &[all(Text), all(INT32), since(3, Fixed(8 + 2))];

struct Walk<'a> {
    rest: &'a [u8],
    version: i16,
    /// Lengths are varints one too large, and each structure ends with tagged fields.
    flexible: bool,
    elements: usize,
}

impl Walk<'_> {
    fn fields(&mut self, fields: &'static [Field]) -> Result<(), BadShape> {
        self.plain_fields(fields)?;
        if self.flexible { self.tags() } else { Ok(()) }
    }

    fn plain_fields(&mut self, fields: &'static [Field]) -> Result<(), BadShape> {
        for field in fields {
            if (field.since..=field.until).contains(&self.version) {
                self.field(&field.kind)?;
            }
        }
        Ok(())
    }

    fn field(&mut self, kind: &Kind) -> Result<(), BadShape> {
        match kind {
            Fixed(len) => self.skip(*len),
            Text if self.flexible => self.compact_length().and_then(|len| self.skip(len)),
            Text => {
                let len = i16::from_be_bytes(self.take()?);
                self.skip(length(i32::from(len))?)
            }
            Blob if self.flexible => self.compact_length().and_then(|len| self.skip(len)),
            Blob => {
                let len = i32::from_be_bytes(self.take()?);
                self.skip(length(len)?)
            }
            Array(element) => {
                let count = if self.flexible {
                    self.compact_length()?
                } else {
                    length(i32::from_be_bytes(self.take()?))?
                };
                self.count(count)?;
                // The elements of an array of plain values have no tags of their own.
                (0..count).try_for_each(|_| match element {
                    [_] => self.plain_fields(element),
                    _ => self.fields(element),
                })
            }
        }
    }

    fn tags(&mut self) -> Result<(), BadShape> {
        let count = self.varint()?;
        self.count(count as usize)?;
        for _ in 0..count {
            self.varint()?;
            let len = self.varint()?;
            self.skip(len as usize)?;
        }
        Ok(())
    }

    /// Counts elements that are to come.
    fn count(&mut self, more: usize) -> Result<(), BadShape> {
        self.elements = self.elements.saturating_add(more);
        if self.elements > MAX_ELEMENTS {
            return Err(BadShape::TooMany);
        }
        Ok(())
    }

    fn compact_length(&mut self) -> Result<usize, BadShape> {
        Ok(self.varint()?.saturating_sub(1) as usize)
    }

    fn varint(&mut self) -> Result<u32, BadShape> {
        let mut value = 0u32;
        for i in 0..5 {
            let [byte] = self.take()?;
            value |= u32::from(byte & 0x7f) << (7 * i);
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(BadShape::Length)
    }

    fn skip(&mut self, len: usize) -> Result<(), BadShape> {
        self.rest = self.rest.get(len..).ok_or(BadShape::Short)?;
        Ok(())
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], BadShape> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(BadShape::Short)?;
        self.rest = rest;
        Ok(*taken)
    }
}

/// -1 stands for null.
fn length(length: i32) -> Result<usize, BadShape> {
    usize::try_from(length.max(0))
        .ok()
        .filter(|_| length >= -1)
        .ok_or(BadShape::Length)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use kafka_protocol::messages::*;
    use kafka_protocol::protocol::Decodable;
    use proptest::prelude::*;

    use super::*;
    use crate::api::TAKEN;

    /// Bytes that the codec leaves of a request.
    fn decode(key: ApiKey, version: i16, body: &Bytes) -> Option<usize> {
        fn left<T: Decodable>(version: i16, body: &Bytes) -> Option<usize> {
            let mut body = body.clone();
            T::decode(&mut body, version).ok().map(|_| body.len())
        }
        let left = match key {
            ApiKey::Produce => left::<ProduceRequest>,
            ApiKey::Fetch => left::<FetchRequest>,
            ApiKey::ListOffsets => left::<ListOffsetsRequest>,
            ApiKey::Metadata => left::<MetadataRequest>,
            ApiKey::OffsetCommit => left::<OffsetCommitRequest>,
            ApiKey::OffsetFetch => left::<OffsetFetchRequest>,
            ApiKey::FindCoordinator => left::<FindCoordinatorRequest>,
            ApiKey::JoinGroup => left::<JoinGroupRequest>,
            ApiKey::Heartbeat => left::<HeartbeatRequest>,
            ApiKey::LeaveGroup => left::<LeaveGroupRequest>,
            ApiKey::SyncGroup => left::<SyncGroupRequest>,
            ApiKey::DescribeGroups => left::<DescribeGroupsRequest>,
            ApiKey::ListGroups => left::<ListGroupsRequest>,
            ApiKey::ApiVersions => left::<ApiVersionsRequest>,
            ApiKey::CreateTopics => left::<CreateTopicsRequest>,
            ApiKey::DeleteTopics => left::<DeleteTopicsRequest>,
            ApiKey::DeleteRecords => left::<DeleteRecordsRequest>,
            ApiKey::InitProducerId => left::<InitProducerIdRequest>,
            ApiKey::DescribeConfigs => left::<DescribeConfigsRequest>,
            ApiKey::CreatePartitions => left::<CreatePartitionsRequest>,
            ApiKey::DeleteGroups => left::<DeleteGroupsRequest>,
            ApiKey::AlterConfigs => left::<AlterConfigsRequest>,
            ApiKey::IncrementalAlterConfigs => left::<IncrementalAlterConfigsRequest>,
            ApiKey::DescribeLogDirs => left::<DescribeLogDirsRequest>,
            ApiKey::OffsetDelete => left::<OffsetDeleteRequest>,
            ApiKey::ConsumerGroupHeartbeat => left::<ConsumerGroupHeartbeatRequest>,
            other => panic!("{other:?} is taken, but not tried"),
        };
        left(version, body)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 5000, failure_persistence: None, ..ProptestConfig::default() })]

        /// The walk over a request ends where the codec ends, for each request and version that is taken.
        #[test]
        fn walks_as_the_codec_reads(bytes in prop::collection::vec(0u8..3, 0..120)) {
            let body = Bytes::from(bytes);
            for (key, first, last) in TAKEN {
                for version in first..=last {
                    // What the codec refuses besides (a null where there must be a value) is its own affair. What it
                    // would set memory aside for, it is not shown.
                    let Ok(walked) = walk(key, version, &body) else { continue };
                    if let Some(decoded) = decode(key, version, &body) {
                        prop_assert_eq!(walked, decoded, "{:?} {}", key, version);
                    }
                }
            }
        }
    }

    #[test]
    fn arrays_are_bounded_by_what_is_there_and_by_their_number() {
        let array = |count: i32, bytes: usize| [&count.to_be_bytes()[..], &vec![0; bytes]].concat();
        for (body, expected) in [
            (array(3, 6), Ok(())),
            (array(3, 5), Err(BadShape::Short)),
            (array(-1, 0), Ok(())),
            (array(-2, 0), Err(BadShape::Length)),
            (array(i32::MAX, 1000), Err(BadShape::TooMany)),
            (array(MAX_ELEMENTS as i32, 2 * MAX_ELEMENTS), Ok(())),
            (
                array(MAX_ELEMENTS as i32 + 1, 2 * MAX_ELEMENTS + 2),
                Err(BadShape::TooMany),
            ),
        ] {
            assert_eq!(check(ApiKey::Metadata, 1, &body), expected);
        }
    }

    #[test]
    fn tagged_fields_are_bounded_as_elements_are() {
        // Their number as a varint, then each with its tag and no bytes.
        let tags = |count: usize| {
            let number = [count & 0x7f | 0x80, count >> 7 & 0x7f | 0x80, count >> 14];
            let number: Vec<u8> = number.iter().map(|byte| *byte as u8).collect();
            [number, vec![0; 2 * count]].concat()
        };
        let start = [0; 2 + 2 + 4 + 2];
        for (count, expected) in [
            (MAX_ELEMENTS, Ok(())),
            (MAX_ELEMENTS + 1, Err(BadShape::TooMany)),
        ] {
            let header = [&start[..], &tags(count)].concat();
            assert_eq!(check_header(ApiKey::ApiVersions, 3, &header), expected);
            let body = [&[1, 1][..], &tags(count)].concat();
            assert_eq!(check(ApiKey::ApiVersions, 3, &body), expected);
        }
        assert_eq!(check_header(ApiKey::ApiVersions, 2, &start), Ok(()));
    }
}
