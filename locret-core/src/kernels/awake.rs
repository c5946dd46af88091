//! Keeping the threads of a pool awake while short pieces of work follow each other.

use rayon::Yield;
use std::{
    hint,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

/// Looks for work this often before a thread offers its processor to others.
const LOOKS: u32 = 64;

/// Set when dropped, so that a panic does not leave threads looking for work.
struct Done(Arc<AtomicBool>);

impl Drop for Done {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Runs `f` in the caller's thread pool, whose other threads look for work until it returns.
///
/// A decoded token is some hundred parallel pieces of work of a tenth of a millisecond. A thread
/// that falls asleep between two of them costs a good part of the next one to wake up; here it
/// takes what comes without any call of the operating system. Threads that find nothing for long
/// let others run on their processor. In a pool of one thread `f` is just called.
pub fn awake<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    if rayon::current_num_threads() == 1 {
        return f();
    }
    rayon::scope(|_| {
        let done = Done(Arc::new(AtomicBool::new(false)));
        let (flag, own) = (done.0.clone(), rayon::current_thread_index());
        rayon::spawn_broadcast(move |at| {
            // The thread that runs `f` would wait for itself.
            if Some(at.index()) != own {
                look_for_work(&flag);
            }
        });
        f()
    })
}

fn look_for_work(done: &AtomicBool) {
    let mut idle = 0;
    while !done.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(Yield::Executed) {
            idle = 0;
            continue;
        }
        idle += 1;
        if idle < LOOKS {
            (0..16).for_each(|_| hint::spin_loop());
        } else {
            thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::awake;
    use rayon::prelude::*;
    use std::panic::{self, AssertUnwindSafe};

    fn squares(n: usize) -> usize {
        (0..n).into_par_iter().with_max_len(1).map(|i| i * i).sum()
    }

    #[test]
    fn work_is_done_and_results_come_back() {
        for threads in [1, 2, 4] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
            let pool = pool.unwrap();
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

    #[test]
    fn a_panic_comes_through_and_leaves_the_pool_usable() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build();
        let pool = pool.unwrap();
        let caught = panic::catch_unwind(AssertUnwindSafe(|| {
            pool.install(|| awake::<()>(|| panic!("as asked")));
        }));
        assert!(caught.is_err());
        assert_eq!(pool.install(|| awake(|| squares(100))), 328_350);
    }
}
