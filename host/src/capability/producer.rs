//! `stagehost:stage/producer`: what a stage emits, held until its message is done.

use std::collections::BTreeSet;
use std::sync::Arc;

use wasmtime::component::{HasData, Linker};

use crate::record::{Header, Outgoing};

/// Records that one invocation may emit.
const MAX_HELD_RECORDS: usize = 100_000;
/// What names of headers begin with that are the host's.
const HOSTS: &str = "stagehost-";
/// Bytes that one invocation may emit.
pub(crate) const MAX_HELD_BYTES: usize = 64 << 20;

mod bindings {
    wasmtime::component::bindgen!({
        path: "../wit",
        inline: "
            package stagehost:host-producer;
            world producer { import stagehost:stage/producer@0.1.0; }
        ",
        imports: { default: trappable },
    });
}
use bindings::stagehost::stage::producer as wit;
use bindings::stagehost::stage::types;

/// The topics that one stage may produce to, and how large a record may be.
#[derive(Debug)]
pub struct ProducerGrant {
    topics: BTreeSet<Arc<str>>,
    max_output: usize,
}

impl ProducerGrant {
    /// `max_output` is in bytes of key, value and headers together.
    pub fn new(topics: &[String], max_output: usize) -> Self {
        Self {
            topics: topics.iter().map(|t| Arc::from(t.as_str())).collect(),
            max_output,
        }
    }
}

/// One instance's outputs.
pub struct ProducerCtx {
    grant: Arc<ProducerGrant>,
    held: Vec<Outgoing>,
    held_bytes: usize,
    denied: Option<String>,
}

impl ProducerCtx {
    /// Nothing emitted yet.
    pub fn new(grant: Arc<ProducerGrant>) -> Self {
        Self {
            grant,
            held: Vec::new(),
            held_bytes: 0,
            denied: None,
        }
    }

    /// What was emitted since last asked.
    pub fn take_outputs(&mut self) -> Vec<Outgoing> {
        self.held_bytes = 0;
        std::mem::take(&mut self.held)
    }

    /// The first refusal for want of a grant since last asked.
    pub fn take_denied(&mut self) -> Option<String> {
        self.denied.take()
    }

    fn send(&mut self, outgoing: wit::Outgoing) -> Result<(), wit::Error> {
        let Some(topic) = self.grant.topics.get(outgoing.topic.as_str()).cloned() else {
            let why = format!("topic `{}` is not in the stage's `output`", outgoing.topic);
            self.denied.get_or_insert_with(|| why.clone());
            return Err(wit::Error::Denied(why));
        };
        // Those of a message may be passed on with the others: they speak of that one, and not of this.
        let headers = outgoing.headers.into_iter();
        let headers = headers.filter(|h| !h.name.starts_with(HOSTS));
        let output = Outgoing {
            topic,
            partition: None,
            timestamp: None,
            key: outgoing.key,
            value: outgoing.value,
            headers: headers
                .map(|h| Header {
                    name: h.name,
                    value: h.value,
                })
                .collect(),
        };
        let size = output.size();
        if size > self.grant.max_output {
            return Err(wit::Error::TooLarge(self.grant.max_output as u64));
        }
        if self.held.len() == MAX_HELD_RECORDS || self.held_bytes + size > MAX_HELD_BYTES {
            return Err(wit::Error::Other(format!(
                "one invocation may emit {MAX_HELD_RECORDS} records of {MAX_HELD_BYTES} bytes in all"
            )));
        }
        self.held_bytes += size;
        self.held.push(output);
        Ok(())
    }
}

impl wit::Host for ProducerCtx {
    fn send(&mut self, outgoing: wit::Outgoing) -> wasmtime::Result<Result<(), wit::Error>> {
        Ok(ProducerCtx::send(self, outgoing))
    }
}

impl types::Host for ProducerCtx {}

/// Adds the interface to a linker.
pub fn add_to_linker<T: Send + 'static>(
    linker: &mut Linker<T>,
    ctx: fn(&mut T) -> &mut ProducerCtx,
) -> wasmtime::Result<()> {
    wit::add_to_linker::<T, HasProducer>(linker, ctx)
}

struct HasProducer;

impl HasData for HasProducer {
    type Data<'a> = &'a mut ProducerCtx;
}
