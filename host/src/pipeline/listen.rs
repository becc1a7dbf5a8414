//! Addresses to listen on, and `[admin]`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

use super::kafka::is_embedded;
use super::load::Checks;
use super::{Admin, Secret};
use crate::diagnostics::{Problem, Span};
use crate::manifest::{AdminSection, Manifest, Text};

const DEFAULT_ADMIN_LISTEN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9321);

/// An address and a port; `localhost` is 127.0.0.1.
pub(super) fn address(checks: &Checks<'_>, text: &Text) -> Option<SocketAddr> {
    let parsed = parse(&text.value);
    if parsed.is_none() {
        checks.report(
            Problem::at(&text.span, format!("`{}` is not an address to listen on", text.shown()))
                .help("write an IP address and a port, such as `127.0.0.1:8080` or `[::]:8080`; port 0 takes any that is free"),
        );
    }
    parsed
}

pub(super) fn admin(checks: &Checks<'_>, section: Option<&AdminSection>) -> Option<Admin> {
    let listen_text = section.and_then(|s| s.listen.as_ref());
    let token = section.and_then(|s| s.token.as_ref());
    if let Some(token) = token.filter(|t| t.value.trim().is_empty()) {
        checks.report(
            Problem::at(&token.span, "the admin token is empty")
                .help("leave `token` out, or give it a value"),
        );
        return None;
    }
    let listen = match listen_text {
        Some(text) => address(checks, text)?,
        None => DEFAULT_ADMIN_LISTEN,
    };
    if let Some(text) = listen_text.filter(|_| token.is_none() && !listen.ip().is_loopback()) {
        checks.report(
            Problem::at(
                &text.span,
                "the admin listener would be open to other machines, without a token",
            )
            .help("add `token = \"${ADMIN_TOKEN}\"`, or listen on `127.0.0.1:9321`"),
        );
        return None;
    }
    Some(Admin {
        listen,
        token: token.map(|t| Secret(t.value.clone())),
    })
}

/// A listener of the pipeline's.
struct Listener<'a> {
    section: &'static str,
    address: SocketAddr,
    /// `None` where the address is the default, so that there is no text to point at.
    span: Option<&'a Span>,
}

/// Binds the listen addresses for a moment, all at once, as a run would.
pub(super) fn check_ports(checks: &Checks<'_>, manifest: &Manifest) {
    let mut bound: Vec<(Listener<'_>, TcpListener)> = Vec::new();
    for listener in listeners(manifest) {
        match TcpListener::bind(listener.address) {
            Ok(socket) => bound.push((listener, socket)),
            Err(error) => {
                let port = listener.address.port();
                let other = bound.iter().find(|(_, s)| is_on(s, port));
                let other = other.map(|(other, _)| other);
                checks.report(not_bound(&listener, other, &error));
            }
        }
    }
}

fn listeners(manifest: &Manifest) -> Vec<Listener<'_>> {
    let admin = manifest.admin.as_ref().and_then(|a| a.listen.as_ref());
    let admin = match admin {
        Some(text) => given("[admin]", Some(text)),
        None => Some(Listener {
            section: "[admin]",
            address: DEFAULT_ADMIN_LISTEN,
            span: None,
        }),
    };
    let http = manifest.http.as_ref().and_then(|h| h.listen.as_ref());
    let kafka = manifest.kafka.as_ref();
    let kafka = kafka.filter(|_| is_embedded(kafka));
    let broker = given("[kafka]", kafka.and_then(|k| k.listen.as_ref()));
    let all = [admin, given("[http]", http), broker];
    all.into_iter().flatten().collect()
}

fn given<'a>(section: &'static str, text: Option<&'a Text>) -> Option<Listener<'a>> {
    let text = text?;
    Some(Listener {
        section,
        address: parse(&text.value)?,
        span: Some(&text.span),
    })
}

fn is_on(socket: &TcpListener, port: u16) -> bool {
    port != 0 && socket.local_addr().is_ok_and(|bound| bound.port() == port)
}

fn not_bound(listener: &Listener<'_>, other: Option<&Listener<'_>>, error: &io::Error) -> Problem {
    const HELP: &str = "end that process, or give another `listen`";
    let (section, address) = (listener.section, listener.address);
    let is_taken = error.kind() == io::ErrorKind::AddrInUse;
    if let Some(other) = other.filter(|_| is_taken) {
        let message = format!("{section} and {} listen on the same address", other.section);
        let problem = match listener.span {
            Some(span) => Problem::at(span, message),
            None => Problem::of_file(message),
        };
        let problem = match other.span {
            Some(span) => problem.also(span, "the other one"),
            None => problem.label(format!("{} listens on {}", other.section, other.address)),
        };
        return problem.help("give each a port of its own");
    }
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => "another process listens there already".to_owned(),
        io::ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
        io::ErrorKind::PermissionDenied => "this user may not listen there".to_owned(),
        _ => error.to_string(),
    };
    match listener.span {
        Some(span) => Problem::at(span, format!("{section} can't listen on this address"))
            .label(why)
            .help(HELP),
        None => Problem::of_file(format!("{section} can't listen on {address}: {why}")).help(
            format!("end that process, or write another `listen` under {section}"),
        ),
    }
}

fn parse(text: &str) -> Option<SocketAddr> {
    if let Some(port) = text.strip_prefix("localhost:") {
        return Some(SocketAddr::new(
            Ipv4Addr::LOCALHOST.into(),
            port.parse().ok()?,
        ));
    }
    text.parse().ok()
}
