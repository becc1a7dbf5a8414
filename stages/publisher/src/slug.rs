//! Slugs from title and uid alone, so that a redelivered post gets the same one.

/// Longer titles are cut, in characters: a slug is a path and a key of an index.
const TITLE_CHARACTERS: usize = 80;

/// Lower-case ASCII words of the title, then the uid, joined by `-`.
pub(crate) fn slug(title: &str, uid: &str) -> String {
    let title: String = title.chars().take(TITLE_CHARACTERS).collect();
    let ascii = any_ascii::any_ascii(&format!("{title} {uid}")).to_ascii_lowercase();
    let words = ascii
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-")
}

#[cfg(test)]
mod tests {
    use super::slug;

    #[test]
    fn slugs_survive_every_title() {
        let uid = "5f0c2a7e-1d4b-4c1a-9a53-0f6f0c1f8a11";
        let long = "x".repeat(200);
        let cut = "x".repeat(80);
        let cases = [
            ("Über Kafka & Go", "uber-kafka-go-"),
            ("  Hello,   World! ", "hello-world-"),
            ("深圳 和 Kafka", "shenzhen-he-kafka-"),
            ("Привет", "privet-"),
            ("../../etc/passwd?x=1#y", "etc-passwd-x-1-y-"),
            ("", ""),
            ("!!!", ""),
            (&long, &format!("{cut}-")),
        ];
        for (title, start) in cases {
            assert_eq!(slug(title, uid), format!("{start}{uid}"), "{title}");
        }
    }
}
