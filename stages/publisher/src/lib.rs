//! Gives a new post its slug, stores it, and announces it.

mod slug;

use serde::{Deserialize, Serialize};
use stagehost::{Message, Outcome, Outgoing, params, sql};

#[derive(Deserialize, Serialize)]
struct Post {
    uid: String,
    title: String,
    content: String,
    #[serde(default)]
    slug: String,
}

fn publish(message: Message) -> Outcome {
    let mut post: Post = message.json()?;
    post.slug = slug::slug(&post.title, &post.uid);
    sql::Connection::open("posts")?.execute(
        "INSERT INTO posts (uid, title, content, slug) VALUES ($1, $2, $3, $4)
         ON CONFLICT (uid) DO NOTHING",
        &params![&post.uid, &post.title, &post.content, &post.slug],
    )?;
    Ok(Outgoing::json("app.publishedPosts", &post.slug, &post)?.send()?)
}

stagehost::stage!(publish);
