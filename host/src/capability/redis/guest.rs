//! What components call, and what of it the grant allows.

use std::collections::BTreeMap;
use std::sync::Arc;

use wasmtime::component::{HasData, Linker, Resource, ResourceTable};

use super::{
    HOST_PREFIX, MAX_KEY_BYTES, MAX_KEYS, MAX_REQUEST_BYTES, MAX_VALUE_BYTES, Set, Store, WAS_DONE,
    commands, rights,
};
use crate::capability::{Action, Away, Pending, StoreError, StoreName};
use crate::pipeline::RedisGrant;
use bindings::{Error, Reply, SetOptions};

mod generated {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "
            package stagehost:host-redis;
            world imports {
                import stagehost:stage/redis@0.1.0;
            }
        ",
        world: "stagehost:host-redis/imports",
        imports: { default: async | trappable },
        with: { "stagehost:stage/redis.connection": super::Connection },
        additional_derives: [PartialEq],
    });
}

/// The interface's own types, which the host uses too.
pub(super) mod bindings {
    pub use super::generated::stagehost::stage::redis::{Condition, Error, Reply, SetOptions};
}

use generated::stagehost::stage::redis;

/// The stores that a stage may use and what it may do with each, by the names that the pipeline gives them.
pub struct RedisGrants(BTreeMap<String, Arc<Granted>>);

impl RedisGrants {
    /// Grants these stores.
    pub fn new(stores: BTreeMap<String, (Store, RedisGrant)>) -> Self {
        let granted = stores.into_iter().map(|(name, (store, grant))| {
            let granted = Granted {
                name: name.as_str().into(),
                store: store.granted(),
                grant,
            };
            (name, Arc::new(granted))
        });
        Self(granted.collect())
    }

    /// Sees whether a store does what it did not do, without an effect.
    pub async fn probe(&self, name: &str, action: &Action) -> Result<(), StoreError> {
        match self.0.get(name) {
            Some(granted) => granted.store.probe(&granted.grant.prefix, action).await,
            None => Err(StoreError::Refused(format!(
                "there is no Redis store `{name}`"
            ))),
        }
    }
}

/// What one instance has of this interface.
pub struct RedisCtx {
    grants: Arc<RedisGrants>,
    pending: Arc<Pending>,
    denied: Option<String>,
    away: Option<Away>,
}

impl RedisCtx {
    /// For an instance of the stage that has these grants. What it waits for is noted in `pending`.
    pub fn new(grants: Arc<RedisGrants>, pending: Arc<Pending>) -> Self {
        Self {
            grants,
            pending,
            denied: None,
            away: None,
        }
    }

    /// Where it is noted which store the instance waits for.
    pub fn waiting_for(&self) -> Arc<Pending> {
        self.pending.clone()
    }

    /// The first thing that was denied since this was last asked.
    pub fn take_denied(&mut self) -> Option<String> {
        self.denied.take()
    }

    /// The first store that did not do what it was asked since this was last asked.
    pub fn take_away(&mut self) -> Option<Away> {
        self.away.take()
    }

    fn open(&mut self, name: &str) -> Result<Connection, Error> {
        let granted = self.grants.0.get(name).cloned();
        let granted = granted.ok_or_else(|| {
            Error::Denied(format!(
                "the pipeline does not grant the Redis store {name:?} to this stage"
            ))
        });
        self.note(granted.map(|granted| Connection { granted }))
    }

    /// Remembers a denial on its way to the guest.
    fn note<T>(&mut self, answer: Result<T, Error>) -> Result<T, Error> {
        if let Err(Error::Denied(denied)) = &answer {
            self.denied.get_or_insert_with(|| denied.clone());
        }
        answer
    }
}

/// An instance's context and its table of resources, borrowed for one call.
pub struct RedisView<'a> {
    /// The instance's context.
    pub ctx: &'a mut RedisCtx,
    /// Where the instance's connections are.
    pub table: &'a mut ResourceTable,
}

/// Gives components the interface.
pub fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    view: fn(&mut T) -> RedisView<'_>,
) -> wasmtime::Result<()> {
    redis::add_to_linker::<T, HasRedis>(linker, view)
}

struct HasRedis;

impl HasData for HasRedis {
    type Data<'a> = RedisView<'a>;
}

/// A guest's handle.
#[allow(unreachable_pub, reason = "the generated bindings re-export it")]
pub struct Connection {
    granted: Arc<Granted>,
}

/// A store as one stage may use it.
struct Granted {
    name: Arc<str>,
    store: Store,
    grant: RedisGrant,
}

impl Granted {
    async fn get(&self, key: String) -> Result<Option<Vec<u8>>, Error> {
        self.check_keys([&key])?;
        self.store.fetch(key.as_bytes()).await
    }

