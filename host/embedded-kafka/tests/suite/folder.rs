//! The folder of a broker: its lock, its address, its port.

use std::net::{SocketAddr, TcpListener};

use embedded_kafka::{Broker, Config, StartError, running};

use crate::cluster::{Cluster, runtime};

#[test]
fn a_folder_has_one_broker_and_names_it() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(running(folder.path()), None);
    let runtime = runtime();
    let broker = runtime
        .block_on(Broker::start(Config::new(folder.path())))
        .unwrap();
    assert_eq!(running(folder.path()), Some(broker.address()));
    let second = runtime
        .block_on(Broker::start(Config::new(folder.path())))
        .unwrap_err();
    let message = second.to_string();
    assert!(
        matches!(second, StartError::Locked { address, .. } if address == Some(broker.address())),
        "{message}"
    );
    assert!(
        message.contains(&format!("it listens on {}", broker.address())),
        "{message}"
    );
    runtime.block_on(broker.shutdown());
    assert_eq!(running(folder.path()), None);
    let again = runtime
        .block_on(Broker::start(Config::new(folder.path())))
        .unwrap();
    runtime.block_on(again.shutdown());
}

#[test]
fn a_folder_is_free_when_its_broker_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let runtime = runtime();
    drop(
        runtime
            .block_on(Broker::start(Config::new(folder.path())))
            .unwrap(),
    );
    crate::cluster::eventually("the folder is free", || running(folder.path()).is_none());
    runtime
        .block_on(Broker::start(Config::new(folder.path())))
        .unwrap();
}

#[test]
fn only_loopback_is_listened_on() {
    let runtime = runtime();
    for address in ["0.0.0.0:0", "[::]:0", "192.0.2.1:9092"] {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::new(folder.path());
        config.listen = address.parse().unwrap();
        let refused = runtime.block_on(Broker::start(config)).unwrap_err();
        assert!(matches!(refused, StartError::NotLoopback(_)), "{refused}");
        assert!(refused.to_string().contains("127.0.0.1"), "{refused}");
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            0,
            "nothing was begun"
        );
    }
}

#[test]
fn the_port_is_taken_again_if_it_is_free() {
    let first = Cluster::embedded();
    let address = first.address();
    let folder = first.stop();
    let second = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_eq!(second.address(), address);
    let folder = second.stop();
    let _somebody_else = TcpListener::bind(address).unwrap();
    let third = Cluster::embedded_with(Config::new(folder.path()), folder);
    assert_ne!(third.address(), address);
}

#[test]
fn a_port_in_use_is_said() {
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = other.local_addr().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut config = Config::new(folder.path());
    config.listen = address;
    let refused = runtime().block_on(Broker::start(config)).unwrap_err();
    assert!(
        matches!(refused, StartError::PortInUse(port) if port == address),
        "{refused}"
    );
}
