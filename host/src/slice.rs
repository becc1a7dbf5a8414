//! How soon the system lets others run in the place of a thread that computes.

#[cfg(target_os = "linux")]
pub(crate) use linux::{LongSlice, shed};

/// A thread of a system that knows of no slices.
#[cfg(not(target_os = "linux"))]
pub(crate) struct LongSlice;

#[cfg(not(target_os = "linux"))]
pub(crate) fn shed() {}

#[cfg(not(target_os = "linux"))]
impl LongSlice {
    pub(crate) fn begin() -> Option<Self> {
        None
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::mem;
    use std::ptr;

    use libc::{
        SCHED_BATCH, SCHED_OTHER, SYS_sched_getattr, SYS_sched_setattr, sched_attr, syscall,
    };

    /// The longest slice that Linux gives (100 ms, in nanoseconds). From 6.12 on, whoever wakes up and has a shorter one, which by default
    /// everybody has, runs at once where a thread with a longer one does; by itself, that one goes on for up to 4 ms. It has its fair
    /// share all the same, so nobody waits for ever for a lock that it holds. Systems before take note of nothing.
    pub(super) const LONGEST: u64 = 100_000_000;

    /// A thread that gives way at once to whoever wakes up, until it is dropped there.
    pub(crate) struct LongSlice {
        before: sched_attr,
        /// It is of the thread that made it.
        _thread: std::marker::PhantomData<*const ()>,
    }

    impl LongSlice {
        /// For this thread, unless an operator has given the process a schedule of another kind.
        pub(crate) fn begin() -> Option<Self> {
            let before = attributes()?;
            let policy = i32::try_from(before.sched_policy).ok()?;
            if !matches!(policy, SCHED_OTHER | SCHED_BATCH) {
                return None;
            }
            set(&sched_attr {
                sched_runtime: LONGEST,
                ..before
            });
            Some(Self {
                before: usual(before),
                _thread: std::marker::PhantomData,
            })
        }
    }

    impl Drop for LongSlice {
        fn drop(&mut self) {
            set(&self.before);
        }
    }

    /// A thread that another one begins has its slice. Of those that may be begun while a guest has a turn, each calls this first.
    pub(crate) fn shed() {
        if let Some(inherited) = attributes().filter(|now| now.sched_runtime == LONGEST) {
            set(&usual(inherited));
        }
    }

    /// With the system's own slice, which is what zero means, in the place of one that was inherited.
    fn usual(attributes: sched_attr) -> sched_attr {
        let sched_runtime = match attributes.sched_runtime {
            LONGEST => 0,
            other => other,
        };
        sched_attr {
            sched_runtime,
            ..attributes
        }
    }

    /// This thread's.
    #[allow(unsafe_code, reason = "no crate has this call for ordinary threads")]
    pub(super) fn attributes() -> Option<sched_attr> {
        // SAFETY: all of it are numbers, for which zeros are values; the system writes as many bytes as it is told.
        unsafe {
            let mut attributes: sched_attr = mem::zeroed();
            let size = mem::size_of::<sched_attr>();
            let done = syscall(
                SYS_sched_getattr,
                0,
                ptr::from_mut(&mut attributes),
                size,
                0,
            );
            (done == 0).then_some(attributes)
        }
    }

    /// Where the system refuses it, all stays as it is.
    #[allow(unsafe_code, reason = "as `attributes`")]
    fn set(attributes: &sched_attr) {
        // SAFETY: the system reads as many bytes as `size` in it says, which it wrote itself.
        unsafe {
            syscall(SYS_sched_setattr, 0, ptr::from_ref(attributes), 0);
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::linux::{LONGEST, LongSlice, attributes, shed};

    #[test]
    fn a_thread_has_the_longest_slice_for_a_while() {
        let runtime = || attributes().expect("attributes").sched_runtime;
        let before = runtime();
        {
            let _slice = LongSlice::begin().expect("an ordinary thread");
            // Older systems keep none.
            assert!([0, LONGEST].contains(&runtime()), "{}", runtime());
        }
        assert_eq!(runtime(), before);
    }

    #[test]
    fn a_thread_that_is_begun_meanwhile_does_not_keep_it() {
        fn runtime_after(work: impl FnOnce() + Send + 'static) -> u64 {
            let begun = std::thread::spawn(|| {
                work();
                attributes().expect("attributes").sched_runtime
            });
            begun.join().expect("no panic")
        }
        let _slice = LongSlice::begin().expect("an ordinary thread");
        assert_ne!(runtime_after(shed), LONGEST);
        assert_ne!(runtime_after(|| drop(LongSlice::begin())), LONGEST);
    }
}
