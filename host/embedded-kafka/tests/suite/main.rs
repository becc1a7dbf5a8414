//! The embedded broker, driven by rdkafka, by `kcat` and by hand.
//!
//! The cases of `cases/` are written once and run against the embedded broker and against Apache Kafka
//! (`KAFKA_BROKERS`), so that a difference shows. The others are about what only the embedded broker has: its files.

mod cases;
mod cluster;
mod durability;
mod folder;
mod malformed;
mod raw;
mod refused;
mod retention;
mod topics;

/// Two tests for each case: one on the embedded broker, one on Apache Kafka.
macro_rules! on_both {
    ($($family:ident: $($case:ident)*;)*) => {
        mod embedded {
            $(mod $family { $(#[test] fn $case() { crate::cases::$family::$case(&crate::cluster::Cluster::embedded()) })* })*
        }
        mod apache {
            $(mod $family { $(#[test] fn $case() { crate::cases::$family::$case(&crate::cluster::Cluster::apache()) })* })*
        }
    };
}

on_both! {
    records:
        bytes_stay_as_they_are
        every_codec_is_kept
        a_record_of_a_megabyte_fits_and_a_larger_one_is_refused
        many_records_keep_their_order
        records_without_acknowledgement_arrive
        a_topic_is_created_when_it_is_produced_to;
    reading:
        offsets_are_found_by_time
        an_offset_out_of_range_is_said_and_can_be_reset
        a_waiting_fetch_is_woken
        the_ends_of_a_partition_are_told;
    groups:
        members_share_partitions_and_take_over
        a_member_that_dies_is_replaced
        static_members_keep_their_partitions
        an_instance_id_belongs_to_the_last_who_took_it
        committed_offsets_are_where_a_group_goes_on
        groups_are_listed
        a_group_is_deleted_when_it_is_empty;
    admin:
        topics_are_created_and_deleted
        bad_topics_are_refused
        partitions_are_added
        records_are_deleted
        configuration_is_described;
    producers:
        an_idempotent_producer_writes_once
        a_repeat_is_answered_with_its_old_offset
        bad_batches_are_refused
        a_batch_for_an_unknown_topic_is_refused;
    compaction:
        the_newest_record_of_each_key_stays_where_it_is
        a_tombstone_removes_its_key_and_goes_when_it_was_seen
        a_record_without_a_key_is_refused
        records_of_a_topic_that_is_only_compacted_cannot_be_deleted;
    configs:
        an_altered_configuration_takes_effect
        a_single_key_is_altered
        bad_alterations_are_refused;
    requests:
        a_topic_has_an_id_that_is_its_own
        a_new_topic_is_told_with_its_id_and_settings
        committed_offsets_are_deleted_unless_they_are_in_use
        the_record_with_the_largest_timestamp_is_found
        folders_and_their_sizes_are_told
        groups_are_listed_with_their_states;
    clients:
        kafka_python
        aiokafka
        confluent_kafka
        kafkajs
        franz_go
        kafka_go
        sarama
        kafkas_own_tools;
    kcat:
        lists_a_topic
        produces_and_consumes
        consumes_in_a_group
        finds_offsets_by_time;
}
