//! The roles of a host and its stages in PostgreSQL, as the README makes them, and what a host says at its start of others.

use std::time::Duration;

use host::capability::StoreError;
use host::capability::sql::Database;
use host::pipeline::SqlUrl;
use serde_json::json;
use sqlx::ConnectOptions;

use super::{CONNECTIONS, Kind, Place, admin};
use crate::bench::Bench;

/// The statements of the README that a database's administrator follows.
fn readme(host: &str, stages: &str, database: &str) -> String {
    let readme = include_str!("../../../../../README.md");
    let section = readme.split("### A role for stages").nth(1);
    let section = section.expect("the section");
    let block = section.split("```sql\n").nth(1).expect("its statements");
    let block = block.split("```").next().expect("their end");
    block
        .replace("'a password'", "'geheim'")
        .replace("DATABASE posts", &format!("DATABASE {database}"))
        .replace("stages", stages)
        .replace("host_role", host)
}

/// A database whose stages have a role of their own, as the README says it.
pub(super) struct Roles {
    pub(super) place: Place,
    pub(super) host: String,
    pub(super) stage: String,
    pub(super) url: SqlUrl,
    stage_url: SqlUrl,
}

impl Roles {
    pub(super) async fn new() -> Self {
        let place = Place::new(Kind::Postgres).await;
        let (host, stage) = (
            format!("{}_host", place.name),
            format!("{}_stages", place.name),
        );
        admin(&format!("CREATE ROLE {host} LOGIN PASSWORD 'geheim'")).await;
        let url = login(&place.url, &host);
        let stage_url = login(&place.url, &stage);
        let roles = Self {
            place,
            host,
            stage,
            url,
            stage_url,
        };
        let statements = readme(&roles.host, &roles.stage, &roles.place.name);
        roles.place.run(&statements).await;
        roles
    }

    pub(super) async fn open(&self) -> Result<Database, StoreError> {
        let stage_url = Some(&self.stage_url);
        Database::connect_as(&self.url, stage_url, None, CONNECTIONS, None).await
    }

    pub(super) async fn refusal(&self) -> String {
        match self.open().await.map(drop) {
            Err(StoreError::Refused(why)) => why,
            other => panic!("{other:?}"),
        }
    }

    pub(super) async fn as_stage(&self) -> sqlx::PgConnection {
        let options: sqlx::postgres::PgConnectOptions =
            address(&self.stage_url).parse().expect("a URL");
        options.connect().await.expect("the stages' role")
    }

    /// A pipeline whose host logs in as its role, and stages as theirs; as the host's, if that is not told.
    fn bench(&self, stages: Option<&SqlUrl>) -> Bench {
        let url = match stages {
            None => address(&self.url).to_owned(),
            Some(stages) => format!(
                "{}\"\nstage-url = \"{}",
                address(&self.url),
                address(stages)
            ),
        };
        Bench::with("test-probe", 1, "", &url, "")
    }

    pub(super) async fn remove(self) {
        let Self {
            place, host, stage, ..
        } = self;
        place.remove().await;
        admin(&format!("DROP ROLE {host}; DROP ROLE {stage}")).await;
    }
}

fn login(url: &SqlUrl, role: &str) -> SqlUrl {
    let mut url = url::Url::parse(address(url)).expect("a URL");
    url.set_username(role).expect("a URL with users");
    url.set_password(Some("geheim")).expect("a URL with users");
    SqlUrl::Postgres(url.into())
}

fn address(url: &SqlUrl) -> &str {
    match url {
        SqlUrl::Postgres(url) => url,
        SqlUrl::Sqlite(_) => panic!("not PostgreSQL"),
    }
}

/// Stops the host in order, and starts another on the pipeline.
fn start_again(bench: &mut Bench) {
    bench.host.signal(libc::SIGTERM);
    bench.host.wait_for_end();
    bench.restart();
}

