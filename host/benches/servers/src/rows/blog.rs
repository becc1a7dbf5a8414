//! The blog: its routes beside bare hyper, and posts until they can be read.

use std::fs;
use std::time::{Duration, Instant};

use redis::Commands;
use tokio::runtime::Builder;

use super::{PARTITIONS, ROUNDS};
use crate::bench::{Bench, Pace, Side};
use crate::compare::alternate;
use crate::program::{Program, Usage};
use crate::report::{Goal, Row};
use crate::web;

/// Ten million an hour.
const A_SECOND: u32 = 2_778;
const MINUTE: Duration = Duration::from_secs(60);
/// Before it is measured.
const WARM_UP: Duration = Duration::from_secs(15);
const SETTLE: Duration = Duration::from_secs(10);
/// A key that can be read.
const KEY: &str = "post:notes-on-a-log";
const MEGABYTE: f64 = 1_000_000.0;

/// The host's routes alone, without stages, against the native service's.
pub(crate) fn routes(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let script = bench.folder.path().join("post.lua");
    fs::write(&script, web::post_script())?;
    let mut redis = redis::Client::open(bench.redis.as_str())?.get_connection()?;
    let () = redis.set(
        KEY,
        "{\"title\":\"Notes on a log\",\"content\":\"It works.\"}",
    )?;
    let topic = bench.unique("posts");
    bench.log.create(&topic, PARTITIONS)?;
    let post = (
        "POST acknowledged, 64 connections",
        "/post",
        Some(script.as_path()),
    );
    let get = (
        "GET from Redis, 64 connections",
        "/post/notes-on-a-log",
        None,
    );
    for (work, path, script) in [post, get] {
        let run = |side: Side| {
            let mut program = bench.start(&side)?;
            let address = bench.address(&mut program, "HTTP")?;
            ready(bench, &mut program, &side)?;
            let url = format!("http://{address}{path}");
            let rate = web::requests_a_second(&url, script)?;
            let usage = program.usage()?;
            program.stop()?;
            // What was used before the load is little beside what the load used.
            let requests = rate * 5.0;
            let cpu_per_message = usage.cpu.div_f64(requests.max(1.0));
            anyhow::Ok(Pace {
                rate,
                cpu_per_message,
                usage,
            })
        };
        let native = bench.settings("", &topic);
        let compared = alternate(
            work,
            ROUNDS,
            || run(Side::Host(routes_alone(bench, &topic))),
            || run(Side::Native("http", native.clone())),
        )?;
        tell(compared.row("F6", work, Goal::AtLeast(0.8)));
    }
    bench.log.delete(&[&topic])
}

fn ready(bench: &Bench, program: &mut Program, side: &Side) -> anyhow::Result<()> {
    if let Side::Host(_) = side {
        let admin = bench.address(program, "admin")?;
        bench.until("readiness", program, || Ok(web::answers(&admin, "/readyz")))?;
    }
    Ok(())
}

/// How a blog is set up.
struct Setup {
    /// In words.
    name: &'static str,
    publisher: &'static str,
    partitions: i32,
    linger: &'static str,
}

/// The stages and partitions of `examples/blog`. The log's clients wait a little, for larger batches.
const EXAMPLE: Setup = Setup {
    name: "8 partitions, the example's stages, linger 5 ms",
    publisher: "publisher",
    partitions: PARTITIONS,
    linger: "5",
};
/// Every batch of a partition costs a transaction, so there are few partitions, and one statement for all posts of a batch.
const TUNED: Setup = Setup {
    name: "2 partitions, the publisher as a batch stage, linger 1 ms",
    publisher: "test-publisher-batch",
    partitions: 2,
    linger: "1",
};

