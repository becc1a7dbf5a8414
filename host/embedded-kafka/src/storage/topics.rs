//! The topics: created, grown, deleted, found.
//!
//! Whoever creates, grows or deletes must not stop half-way: the futures of these are not cancel-safe.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use kafka_protocol::ResponseError;
use tracing::{debug, info, warn};
use uuid::Uuid;

use super::journal::Journal;
use super::journal_state::{Entry, TopicState};
use super::partition::Partition;
use super::topic_config::{Overrides, Settings};
use super::{create_folder, now_ms, sync_folder};
use crate::config::StartError;
use crate::folder;

/// Where the records are, in the folder of the broker: a folder for each topic, named by its id, so that no path is used
/// by two topics one after the other.
pub(crate) const FOLDER: &str = "topics";
/// Where the files of deleted topics wait for their removal.
const DELETED: &str = "deleted";

/// Partitions of all topics together: each that has records keeps a file open.
const MAX_PARTITIONS: usize = 4000;
const MAX_NAME_LEN: usize = 249;

/// A refusal, with its reason for whoever asked.
pub(crate) type Refused = (ResponseError, String);

/// All topics.
#[derive(Debug)]
pub(crate) struct Topics {
    folder: PathBuf,
    defaults: Settings,
    /// Whether all in the folder is known to have been on the disk when the broker last ended.
    intact: bool,
    by_name: RwLock<BTreeMap<String, Arc<Topic>>>,
    /// Held while topics are created, grown or deleted: one at a time.
    changing: tokio::sync::Mutex<()>,
}

/// A topic.
#[derive(Debug)]
pub(crate) struct Topic {
    pub(crate) name: String,
    pub(crate) id: String,
    pub(crate) config: Overrides,
    pub(crate) settings: Settings,
    partitions: Vec<Arc<Partition>>,
}

impl Topics {
    /// Opens all topics that the journal names, and removes what is left of deleted ones. Blocks.
    pub(crate) fn open(
        folder: &Path,
        journal: &Journal,
        defaults: Settings,
    ) -> Result<Self, StartError> {
        let topics = Self {
            folder: folder.to_owned(),
            defaults,
            intact: folder::is_flushed(folder),
            by_name: RwLock::default(),
            changing: tokio::sync::Mutex::default(),
        };
        let known = journal.look(|state| state.topics.clone());
        topics.clear_deleted(&known)?;
        let mut by_name = BTreeMap::new();
        let mut lost = Vec::new();
        for (name, state) in known {
            let topic = topics.open_topic(&name, &state)?;
            lost.extend(lost_starts(&topic, &state));
            by_name.insert(name, Arc::new(topic));
        }
        if !lost.is_empty() {
            journal.write_blocking(lost).map_err(|_| StartError::Io {
                what: "cannot write the journal, as the log says".to_owned(),
                error: std::io::ErrorKind::Other.into(),
            })?;
        }
        Ok(Self {
            by_name: RwLock::new(by_name),
            ..topics
        })
    }