    async fn get_many(&self, keys: Vec<String>) -> Result<Vec<Option<Vec<u8>>>, Error> {
        self.check_keys(&keys)?;
        let keys: Vec<_> = keys.into_iter().map(String::into_bytes).collect();
        self.store.fetch_many(&keys).await
    }

    async fn set(
        &self,
        entries: Vec<(String, Vec<u8>)>,
        options: Option<SetOptions>,
    ) -> Result<Vec<bool>, Error> {
        self.check_keys(entries.iter().map(|(key, _)| key))?;
        check_values(entries.iter().map(|(_, value)| value))?;
        let entries = entries.into_iter();
        let entries = entries
            .map(|(key, value)| (key.into_bytes(), value))
            .collect();
        let set = match options {
            None => Set {
                entries,
                ..Set::default()
            },
            Some(options) => Set {
                entries,
                ttl: options.ttl,
                condition: options.condition,
                version: options.version,
            },
        };
        self.store.set(set).await
    }

    async fn delete(&self, keys: Vec<String>) -> Result<u64, Error> {
        self.check_keys(&keys)?;
        let keys = keys.into_iter().map(String::into_bytes).collect();
        self.store.delete(keys).await
    }

    async fn increment(&self, key: String, delta: i64) -> Result<i64, Error> {
        self.check_keys([&key])?;
        self.store.increment(key.into_bytes(), delta).await
    }

    async fn execute(&self, name: &str, arguments: Vec<Vec<u8>>) -> Result<Reply, Error> {
        let granted = self.grant.commands.iter();
        if !granted
            .into_iter()
            .any(|granted| granted.eq_ignore_ascii_case(name))
        {
            let message = format!("the pipeline does not grant the command {name:?} to this stage");
            return Err(Error::Denied(message));
        }
        let command = commands::lookup(name)
            .ok_or_else(|| Error::Denied(format!("the host has no command {name:?}")))?;
        command.check(&arguments)?;
        self.check_keys(command.keys(&arguments))?;
        check_values(&arguments)?;
        self.store.execute(command, arguments).await
    }

    fn check_keys<K: AsRef<[u8]>>(&self, keys: impl IntoIterator<Item = K>) -> Result<(), Error> {
        let mut count = 0;
        for key in keys {
            count += 1;
            let key = key.as_ref();
            let prefix = self.grant.prefix.as_bytes();
            if !key.starts_with(prefix) || key.starts_with(HOST_PREFIX.as_bytes()) {
                return Err(Error::Denied(format!(
                    "the stage's keys begin with {:?}, and {:?} does not",
                    self.grant.prefix,
                    shown(key)
                )));
            }
            if key.len() > MAX_KEY_BYTES {
                return Err(Error::TooLarge(MAX_KEY_BYTES as u64));
            }
        }
        check_count(count)
    }
}

/// The beginning of a key, for messages.
fn shown(key: &[u8]) -> String {
    const SHOWN: usize = 64;
    let shown = &key[..key.len().min(SHOWN)];
    String::from_utf8_lossy(shown).into_owned()
}

fn check_values<'a>(values: impl IntoIterator<Item = &'a Vec<u8>>) -> Result<(), Error> {
    let (mut count, mut bytes) = (0, 0);
    for value in values {
        count += 1;
        bytes += value.len();
        if value.len() > MAX_VALUE_BYTES {
            return Err(Error::TooLarge(MAX_VALUE_BYTES as u64));
        }
    }
    if bytes > MAX_REQUEST_BYTES {
        return Err(Error::TooLarge(MAX_REQUEST_BYTES as u64));
    }
    check_count(count)
}

fn check_count(count: usize) -> Result<(), Error> {
    if count > MAX_KEYS {
        let message = format!("ERR a call takes at most {MAX_KEYS} keys or arguments");
        return Err(Error::Server(message));
    }
    Ok(())
}

impl RedisView<'_> {
    /// Runs a call on a handle's store, notes for how long the instance waits for it, and remembers a denial, and that the
    /// store did not do it, which is known by this name.
    async fn call<T>(
        &mut self,
        handle: &Resource<Connection>,
        (name, writes): (&'static str, bool),
        call: impl AsyncFnOnce(Arc<Granted>) -> Result<T, Error>,
    ) -> wasmtime::Result<Result<T, Error>> {
        let granted = self.table.get(handle)?.granted.clone();
        let store = StoreName::Redis(granted.name.clone());
        let (pending, is_embedded) = (&self.ctx.pending, granted.store.is_embedded());
        if is_embedded {
            pending.sight().heard();
        }
        let answer = pending.during(store.clone(), call(granted)).await;
        if is_embedded {
            pending.sight().end();
        }
        if let Err(Error::Unavailable(why)) = &answer {
            let action = match (why.starts_with(WAS_DONE), writes) {
                (true, _) => Action::Command(name),
                (false, true) => Action::Write,
                (false, false) => Action::Read,
            };
            let why = why.clone();
            (self.ctx.away).get_or_insert(Away {
                store,
                action,
                why,
                was_gone: false,
            });
        }
        Ok(self.ctx.note(answer))
    }
}

