//! W3C trace context.

use hyper::header::HeaderMap;

/// The bytes of the request's `traceparent`, where there is one and it is well-formed: anything else must not travel on.
pub(super) fn parent(headers: &HeaderMap) -> Option<&[u8]> {
    let mut all = headers.get_all("traceparent").iter();
    let parent = all.next()?.as_bytes();
    (all.next().is_none() && is_well_formed(parent)).then_some(parent)
}

/// `version-traceid-parentid-flags` in lower-case hex; versions after 00 may say more.
fn is_well_formed(parent: &[u8]) -> bool {
    let mut fields = parent.splitn(5, |&byte| byte == b'-');
    let mut field = |length: usize| {
        fields.next().filter(|field| {
            field.len() == length
                && field
                    .iter()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        })
    };
    let (Some(version), Some(trace), Some(span), Some(_flags)) =
        (field(2), field(32), field(16), field(2))
    else {
        return false;
    };
    let is_set = |id: &[u8]| id.iter().any(|&byte| byte != b'0');
    let ends = fields.next().is_none();
    version != b"ff" && (ends || version != b"00") && is_set(trace) && is_set(span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn well_formed_parents() {
        let check = |parent: &str, expected| {
            assert_eq!(is_well_formed(parent.as_bytes()), expected, "{parent}")
        };
        check(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            true,
        );
        check(
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            true,
        );
        check(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            false,
        );
        check(
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            false,
        );
        check(
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            false,
        );
        check(
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            false,
        );
        check(
            "00-0AF7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            false,
        );
        check(
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            false,
        );
        check("", false);
    }
}
