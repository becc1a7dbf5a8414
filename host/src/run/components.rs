//! The stages' components, compiled and linked: before a run starts or creates anything, and for `host check`, which so refuses
//! what a run would. None of their code runs here, since it may use its stores when it begins.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::anyhow;
use bytesize::ByteSize;
use sha2::{Digest, Sha256};

use crate::capability::Stores;
use crate::component::{Compiled, Runtime, StageComponent};
use crate::diagnostics::Problem;
use crate::pipeline::{Instances, Pipeline, Stage};

/// A component that can be called, but has no stores yet.
pub(super) struct Ready {
    pub(super) component: StageComponent,
    /// SHA-256 of its file, in hex.
    pub(super) hash: Arc<str>,
}

/// All of a pipeline's.
pub(super) struct Components {
    /// In the stages' order.
    pub(super) ready: Vec<Ready>,
    pub(super) runtime: Arc<Runtime>,
}

/// Whether a run would take the components. Keeps nothing of what it compiles.
pub async fn check(pipeline: &Pipeline) -> anyhow::Result<()> {
    prepare(pipeline, Runtime::uncached()?).await.map(drop)
}

/// Every stage's component; or what is wrong with all that can't be had, each with its place.
pub(super) async fn prepare(pipeline: &Pipeline, runtime: Runtime) -> anyhow::Result<Components> {
    let runtime = Arc::new(runtime);
    let mut compiler = Compiler {
        runtime: &runtime,
        compiled: BTreeMap::new(),
    };
    let mut ready = Vec::with_capacity(pipeline.stages.len());
    let mut problems = Vec::new();
    for stage in &pipeline.stages {
        match compiler.ready(stage).await {
            Ok(component) => ready.push(component),
            Err(refusal) => problems.push(refusal.problem(stage)),
        }
    }
    if problems.is_empty() {
        return Ok(Components { ready, runtime });
    }
    Err(pipeline.source.diagnostics(problems).into())
}

/// Compiles each file once, however many stages have it.
struct Compiler<'a> {
    runtime: &'a Arc<Runtime>,
    compiled: BTreeMap<(Arc<str>, bool), Compiled>,
}

impl Compiler<'_> {
    async fn ready(&mut self, stage: &Stage) -> Result<Ready, Refusal> {
        let bytes = tokio::fs::read(&stage.component).await;
        let bytes = bytes.map_err(|error| Refusal::Unreadable(error.into()))?;
        let hash: Arc<str> = hex(&Sha256::digest(&bytes)).into();
        let key = (hash.clone(), stage.instances == Instances::Fresh);
        if !self.compiled.contains_key(&key) {
            let (runtime, instances) = (self.runtime.clone(), stage.instances);
            let compile = move || runtime.compile(&bytes, instances);
            let compiled = tokio::task::spawn_blocking(compile).await;
            let compiled = compiled.map_err(|error| Refusal::Uncompiled(error.into()))?;
            let compiled = compiled.map_err(Refusal::Uncompiled)?;
            self.compiled.insert(key.clone(), compiled);
        }
        let compiled = &self.compiled[&key];
        let bound = self.runtime.bind(stage, compiled, &Stores::default());
        let component = bound.map_err(Refusal::Unlinked)?;
        let needs = compiled.memory_at_first();
        if needs > stage.limits.memory as u64 {
            return Err(Refusal::TooLarge(anyhow!(
                "it begins with {} of memory, and `limits.memory` is {}",
                ByteSize(needs).display().iec(),
                ByteSize(stage.limits.memory as u64).display().iec(),
            )));
        }
        Ok(Ready { component, hash })
    }
}

/// Why there is no component.
enum Refusal {
    Unreadable(anyhow::Error),
    Uncompiled(anyhow::Error),
    Unlinked(anyhow::Error),
    TooLarge(anyhow::Error),
}

impl Refusal {
    fn problem(self, stage: &Stage) -> Problem {
        const BUILD: &str = "build it with the SDK, or for the worlds in wit/, without features that this host does not have (async, \
                             for one)";
        let (what, error, help) = match self {
            Self::Unreadable(error) => ("can't be read", error, "build the stage first"),
            Self::Uncompiled(error) => ("can't be compiled", error, BUILD),
            Self::Unlinked(error) => ("can't be linked", error, BUILD),
            Self::TooLarge(error) => (
                "can't be instantiated",
                error,
                "raise `limits.memory`, or build it with less",
            ),
        };
        let message = format!("the component of `{}` {what}", stage.name);
        Problem::at(&stage.component_span, message)
            .label(format!("{error:#}"))
            .help(help)
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
