-- Outputs are there until the next commit: to compress them costs more than to write them. A table that was there before
-- keeps what it has until a migration is needed there, for not every role may alter it.
DO $$
BEGIN
    ALTER TABLE stagehost_progress ALTER COLUMN pending SET STORAGE EXTERNAL;
EXCEPTION WHEN undefined_column THEN
    -- It is another table of this name, of which the host says what it lacks.
    NULL;
END $$;
