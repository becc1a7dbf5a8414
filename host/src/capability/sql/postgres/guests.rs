//! What stages may be in a database: the role that their sessions log in as, and how the host writes its rows there.
//!
//! Where stages have a role of their own, the table of progress is out of its reach. In the transactions of stages the host
//! writes through a function that runs as the host's role, and asks for a secret: made when a host starts, known to no
//! session but as a parameter, and to the database as its hash.

use std::fmt::Write;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tracing::{info, warn};

use super::super::transaction::words;
use super::super::{Error, Failure, StoreError, Value};
use super::client::Client;
use super::in_time;
use super::progress::is;
use super::value::Parameters;

/// What the function says where the row is not the commit's any more.
pub(super) const FENCED: &str = "SH001";
/// And where it does not know the secret.
pub(super) const UNKNOWN_SECRET: &str = "SH002";
const INSUFFICIENT_PRIVILEGE: &str = "42501";
/// How long the database knows a secret. Hosts that are gone leave theirs behind until then.
const SECRET_LIFE_DAYS: u32 = 7;
/// After so long, a host has its own live on.
const RENEW_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// Makes the table of secrets and the function; `{schema}` is the host's, `{role}` the stages'. Several hosts may start at once.
const MAKE: &str = include_str!("../ledger/postgres-stages.sql");

/// What is wrong with a role, and the statement that mends it. `$1` is the host's role; it runs in a session of the stages'.
const FINDINGS: &str = include_str!("../ledger/postgres-role.sql");

/// What the host writes its rows with in stages' sessions.
pub(super) struct Secret {
    bytes: [u8; 32],
    /// The role of the stages, as it may stand in a statement.
    role: String,
    /// When the database was told last.
    told: Mutex<Option<Instant>>,
    /// Known once it is known where the function is.
    texts: std::sync::OnceLock<Texts>,
}

struct Texts {
    save: String,
    register: String,
}

impl Texts {
    fn of(schema: &str) -> Self {
        Self {
            save: format!(
                "SELECT {schema}.stagehost_save($11, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
            ),
            register: format!(
                "WITH old AS (DELETE FROM {schema}.stagehost_secrets WHERE expires_at < now()) \
                 INSERT INTO {schema}.stagehost_secrets (hash, expires_at) \
                 VALUES ($1, now() + interval '{SECRET_LIFE_DAYS} days') \
                 ON CONFLICT (hash) DO UPDATE SET expires_at = excluded.expires_at"
            ),
        }
    }
}

