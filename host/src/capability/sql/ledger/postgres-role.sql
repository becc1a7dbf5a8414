WITH me AS (
    SELECT oid, rolname, rolsuper, rolcreaterole, rolreplication, rolbypassrls FROM pg_catalog.pg_roles WHERE rolname = current_user
), tables AS (
    SELECT c.oid, c.relnamespace, c.relowner, n.nspowner, n.nspname FROM pg_catalog.pg_class AS c
    JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
    WHERE c.relname IN ('stagehost_progress', 'stagehost_secrets', '_stagehost_migrations', '_sqlx_migrations')
    AND c.relkind = 'r'
), schemas AS (
    SELECT DISTINCT relnamespace AS oid, nspname, nspowner FROM tables
)
SELECT true, 'it is the role of url', '-- name another role in stage-url' FROM me WHERE rolname = $1
UNION ALL
SELECT true, 'its login is ' || session_user || ', which sets it as its role and can take that back',
    format('ALTER ROLE %I RESET role', session_user) FROM me WHERE session_user <> current_user
UNION ALL
SELECT true, 'it is a superuser', format('ALTER ROLE %I NOSUPERUSER', rolname) FROM me WHERE rolsuper
UNION ALL
SELECT true, 'it makes roles', format('ALTER ROLE %I NOCREATEROLE', rolname) FROM me WHERE rolcreaterole
UNION ALL
SELECT true, 'it may read the whole server''s log of changes', format('ALTER ROLE %I NOREPLICATION', rolname) FROM me WHERE rolreplication
UNION ALL
SELECT true, 'it is not bound by row-level security', format('ALTER ROLE %I NOBYPASSRLS', rolname) FROM me WHERE rolbypassrls
UNION ALL
SELECT true, 'it is a member of ' || r.rolname, format('REVOKE %I FROM %I', r.rolname, me.rolname)
FROM me, pg_catalog.pg_roles AS r
WHERE NOT me.rolsuper AND r.oid <> me.oid AND pg_has_role(me.oid, r.oid, 'MEMBER') AND (
    r.rolname = $1 OR r.rolsuper OR r.oid IN (SELECT relowner FROM tables) OR r.rolname IN (
        'pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program', 'pg_signal_backend',
        'pg_write_all_data', 'pg_read_all_data', 'pg_maintain', 'pg_create_subscription'
    )
)
UNION ALL
SELECT true, 'it owns the schema ' || nspname || ' of the host''s tables', format('ALTER SCHEMA %I OWNER TO %I', nspname, $1)
FROM me, schemas WHERE NOT rolsuper AND pg_has_role(me.oid, nspowner, 'MEMBER')
UNION ALL
SELECT true, 'it may use the host''s table ' || tables.oid::regclass, format('REVOKE ALL ON %s FROM PUBLIC, %I', tables.oid::regclass, rolname)
FROM me, tables WHERE NOT rolsuper AND (
    has_table_privilege(tables.oid, 'SELECT, INSERT, UPDATE, DELETE, TRUNCATE, REFERENCES, TRIGGER')
    OR has_any_column_privilege(tables.oid, 'SELECT, INSERT, UPDATE, REFERENCES')
)
UNION ALL
SELECT true, 'it may not use the schema ' || nspname || ' of the host''s tables', format('GRANT USAGE ON SCHEMA %I TO %I', nspname, rolname)
FROM me, schemas WHERE NOT has_schema_privilege(schemas.oid, 'USAGE')
UNION ALL
SELECT false, 'may make things in the schema ' || nspname || ' of the host''s tables, where its names may be taken for others',
    format('REVOKE CREATE ON SCHEMA %I FROM PUBLIC, %I', nspname, rolname)
FROM me, schemas WHERE has_schema_privilege(schemas.oid, 'CREATE')
UNION ALL
SELECT false, 'may make temporary tables', format('REVOKE TEMPORARY ON DATABASE %I FROM PUBLIC, %I', current_database(), rolname)
FROM me WHERE has_database_privilege(current_database(), 'TEMPORARY')
