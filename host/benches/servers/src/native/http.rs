//! The blog's two routes: a form becomes a record, and a key of Redis is answered.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rdkafka::producer::{FutureProducer, FutureRecord};
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use serde_json::json;
use tokio::net::TcpListener;
use uuid::Uuid;

use super::{Settings, producer_config};

/// How long a record waits for room in the producer's queue.
const PATIENCE: Duration = Duration::from_secs(10);

struct Service {
    producer: FutureProducer,
    redis: MultiplexedConnection,
    topic: String,
}

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(serve(settings))
}

async fn serve(settings: &Settings) -> anyhow::Result<()> {
    let client = redis::Client::open(settings.redis.as_str())?;
    let service = Arc::new(Service {
        producer: producer_config(settings).create()?,
        redis: client.get_multiplexed_async_connection().await?,
        topic: settings.output.clone(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("HTTP http://{}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let service = service.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request| {
                let service = service.clone();
                async move { Ok::<_, Infallible>(service.answer(request).await) }
            });
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), answer)
                .await;
            // A client that goes away ends its connection.
            drop(served);
        });
    }
}

type Answer = Response<Full<Bytes>>;

impl Service {
    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let answer = match (request.method(), request.uri().path()) {
            (&Method::POST, "/post") => self.post(request).await,
            (&Method::GET, path) => {
                self.get(path.strip_prefix("/post/").unwrap_or_default())
                    .await
            }
            _ => Ok(plain(StatusCode::NOT_FOUND, "not found")),
        };
        answer.unwrap_or_else(|error| plain(StatusCode::SERVICE_UNAVAILABLE, error.to_string()))
    }

    async fn post(&self, request: Request<Incoming>) -> anyhow::Result<Answer> {
        let body = request.into_body().collect().await?.to_bytes();
        let (mut title, mut content) = (String::new(), String::new());
        for (name, value) in form_urlencoded::parse(&body) {
            match &*name {
                "title" => title = value.into_owned(),
                "content" => content = value.into_owned(),
                _ => return Ok(plain(StatusCode::BAD_REQUEST, "unknown field")),
            }
        }
        let uid = Uuid::now_v7().to_string();
        let post = serde_json::to_vec(&json!({ "uid": uid, "title": title, "content": content }))?;
        let record = FutureRecord::to(&self.topic).key(&uid).payload(&post);
        let sent = self.producer.send(record, PATIENCE).await;
        sent.map_err(|(error, _)| error)?;
        let text = "We have received your post and it will be published sooner or later.";
        let mut answer = plain(StatusCode::CREATED, text);
        answer.headers_mut().insert("stagehost-uid", uid.parse()?);
        Ok(answer)
    }

    async fn get(&self, slug: &str) -> anyhow::Result<Answer> {
        let mut redis = self.redis.clone();
        let value: Option<Vec<u8>> = redis.get(format!("post:{slug}")).await?;
        let Some(value) = value else {
            return Ok(plain(StatusCode::NOT_FOUND, "not found"));
        };
        let mut answer = Response::new(Full::from(value));
        answer
            .headers_mut()
            .insert(CONTENT_TYPE, "application/json".parse()?);
        Ok(answer)
    }
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(text.into()));
    *answer.status_mut() = status;
    answer
}
