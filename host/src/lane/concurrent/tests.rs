//! The lane over a log and a stage that are fakes, with the clock of the tests.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::MAX_AHEAD;
use crate::delivery::{Cause, dead_letter};
use crate::lane::fakes::{Bench, LONG, NOTHING, fault, millis, random};
use crate::log::{Gap, LogError};
use crate::pipeline::{OnExhausted, OnGap, Order};
use crate::record::Record;

#[tokio::test(start_paused = true)]
async fn keys_keep_their_order_and_run_side_by_side() {
    let keys = (0..1000).map(|n| Some(n * n % 17));
    let bench = Bench::new(Order::Key, keys.clone(), |r, _| (random(r.offset), Ok(())));
    bench.run().await;
    let emitted = bench.emitted();
    let key = |n: &i64| n * n % 17;
    for one in 0..17 {
        let of_key: Vec<_> = emitted.iter().filter(|n| key(n) == one).collect();
        assert!(of_key.is_sorted(), "{of_key:?}");
    }
    assert!(!emitted.is_sorted(), "one after the other");
    assert_eq!(emitted.iter().collect::<BTreeSet<_>>().len(), 1000);
    assert_eq!(emitted.len(), 1000);
    assert_eq!(bench.peak(), 8);
    assert_eq!(bench.done(), 1000);
}

#[tokio::test(start_paused = true)]
async fn what_has_no_order_runs_side_by_side() {
    for (order, key) in [(Order::None, Some(1)), (Order::Key, None)] {
        let bench = Bench::new(order, [key; 100], |r, _| (random(r.offset), Ok(())));
        bench.run().await;
        assert_eq!(bench.peak(), 8);
        assert_eq!(bench.done(), 100);
    }
}

#[tokio::test(start_paused = true)]
async fn an_offset_is_done_once_all_below_it_are_in_the_log() {
    let slow = |r: &Record, _| (millis(if r.offset == 2 { 1000 } else { 1 }), Ok(()));
    let bench = Bench::new(Order::Key, (0..50).map(Some), slow);
    let look = async {
        sleep(millis(3)).await;
        assert_eq!(bench.done(), NOTHING, "not acknowledged yet");
        sleep(millis(500)).await;
        assert_eq!(bench.done(), 2);
        sleep(millis(1000)).await;
        assert_eq!(bench.done(), 50);
    };
    bench.run_beside(look).await;
}

