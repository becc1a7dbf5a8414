//! Exact numbers between their text and PostgreSQL's binary `numeric`: digits in base 10,000, so that
//! nothing is rounded on the way.

/// Digits before and after the point that PostgreSQL takes.
const MAX_WHOLE_DIGITS: usize = 131_072;
const MAX_FRACTION_DIGITS: usize = 16_383;

const POSITIVE: u16 = 0x0000;
const NEGATIVE: u16 = 0x4000;
const NAN: u16 = 0xC000;
const INFINITY: u16 = 0xD000;
const NEGATIVE_INFINITY: u16 = 0xF000;

/// PostgreSQL's bytes of a number in text form, such as `-12.50`, `1e-3` or `NaN`.
pub(super) fn encode(text: &str) -> Result<Vec<u8>, String> {
    match text {
        "NaN" => return Ok(header(0, 0, NAN, 0)),
        "Infinity" => return Ok(header(0, 0, INFINITY, 0)),
        "-Infinity" => return Ok(header(0, 0, NEGATIVE_INFINITY, 0)),
        _ => {}
    }
    let Number {
        negative,
        whole,
        fraction,
    } = Number::parse(text).ok_or_else(|| format!("{text:?} is not a decimal number"))?;
    if whole.len() > MAX_WHOLE_DIGITS || fraction.len() > MAX_FRACTION_DIGITS {
        return Err("the decimal number has too many digits".to_owned());
    }

    // Groups of four digits, counted from the point.
    let mut digits: Vec<u16> = Vec::new();
    let head = whole.len() % 4;
    if head > 0 {
        digits.push(group(&whole[..head]));
    }
    digits.extend(whole[head..].chunks(4).map(group));
    let mut weight = digits.len() as i32 - 1;
    digits.extend(fraction.chunks(4).map(|chunk| {
        let mut padded = [0; 4];
        padded[..chunk.len()].copy_from_slice(chunk);
        group(&padded)
    }));

    let leading = digits.iter().take_while(|digit| **digit == 0).count();
    digits.drain(..leading);
    weight -= leading as i32;
    while digits.last() == Some(&0) {
        digits.pop();
    }
    if digits.is_empty() {
        weight = 0;
    }
    let sign = if negative && !digits.is_empty() {
        NEGATIVE
    } else {
        POSITIVE
    };
    let mut bytes = header(
        digits.len() as u16,
        weight as i16,
        sign,
        fraction.len() as u16,
    );
    for digit in digits {
        bytes.extend(digit.to_be_bytes());
    }
    Ok(bytes)
}

/// The text of PostgreSQL's bytes, as PostgreSQL would print it.
pub(super) fn decode(bytes: &[u8]) -> Result<String, String> {
    let mut words = bytes
        .chunks_exact(2)
        .map(|pair| u16::from_be_bytes([pair[0], pair[1]]));
    let mut next = || words.next().ok_or("a numeric value is cut off");
    let count = next()?;
    let weight = i32::from(next()? as i16);
    let sign = next()?;
    let scale = usize::from(next()?);
    match sign {
        NAN => return Ok("NaN".to_owned()),
        INFINITY => return Ok("Infinity".to_owned()),
        NEGATIVE_INFINITY => return Ok("-Infinity".to_owned()),
        _ => {}
    }
    let digits = (0..count).map(|_| next()).collect::<Result<Vec<_>, _>>()?;
    let digit = |place: i32| match usize::try_from(weight - place) {
        Ok(index) => digits.get(index).copied().unwrap_or(0),
        Err(_) => 0,
    };

    let mut text = String::new();
    if sign == NEGATIVE {
        text.push('-');
    }
    if weight < 0 {
        text.push('0');
    } else {
        text.push_str(&digit(weight).to_string());
        for place in (0..weight).rev() {
            text.push_str(&format!("{:04}", digit(place)));
        }
    }
    if scale > 0 {
        let places = scale.div_ceil(4) as i32;
        let fraction: String = (1..=places)
            .map(|place| format!("{:04}", digit(-place)))
            .collect();
        text.push('.');
        text.push_str(&fraction[..scale]);
    }
    Ok(text)
}

