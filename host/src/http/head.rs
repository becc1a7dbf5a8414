//! The head of a request, looked at before hyper sees it. What a proxy in front of us and we might understand
//! differently (two lengths, lines that end with a bare LF, two hosts …) would let a client smuggle a request through
//! the proxy inside the body of another; hyper is lenient about some of it.

use hyper::StatusCode;

/// Lines of a head; hyper takes no more.
const MAX_FIELDS: usize = 100;
/// Digits of a content-length: below the largest number that 64 bits hold.
const MAX_LENGTH_DIGITS: usize = 18;

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) status: StatusCode,
    pub(super) why: &'static str,
}

/// Where the message ends whose head it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many bytes of body.
    Length(u64),
    /// Where its chunks say.
    Chunked,
}

/// Finds the end of a head in bytes that come bit by bit, each of them looked at once.
#[derive(Debug, Default)]
pub(super) struct Scanner {
    /// Bytes that were looked at.
    seen: usize,
    /// Where the last line begins.
    line: usize,
}

impl Scanner {
    /// The head's length, once it is all there. `bytes` begin with the head; more may have come since the last time.
    pub(super) fn find(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refusal> {
        while let Some(at) = memchr::memchr2(b'\r', b'\n', &bytes[self.seen..]) {
            let at = self.seen + at;
            if bytes[at] == b'\n' {
                return refused("a line of the head ends with a bare LF");
            }
            match bytes.get(at + 1) {
                Some(b'\n') => {}
                Some(_) => return refused("the head has a bare CR"),
                None => {
                    self.seen = at;
                    return Ok(None);
                }
            }
            let is_last = at == self.line;
            self.seen = at + 2;
            self.line = self.seen;
            if is_last {
                return Ok(Some(self.seen));
            }
        }
        self.seen = bytes.len();
        Ok(None)
    }
}

/// What follows a whole head, or why it is refused. What is neither framing nor host is left to hyper.
pub(super) fn check(head: &[u8]) -> Result<Framing, Refusal> {
    let mut lines = head
        .split(|&byte| byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let request = RequestLine::parse(lines.next().unwrap_or_default())?;
    let mut fields = Fields::default();
    for (count, line) in lines.take_while(|line| !line.is_empty()).enumerate() {
        if count == MAX_FIELDS {
            return Err(Refusal {
                status: StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                why: "the head has too many lines",
            });
        }
        fields.add(line)?;
    }
    fields.check_host(&request)?;
    fields.framing(&request)
}

struct RequestLine<'a> {
    method: &'a [u8],
    target: &'a [u8],
    is_http_11: bool,
}

impl<'a> RequestLine<'a> {
    fn parse(line: &'a [u8]) -> Result<Self, Refusal> {
        let mut words = line.split(|&byte| byte == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return refused("the request line is not `METHOD TARGET VERSION`");
        };
        let is_http_11 = match version {
            b"HTTP/1.1" => true,
            b"HTTP/1.0" => false,
            _ => return refused("the version is none of HTTP/1.0 and HTTP/1.1"),
        };
        if !is_token(method) {
            return refused("the method is not a word");
        }
        if target.is_empty() || target.iter().any(|&b| b.is_ascii_control() || b == b'#') {
            return refused("the target has a character that no target may have");
        }
        Ok(Self {
            method,
            target,
            is_http_11,
        })
    }

    /// The authority of a target that is a whole URL, as a client of a proxy sends it.
    fn authority(&self) -> Result<Option<&'a [u8]>, Refusal> {
        if self.target.starts_with(b"/") || (self.target == b"*" && self.method == b"OPTIONS") {
            return Ok(None);
        }
        let rest = [&b"http://"[..], b"https://"]
            .into_iter()
            .find_map(|scheme| {
                let (start, rest) = self.target.split_at_checked(scheme.len())?;
                start.eq_ignore_ascii_case(scheme).then_some(rest)
            });
        let Some(rest) = rest else {
            return refused("the target is not a path");
        };
        let end = rest.iter().position(|b| b"/?".contains(b));
        Ok(Some(&rest[..end.unwrap_or(rest.len())]))
    }
}

