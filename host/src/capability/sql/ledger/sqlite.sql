-- How far the lanes of transactional stages have got: one row a consumer group and partition.
CREATE TABLE IF NOT EXISTS main.stagehost_progress (
    consumer_group TEXT NOT NULL,
    topic TEXT NOT NULL,
    partition INTEGER NOT NULL,
    epoch BIGINT NOT NULL,
    generation BIGINT NOT NULL DEFAULT 0,
    commits BIGINT NOT NULL DEFAULT 0,
    next_offset BIGINT,
    attempts INTEGER NOT NULL DEFAULT 0,
    pending BLOB NOT NULL,
    seen BLOB NOT NULL,
    updated_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (consumer_group, topic, partition)
);