#[tokio::test(start_paused = true)]
async fn a_retry_holds_up_its_own_key_alone() {
    let work = |r: &Record, attempt| match (r.offset, attempt) {
        (0, 1 | 2) => (millis(1), Err(fault(Cause::Retry))),
        _ => (millis(1), Ok(())),
    };
    let bench = Bench::new(Order::Key, (0..40).map(|n| Some(n % 4)), work);
    let look = async {
        sleep(millis(1000)).await;
        assert_eq!(bench.emitted().len(), 30, "all of the other keys");
        sleep(LONG / 2).await;
    };
    bench.run_beside(look).await;
    let emitted = bench.emitted();
    assert!(
        emitted[30..]
            .iter()
            .eq(&[0, 4, 8, 12, 16, 20, 24, 28, 32, 36]),
        "{emitted:?}"
    );
    assert_eq!(bench.done(), 40);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_given_up_on_makes_way() {
    let work = |r: &Record, _| match r.offset {
        3 => (millis(1), Err(fault(Cause::Reject))),
        5 => (millis(1), Err(fault(Cause::Retry))),
        _ => (millis(1), Ok(())),
    };
    let bench = Bench::new(Order::Key, (0..20).map(|n| Some(n % 2)), work);
    bench.run().await;
    assert_eq!(bench.dead(), [3, 5]);
    assert_eq!(bench.emitted().len(), 18);
    assert_eq!(bench.calls(), 22);
    assert_eq!(bench.done(), 20);
}

#[tokio::test(start_paused = true)]
async fn stops_where_retries_are_exhausted_if_so_told() {
    let work = |r: &Record, _| match r.offset {
        2 => (millis(1), Err(fault(Cause::Retry))),
        3 => (Duration::from_secs(60), Ok(())),
        4 => (Duration::from_secs(5), Err(fault(Cause::Retry))),
        _ => (millis(1), Ok(())),
    };
    let keys = (0..6).map(|n| Some(if n == 5 { 3 } else { n }));
    let mut bench = Bench::new(Order::Key, keys, work);
    bench.policy().on_exhausted = OnExhausted::Stop;
    let look = async {
        sleep(Duration::from_secs(50)).await;
        assert!(
            bench.readiness.reasons().is_empty(),
            "it finishes what runs"
        );
        sleep(Duration::from_secs(15)).await;
        let reasons = bench.readiness.reasons().join("\n");
        assert!(reasons.contains("offset 2 has failed 3 times"), "{reasons}");
    };
    bench.run_beside(look).await;
    assert_eq!(bench.emitted(), [0, 1, 3]);
    assert_eq!(bench.done(), 2);
    assert!(
        bench.readiness.reasons().is_empty(),
        "the partition is given up"
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_before_a_gap_is_finished_first() {
    for (on_gap, emitted) in [(OnGap::Stop, 10), (OnGap::Continue, 20)] {
        let slow = |_: &Record, _| (millis(100), Ok(()));
        let mut bench = Bench::new(Order::Key, (0..20).map(|n| Some(n % 3)), slow);
        bench.policy().on_gap = on_gap;
        let gap = Gap::Removed {
            expected: 10,
            first: 15,
        };
        bench.insert_gap(10, gap);
        let look = async {
            sleep(LONG / 2).await;
            assert_eq!(
                bench.readiness.reasons().len(),
                usize::from(on_gap == OnGap::Stop)
            );
        };
        bench.run_beside(look).await;
        assert_eq!(bench.emitted().len(), emitted);
        assert_eq!(bench.done(), emitted as i64);
    }
}

#[tokio::test(start_paused = true)]
async fn an_output_that_is_refused_costs_its_message_alone() {
    let work = |r: &Record, _| (random(r.offset), Ok(()));
    let bench = Bench::new(Order::Key, (0..100).map(|n| Some(n % 10)), work).refuse(|o| {
        let refused = !dead_letter::is_one(o) && o.value.as_deref() == Some(b"42");
        refused.then(|| LogError::Refused("as told".into()))
    });
    bench.run().await;
    assert_eq!(bench.dead(), [42]);
    assert_eq!(bench.emitted().len(), 99);
    assert_eq!(bench.done(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_log_that_is_away_is_waited_for_in_order() {
    let work = |r: &Record, _| (random(r.offset), Ok(()));
    // As the sink promises: a prefix of what it was given.
    let (mut calls, start) = (0, Instant::now());
    let bench = Bench::new(Order::Key, (0..300).map(|n| Some(n % 10)), work).refuse(move |_| {
        calls += 1;
        let away = calls > 40 && start.elapsed() < Duration::from_secs(5);
        away.then(|| LogError::Unavailable("as told".into()))
    });
    bench.run().await;
    let emitted = bench.emitted();
    for key in 0..10 {
        assert!(
            emitted.iter().filter(|n| **n % 10 == key).is_sorted(),
            "{emitted:?}"
        );
    }
    assert_eq!(emitted.len(), 300);
    assert_eq!(bench.done(), 300);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_waited_for_and_no_message_pays() {
    let work = |_: &Record, attempt| {
        assert_eq!(attempt, 1);
        (millis(1), Ok(()))
    };
    let bench = Bench::new(Order::Key, (0..100).map(Some), work);
    bench.take_store_away(9);
    bench.run().await;
    assert_eq!(bench.dead(), [] as [i64; 0]);
    assert_eq!(bench.emitted().len(), 100);
}

#[tokio::test(start_paused = true)]
async fn a_stop_finishes_what_runs_and_leaves_the_rest() {
    let work = |r: &Record, _| match r.offset {
        // Waits for its next delivery when the stop comes.
        2 => (millis(1), Err(fault(Cause::Retry))),
        _ => (millis(700), Ok(())),
    };
    let bench = Bench::new(Order::Key, (0..100).map(Some), work);
    let start = Instant::now();
    bench.run_beside(sleep(millis(1000))).await;
    assert!(start.elapsed() < millis(1500), "{:?}", start.elapsed());
    let mut emitted = bench.emitted();
    emitted.sort_unstable();
    assert_eq!(emitted, [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
    assert_eq!(bench.done(), 2, "what is behind comes again");
}

#[tokio::test(start_paused = true)]
async fn one_slow_message_lets_no_more_than_so_many_go_ahead() {
    let slow = |r: &Record, _| (if r.offset == 5 { LONG / 2 } else { millis(1) }, Ok(()));
    let bench = Bench::new(Order::None, vec![None; 3 * MAX_AHEAD], slow);
    let look = async {
        sleep(LONG / 3).await;
        assert_eq!(bench.taken(), 5 + MAX_AHEAD);
        sleep(LONG / 2).await;
    };
    bench.run_beside(look).await;
    assert_eq!(bench.done(), 3 * MAX_AHEAD as i64);
}

/// On the paused clock, so that it is the order of the work which is measured, and not the machine.
#[tokio::test(start_paused = true)]
async fn ten_thousand_messages_of_a_hundred_keys() {
    let key = |n: i64| (n * 7919 % 100).unsigned_abs();
    let work = |r: &Record, _| (random(r.offset), Ok(()));
    let mut bench = Bench::new(Order::Key, (0..10_000).map(|n| Some(key(n))), work);
    bench.policy().concurrency = 100;
    let start = Instant::now();
    bench.run().await;
    let took = start.elapsed();
    let of_key = |one| (0..10_000).filter(|n| key(*n) == one).map(random).sum();
    let slowest: Duration = (0..100).map(of_key).max().unwrap_or_default();
    let shared = (0..10_000).map(random).sum::<Duration>() / 100;
    let ideal = slowest.max(shared);
    assert!(took <= ideal.mul_f64(1.5), "{took:?}, ideally {ideal:?}");
}
