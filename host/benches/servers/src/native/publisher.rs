//! The blog's publisher: a row in PostgreSQL and an event for each post.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures::future::try_join_all;
use rdkafka::consumer::{CommitMode, Consumer, StreamConsumer};
use rdkafka::message::{Message, OwnedMessage};
use rdkafka::producer::{FutureProducer, FutureRecord};
use sqlx::postgres::{PgPool, PgPoolOptions};

use super::reader::{IDLE, Lane, read};
use super::{Post, Settings, consumer_config, producer_config};

/// How long a record waits for room in the producer's queue.
const PATIENCE: Duration = Duration::from_secs(60);
const INSERT: &str = "INSERT INTO posts (uid, title, content, slug) VALUES ($1, $2, $3, $4)
     ON CONFLICT (uid) DO NOTHING";
const INSERT_MANY: &str = "INSERT INTO posts (uid, title, content, slug)
     SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[])
     ON CONFLICT (uid) DO NOTHING";

/// As the articles' service does: one commit, one awaited produce and one offset commit a message. Nothing is waited for
/// longer than it takes: the producer does not linger.
pub(super) fn one_by_one(settings: &Settings) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let pool = PgPool::connect(&settings.database).await?;
        let mut config = producer_config(settings);
        let producer: FutureProducer = config.set("linger.ms", "0").create()?;
        let consumer: StreamConsumer = consumer_config(settings).create()?;
        consumer.subscribe(&[&settings.input])?;
        loop {
            let message = consumer.recv().await?;
            let post = Post::read(message.payload().unwrap_or_default())?;
            sqlx::query(INSERT)
                .bind(&*post.uid)
                .bind(&*post.title)
                .bind(&*post.content)
                .bind(&post.slug)
                .execute(&pool)
                .await?;
            produce(&producer, &settings.output, &post).await?;
            consumer.commit_message(&message, CommitMode::Sync)?;
        }
    })
}

/// One statement, one transaction and one awaited flight of records a batch, the partitions side by side.
pub(super) fn batches(settings: &Settings) -> anyhow::Result<()> {
    let runtime = Arc::new(runtime()?);
    let pool = runtime.block_on(
        PgPoolOptions::new()
            .max_connections(8)
            .connect(&settings.database),
    )?;
    let producer: FutureProducer = producer_config(settings).create()?;
    let (output, batch) = (settings.output.clone(), settings.batch);
    read(settings, move |lane| {
        let publisher = Publisher {
            pool: pool.clone(),
            producer: producer.clone(),
            output: output.clone(),
        };
        if let Err(error) = runtime.block_on(publisher.run(&lane, batch)) {
            eprintln!("{error:#}");
            std::process::exit(1);
        }
    })
}

struct Publisher {
    pool: PgPool,
    producer: FutureProducer,
    output: String,
}

impl Publisher {
    async fn run(&self, lane: &Lane, batch: usize) -> anyhow::Result<()> {
        loop {
            let messages = at_hand(lane, batch)?;
            let Some(last) = messages.last() else {
                continue;
            };
            self.publish(&messages).await?;
            lane.done.up_to(last.offset() + 1);
        }
    }

    async fn publish(&self, messages: &[OwnedMessage]) -> anyhow::Result<()> {
        let posts = messages
            .iter()
            .map(|m| Post::read(m.payload().unwrap_or_default()));
        let posts = posts.collect::<Result<Vec<_>, _>>()?;
        let column =
            |of: for<'a> fn(&'a Post<'_>) -> &'a str| posts.iter().map(of).collect::<Vec<_>>();
        let mut transaction = self.pool.begin().await?;
        sqlx::query(INSERT_MANY)
            .bind(column(|post| &post.uid))
            .bind(column(|post| &post.title))
            .bind(column(|post| &post.content))
            .bind(column(|post| &post.slug))
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        try_join_all(
            posts
                .iter()
                .map(|post| produce(&self.producer, &self.output, post)),
        )
        .await?;
        Ok(())
    }
}

async fn produce(producer: &FutureProducer, topic: &str, post: &Post<'_>) -> anyhow::Result<()> {
    let value = serde_json::to_vec(post)?;
    let record = FutureRecord::to(topic).key(&post.slug).payload(&value);
    let sent = producer.send(record, PATIENCE).await;
    sent.map_err(|(error, _)| error).context("cannot produce")?;
    Ok(())
}

/// What is at hand of a partition, waiting for the first message a while.
pub(super) fn at_hand(lane: &Lane, most: usize) -> anyhow::Result<Vec<OwnedMessage>> {
    let mut messages = Vec::new();
    let mut wait = IDLE;
    while messages.len() < most
        && let Some(message) = lane.queue.poll(wait).transpose()?
    {
        messages.push(message.detach());
        wait = Duration::ZERO;
    }
    Ok(messages)
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
}
