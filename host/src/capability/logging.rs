//! `wasi:logging` and the guest's stdout and stderr, into the host's log with the place of the record at hand.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use tracing::{Level, event};
use wasmtime::component::{HasData, Linker};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};

use crate::log_output;

/// Bytes of one line in the log; what is longer is cut.
const MAX_LINE: usize = 8 << 10;
/// Lines of one call that go into the log, and their bytes. What the log takes of a stage is bounded too; this leaves some
/// of it for its other messages.
const MAX_CALL_LINES: usize = 500;
const MAX_CALL_BYTES: usize = 128 << 10;
/// Lines of stderr that are kept of a call, to say what a guest that trapped had to say: a panic begins with what happened, and an
/// exception's traceback ends with it.
const MAX_FIRST_WORDS: usize = 3;
const MAX_LAST_WORDS: usize = 3;
/// Bytes of each, so that all of them go into a fault's words.
const MAX_WORDS_LINE: usize = 1 << 10;

mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "
            package stagehost:host-logging;
            world logging { import wasi:logging/logging@0.1.0-draft; }
        ",
        imports: { default: trappable },
    });
}
use bindings::wasi::logging::logging as wit;

/// Where the record at hand comes from.
#[derive(Clone, Debug)]
pub struct Place {
    /// The record's topic.
    pub topic: Arc<str>,
    /// Its partition.
    pub partition: i32,
    /// Its offset; in a batch, the first one's.
    pub offset: i64,
}

/// One instance's way into the log. Clones share the call.
#[derive(Clone)]
pub struct LogCtx {
    stage: Arc<str>,
    call: Arc<Mutex<Call>>,
}

/// The first lines of stderr and the last.
#[derive(Default)]
struct Words {
    first: Vec<String>,
    last: VecDeque<String>,
    /// There were others between them.
    is_cut: bool,
}

/// The call at hand, and what the guest has written in it.
#[derive(Default)]
struct Call {
    place: Option<Place>,
    words: Words,
    lines: usize,
    bytes: usize,
    /// What has no end yet of a line of stdout and of stderr.
    begun: [Vec<u8>; 2],
}

impl LogCtx {
    /// For an instance of `stage`.
    pub fn new(stage: Arc<str>) -> Self {
        Self {
            stage,
            call: Arc::default(),
        }
    }

    /// What follows belongs to this record.
    pub fn set_place(&self, place: Place) {
        *self.call() = Call {
            place: Some(place),
            ..Call::default()
        };
    }

    /// The record of the call at hand, or of the one before.
    pub fn place(&self) -> Option<Place> {
        self.call().place.clone()
    }

    /// The call has ended: what it left without a line's end is a line.
    pub fn end_call(&self) {
        let mut call = self.call();
        if call.begun.iter().all(Vec::is_empty) {
            return;
        }
        let [out, err] = std::mem::take(&mut call.begun);
        drop(call);
        self.write_line(Stream::Out, &out);
        self.write_line(Stream::Err, &err);
    }

    /// The first and the last lines of stderr since the place was set: a panic's, or an exception's, when there was one.
    pub fn take_last_words(&self) -> String {
        let Words {
            mut first,
            last,
            is_cut,
        } = std::mem::take(&mut self.call().words);
        first.extend(is_cut.then(|| "…".to_owned()));
        first.extend(last);
        first.join(" ")
    }

    /// A stream whose lines go into the log: stdout at `INFO`, stderr at `WARN`.
    pub fn stream(&self, stream: Stream) -> LogStream {
        LogStream {
            log: self.clone(),
            stream,
        }
    }

    fn call(&self) -> MutexGuard<'_, Call> {
        self.call.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_line(&self, stream: Stream, line: &[u8]) {
        let line = String::from_utf8_lossy(line);
        if line.trim().is_empty() {
            return;
        }
        let level = match stream {
            Stream::Out => Level::INFO,
            Stream::Err => {
                self.call().words.keep(&line);
                Level::WARN
            }
        };
        self.write(level, "", &line);
    }

