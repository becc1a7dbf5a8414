BEGIN;
-- Hosts that start at once do it one after the other.
SELECT pg_advisory_xact_lock(7310313190342189423);
-- The hashes of the running hosts' secrets.
CREATE TABLE IF NOT EXISTS {schema}.stagehost_secrets (
    hash bytea PRIMARY KEY,
    expires_at timestamptz NOT NULL
);
REVOKE ALL ON {schema}.stagehost_secrets, {schema}.stagehost_progress FROM PUBLIC, {role};
-- Writes a lane's row in a transaction of a stage, which may not do so itself. Hosts of an earlier version have another of
-- this name, without the generation, which stays for them.
CREATE OR REPLACE FUNCTION {schema}.stagehost_save(
    secret bytea, of_group text, of_topic text, of_partition integer, of_epoch bigint,
    new_commits bigint, new_offset bigint, new_attempts integer, new_pending bytea, new_seen bytea, of_generation bigint
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
    WHERE p.consumer_group = of_group AND p.topic = of_topic AND p.partition = of_partition AND p.epoch = of_epoch
    AND p.generation = of_generation AND p.commits = new_commits - 1;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the lane''s row is not as its last commit has left it' USING ERRCODE = 'SH001';
    END IF;
END
$stagehost$;
REVOKE ALL ON FUNCTION {schema}.stagehost_save(bytea, text, text, integer, bigint, bigint, bigint, integer, bytea, bytea, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION {schema}.stagehost_save(bytea, text, text, integer, bigint, bigint, bigint, integer, bytea, bytea, bigint) TO {role};
COMMIT;