impl Secret {
    pub(super) fn new(role: String) -> Self {
        Self {
            bytes: rand::random(),
            role,
            told: Mutex::default(),
            texts: std::sync::OnceLock::new(),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    fn texts(&self) -> &Texts {
        self.texts.get_or_init(|| Texts::of("public"))
    }

    /// The statement that writes a lane's row, with the secret as its last parameter.
    pub(super) fn save(&self) -> &str {
        &self.texts().save
    }

    pub(super) fn is_known(&self) -> bool {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.is_some_and(|told| told.elapsed() < RENEW_AFTER)
    }

    /// The database does not know it any more: it is told again before the next transaction.
    pub(super) fn forget(&self) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Tells the database the secret's hash.
    pub(super) async fn register(&self, client: &mut Client) -> Result<(), Failure> {
        let mut hash = Parameters::default();
        hash.bytea(&Sha256::digest(self.bytes))?;
        let text = &self.texts().register;
        in_time(client.ask(text, &hash)).await?;
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        *told = Some(Instant::now());
        Ok(())
    }

    /// Makes what is missing in the schema of the table of progress.
    pub(super) async fn prepare(
        &self,
        client: &mut Client,
        schema: &str,
    ) -> Result<(), StoreError> {
        let _ = self.texts.set(Texts::of(schema));
        let make = MAKE
            .replace("{schema}", schema)
            .replace("{role}", &self.role);
        if !is_made(client, schema, &self.role).await? {
            let made = in_time(client.command(&make)).await;
            if let Err(failure) = made {
                let error = failure.into_error();
                // The transaction has failed with it.
                let undone = in_time(client.command("ROLLBACK")).await;
                undone.map_err(Failure::into_error)?;
                return Err(match is(&error, INSUFFICIENT_PRIVILEGE) {
                    true => not_allowed(client, schema, &make, error).await,
                    false => error.into(),
                });
            }
        }
        self.register(client)
            .await
            .map_err(|failure| failure.into_error().into())
    }
}

/// What to do where the host's role may not make them.
async fn not_allowed(client: &mut Client, schema: &str, make: &str, error: Error) -> StoreError {
    const ME: &str = "SELECT quote_ident(current_user)";
    let host = match ask(client, ME, &Parameters::default()).await {
        Ok(rows) => texts(rows).concat(),
        Err(error) => return error,
    };
    StoreError::Refused(format!(
        "{}: the role {host} may not make what keeps the lanes' progress out of the reach of stages. Either let it: GRANT \
         CREATE ON SCHEMA {schema} TO {host}; or make it as the owner of the table stagehost_progress:\n{make}GRANT SELECT, \
         INSERT, UPDATE, DELETE ON {schema}.stagehost_secrets TO {host};",
        words(error)
    ))
}

/// Whether the function is there, as this host makes it, and the stages may call it.
async fn is_made(client: &mut Client, schema: &str, role: &str) -> Result<bool, StoreError> {
    const ASK: &str = "SELECT p.prosrc FROM pg_proc AS p, pg_roles AS r WHERE p.oid = to_regprocedure($1) AND p.prosecdef \
                       AND quote_ident(r.rolname) = $2 AND has_function_privilege(r.oid, p.oid, 'EXECUTE') \
                       AND p.proconfig = ARRAY['search_path=pg_catalog, pg_temp']";
    let mut parameters = Parameters::default();
    parameters.text(&format!(
        "{schema}.stagehost_save(bytea, text, text, int4, int8, int8, int8, int4, bytea, bytea, int8)"
    ))?;
    parameters.text(role)?;
    let rows = ask(client, ASK, &parameters).await?;
    let source = MAKE.replace("{schema}", schema);
    let source = source.split("$stagehost$").nth(1);
    Ok(
        matches!(&rows[..], [row] if matches!(&row[..], [Value::Text(text)] if Some(text.as_str()) == source)),
    )
}

async fn ask(
    client: &mut Client,
    text: &str,
    parameters: &Parameters,
) -> Result<Vec<Vec<Value>>, StoreError> {
    let asked = in_time(client.ask(text, parameters)).await;
    asked.map_err(|failure| failure.into_error().into())
}

/// Looks at the role of the stages, and takes from it what the host can take. Answers its name.
pub(super) async fn check(
    place: &str,
    host: &mut Client,
    guest: &mut Client,
) -> Result<String, StoreError> {
    const ME: &str =
        "SELECT quote_ident(current_user), current_user::text, current_database()::text";
    let none = Parameters::default();
    let hosts = texts(ask(host, ME, &none).await?);
    let guests = texts(ask(guest, ME, &none).await?);
    let ([_, host_name, database], [role, _, other]) = (&hosts[..], &guests[..]) else {
        return Err(StoreError::Refused("roles can't be asked for".to_owned()));
    };
    if database != other {
        return Err(StoreError::Refused(format!(
            "stage-url names the database {other}, and url {database}: they are to be one"
        )));
    }
    revoke(host, role).await?;
    let mut parameters = Parameters::default();
    parameters.text(host_name)?;
    let mut wrong = String::new();
    for row in ask(guest, FINDINGS, &parameters).await? {
        let [
            Value::Boolean(is_grave),
            Value::Text(what),
            Value::Text(mend),
        ] = &row[..]
        else {
            continue;
        };
        match is_grave {
            true => {
                let _ = write!(wrong, "\n-- {what}\n{mend};");
            }
            false => warn!("{place}: the role {role} of stage-url {what}; {mend}"),
        }
    }
    if wrong.is_empty() {
        return Ok(role.clone());
    }
    Err(StoreError::Refused(format!(
        "the role {role} of stage-url is no bound for stages; run this as a role that may:{wrong}"
    )))
}

fn texts(rows: Vec<Vec<Value>>) -> Vec<String> {
    let values = rows.into_iter().flatten();
    let text = |value| match value {
        Value::Text(text) => Some(text),
        _ => None,
    };
    values.filter_map(text).collect()
}

/// Grants on all tables of a schema are easily given, and reach the host's too.
async fn revoke(host: &mut Client, role: &str) -> Result<(), StoreError> {
    const OWN: &str = "SELECT format('REVOKE ALL ON %s FROM PUBLIC, ', c.oid::regclass) FROM pg_class AS c \
                       WHERE c.relname IN ('stagehost_progress', 'stagehost_secrets', '_stagehost_migrations', '_sqlx_migrations') \
                       AND c.relkind = 'r' AND pg_has_role(c.relowner, 'USAGE')";
    for statement in texts(ask(host, OWN, &Parameters::default()).await?) {
        let revoked = in_time(host.command(&format!("{statement}{role}"))).await;
        if let Err(failure) = revoked {
            return Err(failure.into_error().into());
        }
    }
    Ok(())
}

/// Where stages use the host's own role: says once what that means.
pub(super) async fn warn_of_host_role(place: &str, client: &mut Client) -> Result<(), StoreError> {
    const POWERS: &str = "SELECT quote_ident(me.rolname), coalesce(concat_ws(', ', \
        CASE WHEN me.rolsuper THEN 'superuser' END, CASE WHEN me.rolcreaterole THEN 'createrole' END, \
        CASE WHEN me.rolreplication THEN 'replication' END, CASE WHEN me.rolbypassrls THEN 'bypassrls' END, \
        (SELECT string_agg('member of ' || quote_ident(r.rolname), ', ' ORDER BY r.rolname) FROM pg_roles AS r \
         WHERE NOT me.rolsuper AND r.oid <> me.oid AND pg_has_role(me.oid, r.oid, 'MEMBER') AND (r.rolsuper OR r.rolname IN \
             ('pg_read_server_files', 'pg_write_server_files', 'pg_execute_server_program', 'pg_signal_backend', \
              'pg_write_all_data', 'pg_read_all_data', 'pg_maintain', 'pg_create_subscription')))), '') \
        FROM pg_roles AS me WHERE me.rolname = current_user";
    let found = texts(ask(client, POWERS, &Parameters::default()).await?);
    let [role, powers] = &found[..] else {
        return Ok(());
    };
    match powers.is_empty() {
        true => info!(
            "{place}: stages use the host's role {role}, and only their statements' words keep them from its tables; \
             stage-url gives them a role of their own"
        ),
        false => warn!(
            "{place}: stages use the host's role {role}, which has more power than they should ({powers}); \
             stage-url gives them a role of their own"
        ),
    }
    Ok(())
}