/// Ten million posts an hour through the whole blog, and the memory that it takes.
pub(crate) fn end_to_end(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let (mut idle, mut peak) = (0, 0);
    for setup in [TUNED, EXAMPLE] {
        let (resting, usage, seen) = ten_million_an_hour(bench, &setup)?;
        idle = idle.max(resting.resident);
        peak = peak.max(usage.peak);
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        let figures = format!(
            "{} posts, the slowest {:.0} ms",
            seen.posts,
            millis(seen.max)
        );
        let rows = [
            ("p50", 20.0, millis(seen.p50), "ms"),
            ("p99", 100.0, millis(seen.p99), "ms"),
            ("errors", 0.0, seen.errors as f64, ""),
        ];
        for (what, goal, measured, unit) in rows {
            tell(Row {
                id: "F7",
                work: format!(
                    "{A_SECOND} posts a second for 60 s, from POST until GET answers, {}, {what}",
                    setup.name
                ),
                goal: Goal::AtMost(goal),
                measured,
                unit,
                figures: figures.clone(),
            });
        }
    }
    let memory = |work: &str, goal, bytes: u64| Row {
        id: "F11",
        work: format!("memory of the host, {work}"),
        goal,
        measured: bytes as f64 / MEGABYTE,
        unit: "MB",
        figures: "resident".into(),
    };
    tell(memory("blog idle", Goal::Reported, idle));
    tell(memory("blog under F7, at most", Goal::AtMost(200.0), peak));
    Ok(())
}

/// What the host used when nothing had been asked of it, what it used in the end, and what was seen of it.
fn ten_million_an_hour(
    bench: &Bench,
    setup: &Setup,
) -> anyhow::Result<(Usage, Usage, web::EndToEnd)> {
    afresh(bench, setup.partitions)?;
    let database = bench.database()?;
    let pipeline = blog(bench, &services(bench, &database, setup.linger), setup);
    let mut program = bench.start(&Side::Host(pipeline))?;
    let address = bench.address(&mut program, "HTTP")?;
    let admin = bench.address(&mut program, "admin")?;
    bench.until("readiness", &mut program, || {
        Ok(web::answers(&admin, "/readyz"))
    })?;
    std::thread::sleep(SETTLE);
    let idle = program.usage()?;
    // One thread is enough for the load, and leaves the most to what is measured.
    let load = Builder::new_current_thread().enable_all().build()?;
    load.block_on(web::end_to_end(&address, A_SECOND, WARM_UP))?;
    let seen = load.block_on(web::end_to_end(&address, A_SECOND, MINUTE))?;
    let usage = program.usage()?;
    program.stop()?;
    bench.drop_database(&database)?;
    Ok((idle, usage, seen))
}

/// The blog on what is embedded, against the blog on real services.
pub(crate) fn embedded(bench: &Bench, tell: &mut dyn FnMut(Row)) -> anyhow::Result<()> {
    let script = bench.folder.path().join("post.lua");
    fs::write(&script, web::post_script())?;
    let run = |services: String| {
        let mut program = bench.start(&Side::Host(blog(bench, &services, &EXAMPLE)))?;
        let address = bench.address(&mut program, "HTTP")?;
        let admin = bench.address(&mut program, "admin")?;
        bench.until("readiness", &mut program, || {
            Ok(web::answers(&admin, "/readyz"))
        })?;
        let since = Instant::now();
        let rate = web::requests_a_second(&format!("http://{address}/post"), Some(&script))?;
        let posts = rate * since.elapsed().as_secs_f64();
        bench.until("the posts to be through", &mut program, || {
            web::is_through(&admin, "cache-manager")
        })?;
        let through = posts / since.elapsed().as_secs_f64();
        let usage = program.usage()?;
        program.stop()?;
        let pace = Pace {
            rate: through,
            cpu_per_message: usage.cpu.div_f64(posts.max(1.0)),
            usage,
        };
        anyhow::Ok(pace)
    };
    afresh(bench, EXAMPLE.partitions)?;
    let database = bench.database()?;
    let compared = alternate(
        "the blog, posts through both stages, 64 connections",
        1,
        || run(embedded_services()),
        || run(services(bench, &database, EXAMPLE.linger)),
    )?;
    bench.drop_database(&database)?;
    tell(compared.row(
        "F13",
        "blog on what is embedded, 64 connections, against the same on real services",
        Goal::Reported,
    ));
    Ok(())
}

