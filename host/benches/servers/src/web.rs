//! Load over HTTP: `wrk` for how many requests a second, a client of our own for how long a post takes to be readable.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::header::CONTENT_TYPE;
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

const CONNECTIONS: usize = 64;
/// What one measurement of `wrk` takes.
const DURATION: &str = "5s";
/// A post of the blog, as a browser sends it.
pub(crate) const FORM: &str =
    "title=Notes+on+a+log&content=It+works%2C+and+it+is+fast+enough+to+be+used.";
/// Posts that are waited for at a time; a service that is slower than the load has errors.
const MAX_OPEN: usize = 20_000;
/// How long a post may take to be readable before it counts as an error.
const PATIENCE: Duration = Duration::from_secs(10);
/// Errors that are shown.
const SHOWN_ERRORS: u64 = 5;
/// After the answer it is asked for first when this part of the time has passed that posts take on average at the moment. Then
/// the time since the post is made longer by a part each time. So the host is not kept busy with answering that a post is not
/// there yet. What is measured is never too short; a post that is faster than that part of the average counts as that long.
const ASK: f64 = 0.75;
const LONGER: f64 = 1.15;
/// What posts take at first.
const USUAL: Duration = Duration::from_millis(20);
/// Not sooner, and not in shorter steps.
const SOONEST: Duration = Duration::from_millis(1);
/// How much a post counts for what they take at the moment.
const WEIGHT: f64 = 1.0 / 64.0;

/// Requests a second that `wrk` gets answered; fails if any was answered with an error.
pub(crate) fn requests_a_second(url: &str, script: Option<&Path>) -> anyhow::Result<f64> {
    let mut wrk = Command::new("wrk");
    let connections = CONNECTIONS.to_string();
    wrk.args([
        "--threads",
        "1",
        "--connections",
        &connections,
        "--duration",
        DURATION,
    ]);
    if let Some(script) = script {
        wrk.arg("--script").arg(script);
    }
    let output = wrk.arg(url).output().context("cannot run wrk")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "wrk failed: {text}");
    let clean = !text.contains("Non-2xx") && !text.contains("Socket errors");
    ensure!(clean, "requests failed:\n{text}");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    line.and_then(|rate| rate.trim().parse().ok())
        .context("what wrk printed")
}

/// `wrk`'s words for a post.
pub(crate) fn post_script() -> String {
    format!(
        "wrk.method = \"POST\"\nwrk.body = \"{FORM}\"\n\
         wrk.headers[\"Content-Type\"] = \"application/x-www-form-urlencoded\"\n"
    )
}

/// How long posts took until they could be read.
pub(crate) struct EndToEnd {
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    pub(crate) max: Duration,
    pub(crate) posts: usize,
    pub(crate) errors: u64,
}

struct Visitor {
    client: Client<HttpConnector, Full<Bytes>>,
    /// A request that finds none free waits, and that counts.
    connections: Semaphore,
    address: String,
    errors: AtomicU64,
    /// How long after their answers posts can be read at the moment.
    usual: Mutex<Duration>,
}

