//! Where SQLite's memory comes from, and how much of it a guest's statement may have.
//!
//! SQLite's own limits are for the whole process: one stage's greed would fail its neighbours' statements, and the
//! host's. A connection has a thread of its own here, so its memory is counted there, and SQLite is told that there is no
//! more when a statement has had its share.

use std::alloc::{Layout, alloc, dealloc, realloc};
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::OnceLock;

use rusqlite::ffi;

/// What SQLite may hold for a statement of a guest, and for all that its transaction did before: rows as they are
/// made, what is sorted, and copies of pages for savepoints. Four answers of the largest size.
pub(super) const MAX_BYTES: i64 = 64 * 1024 * 1024;

/// Before each piece of memory: its size, and room so that the piece is aligned as SQLite wants it.
const HEADER: usize = 16;

thread_local! {
    /// Since the connection was taken from the pool; below 0 where more was given back than taken.
    static USED: Cell<i64> = const { Cell::new(0) };
    static LIMIT: Cell<i64> = const { Cell::new(i64::MAX) };
    static IS_EXCEEDED: Cell<bool> = const { Cell::new(false) };
}

/// Counts from zero on this thread: its connection is at rest.
pub(super) fn reset() {
    USED.set(0);
}

/// Runs work on this thread within [`MAX_BYTES`]; answers whether it wanted more as well.
pub(super) fn bounded<T>(work: impl FnOnce() -> T) -> (T, bool) {
    LIMIT.set(MAX_BYTES);
    IS_EXCEEDED.set(false);
    let done = work();
    LIMIT.set(i64::MAX);
    (done, IS_EXCEEDED.get())
}

/// Has SQLite take its memory here. Nothing in this process may have used it before.
#[allow(
    unsafe_code,
    reason = "SQLite's settings of the process have no safe form"
)]
pub(super) fn install() -> Result<(), String> {
    static INSTALLED: OnceLock<Result<(), c_int>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let methods = ffi::sqlite3_mem_methods {
            xMalloc: Some(take),
            xFree: Some(give_back),
            xRealloc: Some(resize),
            xSize: Some(size_of),
            xRoundup: Some(round_up),
            xInit: Some(begin),
            xShutdown: Some(end),
            pAppData: ptr::null_mut(),
        };
        // SAFETY: both options take what they are given here; SQLite copies the methods, and refuses both calls if it is
        // in use already. Only one thread is here, and those that would open a database wait for it.
        let codes = unsafe {
            [
                // Its own statistics are behind a lock that all connections share.
                ffi::sqlite3_config(ffi::SQLITE_CONFIG_MEMSTATUS, 0 as c_int),
                ffi::sqlite3_config(ffi::SQLITE_CONFIG_MALLOC, &raw const methods),
            ]
        };
        match codes.into_iter().find(|code| *code != ffi::SQLITE_OK) {
            None => Ok(()),
            Some(code) => Err(code),
        }
    });
    installed.map_err(|code| {
        format!("SQLite was in use before the host could bound its memory (code {code})")
    })
}

/// Notes `more` bytes, unless they are too many.
fn count(more: i64) -> bool {
    let used = USED.get() + more;
    if more > 0 && used > LIMIT.get() {
        IS_EXCEEDED.set(true);
        return false;
    }
    USED.set(used);
    true
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes + HEADER, HEADER).ok()
}

#[allow(unsafe_code, reason = "it is called by SQLite")]
unsafe extern "C" fn take(bytes: c_int) -> *mut c_void {
    let Some((bytes, layout)) = usize::try_from(bytes)
        .ok()
        .and_then(|b| Some((b, layout(b)?)))
    else {
        return ptr::null_mut();
    };
    if !count(bytes as i64) {
        return ptr::null_mut();
    }
    // SAFETY: the layout is not empty, and the header is in what was taken, aligned for it.
    unsafe {
        let start = alloc(layout);
        if start.is_null() {
            count(-(bytes as i64));
            return ptr::null_mut();
        }
        start.cast::<usize>().write(bytes);
        start.add(HEADER).cast()
    }
}

/// The beginning of a piece and its size.
///
/// # Safety
/// `piece` was taken here and not given back.
#[allow(unsafe_code, reason = "see there")]
unsafe fn start_of(piece: *mut c_void) -> (*mut u8, usize) {
    // SAFETY: a piece has its header before it, in which `take` or `resize` wrote the size.
    unsafe {
        let start = piece.cast::<u8>().sub(HEADER);
        (start, start.cast::<usize>().read())
    }
}

#[allow(unsafe_code, reason = "it is called by SQLite")]
unsafe extern "C" fn give_back(piece: *mut c_void) {
    if piece.is_null() {
        return;
    }
    // SAFETY: SQLite gives back what it took, once, and the layout is the one it was taken with.
    unsafe {
        let (start, bytes) = start_of(piece);
        count(-(bytes as i64));
        dealloc(
            start,
            Layout::from_size_align_unchecked(bytes + HEADER, HEADER),
        );
    }
}

#[allow(unsafe_code, reason = "it is called by SQLite")]
unsafe extern "C" fn resize(piece: *mut c_void, bytes: c_int) -> *mut c_void {
    let Some(bytes) = usize::try_from(bytes).ok().filter(|b| layout(*b).is_some()) else {
        return ptr::null_mut();
    };
    // SAFETY: SQLite resizes what it took, and what stays null it still has; the new size fits a layout.
    unsafe {
        let (start, before) = start_of(piece);
        let more = bytes as i64 - before as i64;
        if !count(more) {
            return ptr::null_mut();
        }
        let old = Layout::from_size_align_unchecked(before + HEADER, HEADER);
        let start = realloc(start, old, bytes + HEADER);
        if start.is_null() {
            count(-more);
            return ptr::null_mut();
        }
        start.cast::<usize>().write(bytes);
        start.add(HEADER).cast()
    }
}

#[allow(unsafe_code, reason = "it is called by SQLite")]
unsafe extern "C" fn size_of(piece: *mut c_void) -> c_int {
    if piece.is_null() {
        return 0;
    }
    // SAFETY: SQLite asks about what it took.
    let (_, bytes) = unsafe { start_of(piece) };
    c_int::try_from(bytes).unwrap_or(c_int::MAX)
}

#[allow(unsafe_code, reason = "it is called by SQLite")]
unsafe extern "C" fn round_up(bytes: c_int) -> c_int {
    bytes.saturating_add(7) & !7
}

#[allow(unsafe_code, reason = "it is called by SQLite")]
unsafe extern "C" fn begin(_: *mut c_void) -> c_int {
    ffi::SQLITE_OK
}

#[allow(unsafe_code, reason = "it is called by SQLite")]
unsafe extern "C" fn end(_: *mut c_void) {}
