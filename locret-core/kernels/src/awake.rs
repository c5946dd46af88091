//! Keeping the threads of a pool awake while short pieces of work follow each other.

use rayon::Yield;
use std::{
    hint,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Looks for work this often before a thread offers its processor to others.
const LOOKS: u32 = 64;

/// How long threads are waited for before the work begins.
const GATHERING: Duration = Duration::from_micros(200);

/// Whether threads of some pool are being kept awake.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Frees [`TAKEN`] when dropped.
struct Taken;

impl Drop for Taken {
    fn drop(&mut self) {
        TAKEN.store(false, Ordering::Release);
    }
}

/// What the thread with the work and those that are kept awake for it know of each other.
#[derive(Default)]
struct Shared {
    begun: AtomicBool,
    done: AtomicBool,
    here: AtomicUsize,
}

/// Set when dropped, so that a panic does not leave threads looking for work.
struct Done(Arc<Shared>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.done.store(true, Ordering::Release);
    }
}

/// Runs `f` in the caller's thread pool, whose other threads look for work until it returns.
///
/// A decoded token is some hundred parallel pieces of work of a tenth of a millisecond, and a chunk of
/// a prompt as many of a few. A thread that falls asleep between two of them costs a part of the next
/// one to wake up, and may wake on a processor that another one is on; here it takes what comes
/// without any call of the operating system. Threads that find nothing for long let others run on
/// their processor.
///
/// In a pool of one thread `f` is just called, and also while threads are kept awake for another
/// caller: there is work enough then.
pub fn awake<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let threads = rayon::current_num_threads();
    if threads == 1 || TAKEN.swap(true, Ordering::Acquire) {
        return f();
    }
    let _taken = Taken;
    rayon::scope(|_| {
        let done = Done(Arc::new(Shared::default()));
        let (shared, own) = (done.0.clone(), rayon::current_thread_index());
        rayon::spawn_broadcast(move |at| {
            // The thread that runs `f` would wait for itself. So would one that has taken a piece of
            // `f`, waits for another one and finds this instead: from the moment `f` begins, it is too
            // late to come.
            if Some(at.index()) != own && !shared.begun.load(Ordering::Acquire) {
                shared.here.fetch_add(1, Ordering::AcqRel);
                look_for_work(&shared.done);
            }
        });
        let (start, shared) = (Instant::now(), &done.0);
        let mut looks = 0;
        while shared.here.load(Ordering::Acquire) + 1 < threads && start.elapsed() < GATHERING {
            pause(&mut looks);
        }
        shared.begun.store(true, Ordering::Release);
        f()
    })
}

fn look_for_work(done: &AtomicBool) {
    let mut looks = 0;
    while !done.load(Ordering::Acquire) {
        match rayon::yield_now() {
            Some(Yield::Executed) => looks = 0,
            _ => pause(&mut looks),
        }
    }
}

/// Between two looks; after many of them others may run on this processor: the one that is waited for
/// may be among them.
fn pause(looks: &mut u32) {
    *looks += 1;
    if *looks < LOOKS {
        (0..16).for_each(|_| hint::spin_loop());
    } else {
        thread::yield_now();
    }
}

#[cfg(test)]
mod tests {
    use super::awake;
    use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};
    use std::{
        panic::{self, AssertUnwindSafe},
        thread,
    };

    fn pool(threads: usize) -> ThreadPool {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap()
    }

    fn squares(n: usize) -> usize {
        (0..n).into_par_iter().with_max_len(1).map(|i| i * i).sum()
    }

    #[test]
    fn work_is_done_and_results_come_back() {
        for threads in [1, 2, 4] {
            let pool = pool(threads);
            for _ in 0..50 {
                assert_eq!(pool.install(|| awake(|| squares(100))), 328_350);
            }
            // From several places at once, and one inside another.
            let nested = || awake(|| (awake(|| squares(10)), squares(20)));
            pool.install(|| {
                let (a, b) = rayon::join(nested, nested);
                assert_eq!((a, b), ((285, 2470), (285, 2470)));
            });
        }
        assert_eq!(awake(|| squares(4)), 14);
    }

    /// A thread that is told to stay awake while it waits for a piece of the very work that it would
    /// stay awake for must not do so: that work would wait for it.
    #[test]
    fn threads_that_come_late_do_not_hold_up_what_they_wait_for() {
        let pool = pool(2);
        for i in 0..200_000 {
            assert_eq!(pool.install(|| awake(|| squares(8))), 140, "{i}");
        }
    }

    #[test]
    fn many_callers_share_a_pool() {
        let pool = pool(2);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..3_000 {
                        assert_eq!(pool.install(|| awake(|| squares(8))), 140);
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_comes_through_and_leaves_the_pool_usable() {
        let pool = pool(2);
        let caught = panic::catch_unwind(AssertUnwindSafe(|| {
            pool.install(|| awake::<()>(|| panic!("as asked")));
        }));
        assert!(caught.is_err());
        assert_eq!(pool.install(|| awake(|| squares(100))), 328_350);
    }
}
