-- Outputs are there until the next commit: to compress them costs more than to write them.
ALTER TABLE stagehost_progress ALTER COLUMN pending SET STORAGE EXTERNAL;
