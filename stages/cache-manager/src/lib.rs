//! Keeps published posts in Redis, to be read by slug and by uid: those of a batch in two round trips.

use std::collections::BTreeMap;

use serde::Deserialize;
use stagehost::redis::{Connection, SetOptions};
use stagehost::{Message, Outcome};

#[derive(Deserialize)]
struct Post {
    uid: String,
    slug: String,
}

fn cache(messages: Vec<Message>) -> Vec<Outcome> {
    // Records of one slug stand in one partition, so their offsets order them. Those of one uid need not.
    let version = messages.last().map_or(0, |last| last.offset);
    let (mut slugs, mut uids) = (BTreeMap::new(), BTreeMap::new());
    let mut add = |message: Message| {
        let post: Post = message.json()?;
        let json = message.value.unwrap_or_default();
        slugs.insert(format!("post:{}", post.slug), json.clone());
        uids.insert(format!("post:uid:{}", post.uid), json);
        Ok(())
    };
    let read: Vec<Outcome> = messages.into_iter().map(&mut add).collect();
    let written = write(slugs, uids, version);
    read.into_iter()
        .map(|read| read.and(written.clone()))
        .collect()
}

type Entries = BTreeMap<String, Vec<u8>>;

fn write(slugs: Entries, uids: Entries, version: u64) -> Outcome {
    let cache = Connection::open("cache")?;
    let newer = SetOptions::default().with_version(version);
    cache.set_many(&Vec::from_iter(slugs), Some(newer))?;
    cache.set_many(&Vec::from_iter(uids), None)?;
    Ok(())
}

stagehost::batch_stage!(cache);
