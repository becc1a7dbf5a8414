//! `wasi:logging` and the guest's stdout and stderr, into the host's log with the place of the record at hand.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;
use tracing::{Level, debug, error, info, trace, warn};
use wasmtime::component::{HasData, Linker};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};

/// Bytes of one line in the log; what is longer is cut.
const MAX_LINE: usize = 8 << 10;
/// Lines of stderr that are kept of a call, to say what a guest that trapped had to say.
const MAX_LAST_WORDS: usize = 3;

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

/// One instance's way into the log. Clones share the place.
#[derive(Clone)]
pub struct LogCtx {
    stage: Arc<str>,
    place: Arc<Mutex<Option<Place>>>,
    last_words: Arc<Mutex<Vec<String>>>,
}

impl LogCtx {
    /// For an instance of `stage`.
    pub fn new(stage: Arc<str>) -> Self {
        Self {
            stage,
            place: Arc::default(),
            last_words: Arc::default(),
        }
    }

    /// The first lines of stderr since the place was set: a panic's, when there was one.
    pub fn take_last_words(&self) -> String {
        let mut words = self
            .last_words
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *words).join(" ")
    }

    fn keep_last_words(&self, line: &str) {
        let mut words = self
            .last_words
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Rust's hint is of no use where there is no environment.
        if words.len() < MAX_LAST_WORDS && !line.starts_with("note: ") {
            words.push(line.to_owned());
        }
    }

    /// What follows belongs to this record.
    pub fn set_place(&self, place: Place) {
        self.take_last_words();
        *self.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(place);
    }

    /// A stream whose lines go into the log: stdout at `INFO`, stderr at `WARN`.
    pub fn stream(&self, level: Level) -> LogStream {
        LogStream {
            log: self.clone(),
            level,
            line: Arc::default(),
        }
    }

    fn write(&self, level: Level, context: &str, message: &str) {
        let message = clip(message);
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let stage = &*self.stage;
        macro_rules! event {
            ($log:ident) => {
                match &*place {
                    Some(p) => $log!(target: "guest", stage, topic = &*p.topic, partition = p.partition,
                        offset = p.offset, context, "{message}"),
                    None => $log!(target: "guest", stage, context, "{message}"),
                }
            };
        }
        match level {
            Level::TRACE => event!(trace),
            Level::DEBUG => event!(debug),
            Level::INFO => event!(info),
            Level::WARN => event!(warn),
            Level::ERROR => event!(error),
        }
    }
}

fn clip(message: &str) -> &str {
    if message.len() <= MAX_LINE {
        return message;
    }
    &message[..message.floor_char_boundary(MAX_LINE)]
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
        self.write(level, clip(&context), &message);
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

/// A guest's stdout or stderr: each line becomes a message of the log.
#[derive(Clone)]
pub struct LogStream {
    log: LogCtx,
    level: Level,
    line: Arc<Mutex<Vec<u8>>>,
}

impl LogStream {
    fn take_in(&self, bytes: &[u8]) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if byte != b'\n' {
                line.push(byte);
            }
            if byte == b'\n' || line.len() == MAX_LINE {
                self.take_line(&String::from_utf8_lossy(&line));
                line.clear();
            }
        }
    }
}

impl LogStream {
    fn take_line(&self, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        if self.level == Level::WARN {
            self.log.keep_last_words(line);
        }
        self.log.write(self.level, "", line);
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
