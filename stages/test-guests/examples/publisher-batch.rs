//! The blog's publisher over a batch: one statement for all posts, and an event for each. For benchmarks.

use stagehost::{Fault, Message, Outcome, Outgoing, params, sql};
use test_guests::post::Post;

fn publish(messages: Vec<Message>) -> Vec<Outcome> {
    let posts: Vec<_> = messages.iter().map(Post::read).collect();
    let good: Vec<_> = posts.iter().flatten().collect();
    let stored = store(&good);
    let stored = |post: Result<Post, Fault>| post.and(stored.clone());
    posts.into_iter().map(stored).collect()
}

fn store(posts: &[&Post]) -> Outcome {
    let column = |of: fn(&Post) -> &String| -> Vec<String> {
        posts.iter().map(|post| of(post).clone()).collect()
    };
    let (uids, titles) = (column(|post| &post.uid), column(|post| &post.title));
    let (contents, slugs) = (column(|post| &post.content), column(|post| &post.slug));
    sql::Connection::open("posts")?.execute(
        "INSERT INTO posts (uid, title, content, slug)
         SELECT * FROM unnest($1, $2, $3, $4) ON CONFLICT (uid) DO NOTHING",
        &params![uids, titles, contents, slugs],
    )?;
    for post in posts {
        Outgoing::json("app.publishedPosts", &post.slug, post)?.send()?;
    }
    Ok(())
}

stagehost::batch_stage!(publish);