/// What the host has warned of by the time when it is ready.
fn warnings(bench: &Bench) -> Vec<String> {
    bench.host.ready();
    let log = bench.host.log();
    assert!(!log.contains("geheim"), "{log}");
    let grave = |line: &&str| line.contains(" WARN ") || line.contains(" ERROR ");
    log.lines().filter(grave).map(str::to_owned).collect()
}

const NONE: [&str; 0] = [];

async fn check_works(bench: &Bench) {
    let emit = json!({ "do": "emit", "topic": bench.output, "value": 1 });
    let (outputs, dead) = bench.deliver(&[emit]).await;
    assert_eq!((outputs.len(), dead.len()), (1, 0));
}

/// Where stages have no role of their own, and the host's is as the README makes it, or may do more.
#[tokio::test(flavor = "multi_thread")]
async fn powers_of_a_role_that_stages_share_with_the_host_are_warned_of_at_the_start() {
    const POWERS: [&str; 4] = ["SUPERUSER", "CREATEROLE", "REPLICATION", "BYPASSRLS"];
    let roles = Roles::new().await;
    let mut bench = roles.bench(None);
    let shared = format!("stages use the host's role {}", roles.host);
    assert_eq!(warnings(&bench), NONE);
    let log = bench.host.log();
    assert!(log.contains(&format!("{shared}, and only")), "{log}");
    let one_or_all = POWERS
        .map(|power| vec![power])
        .into_iter()
        .chain([POWERS.to_vec()]);
    for powers in one_or_all {
        let change = |no: &str| {
            let powers = powers.iter().map(|power| format!(" {no}{power}"));
            format!("ALTER ROLE {}{}", roles.host, powers.collect::<String>())
        };
        roles.place.run(&change("")).await;
        start_again(&mut bench);
        let named = powers.join(", ").to_lowercase();
        let words = format!("{shared}, which has more power than they should ({named}); stage-url");
        match &warnings(&bench)[..] {
            [only] => assert!(only.contains(" WARN ") && only.contains(&words), "{only}"),
            other => panic!("{powers:?}: {other:?}"),
        }
        roles.place.run(&change("NO")).await;
    }
    for of in ["pg_execute_server_program", "pg_write_all_data"] {
        let member = |what: &str, whose: &str| format!("{what} {of} {whose} {}", roles.host);
        roles.place.run(&member("GRANT", "TO")).await;
        start_again(&mut bench);
        let words = format!("has more power than they should (member of {of})");
        match &warnings(&bench)[..] {
            [only] => assert!(only.contains(" WARN ") && only.contains(&words), "{only}"),
            other => panic!("{of}: {other:?}"),
        }
        roles.place.run(&member("REVOKE", "FROM")).await;
    }
    start_again(&mut bench);
    assert_eq!(warnings(&bench), NONE);
    check_works(&bench).await;
    drop(bench);
    roles.remove().await;
}

/// And where they have one, that is bound, and may do what it need not.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_role_for_stages_need_not_have_is_warned_of_at_the_start_with_the_mend() {
    let roles = Roles::new().await;
    let mut bench = roles.bench(Some(&roles.stage_url));
    assert_eq!(warnings(&bench), NONE);
    let (stage, database) = (&roles.stage, &roles.place.name);
    let unwise = [
        (
            format!("GRANT CREATE ON SCHEMA public TO {stage}"),
            "may make things in the schema public of the host's tables",
        ),
        (
            format!("GRANT TEMPORARY ON DATABASE {database} TO PUBLIC"),
            "may make temporary tables",
        ),
    ];
    for (grant, words) in unwise {
        roles.place.run(&grant).await;
        start_again(&mut bench);
        let words = format!("the role {stage} of stage-url {words}");
        let warned = warnings(&bench);
        let is_it = |line: &String| line.contains(" WARN ") && line.contains(&words);
        assert!(
            !warned.is_empty() && warned.iter().all(is_it),
            "{grant}: {warned:?}"
        );
        let (_, mend) = warned[0].rsplit_once("; ").expect("its mend");
        roles.place.run(mend).await;
        start_again(&mut bench);
        assert_eq!(warnings(&bench), NONE, "{mend}");
    }
    check_works(&bench).await;
    drop(bench);
    roles.remove().await;
}

