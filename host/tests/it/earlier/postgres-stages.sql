BEGIN;
-- Hosts that start at once do it one after the other.
SELECT pg_advisory_xact_lock(7310313190342189423);
-- The hashes of the running hosts' secrets.
CREATE TABLE IF NOT EXISTS {schema}.stagehost_secrets (
    hash bytea PRIMARY KEY,
    expires_at timestamptz NOT NULL
);
REVOKE ALL ON {schema}.stagehost_secrets, {schema}.stagehost_progress FROM PUBLIC, {role};
-- Writes a lane's row in a transaction of a stage, which may not do so itself.
CREATE OR REPLACE FUNCTION {schema}.stagehost_save(
    secret bytea, of_group text, of_topic text, of_partition integer, of_epoch bigint,
    new_commits bigint, new_offset bigint, new_attempts integer, new_pending bytea, new_seen bytea
) RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $stagehost$
BEGIN
    IF NOT EXISTS (
        SELECT FROM {schema}.stagehost_secrets WHERE hash = sha256(secret) AND expires_at > now()
    ) THEN
        RAISE EXCEPTION 'the progress is the host''s to write' USING ERRCODE = 'SH002';
    END IF;
    UPDATE {schema}.stagehost_progress AS p
    SET commits = new_commits, next_offset = new_offset, attempts = new_attempts, pending = new_pending,
        seen = new_seen, updated_at = now()
    WHERE p.consumer_group = of_group AND p.topic = of_topic AND p.partition = of_partition AND p.epoch = of_epoch;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'another host has taken the lane over' USING ERRCODE = 'SH001';
    END IF;
END
$stagehost$;
REVOKE ALL ON FUNCTION {schema}.stagehost_save(bytea, text, text, integer, bigint, bigint, bigint, integer, bytea, bytea) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION {schema}.stagehost_save(bytea, text, text, integer, bigint, bigint, bigint, integer, bytea, bytea) TO {role};
COMMIT;
