//! Whom a request is for, and where it comes from. A web page that the operator looks at can send requests to loopback:
//! under a name of its own that it has led there (DNS rebinding), and then read the answers; or plainly, from its origin.

use std::net::{Ipv4Addr, Ipv6Addr};

use hyper::header::{GetAll, HOST, HeaderMap, HeaderValue, ORIGIN};
use hyper::{Request, Version};

/// Whether the request calls the host by a loopback name. HTTP/1.0 may leave the name out, as load balancers do; no
/// browser does.
pub(super) fn is_loopback<B>(request: &Request<B>) -> bool {
    match request.headers().get(HOST).map(HeaderValue::to_str) {
        Some(Ok(host)) => is_loopback_name(host),
        Some(Err(_)) => false,
        None => request.version() == Version::HTTP_10,
    }
}

fn is_loopback_name(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        return rest.split_once(']').is_some_and(|(address, port)| {
            let address = address.parse::<Ipv6Addr>();
            is_port(port) && address.is_ok_and(|address| address.to_canonical().is_loopback())
        });
    }
    let (name, port) = host.split_at(host.find(':').unwrap_or(host.len()));
    let address = name.parse::<Ipv4Addr>();
    // With the dot that ends a whole name, it is one that nobody else resolves either.
    let is_local = (name.strip_suffix('.').unwrap_or(name)).eq_ignore_ascii_case("localhost");
    is_port(port) && (is_local || address.is_ok_and(|address| address.is_loopback()))
}

/// Nothing, or a colon and a number.
fn is_port(port: &str) -> bool {
    port.is_empty()
        || port.strip_prefix(':').is_some_and(|digits| {
            digits.bytes().all(|byte| byte.is_ascii_digit()) && digits.parse::<u16>().is_ok()
        })
}

/// Whether no page of another origin has sent the request, as far as browsers tell.
pub(super) fn is_own(headers: &HeaderMap) -> bool {
    let host = headers.get(HOST).map_or(&b""[..], HeaderValue::as_bytes);
    let mut origins = headers.get_all(ORIGIN).iter();
    origins.all(|origin| is_of(origin.as_bytes(), host)) && is_own_fetch(headers)
}

fn is_of(origin: &[u8], host: &[u8]) -> bool {
    let schemes: [&[u8]; 2] = [b"http://", b"https://"];
    let named = schemes
        .iter()
        .find_map(|scheme| origin.strip_prefix(*scheme));
    named.is_some_and(|named| named.eq_ignore_ascii_case(host))
}

/// What shows an image or sends a GET without asking names no origin, but browsers say where it comes from. To follow a
/// link from elsewhere is fine: nobody but the operator sees the answer.
fn is_own_fetch(headers: &HeaderMap) -> bool {
    let is = |name, words: &[&str]| {
        let found: GetAll<'_, HeaderValue> = headers.get_all(name);
        found
            .iter()
            .all(|value| words.iter().any(|word| value.as_bytes() == word.as_bytes()))
    };
    let is_link = headers.contains_key("sec-fetch-dest")
        && is("sec-fetch-mode", &["navigate"])
        && is("sec-fetch-dest", &["document"]);
    is("sec-fetch-site", &["same-origin", "none"]) || is_link
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_names() {
        for host in [
            "localhost",
            "LocalHost:9321",
            "127.0.0.1",
            "127.1.2.3:1",
            "[::1]",
            "[::1]:9321",
            "[::ffff:127.0.0.1]:80",
        ] {
            assert!(is_loopback_name(host), "{host}");
        }
        for host in [
            "",
            ":80",
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "evil-localhost",
            "localhost:80:80",
            "localhost:",
            "localhost:+1",
            "localhost:99999",
            "128.0.0.1",
            "0.0.0.0",
            "0x7f.1",
            "127.1",
            "2130706433",
            "[::2]",
            "[::1",
            "[::1]x",
            "::1",
        ] {
            assert!(!is_loopback_name(host), "{host}");
        }
    }

    #[test]
    fn origins() {
        let check = |headers: &[(&'static str, &str)], expected| {
            let mut map: HeaderMap = HeaderMap::new();
            for (name, value) in [("host", "localhost:9321")].iter().chain(headers) {
                map.append(*name, value.parse().unwrap());
            }
            assert_eq!(is_own(&map), expected, "{headers:?}");
        };
        check(&[], true);
        check(&[("origin", "http://localhost:9321")], true);
        check(&[("origin", "http://localhost:3000")], false);
        check(&[("origin", "http://127.0.0.1:9321")], false);
        check(&[("origin", "http://evil.example")], false);
        check(&[("origin", "null")], false);
        check(&[("origin", "")], false);
        let twice = [
            ("origin", "http://localhost:9321"),
            ("origin", "http://evil.example"),
        ];
        check(&twice, false);
        check(&[("sec-fetch-site", "none")], true);
        check(&[("sec-fetch-site", "same-origin")], true);
        check(&[("sec-fetch-site", "cross-site")], false);
        check(&[("sec-fetch-site", "same-site")], false);
        let fetch = |mode, dest| {
            [
                ("sec-fetch-site", "cross-site"),
                ("sec-fetch-mode", mode),
                ("sec-fetch-dest", dest),
            ]
        };
        check(&fetch("navigate", "document"), true);
        check(&fetch("navigate", "iframe"), false);
        check(&fetch("no-cors", "image"), false);
    }
}