/// Whatever makes it none is named by the host that ends, with the statements that mend it.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_does_not_start_where_the_role_for_stages_is_no_bound() {
    let roles = Roles::new().await;
    let mut bench = roles.bench(Some(&roles.stage_url));
    bench.host.ready();
    let (host, stage) = (&roles.host, &roles.stage);
    let other = format!("{stage}_other");
    let wrong = [
        (
            format!(
                "CREATE ROLE {other}; GRANT {other} TO {stage}; ALTER ROLE {stage} SET role = {other}"
            ),
            format!("its login is {stage}"),
        ),
        (
            format!("ALTER ROLE {stage} SUPERUSER"),
            "it is a superuser".to_owned(),
        ),
        (
            format!("ALTER ROLE {stage} CREATEROLE"),
            "it makes roles".to_owned(),
        ),
        (
            format!("ALTER ROLE {stage} REPLICATION"),
            "it may read the whole server's log of changes".to_owned(),
        ),
        (
            format!("ALTER ROLE {stage} BYPASSRLS"),
            "it is not bound by row-level security".to_owned(),
        ),
        (
            format!("GRANT {host} TO {stage}"),
            format!("it is a member of {host}"),
        ),
        (
            format!("GRANT pg_write_all_data TO {stage}"),
            "it is a member of pg_write_all_data".to_owned(),
        ),
        (
            format!("ALTER SCHEMA public OWNER TO {stage}"),
            "it owns the schema public of the host's tables".to_owned(),
        ),
        (
            format!("REVOKE USAGE ON SCHEMA public FROM PUBLIC, {stage}"),
            "it may not use the schema public of the host's tables".to_owned(),
        ),
        // By somebody whose grants the host can't take back.
        (
            format!(
                "ALTER TABLE stagehost_progress OWNER TO CURRENT_USER;                  GRANT SELECT, INSERT, UPDATE ON stagehost_progress TO {host}; GRANT SELECT ON stagehost_progress TO {stage}"
            ),
            "it may use the host's table stagehost_progress".to_owned(),
        ),
    ];
    for (statements, words) in wrong {
        roles.place.run(&statements).await;
        bench.restart();
        let why = refusal(&mut bench);
        assert!(
            why.contains("of stage-url is no bound for stages"),
            "{statements}: {why}"
        );
        let (_, mend) = why
            .split_once(&format!("-- {words}"))
            .unwrap_or_else(|| panic!("{statements}: {why}"));
        let (_, mend) = mend.split_once('\n').expect("a statement below");
        roles.place.run(mend).await;
    }
    bench.restart();
    assert_eq!(warnings(&bench), NONE);
    check_works(&bench).await;

    let (own, theirs) = (address(&roles.url), address(&roles.stage_url));
    let same = bench.pipeline.replace(theirs, own);
    assert_ne!(same, bench.pipeline);
    bench.pipeline = same;
    start_again(&mut bench);
    let why = refusal(&mut bench);
    assert!(why.contains("-- it is the role of url"), "{why}");
    drop(bench);
    roles.remove().await;
    admin(&format!("DROP ROLE {other}")).await;
}

/// What a host that does not start has said.
fn refusal(bench: &mut Bench) -> String {
    let status = bench.host.wait_for_end();
    assert_eq!(status.code(), Some(1), "{}", bench.host.log());
    // Its last lines may still be on their way through the pipe.
    std::thread::sleep(Duration::from_millis(100));
    let log = bench.host.log();
    assert!(!log.contains("geheim"), "{log}");
    log
}
