//! What a user sees when the host is up: addresses, and lines to try.

use std::io::Write;
use std::net::SocketAddr;

use crate::pipeline::{Action, Http, Method, Pipeline, Route};

/// Where the listeners are.
pub(super) struct Addresses {
    pub(super) admin: SocketAddr,
    pub(super) http: Option<SocketAddr>,
}

/// Prints to stdout; the log goes to stderr. In a thread of its own, for a pipe that nobody reads may be full, and the host
/// must not wait for it.
pub(super) fn print(pipeline: &Pipeline, brokers: &str, addresses: &Addresses) {
    let text = text(pipeline, brokers, addresses);
    std::thread::spawn(move || {
        let mut out = std::io::stdout().lock();
        // Who closed it does not want it.
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    });
}

fn text(pipeline: &Pipeline, brokers: &str, addresses: &Addresses) -> String {
    let mut lines = vec![format!("\nPipeline {} is running.", pipeline.name)];
    if let Some(http) = addresses.http {
        lines.push(format!("  HTTP    http://{http}"));
    }
    lines.push(format!("  Kafka   {brokers}"));
    lines.push(format!(
        "  admin   http://{}  (/healthz /readyz /metrics)",
        addresses.admin
    ));
    if let (Some(http), Some(address)) = (&pipeline.http, addresses.http) {
        lines.push("\nTry:".into());
        lines.extend(curl_lines(http, address));
        lines.extend(hints(http));
    }
    lines.push(
        "\nCtrl-C drains and stops it; pressed again after a second, it ends at once.\n".into(),
    );
    lines.join("\n")
}

fn curl_lines(http: &Http, address: SocketAddr) -> Vec<String> {
    http.routes
        .iter()
        .map(|route| format!("  curl -i {}", curl_arguments(route, address)))
        .collect()
}

/// `{slug}` as `SLUG`: curl takes braces for a list.
fn filled_in(path: &str) -> String {
    let mut shown = String::with_capacity(path.len());
    let mut inside = false;
    for c in path.chars() {
        match c {
            '{' => inside = true,
            '}' => inside = false,
            c if inside => shown.extend(c.to_uppercase()),
            c => shown.push(c),
        }
    }
    shown
}

/// Where what a path asks for comes from, as far as the host makes it.
fn hints(http: &Http) -> Vec<String> {
    let mut hints = Vec::new();
    for route in &http.routes {
        let Action::Produce { generate, .. } = &route.action else {
            continue;
        };
        for name in generate {
            let part = format!("{{{name}}}");
            if http.routes.iter().any(|r| r.path.contains(&part)) {
                let (path, name_shown) = (&route.path, name.to_uppercase());
                hints.push(format!(
                    "{name_shown} is what the answer of {path} says in its header stagehost-{name}."
                ));
            }
        }
    }
    hints
}

fn curl_arguments(route: &Route, address: SocketAddr) -> String {
    let url = format!("http://{address}{}", filled_in(&route.path));
    let Action::Produce { fields, .. } = &route.action else {
        return format!("'{url}'");
    };
    let method = match route.method {
        Method::Post => String::new(),
        other => format!("-X {other} "),
    };
    let data: Vec<_> = fields
        .iter()
        .map(|field| format!("--data-urlencode '{field}=My first {field}'"))
        .collect();
    format!("{method}'{url}' {}", data.join(" "))
}
