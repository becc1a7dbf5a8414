//! What a component file is, what it imports and exports: read from its sections, without compiling it.

use wasmparser::{Encoding, Parser, Payload, Validator, WasmFeatures};

/// Bytes of a component file at most.
pub const MAX_COMPONENT_BYTES: u64 = 64 << 20;

/// The version of the package `stagehost:stage` that this host has.
pub const STAGE_VERSION: &str = "0.1.0";

const STAGE_PACKAGE: &str = "stagehost:stage/";

/// Interfaces of WASI 0.2 that are linked for every component, empty where they would reach outside.
const WASI: &[&str] = &[
    "wasi:cli/environment",
    "wasi:cli/exit",
    "wasi:cli/stderr",
    "wasi:cli/stdin",
    "wasi:cli/stdout",
    "wasi:cli/terminal-input",
    "wasi:cli/terminal-output",
    "wasi:cli/terminal-stderr",
    "wasi:cli/terminal-stdin",
    "wasi:cli/terminal-stdout",
    "wasi:clocks/monotonic-clock",
    "wasi:clocks/wall-clock",
    "wasi:filesystem/preopens",
    "wasi:filesystem/types",
    "wasi:io/error",
    "wasi:io/poll",
    "wasi:io/streams",
    "wasi:random/insecure",
    "wasi:random/insecure-seed",
    "wasi:random/random",
    "wasi:sockets/instance-network",
    "wasi:sockets/ip-name-lookup",
    "wasi:sockets/network",
    "wasi:sockets/tcp",
    "wasi:sockets/tcp-create-socket",
    "wasi:sockets/udp",
    "wasi:sockets/udp-create-socket",
];

/// Interfaces that are linked for every component, version and all.
const ALWAYS: &[&str] = &[
    "wasi:config/store@0.2.0-rc.1",
    "wasi:logging/logging@0.1.0-draft",
];

/// Which of the two worlds a component has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum World {
    /// It exports `handler`: called once a message.
    Handler,
    /// It exports `batch-handler`: called once a batch.
    BatchHandler,
}

/// What a component says of itself.
#[derive(Debug, PartialEq, Eq)]
pub struct Inspection {
    /// Its world.
    pub world: World,
    /// What it imports, by name, in its own order.
    pub imports: Vec<String>,
}

/// Why a file is no stage.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InspectError {
    /// Larger than [`MAX_COMPONENT_BYTES`].
    #[error("it is larger than 64 MiB")]
    TooLarge,
    /// Not WebAssembly.
    #[error("it is not WebAssembly")]
    NotWasm,
    /// The text format.
    #[error("it is WebAssembly's text format")]
    Text,
    /// WebAssembly, but cut off or invalid.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// A core module.
    #[error("it is a core module, not a component")]
    CoreModule,
    /// Neither handler is exported.
    #[error("it exports neither `handler` nor `batch-handler`")]
    NoHandler {
        /// What it exports instead.
        exports: Vec<String>,
    },
    /// Both handlers are exported.
    #[error("it exports both `handler` and `batch-handler`")]
    BothHandlers,
}

/// What a pipeline has to grant before a component may import an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Nothing: it is there for everybody.
    Nothing,
    /// A SQL store.
    Sql,
    /// A Redis store.
    Redis,
    /// A topic to produce to.
    Output,
    /// This host has the interface in [`STAGE_VERSION`] alone.
    OtherVersion,
    /// This host does not have it.
    Unknown,
}

/// Reads a component.
pub fn inspect(bytes: &[u8]) -> Result<Inspection, InspectError> {
    if bytes.len() as u64 > MAX_COMPONENT_BYTES {
        return Err(InspectError::TooLarge);
    }
    match encoding(bytes)? {
        Encoding::Module => return Err(InspectError::CoreModule),
        Encoding::Component => {}
    }
    Validator::new_with_features(WasmFeatures::all())
        .validate_all(bytes)
        .map_err(damaged)?;
    let (imports, exports) = names(bytes).map_err(damaged)?;
    let exported = |interface: &str| {
        let name = format!("{STAGE_PACKAGE}{interface}@{STAGE_VERSION}");
        exports.contains(&name)
    };
    let world = match (exported("handler"), exported("batch-handler")) {
        (true, false) => World::Handler,
        (false, true) => World::BatchHandler,
        (true, true) => return Err(InspectError::BothHandlers),
        (false, false) => return Err(InspectError::NoHandler { exports }),
    };
    Ok(Inspection { world, imports })
}