/// The fields that say where the message ends and whom it is for.
#[derive(Default)]
struct Fields<'a> {
    host: Option<&'a [u8]>,
    length: Option<&'a [u8]>,
    encoding: Option<&'a [u8]>,
}

impl<'a> Fields<'a> {
    fn add(&mut self, line: &'a [u8]) -> Result<(), Refusal> {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else {
            return refused("a line of the head has no colon");
        };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        // Also a line that goes on the one before, and whitespace before the colon.
        if !is_token(name) {
            return refused("the name of a header is not a word");
        }
        if value.iter().any(|&b| b.is_ascii_control() && b != b'\t') {
            return refused("a header has a control character");
        }
        let (place, twice) = if name.eq_ignore_ascii_case(b"host") {
            (&mut self.host, "there is more than one host")
        } else if name.eq_ignore_ascii_case(b"content-length") {
            (&mut self.length, "there is more than one content-length")
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            (
                &mut self.encoding,
                "there is more than one transfer-encoding",
            )
        } else {
            return Ok(());
        };
        if place.replace(value).is_some() {
            return refused(twice);
        }
        Ok(())
    }

    fn check_host(&self, request: &RequestLine<'_>) -> Result<(), Refusal> {
        let authority = request.authority()?;
        let Some(host) = self.host else {
            return if request.is_http_11 || authority.is_some() {
                refused("the host is missing")
            } else {
                Ok(())
            };
        };
        let is_plain = |&b: &u8| b.is_ascii_alphanumeric() || b"-._~%:[]".contains(&b);
        if !host.iter().all(is_plain) {
            return refused("the host is not a name or address with a port or without");
        }
        if authority.is_some_and(|authority| !authority.eq_ignore_ascii_case(host)) {
            return refused("the target names another host than the header does");
        }
        Ok(())
    }

    fn framing(&self, request: &RequestLine<'_>) -> Result<Framing, Refusal> {
        match (self.length, self.encoding) {
            (Some(_), Some(_)) => refused("there are both content-length and transfer-encoding"),
            (None, None) => Ok(Framing::Length(0)),
            (None, Some(_)) if !request.is_http_11 => refused("HTTP/1.0 has no transfer-encoding"),
            (None, Some(encoding)) if encoding.eq_ignore_ascii_case(b"chunked") => {
                Ok(Framing::Chunked)
            }
            (None, Some(_)) => refused("the transfer-encoding is not `chunked`"),
            (Some(length), None) => match decimal(length) {
                Some(length) => Ok(Framing::Length(length)),
                None => refused("the content-length is not a number"),
            },
        }
    }
}

/// Digits alone: `parse` would take a sign.
fn decimal(digits: &[u8]) -> Option<u64> {
    let is_number = digits.len() <= MAX_LENGTH_DIGITS && digits.iter().all(u8::is_ascii_digit);
    let digits = std::str::from_utf8(digits).ok().filter(|_| is_number)?;
    digits.parse().ok()
}

/// What HTTP takes as a method or the name of a header.
fn is_token(word: &[u8]) -> bool {
    let is_part = |&b: &u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    !word.is_empty() && word.iter().all(is_part)
}