/// The stages' topic and Redis hold nothing of other rows.
fn afresh(bench: &Bench, partitions: i32) -> anyhow::Result<()> {
    let mut redis = redis::Client::open(bench.redis.as_str())?.get_connection()?;
    let () = redis::cmd("FLUSHALL").query(&mut redis)?;
    bench.log.make_anew(super::publisher::OUTPUT, partitions)
}

fn routes_alone(bench: &Bench, topic: &str) -> String {
    let (brokers, redis) = (&bench.log.brokers, &bench.redis);
    format!(
        r#"
        name = "bench"
        [kafka]
        brokers = "{brokers}"
        [topics."{topic}"]
        partitions = {PARTITIONS}
        [redis.cache]
        url = "{redis}"
        [http]
        listen = "127.0.0.1:0"
        [[http.routes]]
        path = "/post"
        method = "POST"
        produce = {{ topic = "{topic}", key = "uid", fields = ["title", "content"], generate = ["uid"] }}
        status = 201
        body = "We have received your post and it will be published sooner or later."
        [[http.routes]]
        path = "/post/{{slug}}"
        method = "GET"
        read = {{ redis = "cache", key = "post:{{slug}}" }}
        [admin]
        listen = "127.0.0.1:0"
        "#
    )
}

/// Lines of the pipeline that say where its servers are.
fn services(bench: &Bench, database: &str, linger: &str) -> String {
    format!(
        "[kafka]\nbrokers = \"{}\"\nproperties = {{ \"linger.ms\" = \"{linger}\" }}\n[sql.posts]\nurl = \"{database}\"\n[redis.cache]\nurl = \"{}\"\n",
        bench.log.brokers, bench.redis
    )
}

fn embedded_services() -> String {
    let migrations = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../examples/blog/migrations"
    );
    format!(
        "[kafka]\nbrokers = \"embedded\"\n[sql.posts]\nurl = \"sqlite:data/blog.db\"\n\
         migrations = \"{migrations}\"\n[redis.cache]\nurl = \"embedded:data/cache\"\n"
    )
}

/// The example's pipeline on what is embedded.
pub(super) fn embedded_blog(bench: &Bench) -> String {
    blog(bench, &embedded_services(), &EXAMPLE)
}

/// The blog's pipeline with groups of its own.
fn blog(bench: &Bench, services: &str, setup: &Setup) -> String {
    let (publisher, cacher) = (bench.stage(setup.publisher), bench.stage("cache-manager"));
    let partitions = setup.partitions;
    let (first, second) = (bench.unique("group"), bench.unique("group"));
    let input = bench.unique("newPosts");
    format!(
        r#"
        name = "blog"
        {services}
        [topics."{input}"]
        partitions = {partitions}
        [topics."app.publishedPosts"]
        partitions = {partitions}
        [stages.publisher]
        component = "{publisher}"
        input = ["{input}"]
        group = "{first}"
        output = ["app.publishedPosts"]
        sql = ["posts"]
        [stages.cache-manager]
        component = "{cacher}"
        input = ["app.publishedPosts"]
        group = "{second}"
        redis = {{ cache = {{ prefix = "post:" }} }}
        [http]
        listen = "127.0.0.1:0"
        [[http.routes]]
        path = "/post"
        method = "POST"
        produce = {{ topic = "{input}", key = "uid", fields = ["title", "content"], generate = ["uid"] }}
        status = 201
        [[http.routes]]
        path = "/post/uid/{{uid}}"
        method = "GET"
        read = {{ redis = "cache", key = "post:uid:{{uid}}" }}
        [admin]
        listen = "127.0.0.1:0"
        "#
    )
}
