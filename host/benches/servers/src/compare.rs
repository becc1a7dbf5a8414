//! Two programs in turns, several times, and what lies in the middle.

use std::time::Duration;

use crate::bench::Pace;
use crate::report::{Goal, Row};

/// The medians of all rounds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Compared {
    /// The host's rate against the other's, round by round.
    pub(crate) ratio: f64,
    /// The other's time of processor a message against the host's.
    pub(crate) cpu_ratio: f64,
    pub(crate) host: f64,
    pub(crate) native: f64,
}

impl Compared {
    /// The host's rate against the other's, with a goal.
    pub(crate) fn row(&self, id: &'static str, work: impl Into<String>, goal: Goal) -> Row {
        Row {
            id,
            work: work.into(),
            goal,
            measured: self.ratio,
            unit: "×",
            figures: self.figures(),
        }
    }

    /// Both rates in words.
    fn figures(&self) -> String {
        format!(
            "{} against {} a second; {:.1} × the processor time of the program alone",
            thousands(self.host),
            thousands(self.native),
            1.0 / self.cpu_ratio
        )
    }
}

/// Runs both in turns; whoever went second goes first in the next round.
pub(crate) fn alternate(
    what: &str,
    rounds: usize,
    mut host: impl FnMut() -> anyhow::Result<Pace>,
    mut native: impl FnMut() -> anyhow::Result<Pace>,
) -> anyhow::Result<Compared> {
    let mut all = Vec::new();
    for round in 0..rounds {
        let (of_host, of_native) = if round % 2 == 0 {
            let first = native()?;
            (host()?, first)
        } else {
            let first = host()?;
            (first, native()?)
        };
        eprintln!(
            "  {what}, round {} of {rounds}: host {} a second, {:.1?} of processor each; native {} a second, {:.1?}",
            round + 1,
            thousands(of_host.rate),
            of_host.cpu_per_message,
            thousands(of_native.rate),
            of_native.cpu_per_message,
        );
        all.push((of_host, of_native));
    }
    let of = |value: &dyn Fn(&(Pace, Pace)) -> f64| median(all.iter().map(value).collect());
    let seconds = |time: Duration| time.as_secs_f64().max(1e-9);
    Ok(Compared {
        ratio: of(&|(host, native)| host.rate / native.rate),
        cpu_ratio: of(&|(host, native)| {
            seconds(native.cpu_per_message) / seconds(host.cpu_per_message)
        }),
        host: of(&|(host, _)| host.rate),
        native: of(&|(_, native)| native.rate),
    })
}

/// The middle one, or the mean of both.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match (values.len(), values.len() / 2) {
        (0, _) => f64::NAN,
        (n, middle) if n % 2 == 1 => values[middle],
        (_, middle) => (values[middle - 1] + values[middle]) / 2.0,
    }
}

/// `123,456`.
pub(crate) fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