fn refused<T>(why: &'static str) -> Result<T, Refusal> {
    Err(Refusal {
        status: StatusCode::BAD_REQUEST,
        why,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_found_however_it_comes() {
        let bytes = b"GET / HTTP/1.1\r\nhost: a\r\n\r\nbody\n";
        for step in 1..bytes.len() {
            let mut scanner = Scanner::default();
            let found = (step..bytes.len() + step)
                .step_by(step)
                .find_map(|end| scanner.find(&bytes[..end.min(bytes.len())]).unwrap());
            assert_eq!(found, Some(27), "in steps of {step}");
        }
        for (bytes, why) in [
            (
                &b"GET / HTTP/1.1\n"[..],
                "a line of the head ends with a bare LF",
            ),
            (
                b"GET / HTTP/1.1\r\na: b\n",
                "a line of the head ends with a bare LF",
            ),
            (b"GET / HTTP/1.1\r\r", "the head has a bare CR"),
        ] {
            let refusal = Scanner::default().find(bytes).unwrap_err();
            assert_eq!(refusal.why, why, "{}", bytes.escape_ascii());
        }
    }

    #[test]
    fn what_two_servers_could_read_differently_is_refused() {
        let check = |head: &str, expected: Result<Framing, &str>| {
            let head = head.replace('\n', "\r\n") + "\r\n\r\n";
            let found = super::check(head.as_bytes()).map_err(|refusal| refusal.why);
            assert_eq!(found, expected, "{head}");
        };
        let post = |fields: &str| format!("POST /a HTTP/1.1\nHost: b:1\n{fields}");
        check("GET / HTTP/1.0", Ok(Framing::Length(0)));
        check("OPTIONS * HTTP/1.1\nhost: [::1]:80", Ok(Framing::Length(0)));
        check("GET HTTP://B/c HTTP/1.1\nhost: b", Ok(Framing::Length(0)));
        check(&post("Content-Length:  12\t"), Ok(Framing::Length(12)));
        check(&post("transfer-encoding: Chunked"), Ok(Framing::Chunked));
        let no_number = Err("the content-length is not a number");
        for length in ["", "+1", "-1", "1,1", "0x1", "1 1", "99999999999999999999"] {
            check(&post(&format!("content-length: {length}")), no_number);
        }
        for encoding in [
            "",
            "gzip",
            "gzip, chunked",
            "chunked, chunked",
            "\"chunked\"",
            "xchunked",
        ] {
            let why = "the transfer-encoding is not `chunked`";
            check(&post(&format!("transfer-encoding: {encoding}")), Err(why));
        }
        let both = "content-length: 1\ntransfer-encoding: chunked";
        check(
            &post(both),
            Err("there are both content-length and transfer-encoding"),
        );
        let twice = "content-length: 1\nContent-length: 1";
        check(&post(twice), Err("there is more than one content-length"));
        let twice = "transfer-encoding: chunked\ntransfer-encoding: chunked";
        check(
            &post(twice),
            Err("there is more than one transfer-encoding"),
        );
        check(&post("host: b:1"), Err("there is more than one host"));
        let no_word = Err("the name of a header is not a word");
        for line in [
            "content-length : 1",
            " content-length: 1",
            "\tx: 1",
            ": 1",
            "x\0: 1",
            "a b: 1",
        ] {
            check(&post(line), no_word);
        }
        check(&post("x"), Err("a line of the head has no colon"));
        check(&post("x: a\0b"), Err("a header has a control character"));
        check("GET / HTTP/1.1", Err("the host is missing"));
        let odd_host = Err("the host is not a name or address with a port or without");
        for host in ["a b", "a/b", "u@a", "a,b"] {
            check(&format!("GET / HTTP/1.1\nhost: {host}"), odd_host);
        }
        check(
            "GET http://c/ HTTP/1.1\nhost: b",
            Err("the target names another host than the header does"),
        );
        check(
            "GET http://u@b/ HTTP/1.1\nhost: b",
            Err("the target names another host than the header does"),
        );
        for target in ["a", "b:80", "*", "ftp://b/"] {
            check(
                &format!("GET {target} HTTP/1.1\nhost: b"),
                Err("the target is not a path"),
            );
        }
        for line in [
            "GET / HTTP/1.1 ",
            "GET  / HTTP/1.1",
            "GET /",
            "nonsense",
            "",
        ] {
            check(line, Err("the request line is not `METHOD TARGET VERSION`"));
        }
        for version in ["HTTP/2.0", "HTTP/1.2", "http/1.1", "HTTP/1.1x"] {
            check(
                &format!("GET / {version}\nhost: b"),
                Err("the version is none of HTTP/1.0 and HTTP/1.1"),
            );
        }
        check(
            "GET /a#b HTTP/1.1\nhost: b",
            Err("the target has a character that no target may have"),
        );
    }
}