    fn write(&self, level: Level, context: &str, message: &str) {
        let (context, message) = (clip(context, MAX_LINE), clip(message, MAX_LINE));
        let mut call = self.call();
        macro_rules! write {
            ($level:ident) => {
                if !tracing::enabled!(target: "guest", Level::$level) {
                } else if !call.admits(context.len() + message.len()) {
                    drop(call);
                    log_output::dropped(&self.stage, 1);
                } else {
                    let stage = &*self.stage;
                    match &call.place {
                        Some(p) => event!(target: "guest", Level::$level, stage, topic = &*p.topic,
                            partition = p.partition, offset = p.offset, context, "{message}"),
                        None => event!(target: "guest", Level::$level, stage, context, "{message}"),
                    }
                }
            };
        }
        match level {
            Level::TRACE => write!(TRACE),
            Level::DEBUG => write!(DEBUG),
            Level::INFO => write!(INFO),
            Level::WARN => write!(WARN),
            Level::ERROR => write!(ERROR),
        }
    }
}

impl Words {
    fn keep(&mut self, line: &str) {
        // Rust's hint is of no use where there is no environment.
        if line.starts_with("note: run with `RUST_BACKTRACE") {
            return;
        }
        let line = clip(line.trim(), MAX_WORDS_LINE).to_owned();
        if self.first.len() < MAX_FIRST_WORDS {
            self.first.push(line);
            return;
        }
        if self.last.len() == MAX_LAST_WORDS {
            self.last.pop_front();
            self.is_cut = true;
        }
        self.last.push_back(line);
    }
}

impl Call {
    fn admits(&mut self, bytes: usize) -> bool {
        let admits = self.lines < MAX_CALL_LINES && self.bytes + bytes <= MAX_CALL_BYTES;
        if admits {
            self.lines += 1;
            self.bytes += bytes;
        }
        admits
    }
}

fn clip(message: &str, most: usize) -> &str {
    &message[..message.floor_char_boundary(most)]
}

impl wit::Host for LogCtx {
    fn log(&mut self, level: wit::Level, context: String, message: String) -> wasmtime::Result<()> {
        let level = match level {
            wit::Level::Trace => Level::TRACE,
            wit::Level::Debug => Level::DEBUG,
            wit::Level::Info => Level::INFO,
            wit::Level::Warn => Level::WARN,
            wit::Level::Error | wit::Level::Critical => Level::ERROR,
        };
        self.write(level, &context, &message);
        Ok(())
    }
}

/// Adds the interface to a linker.
pub fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    ctx: fn(&mut T) -> &mut LogCtx,
) -> wasmtime::Result<()> {
    wit::add_to_linker::<T, HasLog>(linker, ctx)
}

struct HasLog;

impl HasData for HasLog {
    type Data<'a> = &'a mut LogCtx;
}

/// Which of a guest's two streams.
#[derive(Clone, Copy)]
pub enum Stream {
    /// Its stdout.
    Out,
    /// Its stderr.
    Err,
}

/// A guest's stdout or stderr: each line becomes a message of the log.
#[derive(Clone)]
pub struct LogStream {
    log: LogCtx,
    stream: Stream,
}

impl LogStream {
    fn take_in(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let mut call = self.log.call();
            let line = &mut call.begun[self.stream as usize];
            let room = bytes.len().min(MAX_LINE - line.len());
            let end = bytes[..room].iter().position(|byte| *byte == b'\n');
            line.extend_from_slice(&bytes[..end.unwrap_or(room)]);
            bytes = &bytes[end.map_or(room, |end| end + 1)..];
            if end.is_none() && line.len() < MAX_LINE {
                return;
            }
            let line = std::mem::take(line);
            drop(call);
            self.log.write_line(self.stream, &line);
        }
    }
}

impl IsTerminal for LogStream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for LogStream {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }
}

impl AsyncWrite for LogStream {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.take_in(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(lines: &[&str]) -> String {
        let log = LogCtx::new("stage".into());
        for line in lines {
            log.write_line(Stream::Err, line.as_bytes());
        }
        log.take_last_words()
    }

    #[test]
    fn the_beginning_and_the_end_of_stderr_are_kept() {
        assert_eq!(words(&[]), "");
        assert_eq!(words(&["a", "  b"]), "a b");
        assert_eq!(words(&["a", "b", "c", "d", "e", "f"]), "a b c d e f");
        let traceback = ["Traceback", "1", "2", "3", "4", "5", "ValueError: why"];
        assert_eq!(words(&traceback), "Traceback 1 2 … 4 5 ValueError: why");
        let hint = "note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace";
        assert_eq!(words(&["panicked", "why", hint]), "panicked why");
        let long = "ü".repeat(MAX_LINE);
        let kept = words(&[&long, &long, &long, &long, &long, "end"]);
        assert!(kept.len() < 6 << 10 && kept.ends_with(" end"));
    }
}
