//! Keeps published posts in Redis, to be read by slug and by uid: those of a batch in two round trips.

use std::collections::BTreeMap;

use serde::Deserialize;
use stagehost::redis::{Connection, SetOptions};
use stagehost::{Fault, Message, Outcome};

#[derive(Deserialize)]
struct Post {
    uid: String,
    slug: String,
}

fn cache(messages: Vec<Message>) -> Vec<Outcome> {
    match write(&messages) {
        // One of them may be at fault: each for itself tells which.
        Err(Fault::Reject(_)) if messages.len() > 1 => messages.chunks(1).map(write).collect(),
        written => vec![written; messages.len()],
    }
}

/// Writes them in one go.
fn write(messages: &[Message]) -> Outcome {
    // Records of one slug stand in one partition, and these are all of it up to the last one: so its offset is a version
    // for all, and what is delivered again can't undo a newer write. Records of one uid may stand anywhere.
    let version = messages.last().map_or(0, |last| last.offset);
    let (mut slugs, mut uids) = (BTreeMap::new(), BTreeMap::new());
    for message in messages {
        let post: Post = message.json()?;
        let json = message.value.clone().unwrap_or_default();
        slugs.insert(format!("post:{}", post.slug), json.clone());
        uids.insert(format!("post:uid:{}", post.uid), json);
    }
    let cache = Connection::open("cache")?;
    let newer = SetOptions::default().with_version(version);
    cache.set_many(&Vec::from_iter(slugs), Some(newer))?;
    cache.set_many(&Vec::from_iter(uids), None)?;
    Ok(())
}

stagehost::batch_stage!(cache);
