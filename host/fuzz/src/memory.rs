//! Memory held by a piece of work.

/// Does the work; panics if this thread held more than so many bytes for it at one time.
pub(crate) fn within<T>(most: usize, work: impl FnOnce() -> T) -> T {
    let mut done = None;
    let held = allocation_counter::measure(|| done = Some(work())).bytes_max;
    assert!(
        usize::try_from(held).is_ok_and(|held| held <= most),
        "{held} bytes were held at one time, where {most} are enough"
    );
    done.expect("measured work is done")
}