    /// All topics, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Topic>> {
        self.read().values().cloned().collect()
    }

    pub(crate) fn get(&self, name: &str) -> Option<Arc<Topic>> {
        self.read().get(name).cloned()
    }

    pub(crate) fn with_id(&self, id: Uuid) -> Option<Arc<Topic>> {
        let topics = self.read();
        topics.values().find(|topic| topic.uuid() == id).cloned()
    }

    /// A partition, or the error of the protocol.
    pub(crate) fn partition(
        &self,
        topic: &str,
        index: i32,
    ) -> Result<Arc<Partition>, ResponseError> {
        let topics = self.read();
        let partitions = topics.get(topic).map(|topic| &topic.partitions);
        let found = usize::try_from(index)
            .ok()
            .and_then(|index| partitions?.get(index).cloned());
        found.ok_or(ResponseError::UnknownTopicOrPartition)
    }

    /// Whether all records are known to be on the disk.
    pub(crate) fn are_flushed(&self) -> bool {
        self.all()
            .iter()
            .flat_map(|topic| topic.partitions())
            .all(|partition| partition.is_flushed())
    }

    /// What holds for a topic that says nothing.
    pub(crate) fn defaults(&self) -> &Settings {
        &self.defaults
    }

    /// Creates a topic; with `only_check`, says whether it could be.
    pub(crate) async fn create(
        &self,
        journal: &Journal,
        name: &str,
        partitions: i32,
        config: Overrides,
        only_check: bool,
    ) -> Result<Arc<Topic>, Refused> {
        check_name(name)?;
        let _changing = self.changing.lock().await;
        if self.get(name).is_some() {
            return Err((
                ResponseError::TopicAlreadyExists,
                format!("Topic '{name}' already exists."),
            ));
        }
        self.check_count(partitions, 0)?;
        let state = TopicState {
            id: Uuid::new_v4().to_string(),
            partitions,
            config: config.clone(),
            starts: BTreeMap::new(),
        };
        self.defaults
            .with(&config)
            .map_err(|why| (ResponseError::InvalidConfig, why))?;
        let topic = Arc::new(
            self.open_topic(name, &state)
                .map_err(|error| storage(&error))?,
        );
        if only_check {
            return Ok(topic);
        }
        let entry = Entry::Topic {
            name: name.to_owned(),
            id: state.id,
            partitions,
            config,
        };
        journal
            .write(vec![entry])
            .await
            .map_err(|_| not_written())?;
        self.write().insert(name.to_owned(), topic.clone());
        debug!(topic = name, partitions, "created a topic");
        Ok(topic)
    }

    /// Gives a topic more partitions, `count` in all; with `only_check`, says whether it could be.
    pub(crate) async fn grow(
        &self,
        journal: &Journal,
        name: &str,
        count: i32,
        only_check: bool,
    ) -> Result<(), Refused> {
        let _changing = self.changing.lock().await;
        let Some(old) = self.get(name) else {
            return Err(unknown());
        };
        let before = old.partitions.len();
        if usize::try_from(count).unwrap_or(0) <= before {
            let why = format!(
                "The topic {name} currently has {before} partition(s); {count} would not be an increase."
            );
            return Err((ResponseError::InvalidPartitions, why));
        }
        self.check_count(count, before)?;
        if only_check {
            return Ok(());
        }
        let mut partitions = old.partitions.clone();
        for index in before as i32..count {
            let opened = self
                .open_partition(name, &old.id, index, 0, &old.settings)
                .map_err(|error| storage(&error))?;
            partitions.push(Arc::new(opened));
        }
        let entry = Entry::Partitions {
            topic: name.to_owned(),
            count,
        };
        journal
            .write(vec![entry])
            .await
            .map_err(|_| not_written())?;
        let (id, config, settings) = (old.id.clone(), old.config.clone(), old.settings.clone());
        let grown = Topic {
            name: name.to_owned(),
            id,
            config,
            settings,
            partitions,
        };
        self.write().insert(name.to_owned(), Arc::new(grown));
        info!(
            topic = name,
            partitions = count,
            "added partitions to a topic"
        );
        Ok(())
    }

    /// Gives a topic another configuration, which `change` makes of the one that it has; with `only_check`, says whether
    /// it could be.
    pub(crate) async fn configure(
        &self,
        journal: &Journal,
        name: &str,
        change: impl FnOnce(&Overrides) -> Result<Overrides, String> + Send,
        only_check: bool,
    ) -> Result<(), Refused> {
        let _changing = self.changing.lock().await;
        let Some(old) = self.get(name) else {
            return Err(unknown());
        };
        let invalid = |why| (ResponseError::InvalidConfig, why);
        let config = change(&old.config).map_err(invalid)?;
        let settings = self.defaults.with(&config).map_err(invalid)?;
        if only_check {
            return Ok(());
        }
        let entry = Entry::Config {
            topic: name.to_owned(),
            config: config.clone(),
        };
        journal
            .write(vec![entry])
            .await
            .map_err(|_| not_written())?;
        for partition in &old.partitions {
            partition.set_settings(settings.clone());
        }
        let configured = Topic {
            name: name.to_owned(),
            id: old.id.clone(),
            config,
            settings,
            partitions: old.partitions.clone(),
        };
        self.write().insert(name.to_owned(), Arc::new(configured));
        info!(topic = name, "changed the configuration of a topic");
        Ok(())
    }

    /// Deletes a topic, its records, and the offsets committed for it.
    pub(crate) async fn delete(&self, journal: &Journal, name: &str) -> Result<(), Refused> {
        let _changing = self.changing.lock().await;
        let Some(topic) = self.get(name) else {
            return Err(unknown());
        };
        journal
            .write(vec![Entry::TopicDeleted {
                topic: name.to_owned(),
            }])
            .await
            .map_err(|_| not_written())?;
        self.write().remove(name);
        let from = self.folder.join(FOLDER).join(&topic.id);
        let to = self.folder.join(DELETED).join(&topic.id);
        let topic_id = topic.id.clone();
        let removed = tokio::task::spawn_blocking(move || {
            topic
                .partitions
                .iter()
                .for_each(|partition| partition.delete());
            remove(&from, &to)
        });
        if let Ok(Err(error)) = removed.await {
            warn!(topic = name, id = topic_id, %error, "could not remove the files of a deleted topic");
        }
        info!(topic = name, "deleted a topic");
        Ok(())
    }

    /// Deletes the records of a partition before `offset` (-1: all), and gives the first offset that is left.
    pub(crate) async fn delete_before(
        &self,
        journal: &Journal,
        topic: &str,
        index: i32,
        offset: i64,
    ) -> Result<i64, ResponseError> {
        // One at a time, so that the journal's last word is the largest offset, and is about this topic.
        let _changing = self.changing.lock().await;
        let partition = self.partition(topic, index)?;
        // As Kafka has it: of a topic that is only compacted, nothing goes but what is replaced.
        if !partition.settings().deletes {
            return Err(ResponseError::PolicyViolation);
        }
        let start = partition.start_from(offset)?;
        let entry = Entry::Start {
            topic: topic.to_owned(),
            partition: index,
            offset: start,
        };
        journal
            .write(vec![entry])
            .await
            .map_err(|_| ResponseError::KafkaStorageError)?;
        partition.delete_before(start);
        let removed = tokio::task::spawn_blocking(move || partition.retain(now_ms())).await;
        if let Ok(Err(error)) = removed {
            warn!(topic, index, %error, "could not remove the files of deleted records; retention tries again");
        }
        Ok(start)
    }

    fn open_topic(&self, name: &str, state: &TopicState) -> Result<Topic, StartError> {
        let settings = self
            .defaults
            .with(&state.config)
            .map_err(|what| StartError::Corrupt {
                file: self.folder.clone(),
                position: 0,
                what: format!("the configuration of the topic {name} is not known: {what}"),
                mend: "use the version of the broker that wrote it".to_owned(),
            })?;
        let open = |index| {
            let start = state.starts.get(&index).copied().unwrap_or(0);
            self.open_partition(name, &state.id, index, start, &settings)
                .map(Arc::new)
        };
        let partitions = (0..state.partitions).map(open).collect::<Result<_, _>>()?;
        Ok(Topic {
            name: name.to_owned(),
            id: state.id.clone(),
            config: state.config.clone(),
            settings,
            partitions,
        })
    }

    fn open_partition(
        &self,
        topic: &str,
        id: &str,
        index: i32,
        start: i64,
        settings: &Settings,
    ) -> Result<Partition, StartError> {
        let folder = self.folder.join(FOLDER).join(id).join(index.to_string());
        let name = format!("{topic}/{index}");
        Partition::open(name, folder, start, settings.clone(), self.intact)
    }

    /// Removes what deletions left. A folder that the journal does not know is somebody's: it is left alone.
    fn clear_deleted(&self, known: &BTreeMap<String, TopicState>) -> Result<(), StartError> {
        let (topics, deleted) = (self.folder.join(FOLDER), self.folder.join(DELETED));
        for folder in [&topics, &deleted] {
            create_folder(folder).map_err(StartError::io("create the folder", folder))?;
        }
        for path in entries(&deleted)? {
            if let Err(error) = fs::remove_dir_all(&path) {
                warn!(folder = %path.display(), %error, "could not remove the files of a deleted topic");
            }
        }
        for path in entries(&topics)? {
            let is = |state: &TopicState| path.file_name().is_some_and(|name| *name == *state.id);
            if !known.values().any(is) {
                warn!(
                    folder = %path.display(),
                    "this is not a topic's; it is left alone: remove it if its records are not wanted"
                );
            }
        }
        Ok(())
    }

    fn check_count(&self, count: i32, already: usize) -> Result<(), Refused> {
        let used: usize = self
            .read()
            .values()
            .map(|topic| topic.partitions.len())
            .sum();
        match usize::try_from(count) {
            Ok(wanted) if wanted > 0 && used - already + wanted <= MAX_PARTITIONS => Ok(()),
            Ok(0) | Err(_) => Err((
                ResponseError::InvalidPartitions,
                "Number of partitions must be larger than 0.".to_owned(),
            )),
            Ok(_) => {
                let why = format!(
                    "the embedded broker has {used} partitions and can have {MAX_PARTITIONS}"
                );
                Err((ResponseError::InvalidPartitions, why))
            }
        }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<String, Arc<Topic>>> {
        self.by_name.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<String, Arc<Topic>>> {
        self.by_name.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Topic {
    /// Its id as the protocol has it.
    pub(crate) fn uuid(&self) -> Uuid {
        Uuid::parse_str(&self.id).unwrap_or_default()
    }

    pub(crate) fn partitions(&self) -> &[Arc<Partition>] {
        &self.partitions
    }
}

/// Kafka's rule for names, which makes them safe as names of folders.
fn check_name(name: &str) -> Result<(), Refused> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if !name.is_empty()
        && name.len() <= MAX_NAME_LEN
        && name != "."
        && name != ".."
        && name.bytes().all(legal)
    {
        return Ok(());
    }
    let why = format!(
        "a topic's name has 1 to {MAX_NAME_LEN} characters of a-z, A-Z, 0-9, '.', '_' and '-', and is not '.' or '..'"
    );
    Err((ResponseError::InvalidTopicException, why))
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, StartError> {
    let entries = fs::read_dir(folder).and_then(|entries| {
        entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect()
    });
    entries.map_err(StartError::io("read", folder))
}

/// Where the journal says that records were deleted which are not there at all (they went with the machine): what
/// holds instead, lest it be applied to records that come now.
fn lost_starts(topic: &Topic, state: &TopicState) -> Vec<Entry> {
    let holds = |(&index, &start): (&i32, &i64)| {
        let partition = topic.partitions.get(usize::try_from(index).ok()?)?;
        (partition.start() < start).then(|| Entry::Start {
            topic: topic.name.clone(),
            partition: index,
            offset: partition.start(),
        })
    };
    state.starts.iter().filter_map(holds).collect()
}

fn remove(from: &Path, to: &Path) -> std::io::Result<()> {
    if !from.exists() {
        return Ok(());
    }
    // Renamed first, so that the next start knows it for the rest of a deletion.
    fs::rename(from, to)?;
    from.parent().map_or(Ok(()), sync_folder)?;
    fs::remove_dir_all(to)
}

fn unknown() -> Refused {
    let error = ResponseError::UnknownTopicOrPartition;
    (
        error,
        "This server does not host this topic-partition.".to_owned(),
    )
}

fn storage(error: &StartError) -> Refused {
    (ResponseError::KafkaStorageError, error.to_string())
}

fn not_written() -> Refused {
    let why = "the broker could not write its journal; its log says why".to_owned();
    (ResponseError::KafkaStorageError, why)
}
