//! PgBouncer between host and PostgreSQL.

use host::capability::StoreError;
use host::capability::sql::Database;
use host::pipeline::SqlUrl;

use super::servers;
use crate::support::server;

/// What a client may ask for at its login.
const USUAL: &str = "ignore_startup_parameters = extra_float_digits";

async fn connect(mode: &str, more: &str) -> Result<(), StoreError> {
    let direct = url::Url::parse(&server("DATABASE_URL")).expect("a URL");
    let bouncer = servers::pgbouncer(direct.port().expect("a port"), mode, more);
    let mut url = direct;
    url.set_port(Some(bouncer.port)).expect("a port");
    let opened = Database::connect(&SqlUrl::Postgres(url.into()), None, 4, None).await;
    if let Ok(database) = &opened {
        let one = database.query("SELECT 1", &[]).await;
        assert!(one.is_ok(), "{one:?}");
        database.close().await;
    }
    opened.map(drop)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_shares_sessions_is_refused_with_the_reason() {
    for mode in ["transaction", "statement"] {
        match connect(mode, USUAL).await {
            Err(StoreError::Refused(why)) => {
                assert!(why.contains("pool_mode = session"), "{why}");
            }
            other => panic!("{mode}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_gives_sessions_is_taken() {
    let taken = connect("session", USUAL).await;
    taken.expect("a session for the asking");
    match connect("session", "").await {
        Err(StoreError::Refused(why)) => {
            assert!(why.contains("ignore_startup_parameters"), "{why}");
        }
        other => panic!("{other:?}"),
    }
}