fn kind_of_set(options: Option<&SetOptions>) -> &'static str {
    match options {
        Some(options) if options.condition.is_some() || options.version.is_some() => rights::SET_IF,
        _ => rights::SET,
    }
}

impl redis::Host for RedisView<'_> {}

impl redis::HostConnection for RedisView<'_> {
    async fn open(
        &mut self,
        name: String,
    ) -> wasmtime::Result<Result<Resource<Connection>, Error>> {
        Ok(match self.ctx.open(&name) {
            Ok(connection) => Ok(self.table.push(connection)?),
            Err(error) => Err(error),
        })
    }

    async fn get(
        &mut self,
        handle: Resource<Connection>,
        key: String,
    ) -> wasmtime::Result<Result<Option<Vec<u8>>, Error>> {
        self.call(&handle, (rights::GET, false), async |granted| {
            granted.get(key).await
        })
        .await
    }

    async fn get_many(
        &mut self,
        handle: Resource<Connection>,
        keys: Vec<String>,
    ) -> wasmtime::Result<Result<Vec<Option<Vec<u8>>>, Error>> {
        self.call(&handle, (rights::GET_MANY, false), async |granted| {
            granted.get_many(keys).await
        })
        .await
    }

    async fn set(
        &mut self,
        handle: Resource<Connection>,
        key: String,
        value: Vec<u8>,
        options: Option<SetOptions>,
    ) -> wasmtime::Result<Result<bool, Error>> {
        let kind = (kind_of_set(options.as_ref()), true);
        self.call(&handle, kind, async |granted| {
            let written = granted.set(vec![(key, value)], options).await?;
            Ok(written == [true])
        })
        .await
    }

    async fn set_many(
        &mut self,
        handle: Resource<Connection>,
        entries: Vec<(String, Vec<u8>)>,
        options: Option<SetOptions>,
    ) -> wasmtime::Result<Result<(), Error>> {
        let kind = (kind_of_set(options.as_ref()), true);
        self.call(&handle, kind, async |granted| {
            granted.set(entries, options).await.map(drop)
        })
        .await
    }

    async fn delete(
        &mut self,
        handle: Resource<Connection>,
        keys: Vec<String>,
    ) -> wasmtime::Result<Result<u64, Error>> {
        self.call(&handle, (rights::DELETE, true), async |granted| {
            granted.delete(keys).await
        })
        .await
    }

    async fn increment(
        &mut self,
        handle: Resource<Connection>,
        key: String,
        delta: i64,
    ) -> wasmtime::Result<Result<i64, Error>> {
        self.call(&handle, (commands::INCRBY.name, true), async |granted| {
            granted.increment(key, delta).await
        })
        .await
    }

    async fn execute(
        &mut self,
        handle: Resource<Connection>,
        command: String,
        arguments: Vec<Vec<u8>>,
    ) -> wasmtime::Result<Result<Reply, Error>> {
        // One that is not known is denied.
        let known = commands::lookup(&command).map_or(("", false), |c| (c.name, c.writes));
        self.call(&handle, known, async |granted| {
            granted.execute(&command, arguments).await
        })
        .await
    }

    async fn drop(&mut self, handle: Resource<Connection>) -> wasmtime::Result<()> {
        self.table.delete(handle)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capability::redis::system_clock;
    use crate::pipeline::RedisUrl;

    async fn granted() -> Granted {
        let store = Store::connect(&RedisUrl::Memory, system_clock()).await;
        Granted {
            name: "cache".into(),
            store: store.expect("a store in memory"),
            grant: RedisGrant {
                prefix: "post:".to_owned(),
                commands: vec![
                    "EXISTS".to_owned(),
                    "HSET".to_owned(),
                    "FLUSHALL".to_owned(),
                ],
            },
        }
    }

    fn bytes(arguments: &[&str]) -> Vec<Vec<u8>> {
        arguments
            .iter()
            .map(|argument| argument.as_bytes().to_vec())
            .collect()
    }

    #[tokio::test]
    async fn keys_and_commands_beyond_the_grant_are_denied() {
        let granted = granted().await;
        let outside = || "user:1".to_owned();
        let denials = [
            granted.get(outside()).await.map(drop),
            granted
                .get_many(vec!["post:1".into(), outside()])
                .await
                .map(drop),
            granted.set(vec![(outside(), vec![])], None).await.map(drop),
            granted.delete(vec![outside()]).await.map(drop),
            granted.increment(outside(), 1).await.map(drop),
            granted
                .execute("EXISTS", bytes(&["post:1", "user:1"]))
                .await
                .map(drop),
            granted
                .execute("strlen", bytes(&["post:1"]))
                .await
                .map(drop),
            granted.execute("FLUSHALL", vec![]).await.map(drop),
        ];
        for (at, denial) in denials.iter().enumerate() {
            assert!(matches!(denial, Err(Error::Denied(_))), "{at}: {denial:?}");
        }
        let field = granted
            .execute("hset", bytes(&["post:1", "user", "x"]))
            .await;
        assert_eq!(field, Ok(Reply::Int(1)), "only the key needs the prefix");
        assert_eq!(
            granted.execute("exists", bytes(&["post:1"])).await,
            Ok(Reply::Int(1))
        );
    }

    #[tokio::test]
    async fn no_prefix_opens_the_hosts_own_keys() {
        let mut granted = granted().await;
        granted.grant.prefix = String::new();
        let answer = granted.get("stagehost:version:{post:1}".to_owned()).await;
        assert!(matches!(answer, Err(Error::Denied(_))), "{answer:?}");
    }

    #[tokio::test]
    async fn sizes_have_limits() {
        let granted = granted().await;
        let long_key = format!("post:{}", "x".repeat(MAX_KEY_BYTES));
        let answer = granted.get(long_key).await;
        assert_eq!(answer, Err(Error::TooLarge(MAX_KEY_BYTES as u64)));
        let entry = |size: usize| ("post:1".to_owned(), vec![0; size]);
        let answer = granted.set(vec![entry(MAX_VALUE_BYTES + 1)], None).await;
        assert_eq!(answer, Err(Error::TooLarge(MAX_VALUE_BYTES as u64)));
        let answer = granted.set(vec![entry(MAX_VALUE_BYTES)], None).await;
        assert_eq!(answer, Ok(vec![true]));
        let answer = granted.get_many(vec!["post:1".to_owned(); 3]).await;
        assert!(
            matches!(answer, Err(Error::TooLarge(_))),
            "three of them are too many"
        );
        let answer = granted
            .delete(vec!["post:1".to_owned(); MAX_KEYS + 1])
            .await;
        assert!(matches!(answer, Err(Error::Server(_))), "{answer:?}");
    }

    #[tokio::test]
    async fn the_first_denial_is_remembered_once() {
        let mut ctx = RedisCtx::new(Arc::new(RedisGrants::new(BTreeMap::new())), pending());
        assert!(ctx.open("cache").is_err());
        assert!(ctx.open("other").is_err());
        let denied = ctx.take_denied().expect("a denial");
        assert!(denied.contains("\"cache\""), "{denied}");
        assert_eq!(ctx.take_denied(), None);
    }

    #[tokio::test]
    async fn a_store_that_was_away_is_remembered_once() {
        use super::redis::HostConnection;
        let granted = granted().await;
        let stores = [("cache".to_owned(), (granted.store.clone(), granted.grant))];
        let grants = Arc::new(RedisGrants::new(BTreeMap::from(stores)));
        let mut ctx = RedisCtx::new(grants.clone(), pending());
        let mut table = ResourceTable::new();
        let mut view = RedisView {
            ctx: &mut ctx,
            table: &mut table,
        };
        let opened = view.open("cache".to_owned()).await;
        let handle = opened.expect("no trap").expect("a grant").rep();
        assert!(grants.probe("cache", &Action::Answer).await.is_ok());
        granted.store.close().await;
        for _ in 0..2 {
            let handle = Resource::new_borrow(handle);
            let away = view.get(handle, "post:1".to_owned()).await;
            let away = away.expect("no trap");
            assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
        }
        let cache = StoreName::Redis("cache".into());
        assert_eq!(ctx.take_away().map(|away| away.store), Some(cache));
        assert!(ctx.take_away().is_none());
        let ping = grants.probe("cache", &Action::Answer).await;
        assert!(matches!(ping, Err(StoreError::Unavailable(_))), "{ping:?}");
        let unknown = grants.probe("others", &Action::Answer).await;
        assert!(
            matches!(unknown, Err(StoreError::Refused(_))),
            "{unknown:?}"
        );
    }

    fn pending() -> Arc<Pending> {
        let log = crate::capability::logging::LogCtx::new("stage".into());
        Arc::new(Pending::new(log))
    }
}
