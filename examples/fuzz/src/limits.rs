//! What an input may cost: a second of the processor, and memory by its length.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

/// Of the process's processor time.
pub const TIME: Duration = Duration::from_secs(1);

/// Bytes that an input of `length` bytes may have allocated at any moment.
pub const fn memory(length: usize) -> usize {
    4 * length + (16 << 20)
}

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn more(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: everything is left to the system's allocator; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, p: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(p, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What something took.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// Processor time of all threads.
    pub time: Duration,
    /// Bytes above what was allocated before, at most.
    pub memory: usize,
}

/// Runs `f` and counts.
pub fn counted<R>(f: impl FnOnce() -> R) -> (R, Cost) {
    let (live, start) = (LIVE.load(Relaxed), processor_time());
    PEAK.store(live, Relaxed);
    let result = f();
    let cost = Cost {
        time: processor_time().saturating_sub(start),
        memory: PEAK.load(Relaxed).saturating_sub(live),
    };
    (result, cost)
}

/// What the process has taken of the processor, however many others want it.
fn processor_time() -> Duration {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `now` is there to be written to.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut now) };
    assert_eq!(failed, 0, "the system has no clock of the process");
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
