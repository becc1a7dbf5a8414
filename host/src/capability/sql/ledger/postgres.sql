-- How far the lanes of transactional stages have got: one row a consumer group and partition.
CREATE TABLE IF NOT EXISTS stagehost_progress (
    consumer_group text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    epoch bigint NOT NULL,
    generation bigint NOT NULL DEFAULT 0,
    commits bigint NOT NULL DEFAULT 0,
    next_offset bigint,
    attempts integer NOT NULL DEFAULT 0,
    pending bytea NOT NULL,
    seen bytea NOT NULL,
    updated_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (consumer_group, topic, partition)
) WITH (fillfactor = 50);
