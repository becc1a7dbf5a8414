//! Keeps a published post in Redis, to be read by slug and by uid.

use serde::Deserialize;
use stagehost::redis::{Connection, SetOptions};
use stagehost::{Message, Outcome};

#[derive(Deserialize)]
struct Post {
    uid: String,
    slug: String,
}

fn cache(message: Message) -> Outcome {
    let post: Post = message.json()?;
    let json = message.value.unwrap_or_default();
    let cache = Connection::open("cache")?;
    // Records of one slug stand in one partition, so their offsets order them. Those of one uid
    // need not.
    let newer = SetOptions::default().with_version(message.offset);
    cache.set(&format!("post:{}", post.slug), &json, Some(newer))?;
    cache.set(&format!("post:uid:{}", post.uid), &json, None)?;
    Ok(())
}

stagehost::stage!(cache);
