//! What no bytes may do to the readers of Stagehost: a property a target, checked for any bytes.
//!
//! `make test` checks them for the inputs in `corpus/` and some made of those; `make fuzz` has libFuzzer look for others,
//! led by the code that they reach. An input that broke a property once stays in the corpus under a name that says how.

mod broker;
mod http_body;
mod memory;
mod pipeline_file;
mod progress_row;
mod read_template;
mod record_id;

/// A reader, and what must hold whatever it reads.
#[derive(Debug)]
pub struct Target {
    /// The folder of its corpus.
    pub name: &'static str,
    /// Panics where the property does not hold.
    pub check: fn(&[u8]),
}

impl Target {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self {
            name: "broker",
            check: broker::check,
        },
        Self {
            name: "http-body",
            check: http_body::check,
        },
        Self {
            name: "pipeline-file",
            check: pipeline_file::check,
        },
        Self {
            name: "progress-row",
            check: progress_row::check,
        },
        Self {
            name: "read-template",
            check: read_template::check,
        },
        Self {
            name: "record-id",
            check: record_id::check,
        },
    ];

    /// The one of this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        const ALL: &[Target] = &Target::ALL;
        ALL.iter().find(|target| target.name == name)
    }
}
