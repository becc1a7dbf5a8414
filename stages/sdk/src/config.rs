//! The stage's own settings, from `[stages.NAME.config]` of the pipeline.

use crate::Fault;
use crate::bindings::stage::wasi::config::store;

/// The setting, where the pipeline has it.
///
/// ```
/// # use stagehost::{Fault, config};
/// fn greeting() -> Result<String, Fault> {
///     Ok(config::get("greeting")?.unwrap_or_else(|| "hello".to_owned()))
/// }
/// ```
pub fn get(key: &str) -> Result<Option<String>, Fault> {
    Ok(store::get(key)?)
}

/// The setting; a message that needs one that the pipeline lacks is rejected.
pub fn require(key: &str) -> Result<String, Fault> {
    get(key)?.ok_or_else(|| {
        Fault::Reject(format!(
            "config: `{key}` is missing in the stage's settings"
        ))
    })
}

/// All settings, by key.
pub fn all() -> Result<Vec<(String, String)>, Fault> {
    Ok(store::get_all()?)
}