/// What a pipeline has to grant for this import.
pub fn needs(import: &str) -> Needs {
    if ALWAYS.contains(&import) {
        return Needs::Nothing;
    }
    let (interface, version) = import.split_once('@').unwrap_or((import, ""));
    if WASI.contains(&interface) && version.starts_with("0.2.") {
        return Needs::Nothing;
    }
    let needs = match interface.strip_prefix(STAGE_PACKAGE) {
        Some("types") => Needs::Nothing,
        Some("sql") => Needs::Sql,
        Some("redis") => Needs::Redis,
        Some("producer") => Needs::Output,
        _ => return Needs::Unknown,
    };
    if version == STAGE_VERSION {
        needs
    } else {
        Needs::OtherVersion
    }
}

fn encoding(bytes: &[u8]) -> Result<Encoding, InspectError> {
    if !bytes.starts_with(b"\0asm") {
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(64)]);
        let text = ["(component", "(module"]
            .iter()
            .any(|head| start.trim_start().starts_with(head));
        return Err(if text {
            InspectError::Text
        } else {
            InspectError::NotWasm
        });
    }
    match Parser::new(0).parse_all(bytes).next() {
        Some(Ok(Payload::Version { encoding, .. })) => Ok(encoding),
        Some(Err(error)) => Err(damaged(error)),
        _ => Err(InspectError::NotWasm),
    }
}

/// The names that the outermost component imports and exports.
fn names(bytes: &[u8]) -> wasmparser::Result<(Vec<String>, Vec<String>)> {
    let mut imports = Vec::new();
    let mut exports = Vec::new();
    let mut depth = 0_usize;
    for payload in Parser::new(0).parse_all(bytes) {
        match payload? {
            Payload::ModuleSection { .. } | Payload::ComponentSection { .. } => depth += 1,
            Payload::End(_) => depth = depth.saturating_sub(1),
            Payload::ComponentImportSection(section) if depth == 0 => {
                for import in section {
                    imports.push(import?.name.name.to_owned());
                }
            }
            Payload::ComponentExportSection(section) if depth == 0 => {
                for export in section {
                    exports.push(export?.name.name.to_owned());
                }
            }
            _ => {}
        }
    }
    Ok((imports, exports))
}

fn damaged(error: wasmparser::BinaryReaderError) -> InspectError {
    InspectError::Damaged(error.message().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_an_import_needs() {
        let cases = [
            ("wasi:io/poll@0.2.0", Needs::Nothing),
            ("wasi:io/poll@0.2.6", Needs::Nothing),
            ("wasi:io/poll@0.3.0", Needs::Unknown),
            ("wasi:io/poll", Needs::Unknown),
            ("wasi:http/outgoing-handler@0.2.0", Needs::Unknown),
            ("wasi:config/store@0.2.0-rc.1", Needs::Nothing),
            ("wasi:config/store@0.2.0-draft", Needs::Unknown),
            ("wasi:logging/logging@0.1.0-draft", Needs::Nothing),
            ("stagehost:stage/types@0.1.0", Needs::Nothing),
            ("stagehost:stage/sql@0.1.0", Needs::Sql),
            ("stagehost:stage/redis@0.1.0", Needs::Redis),
            ("stagehost:stage/producer@0.1.0", Needs::Output),
            ("stagehost:stage/producer@0.2.0", Needs::OtherVersion),
            ("stagehost:stage/blob@0.1.0", Needs::Unknown),
            ("run", Needs::Unknown),
        ];
        for (import, expected) in cases {
            assert_eq!(needs(import), expected, "{import}");
        }
    }

    #[test]
    fn tells_what_a_file_is() {
        let module = b"\0asm\x01\0\0\0";
        let component = b"\0asm\x0d\0\x01\0";
        assert_eq!(inspect(module), Err(InspectError::CoreModule));
        assert_eq!(
            inspect(component),
            Err(InspectError::NoHandler {
                exports: Vec::new()
            })
        );
        assert_eq!(inspect(b""), Err(InspectError::NotWasm));
        assert_eq!(inspect(b"#!/bin/sh\n"), Err(InspectError::NotWasm));
        assert_eq!(inspect(b"\n(component)"), Err(InspectError::Text));
        assert!(matches!(inspect(b"\0asm"), Err(InspectError::Damaged(_))));
        assert!(matches!(
            inspect(b"\0asm\x0d\0\x01\0\x07\x7f"),
            Err(InspectError::Damaged(_))
        ));
    }
}