/// Sends posts at a steady rate, whatever the answers take, and reads each until it is there.
pub(crate) async fn end_to_end(
    address: &str,
    a_second: u32,
    time: Duration,
) -> anyhow::Result<EndToEnd> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    let visitor = Arc::new(Visitor {
        client: Client::builder(TokioExecutor::new()).build(connector),
        connections: Semaphore::new(CONNECTIONS),
        address: address.to_owned(),
        errors: AtomicU64::new(0),
        usual: Mutex::new(USUAL),
    });
    let (sender, mut times) = mpsc::unbounded_channel();
    let open = Arc::new(Semaphore::new(MAX_OPEN));
    let mut tick = interval(Duration::from_secs(1) / a_second);
    // Posts that are late are sent late, and not left out.
    tick.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let count = (f64::from(a_second) * time.as_secs_f64()) as usize;
    for _ in 0..count {
        let due = tick.tick().await;
        let permit = open.clone().acquire_owned().await?;
        let (visitor, sender) = (visitor.clone(), sender.clone());
        tokio::spawn(async move {
            match timeout(PATIENCE, visitor.post_and_read()).await {
                Ok(Ok(())) => drop(sender.send(due.elapsed())),
                late_or_failed => {
                    if visitor.errors.fetch_add(1, Ordering::Relaxed) < SHOWN_ERRORS {
                        match late_or_failed {
                            Ok(Err(why)) => eprintln!("  a post failed: {why:#}"),
                            _ => eprintln!("  a post could not be read after {PATIENCE:?}"),
                        }
                    }
                }
            }
            drop(permit);
        });
    }
    drop(sender);
    let mut all = Vec::with_capacity(count);
    while let Some(time) = times.recv().await {
        all.push(time);
    }
    ensure!(!all.is_empty(), "no post could be read");
    all.sort();
    let at = |part: f64| all[((all.len() - 1) as f64 * part) as usize];
    Ok(EndToEnd {
        p50: at(0.5),
        p99: at(0.99),
        max: at(1.0),
        posts: all.len(),
        errors: visitor.errors.load(Ordering::Relaxed),
    })
}

impl Visitor {
    async fn post_and_read(&self) -> anyhow::Result<()> {
        let post = Request::builder()
            .method(Method::POST)
            .uri(format!("http://{}/post", self.address))
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
            .body(Full::from(FORM))?;
        let (status, uid) = self.ask(post).await?;
        ensure!(
            status == StatusCode::CREATED,
            "a post was answered {status}"
        );
        let url = format!("http://{}/post/uid/{}", self.address, uid.context("a uid")?);
        let (posted, mut wait) = (Instant::now(), self.usual().mul_f64(ASK).max(SOONEST));
        loop {
            sleep(wait.saturating_sub(posted.elapsed())).await;
            wait = wait.mul_f64(LONGER).max(wait + SOONEST);
            let get = Request::get(&url).body(Full::default())?;
            match self.ask(get).await? {
                (StatusCode::OK, _) => {
                    let mut usual = self.usual();
                    *usual = usual.mul_f64(1.0 - WEIGHT) + posted.elapsed().mul_f64(WEIGHT);
                    return Ok(());
                }
                (StatusCode::NOT_FOUND, _) => {}
                (other, _) => bail!("a read was answered {other}"),
            }
        }
    }

    fn usual(&self) -> MutexGuard<'_, Duration> {
        self.usual.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer's status, and the uid that it names.
    async fn ask(
        &self,
        request: Request<Full<Bytes>>,
    ) -> anyhow::Result<(StatusCode, Option<String>)> {
        let _connection = self.connections.acquire().await?;
        let answer = self.client.request(request).await?;
        let uid = answer
            .headers()
            .get("stagehost-uid")
            .map(|uid| uid.to_str());
        let uid = uid.transpose()?.map(str::to_owned);
        let status = answer.status();
        // So that the connection may be used again.
        answer.into_body().collect().await?;
        Ok((status, uid))
    }
}

/// Whether a GET is answered with 200.
pub(crate) fn answers(address: &str, path: &str) -> bool {
    get(address, path).is_some_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// Whether a host's stage has done as many messages as its routes took posts, by the host's own metrics.
pub(crate) fn is_through(admin: &str, stage: &str) -> anyhow::Result<bool> {
    let metrics = get(admin, "/metrics").context("metrics")?;
    let count = |name: &str, label: &str| -> f64 {
        let lines = metrics
            .lines()
            .filter(|line| line.starts_with(name) && line.contains(label));
        let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.sum()
    };
    let posts = count("stagehost_http_requests_total{", "status=\"201\"");
    let stage = format!("stage=\"{stage}\",outcome=\"done\"");
    Ok(count("stagehost_messages_total{", &stage) >= posts)
}

/// The whole answer, headers included.
fn get(address: &str, path: &str) -> Option<String> {
    use std::io::{Read, Write};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n"
    )
    .ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    Some(answer)
}