/// How many digits count: all but leading zeros and those that trail a fraction. `None` where it is no number.
pub(super) fn significant_digits(text: &str) -> Option<usize> {
    let number = Number::parse(text)?;
    let digits = [number.whole, number.fraction].concat();
    let first = digits.iter().position(|digit| *digit != b'0');
    let last = digits.iter().rposition(|digit| *digit != b'0');
    Some(match (first, last) {
        (Some(first), Some(last)) => last - first + 1,
        _ => 0,
    })
}

/// A number's digits, as ASCII, without an exponent.
struct Number {
    negative: bool,
    whole: Vec<u8>,
    fraction: Vec<u8>,
}

impl Number {
    fn parse(text: &str) -> Option<Self> {
        let (negative, text) = match text.as_bytes().first()? {
            b'-' => (true, &text[1..]),
            b'+' => (false, &text[1..]),
            _ => (false, text),
        };
        let (mantissa, exponent) = match text.split_once(['e', 'E']) {
            Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
            None => (text, 0),
        };
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let mut digits = (whole.to_owned() + fraction).into_bytes();
        if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
            return None;
        }

        // Where the point stands among the digits; zeros are added where it stands outside.
        let mut point = whole.len() as i64 + i64::from(exponent);
        let limit = (MAX_WHOLE_DIGITS + MAX_FRACTION_DIGITS) as i64;
        if point.abs() > limit {
            return None;
        }
        if point < 0 {
            digits.splice(0..0, std::iter::repeat_n(b'0', -point as usize));
            point = 0;
        }
        if point as usize > digits.len() {
            digits.resize(point as usize, b'0');
        }
        let fraction = digits.split_off(point as usize);
        Some(Self {
            negative,
            whole: digits,
            fraction,
        })
    }
}

fn group(digits: &[u8]) -> u16 {
    digits.iter().fold(0, |sum, digit| {
        sum * 10 + u16::from(digit.saturating_sub(b'0'))
    })
}

fn header(count: u16, weight: i16, sign: u16, scale: u16) -> Vec<u8> {
    [count, weight as u16, sign, scale]
        .iter()
        .flat_map(|word| word.to_be_bytes())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_survives_the_way_there_and_back() {
        for (text, expected) in [
            ("0", "0"),
            ("-0", "0"),
            ("0.000", "0.000"),
            ("1", "1"),
            ("+12.50", "12.50"),
            ("-12345.6789", "-12345.6789"),
            ("10000", "10000"),
            ("100000000", "100000000"),
            ("0.00010002", "0.00010002"),
            ("00012.3", "12.3"),
            (".5", "0.5"),
            ("5.", "5"),
            ("1e3", "1000"),
            ("12.34e1", "123.4"),
            ("1.5e-3", "0.0015"),
            (
                "12345678901234567890123456789012345678.90",
                "12345678901234567890123456789012345678.90",
            ),
            ("NaN", "NaN"),
            ("-Infinity", "-Infinity"),
        ] {
            let bytes = encode(text).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(decode(&bytes).as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn refuses_what_is_no_number() {
        for text in [
            "",
            "-",
            ".",
            "1,5",
            "0x1",
            "1e",
            "1e999999999",
            "½",
            "--1",
            "1 ",
        ] {
            assert!(encode(text).is_err(), "{text}");
        }
        assert!(decode(&[0, 1]).is_err());
    }

    #[test]
    fn counts_significant_digits() {
        for (text, count) in [
            ("0", 0),
            ("-1.50", 2),
            ("100", 1),
            ("0.00123", 3),
            ("1e20", 1),
        ] {
            assert_eq!(significant_digits(text), Some(count), "{text}");
        }
    }
}
