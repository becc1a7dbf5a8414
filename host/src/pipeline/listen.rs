//! Addresses to listen on, and `[admin]`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};

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

/// Binds each listen address for a moment. The embedded broker's is left out: it is let go of and
/// taken again by the broker itself, which says best what is wrong with it.
pub(super) fn check_ports(checks: &Checks<'_>, manifest: &Manifest) {
    let http = manifest.http.as_ref().and_then(|h| h.listen.as_ref());
    let admin = manifest.admin.as_ref().and_then(|a| a.listen.as_ref());
    let http_address = http.and_then(|text| parse(&text.value));
    let admin_address = match admin {
        Some(text) => parse(&text.value),
        None => Some(DEFAULT_ADMIN_LISTEN),
    };
    if http_address.is_some_and(|a| a.port() != 0 && Some(a) == admin_address) {
        let span = http.map(|text| text.span.clone());
        report(
            checks,
            span.as_ref(),
            "[http] and [admin] listen on the same address",
            "",
            "give each a port of its own",
        );
        return;
    }
    if let Some(address) = http_address {
        check_port(checks, http.map(|t| &t.span), "[http]", address);
    }
    if let Some(address) = admin_address {
        check_port(checks, admin.map(|t| &t.span), "[admin]", address);
    }
}

fn check_port(checks: &Checks<'_>, span: Option<&Span>, section: &str, address: SocketAddr) {
    let Err(error) = TcpListener::bind(address) else {
        return;
    };
    let why = match error.kind() {
        io::ErrorKind::AddrInUse => "another process listens there already".to_owned(),
        io::ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
        io::ErrorKind::PermissionDenied => "this user may not listen there".to_owned(),
        _ => error.to_string(),
    };
    match span {
        Some(_) => {
            let message = format!("{section} can't listen on this address");
            report(
                checks,
                span,
                &message,
                &why,
                "end that process, or give another `listen`",
            );
        }
        // The address is the default, so there is no text to point at.
        None => {
            let message = format!("{section} can't listen on {address}: {why}");
            report(
                checks,
                None,
                &message,
                "",
                &format!("end that process, or write another `listen` under {section}"),
            );
        }
    }
}

fn report(checks: &Checks<'_>, span: Option<&Span>, message: &str, label: &str, help: &str) {
    let problem = match span {
        Some(span) => Problem::at(span, message).label(label),
        None => Problem::of_file(message),
    };
    checks.report(problem.help(help));
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
