//! Which log a command means, and the way to it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use embedded_kafka::{Broker, Config, StartError};

use crate::log::kafka::ClientSettings;
use crate::pipeline::{Brokers, Pipeline, Probe, Topic};
use crate::run::EMBEDDED_FOLDER;

/// The options that say which log.
#[derive(Args, Debug)]
pub(crate) struct LogArgs {
    /// Brokers to connect to, in place of a pipeline's
    #[arg(long, value_name = "HOST:PORT", conflicts_with = "pipeline")]
    brokers: Option<String>,
    /// The pipeline whose log it is
    #[arg(long, value_name = "FILE", default_value = "pipeline.toml")]
    pipeline: PathBuf,
}

/// A log that a command may use until it calls [`OpenLog::close`].
pub(super) struct OpenLog {
    /// How to reach it.
    pub(super) settings: ClientSettings,
    /// What the pipeline declares.
    pub(super) topics: BTreeMap<String, Topic>,
    /// The broker of a pipeline that nobody runs at the moment.
    broker: Option<Broker>,
}

impl LogArgs {
    /// Finds the log. That of an embedded pipeline is the running host's; if there is none, this
    /// process has the broker for as long.
    pub(super) async fn open(&self) -> anyhow::Result<OpenLog> {
        if let Some(brokers) = &self.brokers {
            return Ok(OpenLog {
                settings: ClientSettings {
                    brokers: brokers.clone(),
                    properties: BTreeMap::new(),
                },
                topics: BTreeMap::new(),
                broker: None,
            });
        }
        let pipeline = Pipeline::load(&self.pipeline, &super::variable, Probe::NONE)?;
        let (brokers, broker) = match pipeline.kafka.brokers {
            Brokers::Remote(brokers) => (brokers, None),
            Brokers::Embedded { listen } => {
                let mut config = Config::new(pipeline.data_dir.join(EMBEDDED_FOLDER));
                config.listen = listen;
                embedded(config).await?
            }
        };
        Ok(OpenLog {
            settings: ClientSettings {
                brokers,
                properties: pipeline.kafka.properties,
            },
            topics: pipeline.topics,
            broker,
        })
    }
}

impl OpenLog {
    /// Ends the broker, where it is this process's.
    pub(super) async fn close(self) {
        if let Some(broker) = self.broker {
            broker.shutdown().await;
        }
    }
}

async fn embedded(config: Config) -> anyhow::Result<(String, Option<Broker>)> {
    let folder = config.folder.clone();
    if let Some(address) = running(&folder).await? {
        return Ok((address.to_string(), None));
    }
    match Broker::start(config).await {
        Ok(broker) => Ok((broker.address().to_string(), Some(broker))),
        // A host was faster.
        Err(StartError::Locked {
            address: Some(address),
            ..
        }) => Ok((address.to_string(), None)),
        Err(error) => Err(error).context("cannot start the embedded broker"),
    }
}

async fn running(folder: &Path) -> anyhow::Result<Option<std::net::SocketAddr>> {
    let folder = folder.to_owned();
    Ok(tokio::task::spawn_blocking(move || embedded_kafka::running(&folder)).await?)
}
