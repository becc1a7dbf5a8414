//! A post of the blog.

use serde::{Deserialize, Serialize};
use stagehost::{Fault, Message};

/// As the articles have it.
#[derive(Deserialize, Serialize)]
pub struct Post {
    /// Its id.
    pub uid: String,
    /// Its title.
    pub title: String,
    /// Its text.
    pub content: String,
    /// What its address ends with.
    #[serde(default)]
    pub slug: String,
}

impl Post {
    /// From a message, with a slug of the words of its title and its id.
    pub fn read(message: &Message) -> Result<Self, Fault> {
        let mut post: Self = message.json()?;
        let words = post.title.split(|c: char| !c.is_ascii_alphanumeric());
        let words: Vec<_> = words.filter(|word| !word.is_empty()).collect();
        post.slug = format!("{}-{}", words.join("-").to_ascii_lowercase(), post.uid);
        Ok(post)
    }
}
