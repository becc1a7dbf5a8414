//! The blog's cache manager as one would write it message by message: for benchmarks.

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
    let newer = SetOptions::default().with_version(message.offset);
    cache.set(&format!("post:{}", post.slug), &json, Some(newer))?;
    cache.set(&format!("post:uid:{}", post.uid), &json, None)?;
    Ok(())
}

stagehost::stage!(cache);
