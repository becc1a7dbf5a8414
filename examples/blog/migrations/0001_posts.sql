-- Runs on PostgreSQL and on SQLite alike.
CREATE TABLE posts (
    uid     TEXT PRIMARY KEY,
    title   TEXT NOT NULL,
    content TEXT NOT NULL,
    slug    TEXT NOT NULL UNIQUE
);
